"""Cloudflare R2 through its S3 endpoint, with what boto3 must be told for it."""

import base64
import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from chalicelib.errors import PermanentError, ServiceError, TransientError

CACHE_CONTROL = "public, max-age=31536000, immutable"
CONNECT_TIMEOUT = 2  # seconds
READ_TIMEOUT = 5  # seconds of silence


@dataclass(frozen=True)
class Stored:
    """An object as R2 has confirmed it."""

    bytes: int
    sha256: str


class R2:
    """One bucket. boto3 is imported and the client made on first use: most invocations store nothing."""

    def __init__(self, *, endpoint_url: str, bucket: str, access_key_id: str, secret_access_key: str) -> None:
        self._endpoint_url = endpoint_url
        self._bucket = bucket
        self._access_key_id = access_key_id
        self._secret_access_key = secret_access_key
        self._client: Any = None
        self._making = threading.Lock()

    def put(self, key: str, content: bytes, *, content_type: str) -> Stored:
        """
        Store the object; R2 itself compares it with the checksum. A repeat overwrites it with the same.

        One try, of at most 7 s of silence. Raises TransientError or PermanentError.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        digest = hashlib.sha256(content)
        try:
            self._s3().put_object(
                Bucket=self._bucket,
                Key=key,
                Body=content,
                ContentType=content_type,
                CacheControl=CACHE_CONTROL,
                ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            )
        except ClientError as error:
            raise _failure(error.response) from error
        except BotoCoreError as error:
            raise TransientError("r2_unreachable", "R2 did not answer.", service="r2") from error
        return Stored(len(content), digest.hexdigest())

    def _s3(self) -> Any:
        with self._making:  # boto3's default session is not made for several threads at once
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        import boto3
        from botocore.config import Config

        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self._endpoint_url,
            region_name="auto",
            # In Lambda the environment holds the role's own keys and session token, which R2 would refuse.
            aws_access_key_id=self._access_key_id,
            aws_secret_access_key=self._secret_access_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                # boto3's default checksums come as aws-chunked trailers, which R2 answers with 401 or 501.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "standard", "total_max_attempts": 1},
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                max_pool_connections=32,
            ),
        )
        client.meta.events.register("before-send.s3", _drop_expect)
        return client


def _drop_expect(request: Any, **_: Any) -> None:
    # R2 sends no 100 Continue; botocore would wait a whole second for it at every put.
    request.headers.pop("Expect", None)


def _failure(response: dict[str, Any]) -> ServiceError:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code", "")
    if status in (401, 403, 404):
        return PermanentError(
            "r2_refused",
            f"R2 refused the key or does not know the bucket ({code}); check the R2 settings.",
            service="r2",
        )
    return TransientError("r2_failed", f"R2 did not store the object ({code or status}).", service="r2")
