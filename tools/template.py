"""A stage's values, as its operator's file has them, and what they decide in the template of its stack."""

import copy
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from chalicelib import parameters, settings
from chalicelib.errors import SettingError
from tools import Problem, alarms, env_file

FUNCTIONS = {"APIHandler": "ApiHandlerRole", "PollJobs": "PollJobsRole"}
SETTINGS = [entry.name.upper() for entry in fields(settings.Settings)]
REQUIRED = [entry.name.upper() for entry in fields(settings.Settings) if entry.default is MISSING]
DEPLOY_VALUES = {
    "DEPLOY_DOMAIN": r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}",
    "DEPLOY_CERTIFICATE_ARN": r"arn:aws[a-z-]*:acm:[a-z0-9-]+:[0-9]{12}:certificate/[0-9a-f-]+",
    "DEPLOY_RESERVED_CONCURRENCY": r"[2-9]|[1-9][0-9]{1,3}",  # the deep health calls its own API
    "DEPLOY_POLLERS": r"[1-4]",
    "DEPLOY_ALARM_EMAIL": r"[^@\s]+@[^@\s]+\.[^@\s]+",
    "DEPLOY_DAILY_USD": r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,2})?",
}
PARAMETER = r"/[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*"
SCHEDULE_CONCURRENCY = 2  # of each poller: a minute's run, and the next one's beginning
# https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html
ENVIRONMENT_BYTES = 4096

# Of glibc, which else keeps what was freed of large answers for each thread by itself.
MACHINE = {"MALLOC_ARENA_MAX": "2"}
OF_STACK = {"SERVICE_NAME": {"Ref": "AWS::StackName"}}
CONSOLE = "https://${AWS::Region}.console.aws.amazon.com/cloudwatch/home?region=${AWS::Region}"
DASHBOARD_URL = f"{CONSOLE}#dashboards/dashboard/${{Dashboard}}"

Template = dict[str, Any]


def read_values(path: Path) -> dict[str, str]:
    """The stage's values, checked, without those that are empty. Raises Problem."""
    if not path.exists():
        raise Problem(
            f"There is no file {path.name}, which has the stage's settings as NAME=value lines. README, section "
            "Deployment, has an example."
        )
    try:
        values = {name: value.strip() for name, value in settings.read_env_file(path).items() if value.strip()}
        _check_names(values)
        _check_complete(values)
        _check_secrets(values)
        values = env_file.complete(values)
        settings.check(values)
        _check_deploy_values(values)
        _check_size(values)
    except (SettingError, Problem) as error:
        raise Problem(f"{path.name} cannot be used. {getattr(error, 'sentence', error)}") from error
    return values


def _check_names(values: Mapping[str, str]) -> None:
    known = [*SETTINGS, *DEPLOY_VALUES]
    for name in values:
        if name in OF_STACK:
            raise Problem(f"{name} is set by ./deploy itself. Take it out.")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "README has the table of settings."
            raise Problem(f"There is no setting {name}; {hint}")


def _check_complete(values: Mapping[str, str]) -> None:
    if missing := [name for name in REQUIRED if name not in values]:
        raise Problem(f"It lacks {', '.join(missing)}; README has the table of settings.")


def _check_secrets(values: Mapping[str, str]) -> None:
    for name in SETTINGS:
        value = values.get(name, "")
        if value.startswith(parameters.PREFIX):
            if not re.fullmatch(PARAMETER, value.removeprefix(parameters.PREFIX)):
                raise Problem(
                    f"{name} must be ssm:/name, where the name has letters, digits, dots, dashes and slashes."
                )
        elif value and name in settings.SECRETS:
            raise Problem(
                f"{name} is a secret and may not stand here. Put it into SSM Parameter Store: aws ssm put-parameter "
                f"--type SecureString --name /ob-ai-studio/STAGE/{name} --value … (README has a way that leaves no "
                f"trace in the shell's history), and write {name}=ssm:/ob-ai-studio/STAGE/{name}."
            )


def _check_deploy_values(values: Mapping[str, str]) -> None:
    for name, pattern in DEPLOY_VALUES.items():
        if name in values and not re.fullmatch(pattern, values[name]):
            raise Problem(f"{name} is malformed: it must match {pattern}.")
    if ("DEPLOY_DOMAIN" in values) != ("DEPLOY_CERTIFICATE_ARN" in values):
        raise Problem("DEPLOY_DOMAIN and DEPLOY_CERTIFICATE_ARN go together: set both, or neither.")
    alarms.check(values)


