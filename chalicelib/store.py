"""The jobs table as the pipeline sees it: create, claim, save and read, each in one D1 call."""

import json
from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

from chalicelib import breaker, log
from chalicelib.d1 import D1, Row, Statement
from chalicelib.jobs import Change, Job, State, to_text
from chalicelib.models import Models
from chalicelib.moves import PROGRESS
from chalicelib.queries import bind
from chalicelib.records import dataclass

# After how many seconds a run is looked at again that has taken less than a minute, or less than two, and so on: a
# quarter of its time or sooner, where RunPod tells us of its end; else in every round. Each is a little under the grid
# of 15 s, for a round may begin sooner than that after the last.
IN_THE_NEXT_ROUND = 12
POLL_AGAIN_WITH_WEBHOOKS = (IN_THE_NEXT_ROUND, IN_THE_NEXT_ROUND, 27, 42, 57)
POLL_AGAIN = (IN_THE_NEXT_ROUND,)
SCHEMA_CHANGE = 6  # the last of the numbered changes to the schema that the queries need
LOW_AHEAD = 8  # runs that wait for a worker, from which on jobs of low priority wait here
LOW_WAIT = timedelta(minutes=10)  # for which they do; then they are like any other
MEASURES = ("measure", "measure_spool", "measure_waiting")
SUBMITS = ("forget_old_faults", "claim_probes", "mark_probes", "claim_submits")
FAULTS_KEPT = timedelta(hours=1)  # after a pause in which no job wanted to be sent there
LINE = {"job_id", "event", "attempt"}  # of a timeline, as it comes back from what has written it
UPLOADS_LEFT_FOR = timedelta(minutes=15)  # after the last job that used them; longer than one may still be put


def new_nonce(rng: Random) -> str:
    """A name for one batch, the same for all its tries, that no other batch has."""
    return f"{rng.getrandbits(128):032x}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one claim may take."""

    submits: int
    submit_bytes: int = 4_000_000  # of prompt and input, which the claim's answer carries
    polls: int = 2_500
    stores: int = 200


@dataclass(frozen=True, kw_only=True)
class Measured:
    """
    What there is of everything that is not done: metrics by their names, and the endpoints at which runs wait for a
    worker, each with the seconds that the first of them does.
    """

    metrics: dict[str, float]
    waiting: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """
    What a claim has taken, oldest first; one result whose holders have ended without a word, which is left for
    claim_suspect(); whether there is any job that is not final; and how much of all, where that was asked.
    """

    jobs: list[Job]
    suspect: Job | None
    any_live: bool
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """
    What the tables say of how the service does: D1's clock in seconds, signs of the rounds, endpoints that are paused,
    and jobs that failed by code.
    """

    now: float
    schema_change: int | None
    dead_letters: int
    rounds: dict[str, int]
    paused: list[Row]
    failures: list[Row]


CALLS_KEPT_FOR_SAVES = 20  # with fewer left no run is sent: what comes of it must be saved
CALLS_KEPT_FROM_WEBHOOKS = 300  # of D1's 1,200; with fewer left RunPod's callbacks leave the work to the rounds
SUSPECT = 3  # claims of a result without a save, from which on it is stored alone


