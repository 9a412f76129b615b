"""Which jobs a request means: the filter of the list and of verbs for many, read and checked."""

from datetime import UTC, datetime
from typing import Any

from chalice.app import MultiDict

from chalicelib import inputs
from chalicelib.errors import RequestError
from chalicelib.jobs import Status, from_text, to_text
from chalicelib.reads import Filter
from chalicelib.verbs import MEANT_FOR

MAX_TEXT_CHARS = 200
FIELDS = ("status", "model", "created_after", "created_before", "metadata", "q")
PARAMETERS = ("status", "model", "created_after", "created_before", "q", "limit", "cursor", "include")
OF_BULK = ("do", "filter", "limit", "cursor", "dry_run")
METADATA = "metadata."  # begins the names of a query that stand for one word of the metadata


def from_query(query: MultiDict) -> Filter:
    """The filter in a query. Raises RequestError."""
    metadata = {name.removeprefix(METADATA): query[name] for name in query if name.startswith(METADATA)}
    if unknown := [name for name in query if name not in PARAMETERS and not name.startswith(METADATA)]:
        raise RequestError(
            "query_invalid",
            f"There is no parameter {unknown[0][:40]!r} here; there are {', '.join(PARAMETERS)} and {METADATA}NAME.",
        )
    if repeated := [name for name in query if name != "status" and len(query.getlist(name)) > 1]:
        raise RequestError("query_invalid", f"{repeated[0]} stands in the query more than once.")
    given = {name: query[name] for name in FIELDS if name in query}
    if "status" in query:
        given["status"] = [status for text in query.getlist("status") for status in text.split(",")]
    return _read({**given, **({"metadata": metadata} if metadata else {})})


def read_bulk(body: dict[str, Any]) -> tuple[str, Filter]:
    """What to do to the jobs of which filter. Raises RequestError."""
    if unknown := [name for name in body if name not in OF_BULK]:
        raise RequestError(
            "filter_invalid", f"There is no field {unknown[0][:40]!r} here; there are {', '.join(OF_BULK)}."
        )
    do, given = body.get("do"), body.get("filter")
    if not isinstance(do, str) or do not in MEANT_FOR:
        raise RequestError("do_invalid", f"do must be one of {', '.join(MEANT_FOR)}.")
    if not isinstance(given, dict):
        raise RequestError("filter_invalid", "filter must be a JSON object.")
    if unknown := [name for name in given if name not in FIELDS]:
        raise RequestError("filter_invalid", f"filter has no field {unknown[0][:40]!r}; there are {', '.join(FIELDS)}.")
    given = {name: value for name, value in given.items() if value is not None and (name, value) != ("metadata", {})}
    if not given:
        raise RequestError("filter_invalid", "filter must have at least one field, so that not all jobs are meant.")
    return do, _read(given)


def _read(given: dict[str, Any]) -> Filter:
    statuses, after, before = given.get("status"), given.get("created_after"), given.get("created_before")
    chosen: dict[str, Any] = {}
    if statuses is not None:
        chosen["statuses"] = _read_statuses(statuses)
    if "model" in given:
        chosen["model"] = inputs.read_model(given["model"])
    if after is not None:
        chosen["created_after"] = _read_moment("created_after", after)
    if before is not None:
        chosen["created_before"] = _read_moment("created_before", before)
    metadata = inputs.read_metadata(given.get("metadata"))
    return Filter(**chosen, metadata=tuple(sorted(metadata.items())), text=_read_text(given.get("q")))


def _read_statuses(given: object) -> tuple[str, ...]:
    asked = given if isinstance(given, list) else [given]
    if not asked or not all(isinstance(status, str) and status in tuple(Status) for status in asked):
        raise RequestError("status_invalid", f"status must be one or several of {', '.join(Status)}.")
    return tuple(status for status in Status if status in asked)


def _read_moment(name: str, given: object) -> str:
    try:
        if not isinstance(given, str):
            raise ValueError("no text")
        moment = from_text(given).astimezone(UTC)
        if not datetime(1970, 1, 1, tzinfo=UTC) <= moment < datetime(9999, 1, 1, tzinfo=UTC):
            raise ValueError("out of range")
    except (ValueError, OverflowError) as error:
        raise RequestError(
            "created_invalid", f"{name} must be a time like 2026-11-30T12:00:00Z, or a day; write + as %2B in a URL."
        ) from error
    return to_text(moment)


def _read_text(given: object) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given.strip() or len(given) > MAX_TEXT_CHARS or "\0" in given:
        raise RequestError("q_invalid", f"q must be text of 1 to {MAX_TEXT_CHARS} characters, none of them NUL.")
    return given.strip()
