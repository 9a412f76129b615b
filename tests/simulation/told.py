"""What must hold of callbacks: that every end is written down once, and told as it was, signed, until it is heard."""

import base64
import hashlib
import hmac
import json
from typing import Any

ENDS = ("done", "error", "cancelled")
AS_IT_WAS = (
    "id",
    "status",
    "error_code",
    "attempt",
    "finished_at",
    "result_r2_key",
)  # of the data and of the row alike
SETTLED = {"due_at", "status", "tries", "claimer", "log"}
TRIES = 8
GONE = 410

Row = dict[str, Any]


class Told:
    """Watches the outbox and what leaves it."""

    def __init__(self, world: Any, invariants: Any) -> None:
        self._world = world
        self._invariants = invariants
        self._check = invariants.check
        self._outbox: dict[tuple[str, int], Row] = {}
        self._sent: dict[str, tuple[str, bytes]] = {}
        self._sending: dict[str, Any] = {}

    # What is sent

    def before_send(self, process: Any, url: str, headers: Any, body: bytes) -> None:
        """A callback leaves a process."""
        message = headers["webhook-id"]
        job_id, _, version = message.removeprefix("msg_").rpartition("_")
        self._check_signature(process, headers, body)
        self._check(self._sent.setdefault(message, (url, body)) == (url, body), f"{message} is another one each time")
        rows = self._world.clouds.execute(
            "SELECT status FROM deliveries WHERE job_id = ? AND version = ?", job_id, int(version)
        )
        asked = self._invariants.asked[job_id]
        self._check(rows or asked["delete"], f"{message} is sent, and is not in the outbox")
        if self._world.faults.max_skew or asked["replay"]:  # a claim is as good as the clocks; a replay ends it
            return
        self._check(not rows or rows[0]["status"] == "pending", f"{message} is sent though it is settled")
        other = self._sending.get(message)
        self._check(other is None or not other.alive, f"{message} is sent twice at once")
        self._sending[message] = process

    def send_over(self, process: Any, headers: Any) -> None:
        """It has been answered, or given up."""
        if self._sending.get(headers["webhook-id"]) is process:
            del self._sending[headers["webhook-id"]]

    def _check_signature(self, process: Any, headers: Any, body: bytes) -> None:
        """As a receiver does it, with each of the secrets."""
        at = int(headers["webhook-timestamp"])
        now = process.service.clock.now().timestamp()
        self._check(abs(at - now) <= 1.0, f"a callback of another time: {at}")
        signed = f"{headers['webhook-id']}.{at}.".encode() + body
        for secret in self._world.config.callback_secrets:
            key = base64.b64decode(secret.removeprefix("whsec_"))
            signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
            self._check(f"v1,{signature}" in headers["webhook-signature"].split(), "a callback is not signed")

    # What is written down

    def after_write(self, jobs: dict[str, Row]) -> None:
        """Compare the outbox with what it was, and with the jobs."""
        if not self._outbox and not any(job["callback_url"] for job in jobs.values()):
            return
        outbox = {(row["job_id"], row["version"]): row for row in self._read()}
        for job_id, job in jobs.items():
            if job["callback_url"] and job["deleted_at"] is None:
                ended, told = job["status"] in ENDS, (job_id, job["version"]) in outbox
                words = "is not in the outbox" if ended else "is in the outbox though it is live"
                self._check(ended == told, f"{job_id}: version {job['version']} {words}")
        for name, row in outbox.items():
            old = self._outbox.get(name)
            if old is None:
                self._check_new(row, jobs.get(name[0]))
            elif old != row:
                self._compare(f"delivery {name}", old, row)
        for job_id, version in self._outbox.keys() - outbox.keys():
            self._check(job_id not in jobs, f"{job_id}: version {version} is gone from the outbox")
        self._outbox = outbox

    def _read(self) -> list[Row]:
        rows: list[Row] = self._world.clouds.execute("SELECT * FROM deliveries")
        return rows

    def _check_new(self, row: Row, job: Row | None) -> None:
        name = f"delivery {row['job_id']}, {row['version']}"
        self._check(job and job["version"] == row["version"], f"{name}: there is no such version")
        assert job is not None
        data = json.loads(row["data"])
        self._check((row["url"], row["type"]) == (job["callback_url"], f"job.{job['status']}"), f"{name}: is not its")
        for field in AS_IT_WAS:
            self._check(data[field] == job[field], f"{name}: {field} is {data[field]}, and {job[field]} in the row")

    def _compare(self, name: str, old: Row, row: Row) -> None:
        changed = {field for field in row if row[field] != old[field]}
        self._check(changed <= SETTLED, f"{name}: {sorted(changed)} changed")
        self._check((row["due_at"] is None) == (row["status"] != "pending"), f"{name}: {row['status']} and its due_at")
        replayed = self._invariants.asked[row["job_id"]]["replay"] > 0
        if row["claimer"] not in (None, old["claimer"]):
            self._check(row["tries"] == old["tries"] + 1, f"{name} was taken, and the try not counted")
            self._check(row["log"] == old["log"], f"{name} was taken, and settled")
        elif row["log"] != old["log"]:
            self._check(old["claimer"] is not None, f"{name} was settled by who has not taken it")
            self._check(row["tries"] == old["tries"], f"{name} was settled, and its tries changed")
            self._check_settled(name, row)
        else:
            given_back = old["claimer"] is not None and row["tries"] == old["tries"] - 1
            self._check(row["tries"] == old["tries"] or given_back or replayed, f"{name} has lost its tries")
        self._check(old["status"] == "pending" or row["status"] == old["status"] or replayed, f"{name} came back")

    def _check_settled(self, name: str, row: Row) -> None:
        status = json.loads(row["log"])[-1]["status"]
        heard = self._world.clouds.told[f"msg_{row['job_id']}_{row['version']}"]
        self._check(row["status"] != "delivered" or heard, f"{name} is delivered, and nobody has heard it")
        failed = status == GONE or (row["tries"] >= TRIES and row["status"] != "delivered")
        self._check((row["status"] == "failed") == failed, f"{name} is {row['status']} after {row['tries']}, {status}")

    # The end

    def at_end(self, jobs: dict[str, Row]) -> None:
        """Each end of the timelines is in the outbox, and nothing else."""
        for job_id, job in jobs.items():
            if job["callback_url"]:
                ends = {
                    event["version"]
                    for event in self._invariants.events(job_id)
                    if event["event"] in ("done", "failed", "dead_letter", "cancelled")
                }
                written = {version for name, version in self._outbox if name == job_id}
                self._check(ends == written, f"{job_id}: it ended at {sorted(ends)}, and is told of {sorted(written)}")

    def at_rest(self) -> None:
        """When time has gone on for long enough, nothing waits any more."""
        waiting = [row for row in self._read() if row["status"] == "pending"]
        self._check(not waiting, f"still to be told: {waiting[:1]}")
