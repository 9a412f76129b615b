import base64
import dataclasses
import hashlib
import time

import pytest
import requests
from botocore.exceptions import EndpointConnectionError

from chalicelib import r2
from chalicelib.content import SMALL_BYTES
from chalicelib.credentials import Credential
from chalicelib.errors import PermanentError, TransientError
from chalicelib.r2 import PART_BYTES, R2
from chalicelib.runtime import Deadline
from tests.conftest import BUCKET, R2_ENDPOINT, new_content, put
from tools.cloud import Answer

LARGE = b"0123456789abcdef" * (SMALL_BYTES // 16) + b"and a little more"


@pytest.fixture
def bucket(s3):
    return R2(endpoint_url=R2_ENDPOINT, bucket=BUCKET, keys=Credential(("key", "secret")), public_base_url="")


@pytest.fixture
def served(cloud_server):
    """The bucket of the local cloud, which keeps R2's rules, over a real socket."""
    given = cloud_server.cloud.settings()
    return R2(
        endpoint_url=given["R2_ENDPOINT_URL"],
        bucket=BUCKET,
        keys=Credential((given["R2_ACCESS_KEY_ID"], given["R2_SECRET_ACCESS_KEY"])),
        public_base_url=given["R2_PUBLIC_BASE_URL"],
    )


@pytest.fixture
def sent(bucket):
    """The requests as they leave, and what answers them instead of moto, if anything."""
    requests, answers = [], []

    def watch(request, **_):
        requests.append(request)
        return answers.pop(0) if answers else None

    bucket._s3().meta.events.register_last("before-send.s3", watch)
    return requests, answers


def _bytes(value):
    return value if isinstance(value, bytes) else value.encode()


def refusal(status, code):
    from botocore.awsrequest import AWSResponse

    class Raw:
        def stream(self, **_):
            yield f"<Error><Code>{code}</Code></Error>".encode()

    return AWSResponse(R2_ENDPOINT, status, {}, Raw())


def test_put_stores_the_bytes_with_type_and_cache_control(bucket, s3):
    put(bucket, "jobs/2026/01/x/output.png", b"picture")

    found = s3.get_object(Bucket=BUCKET, Key="jobs/2026/01/x/output.png")
    assert found["Body"].read() == b"picture"
    assert found["ContentType"] == "image/png"
    assert found["CacheControl"] == "public, max-age=31536000, immutable"


def test_put_sends_only_what_r2_understands(bucket, sent):
    put(bucket, "k", b"picture")

    request, head = sent[0]
    headers = {name.lower(): value for name, value in request.headers.items()}
    checksum = base64.b64encode(hashlib.sha256(b"picture").digest())
    assert _bytes(headers["x-amz-checksum-sha256"]) == checksum
    assert _bytes(headers["content-length"]) == b"7"
    assert not {"expect", "x-amz-trailer", "transfer-encoding", "content-encoding", "x-amz-security-token"} & set(
        headers
    )
    assert b"/auto/s3/aws4_request" in _bytes(headers["authorization"])
    assert request.url == f"{R2_ENDPOINT}/{BUCKET}/k"
    assert head.method == "HEAD"


def test_no_request_over_https_carries_what_r2_refuses(s3_requests, bucket, clock):
    put(bucket, "whole", b"picture")
    put(bucket, "parts", LARGE)
    with new_content() as content:
        with bucket.read("whole", deadline=Deadline(clock, 60.0)) as (source, pieces):
            content.write(b"".join(pieces))
        bucket.copy(source, "copy", content, content_type="image/png", deadline=Deadline(clock, 60.0))

    assert {request.url.partition(":")[0] for request in s3_requests} == {"https"}
    assert [request.method for request in s3_requests] == [
        *("PUT", "HEAD"),
        *("POST", "PUT", "PUT", "PUT", "POST", "HEAD"),
        *("GET", "PUT", "HEAD"),
    ]


def test_the_guard_stops_what_boto3_sends_by_default(s3_requests, bucket, s3):
    with pytest.raises(AssertionError, match="x-amz-trailer"):
        bucket._s3().put_object(Bucket=BUCKET, Key="k", Body=b"picture", ChecksumAlgorithm="SHA256")


def test_a_large_file_goes_up_in_equal_parts_each_with_its_checksum(served, cloud_server, monkeypatch):
    seen = []
    handle = cloud_server.cloud.handle
    monkeypatch.setattr(cloud_server.cloud, "handle", lambda request: seen.append(request) or handle(request))

    put(served, "large.png", LARGE)

    parts = [request for request in seen if "partNumber" in request.query]
    assert [len(part.body) for part in parts] == [PART_BYTES, PART_BYTES, 17]
    for part in parts:
        assert part.headers["content-md5"] == base64.b64encode(hashlib.md5(part.body).digest()).decode()
        assert not {"expect", "x-amz-trailer", "transfer-encoding", "content-encoding"} & set(part.headers)
    assert [request.method for request in seen] == ["POST", "PUT", "PUT", "PUT", "POST", "HEAD"]
    stored = cloud_server.cloud.r2.read("large.png")
    assert stored.body == LARGE
    assert (stored.headers["content-type"], stored.headers["cache-control"]) == ("image/png", r2.CACHE_CONTROL)


@pytest.mark.parametrize("data", [b"picture", LARGE], ids=["whole", "parts"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"X" + data[1:], lambda data: b""], ids=["cut", "altered", "empty"]
)
def test_what_arrived_damaged_is_never_taken_for_stored(served, cloud_server, monkeypatch, data, damage):
    keep = cloud_server.cloud.r2._keep

    def keep_damaged(key, content, headers, etag):
        kept = damage(content)
        return keep(key, kept, headers, f'"{hashlib.md5(kept).hexdigest()}"')

    monkeypatch.setattr(cloud_server.cloud.r2, "_keep", keep_damaged)

    with pytest.raises(TransientError) as caught:
        put(served, "k", data)

    assert caught.value.code == "r2_mismatch"


def test_a_length_that_is_another_one_is_not_taken_for_stored(served, cloud_server, monkeypatch):
    read = cloud_server.cloud.r2.read

    def longer(key, *, head=False):
        found = read(key, head=head)
        return dataclasses.replace(found, headers={**found.headers, "Content-Length": "8"})

    monkeypatch.setattr(cloud_server.cloud.r2, "read", longer)

    with pytest.raises(TransientError) as caught:
        put(served, "k", b"picture")

    assert caught.value.code == "r2_mismatch"


@pytest.mark.parametrize("data", [b"picture", LARGE], ids=["whole", "parts"])
def test_what_is_damaged_on_its_way_is_refused_by_r2(served, cloud_server, monkeypatch, data):
    handle = cloud_server.cloud.handle

    def damaged(request):
        whole = request.method == "PUT" and "uploads" not in request.query
        return handle(dataclasses.replace(request, body=b"X" + request.body[1:]) if whole else request)

    monkeypatch.setattr(cloud_server.cloud, "handle", damaged)
    monkeypatch.setattr(cloud_server.cloud.r2, "_refusal", lambda request: None)

    with pytest.raises(TransientError, match="BadDigest"):
        put(served, "k", data)

    assert cloud_server.cloud.r2.read("k") is None


def test_an_object_that_is_gone_after_the_put_is_not_stored(served, cloud_server, monkeypatch):
    monkeypatch.setattr(cloud_server.cloud.r2, "read", lambda key, *, head=False: None)

    with pytest.raises(TransientError) as caught:
        put(served, "k", b"picture")

    assert caught.value.code == "r2_missing"


def test_an_upload_that_fails_leaves_no_parts_behind(served, cloud_server, monkeypatch):
    handle = cloud_server.cloud.handle
    broken = Answer(503, b"<Error><Code>ServiceUnavailable</Code></Error>")
    monkeypatch.setattr(
        cloud_server.cloud, "handle", lambda request: broken if "partNumber=2" in request.query else handle(request)
    )

    with pytest.raises(TransientError, match="ServiceUnavailable"):
        put(served, "large.png", LARGE)

    assert cloud_server.cloud.r2.read("large.png") is None
    assert list(cloud_server.cloud.r2._uploads.iterdir()) == []


@pytest.mark.parametrize("data", [b"picture", LARGE], ids=["whole", "parts"])
def test_no_call_begins_that_could_last_beyond_the_deadline(bucket, sent, data):
    with pytest.raises(TransientError) as caught:
        put(bucket, "k", data, seconds=r2.CALL_SECONDS - 0.1)

    assert caught.value.code == "r2_too_slow"
    assert sent[0] == []


@pytest.mark.parametrize("data", [b"picture", LARGE], ids=["whole", "parts"])
def test_a_body_that_r2_takes_too_slowly_is_not_sent_beyond_the_deadline(served, cloud_server, clock, data):
    class Slow(Deadline):
        """Is over as soon as the body has begun."""

        calls = 0

        def left(self):
            self.calls += 1
            return 60.0 if self.calls < 3 else -1.0

    with new_content() as content:
        content.write(data)
        with pytest.raises(TransientError):
            served.put("k", content, content_type="image/png", deadline=Slow(clock, 60.0))
        assert cloud_server.cloud.r2.read("k") is None


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("{endpoint}/{bucket}/a/b.png", "a/b.png"),
        ("{endpoint}/{bucket}/a%20b.png?X-Amz-Signature=abc", "a b.png"),
        ("{public}/jobs/2026/output.png", "jobs/2026/output.png"),
        ("{public}/a.png#top", "a.png"),
        ("{endpoint}/{bucket}-2/a.png", None),
        ("{endpoint}/{bucket}/", None),
        ("{endpoint}/{bucket}/" + "a" * 1025, None),
        ("{endpoint}/{bucket}/a%00b", None),
        ("https://elsewhere.example/{bucket}/a.png", None),
        ("https://elsewhere.example/?u={endpoint}/{bucket}/a.png", None),
    ],
)
def test_a_link_into_the_bucket_is_recognised(served, cloud_server, path, key):
    given = cloud_server.cloud.settings()
    url = path.format(endpoint=given["R2_ENDPOINT_URL"], public=given["R2_PUBLIC_BASE_URL"], bucket=BUCKET)

    assert served.key_of(url) == key


