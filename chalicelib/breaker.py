"""
The circuit breaker: an endpoint that answers only errors is paused, and its jobs stay in our queue. Pure functions.

Two kinds of errors are counted, each in a row: of a `call`, which has not taken a run, and of a `run`, which a worker
has failed. What works ends the count. After a pause one job tries the endpoint, or some where runs have failed; the
others wait for what comes of it.
"""

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from chalicelib.jobs import Change, State, to_text

# In a row, from which on an endpoint is paused. A lost answer to /run may be a run that is paid and costs its job ten
# minutes; a failed run may be the fault of what one caller has asked for.
MOST = {"call": 5, "run": 10}
PAUSES = (60, 120, 300, 600)  # seconds; the last one again and again
PROBE_SECONDS = 60  # after which another job tries it, if nothing was heard of the first
RUN_SECONDS = 600  # the same, where the run of the first is under way

# What is no error of the endpoint: too many calls at once, an input that RunPod itself refuses, and a job that has been
# sent too often.
NOT_ITS_FAULT = {"runpod_busy", "runpod_refused", "submit_unknown"}
# What a worker has made of a run, such that another one of its runs might end in the same way.
OF_RUNS = {"worker_failed", "no_output", "unknown_type", "base64_invalid", "local_path", "run_deadline"}
SENTENCE_CHARS = 300


def judge(changes: Iterable[Change]) -> list[dict[str, Any]]:
    """What these changes say of their endpoints, if they win: whether a call or a run has worked there, or failed."""
    outcomes = []
    for change in changes:
        version = None if change.accepted else change.job.version + 1
        named = {"id": change.job.id, "version": version}
        if works := _what_works(change):
            outcomes.append({**named, "kind": works, "works": 1})
        elif fails := what_fails(change):
            outcomes.append({**named, "kind": fails, "works": 0, **_words(change, fails)})
    return outcomes


def _what_works(change: Change) -> str | None:
    if change.event == "submitted":
        return None if change.detail.get("adopted") else "call"  # then nobody's call was answered
    if change.error and change.error.code == "runpod_refused":  # it has looked at the input
        return "call"
    # What could not be put into R2 was drawn all the same.
    is_drawn = change.event == "done" or (
        change.event == "store_failed" and change.error and change.error.service == "r2"
    )
    return "run" if is_drawn else None


def what_fails(change: Change) -> str | None:
    """Which kind of error it is of the endpoint, if it is one."""
    error = change.error
    if error is None:
        return None
    if change.before.state is State.SUBMITTING and error.service == "runpod" and error.code not in NOT_ITS_FAULT:
        return "call"
    return "run" if change.before.state in (State.POLL, State.STORE) and error.code in OF_RUNS else None


def _words(change: Change, kind: str) -> dict[str, str]:
    """The code, and a sentence that everybody may read: a worker's own words may be of another's prompt."""
    assert change.error is not None
    said = f"See the error of job {change.job.id}." if kind == "run" else change.error.plain[:SENTENCE_CHARS]
    return {"code": change.error.code, "sentence": said}


def pauses_from(now: datetime) -> str:
    """When each of the pauses ends that begin now (JSON)."""
    return json.dumps([to_text(now + timedelta(seconds=seconds)) for seconds in PAUSES])


def probe_until(now: datetime) -> str:
    """Until when a job that tries an endpoint now is waited for."""
    return to_text(now + timedelta(seconds=PROBE_SECONDS))


def run_until(now: datetime) -> str:
    """Until when its run is, once it is under way."""
    return to_text(now + timedelta(seconds=RUN_SECONDS))
