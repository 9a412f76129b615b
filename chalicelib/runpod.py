"""RunPod's queue API: send a run, ask for it, stop it. It has no idempotency key, so /run is sent once."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from chalicelib.credentials import Credential
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.pace import Pace
from chalicelib.records import dataclass
from chalicelib.room import Place
from chalicelib.runtime import Clock
from chalicelib.wire import Reply, Wire, exchange_as

MAX_ANSWER_BYTES = 32_000_000  # RunPod bounds a result at 20 MB
FINAL_REFUSALS = (400, 413, 422)  # the payload is at fault; 400 is also how a body over 10 MiB is answered
# Calls that are made of one endpoint within ten seconds; RunPod allows a little more of each, for all that use the key
# together: https://docs.runpod.io/serverless/endpoints/operation-reference
CALLS = {"run": 950, "status": 1900, "cancel": 95}
CALLS_WITHIN = 10.0  # seconds
LEAST_CALL = 1.0  # seconds in which a question may come to something

UNAUTHORIZED = (401, 403)  # the key; as with an unknown endpoint (404) and 429, nothing was accepted, and may be later


class Verdict(StrEnum):
    """What RunPod says of a run. Anything it says that is not in here, such as RUNNING, is UNFINISHED."""

    UNFINISHED = "UNFINISHED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    NOT_FOUND = "NOT_FOUND"  # HTTP 404: not indexed yet, forgotten, or lost


class Condition(StrEnum):
    """What an endpoint's workers are to a run that waits."""

    WORKING = "working"  # or idle, and about to take it
    STARTING = "starting"
    THROTTLED = "throttled"
    UNHEALTHY = "unhealthy"
    NONE = "none"


@dataclass(frozen=True)
class Answer:
    """RunPod's answer to /status; times in milliseconds, of the current dispatch only."""

    verdict: Verdict
    status: str = ""
    output: Any = field(default=None, repr=False)
    error: str = ""
    queue_ms: int | None = None
    execution_ms: int | None = None
    bytes: int = 0  # of the answer as it came


class Runpod:
    """One RunPod account; the endpoint is named in each call."""

    def __init__(self, *, wire: Wire, clock: Clock, base_url: str, api_key: Credential[str]) -> None:
        self._wire = wire
        self._clock = clock
        self._base_url = base_url
        self._api_key = api_key
        self._paces: defaultdict[str, dict[str, Pace]] = defaultdict(
            lambda: {verb: Pace(clock, calls=calls, seconds=CALLS_WITHIN) for verb, calls in CALLS.items()}
        )

    def run(
        self,
        endpoint_id: str,
        payload: dict[str, Any],
        *,
        webhook: str | None = None,
        policy: Mapping[str, int] | None = None,
        timeout: float,
        within: float | None = None,
    ) -> tuple[str, str]:
        """
        Begin a paid run; its id and status. `webhook` is told of its end, `policy` has its times in milliseconds. Where
        RunPod's limit of calls is reached it waits for its turn first: all of it `within` so many seconds, or else the
        `timeout`.

        Raises PermanentError where the payload is refused for good, TransientError where nothing was accepted now, and
        IndeterminateError where it may have been: that one must not be sent again blindly.
        """
        # Beside `input`, not in it: there only the worker would see them.
        beside = {"policy": policy, "webhook": webhook}
        body = {"input": payload, **{name: value for name, value in beside.items() if value}}
        # Never with less time than it should have: an answer that is lost may be a run that is bought twice.
        self._wait_for_turn(endpoint_id, "run", timeout, within, least=timeout)
        reply = self._call("POST", endpoint_id, "run", timeout=timeout, body=body)
        if reply.status != 200:
            raise _refusal(reply)
        answer = _object(reply.body)
        run_id, status = answer.get("id"), answer.get("status")
        if not isinstance(run_id, str) or not run_id:
            raise IndeterminateError(
                "runpod_bad_answer", "RunPod accepted the request but named no run.", service="runpod"
            )
        return run_id, status if isinstance(status, str) else ""

    def status(
        self, endpoint_id: str, run_id: str, *, place: Place | None = None, timeout: float, within: float | None = None
    ) -> Answer:
        """
        Ask for a run, in turn as in run(); asking changes nothing. Raises TransientError where there is no usable
        answer, or in time no room for it, if it must have a `place` of its size.

        No parameter may ever be added to this URL: `?ttl=` would set the run's lifetime.
        """
        timeout = self._wait_for_turn(endpoint_id, "status", timeout, within)
        end = self._clock.monotonic() + timeout
        try:
            reply = self._call(
                "GET",
                endpoint_id,
                f"status/{quote(run_id, safe='')}",
                timeout=timeout,
                on_large=lambda size: _take_room(place, size, end - self._clock.monotonic()),
            )
            if place is not None:
                place.shrink(len(reply.body))
        except IndeterminateError as error:
            raise TransientError(error.code, error.sentence, service="runpod") from error
        self._heed(endpoint_id, "status", reply)
        if reply.status == 404:
            return Answer(Verdict.NOT_FOUND)
        size, retry_after, code = len(reply.body), reply.retry_after, reply.status
        # Of a large answer no more than two copies are in memory at a time: bytes and text, then text and object.
        text = reply.body.decode("utf-8", "replace")
        del reply
        answer = _object(text)
        del text
        # In RunPod's error envelope `status` is the HTTP number; in a job it is a word.
        status = answer.get("status")
        if code != 200 or not isinstance(status, str):
            raise TransientError(
                "runpod_bad_answer",
                f"RunPod gave no usable status (HTTP {code}).",
                service="runpod",
                retry_after=retry_after,
            )
        return Answer(
            verdict=_verdict(status),
            status=status,
            output=answer.get("output"),
            error=_text(answer.get("error")),
            queue_ms=_milliseconds(answer.get("delayTime")),
            execution_ms=_milliseconds(answer.get("executionTime")),
            bytes=size,
        )

    def cancel(self, endpoint_id: str, run_id: str, *, timeout: float) -> None:
        """Stop a run that waits or works; one that RunPod no longer knows is fine. Raises as run() does."""
        timeout = self._wait_for_turn(endpoint_id, "cancel", timeout, None)
        reply = self._call("POST", endpoint_id, f"cancel/{quote(run_id, safe='')}", timeout=timeout)
        self._heed(endpoint_id, "cancel", reply)
        if reply.status not in (200, 404):
            raise _refusal(reply)

    def health(self, endpoint_id: str, *, timeout: float) -> tuple[dict[str, int], dict[str, int]]:
        """
        How many workers the endpoint has in each state, and how many jobs; a worker that idles is ready too. Raises as
        run() does.
        """
        reply = self._call("GET", endpoint_id, "health", timeout=timeout)
        if reply.status != 200:
            raise _refusal(reply)
        answer = _object(reply.body)
        return _counts(answer.get("workers")), _counts(answer.get("jobs"))

    def _wait_for_turn(
        self, endpoint_id: str, verb: str, timeout: float, within: float | None, *, least: float = LEAST_CALL
    ) -> float:
        """The seconds that are left for the call, `least` of them, when its turn has come."""
        within = timeout if within is None else within
        end = self._clock.monotonic() + within
        if not self._paces[endpoint_id][verb].take_turn(within=within - least, patient=verb == "cancel"):
            raise _busy("", None)
        return max(0.1, min(timeout, end - self._clock.monotonic()))

    def _heed(self, endpoint_id: str, verb: str, reply: Reply) -> None:
        pace = self._paces[endpoint_id][verb]
        if reply.status == 429:
            pace.refused(reply.retry_after)
        else:
            pace.taken()

    def _call(
        self,
        method: str,
        endpoint_id: str,
        operation: str,
        *,
        timeout: float,
        body: dict[str, Any] | None = None,
        on_large: Callable[[int], None] | None = None,
    ) -> Reply:
        url = f"{self._base_url}/{quote(endpoint_id, safe='')}/{operation}"
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        return exchange_as(
            self._api_key,
            self._wire,
            "runpod",
            method,
            url,
            # What is compressed does not tell its size, and base64 gets little smaller by it.
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            body=data,
            timeout=timeout,
            max_bytes=MAX_ANSWER_BYTES,
            on_large=on_large,
        )