def test_a_link_with_the_bucket_in_the_host_is_recognised(bucket):
    assert bucket.key_of(f"https://{BUCKET}.{R2_ENDPOINT.removeprefix('https://')}/a.png?X-Amz-Expires=9") == "a.png"


def test_a_presigned_link_opens_the_object_until_it_expires(served, cloud_server, monkeypatch):
    put(served, "a b.png", b"picture")
    url = served.presign("a b.png", seconds=60)

    assert requests.get(url, timeout=5).content == b"picture"
    assert requests.get(url.partition("?")[0], timeout=5).status_code == 403
    assert requests.get(url.replace("Expires=60", "Expires=600"), timeout=5).status_code == 403
    monkeypatch.setattr(cloud_server.cloud.r2, "_clock", lambda: time.time() + 61)
    assert "ExpiredRequest" in requests.get(url, timeout=5).text


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (500, "InternalError", TransientError),
        (503, "ServiceUnavailable", TransientError),
        (429, "TooManyRequests", TransientError),
        (400, "BadDigest", TransientError),
        (401, "Unauthorized", PermanentError),
        (403, "SignatureDoesNotMatch", PermanentError),
        (404, "NoSuchBucket", PermanentError),
    ],
)
def test_each_refusal_says_what_to_do_next(bucket, sent, status, code, error):
    sent[1].append(refusal(status, code))

    with pytest.raises(error, match=code) as caught:
        put(bucket, "k", b"picture")

    assert caught.value.service == "r2"
    assert len(sent[0]) == 1


def test_silence_is_transient(bucket, s3):
    def refuse(**_):
        raise EndpointConnectionError(endpoint_url=R2_ENDPOINT)

    bucket._s3().meta.events.register_last("before-send.s3", refuse)

    with pytest.raises(TransientError) as caught:
        put(bucket, "k", b"picture")

    assert caught.value.code == "r2_unreachable"
