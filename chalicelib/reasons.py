"""Why a job is not done yet, in a word for machines and a sentence for people."""

import json
import threading
from dataclasses import field
from datetime import datetime, timedelta
from typing import Any

from chalicelib.errors import ServiceError
from chalicelib.jobs import IN_QUEUE, LOW, Job, State, from_text, to_text
from chalicelib.records import dataclass
from chalicelib.runpod import Condition, Runpod, condition_of
from chalicelib.runtime import Clock

KEPT_SECONDS = 10.0  # for which RunPod's counts of an endpoint stand
SLOW_SECONDS = 1.0  # for an answer, after which no other endpoint is asked for so long
HEALTH_TIMEOUT = 2.0  # seconds; a page that lists jobs waits for it
COUNTED_AHEAD = 200  # jobs before one in our queue, from which on they are not counted further

# An endpoint without any worker starts one for a run that waits. One that has started none for so long gets none now,
# and after longer its maximum of workers looks to be 0, as RunPod itself sets it for one that nobody has used for days.
STARTS_WITHIN = timedelta(seconds=60)
PAUSED_AFTER = timedelta(minutes=10)
ANSWERED_WITHIN = timedelta(seconds=30)  # to /run, or its answer is lost

NEEDS_A_HAND = ("throttled", "unhealthy", "no_worker", "endpoint_paused")  # for these no run is begun by itself

Reason = dict[str, Any]
Workers = dict[str, int]  # of an endpoint, by their state


@dataclass(kw_only=True)
class Reasons:
    """One for each process, so that RunPod is asked at most once in ten seconds for each endpoint."""

    runpod: Runpod
    default_endpoint_id: str
    submit_unknown_wait: float
    clock: Clock
    _kept: dict[str, tuple[float, Workers | None]] = field(default_factory=dict, init=False)
    _slow_until: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def of(self, job: Job) -> Reason | None:
        """
        `code`, `sentence`, and where they are known `place` in our queue and `until`, when it is tried again; None of a
        job that is being drawn, or has ended.
        """
        now = self.clock.now()
        if job.cancel_at and job.state in (State.SUBMIT, State.SUBMITTING, State.POLL):
            return _reason("cancelling", "It is cancelled as soon as RunPod has stopped its run.")
        match job.state:
            case State.SUBMIT:
                return _in_our_queue(job, now)
            case State.SUBMITTING:
                return self._being_sent(job, now)
            case State.POLL if job.runpod_status == IN_QUEUE or not job.runpod_status:
                workers = self._workers(job.endpoint_id or self.default_endpoint_id)
                return _at_runpod(workers, _since(job.submitted_at, now))
            case State.STORE:
                return _being_stored(job, now)
        return None

    def trouble_at(self, endpoint: str, waited: timedelta) -> Reason | None:
        """Why a run waits there that has waited for so long, if that needs a hand."""
        reason = _at_runpod(self._workers(endpoint), waited)
        return reason if reason["code"] in NEEDS_A_HAND else None

    def _being_sent(self, job: Job, now: datetime) -> Reason:
        if job.due_at < to_text(now + timedelta(seconds=self.submit_unknown_wait) - ANSWERED_WITHIN):
            return _reason(
                "answer_lost",
                "RunPod's answer to sending it was lost. It may be drawing, so it is sent again only after a wait.",
                until=job.due_at or None,  # '' in rows of the earlier version
            )
        return _reason("sending", "It is just being sent to RunPod.")

    def _workers(self, endpoint: str) -> Workers | None:
        with self._lock:
            until, workers = self._kept.get(endpoint, (0.0, None))
            if until <= self.clock.monotonic():
                workers = self._ask(endpoint)
                self._kept[endpoint] = (self.clock.monotonic() + KEPT_SECONDS, workers)
        return workers

    def _ask(self, endpoint: str) -> Workers | None:
        begun = self.clock.monotonic()
        if begun < self._slow_until:
            return None
        try:
            workers, _ = self.runpod.health(endpoint, timeout=HEALTH_TIMEOUT)
        except ServiceError:
            workers = None
        if self.clock.monotonic() - begun > SLOW_SECONDS:  # a page with many endpoints would add that up
            self._slow_until = self.clock.monotonic() + KEPT_SECONDS
        return workers


