"""What the service relies on in R2: the same tests run on the local cloud and on SeaweedFS, another S3 server."""

import hashlib
import json
from datetime import UTC, datetime, timedelta

import botocore.auth
import pytest
import requests
from botocore.exceptions import ClientError

from chalicelib.content import SMALL_BYTES
from chalicelib.errors import PermanentError, TransientError
from chalicelib.r2 import CACHE_CONTROL, PART_BYTES, Source
from chalicelib.runtime import Clock, Deadline
from tests.conftest import new_content, put
from tests.engines.engine import S3Engine
from tests.engines.processes import ROOT

PICTURE = b"\x89PNG\r\n\x1a\n\x00picture\xff"
LARGE = b"0123456789abcdef" * (SMALL_BYTES // 16) + b"and a little more"
SMALLEST_PART = 5 * 1024 * 1024
PARTS = LARGE[: SMALLEST_PART + 1]  # of the smallest parts that R2 takes: less to carry about than real ones


@pytest.fixture(params=["local", "seaweedfs"])
def s3_engine(request, s3_requests):
    if request.param == "seaweedfs":
        return request.getfixturevalue("seaweedfs")
    return S3Engine({**request.getfixturevalue("cloud_server").cloud.settings(), "R2_PUBLIC_BASE_URL": ""})


@pytest.fixture
def bucket(s3_engine):
    return s3_engine.connect()


@pytest.fixture
def stored(s3_engine):
    """What a plain client finds: the bytes and what stands beside them; None where there is nothing."""

    def look(key):
        try:
            found = s3_engine.client.get_object(Bucket=s3_engine.bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
        return found["Body"].read(), found["ContentType"], found["CacheControl"], found["ETag"].strip('"')

    return look


def md5(data):
    return hashlib.md5(data).hexdigest()


def etag_of_parts(data, part_bytes=SMALLEST_PART):
    digests = [hashlib.md5(data[at : at + part_bytes]).digest() for at in range(0, len(data), part_bytes)]
    return f"{md5(b''.join(digests))}-{len(digests)}"


def deadline():
    return Deadline(Clock(), 60.0)


def filled(content, bucket, key):
    """Read the object into the content; where it was."""
    with bucket.read(key, deadline=deadline()) as (source, pieces):
        for piece in pieces:
            content.write(piece)
    return source


@pytest.fixture
def small_parts(monkeypatch):
    """Have the client put everything over 5 MiB in parts."""
    monkeypatch.setattr("chalicelib.r2.SMALL_BYTES", SMALLEST_PART)
    monkeypatch.setattr("chalicelib.r2.PART_BYTES", SMALLEST_PART)


SIZES = pytest.mark.parametrize(
    ("data", "etag"), [(PICTURE, md5(PICTURE)), (PARTS, etag_of_parts(PARTS))], ids=["whole", "parts"]
)


@pytest.mark.parametrize(
    ("data", "etag"),
    [
        (b"", md5(b"")),
        (PICTURE, md5(PICTURE)),
        (LARGE[:SMALL_BYTES], md5(LARGE[:SMALL_BYTES])),
        (LARGE, etag_of_parts(LARGE, PART_BYTES)),
    ],
    ids=["empty", "small", "the largest whole", "parts"],
)
def test_r2_has_what_was_put_and_its_etag_is_made_of_md5(bucket, stored, data, etag):
    put(bucket, "jobs/2026/01/a/output.png", data)

    assert stored("jobs/2026/01/a/output.png") == (data, "image/png", CACHE_CONTROL, etag)


@SIZES
def test_r2_gives_back_what_was_put(small_parts, bucket, data, etag):
    put(bucket, "k", data)

    with new_content() as content:
        source = filled(content, bucket, "k")

    assert (content.size, content.sha256) == (len(data), hashlib.sha256(data).digest())
    assert (source.key, source.etag.strip('"')) == ("k", etag)


@SIZES
def test_r2_tells_the_size_and_the_etag_of_what_it_holds(small_parts, bucket, s3_engine, data, etag):
    put(bucket, "k", data)

    head = s3_engine.client.head_object(Bucket=s3_engine.bucket, Key="k")

    assert (head["ContentLength"], head["ETag"], head["ContentType"]) == (len(data), f'"{etag}"', "image/png")


@SIZES
def test_r2_copies_an_object_and_gives_it_a_type_of_its_own(small_parts, bucket, stored, data, etag):
    put(bucket, "worker/a b+c.png", data)

    with new_content() as content:
        source = filled(content, bucket, "worker/a b+c.png")
        bucket.copy(source, "jobs/output.jpg", content, content_type="image/jpeg", deadline=deadline())

    copied, content_type, cache_control, copied_etag = stored("jobs/output.jpg")
    assert (copied == data, content_type, cache_control) == (True, "image/jpeg", CACHE_CONTROL)
    assert copied_etag in (etag, md5(data))
    assert stored("worker/a b+c.png")[1] == "image/png"


@pytest.mark.parametrize(("first", "second"), [(PICTURE, b"another"), (PARTS, PICTURE), (PICTURE, PARTS)])
def test_r2_overwrites(small_parts, bucket, stored, first, second):
    put(bucket, "k", first)
    put(bucket, "k", second)

    assert stored("k")[0] == second


@pytest.mark.parametrize(
    "key",
    [
        "jobs/2026/01/é x/output.png",
        "แมว/🐈.png",
        "a+b&c=d;e?f#g%20h%2Fi,j.png",
        "!-_.*'() ~@$:\"<>[]{}|^`.png",
        " spaces before and after ",
        "no-ending",
        ".hidden/..dots../a...",
        "x" * 200 + "/" + "y" * 200,
    ],
)
def test_r2_takes_odd_keys_as_they_are(bucket, stored, key):
    put(bucket, key, PICTURE)

    assert stored(key)[0] == PICTURE
    url = bucket.presign(key, seconds=60)
    assert requests.get(url, timeout=5).content == PICTURE
    assert bucket.key_of(url) == key
    with new_content() as content:
        source = filled(content, bucket, key)
        bucket.copy(source, f"{key}-2", content, content_type="image/png", deadline=deadline())
    assert stored(f"{key}-2")[0] == PICTURE


def test_r2_keeps_apart_keys_that_differ_in_case_or_in_a_prefix(bucket, stored):
    keys = ["a/output.png", "a/Output.png", "a/output", "a/output.png.json", "a-output.png"]
    for key in keys:
        put(bucket, key, key.encode())

    assert [stored(key)[0] for key in keys] == [key.encode() for key in keys]


def test_r2_lists_what_begins_so_and_nothing_else(bucket):
    keys = [
        "jobs/2026/01/a b+c/output.png",
        "jobs/2026/01/a b+c/2/output-2.png",
        "jobs/2026/01/a b/output.png",
        "other",
    ]
    for key in keys:
        put(bucket, key, PICTURE)

    assert sorted(bucket.keys("jobs/2026/01/a b+c/", deadline=deadline())) == sorted(keys[:2])
    assert bucket.keys("jobs/2025/", deadline=deadline()) == []


def test_r2_removes_an_object_and_does_not_mind_that_there_is_none(bucket, stored):
    put(bucket, "a/b", PICTURE)
    put(bucket, "a/c", PICTURE)

    for _ in range(2):
        bucket.delete("a/b", deadline=deadline())

    assert (stored("a/b"), stored("a/c")[0]) == (None, PICTURE)
    assert bucket.keys("a/", deadline=deadline()) == ["a/c"]


def test_r2_does_not_copy_what_has_changed_since_it_was_read(bucket, stored):
    put(bucket, "a", PICTURE)

    with new_content() as content:
        source = filled(content, bucket, "a")
        put(bucket, "a", b"another")
        with pytest.raises(TransientError, match="PreconditionFailed") as caught:
            bucket.copy(source, "b", content, content_type="image/png", deadline=deadline())

    assert caught.value.code == "r2_missing"
    assert stored("b") is None


def test_r2_does_not_copy_what_is_not_there(bucket, stored):
    with new_content() as content:
        content.write(PICTURE)
        with pytest.raises(TransientError) as caught:
            bucket.copy(Source("a", f'"{md5(PICTURE)}"'), "b", content, content_type="image/png", deadline=deadline())

    assert caught.value.code == "link_not_found"
    assert stored("b") is None


def test_r2_has_no_object_that_was_never_put(bucket, s3_engine):
    with pytest.raises(TransientError) as caught, bucket.read("nothing", deadline=deadline()):
        pass

    assert caught.value.code == "link_not_found"
    assert requests.get(bucket.presign("nothing", seconds=60), timeout=5).status_code == 404
    with pytest.raises(ClientError) as head:
        s3_engine.client.head_object(Bucket=s3_engine.bucket, Key="nothing")
    assert head.value.response["Error"]["Code"] == "404"


@pytest.mark.parametrize("data", [PICTURE, PARTS], ids=["whole", "parts"])
def test_r2_refuses_what_is_not_what_its_checksum_says(small_parts, bucket, stored, monkeypatch, data):
    monkeypatch.setattr("chalicelib.r2._md5", lambda _: hashlib.md5(b"another").digest())
    with new_content() as content:
        content.write(data)
        content._sha256.update(b"another")
        with pytest.raises(TransientError, match="BadDigest"):
            bucket.put("k", content, content_type="image/png", deadline=deadline())

    assert stored("k") is None


def test_r2_serves_a_presigned_link_to_anybody(bucket):
    put(bucket, "a b.png", PICTURE)

    found = requests.get(bucket.presign("a b.png", seconds=60), timeout=5)

    assert (found.status_code, found.content) == (200, PICTURE)
    assert (found.headers["Content-Type"], found.headers["Cache-Control"]) == ("image/png", CACHE_CONTROL)
    assert (found.headers["Content-Length"], found.headers["ETag"]) == (str(len(PICTURE)), f'"{md5(PICTURE)}"')


@pytest.mark.parametrize(
    ("genuine", "forged"),
    [
        ("a.png?", "b.png?"),
        ("X-Amz-Expires=60", "X-Amz-Expires=600"),
        ("X-Amz-Signature=", "X-Amz-Signature=0"),
        ("%2Fauto%2Fs3", "%2Fus-east-1%2Fs3"),
    ],
)
def test_r2_refuses_a_link_that_was_tampered_with(bucket, genuine, forged):
    put(bucket, "a.png", PICTURE)
    put(bucket, "b.png", PICTURE)
    url = bucket.presign("a.png", seconds=60)

    assert genuine in url
    assert requests.get(url.replace(genuine, forged), timeout=5).status_code in (400, 403)
    assert requests.get(url.partition("?")[0], timeout=5).status_code == 403
    assert requests.put(url, data=b"another", timeout=5).status_code == 403
    assert requests.get(url, timeout=5).content == PICTURE


def test_r2_refuses_a_link_whose_time_is_over(bucket, monkeypatch):
    put(bucket, "a.png", PICTURE)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_: datetime.now(UTC) - timedelta(seconds=61))
    expired = bucket.presign("a.png", seconds=60)
    still_good = bucket.presign("a.png", seconds=120)

    assert requests.get(expired, timeout=5).status_code in (400, 403)
    assert requests.get(still_good, timeout=5).status_code == 200


def test_r2_takes_a_picture_at_the_address_made_for_it_and_gives_its_beginning(bucket, s3_engine):
    url = bucket.presign_put("uploads/a", content_type="image/png", size=len(PICTURE), seconds=60)

    taken = requests.put(url, data=PICTURE, headers={"Content-Type": "image/png"}, timeout=5)

    assert taken.status_code == 200
    assert bucket.beginning("uploads/a", 8, deadline=deadline()) == (PICTURE[:8], len(PICTURE))
    assert bucket.beginning("uploads/a", 8192, deadline=deadline()) == (PICTURE, len(PICTURE))


@pytest.mark.parametrize(("data", "code"), [(None, "link_not_found"), (b"", "r2_empty")])
def test_what_is_not_there_or_empty_has_no_beginning(bucket, s3_engine, data, code):
    if data is not None:
        s3_engine.client.put_object(Bucket=s3_engine.bucket, Key="uploads/a", Body=data)

    with pytest.raises(TransientError) as error:
        bucket.beginning("uploads/a", 8192, deadline=deadline())

    assert error.value.code == code


@pytest.fixture
def upload_url(s3_engine):
    """Make an address at which anybody may put a PNG of three bytes, once or often."""

    def make(key="uploads/a b.png", seconds=60):
        wanted = {"Bucket": s3_engine.bucket, "Key": key, "ContentType": "image/png", "ContentLength": 3}
        return s3_engine.client.generate_presigned_url("put_object", Params=wanted, ExpiresIn=seconds)

    return make


def test_a_presigned_put_is_bound_to_the_type_and_the_length_that_were_signed(upload_url):
    assert "X-Amz-SignedHeaders=content-length%3Bcontent-type%3Bhost&" in upload_url()


def test_r2_takes_what_a_presigned_put_was_signed_for(upload_url, s3_engine):
    answer = requests.put(upload_url(), data=b"png", headers={"Content-Type": "image/png"}, timeout=5)

    assert (answer.status_code, answer.headers["ETag"]) == (200, f'"{md5(b"png")}"')
    found = s3_engine.client.get_object(Bucket=s3_engine.bucket, Key="uploads/a b.png")
    assert (found["Body"].read(), found["ContentType"]) == (b"png", "image/png")


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"png", {"Content-Type": "image/gif"}),
        (b"png", {"Content-Type": "image/png; charset=utf-8"}),
        (b"png", {}),
        (b"png.", {"Content-Type": "image/png"}),
        (b"pn", {"Content-Type": "image/png"}),
        (b"", {"Content-Type": "image/png"}),
    ],
    ids=["another type", "a longer type", "no type", "longer", "shorter", "empty"],
)
def test_r2_refuses_a_put_of_another_type_or_length_than_was_signed(upload_url, stored, data, headers):
    answer = requests.put(upload_url(), data=data, headers=headers, timeout=5)

    assert (answer.status_code, "SignatureDoesNotMatch" in answer.text) == (403, True)
    assert stored("uploads/a b.png") is None


