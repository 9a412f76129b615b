"""
The moves of a job: each verb takes a job and returns the Change to save, checked against the table of moves in jobs.py.

Pure functions: the time and what is random are given.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

from chalicelib import retry
from chalicelib.errors import IllegalTransition, ServiceError
from chalicelib.jobs import (
    BY_USER,
    FINAL,
    IN_QUEUE,
    RUNPOD_KEEPS,
    STATUS_OF,
    TRANSITIONS,
    Change,
    File,
    Job,
    State,
    from_text,
    to_text,
)

# How RunPod ends a run; without a time of its own it may not have begun.
NEVER_BEGUN = frozenset({"CANCELLED", "TIMED_OUT"})

SAFE_FOR = timedelta(days=1)  # that a result is tried which lies in the spool or behind the worker's links

# After these moves nothing is left of what was paid so far.
WITHOUT_RESULT = frozenset({"rerun", "fail", "confirm_cancel", "retry"})

PROGRESS = "progress"  # the event of a change that is no move

MAX_WARNINGS = 10  # of a result
MAX_LINKS_CHARS = 100_000  # of the links of one result that are kept
MAX_ERROR_CHARS = 2_000  # of error_message; a worker's traceback would fill the list that a page loads


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
        **{"holds": 0, "progress": None, **columns},
    )
    if verb in WITHOUT_RESULT:
        moved = replace(moved, wasted=moved.cost)
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
        # One that had been given up for lost is known after all; record_accepted says the same.
        uncosted=max(0, job.uncosted - 1) if job.state is State.SUBMIT else job.uncosted,
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


def observe(job: Job, *, runpod: Mapping[str, Any], progress: str | None = None, now: datetime) -> Change:
    """RunPod says something new of an unfinished run, such as that a worker has begun."""
    begun = runpod["runpod_status"] != IN_QUEUE
    return _move(
        job,
        "observe",
        event="observed",
        progress=progress,
        detail={"runpod_status": runpod["runpod_status"]},
        now=now,
        started_at=job.started_at or (to_text(now) if begun else None),
        **runpod,
    )


def go_further(job: Job, *, progress: str) -> Change:
    """How far its run is, which is no move: neither the version nor the timeline knows of it."""
    return Change(job=replace(job, progress=progress), before=job, event=PROGRESS)


def look_again(job: Job, *, at: str) -> Change:
    """It is looked at then, unless it is due before, for there was no answer now; no move either."""
    return Change(job=replace(job, due_at=at), before=job, event=PROGRESS)


def complete(
    job: Job, *, lease_until: str, runpod: Mapping[str, Any], price: float | None = None, now: datetime
) -> Change:
    """RunPod is finished, and forgets the result in half an hour; whoever saves this stores it."""
    ended_at = _earliest_end(job, runpod, now)
    charged, detail = _charge(job, runpod, price)
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
        **charged,
    )


def _charge(job: Job, runpod: Mapping[str, Any], price: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    What the end of an attempt changes in the row, and its line in the timeline; `price` in US dollars for a second.

    What is not known counts as unknown, not as nothing; a run that never had a worker has cost nothing.
    """
    times = {name: runpod[name] for name in ("queue_ms", "execution_ms") if runpod.get(name) is not None}
    milliseconds = runpod.get("execution_ms")
    if milliseconds is None and runpod.get("runpod_status") in NEVER_BEGUN and job.started_at is None:
        milliseconds = 0
    if milliseconds is None or price is None:
        return {"uncosted": job.uncosted + 1}, times
    cost = round(milliseconds / 1000 * price, 9)
    return {"cost": round((job.cost or 0.0) + cost, 9)}, {**times, "cost": cost}


def _earliest_end(job: Job, runpod: Mapping[str, Any], now: datetime) -> datetime:
    """When the run can have ended at the earliest; it may be long before anybody looked."""
    times = (runpod.get("queue_ms"), runpod.get("execution_ms"))
    if job.submitted_at is None or times[1] is None:
        return now
    lasted = timedelta(milliseconds=sum(time or 0 for time in times))
    return min(now, max(from_text(job.submitted_at) + lasted, now - RUNPOD_KEEPS))


def rerun(
    job: Job, error: ServiceError, *, runpod: Mapping[str, Any], price: float | None = None, now: datetime
) -> Change:
    """RunPod itself lost or dropped the run, which is no fault of the job: one more attempt."""
    charged, detail = _charge(job, runpod, price)
    return _move(
        job,
        "rerun",
        event="attempt_lost",
        error=error,
        detail=detail,
        now=now,
        due_at=to_text(now),
        failures=0,
        **runpod,
        **charged,
    )


def fail(
    job: Job,
    error: ServiceError,
    *,
    now: datetime,
    runpod: Mapping[str, Any] | None = None,
    price: float | None = None,
    output: str = "",
) -> Change:
    """
    Nothing is left to try; `output` is an excerpt of what the worker returned, `runpod` what was said of a run that
    has ended by this.
    """
    charged, detail = ({}, {}) if runpod is None else _charge(job, runpod, price)
    return _move(
        job,
        "fail",
        event="failed",
        error=error,
        detail={**detail, **({"output": output} if output else {})},
        now=now,
        error_code=error.code,
        error_message=error.sentence[:MAX_ERROR_CHARS],
        **(runpod or {}),
        **charged,
    )


def confirm_cancel(job: Job, *, runpod: Mapping[str, Any], price: float | None = None, now: datetime) -> Change:
    """RunPod has stopped the run that a user cancelled."""
    charged, detail = _charge(job, runpod, price)
    return _move(job, "confirm_cancel", event="cancelled", detail=detail, now=now, **runpod, **charged)


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


def retry_job(job: Job, *, by: str, deadline_at: str, now: datetime) -> Change:
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
        detail={"by": by},
        now=now,
        attempt_base=job.attempt,
        failures=0,
        due_at=to_text(now),
        deadline_at=deadline_at,
        **dict.fromkeys(forgotten),
    )


def redrive(job: Job, *, by: str, now: datetime) -> Change:
    """A user has mended what kept a result from being stored: it is tried again, without a new run."""
    ends = {"spool": to_text(now + SAFE_FOR), "links": to_text(now + RUNPOD_KEEPS), "runpod": job.result_until}
    return _move(
        job,
        "redrive",
        event="redriven",
        detail={"by": by},
        now=now,
        failures=0,
        due_at=to_text(now),
        result_until=ends[job.left],
        error_code=None,
        error_message=None,
        dead_at=None,
    )
