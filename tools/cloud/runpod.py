"""
RunPod's queue API: runs wait, work and end by the clock, and are forgotten half an hour after their end.

An input may carry `simulate` to have another run than the usual one: {"queue_seconds", "run_seconds", "status",
"error", "shape": "base64" | "data_url" | "link" | "none", "output": what the worker returns, instead of a picture,
"progress": the number of pieces of work, of which a worker tells how many it has done, "bytes": that the picture has
at least}. Beside it `webhook` and `policy` (`executionTimeout`, `ttl`) are RunPod's own. What the workers draw is in
worker.py.

`POST /v2/{endpoint}/simulate/health` is the local cloud's own too: {"workers": {"throttled": 3}} has health tell these
workers, and none of another kind; with "hold": true beside it no worker takes a run. So it stays until the next such
call says otherwise ({"workers": null}: all is as usual), or the process ends.
"""

import contextlib
import json
import math
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.cloud import Account, Answer, Request, json_answer, open_database
from tools.cloud.runs import Run, fault, health, health_fault
from tools.cloud.worker import Fetch, NotLoaded, Worker, fetch

MAX_BODY_BYTES = 10 * 1024 * 1024
RETRY_AFTER = (5.0, 15.0)  # seconds from a failed try of a webhook to the next
WEBHOOK_HEADERS = {"Content-Type": "application/json", "User-Agent": "Go-http-client/2.0"}

# Sends a webhook: URL, headers, body; the status of the answer. Raises OSError where there is none.
Send = Callable[[str, dict[str, str], bytes], int]

COLUMNS = {
    "id": "TEXT PRIMARY KEY",
    "endpoint_id": "TEXT",
    "input": "TEXT",
    "created_at": "REAL",
    "cancelled_at": "REAL",
    "webhook": "TEXT",
    "execution_timeout_ms": "REAL",
    "ttl_ms": "REAL",
    "tries": "INTEGER NOT NULL DEFAULT 0",
    "not_before": "REAL",  # when a worker may take it at the earliest; infinite: it is held
    "error": "TEXT",  # of its worker; NULL: none that is known
    "deliver_at": "REAL",  # when the webhook is to be sent; NULL: not at all, or no more
}
FIELDS = [name for name in COLUMNS if name != "deliver_at"]  # of a Run
SELECT = f"SELECT {', '.join(FIELDS)} FROM runs"


