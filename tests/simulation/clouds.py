"""
The clouds of the simulated world: D1's SQL on SQLite, RunPod as its facts are, two buckets, hosts of links, receivers
of callbacks.
"""

import base64
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.simulation import s3
from tools.cloud import Account, Request
from tools.cloud.d1 import D1
from tools.schema import statements

BASE = "https://sim.test"
LINKS = "https://images.sim.test"
PICTURES = "https://pictures.sim.test"  # callers' own, behind links
RECEIVERS = tuple(f"https://hook-{n}.sim.test/ends" for n in range(3))  # of callbacks
KEPT_SECONDS = 1800.0  # by RunPod, from the end of a run
WEBHOOK = re.compile(r"/webhooks/runpod/([^/]+)/(\d+)/(\w+)$")


def png(text: str) -> bytes:
    """A PNG of one pixel, another one for every text."""
    head = b"\x89PNG\r\n\x1a\n"
    chunks = [
        (b"IHDR", b"\0\0\0\1\0\0\0\1\x08\x02\0\0\0"),
        (b"tEXt", b"t\0" + text.encode()),
        (b"IDAT", zlib.compress(b"\0\0\0\0")),
        (b"IEND", b""),
    ]
    return head + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


@dataclass
class Run:
    """One paid run."""

    id: str
    endpoint: str
    job_id: str
    attempt: int
    webhook: str | None
    created: float
    starts: float
    ends: float
    verdict: str
    shape: str
    ttl: float
    timeout: float
    visible: float
    gone: float = float("inf")
    cancelled: float | None = None
    told_to: Any = None
    completed_told: bool = False
    files: list[bytes] = field(default_factory=list)

    def finish(self) -> float:
        """When it is over."""
        return min(self.ends, self.starts + self.timeout)