class Store:
    """The table; every method is one D1 call of at most `timeout` seconds and raises what D1.query raises."""

    def __init__(
        self,
        *,
        d1: D1,
        models: Models,
        default_endpoint_id: str,
        submit_unknown_wait: float,
        total_deadline: float,
        max_queued: int,
        max_running: int | None,
        has_webhooks: bool,
    ) -> None:
        self._d1 = d1
        self._models = models
        self._endpoint_id = default_endpoint_id
        self._unknown_wait = timedelta(seconds=submit_unknown_wait)
        self._total_deadline = total_deadline
        self.max_queued = max_queued
        self._max_running = max_running
        self._poll_again = POLL_AGAIN_WITH_WEBHOOKS if has_webhooks else POLL_AGAIN

    def _run(
        self, names: list[str], values: dict[str, Any], *, timeout: float, to_the_last: bool = False
    ) -> list[list[Row]]:
        return self._query([bind(name, values) for name in names], timeout, to_the_last=to_the_last)

    def _query(self, statements: list[Statement], timeout: float, *, to_the_last: bool = False) -> list[list[Row]]:
        found = self._d1.query(statements, timeout=timeout, to_the_last=to_the_last)
        for rows in found:
            _log_news(rows)
        return found

    def calls_left(self) -> int | None:
        """D1 calls left before Cloudflare locks the account out; None when not known. Costs no call."""
        return self._d1.calls_left()

    def has_few_calls(self, number: int) -> bool:
        """Whether fewer are left than that, as far as it is known."""
        left = self.calls_left()
        return left is not None and left < number

    def with_intent(self, job: Job, *, now: datetime) -> Job:
        """A new job as it is inserted by a request that will send it at once: the claim is made with the insert."""
        intent = self._intent(now)
        return replace(
            job,
            step=State.SUBMITTING,
            attempt=1,
            intent_version=job.version,
            due_at=intent["unknown_at"],
        )

    def create(self, jobs: list[Job], *, by: str, nonce: str, timeout: float) -> tuple[list[Job], set[str]]:
        """
        Insert all of the jobs, or none; a repeat after a lost answer does nothing more.

        Returns what is there by then, with id and request_hash: the jobs, of which those are at `submitting` that may
        be sent at once, or those that were made under the same idempotency key before; nothing, where the queue has no
        room for them or a picture of theirs is gone. Second come the keys of such pictures.
        """
        uploads = {picture["key"] for job in jobs for picture in job.own_pictures}
        values = {
            "rows": json.dumps([asdict(job) for job in jobs], ensure_ascii=False),
            "ids": json.dumps([job.id for job in jobs]),
            "idempotency_key": jobs[0].idempotency_key,
            "max_queued": self.max_queued,
            "max_running": self._max_running,
            "by": by,
            "nonce": nonce,
            "uploads": json.dumps(sorted(uploads)),
        }
        names = ["create_jobs", "log_created", "file_metadata", "use_uploads", "keep_uploads", "select_uploads"]
        *_, usable, there = self._run([*names, "select_created"], values, timeout=timeout)
        return [Job.from_row(row) for row in there], uploads - {row["key"] for row in usable}

    def made_under(self, key: str, *, timeout: float) -> list[Job]:
        """The jobs that were made under an idempotency key, with id and request_hash, in their order."""
        (rows,) = self._run(["select_created"], {"ids": "[]", "idempotency_key": key, "nonce": None}, timeout=timeout)
        return [Job.from_row(row) for row in rows]

    def claim(
        self,
        *,
        nonce: str,
        now: datetime,
        limits: Limits,
        lease: float,
        ignore_due: bool,
        measure: bool = False,
        timeout: float,
    ) -> Claimed:
        """
        Take what is due; a result is leased for `lease` seconds.

        With `ignore_due` polls that are not due are taken too. Rows of the earlier version are adopted, submits whose
        answer never came go back to be sent again, and those of them that a user has cancelled end. With `measure` it
        says how much there is of everything, too.
        """
        values = {
            "nonce": nonce,
            "now": to_text(now),
            "poll_due": "9999" if ignore_due else to_text(now),
            "poll_again_at": json.dumps([to_text(now + timedelta(seconds=after)) for after in self._poll_again]),
            "usual_seconds": json.dumps(self._models.usual_seconds),
            "lease_until": to_text(now + timedelta(seconds=lease)),
            "low_since": to_text(now - LOW_WAIT),
            "low_ahead": LOW_AHEAD,
            "low_deadline": 2 * LOW_WAIT.total_seconds(),
            "probe_until": breaker.probe_until(now),
            "forgotten_at": to_text(now - FAULTS_KEPT),
            **self._intent(now),
        }
        names = [
            "adopt_old_rows_event",
            "adopt_old_rows",
            "expire_submits_event",
            "expire_submits",
            "cancel_waiting_event",
            "tell_of_waiting",
            "cancel_waiting",
        ]
        statements = [bind(name, values) for name in names]
        for name, limit in (
            ("claim_stores", limits.stores),
            ("claim_polls", limits.polls),
            *((name, limits.submits) for name in SUBMITS if limits.submits),
        ):
            statements.append(bind(name, {**values, "limit": limit, "bytes": limits.submit_bytes, "suspect": SUSPECT}))
        statements.append(bind("log_claimed_submits", values))
        asked = ["select_claimed", "select_suspect", "select_live", *(MEASURES if measure else ())]
        statements += [bind(name, {**values, "suspect": SUSPECT}) for name in asked]
        claimed, suspects, live, *measured = self._query(statements, timeout)[-len(asked) :]
        return Claimed(
            jobs=[Job.from_row(row) for row in claimed],
            suspect=Job.from_row(suspects[0]) if suspects else None,
            any_live=bool(live),
            measured=_measured(*measured) if measured else None,
        )

    def claim_suspect(
        self, suspect: Job, *, nonce: str, now: datetime, lease: float, timeout: float
    ) -> tuple[Job | None, Job | None]:
        """
        Take a result that claim() has left, None where somebody else has it by now; second comes the next one of these.
        """
        values = {
            "id": suspect.id,
            "version": suspect.version,
            "nonce": nonce,
            "now": to_text(now),
            "lease_until": to_text(now + timedelta(seconds=lease)),
            "suspect": SUSPECT,
        }
        names = ["claim_suspect", "select_claimed", "select_suspect"]
        *_, claimed, suspects = self._run(names, values, timeout=timeout)
        return (Job.from_row(claimed[0]) if claimed else None), Job.from_row(suspects[0]) if suspects else None

    def claim_one(
        self, job_id: str | None, *, nonce: str, now: datetime, timeout: float
    ) -> tuple[Job | None, Job | None]:
        """
        Claim the submit of one job, of the oldest that waits where the id is None.

        Returns the claimed job, if it was ours to claim, and the row that the id names, if there is one.
        """
        values = {"id": job_id, "nonce": nonce, "now": to_text(now), **self._intent(now)}
        names = [
            "adopt_old_rows_event",
            "adopt_old_rows",
            "claim_one_submit",
            "log_claimed_submits",
            "select_claimed",
            "select_job",
        ]
        *_, claimed, named = self._run(names, values, timeout=timeout)
        return (Job.from_row(claimed[0]) if claimed else None), (Job.from_row(named[0]) if named else None)

    def _intent(self, now: datetime) -> dict[str, Any]:
        return {
            "endpoint_id": self._endpoint_id,
            "endpoints": json.dumps(self._models.endpoints),
            "max_running": self._max_running,
            "unknown_at": to_text(now + self._unknown_wait),
            "deadline_at": self.deadline_at(now),
        }

    def endpoint_of(self, model: str) -> str:
        """Where a job of this model is sent now; a claim decides it anew."""
        return self._models.get(model).endpoint or self._endpoint_id

    def deadline_at(self, now: datetime, *, model: str = "", deadline: int | None = None) -> str:
        """By when a job must have been drawn that begins now: by its own deadline in seconds, or its model's."""
        seconds = deadline or self._models.get(model).total or self._total_deadline
        return to_text(now + timedelta(seconds=seconds))

    def cancel(self, ids: list[str], *, by: str, nonce: str, now: datetime, timeout: float) -> list[Job]:
        """
        Cancel those jobs that wait, ask for it where RunPod has them or may have them; the rows as they are then.
        """
        values = {"ids": json.dumps(ids), "by": by, "nonce": nonce, "now": to_text(now), **self._intent(now)}
        names = [
            "adopt_old_rows_event",
            "adopt_old_rows",
            "cancel_jobs",
            "log_cancelled",
            "tell_of_cancelled",
            "ask_to_cancel",
            "log_asked_to_cancel",
            "select_jobs",
        ]
        return [Job.from_row(row) for row in self._run(names, values, timeout=timeout)[-1]]

    def ended_before(
        self, before: datetime, *, after: tuple[str, str], limit: int, timeout: float
    ) -> list[tuple[str, str]]:
        """The (created_at, id) of the oldest jobs that ended before then, those after the given; no dead letters."""
        values = {"before": to_text(before), "created_at": after[0], "id": after[1], "limit": limit}
        (rows,) = self._run(["find_ended_before"], values, timeout=timeout)
        return [(row["created_at"], row["id"]) for row in rows]

    def mark_deleted(
        self,
        ids: list[str],
        *,
        statuses: tuple[str, ...],
        dead_too: bool,
        by: str,
        nonce: str,
        now: datetime,
        timeout: float,
    ) -> tuple[list[Job], set[str]]:
        """
        Let no verb touch those jobs any more that have one of the statuses, which are final, and dead letters only if
        they are meant, too. The rows as they are then, and the ids of jobs that were deleted before.
        """
        values = {
            "dead_too": dead_too,
            "ids": json.dumps(ids),
            "statuses": json.dumps(statuses),
            "by": by,
            "nonce": nonce,
            "now": to_text(now),
            "max_running": self._max_running,
        }
        *_, rows, gone = self._run(
            ["mark_deleted", "log_marked", "select_jobs", "select_deleted"], values, timeout=timeout
        )
        return [Job.from_row(row) for row in rows], {row["job_id"] for row in gone}

    def delete(self, ids: list[str], *, by: str, now: datetime, timeout: float) -> None:
        """Remove those of the rows that are marked, and what hangs on them; one line of each timeline stays."""
        values = {"ids": json.dumps(ids), "by": by, "now": to_text(now), "free_at": to_text(now + UPLOADS_LEFT_FOR)}
        names = ["forget_metadata", "forget_timeline", "forget_deliveries", "forget_uploads", "free_uploads"]
        self._run([*names, "log_deleted", "delete_jobs"], values, timeout=timeout)

    def save(self, changes: list[Change], *, nonce: str, now: datetime, timeout: float) -> dict[str, int]:
        """
        Write the changes whose rows are still as they were read; at most one change a job.

        Returns the winners: job id and its new version. A retry with the same nonce gives the same answer. What is no
        move wins nothing.
        """
        further = [change.job for change in changes if change.event == PROGRESS]
        changes = [change for change in changes if change.event != PROGRESS]
        lines = [
            {
                "id": change.job.id,
                "version": None if change.accepted else change.job.version + 1,
                "n": 0,
                "event": change.event,
                "detail": json.dumps(change.detail, ensure_ascii=False),
            }
            for change in changes
        ]
        values = {
            "nonce": nonce,
            "now": to_text(now),
            "accepted": _rows([change.job for change in changes if change.accepted]),
            "guarded": _rows([change.job for change in changes if not change.accepted and not change.by_user]),
            "reopened": _rows([change.job for change in changes if change.by_user]),
            "lines": json.dumps(lines, ensure_ascii=False),
            "further": _rows(further, FURTHER),
        }
        names = ["record_progress", "record_accepted", "save_changes", "reopen"]
        if outcomes := breaker.judge(changes):
            values |= {
                "outcomes": json.dumps(outcomes, ensure_ascii=False),
                "most": json.dumps(breaker.MOST),
                "pauses": breaker.pauses_from(now),
                "run_until": breaker.run_until(now),
            }
            names += ["forget_faults", "await_probes", "count_faults"]
        names += ["log_saved", "tell_of_saved", "select_winners"]
        *_, winners = self._run(names, values, timeout=timeout, to_the_last=True)
        return {row["id"]: row["version"] for row in winners}

    def recorded_runs(self, job_ids: list[str], *, timeout: float) -> dict[str, Job]:
        """Which RunPod run each of these jobs has recorded; a job that is gone is missing."""
        (rows,) = self._run(["select_runpod_ids"], {"ids": json.dumps(job_ids)}, timeout=timeout)
        return {row["id"]: Job.from_row(row) for row in rows}

    def get(self, job_id: str, *, timeout: float) -> Job | None:
        """One job, whole."""
        (rows,) = self._run(["select_job"], {"id": job_id}, timeout=timeout)
        return Job.from_row(rows[0]) if rows else None

    def tables(self, *, timeout: float) -> set[str]:
        """The names of the tables that are there."""
        (rows,) = self._run(["list_tables"], {}, timeout=timeout)
        return {row["name"] for row in rows}

    def survey(
        self, *, now: datetime, overdue: timedelta, forgotten: timedelta, recent: timedelta, timeout: float
    ) -> Survey:
        """What the tables say of how the service does; proves that they may be written, too."""
        values = {
            "before": to_text(now - overdue),
            "long_before": to_text(now - forgotten),
            "since": to_text(now - recent),
        }
        names = ["prove_writing", "read_survey", "read_signs_of_rounds", "select_paused", "count_failures"]
        _, (row,), (rounds,), paused, failures = self._run(names, values, timeout=timeout)
        return Survey(**row, rounds=rounds, paused=paused, failures=failures)