def _check_size(values: Mapping[str, str]) -> None:
    size = len(json.dumps(environment(values), ensure_ascii=False).encode())
    if size > ENVIRONMENT_BYTES:
        raise Problem(
            f"The settings take {size} bytes, and a function's environment holds {ENVIRONMENT_BYTES}. Put the longest "
            "into SSM Parameter Store: NAME=ssm:/name."
        )


def environment(values: Mapping[str, str]) -> dict[str, Any]:
    """What the functions get."""
    return MACHINE | OF_STACK | {name: values[name] for name in SETTINGS if name in values}


def fill(template: Template, values: Mapping[str, str]) -> Template:
    """The template with what these values decide."""
    filled = copy.deepcopy(template)
    resources = filled["Resources"]
    for function, role in FUNCTIONS.items():
        resources[function]["Properties"]["Environment"] = {"Variables": environment(values)}
        resources[role]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"] += _rights(values)
    pollers = int(values.get("DEPLOY_POLLERS", "1"))
    _add_pollers(resources["PollJobs"]["Properties"]["Events"], pollers)
    if "DEPLOY_RESERVED_CONCURRENCY" in values:
        _reserve(resources, int(values["DEPLOY_RESERVED_CONCURRENCY"]), pollers)
    if "DEPLOY_DOMAIN" in values:
        _add_domain(filled, values["DEPLOY_DOMAIN"], values["DEPLOY_CERTIFICATE_ARN"])
    resources |= alarms.resources(values)
    filled["Outputs"]["DashboardURL"] = {"Description": "Where the dashboard is", "Value": {"Fn::Sub": DASHBOARD_URL}}
    return filled


def _rights(values: Mapping[str, str]) -> list[Template]:
    """
    What the functions may do besides writing their logs.

    Parameters under the account's own key aws/ssm need no right on the key:
    https://docs.aws.amazon.com/kms/latest/developerguide/services-parameter-store.html
    """
    rights: list[Template] = []
    if names := _parameters(values):
        arn = "arn:${AWS::Partition}:ssm:${AWS::Region}:${AWS::AccountId}:parameter"
        resources = [{"Fn::Sub": f"{arn}{name}"} for name in names]
        rights.append(
            {"Sid": "ReadSettings", "Effect": "Allow", "Action": ["ssm:GetParameters"], "Resource": resources}
        )
    if bucket := values.get("SPOOL_BUCKET"):
        itself = {"Fn::Sub": f"arn:${{AWS::Partition}}:s3:::{bucket}"}
        objects = {"Fn::Sub": f"arn:${{AWS::Partition}}:s3:::{bucket}/spool/*"}
        rights += [
            {"Sid": "Spool", "Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject"], "Resource": objects},
            # Without it S3 answers 403 instead of 404 for what is gone.
            {"Sid": "SeeWhatIsGone", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": itself},
        ]
    return rights


def _parameters(values: Mapping[str, str]) -> list[str]:
    prefix = parameters.PREFIX
    return sorted({value.removeprefix(prefix) for value in values.values() if value.startswith(prefix)})


def _add_pollers(events: Template, pollers: int) -> None:
    """Each further poller is one more rule that starts the same function every minute; claims part the work."""
    for number in range(2, pollers + 1):
        events[f"PollJobsEvent{number}"] = copy.deepcopy(events["PollJobsEvent"])


def _reserve(resources: Template, requests: int, pollers: int) -> None:
    resources["APIHandler"]["Properties"]["ReservedConcurrentExecutions"] = requests
    resources["PollJobs"]["Properties"]["ReservedConcurrentExecutions"] = SCHEDULE_CONCURRENCY * pollers


def _add_domain(template: Template, domain: str, certificate: str) -> None:
    template["Resources"]["Domain"] = {
        "Type": "AWS::ApiGateway::DomainName",
        "Properties": {
            "DomainName": domain,
            "RegionalCertificateArn": certificate,
            "EndpointConfiguration": {"Types": ["REGIONAL"]},
            "SecurityPolicy": "TLS_1_2",
        },
    }
    template["Resources"]["DomainMapping"] = {
        "Type": "AWS::ApiGateway::BasePathMapping",
        # SAM's own name for the stage, by which the mapping waits until the stage is there.
        "Properties": {
            "DomainName": {"Ref": "Domain"},
            "RestApiId": {"Ref": "RestAPI"},
            "Stage": {"Ref": "RestAPI.Stage"},
        },
    }
    template["Outputs"]["DomainTarget"] = {
        "Description": f"Where {domain} must point to: a CNAME, or an alias",
        "Value": {"Fn::GetAtt": ["Domain", "RegionalDomainName"]},
    }