@pytest.mark.parametrize(
    ("genuine", "forged"),
    [("a%20b", "another"), ("content-length%3B", ""), ("X-Amz-Expires=60", "X-Amz-Expires=600"), ("%3Bhost", "")],
)
def test_r2_refuses_a_presigned_put_that_was_tampered_with(upload_url, s3_engine, genuine, forged):
    url, png = upload_url(), {"Content-Type": "image/png"}

    assert genuine in url
    assert requests.put(url.replace(genuine, forged), data=b"png", headers=png, timeout=5).status_code in (400, 403)
    assert "Contents" not in s3_engine.client.list_objects_v2(Bucket=s3_engine.bucket)


def test_r2_refuses_a_presigned_put_whose_time_is_over(upload_url, stored, monkeypatch):
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_: datetime.now(UTC) - timedelta(seconds=61))

    answer = requests.put(upload_url(), data=b"png", headers={"Content-Type": "image/png"}, timeout=5)

    assert answer.status_code in (400, 403)
    assert stored("uploads/a b.png") is None


@pytest.mark.parametrize(
    ("asked", "piece", "where"),
    [
        ("bytes=0-8191", b"0123456789", "bytes 0-9/10"),
        ("bytes=0-3", b"0123", "bytes 0-3/10"),
        ("bytes=4-4", b"4", "bytes 4-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-2", b"89", "bytes 8-9/10"),
        ("bytes=-99", b"0123456789", "bytes 0-9/10"),
    ],
)
def test_r2_gives_the_range_that_was_asked_for(bucket, asked, piece, where):
    put(bucket, "k", b"0123456789")

    answer = requests.get(bucket.presign("k", seconds=60), headers={"Range": asked}, timeout=5)

    assert (answer.status_code, answer.content) == (206, piece)
    assert (answer.headers["Content-Range"], answer.headers["Content-Length"]) == (where, str(len(piece)))
    assert (answer.headers["Content-Type"], answer.headers["ETag"]) == ("image/png", f'"{md5(b"0123456789")}"')


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=99-100", "bytes=5-4", "bytes=-0"])
def test_r2_has_no_range_beyond_the_end(bucket, asked):
    put(bucket, "k", b"0123456789")

    answer = requests.get(bucket.presign("k", seconds=60), headers={"Range": asked}, timeout=5)

    assert (answer.status_code, "<Code>InvalidRange</Code>" in answer.text) == (416, True)
    assert answer.headers["Content-Range"] == "bytes */10"


