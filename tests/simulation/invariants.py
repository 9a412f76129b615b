"""What must hold after every step of a simulated world, and at its end; a Violation says which did not."""

import json
import logging
from collections import Counter, defaultdict
from typing import Any

from chalicelib.jobs import BY_USER, FINAL, TRANSITIONS, Job, State
from tests.simulation import s3
from tests.simulation.pictures import Pictures
from tests.simulation.told import Told

LIVE_MOVES = {
    (source, target) for verb, (sources, target) in TRANSITIONS.items() if verb not in BY_USER for source in sources
}
USER_MOVES = {
    (source, target): verb for verb in BY_USER for source in TRANSITIONS[verb][0] for target in [TRANSITIONS[verb][1]]
}
# Moves that one claim makes together: expire and claim, expire and cancel.
CLAIM_MOVES = {
    (State.SUBMITTING, State.SUBMITTING),
    (State.SUBMITTING, State.CANCELLED),
    (State.SUBMIT, State.CANCELLED),
}
MARKED = {"deleted_at", "version", "writer", "claimer", "updated_at"}  # what a delete changes in a row
UNGUARDED = {"due_at", "claimer", "cancel_at", "deadline_at", "updated_at", "progress"}
SECRETS = (
    "local-cloudflare-token",
    "local-secret-key",
    "local-runpod-key",
    "simulation-webhook-secret",
    "role-secret-4711",
    "c2ltdWxhdGVkLXNlY3JldC",  # how those for callbacks begin
)
DEFINITE = {200, 400, 401, 403, 404, 413, 422, 429}


class Violation(BaseException):
    """Raised when something happened that must never happen; nothing that the service catches."""


