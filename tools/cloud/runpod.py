"""
RunPod's queue API: runs wait, work and end by the clock, and are forgotten half an hour after their end.

An input may carry `simulate` to have another run than the usual one: {"queue_seconds", "run_seconds", "status",
"error", "shape": "base64" | "data_url" | "link" | "none", "output": what the worker returns, instead of a picture}.
"""

import base64
import json
import sqlite3
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.cloud import Account, Answer, Request, json_answer
from tools.cloud.render import draw

QUEUE_SECONDS = 1.0
RUN_SECONDS = 3.0
KEPT_SECONDS = 1800.0
MAX_BODY_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class Run:
    """One run as it was sent."""

    id: str
    endpoint_id: str
    input: dict[str, Any]
    created_at: float
    cancelled_at: float | None

    @property
    def wish(self) -> dict[str, Any]:
        """What the input asks to be simulated."""
        wish = self.input.get("simulate")
        return wish if isinstance(wish, dict) else {}

    @property
    def starts_at(self) -> float:
        """When a worker takes it."""
        return self.created_at + float(self.wish.get("queue_seconds", QUEUE_SECONDS))

    @property
    def ends_at(self) -> float:
        """When it is finished."""
        return self.starts_at + float(self.wish.get("run_seconds", RUN_SECONDS))


class Runpod:
    """One account with one endpoint."""

    def __init__(self, path: Path, account: Account, *, results_url: str, clock: Callable[[], float]) -> None:
        self._account = account
        self._results_url = results_url
        self._clock = clock
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS runs "
            "(id TEXT PRIMARY KEY, endpoint_id TEXT, input TEXT, created_at REAL, cancelled_at REAL)"
        )

    def handle(self, request: Request) -> Answer:
        """Answer one API call."""
        if request.headers.get("authorization") != f"Bearer {self._account.runpod_api_key}":
            return json_answer(401, {"error": "Unauthorized"})
        endpoint_id, _, operation = request.path.removeprefix("/v2/").partition("/")
        verb, _, run_id = operation.partition("/")
        if endpoint_id != self._account.endpoint_id:
            return _error(404, "Not Found", "endpoint not found")
        if (request.method, verb) == ("POST", "run"):
            return self._accept(endpoint_id, request.body)
        run = self.find(run_id)
        if run is None or run.endpoint_id != endpoint_id or self._clock() > run.ends_at + KEPT_SECONDS:
            return _error(404, "Not Found", "job not found")
        if (request.method, verb) == ("GET", "status"):
            return json_answer(200, self._status(run))
        if (request.method, verb) == ("POST", "cancel"):
            return self._cancel(run)
        return _error(404, "Not Found", "no such operation")

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def find(self, run_id: str) -> Run | None:
        """A run by its id."""
        rows = self._execute("SELECT id, endpoint_id, input, created_at, cancelled_at FROM runs WHERE id = ?", run_id)
        return Run(rows[0][0], rows[0][1], json.loads(rows[0][2]), rows[0][3], rows[0][4]) if rows else None

    def inputs(self) -> list[dict[str, Any]]:
        """Every input that was ever accepted, oldest first; for tests."""
        return [json.loads(row[0]) for row in self._execute("SELECT input FROM runs ORDER BY created_at, rowid")]

    def _execute(self, sql: str, *params: object) -> list[Any]:
        with self._lock:
            return self._connection.execute(sql, params).fetchall()

    def _accept(self, endpoint_id: str, body: bytes) -> Answer:
        if len(body) > MAX_BODY_BYTES:
            return _error(400, "Bad Request", "bad request: body: exceeded max body size of 10MiB")
        try:
            given = json.loads(body)["input"]
        except (ValueError, TypeError, KeyError):
            given = None
        if not isinstance(given, dict):
            return _error(400, "Bad Request", "bad request: input is required and must be an object")
        run_id = f"{uuid.uuid4()}-u1"
        self._execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, NULL)", run_id, endpoint_id, json.dumps(given), self._clock()
        )
        return json_answer(200, {"id": run_id, "status": "IN_QUEUE"})

    def _cancel(self, run: Run) -> Answer:
        if self._clock() < run.ends_at:
            self._execute(
                "UPDATE runs SET cancelled_at = coalesce(cancelled_at, ?) WHERE id = ?", self._clock(), run.id
            )
        found = self.find(run.id)
        assert found is not None
        return json_answer(200, {"id": run.id, "status": self._status(found)["status"]})

    def _status(self, run: Run) -> dict[str, Any]:
        now = self._clock()
        if run.cancelled_at is not None:
            return {"id": run.id, "status": "CANCELLED"}
        if now < run.starts_at:
            return {"id": run.id, "status": "IN_QUEUE"}
        queue_ms = int((run.starts_at - run.created_at) * 1000)
        if now < run.ends_at:
            return {
                "id": run.id,
                "status": "IN_PROGRESS",
                "delayTime": queue_ms,
                "executionTime": int((now - run.starts_at) * 1000),
            }
        end = {
            "id": run.id,
            "delayTime": queue_ms,
            "executionTime": int((run.ends_at - run.starts_at) * 1000),
            "workerId": "local-worker",
        }
        status = run.wish.get("status", "COMPLETED")
        if status != "COMPLETED":
            return {**end, "status": status, "error": run.wish.get("error", "simulated")}
        output = self._output(run)
        return {**end, "status": "COMPLETED", **({} if output is None else {"output": output})}

    def _output(self, run: Run) -> Any:
        if "output" in run.wish:
            return run.wish["output"]
        shape = run.wish.get("shape", "base64")
        if shape == "none":
            return None
        if shape == "link":
            return {"image_url": f"{self._results_url}/{run.id}.png", "cost": 0.02}
        data = base64.b64encode(draw(str(run.input.get("prompt", "")))).decode()
        if shape == "data_url":
            return {"images": [f"data:image/png;base64,{data}"], "seed": 42}
        return {"images": [{"filename": "ComfyUI_00001_.png", "type": "base64", "data": data}]}


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
        return Answer(200, draw(str(run.input.get("prompt", ""))), {"Content-Type": "application/octet-stream"})


def _error(status: int, title: str, detail: str) -> Answer:
    return json_answer(status, {"status": status, "title": title, "detail": detail})
