"""Does to a template what CloudFormation does first: `python expand_sam.py FOLDER` writes each `sam-X` as `cfn-X`."""

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
    folder = Path(sys.argv[1])
    for path in folder.glob("sam-*.json"):
        expanded = expand(json.loads(path.read_text()))
        (folder / path.name.replace("sam-", "cfn-", 1)).write_text(json.dumps(expanded))


if __name__ == "__main__":
    main()
