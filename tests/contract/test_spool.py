"""The spool on SeaweedFS, a real S3 server, through the client that the service makes for itself from its own role."""

import pytest

from chalicelib.content import IN_MEMORY_BYTES
from chalicelib.errors import TransientError
from chalicelib.runtime import Clock, Deadline
from chalicelib.spool import Spool
from tests.conftest import new_content

KEY = "jobs/2026/01/งาน 1/output.png"


@pytest.fixture
def spool(seaweedfs, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.settings["R2_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.settings["R2_ACCESS_KEY_ID"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.settings["R2_SECRET_ACCESS_KEY"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return Spool(seaweedfs.bucket)


def deadline(seconds=30.0):
    return Deadline(Clock(), seconds)


def keep(spool, data):
    with new_content() as content:
        content.write(data)
        spool.put(KEY, content, content_type="image/png", deadline=deadline())


@pytest.mark.parametrize("data", [b"a picture", b"\x00\xff" * IN_MEMORY_BYTES])
def test_what_is_kept_is_given_back(spool, seaweedfs, data):
    keep(spool, data)

    with spool.read(KEY, deadline=deadline()) as pieces:
        assert b"".join(pieces) == data
    assert spool.has(KEY, deadline=deadline())
    head = seaweedfs.client.head_object(Bucket=seaweedfs.bucket, Key=f"spool/{KEY}")
    assert head["ContentType"] == "image/png"


def test_what_was_never_kept_is_not_found(spool):
    with pytest.raises(TransientError) as lost, spool.read(KEY, deadline=deadline()):
        pass

    assert lost.value.code == "spool_lost"
    assert not spool.has(KEY, deadline=deadline())


def test_no_call_is_begun_without_time_for_it(spool):
    with pytest.raises(TransientError, match="no time left"), spool.read(KEY, deadline=deadline(1.0)):
        pass


def test_a_role_without_the_right_may_get_it_later(spool, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")

    with pytest.raises(TransientError) as refused, spool.read(KEY, deadline=deadline()):
        pass

    assert refused.value.code == "spool_failed"
