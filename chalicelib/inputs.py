"""What a request may say: bodies, queries, ids and cursors, read and checked; a RequestError says what to change."""

import base64
import binascii
import json
import re
from typing import Any

from chalice.app import MultiDict, Request

from chalicelib.errors import RequestError, no_such_job
from chalicelib.jobs import DEFAULT_MODEL, NEWEST

MAX_BODY_BYTES = 512 * 1024
MAX_DEPTH = 100  # objects and lists in each other; what reads them on the way recurses
MAX_MODEL_CHARS = 200
MAX_ID_CHARS = 200
MAX_METADATA, MAX_METADATA_CHARS = 20, 500
METADATA_KEY = r"[A-Za-z0-9_.-]{1,40}"
MAX_DAYS, DEFAULT_DAYS = 90, 7  # of the figures
DEFAULT_LIMIT, MAX_LIMIT = 50, 100


def read_body(request: Request, *, empty_is: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body as an object; an empty one is `empty_is`, if that is given."""
    raw = request.raw_body
    if len(raw) > MAX_BODY_BYTES:
        raise RequestError("body_too_large", f"The body is over {MAX_BODY_BYTES // 1024} kB.")
    if not raw.strip() and empty_is is not None:
        return empty_is
    try:
        body = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"), parse_constant=_no_constant)
        # Refuses numbers that overflow to infinity and halves of characters, neither of which can be stored.
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode("utf-8")
        if _is_deep(body, MAX_DEPTH):
            raise ValueError("nested too deep")
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "body_not_json",
            f"The body must be JSON in UTF-8, {MAX_DEPTH} levels deep at most, without half characters or NaN.",
        ) from error
    if not isinstance(body, dict):
        raise RequestError("body_not_object", "The body must be a JSON object.")
    return body


def _is_deep(value: object, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(_is_deep(one, left - 1) for one in inner)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_days(text: str | None) -> int:
    """How many days the figures are of."""
    if text is None:
        return DEFAULT_DAYS
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_DAYS):
        raise RequestError("days_invalid", f"days must be a whole number from 1 to {MAX_DAYS}.")
    return int(text)


def read_model(model: object) -> str:
    """The model, or the default one."""
    if model is None:
        return DEFAULT_MODEL
    if not isinstance(model, str) or not model.strip() or len(model) > MAX_MODEL_CHARS or "\0" in model:
        raise RequestError(
            "model_invalid", f"model must be a name of 1 to {MAX_MODEL_CHARS} characters, none of them NUL."
        )
    return model.strip()


def read_metadata(metadata: object) -> dict[str, str]:
    """The caller's own words about a job; none where they are left out."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise RequestError("metadata_invalid", f"metadata must be a JSON object of at most {MAX_METADATA} texts.")
    for key, value in metadata.items():
        _check_metadata(key, value)
    return metadata


def _check_metadata(key: str, value: object) -> None:
    if not re.fullmatch(METADATA_KEY, key):
        raise RequestError(
            "metadata_invalid", "A name in metadata must have 1 to 40 letters, digits, dots, dashes and underscores."
        )
    if not isinstance(value, str) or len(value) > MAX_METADATA_CHARS or "\0" in value:
        raise RequestError(
            "metadata_invalid",
            f"metadata.{key} must be text of at most {MAX_METADATA_CHARS} characters, none of them NUL.",
        )


def whole(given: object) -> int | None:
    """The whole number that this is, None where it is none; JSON does not tell 60.0 from 60."""
    if isinstance(given, bool) or not isinstance(given, int | float) or given != int(given):
        return None
    return int(given)


def read_wait(request: Request) -> int | None:
    """The seconds that the caller would wait for a job's end; what is not understood counts for nothing (RFC 7240)."""
    for preference in request.headers.get("prefer", "").split(","):
        if found := re.fullmatch(r'\s*wait\s*=\s*"?(\d{1,6})"?\s*(;.*)?', preference, flags=re.IGNORECASE):
            return int(found[1])
    return None


def read_id(job_id: str) -> str:
    """A job id; one that no row can have is not looked for."""
    if len(job_id) > MAX_ID_CHARS:
        raise no_such_job()
    return job_id.strip()


def query_of(request: Request) -> MultiDict:
    """The query; Chalice has None where there is none."""
    return request.query_params or MultiDict({})


def read_limit(text: str | None) -> int:
    """How many jobs a page has."""
    if text is None:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LIMIT):
        raise RequestError("limit_invalid", f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    return int(text)


def read_flag(name: str, text: str | None) -> bool:
    """Whether the query says 1, not 0 or nothing."""
    if text not in (None, "0", "1"):
        raise RequestError("flag_invalid", f"{name} must be 0 or 1.")
    return text == "1"


def read_include(text: str | None, what: str) -> bool:
    """Whether the query wants this in the answer too, which is all that it may want."""
    if text not in (None, what):
        raise RequestError("include_invalid", f"include must be {what}.")
    return text is not None


def read_cursor(text: str | None) -> tuple[str, str]:
    """The (created_at, id) after which the page begins."""
    if text is None:
        return NEWEST
    try:
        words = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        if not isinstance(words, list) or [type(word) for word in words] != [str, str]:
            raise ValueError("not two strings")
        "".join(words).encode("utf-8")
    except (ValueError, RecursionError, binascii.Error) as error:
        raise RequestError("cursor_invalid", "cursor must be a next_cursor of an earlier answer.") from error
    return words[0], words[1]


def make_cursor(at: str | None, job_id: str) -> str:
    """Where the next page begins."""
    return base64.urlsafe_b64encode(json.dumps([at, job_id]).encode()).decode().rstrip("=")


def read_error_code(text: object) -> str | None:
    """The one code that dead letters shall have, if one is asked for."""
    if text is not None and not (isinstance(text, str) and re.fullmatch("[a-z0-9_]{1,60}", text)):
        raise RequestError(
            "error_code_invalid", "error_code must be a code as the dead letters have it, such as r2_failed."
        )
    return text


def read_redrive(body: dict[str, Any]) -> tuple[int, tuple[str, str], bool, str | None]:
    """How many dead letters to redrive, after which, of which code, and whether only to say which."""
    return (*read_many(body), read_error_code(body.get("error_code")))


def read_many(body: dict[str, Any]) -> tuple[int, tuple[str, str], bool]:
    """How many jobs, after which, and whether only to say which."""
    given, dry_run, cursor = body.get("limit"), body.get("dry_run"), body.get("cursor")
    limit = DEFAULT_LIMIT if given is None else whole(given)
    if limit is None or not 1 <= limit <= MAX_LIMIT:
        raise RequestError("limit_invalid", f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    if dry_run is not None and not isinstance(dry_run, bool):
        raise RequestError("dry_run_invalid", "dry_run must be true or false.")
    if cursor is not None and not isinstance(cursor, str):
        raise RequestError("cursor_invalid", "cursor must be a next_cursor of an earlier answer.")
    return limit, read_cursor(cursor), bool(dry_run)