class Invariants:
    """Watches one world."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self._rows: dict[str, dict[str, Any]] = {}
        self._lines: dict[str, int] = {}
        self._bought: set[tuple[str, int]] = set()
        self.watching = True  # each write; of very many rows that takes too long
        self._locked: dict[Any, float] = {}
        self._putting: dict[str, Any] = {}
        self._not_before: dict[str, float] = {}
        self.asked: dict[str, Counter[str]] = defaultdict(Counter)  # verbs that users have sent, by job
        self.answers: dict[tuple[str, int], tuple[int, Any]] = {}  # what a process was told of /run
        self.log_handler = _LogCheck(self)
        self._told = Told(world, self)
        self._pictures = Pictures(world, self)
        self.after_r2 = self._pictures.after_r2

    def check(self, holds: object, what: str) -> None:
        """Raise Violation unless it holds."""
        if not holds:
            raise Violation(f"seed {self._world.seed}, {self._world.now:.3f} s: {what}")

    # Each call

    def before_call(self, process: Any, service: str, method: str, url: str, headers: Any, body: bytes) -> None:
        """What a process may not even ask."""
        if service == "callback":
            self._told.before_send(process, url, headers, body)
        if service == "d1":
            self.check(self._world.now >= self._locked.get(process, 0.0), "D1 was called during its lock-out")
        if service == "r2" and method == "PUT":
            other = self._putting.get(url)
            skewed = self._world.faults.max_skew > 0  # a lease is as good as the clocks
            self.check(other is None or not other.alive or skewed, f"two processes put {url} at once")
            self._putting[url] = process

    def after_call(
        self, process: Any, service: str, method: str, url: str, body: bytes, answer: tuple[int, dict[str, str], bytes]
    ) -> None:
        """What a process was told."""
        status, headers, _ = answer
        if service == "d1" and status == 429 and "Retry-After" in headers:
            self._locked[process] = self._world.now + float(headers["Retry-After"]) - 0.01
        if service == "runpod" and url.endswith("/run"):
            job_id, attempt = json.loads(body)["webhook"].split("/")[-3:-1]
            self.answers[job_id, int(attempt)] = (status, process)
            if status == 429 and "Retry-After" in headers:
                self._not_before[job_id] = self._world.now + float(headers["Retry-After"]) - 0.01

    def call_over(self, process: Any, url: str, headers: Any) -> None:
        """A call has ended, with an answer or without."""
        if "webhook-id" in headers:
            self._told.send_over(process, headers)
        if self._putting.get(url) is process:
            del self._putting[url]

    def at_run(self, job_id: str, attempt: int, given: str) -> None:
        """A paid run arrives at RunPod."""
        self._pictures.at_run(job_id, given)
        rows = self._world.clouds.execute("SELECT attempt FROM jobs WHERE id = ?", job_id)
        self.check(rows and rows[0]["attempt"] >= attempt, f"/run of {job_id} without its intent on disk")
        self.check((job_id, attempt) not in self._bought, f"/run of {job_id}, attempt {attempt}, was accepted twice")
        self._bought.add((job_id, attempt))
        if not self._world.faults.max_skew:
            self.check(self._world.now >= self._not_before.get(job_id, 0.0), f"/run of {job_id} before its Retry-After")

    # The table

    def _read(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self._world.clouds.execute("SELECT * FROM jobs")}

    def after_write(self) -> None:
        """Compare the table with what it was."""
        if not self.watching:
            return
        rows = self._read()
        for job_id in self._rows.keys() - rows.keys():
            self._check_deleted(self._rows[job_id])
        lines = {
            line["job_id"]: line["n"]
            for line in self._world.clouds.execute("SELECT job_id, count(*) AS n FROM job_events GROUP BY job_id")
        }
        for job_id, row in rows.items():
            old = self._rows.get(job_id)
            if old is not None:
                self._check_lines(job_id, old, row, lines.get(job_id, 0) - self._lines.get(job_id, 0))
            if old != row and old is not None:
                self._compare(job_id, old, row)
            if old != row and row["status"] == "done" and row["deleted_at"] is None:
                self._check_done(row)
            if old != row and row["runpod_job_id"] and row["step"]:
                self._check_run(row)
        self._told.after_write(rows)
        self._pictures.after_write(rows)
        self._rows, self._lines = rows, lines

    def _check_lines(self, job_id: str, old: dict[str, Any], row: dict[str, Any], new: int) -> None:
        """A line of the timeline comes only with the move that it tells of."""
        asked = old["cancel_at"] is None and row["cancel_at"] is not None and row["step"] is not None
        held = row["holds"] == old["holds"] + 1
        allowed = (0 if held else row["version"] - old["version"]) + asked
        self.check(new <= allowed, f"{job_id}: its timeline has {new} new lines for {allowed} moves")

    def _check_run(self, row: dict[str, Any]) -> None:
        run = self._world.clouds.runs.get(row["runpod_job_id"])
        mine = run and (run.job_id, run.attempt) == (row["id"], row["attempt"])
        self.check(mine, f"{row['id']}, attempt {row['attempt']}, holds a run of another: {row['runpod_job_id']}")

    def _compare(self, job_id: str, old: dict[str, Any], row: dict[str, Any]) -> None:
        before, after = Job.from_row(old).state, Job.from_row(row).state
        changed = {name for name in row if row[name] != old[name]}
        self.check(not old["deleted_at"] or row["deleted_at"], f"{job_id} came back from being deleted")
        self.check(not old["deleted_at"] or after in FINAL, f"{job_id} went on to {after} while it was deleted")
        if before in FINAL:
            self._check_reopened(job_id, before, after, changed)
        elif old["step"] is not None:
            legal = before is after or (before, after) in LIVE_MOVES | CLAIM_MOVES
            self.check(legal, f"{job_id} went from {before} to {after}")
        guarded = changed - UNGUARDED
        self.check(not guarded or row["version"] > old["version"], f"{job_id}: {guarded} changed, the version did not")
        self.check(row["version"] >= old["version"], f"{job_id}: its version went back")
        if after is State.CANCELLED and before is not after:
            self.check(self.asked[job_id]["cancel"], f"{job_id} was cancelled by nobody")
        held = before is after is State.STORE and row["holds"] == old["holds"] + 1
        if row["version"] > old["version"] and not held and old["step"] is not None:
            self._check_event(job_id, row["version"])
        if after is State.SUBMITTING and row["intent_version"] != old["intent_version"]:
            self.answers.pop((job_id, row["attempt"]), None)
        if row["attempt"] > old["attempt"] and row["attempt"] > 1:
            self._check_attempt(job_id, row["attempt"])

    def _check_deleted(self, row: dict[str, Any]) -> None:
        """A row goes last, and by a user."""
        self.check(self.asked[row["id"]]["delete"], f"{row['id']} is gone, and nobody has deleted it")
        self.check(row["deleted_at"] and Job.from_row(row).state in FINAL, f"{row['id']} went from {row['status']}")
        left = [key for key in self._world.clouds.r2.objects if f"/{row['id']}/" in key]
        self.check(not left, f"{row['id']} is gone, and {left} are left of it")

    def _check_reopened(self, job_id: str, before: State, after: State, changed: set[str]) -> None:
        asked = self.asked[job_id]
        if "deleted_at" in changed and before is after:
            self.check(asked["delete"] and changed <= MARKED, f"{job_id}: {sorted(changed)} changed by a delete")
            return
        verb = USER_MOVES.get((before, after))
        self.check(verb and asked[verb] > 0, f"{job_id} was {before}, and {sorted(changed)} changed without a user")
        if verb:
            asked[verb] -= 1
            self._not_before.pop(job_id, None)  # a user may want it sooner than RunPod said

    def events(self, job_id: str) -> list[dict[str, Any]]:
        lines = self._world.clouds.execute(
            "SELECT version, n, at, event, detail FROM job_events WHERE job_id = ? ORDER BY version, n", job_id
        )
        return [{**line, **json.loads(line["detail"])} for line in lines]

    def _check_event(self, job_id: str, version: int) -> None:
        found = self._world.clouds.execute(
            "SELECT 1 FROM job_events WHERE job_id = ? AND version = ? AND n = 0", job_id, version
        )
        self.check(found, f"{job_id}: nothing in its timeline says how it came to version {version}")

    def _check_attempt(self, job_id: str, attempt: int) -> None:
        """A second run is bought only after an unknown answer, a retryable failure, or by a user."""
        why = ("possible_duplicate", "attempt_lost", "retried")
        reasons = [e for e in self.events(job_id) if e["event"] in why and e["attempt"] == attempt - 1]
        self.check(reasons, f"{job_id}: attempt {attempt} has no reason in its timeline")

    def _check_done(self, row: dict[str, Any]) -> None:
        files = json.loads(row["outputs"] or "[]")
        self.check(files and row["result_r2_key"] == files[0]["key"], f"{row['id']} is done without a picture")
        run = self._world.clouds.runs.get(row["runpod_job_id"])
        for file in files:
            content, _ = self._world.clouds.r2.objects.get(file["key"], (b"", ""))
            self.check(
                len(content) == file["bytes"] and s3.sha256_of(content) == file["sha256"],
                f"{row['id']} is done, and {file['key']} is not in R2 as recorded",
            )
            self.check(run and content in run.files, f"{row['id']} has a picture of another run")

    # The end

    def at_end(self) -> None:
        """What must hold when the faults are long over."""
        rows = self._read()
        for job_id, row in rows.items():
            state = Job.from_row(row).state
            self.check(
                state in FINAL, f"{job_id} never ended: {state}, due {row['due_at']}, deadline {row['deadline_at']}"
            )
            self._check_timeline(job_id, row)
            self.check(row["dead_at"] is None or self._has_excuse(), f"{job_id}: lost {row['error_code']} without need")
        self._told.at_end(rows)
        self._check_orphans(rows)
        self._check_secrets()

    def at_rest(self) -> None:
        """What must hold when more than a day has gone by."""
        self._told.at_rest()
        self._pictures.at_rest(self._read())

    def _has_excuse(self) -> bool:
        """Whether a drawn picture may be a dead letter: R2 was down for too long, or its holders died, or none came."""
        faults, spool = self._world.faults, self._world.config.spool_bucket
        deaths = ("poison_job", "crash_before_effect", "crash_after_effect", "lambda_time_limit")
        r2_was_down = faults.counted["r2_down"] and (not spool or faults.counted["spool_down"])
        nobody_came = any(kind == "no_schedule" for kind, _, _ in faults.windows)
        return bool(r2_was_down or nobody_came or any(faults.counted[name] for name in deaths) or not faults.rates)

    def _check_timeline(self, job_id: str, row: dict[str, Any]) -> None:
        events = self.events(job_id)
        runs = self._world.clouds.runs
        done = [event for event in events if event["event"] == "done"]
        self.check(len(done) == (row["status"] == "done"), f"{job_id}: {len(done)} results are recorded")
        last = {"done": ("done",), "error": ("failed", "dead_letter"), "cancelled": ("cancelled",)}[row["status"]]
        own = [event for event in events if event["n"] == 0 and event["event"] != "deleting"]
        self.check(own[-1]["event"] in last, f"{job_id} is {row['status']}, and its last event is {own[-1]['event']}")
        self.check((row["dead_at"] is not None) == (own[-1]["event"] == "dead_letter"), f"{job_id}: dead_at is wrong")
        for event in events:
            if event["event"] == "submitted":
                run = runs.get(event["runpod_job_id"])
                self.check(
                    run and (run.job_id, run.attempt) == (job_id, event["attempt"]),
                    f"{job_id}: a false submitted event",
                )
            if event["event"] == "possible_duplicate":
                self._check_doubt(job_id, event, events)

    def _check_doubt(self, job_id: str, event: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Whoever was told for certain, lived and could write it down must not leave the job in doubt."""
        known = [e for e in events if e["event"] == "submitted" and e["attempt"] == event["attempt"]]
        self.check(
            not [e for e in known if e["version"] < event["version"]], f"{job_id}: a false possible_duplicate event"
        )
        status, process = self.answers.get((job_id, event["attempt"]), (0, None))
        calm = not any(
            self._world.faults.counted[name] for name in ("d1_stall", "d1_lockout", "d1_answer_lost", "d1_5xx")
        )
        told = status in DEFINITE and process is not None and process.alive
        self.check(not (told and calm), f"{job_id}: in doubt though a living process knew ({status})")

    def _check_orphans(self, rows: dict[str, dict[str, Any]]) -> None:
        """A run that a living process knows of, and no row names, is cancelled at RunPod or over."""
        named = {
            event["runpod_job_id"] for job_id in rows for event in self.events(job_id) if event["event"] == "submitted"
        }
        for run in self._world.clouds.runs.values():
            status, process = self.answers.get((run.job_id, run.attempt), (0, None))
            told = (
                status == 200 and process is not None and process.alive and not process.service.pipeline.saver.backlog
            )
            over = run.cancelled is not None or run.finish() < self._world.now
            told = told and run.job_id in rows  # or it was deleted, with all that named its runs
            self.check(run.id in named or not told or over, f"{run.id} of {run.job_id} goes on, and no row names it")

    def _check_secrets(self) -> None:
        for table in ("jobs", "job_events", "deliveries", "uploads"):
            text = json.dumps(self._world.clouds.execute(f"SELECT * FROM {table}"))
            self.check(not any(secret in text for secret in SECRETS), f"a secret is in {table}")


class _LogCheck(logging.Handler):
    """Reads every line that is logged: no secret, and no crash of ours."""

    def __init__(self, invariants: Invariants) -> None:
        super().__init__()
        self._invariants = invariants
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.getMessage()} {getattr(record, 'fields', {})}"
        if any(secret in text for secret in SECRETS):
            self.found.append(f"a secret is in the log: {record.getMessage()}")
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            self.found.append(f"the code crashed: {trace}")

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)  # no lock: a greenlet that is left behind must not hold one
        return True