def condition_of(workers: Mapping[str, int]) -> Condition:
    """What the counts of health() mean for the next run: the best that any worker is."""
    if workers.get("running", 0) or workers.get("ready", 0) or workers.get("idle", 0):
        return Condition.WORKING
    if workers.get("initializing", 0):
        return Condition.STARTING
    if workers.get("throttled", 0):
        return Condition.THROTTLED
    return Condition.UNHEALTHY if workers.get("unhealthy", 0) else Condition.NONE


def _take_room(place: Place | None, size: int, timeout: float) -> None:
    if place is not None and not place.take(size, timeout=timeout):
        raise TransientError("runpod_no_room", "There was no room in memory for RunPod's answer.", service="runpod")


def _refusal(reply: Reply) -> ServiceError:
    reason = _text(_object(reply.body).get("detail") or _object(reply.body).get("error"))[:300]
    error = _refused(reply, f" (HTTP {reply.status}{': ' + reason if reason else ''})")
    error.plain = _refused(reply, f" (HTTP {reply.status})").sentence
    return error


def _refused(reply: Reply, said: str) -> ServiceError:
    if reply.status in FINAL_REFUSALS:
        return PermanentError("runpod_refused", f"RunPod refused the input{said}.", service="runpod")
    if reply.status == 429:
        return _busy(said, reply.retry_after)
    if reply.status in UNAUTHORIZED:
        return TransientError(
            "runpod_unauthorized", f"RunPod refused the key{said}; check RUNPOD_API_KEY.", service="runpod"
        )
    if reply.status == 404:
        return TransientError(
            "runpod_no_endpoint",
            f"RunPod does not know the endpoint{said}; check RUNPOD_ENDPOINT_ID.",
            service="runpod",
        )
    return IndeterminateError(
        "runpod_bad_answer", f"RunPod gave no usable answer{said}.", service="runpod", retry_after=reply.retry_after
    )


def _busy(said: str, retry_after: float | None) -> TransientError:
    return TransientError(
        "runpod_busy", f"RunPod takes no more requests for a while{said}.", service="runpod", retry_after=retry_after
    )


def _verdict(status: str) -> Verdict:
    final = (Verdict.COMPLETED, Verdict.FAILED, Verdict.CANCELLED, Verdict.TIMED_OUT)
    return Verdict(status) if status in final else Verdict.UNFINISHED


def _object(body: bytes | str) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        raise TransientError("runpod_bad_answer", "RunPod gave no counts of workers and jobs.", service="runpod")
    return {str(name): count for name, count in value.items() if isinstance(count, int)}


def _text(value: object) -> str:
    """An error as text; a worker's exception comes as JSON in a string, of which only the message is for people."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    inner = _object(text.encode("utf-8", "replace"))
    message = inner.get("error_message")
    return message if isinstance(message, str) and message else text


def _milliseconds(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12 else None
