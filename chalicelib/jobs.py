"""
The job and its life: pure functions, no clock, no wire.

    submit ──claim──▶ submitting ──accept──▶ poll ──complete──▶ store ──finish──▶ done

and off that road:

    submit      accept ▶ poll (the answer came late)
    submitting  give_back, expire ▶ submit · doubt ▶ submitting · fail ▶ error
    poll        observe ▶ poll · rerun ▶ submit · fail ▶ error · confirm_cancel ▶ cancelled
    store       hold, put_back ▶ store · fail, bury ▶ error

and by a user alone:

    submit      cancel ▶ cancelled
    error       retry ▶ submit · redrive ▶ store
    cancelled   retry ▶ submit

`status` is what people see, `step` what the pipeline does next. A verb takes a job and returns the Change to save.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from random import Random
from typing import Any

from chalicelib import retry
from chalicelib.errors import IllegalTransition, ServiceError


class Status(StrEnum):
    """What people see."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"


class State(StrEnum):
    """Where a job stands: its step while it is live, its status once it is final."""

    SUBMIT = "submit"
    SUBMITTING = "submitting"
    POLL = "poll"
    STORE = "store"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"


STATUS_OF = {
    State.SUBMIT: Status.QUEUED,
    State.SUBMITTING: Status.QUEUED,
    State.POLL: Status.RUNNING,
    State.STORE: Status.RUNNING,
    State.DONE: Status.DONE,
    State.ERROR: Status.ERROR,
    State.CANCELLED: Status.CANCELLED,
}

# Every move there is. Those made by queries.sql have their arrow repeated there in a comment.
TRANSITIONS: Mapping[str, tuple[frozenset[State], State]] = {
    "claim": (frozenset({State.SUBMIT}), State.SUBMITTING),
    "expire": (frozenset({State.SUBMITTING}), State.SUBMIT),
    "accept": (frozenset({State.SUBMIT, State.SUBMITTING}), State.POLL),
    "doubt": (frozenset({State.SUBMITTING}), State.SUBMITTING),
    "give_back": (frozenset({State.SUBMITTING}), State.SUBMIT),
    "observe": (frozenset({State.POLL}), State.POLL),
    "complete": (frozenset({State.POLL}), State.STORE),
    "rerun": (frozenset({State.POLL}), State.SUBMIT),
    "hold": (frozenset({State.STORE}), State.STORE),
    "put_back": (frozenset({State.STORE}), State.STORE),
    "finish": (frozenset({State.STORE}), State.DONE),
    "fail": (frozenset({State.SUBMITTING, State.POLL, State.STORE}), State.ERROR),
    "bury": (frozenset({State.STORE}), State.ERROR),
    "confirm_cancel": (frozenset({State.POLL}), State.CANCELLED),
    "cancel": (frozenset({State.SUBMIT}), State.CANCELLED),
    "retry": (frozenset({State.ERROR, State.CANCELLED}), State.SUBMIT),
    "redrive": (frozenset({State.ERROR}), State.STORE),
}
BY_USER = frozenset({"cancel", "retry", "redrive"})

FINAL = frozenset(State) - {
    state for verb, (sources, _) in TRANSITIONS.items() if verb not in BY_USER for state in sources
}

DEFAULT_MODEL = "qwen-image"
IN_QUEUE = "IN_QUEUE"  # what RunPod says before a worker has begun

RUNPOD_KEEPS = timedelta(minutes=30)  # a result, from the end of its run
SAFE_FOR = timedelta(days=1)  # that a result is tried which lies in the spool or behind the worker's links
NEVER = datetime(9998, 1, 1, tzinfo=UTC)

MAX_WARNINGS = 10  # of a result
MAX_LINKS_CHARS = 100_000  # of the links of one result that are kept
MAX_ERROR_CHARS = 2_000  # of error_message; a worker's traceback would fill the list that a page loads


def to_text(moment: datetime) -> str:
    """A moment as the table has it: ISO-8601, UTC, milliseconds, Z; sorts as time does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def from_text(text: str) -> datetime:
    """A moment from the table; SQLite's own `YYYY-MM-DD HH:MM:SS` (UTC) is understood too. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


File = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of `jobs`; columns that a query did not select have their default."""

    id: str
    runpod_job_id: str | None = None
    status: str = Status.QUEUED
    prompt: str = ""
    model: str = DEFAULT_MODEL
    result_r2_key: str | None = None
    result_url: str | None = None
    finished_at: str | None = None
    error_message: str | None = None
    created_at: str = ""
    updated_at: str = ""
    step: str | None = None
    input: str | None = None
    endpoint_id: str | None = None
    version: int = 0
    attempt: int = 0
    failures: int = 0
    holds: int = 0
    attempt_base: int = 0
    due_at: str = ""
    intent_version: int | None = None
    runpod_status: str | None = None
    outputs: str | None = None
    links: str | None = None
    warnings: str | None = None
    error_code: str | None = None
    dead_at: str | None = None
    cancel_at: str | None = None
    submitted_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    result_until: str | None = None
    deadline_at: str | None = None
    queue_ms: int | None = None
    execution_ms: int | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Job":
        """A job from a row of any query on `jobs`; NULL in a column that has no None is its default."""
        known = {column.name for column in fields(cls)}
        return cls(**{name: value for name, value in row.items() if name in known and value is not None})

    @property
    def state(self) -> State:
        """The step while live, else the status; a row of the earlier version has no step and stands where it looks."""
        if self.status not in (Status.QUEUED, Status.RUNNING):
            return State(self.status)
        if self.step:
            return State(self.step)
        if self.runpod_job_id:
            return State.POLL
        return State.SUBMIT if self.status == Status.QUEUED else State.SUBMITTING

    @cached_property
    def kept(self) -> list[File]:
        """The files of the result that are in R2 or, marked as `spooled`, in the spool."""
        kept: list[File] = json.loads(self.outputs) if self.outputs else []
        return kept

    @property
    def files(self) -> list[File]:
        """Those in R2: key, url, content_type, bytes, sha256, width, height."""
        return [file for file in self.kept if not file.get("spooled")]

    @property
    def spooled(self) -> list[File]:
        """Those that are still to be put into R2, from the spool."""
        return [file for file in self.kept if file.get("spooled")]

    @property
    def left(self) -> str:
        """What the rest of the result can be had from without a new run: the spool, the worker's links, or RunPod."""
        if self.warnings is not None:
            return "spool"
        # A file that stands in the answer itself has no link, and has to be kept already.
        places = json.loads(self.links) if self.links else [None]
        stems = {stem_of(file["key"]) for file in self.kept}
        missing = [url for number, url in enumerate(places, start=1) if result_stem(self, number) not in stems]
        return "links" if None not in missing else "runpod"

    @property
    def payload(self) -> dict[str, Any]:
        """The `input` object that RunPod gets: the caller's own as it was given, or the default one."""
        if self.input is not None:
            payload: dict[str, Any] = json.loads(self.input)
            return payload
        return {"prompt": self.prompt, "model": self.model, "jobId": self.id}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one save writes: the job as it shall be, with the version that was read, and one line of its timeline."""

    job: Job
    before: Job
    event: str
    detail: dict[str, Any] = field(default_factory=dict)
    error: ServiceError | None = None
    accepted: bool = False  # a fact about an attempt: guarded by the attempt and a NULL RunPod id, not by the version
    by_user: bool = False  # the only kind that may touch a final row


def new(
    *,
    job_id: str,
    prompt: str,
    model: str,
    payload: dict[str, Any] | None,
    deadline_at: str | None = None,
    now: datetime,
) -> Job:
    """A job that waits to be submitted."""
    created_at = to_text(now)
    own_input = None if payload is None else json.dumps(payload, ensure_ascii=False)
    return Job(
        id=job_id,
        prompt=prompt,
        model=model,
        input=own_input,
        step=State.SUBMIT,
        version=1,
        due_at=created_at,
        deadline_at=deadline_at,
        created_at=created_at,
        updated_at=created_at,
    )


def payload_from(given: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The caller's `input`, with the prompt added only where it has neither `prompt` nor `workflow`."""
    if not prompt or "prompt" in given or "workflow" in given:
        return dict(given)
    return {**given, "prompt": prompt}


def result_stem(job: Job, number: int) -> str:
    """
    The R2 key of one file of a job's result, but for its ending.

    A function of the row and the file's place in the answer alone, so that every repeat of an upload hits the same one.
    An attempt after the first has a folder of its own, so that a late upload cannot overwrite a newer picture.
    """
    folder = job.id if job.attempt <= 1 else f"{job.id}/{job.attempt}"
    name = "output" if number == 1 else f"output-{number}"
    return f"jobs/{job.created_at[0:4]}/{job.created_at[5:7]}/{folder}/{name}"


def stem_of(key: str) -> str:
    """A key without its ending."""
    return key.rpartition(".")[0]


def _move(
    job: Job,
    verb: str,
    *,
    event: str,
    now: datetime,
    detail: dict[str, Any] | None = None,
    error: ServiceError | None = None,
    **columns: Any,
) -> Change:
    sources, target = TRANSITIONS[verb]
    if job.state not in sources:
        raise IllegalTransition("illegal_transition", f"Job {job.id} is at {job.state}; it cannot {verb}.")
    live = target not in FINAL
    moved = replace(
        job,
        status=STATUS_OF[target],
        step=target.value if live else None,
        finished_at=None if live else to_text(now),
        **{"holds": 0, **columns},
    )
    why = {"code": error.code, "reason": error.sentence[:MAX_ERROR_CHARS]} if error else {}
    return Change(
        job=moved,
        before=job,
        event=event,
        detail={"attempt": job.attempt, **why, **(detail or {})},
        error=error,
        accepted=verb == "accept",
        by_user=verb in BY_USER,
    )


