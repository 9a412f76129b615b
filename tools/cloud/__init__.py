"""
The local cloud: D1, R2, RunPod and the public bucket, spoken at the wire, kept in one folder.

The service does not know it: it is only given other base URLs. Each part is a function of a request, so that tests can
call it without a socket; server.py puts them behind one port.
"""

import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A request as it came over the wire; header names in small letters, the query not decoded."""

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What goes back."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_answer(status: int, body: Any, headers: dict[str, str] | None = None) -> Answer:
    """An answer with a JSON body."""
    return Answer(
        status,
        json.dumps(body, ensure_ascii=False).encode(),
        {"Content-Type": "application/json; charset=utf-8", **(headers or {})},
    )


def open_database(path: Path) -> sqlite3.Connection:
    """SQLite for every thread. A kill leaves it whole; a power cut may not, for that would cost an fsync a write."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = OFF")
    return connection


# Seconds that the real ones take to answer, from afar, where the local cloud is to be as slow: RunPod's /run and its
# other calls, the host of a link, D1, R2 and its public address.
LATENCY = {"run": 0.15, "runpod": 0.08, "results": 0.15, "d1": 0.12, "r2": 0.12, "cdn": 0.12}


@dataclass(frozen=True)
class Account:
    """What the local cloud accepts; nothing in here is secret."""

    account_id: str = "local-account"
    api_token: str = "local-cloudflare-token"
    database_id: str = "local-database"
    bucket: str = "ob-ai-results"
    access_key_id: str = "local-access-key"
    secret_access_key: str = "local-secret-key"
    runpod_api_key: str = "local-runpod-key"
    endpoint_id: str = "local-endpoint"
    endpoints: tuple[str, ...] = ()  # more of them, beside that one


class LocalCloud:
    """
    All parts over one folder; `calls` counts requests by part, `clock` gives the time that RunPod's runs go by.

    With a `latency` every answer waits for that many times what LATENCY says. Where it is `rate_limited`, Cloudflare's
    calls are counted, and refused when they are too many.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base_url: str,
        account: Account | None = None,
        clock: Callable[[], float] = time.time,
        latency: float = 0.0,
        rate_limited: bool = False,
    ) -> None:
        from tools.cloud.cloudflare import Cloudflare
        from tools.cloud.d1 import D1
        from tools.cloud.faults import Faults
        from tools.cloud.r2 import R2, PublicBucket
        from tools.cloud.rate_limit import RateLimit
        from tools.cloud.runpod import Results, Runpod

        folder.mkdir(parents=True, exist_ok=True)
        self.account = account or Account()
        self.base_url = base_url
        self.calls: Counter[str] = Counter()
        self._latency = latency
        self._count_lock = threading.Lock()
        self.d1 = D1(folder / "d1.sqlite", self.account)
        self.r2 = R2(folder / "r2", self.account, host=base_url.partition("//")[2], clock=clock)
        self.runpod = Runpod(folder / "runpod.sqlite", self.account, results_url=f"{base_url}/results", clock=clock)
        self.cloudflare = Cloudflare(folder, self.account, self.d1, self.r2)
        self._rate_limit = RateLimit(clock) if rate_limited else None
        self._faults = Faults(self._rate_limit, (self.account.endpoint_id, *self.account.endpoints))
        self._parts = {
            "/client/v4/": ("d1", self._cloudflare),
            "/v2/": ("runpod", self.runpod.handle),
            "/r2/": ("r2", self.cloudflare.s3),
            "/cdn/": ("cdn", PublicBucket(self.r2).handle),
            "/results/": ("results", Results(self.runpod).handle),
        }

    def handle(self, request: Request) -> Answer:
        """The answer of whichever part the path belongs to."""
        if request.path == "/simulate":
            return self._faults.handle(request)
        for prefix, (name, part) in self._parts.items():
            if request.path.startswith(prefix):
                with self._count_lock:
                    self.calls[name] += 1
                if self._latency:
                    time.sleep(self._latency * LATENCY["run" if request.path.endswith("/run") else name])
                return self._faults.answer(name, request, part)
        return json_answer(
            404, {"error": "The local cloud has /client/v4 (D1), /v2 (RunPod), /r2 (S3), /cdn, /results and /simulate."}
        )

    def _cloudflare(self, request: Request) -> Answer:
        answer = self.cloudflare.handle
        return self._rate_limit.handle(request, answer) if self._rate_limit else answer(request)

    def close(self) -> None:
        """Let go of the files."""
        self.cloudflare.close()
        self.d1.close()
        self.runpod.close()

    def settings(self) -> dict[str, str]:
        """The service's settings that point here."""
        return settings_for(self.base_url, self.account)


def settings_for(base_url: str, account: Account) -> dict[str, str]:
    """The service's settings that point to a local cloud at that URL."""
    return {
        "CLOUDFLARE_API_BASE": f"{base_url}/client/v4",
        "CLOUDFLARE_ACCOUNT_ID": account.account_id,
        "CLOUDFLARE_API_TOKEN": account.api_token,
        "D1_DATABASE_ID": account.database_id,
        "R2_ENDPOINT_URL": f"{base_url}/r2",
        "R2_BUCKET": account.bucket,
        "R2_ACCESS_KEY_ID": account.access_key_id,
        "R2_SECRET_ACCESS_KEY": account.secret_access_key,
        "R2_PUBLIC_BASE_URL": f"{base_url}/cdn",
        "RUNPOD_API_BASE": f"{base_url}/v2",
        "RUNPOD_API_KEY": account.runpod_api_key,
        "RUNPOD_ENDPOINT_ID": account.endpoint_id,
        "RESULT_ALLOWED_PRIVATE_HOSTS": base_url.partition("//")[2],
    }
