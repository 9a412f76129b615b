"""A database or a bucket at the local cloud or at a real engine: where it is, and a way behind the service's back."""

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from chalicelib.credentials import Credential
from chalicelib.d1 import D1, Row, Statement
from chalicelib.r2 import R2
from chalicelib.runtime import Clock
from chalicelib.wire import Wire
from tests.engines.processes import s3_client
from tools.cloud import LocalCloud


@dataclass(frozen=True)
class D1Engine:
    """A D1 database: the settings that lead to it, and the local cloud that it is part of, if it is."""

    settings: dict[str, str]
    local: LocalCloud | None = None

    def connect(self, **other: str) -> D1:
        """The service's client, with the machine's clock."""
        given = {
            "base_url": self.settings["CLOUDFLARE_API_BASE"],
            "account_id": self.settings["CLOUDFLARE_ACCOUNT_ID"],
            "database_id": self.settings["D1_DATABASE_ID"],
            "token": self.settings["CLOUDFLARE_API_TOKEN"],
        }
        clock = Clock()
        given |= other
        return D1(wire=Wire(clock), clock=clock, rng=Random(1), **{**given, "token": Credential(given["token"])})

    def execute(self, sql: str, *params: Any) -> list[Row]:
        """Run one statement behind the service's back, to look at the table or to change it."""
        if self.local:
            return self.local.d1.execute(sql, *params)
        return self._client.query([Statement(sql, params)], timeout=10.0)[0]

    @cached_property
    def _client(self) -> D1:
        return self.connect()

    def clear(self) -> None:
        """Drop every table but those of the engine itself."""
        names = [row["name"] for row in self.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        drops = [Statement(f"DROP TABLE {name}") for name in names if not name.startswith(("_cf_", "sqlite_"))]
        if drops:
            self._client.query(drops, timeout=10.0)


@dataclass(frozen=True)
class S3Engine:
    """A bucket: the settings that lead to it."""

    settings: dict[str, str]

    @property
    def bucket(self) -> str:
        """Its name."""
        return self.settings["R2_BUCKET"]

    def connect(self, **other: str) -> R2:
        """The service's client."""
        given = {
            "endpoint_url": self.settings["R2_ENDPOINT_URL"],
            "bucket": self.settings["R2_BUCKET"],
            "access_key_id": self.settings["R2_ACCESS_KEY_ID"],
            "secret_access_key": self.settings["R2_SECRET_ACCESS_KEY"],
            "public_base_url": self.settings["R2_PUBLIC_BASE_URL"],
        }
        given |= other
        keys = Credential((given.pop("access_key_id"), given.pop("secret_access_key")))
        return R2(**given, keys=keys)

    @cached_property
    def client(self) -> Any:
        """A plain S3 client, to look at what the service's own has done."""
        return s3_client(self.settings)

    def clear(self) -> None:
        """Delete every object."""
        for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", []):
            self.client.delete_object(Bucket=self.bucket, Key=entry["Key"])