def test_r2_has_no_range_of_an_empty_object(bucket):
    put(bucket, "k", b"")

    assert (
        requests.get(bucket.presign("k", seconds=60), headers={"Range": "bytes=0-8191"}, timeout=5).status_code == 416
    )


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "pages=0-1", "0-1"])
def test_a_range_that_r2_does_not_heed_gets_the_whole_object(bucket, asked):
    put(bucket, "k", b"0123456789")

    answer = requests.get(bucket.presign("k", seconds=60), headers={"Range": asked}, timeout=5)

    assert (answer.status_code, answer.content) == (200, b"0123456789")


@pytest.fixture
def page(request, s3_engine):
    """What the browser sends for a page of another origin; the bucket has the rules of r2-cors.json."""
    real = request.node.callspec.params["s3_engine"] != "local"
    if real:
        rules = json.loads((ROOT / "r2-cors.json").read_text(encoding="utf-8"))
        s3_engine.client.put_bucket_cors(Bucket=s3_engine.bucket, CORSConfiguration={"CORSRules": rules})
    yield {"Origin": "https://page.example"}
    if real:
        s3_engine.client.delete_bucket_cors(Bucket=s3_engine.bucket)


def asking(method, headers="content-type"):
    return {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}


def test_a_page_may_put_a_picture_of_a_type(upload_url, page):
    asked = requests.options(upload_url(), headers={**page, **asking("PUT")}, timeout=5)

    assert asked.status_code in (200, 204)
    assert asked.headers["Access-Control-Allow-Origin"] in ("*", page["Origin"])
    assert "PUT" in asked.headers["Access-Control-Allow-Methods"].split(", ")
    assert asked.headers["Access-Control-Allow-Headers"] == "content-type"
    assert asked.headers["Access-Control-Max-Age"] == "3600"


