"""
Builders: a clock that stands still, a local cloud at the wire, S3 by moto, and the service between them.

D1 is the local cloud's unless a test file says otherwise with a `d1_engine` of its own.
"""

import gc
import io
import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
import requests
import responses
from chalice.test import Client
from moto import mock_aws
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

import app
from chalicelib import bootstrap, jobs, log, metrics, settings
from chalicelib.bootstrap import Service
from chalicelib.content import Content
from chalicelib.credentials import Credential
from chalicelib.d1 import D1
from chalicelib.errors import TransientError
from chalicelib.jobs import NEWEST, Job, State
from chalicelib.r2 import R2
from chalicelib.reads import Filter
from chalicelib.runtime import Clock, Deadline
from chalicelib.store import Limits
from chalicelib.wire import Wire
from tests import openapi
from tests.engines import processes
from tests.engines.engine import D1Engine, S3Engine
from tools import schema
from tools.cloud import Account, LocalCloud, Request
from tools.cloud.server import CloudServer

# moto reads this when it starts for the first time: requests to this host are S3's.
R2_ENDPOINT = "https://local-account.r2.cloudflarestorage.com"
os.environ["MOTO_S3_CUSTOM_ENDPOINTS"] = R2_ENDPOINT

KEY = "test-key"
KEY_HASH = "62af8704764faf8ea82fc61ce9c4c3908b6cb97d463a634e9e587d7c885db0ef"
BUCKET = "ob-ai-results"
AUTH = {"Authorization": f"Bearer {KEY}"}


NOT_RUN = "NOT RUN:"

# Every field that a line of the log may have beside metrics; README says what each is.
FIELDS = (
    "at", "level", "message", "request_id", "caller", "method", "route", "status", "job_id", "attempt", "runpod_job_id",
    "endpoint_id", "step_from", "step_to", "ms", "code", "reason", "service", "until", "exception", "event", "outcome",
    "checked", "submitted", "updated", "_aws", "Service", "Code",
)  # fmt: skip
# What no line may hold: signatures, keys, and the prompt of most tests.
UNTOLD = re.compile(
    rf"X-Amz-|Signature=|Bearer |whsec_|{KEY}|local-(runpod-key|cloudflare-token|secret-key)|\ba cat\b|แมว"
)


class FakeClock(Clock):
    """Stands still until it is told to go on; sleeping tells it so."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 31, 23, 59, 0, tzinfo=UTC)
        self.elapsed = 0.0
        self.slept: list[float] = []

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.elapsed

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        self.elapsed += seconds


class Faults:
    """What goes wrong at the wire: answers instead of the local cloud's, or lost after the effect."""

    def __init__(self) -> None:
        self._rules: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, where: str, answer: Any, *, times: float = 1, after_effect: bool = False) -> None:
        """The next `times` requests whose "METHOD url" matches get the answer: (status, body) or an exception."""
        self._rules.append({"where": re.compile(where), "answer": answer, "times": times, "after_effect": after_effect})

    def clear(self) -> None:
        self._rules.clear()

    def take(self, request: str) -> dict[str, Any] | None:
        with self._lock:
            for rule in self._rules:
                if rule["times"] > 0 and rule["where"].search(request):
                    rule["times"] -= 1
                    return rule
        return None