def accept(job: Job, *, runpod_job_id: str, runpod_status: str, now: datetime, adopted: bool = False) -> Change:
    """RunPod has taken this attempt; it is looked at from now on. `adopted`: its own callback told us so."""
    return _move(
        job,
        "accept",
        event="submitted",
        detail={"runpod_job_id": runpod_job_id, **({"adopted": True} if adopted else {})},
        now=now,
        runpod_job_id=runpod_job_id,
        runpod_status=runpod_status,
        submitted_at=to_text(now),
        due_at=to_text(now),
        failures=0,
    )


def doubt(job: Job, error: ServiceError, *, now: datetime) -> Change:
    """RunPod's answer to /run was lost: it may be drawing. The claim's due_at says when it is sent again."""
    return _move(job, "doubt", event="submit_unknown", error=error, now=now)


def give_back(job: Job, error: ServiceError, *, now: datetime, rng: Random) -> Change:
    """RunPod certainly has not taken this attempt: it counts as not made, and is made again after a while."""
    failures = job.failures + 1
    wait = retry.seconds_to_wait(retry.SUBMIT, failures, rng=rng, retry_after=error.retry_after)
    due_at = to_text(now + timedelta(seconds=wait))
    return _move(
        job,
        "give_back",
        event="submit_refused",
        error=error,
        detail={"next_at": due_at},
        now=now,
        attempt=job.attempt - 1,
        failures=failures,
        due_at=due_at,
    )


def return_unsent(job: Job, *, now: datetime) -> Change:
    """The claim was made but there was no time to send it: due again at once, with nothing counted against it."""
    return _move(job, "give_back", event="not_sent", now=now, attempt=job.attempt - 1, due_at=to_text(now))


def observe(job: Job, *, runpod: Mapping[str, Any], now: datetime) -> Change:
    """RunPod says something new of an unfinished run, such as that a worker has begun."""
    begun = runpod["runpod_status"] != IN_QUEUE
    return _move(
        job,
        "observe",
        event="observed",
        detail={"runpod_status": runpod["runpod_status"]},
        now=now,
        started_at=job.started_at or (to_text(now) if begun else None),
        **runpod,
    )


def complete(job: Job, *, lease_until: str, runpod: Mapping[str, Any], now: datetime) -> Change:
    """RunPod is finished, and forgets the result in half an hour; whoever saves this stores it."""
    ended_at = _earliest_end(job, runpod, now)
    detail = {name: runpod[name] for name in ("queue_ms", "execution_ms") if runpod.get(name) is not None}
    return _move(
        job,
        "complete",
        event="completed",
        detail=detail,
        now=now,
        completed_at=to_text(ended_at),
        result_until=to_text(ended_at + RUNPOD_KEEPS),
        outputs=None,
        links=None,
        warnings=None,
        due_at=lease_until,
        failures=0,
        **runpod,
    )


def _earliest_end(job: Job, runpod: Mapping[str, Any], now: datetime) -> datetime:
    """When the run can have ended at the earliest; it may be long before anybody looked."""
    times = (runpod.get("queue_ms"), runpod.get("execution_ms"))
    if job.submitted_at is None or times[1] is None:
        return now
    lasted = timedelta(milliseconds=sum(time or 0 for time in times))
    return min(now, max(from_text(job.submitted_at) + lasted, now - RUNPOD_KEEPS))


def rerun(job: Job, error: ServiceError, *, runpod: Mapping[str, Any], now: datetime) -> Change:
    """RunPod itself lost or dropped the run, which is no fault of the job: one more attempt."""
    return _move(
        job,
        "rerun",
        event="attempt_lost",
        error=error,
        now=now,
        due_at=to_text(now),
        failures=0,
        **runpod,
    )


def fail(
    job: Job, error: ServiceError, *, now: datetime, runpod: Mapping[str, Any] | None = None, output: str = ""
) -> Change:
    """Nothing is left to try; `output` is an excerpt of what the worker returned."""
    return _move(
        job,
        "fail",
        event="failed",
        error=error,
        detail={"output": output} if output else None,
        now=now,
        error_code=error.code,
        error_message=error.sentence[:MAX_ERROR_CHARS],
        **(runpod or {}),
    )


def confirm_cancel(job: Job, *, runpod: Mapping[str, Any], now: datetime) -> Change:
    """RunPod has stopped the run that a user cancelled."""
    return _move(job, "confirm_cancel", event="cancelled", now=now, **runpod)