@pytest.mark.parametrize("wanted", [asking("DELETE"), asking("PUT", "content-type,x-amz-acl")], ids=["verb", "header"])
def test_a_page_may_do_no_more_than_the_rules_say(upload_url, page, wanted):
    asked = requests.options(upload_url(), headers={**page, **wanted}, timeout=5)

    assert "Access-Control-Allow-Methods" not in asked.headers


def test_a_page_is_told_the_etag_of_what_it_has_put(upload_url, page):
    answer = requests.put(upload_url(), data=b"png", headers={"Content-Type": "image/png", **page}, timeout=5)

    assert answer.headers["Access-Control-Allow-Origin"] in ("*", page["Origin"])
    assert (answer.headers["Access-Control-Expose-Headers"], answer.headers["ETag"]) == ("ETag", f'"{md5(b"png")}"')


def test_a_page_may_read_what_a_link_leads_to(bucket, page):
    put(bucket, "k", PICTURE)

    answer = requests.get(bucket.presign("k", seconds=60), headers=page, timeout=5)

    assert answer.headers["Access-Control-Allow-Origin"] in ("*", page["Origin"])
    assert "Access-Control-Allow-Origin" not in requests.get(bucket.presign("k", seconds=60), timeout=5).headers


STRANGERS = {
    "r2_signature": {"secret_access_key": "wrong"},
    "r2_unauthorized": {"access_key_id": "wrong"},
    "r2_no_bucket": {"bucket": "another-bucket"},
}