class Bench:
    """The service on the local cloud, and short ways to drive it and to look at what it left."""

    def __init__(self, service: Service, cloud: LocalCloud, clock: FakeClock, faults: Faults, s3: Any) -> None:
        self.service = service
        self.cloud = cloud
        self.clock = clock
        self.faults = faults
        self.s3 = s3

    def deadline(self, seconds: float = 57.0) -> Deadline:
        return Deadline(self.clock, seconds)

    def create(self, prompt: str = "a cat", **payload: Any) -> str:
        job = self.service.pipeline.new_job(
            prompt=prompt, model="qwen-image", payload={"prompt": prompt, **payload} if payload else None
        )
        self.service.pipeline.create([job], self.deadline(24.0), by="test")
        return job.id

    def round(self, *, after: float = 15.0, seconds: float = 57.0, **options: Any) -> Any:
        self.clock.advance(after)
        return self.service.pipeline.run_round(self.deadline(seconds), **options)

    def claim(self, nonce: str = "a", *, lease: float = 60.0) -> list[Job]:
        limits = Limits(submits=200)
        now = self.clock.now()
        claimed = self.service.store.claim(
            nonce=nonce, now=now, limits=limits, lease=lease, ignore_due=True, timeout=5.0
        )
        return claimed.jobs

    def job(self, job_id: str) -> Job:
        job = self.service.store.get(job_id, timeout=5.0)
        assert job is not None
        return job

    def jobs(self) -> list[Job]:
        self.service.reads.forget()
        return self.service.reads.page(Filter(), limit=100, after=NEWEST, counts=False, timeout=5.0).jobs

    def timeline(self, job_id: str) -> list[str]:
        return [line["event"] for line in self.events(job_id)]

    def events(self, job_id: str) -> list[dict[str, Any]]:
        self.service.reads.forget()
        _, lines = self.service.reads.job_with_timeline(job_id, timeout=5.0)
        return [{"event": line["event"], **json.loads(line["detail"])} for line in lines]

    def d1_calls(self, action: Callable[[], object]) -> int:
        before = self.cloud.calls["d1"]
        action()
        return self.cloud.calls["d1"] - before

    def objects(self) -> list[str]:
        return [entry["Key"] for entry in self.s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def new_content() -> Content:
    """An empty file, which does not wait long for its turn."""
    return Content(Deadline(Clock(), 0.05))


def put(bucket: R2, key: str, data: bytes, *, seconds: float = 60.0) -> None:
    """Store the bytes as a PNG."""
    with new_content() as content:
        content.write(data)
        bucket.put(key, content, content_type="image/png", deadline=Deadline(Clock(), seconds))


def call(client: Any, method: str, path: str, body: Any = None, *, headers: Any = None, auth: Any = AUTH) -> Any:
    """One request to a route; its status, body and headers, which are held against the document of the API."""
    raw = body if isinstance(body, (bytes, str)) else b"" if body is None else json.dumps(body).encode()
    response = getattr(client.http, method.lower())(
        path, headers={"Content-Type": "application/json", **auth, **(headers or {})}, body=raw
    )
    openapi.check(method, path, response.status_code, response.headers, response.body)
    return response.status_code, json.loads(response.body or "null"), response.headers


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "ENV_FILE", tmp_path / "no.env")


