"""Cloudflare R2 through its S3 endpoint, with what boto3 must be told for it."""

import base64
import contextlib
import hashlib
import io
import threading
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from chalicelib.content import SMALL_BYTES, Content
from chalicelib.credentials import Credential
from chalicelib.errors import PermanentError, ServiceError, TransientError
from chalicelib.records import dataclass
from chalicelib.runtime import Deadline

CACHE_CONTROL = "public, max-age=31536000, immutable"
# Seconds, the second of silence; so few that the last round of a minute, which has twelve, can still store.
CONNECT_TIMEOUT = 1.5
READ_TIMEOUT = 3.5
# What boto3 is told for any bucket: no tries of its own, which would not know our deadline.
ONE_TRY: dict[str, Any] = {
    "retries": {"mode": "standard", "total_max_attempts": 1},
    "connect_timeout": CONNECT_TIMEOUT,
    "read_timeout": READ_TIMEOUT,
    "max_pool_connections": 32,
}
CALL_SECONDS = CONNECT_TIMEOUT + READ_TIMEOUT  # that a call may last which R2 does not answer
PIECE_BYTES = 65_536
MAX_KEY_BYTES = 1024

# https://developers.cloudflare.com/r2/api/error-codes/ ; a HEAD is refused without a word, only with its status
REFUSALS = {
    "NoSuchBucket": ("r2_no_bucket", "R2 does not know the bucket"),
    "Unauthorized": ("r2_unauthorized", "R2 does not know the access key"),
    "InvalidAccessKeyId": ("r2_unauthorized", "R2 does not know the access key"),
    "SignatureDoesNotMatch": ("r2_signature", "R2 says that the secret is not that of the access key"),
    "AccessDenied": ("r2_denied", "R2 does not let this token do that to the bucket"),
    "RequestTimeTooSkewed": ("r2_clock", "R2 says that this machine's clock is wrong"),
}
CHECKSUM_REFUSALS = ("NotImplemented", "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch")

# A file over SMALL_BYTES goes up in parts, which R2 wants equal but for the last, and of 5 MiB at least. Only one such
# file is under way at a time, so that one part is all the memory this takes.
PART_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Source:
    """An object of the bucket, as it was when it was read."""

    key: str
    etag: str


class Body:
    """A file on its way up; R2 may read it as slowly as it likes, but not beyond the deadline."""

    def __init__(self, file: IO[bytes], deadline: Deadline) -> None:
        self._file = file
        self._deadline = deadline
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if self._deadline.left() <= 0:
            raise TimeoutError("the time for the upload is over")
        return self._file.read(size)


