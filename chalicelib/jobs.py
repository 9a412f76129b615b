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

`status` is what people see, `step` what the pipeline does next. The moves themselves are in moves.py and queries.sql.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from random import Random
from typing import Any
from uuid import UUID

from chalicelib.errors import ServiceError
from chalicelib.records import dataclass


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

NEWEST = ("9999", "")  # a cursor, of a time and an id, that comes before every job
DEFAULT_MODEL = "qwen-image"
NORMAL, LOW = "normal", "low"  # priorities
IN_QUEUE = "IN_QUEUE"  # what RunPod says before a worker has begun

RUNPOD_KEEPS = timedelta(minutes=30)  # a result, from the end of its run


def new_id(rng: Random) -> str:
    """A random UUID."""
    return str(UUID(int=rng.getrandbits(128), version=4))


def to_text(moment: datetime) -> str:
    """A moment as the table has it: ISO-8601, UTC, milliseconds, Z; sorts as time does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def from_text(text: str) -> datetime:
    """A moment from the table; SQLite's own `YYYY-MM-DD HH:MM:SS` (UTC) is understood too. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


File = dict[str, Any]
Picture = dict[str, Any]


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
    idempotency_key: str | None = None
    idempotency_n: int | None = None
    request_hash: str | None = None
    metadata: str | None = None
    priority: str = NORMAL
    deadline: int | None = None
    deleted_at: str | None = None
    pictures: str | None = None
    callback_url: str | None = None
    cost: float | None = None
    wasted: float | None = None
    uncosted: int = 0
    progress: str | None = None
    # No columns, but why it waits in our queue: how many jobs are before it; how its endpoint is paused (JSON); whether
    # RunPod has as many runs as it may have.
    ahead: int | None = None
    paused: str | None = None
    held: int = 0

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Job":
        """A job from a row of any query on `jobs`; NULL in a column that has no None is its default."""
        return cls(**{name: value for name, value in row.items() if name in COLUMNS and value is not None})

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
    def own_pictures(self) -> list[Picture]:
        """The pictures that its input is to have: the key of each, and the places `at` which it stands there."""
        pictures: list[Picture] = json.loads(self.pictures) if self.pictures else []
        return pictures

    def payload(self, sign: Callable[[str], str]) -> dict[str, Any]:
        """
        The `input` object that RunPod gets: the caller's own as it was given, or the model's with the links to its
        pictures, which `sign` makes of their keys, or the default one.
        """
        if self.input is None:
            return {"prompt": self.prompt, "model": self.model, "jobId": self.id}
        payload: dict[str, Any] = json.loads(self.input)
        for picture in self.own_pictures:
            for place in picture["at"]:
                _put_in(payload, place, sign(picture["key"]))
        return payload


COLUMNS = frozenset(column.name for column in fields(Job))


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
    endpoint_id: str | None = None,
    metadata: Mapping[str, str] | None = None,
    priority: str = NORMAL,
    deadline: int | None = None,
    deadline_at: str | None = None,
    pictures: list[Picture] | None = None,
    callback_url: str | None = None,
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
        endpoint_id=endpoint_id,
        step=State.SUBMIT,
        version=1,
        due_at=created_at,
        deadline_at=deadline_at,
        created_at=created_at,
        updated_at=created_at,
        metadata=json.dumps(metadata, ensure_ascii=False) if metadata else None,
        priority=priority,
        deadline=deadline,
        pictures=json.dumps(pictures) if pictures else None,
        callback_url=callback_url,
    )


def _put_in(payload: Any, place: list[Any], value: str) -> None:
    *way, last = place
    for name in way:
        payload = payload[name]
    payload[last] = value


def under_key(made: list[Job], key: str, request_hash: str) -> list[Job]:
    """The jobs of one create, as they are inserted once under its idempotency key."""
    return [
        replace(job, idempotency_key=key, idempotency_n=number, request_hash=request_hash)
        for number, job in enumerate(made)
    ]


def payload_from(given: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The caller's `input`, with the prompt added only where it has neither `prompt` nor `workflow`."""
    if not prompt or "prompt" in given or "workflow" in given:
        return dict(given)
    return {**given, "prompt": prompt}


def result_folder(job: Job) -> str:
    """Where all files of a job lie, those of every attempt."""
    return f"jobs/{job.created_at[0:4]}/{job.created_at[5:7]}/{job.id}/"


def result_stem(job: Job, number: int) -> str:
    """
    The R2 key of one file of a job's result, but for its ending.

    A function of the row and the file's place in the answer alone, so that every repeat of an upload hits the same one.
    An attempt after the first has a folder of its own, so that a late upload cannot overwrite a newer picture.
    """
    attempt = "" if job.attempt <= 1 else f"{job.attempt}/"
    name = "output" if number == 1 else f"output-{number}"
    return f"{result_folder(job)}{attempt}{name}"


def stem_of(key: str) -> str:
    """A key without its ending."""
    return key.rpartition(".")[0]
