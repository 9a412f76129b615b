"""
POST /api/queue/create beside its bare calls, in a process of its own: `python -m bench.one_create`, told what to do as
JSON on its standard input.

`ours` is the function of the Lambda, called with an event of API Gateway as a warm container is: it checks the key and
the body, makes a job and sends it. `bare` makes the same calls as `requests` alone, over a session that is kept: the
bodies are those that `ours` has sent, under names of their own, so that D1 has as much to write. Either in turn.
"""

import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import requests
from chalice.local import LambdaContext

import app
from chalicelib import settings
from chalicelib.wire import Wire
from tests.contract.lambda_runtime import rest_event

WARM_UP = 5
NONCE = re.compile(rb'"([0-9a-f]{32})"')
PATH = "/api/queue/create"
RUN_SECONDS = 3600  # no run ends meanwhile
BODY = {"input": {"prompt": "a cat", "simulate": {"run_seconds": RUN_SECONDS}}}

# A call as it was sent: to which service, where to, its headers and its body.
Sent = tuple[str, str, dict[str, str], bytes]


class Recorder:
    """Keeps what the service sends."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self._open = Wire.open
        Wire.open = lambda wire, *args, **kwargs: self._record(wire, *args, **kwargs)

    def _record(self, wire: Wire, service: str, method: str, url: str, **kwargs: Any) -> Any:
        self.sent.append((service, url, dict(kwargs["headers"]), kwargs["body"] or b""))
        return self._open(wire, service, method, url, **kwargs)


class Ours:
    """The Lambda's function."""

    def __init__(self, key: str) -> None:
        self.recorder = Recorder()
        self._headers = {"Authorization": f"Bearer {key}"}
        self.job_id = ""

    def prepare(self) -> None:
        """What API Gateway and Lambda's runtime do before the function is called."""
        self.recorder.sent.clear()
        self._event = rest_event("POST", PATH, PATH, BODY, headers=self._headers)
        self._context = LambdaContext("api_handler", 512, max_runtime_ms=29_000)
        self._context.aws_request_id = str(uuid.uuid4())

    def create(self) -> None:
        """Make one job."""
        answer = app.app(self._event, self._context)
        assert answer["statusCode"] == 200, answer
        self.job_id = json.loads(answer["body"])["id"]


class Bare:
    """The calls of one create, each as short as `requests` lets one write it."""

    def __init__(self, calls: list[Sent], job_id: str) -> None:
        self._calls = calls
        self._job_id = job_id.encode()
        self._run_id = re.search(rb'"runpod_job_id\W+([0-9a-f-]+-u1)', calls[-1][3].replace(b"\\", b""))[1]
        self._session = requests.Session()
        self._session.trust_env = False

    def prepare(self) -> None:
        """The same calls under new names."""
        names = {self._job_id: str(uuid.uuid4()).encode()}
        names |= {name: uuid.uuid4().hex.encode() for *_, body in self._calls for name in NONCE.findall(body)}
        self._bodies = [body for *_, body in self._calls]
        for old, new in names.items():
            self._bodies = [body.replace(old, new) for body in self._bodies]

    def create(self) -> None:
        """Make one job."""
        run_id = self._run_id
        for (service, url, headers, _), body in zip(self._calls, self._bodies, strict=True):
            answer = self._session.post(url, data=body.replace(self._run_id, run_id), headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            if service == "runpod":
                run_id = found["id"].encode()

    def sent_jobs(self) -> int:
        """How many jobs are in the table that RunPod has, each under the id of a run of its own."""
        _, url, headers, _ = self._calls[0]
        sql = "SELECT count(DISTINCT runpod_job_id) AS n FROM jobs WHERE status = 'running' AND step = 'poll'"
        answer = self._session.post(url, json={"sql": sql, "params": []}, headers=headers, timeout=60).json()
        return int(answer["result"][0]["results"][0]["n"])


def timed(one: Ours | Bare) -> tuple[float, float]:
    """Seconds of the clock and of the processor for one create."""
    one.prepare()
    begun, cpu = time.perf_counter(), time.process_time()
    one.create()
    return time.perf_counter() - begun, time.process_time() - cpu


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """The seconds of each create, and the calls that one makes."""
    settings.load(only="")  # a sentence now rather than an answer at the first request
    ours = Ours(order["key"])
    for _ in range(WARM_UP):
        timed(ours)
    calls = list(ours.recorder.sent)
    bare = Bare(calls, ours.job_id)
    for _ in range(WARM_UP):
        timed(bare)
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for number in range(order["times"]):
        turn: list[tuple[str, Callable[[], tuple[float, float]]]] = [
            ("ours", lambda: timed(ours)),
            ("bare", lambda: timed(bare)),
        ]
        for name, run in turn if number % 2 else reversed(turn):
            taken[name].append(run())
            if name == "ours":
                made = [service for service, *_ in ours.recorder.sent]
                assert made == [service for service, *_ in calls], made
    made, wanted = bare.sent_jobs(), 2 * (order["times"] + WARM_UP)
    assert made == wanted, f"{made} jobs were sent, of {wanted}"
    return {
        "d1_calls": sum(service == "d1" for service, *_ in calls),
        "runpod_calls": sum(service == "runpod" for service, *_ in calls),
        **{name: [wall for wall, _ in each] for name, each in taken.items()},
        **{f"{name}_cpu": [cpu for _, cpu in each] for name, each in taken.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