class R2:
    """
    One bucket; its keys are the id and the secret of an R2 token. boto3 is imported and the client made on first use:
    most invocations store nothing.
    """

    def __init__(
        self, *, endpoint_url: str, bucket: str, keys: Credential[tuple[str, str]], public_base_url: str
    ) -> None:
        self._endpoint_url = endpoint_url
        self._bucket = bucket
        self._keys = keys
        self._public_base_url = public_base_url
        self._client: Any = None
        self._made_with = keys.value
        self._making = threading.Lock()

    def put(self, key: str, content: Content, *, content_type: str, deadline: Deadline) -> None:
        """
        Store the object, in parts where it is large; a repeat overwrites it with the same.

        It is there as it was sent when this returns: R2 has compared what arrived with our checksums, and has told its
        size and checksum. One try; no call is begun that R2 could leave unanswered beyond the deadline. Raises
        TransientError or PermanentError.
        """
        headers = {"ContentType": content_type, "CacheControl": CACHE_CONTROL}
        put = self._put_parts if content.size > SMALL_BYTES else self._put_whole
        etag = put(key, content, headers, deadline)
        self._confirm(key, content.size, {etag}, deadline)

    def copy(self, source: Source, key: str, content: Content, *, content_type: str, deadline: Deadline) -> None:
        """
        Store the object whose bytes `content` has, by having R2 copy it from another key; confirmed as in put().

        Raises TransientError where the source is no longer what was read, and as put() does.
        """
        self._call(
            "copy_object",
            deadline,
            Key=key,
            CopySource={"Bucket": self._bucket, "Key": source.key},
            CopySourceIfMatch=source.etag,
            MetadataDirective="REPLACE",
            ContentType=content_type,
            CacheControl=CACHE_CONTROL,
        )
        # Whether the copy of an object made of parts keeps its ETag is not documented.
        self._confirm(key, content.size, {content.md5.hex(), source.etag.strip('"')}, deadline)

    @contextlib.contextmanager
    def read(self, key: str, *, deadline: Deadline) -> Iterator[tuple[Source, Iterator[bytes]]]:
        """An object and its bytes as they come. Raises TransientError or PermanentError, also while it is read."""
        from botocore.exceptions import BotoCoreError

        answer = self._call("get_object", deadline, Key=key)
        try:
            with contextlib.closing(answer["Body"]) as body:
                yield Source(key, answer["ETag"]), body.iter_chunks(PIECE_BYTES)
        except BotoCoreError as error:
            raise _no_answer() from error

    def beginning(self, key: str, size: int, *, deadline: Deadline) -> tuple[bytes, int]:
        """The first bytes of an object, and how many it has in all. Raises as read() does."""
        from botocore.exceptions import BotoCoreError

        answer = self._call("get_object", deadline, Key=key, Range=f"bytes=0-{size - 1}")
        try:
            with contextlib.closing(answer["Body"]) as body:
                return body.read(size), int(answer["ContentRange"].rpartition("/")[2])
        except BotoCoreError as error:
            raise _no_answer() from error

    def delete(self, key: str, *, deadline: Deadline) -> None:
        """Remove the object; one that is not there is fine. Raises TransientError or PermanentError."""
        self._call("delete_object", deadline, Key=key)

    def keys(self, prefix: str, *, deadline: Deadline) -> list[str]:
        """The keys that begin so, at most a thousand. Raises TransientError or PermanentError."""
        found = self._call("list_objects_v2", deadline, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", [])]

    def public_url(self, key: str) -> str | None:
        """Where anybody may read the object for ever; None where the bucket is private."""
        return f"{self._public_base_url}/{key}" if self._public_base_url else None

    def presign(self, key: str, *, seconds: int) -> str:
        """An address at which anybody may read the object for that long; made here, R2 is not asked."""
        url: str = self._s3().generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=seconds
        )
        return url

    def presign_put(self, key: str, *, content_type: str, size: int, seconds: int) -> str:
        """An address at which anybody may put an object of that type and size, for so long; R2 is not asked."""
        params = {"Bucket": self._bucket, "Key": key, "ContentType": content_type, "ContentLength": size}
        url: str = self._s3().generate_presigned_url("put_object", Params=params, ExpiresIn=seconds)
        return url

    def key_of(self, url: str) -> str | None:
        """The key of the object that a link points to, if it lies in this bucket."""
        link = url.partition("?")[0].partition("#")[0]
        host = urlsplit(self._endpoint_url).netloc
        scheme = self._endpoint_url.partition("://")[0]
        bases = [f"{self._endpoint_url}/{self._bucket}/", f"{scheme}://{self._bucket}.{host}/"]
        if self._public_base_url:
            bases.append(f"{self._public_base_url}/")
        key = next((unquote(link[len(base) :]) for base in bases if link.startswith(base)), "")
        return key if key and key.isprintable() and len(key.encode("utf-8", "replace")) <= MAX_KEY_BYTES else None

    def _put_whole(self, key: str, content: Content, headers: dict[str, str], deadline: Deadline) -> str:
        self._call(
            "put_object",
            deadline,
            Key=key,
            Body=Body(content.rewind(), deadline),
            ContentLength=content.size,
            ChecksumSHA256=base64.b64encode(content.sha256).decode(),
            **headers,
        )
        return content.md5.hex()

    def _put_parts(self, key: str, content: Content, headers: dict[str, str], deadline: Deadline) -> str:
        begun = self._call("create_multipart_upload", deadline, Key=key, **headers)
        upload = {"Key": key, "UploadId": begun["UploadId"]}
        try:
            parts, digests = self._upload_parts(upload, content, deadline)
            self._call("complete_multipart_upload", deadline, **upload, MultipartUpload={"Parts": parts})
        except ServiceError:
            with contextlib.suppress(ServiceError):  # else R2 itself throws the parts away after seven days
                self._call("abort_multipart_upload", deadline, **upload)
            raise
        return f"{_md5(b''.join(digests)).hex()}-{len(digests)}"

    def _upload_parts(
        self, upload: dict[str, str], content: Content, deadline: Deadline
    ) -> tuple[list[dict[str, Any]], list[bytes]]:
        parts, digests = [], []
        file = content.rewind()
        while part := file.read(PART_BYTES):
            digests.append(_md5(part))
            checksum = base64.b64encode(digests[-1]).decode()
            number = len(digests)
            answer = self._call(
                "upload_part",
                deadline,
                **upload,
                PartNumber=number,
                Body=Body(io.BytesIO(part), deadline),
                ContentLength=len(part),
                ContentMD5=checksum,
            )
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        return parts, digests

    def _confirm(self, key: str, size: int, etags: set[str], deadline: Deadline) -> None:
        """Have R2 tell what it holds. Its ETag is the MD5, or for parts that of their MD5s with their number."""
        found = self._call("head_object", deadline, Key=key)
        if found["ContentLength"] != size or found["ETag"].strip('"') not in etags:
            raise TransientError("r2_mismatch", "R2 holds another object than the one that was sent.", service="r2")

    def _call(self, operation: str, deadline: Deadline, **params: Any) -> Any:
        keys = self._keys.value
        try:
            return self._call_once(operation, deadline, params)
        except PermanentError:
            if deadline.left() < self._keys.seconds + CALL_SECONDS or not self._keys.renew(keys):
                raise
            if "Body" in params:
                params["Body"].seek(0)
            return self._call_once(operation, deadline, params)

    def _call_once(self, operation: str, deadline: Deadline, params: dict[str, Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        if deadline.left() < CALL_SECONDS:
            raise _too_slow()
        try:
            return getattr(self._s3(), operation)(Bucket=self._bucket, **params)
        except ClientError as error:
            raise _failure(error.response) from error
        except BotoCoreError as error:
            raise _no_answer() from error
        except TimeoutError as error:  # of a Body that boto3 reads to sign it
            raise _too_slow() from error

    def _s3(self) -> Any:
        with self._making:  # boto3's default session is not made for several threads at once
            if self._client is None or self._made_with != self._keys.value:
                self._made_with = self._keys.value
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        import boto3
        from botocore.config import Config

        access_key_id, secret_access_key = self._made_with
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self._endpoint_url,
            region_name="auto",
            # In Lambda the environment holds the role's own keys and session token, which R2 would refuse.
            aws_access_key_id=access_key_id,
            aws_secret_access_key=secret_access_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                # boto3's default checksums come as aws-chunked trailers, which R2 answers with 401 or 501.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                **ONE_TRY,
            ),
        )
        client.meta.events.register("before-send.s3", _drop_expect)
        return client