@pytest.mark.parametrize(("code", "other"), STRANGERS.items(), ids=STRANGERS)
def test_r2_knows_its_own(small_parts, s3_engine, bucket, stored, code, other):
    put(bucket, "k", PICTURE)
    stranger = s3_engine.connect(**other)

    for data in (b"another", PARTS):
        with pytest.raises(PermanentError) as caught:
            put(stranger, "k", data)
        assert caught.value.code == code
    with pytest.raises(PermanentError, match="check the R2 settings"), stranger.read("k", deadline=deadline()):
        pass
    assert requests.get(stranger.presign("k", seconds=60), timeout=5).status_code in (403, 404)
    assert stored("k")[0] == PICTURE


def test_r2_puts_parts_together_only_as_they_were_sent(s3_engine):
    s3, upload = s3_engine.client, {"Bucket": s3_engine.bucket, "Key": "k"}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    part = s3.upload_part(**upload, PartNumber=1, Body=PICTURE)
    assert part["ETag"] == f'"{md5(PICTURE)}"'

    right = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    wrong = {"Parts": [{"PartNumber": 1, "ETag": md5(b"another")}]}

    with pytest.raises(ClientError, match="InvalidPart"):
        s3.complete_multipart_upload(**upload, MultipartUpload=wrong)
    s3.abort_multipart_upload(**upload)
    with pytest.raises(ClientError, match="NoSuchUpload"):
        s3.upload_part(**upload, PartNumber=1, Body=PICTURE)
    with pytest.raises(ClientError, match="NoSuchUpload"):
        s3.complete_multipart_upload(**upload, MultipartUpload=right)


