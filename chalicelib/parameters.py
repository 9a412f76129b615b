"""AWS SSM Parameter Store: the values of settings whose environment only names them, as `ssm:/name`."""

import os
from collections.abc import Iterable
from typing import Any

from chalicelib.errors import PermanentError, TransientError

PREFIX = "ssm:"
CALL_SECONDS = 3.0  # that one call may last
AT_ONCE = 10  # names that GetParameters takes
# https://docs.aws.amazon.com/systems-manager/latest/APIReference/API_GetParameters.html
ASKED_LATER = ("ThrottlingException", "InternalServerError", "RequestLimitExceeded")


def read(names: Iterable[str]) -> dict[str, str]:
    """
    The values of the parameters, by name; of those that are not there, none. In CALL_SECONDS for each ten at most.

    Raises PermanentError where reading them is not allowed, TransientError where there is no answer.
    """
    wanted = sorted(set(names))
    found: dict[str, str] = {}
    if wanted:
        client = _connect()
        for start in range(0, len(wanted), AT_ONCE):
            found |= _read_few(client, wanted[start : start + AT_ONCE])
    return found


def _connect() -> Any:
    # Imported here: a service whose environment holds everything needs no SSM. AWS_REGION is what the AWS CLI goes by,
    # and what Lambda sets; boto3 knows only AWS_DEFAULT_REGION.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    bounded = Config(connect_timeout=1, read_timeout=2, retries={"mode": "standard", "total_max_attempts": 1})
    try:
        return boto3.session.Session().client("ssm", region_name=os.environ.get("AWS_REGION"), config=bounded)
    except BotoCoreError as error:
        raise _not_asked(error) from error


def _read_few(client: Any, names: list[str]) -> dict[str, str]:
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

    try:
        answer = client.get_parameters(Names=names, WithDecryption=True)
    except ClientError as error:
        raise _failure(str(error.response.get("Error", {}).get("Code", "")), names) from error
    except (ConnectionError, HTTPClientError) as error:
        raise TransientError("ssm_unreachable", "SSM Parameter Store did not answer.", service="ssm") from error
    except BotoCoreError as error:  # of this machine: no credentials, a session that is over
        raise _not_asked(error) from error
    return {entry["Name"]: entry["Value"] for entry in answer["Parameters"]}


def _not_asked(error: Exception) -> PermanentError:
    return PermanentError("ssm_not_asked", f"SSM Parameter Store cannot be asked: {error}", service="ssm")


def _failure(code: str, names: list[str]) -> PermanentError | TransientError:
    if code in ASKED_LATER:
        return TransientError("ssm_unreachable", f"SSM Parameter Store does not answer now ({code}).", service="ssm")
    return PermanentError(
        "ssm_refused",
        f"SSM Parameter Store refused to give {', '.join(names)} ({code}); the function's role needs "
        "ssm:GetParameters on them.",
        service="ssm",
    )
