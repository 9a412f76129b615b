"""Settings whose values stand in SSM Parameter Store."""

import json

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectTimeoutError
from moto import mock_aws

from chalicelib import parameters, settings
from chalicelib.errors import PermanentError, ServiceError, SettingError, TransientError

URL = "https://ssm.us-east-1.amazonaws.com/"


@pytest.fixture
def ssm(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "role")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret of the role")
    with mock_aws():
        yield boto3.client("ssm", region_name="us-east-1")


class Raw:
    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self, **_):
        yield from self.pieces


def put(ssm, name, value):
    ssm.put_parameter(Name=name, Value=value, Type="SecureString", Overwrite=True)


def test_a_setting_that_names_a_parameter_has_its_value(ssm, environment):
    put(ssm, "/ob/runpod-key", "rpa_secret")
    put(ssm, "/ob/attempts", " 3\n")

    loaded = settings.load({**environment, "RUNPOD_API_KEY": "ssm:/ob/runpod-key", "MAX_ATTEMPTS": "ssm:/ob/attempts"})

    assert loaded.runpod_api_key == "rpa_secret"
    assert loaded.max_attempts == 3


def test_more_parameters_than_one_call_takes_are_read(ssm):
    names = [f"/ob/{number:02}" for number in range(23)]
    for name in names:
        put(ssm, name, f"value of {name}")

    assert parameters.read(names) == {name: f"value of {name}" for name in names}


def test_a_parameter_that_is_not_there_is_named_with_its_setting(ssm, environment):
    with pytest.raises(SettingError, match="Setting RUNPOD_API_KEY names the SSM parameter /ob/nothing") as caught:
        settings.load({**environment, "RUNPOD_API_KEY": "ssm:/ob/nothing"})

    assert caught.value.code == "setting_missing"


def test_a_parameter_is_checked_as_any_value_is(ssm, environment):
    put(ssm, "/ob/attempts", "many")

    with pytest.raises(SettingError, match="Setting MAX_ATTEMPTS is malformed"):
        settings.load({**environment, "MAX_ATTEMPTS": "ssm:/ob/attempts"})


@pytest.mark.parametrize(
    ("answer", "error", "code"),
    [
        ({"status": 400, "json": {"__type": "AccessDeniedException"}}, PermanentError, "ssm_refused"),
        ({"status": 400, "json": {"__type": "ThrottlingException"}}, TransientError, "ssm_unreachable"),
        ({"body": ConnectTimeoutError(endpoint_url=URL)}, TransientError, "ssm_unreachable"),
    ],
)
def test_no_value_is_an_error_that_says_if_to_try_again(ssm, monkeypatch, answer, error, code):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # botocore's own pause before its second try
    client = parameters._connect()

    def refuse(request, **_):
        if "body" in answer:
            raise answer["body"]
        return AWSResponse(URL, answer["status"], {}, Raw([json.dumps(answer["json"]).encode()]))

    client.meta.events.register_first("before-send.ssm", refuse)
    monkeypatch.setattr(parameters, "_connect", lambda: client)

    with pytest.raises(ServiceError) as caught:
        parameters.read(["/ob/any"])

    assert type(caught.value) is error
    assert caught.value.code == code


def test_without_a_region_or_credentials_it_says_so(monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    with pytest.raises(PermanentError, match="You must specify a region") as no_region:
        parameters.read(["/ob/any"])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(PermanentError, match="Unable to locate credentials") as no_credentials:
        parameters.read(["/ob/any"])

    assert no_region.value.code == no_credentials.value.code == "ssm_not_asked"


def test_the_region_is_the_one_that_the_aws_cli_goes_by(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_REGION", "ap-southeast-1")

    assert parameters._connect().meta.region_name == "ap-southeast-1"


def test_nothing_is_asked_where_no_setting_names_a_parameter(environment, monkeypatch):
    monkeypatch.setattr(parameters, "_connect", lambda: pytest.fail("SSM was asked"))

    settings.load(environment)


def test_a_check_asks_nothing_and_still_finds_what_is_wrong(environment, monkeypatch):
    monkeypatch.setattr(parameters, "_connect", lambda: pytest.fail("SSM was asked"))
    settings.check({**environment, "RUNPOD_API_KEY": "ssm:/ob/key"})

    with pytest.raises(SettingError, match="MAX_ATTEMPTS"):
        settings.check({**environment, "RUNPOD_API_KEY": "ssm:/ob/key", "MAX_ATTEMPTS": "none"})
