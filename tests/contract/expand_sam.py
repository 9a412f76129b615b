"""Does to templates what CloudFormation does first: `python expand_sam.py IN OUT …` writes each without SAM's own types."""

import json
import sys
from pathlib import Path

from samtranslator.parser import parser
from samtranslator.translator.translator import Translator

S3 = "s3://bucket/deployment.zip"  # SAM takes only what is uploaded


def expand(template):
    for resource in template["Resources"].values():
        if resource["Type"] == "AWS::Serverless::Function":
            resource["Properties"]["CodeUri"] = S3
    return Translator({}, parser.Parser()).translate(template, {})


def main():
    pairs = iter(sys.argv[1:])
    for source, target in zip(pairs, pairs):
        Path(target).write_text(json.dumps(expand(json.loads(Path(source).read_text()))))


if __name__ == "__main__":
    main()
