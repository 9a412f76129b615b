"""What ./deploy refuses, in a sentence that says what to do; and what of a zip and a template is not left to luck."""

import json
import subprocess

import pytest

from chalicelib import settings
from tools import Problem, bundle, deploy, template

ARN = "arn:aws:acm:eu-west-1:123456789012:certificate/1234-abcd"
VALUES = {
    "RUNPOD_API_KEY": "ssm:/ob/RUNPOD_API_KEY",
    "RUNPOD_ENDPOINT_ID": "endpoint",
    "CLOUDFLARE_ACCOUNT_ID": "account",
    "CLOUDFLARE_API_TOKEN": "ssm:/ob/CLOUDFLARE_API_TOKEN",
    "D1_DATABASE_ID": "database",
    "R2_ACCESS_KEY_ID": "key-id",
    "R2_SECRET_ACCESS_KEY": "ssm:/ob/R2_SECRET_ACCESS_KEY",
}


@pytest.fixture
def read(tmp_path):
    """Reads a stage's file with these values."""

    def read_values(**changes):
        path = tmp_path / ".env.prod"
        path.write_text("".join(f"{name}={value}\n" for name, value in {**VALUES, **changes}.items()))
        return template.read_values(path)

    return read_values


def test_a_complete_file_is_read_without_what_is_empty(read):
    assert read(SPOOL_BUCKET="", MAX_ATTEMPTS="3") == {**VALUES, "MAX_ATTEMPTS": "3"}


def test_a_stage_without_a_file_is_told_what_it_needs(tmp_path):
    with pytest.raises(Problem, match=r"no file \.env\.dev, which has the stage's settings as NAME=value lines"):
        template.read_values(tmp_path / ".env.dev")


