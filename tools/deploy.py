"""
Packages the service for AWS, and deploys it there.

    ./deploy package --stage dev   makes dist/dev/template.json and dist/dev/deployment.zip; needs no AWS account
    ./deploy aws --stage prod      does that, then brings the stack ob-ai-studio-prod to it by CloudFormation

A stage's settings stand in .env.STAGE, NAME=value lines; README, section Deployment, tells all. For AWS it wants
credentials and a region as the AWS CLI does: AWS_PROFILE, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools import Problem, alarms, bundle, template

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / ".chalice" / "config.json"
APP = "ob-ai-studio"

# What the AWS CLI says, and what to do then.
ADVICE = {
    r"Unable to locate credentials|NoCredentials": "There are no AWS credentials. Set AWS_PROFILE, or "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and try again.",
    r"config profile .* could not be found": "AWS_PROFILE names a profile that is not there. `aws configure "
    "list-profiles` tells those that are.",
    r"ExpiredToken|InvalidClientTokenId|SignatureDoesNotMatch|SSO session|Token has expired": "AWS does not accept the "
    "credentials; log in anew (`aws sso login`), or take others.",
    r"AccessDenied|UnauthorizedOperation|not authorized": "The credentials lack a right; README, section Deployment, "
    "lists those that are needed.",
    r"ROLLBACK_(COMPLETE|FAILED) state": "The stack's first deployment failed, and it must be deleted before the next: "
    "aws cloudformation delete-stack --stack-name STACK, with its name and region.",
    r"\(403\)": "The credentials lack a right, or the bucket is another account's.",
    r"Could not connect to the endpoint|EndpointConnection": "AWS cannot be reached; check the network and AWS_REGION.",
}


class Failed(Exception):
    """Raised when the AWS CLI fails, with what it said."""


@dataclass(frozen=True, kw_only=True)
class Aws:
    """The AWS CLI in one region; each command is shown before it runs."""

    region: str

    def run(self, *words: str) -> str:
        """What it says. Raises Failed."""
        print(f"$ aws {shlex.join(words)}", flush=True)
        done = cli(*words, env={"AWS_DEFAULT_REGION": self.region})
        if done.returncode != 0:
            raise Failed(done.stderr.strip() or done.stdout.strip())
        return done.stdout

    def ask(self, *words: str) -> Any:
        """What it says, read as JSON; None where it says nothing. Raises Failed."""
        said = self.run(*words, "--output", "json")
        return json.loads(said) if said.strip() else None


def cli(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the AWS CLI."""
    return subprocess.run(
        [sys.executable, "-m", "awscli", *words],
        env={**os.environ, "AWS_PAGER": "", **env},
        capture_output=True,
        text=True,
    )


def package(stage: str, values: dict[str, str], folder: Path) -> None:
    """Make the stage's template and zip in the folder. Raises Problem."""
    made = bundle.build(stage)
    folder.mkdir(parents=True, exist_ok=True)
    bundle.write(made.files, folder / "deployment.zip")
    text = json.dumps(template.fill(made.template, values), indent=1)
    (folder / "template.json").write_text(text + "\n", encoding="utf-8")
    _say_what_was_made(folder)
    if odd := alarms.warning(values):
        print(f"Look at this: {odd}", flush=True)


def _say_what_was_made(folder: Path) -> None:
    path = folder / "deployment.zip"
    rows = bundle.weights(path)
    print(f"{path}: {path.stat().st_size / 1000:,.0f} kB, {sum(row[2] for row in rows) / 1000:,.0f} kB unpacked")
    for name, packed, unpacked in rows:
        print(f"  {packed / 1000:8,.1f} kB {unpacked / 1000:8,.1f} kB unpacked  {name}")
    print(f"{folder / 'template.json'}", flush=True)


def deploy(stage: str, values: dict[str, str], folder: Path) -> None:
    """Bring the stage's stack to what was packaged in the folder. Raises Problem."""
    aws = Aws(region=_region())
    certificate = values.get("DEPLOY_CERTIFICATE_ARN")
    if certificate and certificate.split(":")[3] != aws.region:
        raise Problem(f"DEPLOY_CERTIFICATE_ARN is of another region; the stack's is {aws.region}. Get one there.")
    try:
        bucket = _bucket(aws)
        _upload(aws, stage, folder, bucket)
        _apply(aws, stage, folder, bucket)
        _say_how_to_go_on(_outputs(aws, stage), values, stage)
    except Failed as error:
        raise Problem(_advice(str(error))) from error


def _region() -> str:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = region or cli("configure", "get", "region", env={}).stdout.strip()
    if not region:
        raise Problem("There is no AWS region. Set AWS_REGION, for example to ap-southeast-1, and try again.")
    return region


def _advice(said: str) -> str:
    last = said.splitlines()[-1] if said else "The AWS CLI failed without a word."
    return next((f"{advice} ({last})" for sign, advice in ADVICE.items() if re.search(sign, said)), last)