@pytest.fixture(autouse=True)
def _nothing_is_logged_that_must_not_be(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every line that a test causes has only fields that README knows, and tells no secret."""
    log.begin("test")
    written: list[str] = []
    form = log._JsonLines.format

    def keep(formatter: log._JsonLines, record: logging.LogRecord) -> str:
        written.append(form(formatter, record))
        return written[-1]

    monkeypatch.setattr(log._JsonLines, "format", keep)
    yield
    metrics.name("")
    metrics.take(log.Clock().now())
    for line in written:
        assert json.loads(line).keys() <= {*FIELDS, *metrics.METRICS}, line
        assert not UNTOLD.search(line), line


@pytest.fixture
def answers() -> Iterator[responses.RequestsMock]:
    """The answers that a test gives to HTTP requests itself."""
    with responses.RequestsMock() as mock:
        yield mock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def endpoints() -> tuple[str, ...]:
    """The endpoints that RunPod has besides its first; for a test file's own."""
    return ()


@pytest.fixture
def rate_limited() -> bool:
    """Whether Cloudflare's calls are counted; for a test file's own."""
    return False


@pytest.fixture
def cloud(
    tmp_path: Path, clock: FakeClock, endpoints: tuple[str, ...], rate_limited: bool
) -> Iterator[LocalCloud]:
    cloud = LocalCloud(
        tmp_path / "cloud",
        base_url="http://cloud.test:8001",
        account=Account(endpoints=endpoints),
        clock=lambda: clock.at.timestamp(),
        rate_limited=rate_limited,
    )
    yield cloud
    cloud.close()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def d1_engine(cloud: LocalCloud) -> D1Engine:
    """The D1 that the service gets: the local cloud's."""
    return D1Engine(cloud.settings(), cloud)


@pytest.fixture(params=["local", "miniflare"])
def each_d1_engine(request: pytest.FixtureRequest, cloud: LocalCloud) -> D1Engine:
    """The local cloud's D1 and Cloudflare's own engine, in turn; for a test file's own `d1_engine`."""
    if request.param == "miniflare":
        engine: D1Engine = request.getfixturevalue("miniflare")
        return engine
    return D1Engine(cloud.settings(), cloud)


@pytest.fixture
def table(d1_engine: D1Engine) -> Callable[..., list[dict[str, Any]]]:
    """Run SQL behind the service's back, to look at the table or to change it."""
    return d1_engine.execute


@pytest.fixture
def wire(cloud: LocalCloud, faults: Faults, s3: Any, d1_engine: D1Engine) -> Iterator[responses.RequestsMock]:
    """Every HTTP request goes to the local cloud, unless a fault takes it; one to a real engine goes there."""

    def answer(request: requests.PreparedRequest) -> Any:
        fault = faults.take(f"{request.method} {request.url}")
        if fault is None or fault["after_effect"]:
            parts = urlsplit(request.url or "")
            body = request.body.encode() if isinstance(request.body, str) else request.body or b""
            headers = {name.lower(): value for name, value in request.headers.items()}
            given = cloud.handle(Request(request.method or "", parts.path, parts.query, headers, body))
        if fault is None:
            return given.status, given.headers, given.body
        if isinstance(fault["answer"], Exception):
            return fault["answer"]
        status, body, *more = fault["answer"]
        return status, *(more or [{}]), body if isinstance(body, str) else json.dumps(body)

    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        for method in ("GET", "POST", "PUT"):
            mock.add_callback(method, re.compile(r"http://cloud\.test:8001/.*"), callback=answer)
        if d1_engine.local is None:
            mock.add_passthru(d1_engine.settings["CLOUDFLARE_API_BASE"])
        yield mock


@pytest.fixture(scope="session")
def _s3_client() -> Iterator[Any]:
    with mock_aws():
        yield boto3.client("s3", region_name="us-east-1", aws_access_key_id="local", aws_secret_access_key="local")


@pytest.fixture(scope="session")
def _r2_client(_s3_client: Any) -> Any:
    """The client that the service makes for itself; made once, because that takes longer than most tests."""
    return R2(
        endpoint_url=R2_ENDPOINT, bucket=BUCKET, keys=Credential(("key", "secret")), public_base_url=""
    )._connect()


@pytest.fixture
def _ready_r2(_r2_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(R2, "_connect", lambda self: _r2_client)


@pytest.fixture
def s3(_s3_client: Any) -> Iterator[Any]:
    """S3 by moto, with the empty bucket; R2's endpoint leads there."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # by itself a call of the client takes longer than many a test
    backend.create_bucket(BUCKET, "us-east-1")
    yield _s3_client
    backend.reset()


@pytest.fixture
def environment(cloud: LocalCloud, d1_engine: D1Engine) -> dict[str, str]:
    return {**cloud.settings(), **d1_engine.settings, "R2_ENDPOINT_URL": R2_ENDPOINT, "API_KEY_HASHES": KEY_HASH}


@pytest.fixture
def empty_d1(wire: responses.RequestsMock, environment: dict[str, str], clock: FakeClock) -> D1:
    """D1 without a table."""
    return bootstrap.make_d1(settings.load(environment), Wire(clock), clock)


@pytest.fixture(scope="session")
def _with_schema() -> Iterator[sqlite3.Connection]:
    """The local cloud's database once the schema was applied: a copy takes a fiftieth of the time."""
    with closing(sqlite3.connect(":memory:")) as made:
        yield made


@pytest.fixture
def d1(empty_d1: D1, d1_engine: D1Engine, _with_schema: sqlite3.Connection, tmp_path: Path) -> D1:
    """D1 with the schema."""
    if d1_engine.local is None:
        schema.apply(empty_d1)
        return empty_d1
    with closing(sqlite3.connect(tmp_path / "cloud" / "d1.sqlite")) as database:
        if _with_schema.execute("SELECT 1 FROM sqlite_master").fetchone():
            _with_schema.backup(database)
        else:
            schema.apply(empty_d1)
            database.backup(_with_schema)
    return empty_d1


@pytest.fixture
def bench(
    d1: D1,
    environment: dict[str, str],
    cloud: LocalCloud,
    clock: FakeClock,
    faults: Faults,
    s3: Any,
    _ready_r2: None,
) -> Bench:
    return Bench(bootstrap.build(settings.load(environment), clock), cloud, clock, faults, s3)


@pytest.fixture
def no_r2(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """R2 as it is when nothing can be put; called, it is well again."""
    put = R2.put

    def fail(self: R2, *args: Any, **options: Any) -> None:
        raise TransientError("r2_failed", "R2 is down.", service="r2")

    monkeypatch.setattr(R2, "put", fail)
    return lambda: monkeypatch.setattr(R2, "put", put)


@pytest.fixture
def client(
    d1: D1, environment: dict[str, str], clock: FakeClock, _ready_r2: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    """Chalice's own test client over the routes, with the service on the local cloud."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bootstrap, "Clock", lambda: clock)
    bootstrap.service.cache_clear()
    with Client(app.app) as client:
        yield client
    bootstrap.service.cache_clear()


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The lines that are logged from here on."""
    log.begin("before")
    stream = io.StringIO()
    handler = logging.getLogger("ob-ai-studio").handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    before = handler.setStream(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    handler.setStream(before)


@pytest.fixture
def cloud_server(tmp_path: Path) -> Iterator[CloudServer]:
    """The local cloud behind a real port, with the machine's clock."""
    server = CloudServer(0)
    server.cloud = LocalCloud(tmp_path / "served", base_url=server.base_url)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    server.cloud.close()


def _settings_of(engine: str, start: Callable[[], AbstractContextManager[dict[str, str]]]) -> Iterator[dict[str, str]]:
    if why := processes.why_missing(engine):
        pytest.skip(f"{NOT_RUN} {processes.NAMES[engine]}: {why}")
    with start() as settings_there:
        yield settings_there


def pytest_collection_finish() -> None:
    """Python need not look through all that is loaded for what nobody holds, nor for that so often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the real engines whose tests were skipped, in whichever process."""
    reasons = {report.longrepr[2].partition(": ")[2] for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reason for reason in reasons if reason.startswith(NOT_RUN)):
        terminalreporter.write_line(reason, yellow=True, bold=True)


@pytest.fixture(scope="session")
def _miniflare() -> Iterator[D1Engine]:
    for there in _settings_of("miniflare", processes.miniflare):
        yield D1Engine(there)


@pytest.fixture(scope="session")
def _seaweedfs() -> Iterator[S3Engine]:
    for there in _settings_of("seaweedfs", processes.seaweedfs):
        yield S3Engine(there)


@pytest.fixture
def miniflare(_miniflare: D1Engine) -> D1Engine:
    """Cloudflare's own D1 engine, with an empty database; one process for all tests."""
    _miniflare.clear()
    return _miniflare


@pytest.fixture
def seaweedfs(_seaweedfs: S3Engine) -> S3Engine:
    """SeaweedFS, with an empty bucket; one process for all tests."""
    _seaweedfs.clear()
    return _seaweedfs


# boto3 sends trailers only over https; over http the choice of a checksum of its own is what betrays it.
R2_REFUSES = ("x-amz-trailer", "x-amz-sdk-checksum-algorithm", "x-amz-tagging", "x-amz-acl", "expect")


@pytest.fixture
def s3_requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests of the service's S3 clients as they leave; one with a header that R2 refuses does not."""
    leaving: list[Any] = []
    connect, session = R2._connect, processes.s3_session()

    def watch(request: Any, **_: Any) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        assert not [name for name in R2_REFUSES if name in headers]
        assert "aws-chunked" not in str(headers.get("content-encoding"))
        leaving.append(request)

    def connect_watched(self: R2) -> Any:
        client = connect(self)
        client.meta.events.register_last("before-send.s3", watch)
        return client

    monkeypatch.setattr(boto3.session, "Session", lambda: session)  # to make one takes longer than most tests
    monkeypatch.setattr(R2, "_connect", connect_watched)
    return leaving


@pytest.fixture
def job_factory(clock: FakeClock) -> Callable[..., Job]:
    """A job at any state."""

    def make(state: State = State.POLL, **columns: Any) -> Job:
        live = state not in jobs.FINAL
        sent = {"runpod_job_id": "run-1", "submitted_at": jobs.to_text(clock.now())}
        defaults: dict[str, Any] = {
            "id": "job-1",
            "prompt": "a cat",
            "model": "qwen-image",
            "status": jobs.STATUS_OF[state],
            "step": state.value if live else None,
            "attempt": 0 if state is State.SUBMIT else 1,
            "version": 1,
            "created_at": "2026-01-31T23:59:00.000Z",
            "updated_at": "2026-01-31T23:59:00.000Z",
            **(sent if state in (State.POLL, State.STORE) else {}),
            **({"completed_at": jobs.to_text(clock.now())} if state is State.STORE else {}),
        }
        return Job(**{**defaults, **columns})

    return make