@pytest.mark.parametrize("name", sorted(settings.SECRETS))
def test_a_secret_that_stands_in_the_file_is_refused_without_being_shown(read, name):
    with pytest.raises(Problem, match=f"{name} is a secret .* aws ssm put-parameter --type SecureString") as refused:
        read(**{name: "a-very-secret-value"})

    assert "a-very-secret-value" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"RUNPOD_APIKEY": "x"}, "no setting RUNPOD_APIKEY; did you mean RUNPOD_API_KEY?"),
        ({"QUITE_ANOTHER": "x"}, "no setting QUITE_ANOTHER; README has the table"),
        ({"AWS_REGION": "x"}, "no setting AWS_REGION"),
        ({"D1_DATABASE_ID": "", "R2_ACCESS_KEY_ID": ""}, "It lacks D1_DATABASE_ID, R2_ACCESS_KEY_ID;"),
        ({"MAX_ATTEMPTS": "many"}, "Setting MAX_ATTEMPTS is malformed"),
        ({"MAX_ATTEMPTS": "ssm:ob/../*"}, "MAX_ATTEMPTS must be ssm:/name"),
        ({"RUNPOD_API_KEY": "ssm:/ob/*"}, "RUNPOD_API_KEY must be ssm:/name"),
        ({"DEPLOY_DOMAIN": "api_example", "DEPLOY_CERTIFICATE_ARN": ARN}, "DEPLOY_DOMAIN is malformed"),
        ({"DEPLOY_DOMAIN": "api.example.com"}, "go together"),
        ({"DEPLOY_CERTIFICATE_ARN": ARN}, "go together"),
        ({"DEPLOY_RESERVED_CONCURRENCY": "0"}, "DEPLOY_RESERVED_CONCURRENCY is malformed"),
        ({"DEPLOY_ALARM_EMAIL": "ops"}, "DEPLOY_ALARM_EMAIL is malformed"),
        ({"DEPLOY_DAILY_USD": "0.00"}, "DEPLOY_DAILY_USD is malformed"),
        ({"SERVICE_NAME": "mine"}, r"SERVICE_NAME is set by \./deploy itself"),
        ({"START_DEADLINE": "ssm:/ob/START"}, "START_DEADLINE must stand here itself"),
        ({"API_KEY_HASHES": ",".join(["f" * 64] * 70)}, "a function's environment holds 4096"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_refused_before_anything_is_made(read, changes, sentence):
    with pytest.raises(Problem, match=rf"\.env\.prod cannot be used\. .*({sentence})"):
        read(**changes)


def test_callbacks_come_to_the_domain_unless_they_should_go_elsewhere(read):
    domain = {"DEPLOY_DOMAIN": "api.example.com", "DEPLOY_CERTIFICATE_ARN": ARN}

    assert read(**domain)["PUBLIC_BASE_URL"] == "https://api.example.com"
    assert read(**domain, PUBLIC_BASE_URL="https://other.example")["PUBLIC_BASE_URL"] == "https://other.example"


def test_the_functions_get_settings_what_keeps_their_memory_small_and_the_stacks_name():
    values = {**VALUES, "DEPLOY_RESERVED_CONCURRENCY": "5"}

    assert template.environment(values) == VALUES | {"MALLOC_ARENA_MAX": "2", "SERVICE_NAME": {"Ref": "AWS::StackName"}}


def dist(name, version, *files):
    """A package as a wheel leaves it."""
    info = f"{name}-{version}.dist-info"
    content = {path: b"" for path in files}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: 9\n".encode()
    record = [*content, f"{info}/RECORD", "../../bin/command", f"{name}/__pycache__/x.cpython-313.pyc"]
    content[f"{info}/RECORD"] = "".join(f"{path},sha256=abc,1\n" for path in record).encode()
    return content


REQUIREMENTS = "# a comment\nrequests==2.34.2\ncharset-normalizer==3.5.2\n"
SERVICE = {"app.py", "chalicelib/api.py"}
FILES = {
    "app.py": b"",
    "chalicelib/api.py": b"",
    "chalice/__init__.py": b"",
    "chalice/app.py": b"",
    **dist("requests", "2.34.2", "requests/__init__.py"),
    **dist("charset_normalizer", "3.5.2", "charset_normalizer/__init__.py"),
}


def test_a_zip_with_all_that_is_named_passes():
    bundle.check(FILES, REQUIREMENTS, SERVICE)


@pytest.mark.parametrize(
    ("lost", "added", "sentence"),
    [
        (dist("requests", "2.34.2", "requests/__init__.py"), {}, "lacks what requirements.txt names: requests==2.34.2"),
        ({}, dist("six", "1.17.0", "six.py"), "does not name: six"),
        ({"requests/__init__.py": b""}, {}, "lacks parts of what it should hold: requests/__init__.py"),
        ({"chalicelib/api.py": b""}, {}, "lacks parts of what it should hold: chalicelib/api.py"),
        ({}, {"chalicelib/left-over.py": b""}, "files of nobody: chalicelib/left-over.py"),
        ({}, {"chalice/cli/__init__.py": b""}, "files of nobody: chalice/cli"),
    ],
)
def test_a_zip_that_is_not_what_requirements_txt_says_is_refused(lost, added, sentence):
    files = {name: content for name, content in {**FILES, **added}.items() if name not in lost}

    with pytest.raises(Problem, match=sentence):
        bundle.check(files, REQUIREMENTS, SERVICE)


def test_another_version_than_the_pinned_one_is_refused():
    with pytest.raises(Problem, match=r"lacks what requirements\.txt names: requests==9\.9"):
        bundle.check(FILES, REQUIREMENTS.replace("2.34.2", "9.9"), SERVICE)


def test_a_requirement_that_is_not_pinned_is_refused():
    with pytest.raises(Problem, match=r"does not pin 'requests>=2'"):
        bundle.pinned("requests>=2\n")


def test_a_zip_is_the_same_bytes_in_whatever_order_its_files_came(tmp_path):
    bundle.write(FILES, tmp_path / "one.zip")
    bundle.write(dict(reversed(FILES.items())), tmp_path / "two.zip")

    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


class Cli:
    """Takes the place of the AWS CLI's process: answers by a word of the command, or with nothing."""

    def __init__(self, **answers):
        self.answers = answers
        self.commands = []

    def __call__(self, *words, env):
        self.commands.append(" ".join(words))
        code, out, err = next((self.answers[word] for word in words if word in self.answers), (0, "", ""))
        return subprocess.CompletedProcess(words, code, out, err)


@pytest.fixture
def stack(monkeypatch, tmp_path):
    """Deploys with a CLI that answers so."""
    monkeypatch.setenv("AWS_REGION", "eu-west-1")

    def run(values=VALUES, **answers):
        cli = Cli(
            **{
                "get-caller-identity": (0, '{"Account": "123456789012"}', ""),
                "describe-stacks": (0, json.dumps({"Stacks": [{"Outputs": [URL, DASHBOARD]}]}), ""),
                **{name.replace("_", "-"): answer for name, answer in answers.items()},
            }
        )
        monkeypatch.setattr(deploy, "cli", cli)
        deploy.deploy("prod", values, tmp_path)
        return cli

    return run


URL = {"OutputKey": "EndpointURL", "OutputValue": "https://abc.execute-api.eu-west-1.amazonaws.com/v1/"}
DASHBOARD = {"OutputKey": "DashboardURL", "OutputValue": "https://eu-west-1.console.aws.amazon.com/cloudwatch/home#…"}
TARGET = {"OutputKey": "DomainTarget", "OutputValue": "d-abc.execute-api.eu-west-1.amazonaws.com"}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("Unable to locate credentials. You can configure credentials by running \"aws login\".", "no AWS credentials"),
        ("The config profile (x) could not be found", "AWS_PROFILE names a profile that is not there"),
        ("An error occurred (ExpiredToken) when calling …: The security token is expired", "does not accept the cred"),
        ("An error occurred (AccessDenied) when calling the CreateBucket operation: …", "lack a right"),
        ("Could not connect to the endpoint URL: \"https://sts…\"", "AWS cannot be reached"),
        ("Stack:arn:aws:… is in ROLLBACK_COMPLETE state and can not be updated.", "must be deleted before the next"),
        ("something\nquite new", "quite new"),
    ],
)  # fmt: skip
def test_what_the_cli_says_becomes_a_sentence_with_a_next_step(stack, said, sentence):
    with pytest.raises(Problem, match=sentence):
        stack(get_caller_identity=(255, "", said))