def keep(
    job: Job,
    kept: list[File],
    *,
    links: list[str | None],
    problems: Iterable[ServiceError] | None,
) -> Job:
    """
    The job with what of its result we have by now, and what of it is elsewhere; where that is more than before, its
    failures are forgotten. With `problems` RunPod is not needed any more: every file that can be had is here.
    """
    return replace(
        job,
        outputs=json.dumps(kept, ensure_ascii=False) if kept else None,
        links=_listed(links),
        warnings=job.warnings if problems is None else json.dumps(_warnings(problems), ensure_ascii=False),
        failures=0 if _progress(kept) > _progress(job.kept) else job.failures,
    )


def keep_for_a_day(job: Job, *, now: datetime) -> Job:
    """The job with its result tried for a day, not for the half hour that RunPod keeps it; a redrive may say longer."""
    end = _moment(job.completed_at or "", now) + SAFE_FOR
    return replace(job, result_until=max(job.result_until or "", to_text(end)))


def _listed(links: list[str | None]) -> str:
    listed = json.dumps(links)
    return listed if len(listed) <= MAX_LINKS_CHARS else json.dumps([None] * len(links))


def _progress(kept: list[File]) -> tuple[int, int]:
    return len(kept), sum(not file.get("spooled") for file in kept)


def _moment(text: str, default: datetime) -> datetime:
    try:
        return from_text(text)
    except ValueError:
        return default


def _warnings(problems: Iterable[ServiceError]) -> list[dict[str, str]]:
    return [{"code": error.code, "reason": error.sentence[:MAX_ERROR_CHARS]} for error in problems][:MAX_WARNINGS]


def put_back(job: Job, *, now: datetime) -> Change:
    """The claim was made but there was no time to store it: due again at once, with nothing counted against it."""
    return _move(job, "put_back", event="not_stored", now=now, due_at=to_text(now), holds=max(0, job.holds - 1))


def hold(job: Job, error: ServiceError, *, now: datetime, rng: Random) -> Change:
    """The result is there but could not be fetched or put: once more after a while."""
    failures = job.failures + 1
    # RunPod forgets the result in half an hour, whatever the host of a link asks for.
    asked = None if error.retry_after is None else min(error.retry_after, retry.STORE.maximum)
    policy = retry.SPOOLED if job.left == "spool" else retry.STORE
    due_at = to_text(now + timedelta(seconds=retry.seconds_to_wait(policy, failures, rng=rng, retry_after=asked)))
    return _move(
        job,
        "hold",
        event="store_failed",
        error=error,
        detail={"next_at": due_at},
        now=now,
        failures=failures,
        due_at=due_at,
    )


def bury(job: Job, error: ServiceError, *, now: datetime) -> Change:
    """The result could not be stored while RunPod had it: a dead letter, for the operator to see."""
    return _move(
        job,
        "bury",
        event="dead_letter",
        error=error,
        now=now,
        error_code=error.code,
        error_message=error.sentence[:MAX_ERROR_CHARS],
        dead_at=to_text(now),
        failures=job.failures + 1,
    )


def finish(job: Job, *, problems: Iterable[ServiceError] = (), now: datetime) -> Change:
    """Every file of the result is in R2, but for those that never will be because of the problems."""
    first = job.files[0]
    warnings = _warnings(problems)
    return _move(
        job,
        "finish",
        event="done",
        detail={
            "key": first["key"],
            "bytes": first["bytes"],
            "files": len(job.files),
            **({"warnings": warnings} if warnings else {}),
        },
        now=now,
        result_r2_key=first["key"],
        result_url=first["url"],
        error_code=None,
        error_message=None,
        failures=0,
        links=None,
        warnings=None,
        result_until=None,
    )


def retry_job(job: Job, *, deadline_at: str, now: datetime) -> Change:
    """A user wants a new attempt; what the earlier ones left in the table is forgotten."""
    forgotten = (
        "runpod_job_id",
        "runpod_status",
        "outputs",
        "links",
        "warnings",
        "error_code",
        "error_message",
        "dead_at",
        "cancel_at",
        "submitted_at",
        "started_at",
        "completed_at",
        "result_until",
        "queue_ms",
        "execution_ms",
    )
    return _move(
        job,
        "retry",
        event="retried",
        now=now,
        attempt_base=job.attempt,
        failures=0,
        due_at=to_text(now),
        deadline_at=deadline_at,
        **dict.fromkeys(forgotten),
    )


def redrive(job: Job, *, now: datetime) -> Change:
    """A user has mended what kept a result from being stored: it is tried again, without a new run."""
    ends = {"spool": to_text(now + SAFE_FOR), "links": to_text(now + RUNPOD_KEEPS), "runpod": job.result_until}
    return _move(
        job,
        "redrive",
        event="redriven",
        now=now,
        failures=0,
        due_at=to_text(now),
        result_until=ends[job.left],
        error_code=None,
        error_message=None,
        dead_at=None,
    )