class Runpod:
    """One account and its endpoints."""

    def __init__(
        self,
        path: Path,
        account: Account,
        *,
        results_url: str,
        clock: Callable[[], float],
        fetch: Fetch = fetch,
    ) -> None:
        self.worker = Worker(results_url=results_url, fetch=fetch)
        self._account = account
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: set[str] = set()  # runs whose webhook is being sent
        self._workers: dict[str, dict[str, int]] = {}  # that an endpoint's health is to tell
        self._held: set[str] = set()  # endpoints whose workers take no run
        self._connection = open_database(path)
        self._make_table()
        for endpoint_id in self._endpoints:
            self._release(endpoint_id)

    @property
    def _endpoints(self) -> tuple[str, ...]:
        return (self._account.endpoint_id, *self._account.endpoints)

    def _make_table(self) -> None:
        """The table, also where the file is of a version that had fewer columns."""
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        self._execute(f"CREATE TABLE IF NOT EXISTS runs ({columns})")
        there = {row[1] for row in self._execute("PRAGMA table_info(runs)")}
        for name in COLUMNS.keys() - there:
            self._execute(f"ALTER TABLE runs ADD COLUMN {name} {COLUMNS[name]}")
        self._execute("CREATE INDEX IF NOT EXISTS runs_deliver ON runs (deliver_at) WHERE deliver_at IS NOT NULL")

    def handle(self, request: Request) -> Answer:
        """Answer one API call."""
        if request.headers.get("authorization") != f"Bearer {self._account.runpod_api_key}":
            return json_answer(401, {"error": "Unauthorized"})
        endpoint_id, _, operation = request.path.removeprefix("/v2/").partition("/")
        verb, _, run_id = operation.partition("/")
        if endpoint_id not in self._endpoints:
            return _error(404, "Not Found", "endpoint not found")
        if (request.method, operation) == ("POST", "run"):
            return self._accept(endpoint_id, request.body)
        if (request.method, operation) == ("GET", "health"):
            return self._health(endpoint_id)
        if (request.method, operation) == ("POST", "simulate/health"):
            return self._simulate_health(endpoint_id, request.body)
        run = self.find(run_id)
        if run is None or run.endpoint_id != endpoint_id or self._clock() >= run.gone_at:
            return _error(404, "Not Found", "job not found")
        if (request.method, verb) == ("GET", "status"):
            return json_answer(200, self._status(run))
        if (request.method, verb) == ("POST", "cancel"):
            return self._cancel(run)
        return _error(404, "Not Found", "no such operation")

    def deliver_due(self, send: Send) -> None:
        """Send every webhook that is due."""
        while self.deliver_next(send):
            pass

    def deliver_next(self, send: Send) -> bool:
        """
        Send one webhook that is due, False if there is none; several threads may do so side by side.

        One that fails is due again 5 s later, and once more 15 s after that. It stays due until its outcome is written,
        so a restart in the middle sends it twice rather than never.
        """
        run = self._next_due()
        if run is None:
            return False
        try:
            self._deliver(run, send)
        finally:
            self._under_way.discard(run.id)
        return True

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def find(self, run_id: str) -> Run | None:
        """A run by its id."""
        rows = self._execute(f"{SELECT} WHERE id = ?", run_id)
        return _run(rows[0]) if rows else None

    def inputs(self) -> list[dict[str, Any]]:
        """Every input that was ever accepted, oldest first; for tests."""
        return [json.loads(row[0]) for row in self._execute("SELECT input FROM runs ORDER BY created_at, rowid")]

    def _execute(self, sql: str, *params: object) -> list[Any]:
        with self._lock:
            return self._connection.execute(sql, params).fetchall()

    def _known(self, endpoint_id: str) -> list[Run]:
        """The runs that are not forgotten."""
        runs = map(_run, self._execute(f"{SELECT} WHERE endpoint_id = ?", endpoint_id))
        return [run for run in runs if self._clock() < run.gone_at]

    def _health(self, endpoint_id: str) -> Answer:
        workers = self._workers.get(endpoint_id)
        return json_answer(200, health(self._known(endpoint_id), self._clock(), workers))

    def _simulate_health(self, endpoint_id: str, body: bytes) -> Answer:
        wish = _object(body)
        if wrong := health_fault(wish):
            return _error(400, "Bad Request", f"bad request: {wrong}")
        if wish["workers"] is None:
            self._workers.pop(endpoint_id, None)
        else:
            self._workers[endpoint_id] = wish["workers"]
        (self._hold if wish.get("hold") else self._release)(endpoint_id)
        return self._health(endpoint_id)

    def _hold(self, endpoint_id: str) -> None:
        self._held.add(endpoint_id)
        self._put_off(self._known(endpoint_id), math.inf)

    def _release(self, endpoint_id: str) -> None:
        self._held.discard(endpoint_id)
        self._put_off([run for run in self._known(endpoint_id) if run.not_before == math.inf], self._clock())

    def _put_off(self, runs: list[Run], at: float) -> None:
        """Have those that still wait begin then at the earliest."""
        for run in runs:
            if run.status(self._clock()) == "IN_QUEUE":
                later = replace(run, not_before=at)
                self._execute(
                    "UPDATE runs SET not_before = ?, deliver_at = ? WHERE id = ?", at, later.reports_at, run.id
                )

    def _accept(self, endpoint_id: str, body: bytes) -> Answer:
        if len(body) > MAX_BODY_BYTES:
            return _error(400, "Bad Request", "bad request: body: exceeded max body size of 10MiB")
        order = _object(body)
        # The real words for a policy out of bounds are not documented, nor is that it is 400.
        if wrong := fault(order):
            return _error(400, "Bad Request", f"bad request: {wrong}")
        policy = order.get("policy") or {}
        run = Run(
            id=f"{uuid.uuid4()}-u1",
            endpoint_id=endpoint_id,
            input=order["input"],
            created_at=self._clock(),
            webhook=order.get("webhook"),
            execution_timeout_ms=policy.get("executionTimeout"),
            ttl_ms=policy.get("ttl"),
            not_before=math.inf if endpoint_id in self._held else None,
        )
        self.insert(run)
        return json_answer(200, {"id": run.id, "status": "IN_QUEUE"})

    @contextlib.contextmanager
    def all_at_once(self) -> Iterator[None]:
        """Have the runs that are inserted meanwhile written together; nobody else may use the cloud meanwhile."""
        self._execute("BEGIN")
        yield
        self._execute("COMMIT")

    def insert(self, run: Run) -> None:
        """Put a run into the table, as /run does."""
        self._execute(
            "INSERT INTO runs (id, endpoint_id, input, created_at, webhook, execution_timeout_ms, ttl_ms, not_before, "
            "deliver_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            run.id,
            run.endpoint_id,
            json.dumps(run.input),
            run.created_at,
            run.webhook,
            run.execution_timeout_ms,
            run.ttl_ms,
            run.not_before,
            run.reports_at,
        )

    def _cancel(self, run: Run) -> Answer:
        # What the real one answers for a run that is over is not documented; here it is the run's status, unchanged.
        if self._clock() < run.ends_at:
            self._execute(
                "UPDATE runs SET cancelled_at = coalesce(cancelled_at, ?), deliver_at = NULL WHERE id = ?",
                self._clock(),
                run.id,
            )
        found = self.find(run.id)
        assert found is not None
        return json_answer(200, {"id": run.id, "status": self._status(found)["status"]})

    def _next_due(self) -> Run | None:
        """A run whose webhook is due and that no other thread has; it is this thread's until it is discarded."""
        with self._lock:
            found = self._connection.execute(
                f"{SELECT} WHERE deliver_at <= ? ORDER BY deliver_at LIMIT ?",
                (self._clock(), len(self._under_way) + 1),
            ).fetchall()
            free = next((row for row in found if row[0] not in self._under_way), None)
            if free is not None:
                self._under_way.add(free[0])
        return None if free is None else _run(free)

    def _deliver(self, run: Run, send: Send) -> None:
        body = {**self._status(run), "input": run.input, "webhook": run.webhook}
        try:
            delivered = (
                200 <= send(run.webhook or "", WEBHOOK_HEADERS, json.dumps(body, ensure_ascii=False).encode()) < 300
            )
        except (OSError, ValueError):  # no answer, or no URL
            delivered = False
        again = None if delivered or run.tries >= len(RETRY_AFTER) else self._clock() + RETRY_AFTER[run.tries]
        self._execute("UPDATE runs SET tries = ?, deliver_at = ? WHERE id = ?", run.tries + 1, again, run.id)

    def _status(self, run: Run) -> dict[str, Any]:
        now = self._clock()
        status = run.status(now)
        answer: dict[str, Any] = {"id": run.id, "status": status}
        if status in ("CANCELLED", "IN_QUEUE"):
            return answer
        answer["delayTime"] = int((run.starts_at - run.created_at) * 1000)
        answer["executionTime"] = int((min(now, run.ends_at) - run.starts_at) * 1000)
        if now < run.ends_at:
            progress = run.progress(now)
            return answer if progress is None else {**answer, "output": {"progress": progress}}
        return {**answer, "workerId": "local-worker", **self._end(run)}

    def _end(self, run: Run) -> dict[str, Any]:
        """How it ended, and what a worker left: an error, or an output, or neither."""
        status, error = run.outcome
        if status != "COMPLETED":
            return {"status": status, "error": error}
        try:
            output = self.worker.output(run)
        except NotLoaded as failure:
            self._execute("UPDATE runs SET error = ? WHERE id = ?", str(failure), run.id)
            return {"status": "FAILED", "error": str(failure)}
        return {"status": status} if output is None else {"status": status, "output": output}


class Results:
    """Where a worker with a bucket of its own puts its pictures."""

    def __init__(self, runpod: Runpod) -> None:
        self._runpod = runpod

    def handle(self, request: Request) -> Answer:
        """Answer one download."""
        if "authorization" in request.headers:  # a key must never travel to a stranger's host
            return Answer(400, b"unexpected Authorization header")
        run = self._runpod.find(request.path.removeprefix("/results/").removesuffix(".png"))
        if run is None:
            return Answer(404, b"no such result")
        try:
            return Answer(200, self._runpod.worker.picture(run), {"Content-Type": "application/octet-stream"})
        except NotLoaded:
            return Answer(404, b"no such result")


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object that was sent, an empty one for anything else."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error(status: int, title: str, detail: str) -> Answer:
    return json_answer(status, {"status": status, "title": title, "detail": detail})


def _run(row: tuple[Any, ...]) -> Run:
    fields = dict(zip(FIELDS, row, strict=True))
    return Run(**{**fields, "input": json.loads(fields["input"])})
