"""What a request may say: bodies, queries, ids and cursors, read and checked; a RequestError says what to change."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from chalice.app import Request

from chalicelib import jobs
from chalicelib.errors import RequestError
from chalicelib.jobs import DEFAULT_MODEL, Status
from chalicelib.store import NEWEST

MAX_BODY_BYTES = 512 * 1024
MAX_PROMPT_CHARS = 10_000
MAX_MODEL_CHARS = 200
MAX_ID_CHARS = 200
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
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "body_not_json",
            "The body must be JSON in UTF-8, not nested deep, without half characters, NaN or endless numbers.",
        ) from error
    if not isinstance(body, dict):
        raise RequestError("body_not_object", "The body must be a JSON object.")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_model(body: dict[str, Any]) -> str:
    """The model to draw with."""
    model = body.get("model")
    if model is None:
        return DEFAULT_MODEL
    if not isinstance(model, str) or not model.strip() or len(model) > MAX_MODEL_CHARS or "\0" in model:
        raise RequestError(
            "model_invalid", f"model must be a name of 1 to {MAX_MODEL_CHARS} characters, none of them NUL."
        )
    return model.strip()


def read_prompt_and_input(body: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The prompt to show, and the object for RunPod where it is not the default one."""
    prompt, given = body.get("prompt"), body.get("input")
    if given is None:
        return _read_prompt(prompt), None
    if not isinstance(given, dict):
        raise RequestError("input_invalid", "input must be a JSON object.")
    if prompt is not None:
        prompt = _read_prompt(prompt)
        return prompt, jobs.payload_from(given, prompt)
    if not given:
        raise RequestError(
            "input_invalid", "input must not be empty: no worker takes that. Give it fields, or a prompt."
        )
    inner = given.get("prompt")
    return inner[:MAX_PROMPT_CHARS].replace("\0", "") if isinstance(inner, str) else "", given


def _read_prompt(prompt: object) -> str:
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError("prompt_invalid", "prompt must be text.")
    if prompt is None or not prompt.strip():
        raise RequestError("prompt_required", "prompt is required")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise RequestError(
            "prompt_too_long", f"prompt must have at most {MAX_PROMPT_CHARS} characters; this one has {len(prompt)}."
        )
    if "\0" in prompt:
        raise RequestError("prompt_invalid", "prompt must not contain the NUL character.")
    return prompt


def read_id(job_id: str) -> str:
    """A job id; one that no row can have is not looked for."""
    if len(job_id) > MAX_ID_CHARS:
        raise RequestError("job_not_found", "There is no job with this id.")
    return job_id.strip()


def query_of(request: Request) -> Mapping[str, str]:
    """The query; Chalice has None where there is none."""
    return request.query_params or {}


def read_limit(text: str | None) -> int:
    """How many jobs a page has."""
    if text is None:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LIMIT):
        raise RequestError("limit_invalid", f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    return int(text)


def read_status(text: str | None) -> str | None:
    """The one status to list, if one is asked for."""
    if text is not None and text not in tuple(Status):
        raise RequestError("status_invalid", f"status must be one of {', '.join(Status)}.")
    return text


def read_flag(name: str, text: str | None) -> bool:
    """Whether the query says 1, not 0 or nothing."""
    if text not in (None, "0", "1"):
        raise RequestError("flag_invalid", f"{name} must be 0 or 1.")
    return text == "1"


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


def read_redrive(body: dict[str, Any]) -> tuple[int, tuple[str, str], str | None, bool]:
    """How many dead letters to redrive, after which, of which code, and whether only to say which."""
    limit, dry_run = body.get("limit", DEFAULT_LIMIT), body.get("dry_run", False)
    if type(limit) is not int or not 1 <= limit <= MAX_LIMIT:
        raise RequestError("limit_invalid", f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    if not isinstance(dry_run, bool):
        raise RequestError("dry_run_invalid", "dry_run must be true or false.")
    cursor = body.get("cursor")
    if cursor is not None and not isinstance(cursor, str):
        raise RequestError("cursor_invalid", "cursor must be a next_cursor of an earlier answer.")
    return limit, read_cursor(cursor), read_error_code(body.get("error_code")), dry_run
