"""The spool: a bucket of AWS's own S3, where a finished picture waits while R2 cannot take it."""

import base64
import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from chalicelib.content import Content
from chalicelib.errors import TransientError
from chalicelib.r2 import CALL_SECONDS, ONE_TRY, PIECE_BYTES, Body
from chalicelib.runtime import Deadline


class Spool:
    """
    One bucket, reached with the rights that the function itself has. Nothing is deleted here: the bucket's own
    lifecycle rule does that, so that no crash between two steps can delete too early.
    """

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._client: Any = None
        self._making = threading.Lock()

    def put(self, key: str, content: Content, *, content_type: str, deadline: Deadline) -> None:
        """Keep the file; S3 compares what arrives with the checksum. Raises TransientError."""
        self._call(
            "put_object",
            deadline,
            Key=f"spool/{key}",
            Body=Body(content.rewind(), deadline),
            ContentLength=content.size,
            ContentType=content_type,
            ChecksumSHA256=base64.b64encode(content.sha256).decode(),
        )

    @contextlib.contextmanager
    def read(self, key: str, *, deadline: Deadline) -> Iterator[Iterator[bytes]]:
        """
        A kept file as it comes.

        Raises TransientError, also while it is read; `spool_lost` where it is not there, which the wrong SPOOL_BUCKET
        looks like too.
        """
        from botocore.exceptions import BotoCoreError

        answer = self._call("get_object", deadline, Key=f"spool/{key}")
        try:
            with contextlib.closing(answer["Body"]) as body:
                yield body.iter_chunks(PIECE_BYTES)
        except BotoCoreError as error:
            raise _failed("it broke off") from error

    def has(self, key: str, *, deadline: Deadline) -> bool:
        """Whether the file is there. Raises TransientError."""
        try:
            self._call("head_object", deadline, Key=f"spool/{key}")
        except TransientError as error:
            if error.code == "spool_lost":
                return False
            raise
        return True

    def _call(self, operation: str, deadline: Deadline, **params: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        if deadline.left() < CALL_SECONDS:
            raise _failed("there was no time left for it")
        try:
            return getattr(self._s3(), operation)(Bucket=self._bucket, **params)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404"):  # the second of a HEAD, which has no body
                raise TransientError("spool_lost", "The spool does not have the file.", service="spool") from error
            raise _failed(code) from error
        except (BotoCoreError, TimeoutError) as error:
            raise _failed("it did not answer") from error

    def _s3(self) -> Any:
        with self._making:  # boto3's default session is not made for several threads at once
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client("s3", region_name=os.environ.get("AWS_REGION"), config=Config(**ONE_TRY))


def _failed(why: str) -> TransientError:
    return TransientError("spool_failed", f"The spool did not do what it was asked: {why}.", service="spool")
