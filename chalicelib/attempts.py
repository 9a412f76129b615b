"""The runs of a job that were begun, read from its timeline."""

import json
from typing import Any

from chalicelib.d1 import Row
from chalicelib.jobs import IN_QUEUE, Job, State

Attempt = dict[str, Any]

ENDS = {"completed": "completed", "attempt_lost": "lost", "failed": "failed", "cancelled": "cancelled"}


def of(job: Job, timeline: list[Row]) -> list[Attempt]:
    """Each attempt that RunPod has taken, or may have taken, oldest first."""
    found: dict[int, Attempt] = {}
    for line in timeline:
        detail = json.loads(line["detail"])
        _read(line["event"], line["at"], detail, found, max(detail.get("attempt", 1), 1))
    current = max(job.attempt, 1)
    if job.runpod_job_id and current not in found:  # from before there were timelines
        found[current] = _of_row(job, current)
    return [found[number] for number in sorted(found)]


def _new(number: int, **known: Any) -> Attempt:
    attempt = {
        "attempt": number,
        "runpod_job_id": None,
        "outcome": "unknown",
        "submitted_at": None,
        "started_at": None,
        "ended_at": None,
        "queue_ms": None,
        "execution_ms": None,
        "cost": None,
        "error_code": None,
        "error": None,
    }
    return {**attempt, **known}


def _read(event: str, at: str, detail: dict[str, Any], found: dict[int, Attempt], number: int) -> None:
    if event == "submit_unknown":
        found[number] = _new(number, submitted_at=at)
    elif event in ("submitted", "adopted") and detail["runpod_job_id"]:
        found[number] = _new(number, runpod_job_id=detail["runpod_job_id"], outcome="running", submitted_at=at)
    elif number in found:
        _go_on(event, at, detail, found[number])


def _go_on(event: str, at: str, detail: dict[str, Any], attempt: Attempt) -> None:
    if event == "observed" and detail["runpod_status"] != IN_QUEUE:
        attempt["started_at"] = attempt["started_at"] or at
    if event in ENDS and attempt["outcome"] == "running":
        times = {name: detail.get(name) for name in ("queue_ms", "execution_ms", "cost")}
        attempt |= {"outcome": ENDS[event], "ended_at": at, **times}
    if event in ("attempt_lost", "failed", "dead_letter"):
        attempt |= {"error_code": detail["code"], "error": detail["reason"]}


def _of_row(job: Job, number: int) -> Attempt:
    outcomes = {State.DONE: "completed", State.STORE: "completed", State.ERROR: "failed", State.CANCELLED: "cancelled"}
    return _new(
        number,
        runpod_job_id=job.runpod_job_id,
        outcome=outcomes.get(job.state, "running"),
        submitted_at=job.submitted_at,
        started_at=job.started_at,
        ended_at=job.completed_at or job.finished_at,
        queue_ms=job.queue_ms,
        execution_ms=job.execution_ms,
        error_code=job.error_code,
        error=job.error_message,
    )
