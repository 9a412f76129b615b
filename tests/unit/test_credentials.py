"""A key that a cloud refuses is read again, and the call that it refused is repeated if there is a new one."""

import boto3
import pytest
from moto import mock_aws

from chalicelib import bootstrap, parameters, settings
from chalicelib.credentials import Credential, Fresh
from chalicelib.errors import PermanentError, SettingError, TransientError
from chalicelib.r2 import R2
from chalicelib.runpod import Runpod
from chalicelib.runtime import Deadline
from chalicelib.wire import Wire
from tests.conftest import put
from tests.shapes import PNG


@pytest.fixture
def ssm(monkeypatch):
    for name, value in {"REGION": "us-east-1", "DEFAULT_REGION": "us-east-1", "ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret of the role")
    with mock_aws():
        yield boto3.client("ssm")


class Parameters:
    """The secrets of the local cloud as SSM parameters, and the times that they were read."""

    def __init__(self, ssm, cloud, monkeypatch):
        self.ssm, self.reads = ssm, []
        named = cloud.settings()
        for name in sorted(settings.SECRETS & named.keys()):
            self.put(name, named[name])
            named[name] = f"ssm:/ob/{name}"
        self.environment = named
        read = parameters.read
        monkeypatch.setattr(parameters, "read", self.count(read))

    def count(self, read):
        def counted(names):
            self.reads += [1] if names else []
            return read(names)

        return counted

    def put(self, name, value):
        self.ssm.put_parameter(Name=f"/ob/{name}", Value=value, Type="SecureString", Overwrite=True)

    def load(self):
        return settings.load(self.environment)


@pytest.fixture
def in_ssm(ssm, cloud, monkeypatch):
    return Parameters(ssm, cloud, monkeypatch)


def service_of(in_ssm, clock):
    return bootstrap.build(in_ssm.load(), clock, load=in_ssm.load)


def create(service, clock):
    job = service.pipeline.new_job(prompt="a cat", model="qwen-image", payload=None)
    service.pipeline.create([job], Deadline(clock, 24.0), by="test")
    return service.store.get(job.id, timeout=5.0)


def test_parameters_are_read_once_a_container(in_ssm, d1, clock):
    service = service_of(in_ssm, clock)
    for _ in range(3):
        create(service, clock)
        clock.advance(3600)

    assert len(in_ssm.reads) == 1


@pytest.mark.parametrize("name", ["CLOUDFLARE_API_TOKEN", "RUNPOD_API_KEY"])
def test_a_key_that_was_changed_costs_no_request(in_ssm, d1, cloud, clock, name):
    right = cloud.settings()[name]
    in_ssm.put(name, "the-key-before")
    service = service_of(in_ssm, clock)
    in_ssm.put(name, right)

    job = create(service, clock)

    assert job.runpod_job_id
    assert len(in_ssm.reads) == 2
    assert len(cloud.runpod.inputs()) == 1


def test_a_key_that_is_simply_wrong_is_read_again_once_a_minute(in_ssm, d1, clock):
    in_ssm.put("CLOUDFLARE_API_TOKEN", "wrong")
    service = service_of(in_ssm, clock)

    def ask():
        with pytest.raises(PermanentError, match="D1 refused the token"):
            service.store.get("x", timeout=5.0)

    for _ in range(5):
        ask()
    assert len(in_ssm.reads) == 2
    clock.advance(61)
    ask()
    assert len(in_ssm.reads) == 3


def test_a_parameter_store_that_fails_leaves_the_old_key(clock):
    def fail():
        raise SettingError("setting_missing", "gone")

    credential = Credential("old", Fresh("old", fail, clock).get)

    assert credential.renew("old") is False
    assert credential.value == "old"


def test_whoever_comes_second_takes_the_key_that_the_first_has_read(clock):
    reads = []
    credential = Credential("old", lambda: reads.append(1) or "new")

    assert [credential.renew("old") for _ in range(3)] == [True] * 3
    assert len(reads) == 1


def test_r2_takes_a_picture_whole_under_the_new_keys(cloud_server):
    given = cloud_server.cloud.settings()
    right = given["R2_ACCESS_KEY_ID"], given["R2_SECRET_ACCESS_KEY"]
    for before in (("old", right[1]), (right[0], "old")):
        bucket = R2(
            endpoint_url=given["R2_ENDPOINT_URL"],
            bucket=given["R2_BUCKET"],
            keys=Credential(before, lambda: right),
            public_base_url="",
        )

        put(bucket, "a.png", PNG)

        found = cloud_server.cloud.r2.read("a.png")
        assert found is not None
        assert found.body == PNG


def test_a_call_without_the_time_for_both_is_not_prolonged_by_reading_the_key_again(in_ssm, cloud, wire, clock):
    reads = []
    old = Credential("old", lambda: reads.append(1) or cloud.settings()["RUNPOD_API_KEY"], seconds=3.0)
    runpod = Runpod(wire=Wire(clock), clock=clock, base_url=cloud.settings()["RUNPOD_API_BASE"], api_key=old)

    with pytest.raises(TransientError, match="RunPod refused the key"):
        runpod.run("local-endpoint", {"prompt": "a cat"}, timeout=3.5)
    assert (reads, cloud.runpod.inputs()) == ([], [])

    runpod.run("local-endpoint", {"prompt": "a cat"}, timeout=10.0)
    assert (len(reads), len(cloud.runpod.inputs())) == (1, 1)
