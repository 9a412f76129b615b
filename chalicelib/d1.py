"""Cloudflare D1 over its REST API: batches of SQL statements in, rows out."""

import json
import re
from random import Random
from typing import Any

from chalicelib import metrics, retry
from chalicelib.credentials import Credential
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.records import dataclass
from chalicelib.runtime import Clock, Deadline, Until
from chalicelib.wire import Reply, Wire, exchange_as

Row = dict[str, Any]

MAX_STATEMENTS = 50  # D1 documents 100 a query
MAX_PARAMS = 100  # a statement
MAX_BODY_BYTES = 900_000  # the limit of api.cloudflare.com is not documented; a megabyte is known to pass
MAX_ANSWER_BYTES = 32_000_000
# Of Cloudflare's calls, that are for saves alone: an outcome that is not written may be a run that is bought twice.
# Each container knows only what its own last call was told.
LAST_CALLS = 10
WINDOW_SECONDS = 300  # of Cloudflare's, within which it tells something else

# What D1 says, in a 400 of its catch-all code 7500, when the statement itself is not at fault.
# https://developers.cloudflare.com/d1/observability/debug-d1/
NOT_OUR_SQL = (
    r"internal error|network connection lost|storage caused object to be reset|reset because its code was updated"
    r"|cannot resolve d1 db|client disconnected|exceeded timeout|exceeded its (cpu|memory)|memory limit|was reset"
)
# What it says when a value of one row is at fault, so that a batch without that row would be taken.
FAULT_OF_A_ROW = r"SQLITE_CONSTRAINT|SQLITE_TOOBIG|string or blob too big|malformed JSON"
READ_ONLY = r"SQLITE_AUTH"
LACKING = r"no such (table|column): |has no column named"
QUOTA = r"exceeded D1's (free|daily)|daily row (read|write) limit"
# A 429 of D1's own that was refused before it ran; other texts of it speak of a reset in the middle.
NEVER_RAN = r"queued for too long|overloaded|too many requests queued"


@dataclass(frozen=True)
class Statement:
    """One SQL statement with its ?1, ?2… values."""

    sql: str
    params: tuple[str | float | None, ...] = ()


class D1:
    """
    One database. Every batch that is sent here must be one that may be sent twice.

    `calls_left` is what Cloudflare's Ratelimit header last said of the 1,200 calls in five minutes that all of the
    account's tools share; over them it refuses everything for five minutes.
    """

    def __init__(
        self,
        *,
        wire: Wire,
        clock: Clock,
        rng: Random,
        base_url: str,
        account_id: str,
        database_id: str,
        token: Credential[str],
    ) -> None:
        self._wire = wire
        self._clock = clock
        self._rng = rng
        self._url = f"{base_url}/accounts/{account_id}/d1/database/{database_id}/query"
        self._token = token
        self._calls_left = (0, Until(clock, 0))
        self._locked = Until(clock, 0)

    def calls_left(self) -> int | None:
        """Calls left in Cloudflare's present window; None when that is not known, or known of a window that is over."""
        left, until = self._calls_left
        return left if until.left() > 0 else None

    def require_calls(self, number: int) -> None:
        """Raise TransientError, whose retry_after says when there are more, where fewer calls than that are left."""
        left, until = self._calls_left
        if until.left() > 0 and left < number:
            metrics.tell("D1CallsLeft", left)
            raise TransientError(
                "d1_few_calls",
                f"Only {left} of Cloudflare's API calls are left for now, which are kept for what cannot wait.",
                service="d1",
                retry_after=until.left(),
            )

    def query(self, statements: list[Statement], *, timeout: float, to_the_last: bool = False) -> list[list[Row]]:
        """
        Run the statements as one transaction; the rows of each.

        Failures after which a repeat may help are repeated while the `timeout`, in seconds for all tries, lasts. Of
        Cloudflare's calls the last ones are made only where that is said. Raises TransientError, IndeterminateError or
        PermanentError.
        """
        body = _encode(statements)
        deadline = Deadline(self._clock, timeout)
        doubt = False
        for failures in range(1, retry.CALL_ATTEMPTS + 1):
            try:
                return self._query_once(body, len(statements), deadline, to_the_last)
            except ServiceError as error:
                doubt = doubt or isinstance(error, IndeterminateError)
                wait = retry.seconds_to_wait(retry.CALL, failures, rng=self._rng, retry_after=error.retry_after)
                last = failures == retry.CALL_ATTEMPTS or wait + 1 > deadline.left()
                if last or isinstance(error, PermanentError):
                    if doubt and error.code != "d1_row":  # a faulty row was refused by every try
                        raise _in_doubt(error) from error
                    raise
                self._clock.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _query_once(self, body: bytes, count: int, deadline: Deadline, to_the_last: bool) -> list[list[Row]]:
        locked_for = self._locked.left()
        if locked_for > 0:  # a call now would be refused, and might prolong it
            metrics.tell("D1CallsLeft", 0)
            raise _rate_limited(locked_for)
        self.require_calls(0 if to_the_last else LAST_CALLS)
        metrics.count("D1Calls")
        reply = exchange_as(
            self._token,
            self._wire,
            "d1",
            "POST",
            self._url,
            headers={"Content-Type": "application/json"},
            body=body,
            timeout=deadline.cap(_one_try(deadline)),
            within=deadline.left(),
            max_bytes=MAX_ANSWER_BYTES,
        )
        self._watch_rate(reply)
        return _rows(reply, count)

    def _watch_rate(self, reply: Reply) -> None:
        # ratelimit: "default";r=1199;t=1 - calls left, and seconds until the window is over
        if limit := re.search(r"\br=(\d+).*?\bt=(\d+)", reply.headers.get("ratelimit", "")):
            self._calls_left = (int(limit[1]), Until(self._clock, min(int(limit[2]), WINDOW_SECONDS)))
            metrics.tell("D1CallsLeft", int(limit[1]))
        if reply.status == 429 and reply.retry_after is not None:
            self._locked = Until(self._clock, reply.retry_after)
            metrics.tell("D1CallsLeft", 0)


