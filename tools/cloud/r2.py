"""R2's S3 protocol over a folder, strict where R2 is strict, and the public address of the bucket."""

import base64
import hashlib
import hmac
import json
import os
import re
import uuid
from pathlib import Path
from urllib.parse import unquote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tools.cloud import Account, Answer, Request

AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/\d{8}/auto/s3/aws4_request, ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)
REFUSED_HEADERS = ("x-amz-trailer", "x-amz-tagging", "x-amz-acl", "x-amz-sdk-checksum-algorithm")
KEPT_HEADERS = ("content-type", "cache-control")


class R2:
    """One bucket. An object is a file of its bytes and one of its headers, both there or neither."""

    def __init__(self, folder: Path, account: Account, *, host: str) -> None:
        self._folder = folder
        self._account = account
        self._host = host
        folder.mkdir(exist_ok=True)

    def handle(self, request: Request) -> Answer:
        """Answer one S3 call."""
        if refusal := self._refusal(request):
            return refusal
        bucket, _, key = unquote(request.path.removeprefix("/r2/")).partition("/")
        if bucket != self._account.bucket:
            return _error(404, "NoSuchBucket", "The specified bucket does not exist.")
        if request.method == "PUT" and key:
            return self._put(key, request)
        if request.method in ("GET", "HEAD") and key:
            return self.read(key, head=request.method == "HEAD") or _error(
                404, "NoSuchKey", "The specified key does not exist."
            )
        return _error(501, "NotImplemented", f"{request.method} of this is not implemented here.")

    def read(self, key: str, *, head: bool = False) -> Answer | None:
        """The object as it is served, None where there is none."""
        path = self._path(key)
        if not path.with_suffix(".json").exists():
            return None
        content = path.read_bytes()
        headers = json.loads(path.with_suffix(".json").read_text())
        return Answer(200, b"" if head else content, {**headers, "Content-Length": str(len(content))})

    def _path(self, key: str) -> Path:
        # By hash: a key may be no path, or one that leads out of the folder.
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def _refusal(self, request: Request) -> Answer | None:
        if not self._signed(request):
            return _error(
                403,
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided.",
            )
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
        names = found[2].split(";")
        url = f"http://{self._host}{request.path}" + (f"?{request.query}" if request.query else "")
        signed = AWSRequest(
            method=request.method,
            url=url,
            data=request.body,
            headers={name: request.headers.get(name, "") for name in names},
        )
        signed.context["timestamp"] = request.headers.get("x-amz-date", "")
        auth = S3SigV4Auth(Credentials(self._account.access_key_id, self._account.secret_access_key), "s3", "auto")
        signature = auth.signature(auth.string_to_sign(signed, auth.canonical_request(signed)), signed)
        body_hash = request.headers.get("x-amz-content-sha256")
        return hmac.compare_digest(signature, found[3]) and body_hash in (
            "UNSIGNED-PAYLOAD",
            hashlib.sha256(request.body).hexdigest(),
        )

    def _put(self, key: str, request: Request) -> Answer:
        wanted = request.headers.get("x-amz-checksum-sha256")
        if wanted and wanted != base64.b64encode(hashlib.sha256(request.body).digest()).decode():
            return _error(400, "BadDigest", "The checksum you specified did not match what we received.")
        etag = f'"{hashlib.md5(request.body).hexdigest()}"'
        headers = {name: request.headers[name] for name in KEPT_HEADERS if name in request.headers}
        path = self._path(key)
        _write(path, request.body)
        _write(
            path.with_suffix(".json"),
            json.dumps({"content-type": "application/octet-stream", **headers, "ETag": etag}).encode(),
        )
        return Answer(200, b"", {"ETag": etag})


class PublicBucket:
    """What the bucket's public domain serves: anybody may read, nobody may list."""

    def __init__(self, r2: R2) -> None:
        self._r2 = r2

    def handle(self, request: Request) -> Answer:
        """Answer one request of a browser."""
        key, head = unquote(request.path.removeprefix("/cdn/")), request.method == "HEAD"
        found = self._r2.read(key, head=head) if head or request.method == "GET" else None
        return found or Answer(
            404, b"<!DOCTYPE html><title>Not Found</title><h1>Object not found</h1>", {"Content-Type": "text/html"}
        )


def _write(path: Path, content: bytes) -> None:
    # A kill in mid-write must leave no half object.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _error(status: int, code: str, message: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, body.encode(), {"Content-Type": "application/xml"})