def test_a_stack_that_failed_shows_what_failed_first_and_nothing_of_earlier_times(stack):
    events = [
        {
            "LogicalResourceId": name,
            "ResourceStatus": status,
            "ResourceStatusReason": why,
            "Timestamp": f"{year}-01-01T00:00:00+00:00",
        }
        for name, status, why, year in [
            ("PollJobs", "CREATE_FAILED", "Resource creation cancelled", 2999),
            ("APIHandler", "CREATE_FAILED", "decreases account's UnreservedConcurrentExecution", 2999),
            ("RestAPI", "CREATE_COMPLETE", "", 2999),
            ("Domain", "UPDATE_FAILED", "long ago", 2001),
        ]
    ]
    told = (0, json.dumps({"StackEvents": events}), "")

    with pytest.raises(Problem) as failed:
        stack(deploy=(255, "", "Failed to create/update the stack"), describe_stack_events=told)

    assert str(failed.value).splitlines()[1:3] == [
        "  APIHandler: decreases account's UnreservedConcurrentExecution",
        "  PollJobs: Resource creation cancelled",
    ]
    assert "long ago" not in str(failed.value)


def test_a_bucket_of_somebody_else_is_not_taken(stack):
    with pytest.raises(Problem, match="the bucket is another account's"):
        stack(head_bucket=(255, "", "An error occurred (403) when calling the HeadBucket operation: Forbidden"))


@pytest.mark.parametrize(("region", "place"), [("us-east-1", False), ("eu-west-1", True)])
def test_a_new_bucket_is_made_where_the_stack_is_and_closed_to_the_public(stack, monkeypatch, region, place):
    monkeypatch.setenv("AWS_REGION", region)

    commands = stack(head_bucket=(255, "", "An error occurred (404): Not Found")).commands

    (made,) = [command for command in commands if "create-bucket" in command]
    assert (f"LocationConstraint={region}" in made) is place
    (closed,) = [command for command in commands if "put-public-access-block" in command]
    assert closed.count("=true") == 4


def test_without_a_region_nothing_is_asked(stack, monkeypatch):
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)

    with pytest.raises(Problem, match="There is no AWS region"):
        stack()


def test_a_certificate_of_another_region_is_refused(stack):
    with pytest.raises(Problem, match="of another region; the stack's is eu-west-1"):
        stack({**VALUES, "DEPLOY_DOMAIN": "a.example", "DEPLOY_CERTIFICATE_ARN": ARN.replace("eu-west-1", "us-east-1")})


def test_every_command_is_shown_and_at_the_end_how_to_go_on(stack, capsys):
    cli = stack()

    said = capsys.readouterr().out
    assert [line[6:] for line in said.splitlines() if line.startswith("$ aws ")] == cli.commands
    assert "API: https://abc.execute-api.eu-west-1.amazonaws.com/v1\n" in said
    assert "PUBLIC_BASE_URL=https://abc.execute-api.eu-west-1.amazonaws.com/v1 into .env.prod" in said
    assert "tools.doctor" in said
    assert "Dashboard: https://eu-west-1.console" in said
    assert "is told of alarms" not in said


def test_who_is_to_be_told_of_alarms_learns_what_to_confirm(stack, capsys):
    stack({**VALUES, "DEPLOY_ALARM_EMAIL": "ops@example.com"})

    assert "ops@example.com is told of alarms once the link in AWS's mail" in capsys.readouterr().out


def test_for_a_domain_the_name_to_point_to_is_said(stack, capsys):
    domain = {"DEPLOY_DOMAIN": "api.example.com", "DEPLOY_CERTIFICATE_ARN": ARN}
    address = {"PUBLIC_BASE_URL": "https://api.example.com"}

    stack(
        {**VALUES, **domain, **address}, describe_stacks=(0, json.dumps({"Stacks": [{"Outputs": [URL, TARGET]}]}), "")
    )

    said = capsys.readouterr().out
    assert "Point api.example.com to d-abc.execute-api.eu-west-1.amazonaws.com (a CNAME)" in said
    assert "deploy again" not in said