def _in_doubt(error: ServiceError) -> IndeterminateError:
    """The error of the last try, after an earlier one that may have taken effect."""
    return IndeterminateError(error.code, error.sentence, service=error.service, retry_after=error.retry_after)


def _one_try(deadline: Deadline) -> float:
    """Seconds for one try: most of what is left, so that a stalled one leaves time for another."""
    return max(3.0, deadline.left() * 0.6)


def _encode(statements: list[Statement]) -> bytes:
    too_many_params = any(len(statement.params) > MAX_PARAMS for statement in statements)
    # Lone surrogates, which a worker's text may hold, have no UTF-8 form.
    body = json.dumps(
        {"batch": [{"sql": statement.sql, "params": list(statement.params)} for statement in statements]},
        ensure_ascii=False,
    ).encode("utf-8", "replace")
    if too_many_params or len(statements) > MAX_STATEMENTS or len(body) > MAX_BODY_BYTES:
        raise PermanentError(
            "d1_request_too_large",
            f"A D1 request of {len(statements)} statements and {len(body)} bytes is over the limit.",
            service="d1",
        )
    return body


def _rows(reply: Reply, count: int) -> list[list[Row]]:
    try:
        envelope = json.loads(reply.body)
    except ValueError:
        envelope = None
    if not isinstance(envelope, dict):
        envelope = {}
    result = envelope.get("result")
    if reply.status == 200 and envelope.get("success") is True and isinstance(result, list) and len(result) == count:
        rows = [part["results"] for part in result if isinstance(part, dict) and isinstance(part.get("results"), list)]
        if len(rows) == count:
            return rows
    raise _failure(reply, envelope)


def _failure(reply: Reply, envelope: dict[str, Any]) -> ServiceError:
    errors = envelope.get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    message = str(first.get("message", ""))[:500]
    said = f": {message}" if message else ""
    if reply.status == 429:
        return _overloaded(reply, first.get("code"), message)
    if first.get("code") == 7403:
        return PermanentError(
            "d1_account", f"D1 does not let this token into this account (HTTP {reply.status}{said}).", service="d1"
        )
    if reply.status in (401, 403):
        return PermanentError("d1_unauthorized", f"D1 refused the token (HTTP {reply.status}{said}).", service="d1")
    if reply.status == 404:
        return PermanentError("d1_not_found", f"D1 does not know the database (HTTP 404{said}).", service="d1")
    if 400 <= reply.status < 500 and message:
        return _refused(message)
    return IndeterminateError(
        "d1_bad_answer", f"D1 gave no usable answer (HTTP {reply.status}).", service="d1", retry_after=reply.retry_after
    )


def _says(message: str, pattern: str) -> bool:
    return re.search(pattern, message, re.IGNORECASE) is not None


def _overloaded(reply: Reply, code: object, message: str) -> ServiceError:
    if code == 7429 and not _says(message, NEVER_RAN):
        return IndeterminateError(
            "d1_reset", f"D1 was reset while it worked: {message}", service="d1", retry_after=reply.retry_after
        )
    return _rate_limited(reply.retry_after)


def _rate_limited(retry_after: float | None) -> TransientError:
    return TransientError(
        "d1_rate_limited", "Cloudflare is refusing API calls for a while.", service="d1", retry_after=retry_after
    )


def _refused(message: str) -> ServiceError:
    if _says(message, QUOTA):
        return TransientError("d1_quota", f"D1's daily quota is used up: {message}", service="d1", retry_after=900)
    if _says(message, NEVER_RAN):
        return TransientError("d1_overloaded", f"D1 is overloaded: {message}", service="d1")
    if _says(message, NOT_OUR_SQL):
        return IndeterminateError("d1_internal", f"D1 failed inside: {message}", service="d1")
    if _says(message, READ_ONLY):
        return PermanentError("d1_read_only", f"D1 lets this token only read: {message}", service="d1")
    if _says(message, LACKING):
        return PermanentError(
            "d1_schema",
            f"The database lacks what the code needs ({message}); run `python -m tools.schema`.",
            service="d1",
        )
    code = "d1_row" if _says(message, FAULT_OF_A_ROW) else "d1_sql"
    return PermanentError(code, f"D1 refused the statement: {message}", service="d1")
