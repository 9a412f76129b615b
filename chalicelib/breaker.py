"""
The circuit breaker: an endpoint that answers only errors is paused, and its jobs stay in our queue. Pure functions.

Two kinds of errors are counted, each in a row: of a `call`, which has not taken a run, and of a `run`, which a worker
has failed. What works ends the count. After a pause one job tries the endpoint; the others wait for what comes of it.
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
PROBE = {"call": 60, "run": 600}  # seconds, after which another job tries it if nothing was heard of the first

# What is no error of the endpoint: too many calls at once, and an input that RunPod itself refuses.
NOT_ITS_FAULT = {"runpod_busy", "runpod_refused"}
# What a worker has made of a run, such that another one of its runs might end in the same way.
OF_RUNS = {"worker_failed", "no_output", "unknown_type", "base64_invalid", "local_path", "run_deadline"}
SENTENCE_CHARS = 300


def judge(changes: Iterable[Change]) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """What these changes say of their endpoints: what has worked there, and what failed where nothing has."""
    worked: set[tuple[str, str]] = set()
    faults: dict[tuple[str, str], dict[str, Any]] = {}
    for change in changes:
        endpoint_id = change.before.endpoint_id or ""
        if change.event in ("submitted", "done"):
            worked.add((endpoint_id, "call" if change.event == "submitted" else "run"))
        elif kind := _kind(change):
            fault = faults.setdefault((endpoint_id, kind), {"failures": 0})
            fault["failures"] += 1
            fault |= _words(change, kind)
    return (
        [{"endpoint_id": endpoint_id, "kind": kind} for endpoint_id, kind in sorted(worked)],
        [
            {"endpoint_id": endpoint_id, "kind": kind, **fault}
            for (endpoint_id, kind), fault in sorted(faults.items())
            if (endpoint_id, kind) not in worked
        ],
    )


def _kind(change: Change) -> str | None:
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


def probes_until(now: datetime) -> str:
    """Until when a job that tries an endpoint now is waited for, by the kind of errors (JSON)."""
    return json.dumps({kind: to_text(now + timedelta(seconds=seconds)) for kind, seconds in PROBE.items()})