def _log_news(rows: list[Row]) -> None:
    """Log what a statement has done by itself; all rows of one have the same columns."""
    if rows and LINE <= rows[0].keys():
        for row in rows:
            log.happened(row["event"], row["job_id"], attempt=row["attempt"])
    elif rows and "is_news" in rows[0]:
        for row in rows:
            if row["is_news"]:
                log.endpoint(row["endpoint_id"], row["code"], row["sentence"], until=row["paused_until"])


def _measured(jobs: list[Row], spool: list[Row], waiting: list[Row]) -> Measured:
    return Measured(
        metrics={name: value or 0 for row in (*jobs, *spool) for name, value in row.items()},
        waiting={row["endpoint_id"]: row["seconds"] for row in waiting if row["endpoint_id"] and row["seconds"]},
    )


# What save_changes, reopen and record_accepted read of a job; what its caller said is never written again.
NEVER_SAVED = (
    "prompt", "input", "model", "metadata", "priority", "deadline", "idempotency_key", "idempotency_n", "request_hash",
    "endpoint_id", "created_at", "updated_at", "deleted_at", "pictures", "callback_url",
    "ahead", "paused", "held",
)  # fmt: skip
SAVED = tuple(column.name for column in fields(Job) if column.name not in NEVER_SAVED)


# And what record_progress does.
FURTHER = ("id", "runpod_job_id", "progress", "due_at")


def _rows(jobs: list[Job], columns: tuple[str, ...] = SAVED) -> str:
    return json.dumps([{name: getattr(job, name) for name in columns} for job in jobs], ensure_ascii=False)
