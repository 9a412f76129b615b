"""R2's S3 protocol over a folder, strict where R2 is strict, and the public address of the bucket."""

import base64
import hashlib
import hmac
import json
import os
import re
import shutil
import time
import uuid
from calendar import timegm
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tools.cloud import Account, Answer, Request
from tools.cloud.cors import of_file

AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/\d{8}/auto/s3/aws4_request, ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)
SIGNED_QUERY = re.compile(
    r"(?P<given>.*X-Amz-Algorithm=AWS4-HMAC-SHA256.*)&X-Amz-Signature=(?P<signature>[0-9a-f]{64})"
)
RANGE = re.compile(r"bytes=(?=-?\d)(\d*)-(\d*)")  # any other is not heeded: the whole object is the answer
MOST_LISTED = 1_000  # keys in one answer
SMALLEST_PART = 5 * 1024 * 1024
REFUSED_HEADERS = ("x-amz-trailer", "x-amz-tagging", "x-amz-acl", "x-amz-sdk-checksum-algorithm")
KEPT_HEADERS = ("content-type", "cache-control")


class R2:
    """One bucket. An object is a file of its bytes and one of its headers, both there or neither."""

    def __init__(self, folder: Path, account: Account, *, host: str, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._uploads = folder / "uploads"
        self._account = account
        self._host = host
        self._clock = clock
        self.cors = of_file()
        self._uploads.mkdir(parents=True, exist_ok=True)

    def handle(self, request: Request) -> Answer:
        """Answer one S3 call, or a browser that asks whether it may make one."""
        if request.method == "OPTIONS":
            forbidden = _error(403, "AccessForbidden", "CORSResponse: This CORS request is not allowed.")
            return self.cors.preflight(request) or forbidden
        answer = self._answer(request)
        return replace(answer, headers=answer.headers | self.cors.headers(request))

    def _answer(self, request: Request) -> Answer:
        if refusal := self._refusal(request):
            return refusal
        bucket, _, key = unquote(request.path.removeprefix("/r2/")).partition("/")
        if bucket != self._account.bucket:
            return _error(404, "NoSuchBucket", "The specified bucket does not exist.")
        query = {name: values[0] for name, values in parse_qs(request.query, keep_blank_values=True).items()}
        if key and "uploadId" in query:
            return self._go_on_with_upload(key, query, request)
        match request.method:
            case "POST" if key and "uploads" in query:
                return self._begin_upload(request)
            case "PUT" if key and "x-amz-copy-source" in request.headers:
                return self._copy(key, request)
            case "PUT" if key:
                return self._put(key, request)
            case "DELETE" if key:
                return self._delete(key)
            case "GET" | "HEAD" if key:
                found = self.read(key, head=request.method == "HEAD")
                missing = _error(404, "NoSuchKey", "The specified key does not exist.")
                return _ranged(found, request) if found else missing
            case "GET" if query.get("list-type") == "2":
                return self._list(query)
        return _error(501, "NotImplemented", f"{request.method} of this is not implemented here.")

    def beside(self, bucket: str) -> "R2":
        """Another bucket of the same account."""
        folder = self._folder.with_name(f"{self._folder.name}-{bucket}")
        return R2(folder, replace(self._account, bucket=bucket), host=self._host, clock=self._clock)

    def read(self, key: str, *, head: bool = False) -> Answer | None:
        """The object as it is served, None where there is none."""
        path = self._path(key)
        if not path.with_suffix(".json").exists():
            return None
        headers = json.loads(path.with_suffix(".json").read_text())
        headers.pop("key", None)
        content = b"" if head else path.read_bytes()
        return Answer(200, content, {**headers, "Content-Length": str(path.stat().st_size)})

    def _path(self, key: str) -> Path:
        # By hash: a key may be no path, or one that leads out of the folder.
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def _refusal(self, request: Request) -> Answer | None:
        presigned = SIGNED_QUERY.fullmatch(request.query)
        named = AUTHORIZATION.fullmatch(request.headers.get("authorization", ""))
        if named and named[1] != self._account.access_key_id:
            return _error(401, "Unauthorized", "Unauthorized")
        if not (self._presigned(request, presigned) if presigned else self._signed(request)):
            return _error(
                403,
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided.",
            )
        if presigned and self._clock() > _end(presigned["given"]):
            return _error(400, "ExpiredRequest", "Request has expired")
        for name in REFUSED_HEADERS:
            if name in request.headers:
                return _error(
                    501, "NotImplemented", f"Header '{name}' with value '{request.headers[name]}' not implemented"
                )
        if "aws-chunked" in request.headers.get("content-encoding", ""):
            return _error(501, "NotImplemented", "STREAMING-UNSIGNED-PAYLOAD-TRAILER not implemented")
        return None

    def _signed(self, request: Request) -> bool:
        found = AUTHORIZATION.fullmatch(request.headers.get("authorization", ""))
        if not found or found[1] != self._account.access_key_id:
            return False
        headers = {name: request.headers.get(name, "") for name in found[2].split(";")}
        auth = S3SigV4Auth(self._credentials(), "s3", "auto")
        signature = self._signature(auth, request, request.query, headers, request.headers.get("x-amz-date", ""))
        body_hash = request.headers.get("x-amz-content-sha256")
        return hmac.compare_digest(signature, found[3]) and body_hash in (
            "UNSIGNED-PAYLOAD",
            hashlib.sha256(request.body).hexdigest(),
        )

    def _presigned(self, request: Request, found: re.Match[str]) -> bool:
        query = parse_qs(found["given"])
        key_id, _, scope = query["X-Amz-Credential"][0].partition("/")
        auth = S3SigV4QueryAuth(self._credentials(), "s3", "auto")
        names = query.get("X-Amz-SignedHeaders", [""])[0].split(";")
        headers = {name: request.headers.get(name, "") for name in names} | {"host": self._host}
        signature = self._signature(auth, request, found["given"], headers, query["X-Amz-Date"][0])
        return (
            hmac.compare_digest(signature, found["signature"])
            and key_id == self._account.access_key_id
            and scope.endswith("/auto/s3/aws4_request")
        )

    def _credentials(self) -> Credentials:
        return Credentials(self._account.access_key_id, self._account.secret_access_key)

    def _signature(
        self, auth: S3SigV4Auth, request: Request, query: str, headers: dict[str, str], timestamp: str
    ) -> str:
        url = f"http://{self._host}{request.path}" + (f"?{query}" if query else "")
        signed = AWSRequest(method=request.method, url=url, data=request.body, headers=headers)
        signed.context["timestamp"] = timestamp
        signature: str = auth.signature(auth.string_to_sign(signed, auth.canonical_request(signed)), signed)
        return signature

    def _put(self, key: str, request: Request) -> Answer:
        return _damaged(request) or self._keep(key, request.body, _kept_headers(request), _etag(request.body))

    def _keep(self, key: str, content: bytes, headers: dict[str, str], etag: str) -> Answer:
        path = self._path(key)
        _write(path, content)
        kept = {"content-type": "application/octet-stream", **headers, "ETag": etag, "key": key}
        _write(path.with_suffix(".json"), json.dumps(kept).encode())
        return Answer(200, b"", {"ETag": etag})

    def _copy(self, key: str, request: Request) -> Answer:
        bucket, _, source = unquote(request.headers["x-amz-copy-source"]).lstrip("/").partition("/")
        found = self.read(source) if bucket == self._account.bucket else None
        if found is None:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        if request.headers.get("x-amz-copy-source-if-match", found.headers["ETag"]) != found.headers["ETag"]:
            return _error(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
        replaced = request.headers.get("x-amz-metadata-directive") == "REPLACE"
        headers = _kept_headers(request) if replaced else {name: found.headers[name] for name in KEPT_HEADERS}
        kept = self._keep(key, found.body, headers, _etag(found.body))
        return _xml("CopyObjectResult", {"ETag": kept.headers["ETag"]})

    def _delete(self, key: str) -> Answer:
        path = self._path(key)
        path.with_suffix(".json").unlink(missing_ok=True)  # first: without it there is no object
        path.unlink(missing_ok=True)
        return Answer(204)

    def _list(self, query: dict[str, str]) -> Answer:
        kept = [json.loads(path.read_text()).get("key", "") for path in self._folder.glob("*.json")]
        keys = sorted(key for key in kept if key.startswith(query.get("prefix", "")))
        name = quote if query.get("encoding-type") == "url" else str
        contents = "".join(f"<Contents><Key>{escape(name(key))}</Key></Contents>" for key in keys[:MOST_LISTED])
        encoding = "<EncodingType>url</EncodingType>" if name is quote else ""
        return _xml_of("ListBucketResult", encoding + contents)

    def _begin_upload(self, request: Request) -> Answer:
        upload_id = uuid.uuid4().hex
        (self._uploads / upload_id).mkdir()
        _write(self._uploads / upload_id / "headers", json.dumps(_kept_headers(request)).encode())
        return _xml("InitiateMultipartUploadResult", {"UploadId": upload_id})

    def _go_on_with_upload(self, key: str, query: dict[str, str], request: Request) -> Answer:
        folder = self._uploads / Path(query["uploadId"]).name
        if not (folder / "headers").exists():
            return _error(404, "NoSuchUpload", "The specified multipart upload does not exist.")
        match request.method:
            case "PUT":
                if refusal := _damaged(request):
                    return refusal
                _write(folder / f"{int(query['partNumber']):05d}.part", request.body)
                return Answer(200, b"", {"ETag": _etag(request.body)})
            case "POST":
                return self._complete_upload(key, folder, request)
            case "DELETE":
                shutil.rmtree(folder)
                return Answer(204)
        return _error(501, "NotImplemented", f"{request.method} of an upload is not implemented here.")

    def _complete_upload(self, key: str, folder: Path, request: Request) -> Answer:
        parts = [path.read_bytes() for path in sorted(folder.glob("*.part"))]
        named = [entry.text for entry in ElementTree.fromstring(request.body).iter() if entry.tag.endswith("ETag")]
        if not parts or named != [_etag(part) for part in parts]:
            return _error(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if any(len(part) != len(parts[0]) for part in parts[:-1]) or len(parts[-1]) > len(parts[0]):
            return _error(400, "InvalidPart", "All non-trailing parts must have the same length.")
        if len(parts) > 1 and len(parts[0]) < SMALLEST_PART:
            return _error(
                400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed object size."
            )
        digests = b"".join(hashlib.md5(part).digest() for part in parts)
        etag = f'"{hashlib.md5(digests).hexdigest()}-{len(parts)}"'
        self._keep(key, b"".join(parts), json.loads((folder / "headers").read_text()), etag)
        shutil.rmtree(folder)
        return _xml("CompleteMultipartUploadResult", {"Key": key, "ETag": etag})


class PublicBucket:
    """What the bucket's public domain serves: anybody may read, nobody may list."""

    def __init__(self, r2: R2) -> None:
        self._r2 = r2

    def handle(self, request: Request) -> Answer:
        """Answer one request of a browser."""
        key, head = unquote(request.path.removeprefix("/cdn/")), request.method == "HEAD"
        found = self._r2.read(key, head=head) if head or request.method == "GET" else None
        missing = Answer(
            404, b"<!DOCTYPE html><title>Not Found</title><h1>Object not found</h1>", {"Content-Type": "text/html"}
        )
        answer = _ranged(found, request) if found else missing
        return replace(answer, headers=answer.headers | self._r2.cors.headers(request))


def _ranged(whole: Answer, request: Request) -> Answer:
    """The bytes of the object that were asked for."""
    asked = RANGE.fullmatch(request.headers.get("range", ""))
    if not asked or request.method != "GET":
        return whole
    size = len(whole.body)
    first, last = _bounds(asked, size)
    if first > last:
        refusal = _error(416, "InvalidRange", "The requested range is not satisfiable")
        return replace(refusal, headers={**refusal.headers, "Content-Range": f"bytes */{size}"})
    piece = whole.body[first : last + 1]
    headers = {"Content-Length": str(len(piece)), "Content-Range": f"bytes {first}-{last}/{size}"}
    return Answer(206, piece, whole.headers | headers)


def _bounds(asked: re.Match[str], size: int) -> tuple[int, int]:
    """Where the range begins and ends, its last byte included; without a beginning it is the object's end."""
    first, last = asked.groups()
    if not first:
        return max(size - int(last), 0), size - 1
    return int(first), min(int(last or size), size - 1)


def _write(path: Path, content: bytes) -> None:
    # A kill in mid-write must leave no half object.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _kept_headers(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in KEPT_HEADERS if name in request.headers}


def _damaged(request: Request) -> Answer | None:
    """The refusal of a body that is not what its checksums say."""
    wanted = {
        "x-amz-checksum-sha256": base64.b64encode(hashlib.sha256(request.body).digest()).decode(),
        "content-md5": base64.b64encode(hashlib.md5(request.body).digest()).decode(),
    }
    if all(request.headers.get(name, checksum) == checksum for name, checksum in wanted.items()):
        return None
    return _error(400, "BadDigest", "The checksum you specified did not match what we received.")


def _end(query: str) -> float:
    given = parse_qs(query)
    made_at = timegm(time.strptime(given["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ"))
    return made_at + float(given["X-Amz-Expires"][0])


def _xml(root: str, fields: dict[str, str]) -> Answer:
    return _xml_of(root, "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items()))


def _xml_of(root: str, inside: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><{root}>{inside}</{root}>'
    return Answer(200, body.encode(), {"Content-Type": "application/xml"})


def _error(status: int, code: str, message: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, body.encode(), {"Content-Type": "application/xml"})
