"""
The live service called as its document says that it may be, and as it may not; every answer held against the document.

What was called, and how it was judged, is printed: pytest -s tests/contract/test_schemathesis.py.
"""

import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from random import Random
from urllib.parse import quote

import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.core.parameters import ParameterLocation
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.hooks import GLOBAL_HOOK_DISPATCHER
from schemathesis.specs.openapi.formats import unregister_string_format

from chalicelib import bootstrap, inputs, settings
from chalicelib.runtime import Clock
from chalicelib.webhooks import Webhooks
from chalicelib.wire import Wire
from tests.conftest import AUTH, KEY_HASH
from tests.openapi import operations
from tests.running import free_port
from tools import processes, schema

SEED = 20261122
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "positive_data_acceptance", "ignored_auth",
    "unsupported_method", "allow_header_conformance",
)  # fmt: skip
START_SECONDS = 30.0
SECRET = "sixteen characters at least"
CONFIG = {
    "seed": SEED,
    "continue-on-failure": True,
    "headers": AUTH,
    "generation": {"deterministic": True, "database": "none", "no-shrink": True, "max-examples": 20},
    "checks": {
        # 410: a job that was deleted, or of whose result nothing is left.
        "positive_data_acceptance": {"expected-statuses": ["2xx", "304", "403", "404", "409", "410", "429"]},
        "negative_data_rejection": {
            "expected-statuses": ["400", "401", "403", "404", "405", "409", "410", "413", "415"]
        },
    },
    "phases": {
        # TRACE and QUERY are left out: Python's HTTP server, which Chalice local is, answers them 501 by itself.
        "coverage": {
            "unexpected-methods": ["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"],
            "extra-data-sources": {"responses": False},  # what is sent must not hang on when a job was done
        },
        "examples": {"extra-data-sources": {"responses": False}},
        "fuzzing": {"extra-data-sources": {"responses": False}, "error-feedback": {"enabled": False}},
        "stateful": {"enabled": False},  # the simulation does that
    },
    "operations": [
        {
            # What is right by itself may be wrong together: a verb and a status that it is not for, an ended job.
            "include-operation-id": ["do_to_many", "send_job"],
            "checks": {"positive_data_acceptance": {"enabled": False}},
        }
    ],
}


class Api:
    """The service as a process behind a port, on the local cloud."""

    def __init__(self, cloud, folder):
        port = free_port()
        self.cloud, self.log = cloud, folder / "api.log"
        self.url = f"http://127.0.0.1:{port}"
        env = {
            **cloud.settings(),
            "API_KEY_HASHES": KEY_HASH,
            "PUBLIC_BASE_URL": self.url,
            "WEBHOOK_SECRET": SECRET,
            "CALLBACK_SECRETS": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3",
            "MAX_QUEUED": "200",  # so that a round by hand is over in time
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        clock = Clock()
        schema.apply(bootstrap.make_d1(settings.load(env), Wire(clock), clock))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.local_api", str(port)],
                cwd=processes.ROOT, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self):
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with suppress(requests.ConnectionError):
                return requests.get(f"{self.url}/health", timeout=5)
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def call(self, method, path, **options):
        answer = requests.request(method, f"{self.url}{path}", headers=AUTH, timeout=30, **options)
        assert answer.ok, answer.text
        return answer.json()

    def create(self, *, priority="normal", **simulate):
        body = {"prompt": "a cat", "priority": priority, "input": {"simulate": {"queue_seconds": 0, **simulate}}}
        return self.call("POST", "/api/queue/create", json=body)["id"]

    def make_jobs(self):
        """Jobs in every state that lasts; their ids."""
        ended = [self.create(run_seconds=0), *(self.create(run_seconds=0, status="FAILED") for _ in range(3))]
        while any(self.call("GET", f"/api/jobs/{job_id}")["job"]["step"] for job_id in ended):
            self.call("POST", "/dev/runpod-poll")
        running, deleted = self.create(run_seconds=3600), ended.pop()
        self.call("DELETE", f"/api/jobs/{deleted}")
        waiting, cancelled = (self.create(priority="low", run_seconds=3600) for _ in range(2))
        self.call("POST", f"/api/jobs/{cancelled}/cancel")
        self.cloud.d1.execute("UPDATE jobs SET dead_at = updated_at, error_code = 'r2_failed' WHERE id = ?", ended[-1])
        self.cloud.d1.execute(
            "INSERT INTO jobs (id, prompt, created_at) VALUES ('an old/id', 'an old cat', '2025-01-01')"
        )
        ids = [*ended, running, deleted, waiting, cancelled, "an old/id"]
        for job_id in ids:  # something to tell of each, at an address that is refused at once
            self.cloud.d1.execute(
                "INSERT INTO deliveries (job_id, version, type, url, data, created_at) "
                "VALUES (?, 1, 'job.done', ?, ?, '')",
                job_id, "http://127.0.0.1:9/", '{"outputs": [], "result_url": null, "result_r2_key": null}',
            )  # fmt: skip
        return ids


@pytest.fixture
def live(cloud_server, tmp_path):
    live = Api(cloud_server.cloud, tmp_path)
    try:
        live.wait()
        yield live
    finally:
        processes.stop([live.process])
        live.process.stdin.close()