def _bucket(aws: Aws) -> str:
    """The bucket for what is deployed, made if it is not there; nobody else can read it."""
    account = aws.ask("sts", "get-caller-identity")["Account"]
    bucket = f"{APP}-deploy-{account}-{aws.region}"
    try:
        aws.run("s3api", "head-bucket", "--bucket", bucket, "--expected-bucket-owner", account)
        return bucket
    except Failed as error:
        if "404" not in str(error):
            raise
    place = [] if aws.region == "us-east-1" else ["--create-bucket-configuration", f"LocationConstraint={aws.region}"]
    aws.run("s3api", "create-bucket", "--bucket", bucket, *place)
    blocked = "BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true"
    aws.run("s3api", "put-public-access-block", "--bucket", bucket, "--public-access-block-configuration", blocked)
    return bucket


def _upload(aws: Aws, stage: str, folder: Path, bucket: str) -> None:
    aws.run(
        *("cloudformation", "package", "--use-json"),
        *("--template-file", str(folder / "template.json"), "--output-template-file", str(folder / "uploaded.json")),
        *("--s3-bucket", bucket, "--s3-prefix", stage),
    )


def _apply(aws: Aws, stage: str, folder: Path, bucket: str) -> None:
    begun = datetime.now(UTC)
    stack = stack_name(stage)
    print(f"The stack {stack} is brought to this; the first time takes some two minutes.", flush=True)
    try:
        aws.run(
            *("cloudformation", "deploy", "--template-file", str(folder / "uploaded.json"), "--stack-name", stack),
            # A template over 51,200 bytes goes by way of a bucket.
            *("--s3-bucket", bucket, "--s3-prefix", stage),
            *("--capabilities", "CAPABILITY_IAM", "--no-fail-on-empty-changeset", "--tags", f"app={APP}"),
        )
    except Failed as error:
        events = _failures(aws, stack, begun)
        if not events:
            raise
        raise Problem(
            "\n  ".join([f"The stack {stack} could not be brought to this:", *events]) + "\nMend that and deploy again."
        ) from error


def stack_name(stage: str) -> str:
    """The name of the stage's stack."""
    return f"{APP}-{stage}"


def _failures(aws: Aws, stack: str, begun: datetime) -> list[str]:
    """What failed since then, first things first."""
    try:
        events = aws.ask("cloudformation", "describe-stack-events", "--stack-name", stack)["StackEvents"]
    except Failed:
        return []
    return [
        f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', event['ResourceStatus'])}"
        for event in reversed(events)
        if "FAILED" in event["ResourceStatus"] and datetime.fromisoformat(event["Timestamp"]) >= begun
    ]


def _outputs(aws: Aws, stage: str) -> dict[str, str]:
    (stack,) = aws.ask("cloudformation", "describe-stacks", "--stack-name", stack_name(stage))["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}


def _say_how_to_go_on(outputs: dict[str, str], values: dict[str, str], stage: str) -> None:
    url = outputs.get("EndpointURL", "").rstrip("/")
    lines = [f"The stack {stack_name(stage)} is up to date.", f"API: {url}"]
    if "DomainTarget" in outputs:
        domain = values["DEPLOY_DOMAIN"]
        lines.append(f"Point {domain} to {outputs['DomainTarget']} (a CNAME). Then the API is https://{domain} too.")
    if "DashboardURL" in outputs:
        lines.append(f"Dashboard: {outputs['DashboardURL']}")
    if "DEPLOY_ALARM_EMAIL" in values:
        lines.append(f"{values['DEPLOY_ALARM_EMAIL']} is told of alarms once the link in AWS's mail to it was opened.")
    if "PUBLIC_BASE_URL" not in values:
        lines.append(f"Next: write PUBLIC_BASE_URL={url} into .env.{stage} and deploy again, for RunPod's callbacks.")
    lines.append(f"To see that all of it works: .venv/lambda/bin/python -m tools.doctor --env .env.{stage}")
    print("\n".join(["", *lines]))


def stages() -> list[str]:
    """The stages that config.json has."""
    return list(json.loads(CONFIG.read_text(encoding="utf-8"))["stages"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="./deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["package", "aws"], help="only make the files, or deploy them too")
    parser.add_argument("--stage", choices=stages(), required=True)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they are made (default: %(default)s)")
    parser.add_argument("--values", type=Path, metavar="FILE", help="the stage's settings (default: .env.STAGE)")
    options = parser.parse_args()
    try:
        values = template.read_values(options.values or ROOT / f".env.{options.stage}")
        package(options.stage, values, options.dist / options.stage)
        if options.what == "aws":
            deploy(options.stage, values, options.dist / options.stage)
    except Problem as problem:
        sys.exit(f"./deploy: {problem}")
    except KeyboardInterrupt:
        sys.exit("\n./deploy: stopped. What CloudFormation has begun it carries on; deploy again to see the end of it.")


if __name__ == "__main__":
    main()
