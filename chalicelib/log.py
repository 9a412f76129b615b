"""What is logged and in which words: one JSON line an event, never a prompt, a key or a signed link."""

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from chalicelib.errors import ServiceError
from chalicelib.jobs import Change, to_text
from chalicelib.runtime import Clock

_logger = logging.getLogger("ob-ai-studio")

# What every line of one request, or of one minute of the schedule, has; threads of the crew have it too.
_invocation: ContextVar[Mapping[str, str]] = ContextVar("invocation", default={})  # noqa: B039


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": to_text(Clock().now()),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_invocation.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _set_up() -> None:
    """Send our lines to standard error, once a process; Chalice's own logger says nothing below ERROR."""
    if _logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def begin(request_id: str) -> None:
    """From here on lines are of this invocation of the Lambda."""
    _set_up()
    _invocation.set({"request_id": request_id})


def add(**more: str) -> None:
    """What is known of it by now."""
    _invocation.set({**_invocation.get(), **more})


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """A request is over. Of its address only the pattern: a callback's own holds a secret, a query what is sought."""
    _write(logging.INFO, "request", method=method, route=route, status=status, ms=round(seconds * 1000))


def _write(level: int, message: str, *, exc_info: bool = False, **fields: Any) -> None:
    _logger.log(
        level,
        message,
        exc_info=exc_info,
        extra={"fields": {name: value for name, value in fields.items() if value is not None}},
    )


def saved(change: Change) -> None:
    """A job has made a move, and it is in the table."""
    _write(
        logging.INFO,
        change.event,
        job_id=change.job.id,
        attempt=change.job.attempt,
        runpod_job_id=change.job.runpod_job_id,
        step_from=change.before.state,
        step_to=change.job.state,
        code=change.error.code if change.error else None,
    )


def told(job_id: str, event: str, status: str, line: Mapping[str, Any]) -> None:
    """A try to tell a callback's receiver of a job's end is over; its address is the caller's own, and not logged."""
    _write(logging.INFO, "callback", job_id=job_id, event=event, outcome=status, status=line["status"], ms=line["ms"])


def failed(what: str, error: ServiceError, *, job_id: str | None = None) -> None:
    """Something did not work that is tried again, or that the caller was told of."""
    _write(logging.WARNING, what, code=error.code, reason=error.sentence, service=error.service or None, job_id=job_id)


def crashed(what: str, *, job_id: str | None = None) -> None:
    """A bug: called while the exception is handled; its traceback goes into the line."""
    _write(logging.ERROR, what, exc_info=True, job_id=job_id)


def round_over(*, checked: int, submitted: int, updated: int, seconds: float) -> None:
    """One pass of the pipeline is over; one that had nothing to do is not worth a line."""
    if checked or submitted or updated:
        _write(logging.INFO, "round", checked=checked, submitted=submitted, updated=updated, seconds=round(seconds, 2))