def test_r2_puts_an_object_of_one_small_part_together(s3_engine, stored):
    s3, upload = s3_engine.client, {"Bucket": s3_engine.bucket, "Key": "k"}
    upload["UploadId"] = s3.create_multipart_upload(**upload, ContentType="image/png", CacheControl="no-store")[
        "UploadId"
    ]
    part = s3.upload_part(**upload, PartNumber=1, Body=PICTURE)
    s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})

    assert stored("k") == (PICTURE, "image/png", "no-store", etag_of_parts(PICTURE))


def test_no_request_carries_what_r2_refuses(small_parts, bucket, s3_requests, monkeypatch):
    put(bucket, "whole", PICTURE)
    put(bucket, "parts", PARTS)
    with new_content() as content:
        bucket.copy(filled(content, bucket, "whole"), "c", content, content_type="image/png", deadline=deadline())
    monkeypatch.setattr("chalicelib.r2._md5", lambda _: hashlib.md5(b"another").digest())
    with pytest.raises(TransientError, match="BadDigest"):
        put(bucket, "k", PARTS)

    assert [request.method for request in s3_requests] == [
        *("PUT", "HEAD"),
        *("POST", "PUT", "PUT", "POST", "HEAD"),
        *("GET", "PUT", "HEAD"),
        *("POST", "PUT", "DELETE"),
    ]


@pytest.mark.parametrize(
    ("unwanted", "header"),
    [
        ({"ChecksumAlgorithm": "SHA256"}, "x-amz-sdk-checksum-algorithm"),
        ({"ACL": "public-read"}, "x-amz-acl"),
        ({"Tagging": "a=b"}, "x-amz-tagging"),
    ],
)
def test_the_guard_of_these_tests_stops_what_r2_refuses(s3_engine, s3_requests, unwanted, header):
    client = s3_engine.connect()._s3()

    with pytest.raises(AssertionError, match=header):
        client.put_object(Bucket=s3_engine.bucket, Key="k", Body=PICTURE, **unwanted)

    assert s3_requests == []