class Clouds:
    """All of them; each answers one request with (status, headers, body)."""

    def __init__(self, world: Any) -> None:
        self._world = world
        account = Account()
        self._d1 = D1(Path(":memory:"), account)
        for statement in statements():
            self._d1.execute(statement)
        self._d1_head = {"authorization": f"Bearer {account.api_token}"}
        self.r2 = s3.Bucket()
        self.spool = s3.Bucket()
        self.runs: dict[str, Run] = {}
        self.poison: set[str] = set()
        self.told: Counter[str] = Counter()  # callbacks that were taken, by their webhook-id
        self.execute = self._d1.execute

    def close(self) -> None:
        """Let go of the table."""
        self._d1.close()

    def handle(
        self, service: str, method: str, url: str, headers: Any, body: bytes, process: Any
    ) -> tuple[int, dict[str, str], bytes]:
        """What the call does, and its answer."""
        path = urlsplit(url).path
        if service == "d1":
            before = self._d1.changes
            answer = self._d1.handle(Request("POST", path, "", self._d1_head, body))
            if self._d1.changes != before:
                self._world.invariants.after_write()
            return answer.status, answer.headers, answer.body
        if service == "runpod":
            return self._runpod(method, path, body, process)
        if service == "r2":
            answer_of_r2 = self.r2.handle(method, url, headers, body)
            self._world.invariants.after_r2(method, s3.key_of(url))
            return answer_of_r2
        if service == "spool":
            return self.spool.handle(method, url, headers, body)
        if service == "callback":
            self.told[headers["webhook-id"]] += 1
            return 204, {}, b""
        return _image(png(path) if url.startswith(PICTURES) else self._file(path))

    def put_picture(self, key: str) -> None:
        """A caller puts a picture where it was offered to."""
        self.handle("r2", "PUT", f"https://{s3.R2_HOST}/bucket/{key}", {}, png(key), None)

    # RunPod

    def _runpod(self, method: str, path: str, body: bytes, process: Any) -> tuple[int, dict[str, str], bytes]:
        endpoint, verb, *rest = path.removeprefix("/v2/").split("/")
        if verb == "run":
            return self._accept(endpoint, json.loads(body), process)
        if verb == "health":
            return _json(200, {"workers": {}, "jobs": {}})
        run = self.runs.get(rest[0])
        now = self._world.now
        if run is None or run.endpoint != endpoint:
            return _json(404, {"status": 404, "title": "Not Found", "detail": "job not found"})
        ttl = run.created + run.ttl if run.created + run.ttl < run.finish() else float("inf")
        if now < run.visible or now > min(run.gone, ttl, run.finish() + KEPT_SECONDS):
            return _json(404, {"status": 404, "title": "Not Found", "detail": "job not found"})
        if verb == "cancel":
            if now < run.finish() and run.cancelled is None:
                run.cancelled = now
            return _json(200, {"id": run.id, "status": self.status(run)["status"]})
        status = self.status(run)
        if status["status"] == "COMPLETED":
            run.completed_told = True
        return _json(200, status)

    def _accept(self, endpoint: str, given: dict[str, Any], process: Any) -> tuple[int, dict[str, str], bytes]:
        world = self._world
        found = WEBHOOK.search(given["webhook"])
        job_id, attempt = found[1], int(found[2])
        world.invariants.at_run(job_id, attempt, json.dumps(given["input"]))
        plan = world.faults.run_plan(world.rng, job_id, attempt)
        run = Run(
            id=f"run-{len(self.runs)}-{world.rng.getrandbits(32):08x}-u1",
            endpoint=endpoint,
            job_id=job_id,
            attempt=attempt,
            webhook=given["webhook"],
            created=world.now,
            starts=world.now + plan.queue_seconds,
            ends=world.now + plan.queue_seconds + plan.run_seconds,
            verdict=plan.verdict,
            shape=plan.shape,
            ttl=given["policy"]["ttl"] / 1000,
            timeout=given["policy"]["executionTimeout"] / 1000,
            visible=world.now + plan.hidden_seconds,
            told_to=process,
        )
        if plan.lost_after is not None:
            run.gone = world.now + plan.lost_after
        if plan.cancelled_after is not None:
            run.cancelled = min(world.now + plan.cancelled_after, run.finish())
        run.files = [png(f"{run.id}/{n}") for n in range(plan.files)]
        self.runs[run.id] = run
        if plan.webhook and run.verdict in ("COMPLETED", "FAILED") and run.finish() < float("inf"):
            world.faults.send_webhooks(world, run)
        return _json(200, {"id": run.id, "status": "IN_QUEUE"})

    def status(self, run: Run) -> dict[str, Any]:
        """What /status says now."""
        now = self._world.now
        end = run.finish()
        if run.cancelled is not None and now >= run.cancelled:
            return {"id": run.id, "status": "CANCELLED"}
        if now < run.starts:
            return {"id": run.id, "status": "IN_QUEUE"}
        times = {"delayTime": int((run.starts - run.created) * 1000)}
        if now < end:
            return {"id": run.id, "status": "IN_PROGRESS", **times, "executionTime": int((now - run.starts) * 1000)}
        said = {"id": run.id, **times, "executionTime": int((end - run.starts) * 1000)}
        if end < run.ends:
            return {**said, "status": "FAILED", "error": "executionTimeout exceeded"}
        if self._world.faults.says_in_progress(run):
            return {**said, "status": "IN_PROGRESS", "output": {"progress": "9/10"}}
        if run.verdict != "COMPLETED":
            return {**said, "status": run.verdict, "error": "simulated"}
        output = self._output(run)
        return {**said, "status": "COMPLETED", **({} if output is None else {"output": output})}

    def _output(self, run: Run) -> Any:
        match run.shape:
            case "base64":
                return {"images": [{"type": "base64", "data": base64.b64encode(file).decode()} for file in run.files]}
            case "link":
                return {"images": [f"{LINKS}/{run.id}/{n}.png" for n in range(len(run.files))]}
            case "no_images":
                return {"status": "success_no_images", "images": []}
        return None

    def _file(self, path: str) -> bytes:
        _, run_id, name = path.split("/")
        return self.runs[run_id].files[int(name.partition(".")[0])]


def _image(file: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(file)), "Content-Type": "image/png"}, file


def _json(status: int, body: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(body).encode()
