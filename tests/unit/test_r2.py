import base64
import hashlib

import pytest
from botocore.exceptions import EndpointConnectionError

from chalicelib.errors import PermanentError, TransientError
from chalicelib.r2 import R2
from tests.conftest import BUCKET, R2_ENDPOINT


@pytest.fixture
def bucket(s3):
    return R2(endpoint_url=R2_ENDPOINT, bucket=BUCKET, access_key_id="key", secret_access_key="secret")


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
    stored = bucket.put("jobs/2026/01/x/output.png", b"picture", content_type="image/png")

    assert (stored.bytes, stored.sha256) == (7, hashlib.sha256(b"picture").hexdigest())
    found = s3.get_object(Bucket=BUCKET, Key="jobs/2026/01/x/output.png")
    assert found["Body"].read() == b"picture"
    assert found["ContentType"] == "image/png"
    assert found["CacheControl"] == "public, max-age=31536000, immutable"


def test_put_sends_only_what_r2_understands(bucket, sent):
    bucket.put("k", b"picture", content_type="image/png")

    (request,) = sent[0]
    headers = {name.lower(): value for name, value in request.headers.items()}
    checksum = base64.b64encode(hashlib.sha256(b"picture").digest())
    assert _bytes(headers["x-amz-checksum-sha256"]) == checksum
    assert not {"expect", "x-amz-trailer", "transfer-encoding", "content-encoding", "x-amz-security-token"} & set(
        headers
    )
    assert b"/auto/s3/aws4_request" in _bytes(headers["authorization"])
    assert request.url == f"{R2_ENDPOINT}/{BUCKET}/k"


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
        bucket.put("k", b"picture", content_type="image/png")

    assert caught.value.service == "r2"
    assert len(sent[0]) == 1


def test_silence_is_transient(bucket, s3):
    def refuse(**_):
        raise EndpointConnectionError(endpoint_url=R2_ENDPOINT)

    bucket._s3().meta.events.register_last("before-send.s3", refuse)

    with pytest.raises(TransientError) as caught:
        bucket.put("k", b"picture", content_type="image/png")

    assert caught.value.code == "r2_unreachable"