def _drop_expect(request: Any, **_: Any) -> None:
    # R2 sends no 100 Continue; botocore would wait a whole second for it at every put.
    request.headers.pop("Expect", None)


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def _too_slow() -> TransientError:
    return TransientError("r2_too_slow", "The time was over before R2 had the file.", service="r2")


def _no_answer() -> TransientError:
    return TransientError("r2_unreachable", "R2 did not answer.", service="r2")


def _failure(response: dict[str, Any]) -> ServiceError:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code", "")
    if code == "NoSuchKey":
        return TransientError("link_not_found", "The link names an object that is not in R2.", service="result")
    if code == "InvalidRange":
        return TransientError("r2_empty", "The object in R2 is empty.", service="r2")
    if code in ("404", "PreconditionFailed", "NoSuchUpload"):  # "404" is what a HEAD has, without a body
        return TransientError("r2_missing", f"What was to be read in R2 is not there now ({code}).", service="r2")
    if status in (401, 403, 404):
        refused, sentence = REFUSALS.get(code, ("r2_refused", "R2 refused the key, or what it was to do with it"))
        return PermanentError(refused, f"{sentence} ({code}); check the R2 settings.", service="r2")
    if code in CHECKSUM_REFUSALS:
        return TransientError("r2_checksum", f"R2 did not take the upload with its checksum ({code}).", service="r2")
    return TransientError("r2_failed", f"R2 did not do what it was asked ({code or status}).", service="r2")
