"""What is logged and in which words: one JSON line an event, never a prompt, a key or a signed link."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, ParamSpec

from chalicelib import metrics
from chalicelib.errors import ServiceError
from chalicelib.jobs import Change, State, from_text, to_text
from chalicelib.runtime import Clock

# Moves and other events of a job, and what counts them.
COUNTED = {"submitted": "Submits", "done": "Done", "cancelled": "Cancelled", "store_failed": "StoresFailed"}
# Exceptions whose words are of the code alone; others tell what they stumbled over, such as a link that is signed.
OF_CODE = (AttributeError, TypeError, NameError, ImportError, ZeroDivisionError)
# These log addresses, with all that is in them, by the handlers that Lambda has set up.
TALKATIVE = ("urllib3", "botocore", "boto3")

P = ParamSpec("P")

_logger = logging.getLogger("ob-ai-studio")

# What every line of one request, or of one minute of the schedule, has; threads of the crew have it too.
_invocation: ContextVar[Mapping[str, str]] = ContextVar("invocation", default={})  # noqa: B039  # it is never written to


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": to_text(Clock().now()),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_invocation.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line["exception"] = "\n".join(_told(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False, default=_kind)


def _kind(value: object) -> str:
    return type(value).__name__


def _told(error: BaseException, seen: tuple[BaseException, ...] = ()) -> Iterator[str]:
    """What was raised, where, and what it was raised from; without the words of most exceptions."""
    import traceback

    before = error.__cause__ or error.__context__
    if before and before not in seen:
        yield from _told(before, (*seen, error))
    words = f": {error}" if isinstance(error, OF_CODE) else f": {error.code}" if isinstance(error, ServiceError) else ""
    yield f"{_kind(error)}{words}"
    yield from (line.rstrip() for line in traceback.format_tb(error.__traceback__))


def _set_up() -> None:
    """Send our lines to standard error, once a process; Chalice's own logger says nothing below ERROR."""
    if _logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    logging.raiseExceptions = False  # a line that cannot be made would be printed with all that it was made of
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _harmless(tell: Callable[P, None]) -> Callable[P, None]:
    """A bug in telling must not undo what is told: a run is bought, a row is written."""

    def tell_or_not(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            tell(*args, **kwargs)
        except Exception:
            _logger.error("not_told", exc_info=True)

    return tell_or_not


def begin(request_id: str) -> None:
    """From here on lines are of this invocation of the Lambda."""
    _set_up()
    _invocation.set({"request_id": request_id})


def add(**more: str) -> None:
    """What is known of it by now."""
    _invocation.set({**_invocation.get(), **more})


@_harmless
def answered(method: str, route: str, status: int, seconds: float) -> None:
    """A request is over. Of its address only the pattern: a callback's own holds a secret, a query what is sought."""
    counted = metrics.take(Clock().now())
    _write(logging.INFO, "request", method=method, route=route, status=status, ms=_ms(seconds), **counted)


def _write(level: int, message: str, **fields: Any) -> None:
    told = {name: value for name, value in fields.items() if value is not None}
    _logger.log(level, message, exc_info=level == logging.ERROR, extra={"fields": told})


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


@_harmless
def saved(change: Change, now: datetime) -> None:
    """A job has made a move, and it is in the table; `ms` is the time since the move before."""
    job, before = change.job, change.before
    counted = metrics.of_error(job.error_code or "", now) if job.state is State.ERROR else {}
    _count(change.event)
    metrics.count("CostUSD", (job.cost or 0) - (before.cost or 0))
    metrics.count("WastedUSD", (job.wasted or 0) - (before.wasted or 0))
    _write(
        logging.INFO,
        change.event,
        job_id=job.id,
        attempt=change.detail.get("attempt", job.attempt),
        runpod_job_id=job.runpod_job_id,
        endpoint_id=job.endpoint_id,
        step_from=before.state,
        step_to=job.state,
        ms=_since(before.updated_at, now),
        code=change.error.code if change.error else None,
        **counted,
    )


@_harmless
def happened(event: str, job_id: str, *, attempt: int | None = None, step_to: str | None = None) -> None:
    """Something else has happened to a job that its timeline has, too."""
    _count(event)
    _write(logging.INFO, event, job_id=job_id, attempt=attempt, step_to=step_to)


def _count(event: str) -> None:
    if event in COUNTED:
        metrics.count(COUNTED[event])


def _since(text: str, now: datetime) -> int | None:
    try:
        return max(0, _ms((now - from_text(text)).total_seconds()))
    except ValueError:
        return None


@_harmless
def told(job_id: str, event: str, status: str, line: Mapping[str, Any]) -> None:
    """A try to tell a callback's receiver of a job's end is over; its address is the caller's own, and not logged."""
    _write(logging.INFO, "callback", job_id=job_id, event=event, outcome=status, status=line["status"], ms=line["ms"])


@_harmless
def failed(what: str, error: ServiceError, *, job_id: str | None = None, endpoint_id: str | None = None) -> None:
    """Something did not work that is tried again, or that the caller was told of."""
    _write(
        logging.WARNING,
        what,
        job_id=job_id,
        endpoint_id=endpoint_id,
        code=error.code,
        reason=error.plain,
        service=error.service or None,
    )


@_harmless
def endpoint(endpoint_id: str, code: str, sentence: str, *, until: str | None) -> None:
    """An endpoint is paused until then, for that is the last of its errors; or it works again."""
    level, what = (logging.WARNING, "endpoint_errors") if until else (logging.INFO, "endpoint_works")
    _write(level, what, endpoint_id=endpoint_id, code=code, reason=sentence, until=until)


@_harmless
def runs_wait(endpoint_id: str, code: str, sentence: str, seconds: float) -> None:
    """Runs wait for a worker at an endpoint, the first of them for so long."""
    _write(logging.WARNING, "runs_wait", endpoint_id=endpoint_id, ms=_ms(seconds), code=code, reason=sentence)


@_harmless
def crashed(what: str, *, job_id: str | None = None) -> None:
    """A bug: called while the exception is handled; where it was raised goes into the line."""
    _write(logging.ERROR, what, job_id=job_id)


@_harmless
def round_over(*, checked: int, submitted: int, updated: int, seconds: float) -> None:
    """One pass of the pipeline is over; without metrics, one that had nothing to do is not worth a line."""
    counted = metrics.take(Clock().now())
    if counted or checked or submitted or updated:
        _write(logging.INFO, "round", checked=checked, submitted=submitted, updated=updated, ms=_ms(seconds), **counted)