@pytest.fixture
def aim(live):
    """Much of what names a job names one that is there, and a callback has its real address; nothing waits for long."""
    ids, rng, webhooks = live.make_jobs(), Random(SEED), Webhooks(base_url=live.url, secret=SECRET)
    moments = st.datetimes(datetime(1970, 1, 1), datetime(9998, 12, 31)).map(lambda at: f"{at.isoformat()}Z")
    cursors = [inputs.make_cursor("2026-11-22T14:22:54.097Z", job_id) for job_id in ids]

    def before_call(context, case, kwargs):
        job_id = rng.choice(ids)
        if negative(case):
            return
        if "Prefer" in (case.headers or {}):
            case.headers["Prefer"] = case.headers["Prefer"].replace("wait=20", "wait=1")
        if case.operation.label == "POST /api/queue/create" and isinstance(case.body, dict):
            _leave_out_what_hangs_together(case.body)
        if rng.random() < 0.4:
            return
        if "n" in case.path_parameters:
            case.path_parameters["n"] = "1"
        if "Idempotency-Key" in (case.headers or {}):
            del case.headers["Idempotency-Key"]  # else most of what is right is only another request of the same name
        if "token" in case.path_parameters:
            _, attempt, token = webhooks.url(job_id, 1).rsplit("/", 2)
            case.path_parameters |= {"attempt": attempt, "token": token}
        if "job_id" in case.path_parameters:
            case.path_parameters["job_id"] = quote(job_id, safe="")
        if "id" in (case.query or {}):
            case.query["id"] = job_id
        if isinstance(case.body, dict) and "jobId" in case.body:
            case.body["jobId"] = job_id

    schemathesis.openapi.format("cursor", st.sampled_from(cursors))
    schemathesis.openapi.format("date-time", moments)
    schemathesis.hook(before_call)
    yield
    GLOBAL_HOOK_DISPATCHER.unregister(before_call)
    unregister_string_format("cursor")
    unregister_string_format("date-time")


def _leave_out_what_hangs_together(body):
    """What is right by itself may be wrong for the model, and a link may lead nowhere: that has tests of its own."""
    for job in [body, *(body.get("jobs") or [])]:
        for name in ("slots", "image_key", "image_url"):
            job.pop(name, None)
        if job.get("callback_url"):
            job["callback_url"] = "https://shop.example/hooks"
        if job.get("model") == "qwen-image-edit":
            job["model"] = "qwen-image"


def negative(case):
    return any(case.meta.is_negative_at(location) for location in ParameterLocation)


@dataclass
class Run:
    """What Schemathesis has done, and what came of it."""

    cases: Counter = field(default_factory=Counter)
    checks: Counter = field(default_factory=Counter)
    statuses: dict = field(default_factory=lambda: defaultdict(Counter))
    failures: list = field(default_factory=list)
    seconds: float = 0.0

    def note(self, event):
        if isinstance(event, NonFatalError | FatalError):
            self.failures.append(str(event.info if isinstance(event, NonFatalError) else event.exception))
        elif isinstance(event, ScenarioFinished):
            self.cases[event.phase.value] += len(event.recorder.cases)
            for case_id, interaction in event.recorder.interactions.items():
                label = event.recorder.cases[case_id].value.operation.label
                self.statuses[label][interaction.response.status_code if interaction.response else None] += 1
            for nodes in event.recorder.checks.values():
                for node in nodes:
                    self.note_check(event.label, node)

    def note_check(self, label, node):
        self.checks[node.name] += 1
        if node.failure_info is not None:
            failure = node.failure_info.failure
            self.failures.append(f"{label}: {failure.title}. {failure.message}\n{node.failure_info.code_sample}\n")

    def __str__(self):
        phases = ", ".join(f"{number} of {phase}" for phase, number in self.cases.items())
        lines = [
            f"{len(self.statuses)} operations, {sum(self.cases.values())} cases ({phases}), "
            f"{sum(self.checks.values())} checks, {len(self.failures)} failures, {self.seconds:.0f} seconds",
            *(f"  {name}: {number}" for name, number in sorted(self.checks.items())),
            "answers by status:",
        ]
        for label, seen in sorted(self.statuses.items()):
            lines.append(f"  {label}: " + ", ".join(f"{status} {number}" for status, number in sorted(seen.items())))
        return "\n".join(lines)


def schemathesis_run(live):
    """Everything that Schemathesis finds to call in the document that the service itself gives out."""
    document = requests.get(f"{live.url}/openapi.json", timeout=5).json()
    config = schemathesis.Config.from_dict({**CONFIG, "base-url": live.url})
    run, start = Run(), time.monotonic()
    for event in from_schema(schemathesis.openapi.from_dict(document, config=config)).execute():
        run.note(event)
    run.seconds = time.monotonic() - start
    return run


def test_every_answer_of_the_live_service_is_one_of_its_document(live, aim):
    run = schemathesis_run(live)

    print(f"\n{run}")
    assert not run.failures, "\n".join(run.failures[:10])
    assert set(run.statuses) == {" ".join(operation) for operation in operations()}
    assert all(200 in seen for seen in run.statuses.values())
    assert all(run.checks[name] > 500 for name in CHECKS)