def _reason(code: str, sentence: str, *, place: int | None = None, until: str | None = None) -> Reason:
    return {"code": code, "sentence": sentence, "place": place, "until": until}


def _in_our_queue(job: Job, now: datetime) -> Reason:
    if job.paused:
        return _paused(json.loads(job.paused), now)
    if job.failures and job.due_at > to_text(now):
        return _reason(
            "backoff",
            f"RunPod did not take it, {_times(job.failures)}; it is sent again after a wait. The timeline says why.",
            until=job.due_at,
        )
    place = None if job.ahead is None else job.ahead + 1
    if job.held:
        return _reason(
            "max_running",
            "RunPod has as many runs as it may have (MAX_RUNNING); it is sent when one has ended.",
            place=place,
        )
    if job.priority == LOW:
        return _reason("low_priority", "It is of low priority, and sent when few runs wait at RunPod.", place=place)
    before = "" if place is None else f", {_ahead(place - 1)} before it"
    return _reason("our_queue", f"It is in our queue{before}; it is sent with one of the next rounds.", place=place)


def _paused(fault: dict[str, Any], now: datetime) -> Reason:
    what = "It has taken none of the last runs" if fault["kind"] == "call" else "Its last runs have all failed"
    before = fault["until"] > to_text(now)
    then = "then one job tries it" if before else "one job tries it now"
    return _reason(
        "endpoint_errors",
        f"The endpoint answers only errors, so nothing is sent there for a while; {then}. {what}, {fault['failures']} "
        f"in a row. {fault['sentence']}",
        until=fault["until"] if before else None,
    )


def _ahead(number: int) -> str:
    if number >= COUNTED_AHEAD:
        return f"with {COUNTED_AHEAD} jobs or more"
    return "with no job" if number == 0 else "with 1 job" if number == 1 else f"with {number} jobs"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times in a row"


def _at_runpod(there: Workers | None, waited: timedelta) -> Reason:
    """What RunPod's counts mean for a run that waits there."""
    if there is None:
        return _reason("runpod_queue", "It waits at RunPod for a worker; RunPod does not say just now how that looks.")
    match condition_of(there):
        case Condition.WORKING:
            return _reason("runpod_queue", "It waits in RunPod's queue until a worker is free.")
        case Condition.STARTING:
            return _reason("worker_starting", "A worker is starting for it at RunPod.")
        case Condition.THROTTLED:
            return _reason("throttled", "RunPod has no free GPU for the endpoint just now: its workers are throttled.")
        case Condition.UNHEALTHY:
            return _reason(
                "unhealthy", "The endpoint's workers are unhealthy: they crash or cannot start; see their logs."
            )
    if waited < STARTS_WITHIN:
        return _reason("scaled_to_zero", "The endpoint had no worker, for nobody has used it; one is started for this.")
    if waited < PAUSED_AFTER:
        return _reason("no_worker", "The endpoint has no worker, and RunPod has started none so far.")
    return _reason(
        "endpoint_paused",
        "The endpoint has no worker and gets none: it looks paused. Check its maximum of workers, which RunPod lowers "
        "where nobody has used it for days.",
    )


def _being_stored(job: Job, now: datetime) -> Reason:
    if job.failures and job.due_at > to_text(now):
        return _reason(
            "store_backoff",
            f"It is drawn, but could not be stored, {_times(job.failures)}; it is tried again. The timeline says why.",
            until=job.due_at,
        )
    return _reason("storing", "It is drawn, and is being stored.")


def _since(text: str | None, now: datetime) -> timedelta:
    try:
        return now - from_text(text or "")
    except ValueError:
        return timedelta.max
