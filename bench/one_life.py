"""
What one job costs, measured in a process of its own: `python bench/one_life.py`, told the settings as JSON.

The functions are called as Lambda calls them, warm: creates, RunPod's callbacks of their ends, reads, and rounds of the
schedule with nothing to do, and with one run to look at. For each: seconds of the clock and of the processor, calls to
D1 and the rows that it says it has read and written, and the bytes that were logged.
"""

import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chalicelib import bootstrap, log
from chalicelib.auth import hash_of
from chalicelib.jobs import Job
from chalicelib.runtime import Deadline
from chalicelib.wire import Reply, Wire
from tests.contract.lambda_runtime import rest_event
from tools import schema

KEY = "a-key-of-the-bench"
RUNS = 20
WEBHOOK = "/webhooks/runpod/{job_id}/{attempt}/{token}"
INPUT = {"simulate": {"queue_seconds": 0, "run_seconds": 0, "bytes": 1_000_000, "shape": "link"}}
Figures = dict[str, float]


class Meter:
    """Reads what D1 says of each call."""

    def __init__(self) -> None:
        self.calls = self.rows_read = self.rows_written = 0
        self._exchange = Wire.exchange

    def watch(self) -> None:
        """From now on."""

        def exchange(wire: Wire, service: str, *args: Any, **kwargs: Any) -> Reply:
            reply = self._exchange(wire, service, *args, **kwargs)
            if service == "d1":
                self.calls += 1
                for part in json.loads(reply.body)["result"]:
                    self.rows_read += part["meta"].get("rows_read", 0)
                    self.rows_written += part["meta"].get("rows_written", 0)
            return reply

        Wire.exchange = exchange


class Context:
    """What Lambda tells a function of its invocation."""

    aws_request_id, function_name, function_version = "a-request", "f", "1"

    def get_remaining_time_in_millis(self) -> int:
        """Enough."""
        return 29_000


def measured(meter: Meter, act: Callable[[], object]) -> Figures:
    """One call of a function."""
    before = meter.calls, meter.rows_read, meter.rows_written
    with logged() as lines:
        cpu, begun = time.process_time(), time.perf_counter()
        act()
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    calls, rows_read, rows_written = (
        now - then for now, then in zip((meter.calls, meter.rows_read, meter.rows_written), before, strict=True)
    )
    return {
        "wall": wall,
        "cpu": cpu,
        "d1": calls,
        "rows_read": rows_read,
        "rows_written": rows_written,
        "log_bytes": len(lines.getvalue()),
    }


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """What is written to the log meanwhile."""
    log.begin("bench")
    handler = log._logger.handlers[0]
    lines = io.StringIO()
    stream, handler.stream = handler.stream, lines
    yield lines
    handler.stream = stream


def life(given: dict[str, str]) -> dict[str, Figures]:
    """The mean of each kind of call."""
    hooks = {"PUBLIC_BASE_URL": "http://127.0.0.1:9", "WEBHOOK_SECRET": "a-secret-of-the-bench"}
    os.environ.update({**given, **hooks, "API_KEY_HASHES": hash_of(KEY), "AWS_LAMBDA_FUNCTION_NAME": "f"})
    import app

    def call(method: str, resource: str, body: Any = None, **params: Any) -> Any:
        path = resource.format(**params)
        headers = {"Authorization": f"Bearer {KEY}"}
        event = rest_event(method, path, resource, body, headers=headers, params=params or None)
        answer = app.app(event, Context())
        assert answer["statusCode"] == 200, answer
        return json.loads(answer["body"])

    service = bootstrap.service()
    schema.apply(service._d1)
    meter = Meter()
    found: dict[str, Figures] = {}
    ids: list[str] = []

    def create() -> None:
        ids.append(call("POST", "/api/queue/create", {"prompt": "a cat", "input": INPUT})["id"])

    def read() -> Any:
        return call("GET", "/api/queue/status/{job_id}", job_id=ids[-1])

    def hear(job: Job) -> None:
        token = str(service.pipeline.webhooks.url(job.id, 1)).rpartition("/")[2]
        call("POST", WEBHOOK, {"id": job.runpod_job_id}, job_id=job.id, attempt="1", token=token)

    def look() -> None:
        service.pipeline.run_round(Deadline(service.clock, 57.0))

    def look_at_all() -> None:
        service.pipeline.run_round(Deadline(service.clock, 57.0), ignore_due=True)

    create()
    look()  # so that all is warm
    meter.watch()
    found["create"] = mean([measured(meter, create) for _ in range(RUNS)])
    found["read"] = mean([measured(meter, read) for _ in range(RUNS)])
    there = [service.store.get(job_id, timeout=5.0) for job_id in ids[1:]]
    found["webhook"] = mean([measured(meter, lambda job=job: hear(job)) for job in there if job])
    assert read()["status"] == "done"
    found["idle"] = mean([measured(meter, look) for _ in range(RUNS)])
    long = {"simulate": {"queue_seconds": 0, "run_seconds": 1e6}}
    call("POST", "/api/queue/create", {"prompt": "a slow one", "input": long})
    look()
    found["look"] = mean([measured(meter, look_at_all) for _ in range(RUNS)])
    return found


def mean(each: list[Figures]) -> Figures:
    """The mean of each figure."""
    return {figure: statistics.mean(one[figure] for one in each) for figure in each[0]}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(life(json.loads(sys.stdin.read()))))
