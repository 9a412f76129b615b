"""
S3 below boto3: the service's own clients, whose requests are answered by the simulated world instead of a socket.

One client of each kind is made for all worlds, because making one takes longer than most runs.
"""

import base64
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from botocore.awsrequest import AWSResponse
from botocore.exceptions import EndpointConnectionError, ReadTimeoutError
from requests.structures import CaseInsensitiveDict as Headers

from chalicelib.credentials import Credential
from chalicelib.errors import IndeterminateError, TransientError
from chalicelib.r2 import R2, READ_TIMEOUT
from chalicelib.spool import Spool

R2_HOST = "r2.sim.test"
AWS = {"AWS_ACCESS_KEY_ID": "role", "AWS_SECRET_ACCESS_KEY": "role-secret-4711", "AWS_DEFAULT_REGION": "eu-central-1"}

_worlds: list[Any] = []


@contextmanager
def wired(world: Any) -> Iterator[None]:
    """While this lasts, the clients speak to that world."""
    _worlds.append(world)
    try:
        yield
    finally:
        _worlds.pop()


@lru_cache(maxsize=1)
def r2_client() -> Any:
    """R2's client, as the service makes it."""
    r2 = R2(
        endpoint_url=f"https://{R2_HOST}",
        bucket="",
        keys=Credential(("local-access-key", "local-secret-key")),
        public_base_url="",
    )
    return _wire(r2._connect(), "r2")


@lru_cache(maxsize=1)
def spool_client() -> Any:
    """The spool's client, as the service makes it with the function's own role."""
    with mock.patch.dict(os.environ, AWS):
        return _wire(Spool("")._connect(), "spool")


def _wire(client: Any, service: str) -> Any:
    def send(request: Any, **_: Any) -> AWSResponse:
        body = request.body or b""
        content = body if isinstance(body, bytes) else body.read()
        said = {name: value.decode() if isinstance(value, bytes) else value for name, value in request.headers.items()}
        try:
            status, headers, answer = _worlds[-1].call(
                service, request.method, request.url, content, READ_TIMEOUT, said
            )
        except TransientError as error:
            raise EndpointConnectionError(endpoint_url=request.url) from error
        except IndeterminateError as error:
            raise ReadTimeoutError(endpoint_url=request.url) from error
        return AWSResponse(request.url, status, Headers(headers), _Raw(answer))

    client.meta.events.register_last("before-send.s3", send)
    return client


class _Raw(io.BytesIO):
    def stream(self, amt: int = 65_536, **_: Any) -> Iterator[bytes]:
        while piece := self.read(amt):
            yield piece


class Bucket:
    """Objects by key."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}

    def handle(self, method: str, url: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Answer one call."""
        key = key_of(url)
        if method == "DELETE":
            self.objects.pop(key, None)
            return 204, {}, b""
        if not key:
            return 200, {}, self._list(parse_qs(urlsplit(url).query)["prefix"][0])
        if method == "PUT":
            etag = f'"{hashlib.md5(body).hexdigest()}"'
            self.objects[key] = (body, etag)
            return 200, {"ETag": etag}, b""
        if key not in self.objects:
            return 404, {}, b"" if method == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>"
        content, etag = self.objects[key]
        if "Range" in headers:  # the beginning of it, as the service asks
            begun = content[: int(headers["Range"].rpartition("-")[2]) + 1]
            said = f"bytes 0-{len(begun) - 1}/{len(content)}"
            return 206, {"ETag": etag, "Content-Length": str(len(begun)), "Content-Range": said}, begun
        head = {"ETag": etag, "Content-Length": str(len(content))}
        return 200, head, b"" if method == "HEAD" else content

    def _list(self, prefix: str) -> bytes:
        keys = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in self.objects if key.startswith(prefix))
        return f"<ListBucketResult>{keys}</ListBucketResult>".encode()


def key_of(url: str) -> str:
    """The key of the object at that address."""
    return unquote(urlsplit(url).path).lstrip("/").partition("/")[2]


def sha256_of(content: bytes) -> str:
    """As `outputs` has it."""
    return base64.b16encode(hashlib.sha256(content).digest()).decode().lower()
