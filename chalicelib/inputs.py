"""What a request may say: bodies, queries, ids and cursors, read and checked; a RequestError says what to change."""

import base64
import binascii
import hashlib
import json
import re
from typing import Any

from chalice.app import MultiDict, Request

from chalicelib import jobs, uploads
from chalicelib.errors import RequestError, no_such_job
from chalicelib.jobs import DEFAULT_MODEL, LOW, NORMAL
from chalicelib.models import MAX_PROMPT_CHARS, PROMPT, Model, Models
from chalicelib.settings import MAX_DEADLINE
from chalicelib.store import NEWEST

MAX_BODY_BYTES = 512 * 1024
MAX_DEPTH = 100  # objects and lists in each other; what reads them on the way recurses
MAX_MODEL_CHARS = 200
MAX_ID_CHARS = 200
MAX_JOBS = 100  # in one create
MAX_METADATA, MAX_METADATA_CHARS = 20, 500
METADATA_KEY = r"[A-Za-z0-9_.-]{1,40}"
MIN_DEADLINE = 60  # seconds
MAX_PICTURES = 20  # different ones in one create, which are looked at before it
# The code of what is no address in a field, and the most characters that one may have.
URLS = {"callback_url": ("callback_url_invalid", 2_000), "image_url": ("images_invalid", 4_000)}
MAX_DAYS, DEFAULT_DAYS = 90, 7  # of the figures
JOB_FIELDS = (
    "prompt", "model", "input", "slots", "image_key", "image_url", "callback_url", "metadata", "priority", "deadline",
)  # fmt: skip
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


def read_new_jobs(body: dict[str, Any], models: Models) -> tuple[list[dict[str, Any]], bool]:
    """What each job to be made shall be, as keywords of Pipeline.new_job, and whether it is a list that was sent."""
    listed = body.get("jobs")
    if listed is None:
        return [_read_new_job(body, models)], False
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_JOBS:
        raise RequestError("jobs_invalid", f"jobs must be a list of 1 to {MAX_JOBS} jobs.")
    if beside := [name for name in JOB_FIELDS if body.get(name) is not None]:
        raise RequestError("jobs_invalid", f"{beside[0]} must stand in the jobs themselves where jobs is sent.")
    read = [_read_listed(number, item, models) for number, item in enumerate(listed)]
    if len({picture for job in read for picture in job["pictures"]}) > MAX_PICTURES:
        raise RequestError("images_invalid", f"The jobs must have at most {MAX_PICTURES} different pictures together.")
    return read, True


def _read_listed(number: int, item: object, models: Models) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RequestError("jobs_invalid", f"jobs[{number}] must be a JSON object.")
    try:
        return _read_new_job(item, models)
    except RequestError as error:
        raise RequestError(error.code, f"jobs[{number}]: {error.sentence}") from error


def _read_new_job(body: dict[str, Any], models: Models) -> dict[str, Any]:
    model = models.require(read_model(body.get("model")))
    return {
        **_read_for_runpod(body, model),
        "model": model.name,
        "callback_url": _read_url("callback_url", body.get("callback_url")),
        "metadata": read_metadata(body.get("metadata")),
        "priority": _read_priority(body.get("priority")),
        "deadline": _read_deadline(body.get("deadline")),
    }


def _read_for_runpod(body: dict[str, Any], model: Model) -> dict[str, Any]:
    """What RunPod gets: the caller's own input, or the values for the model's, or the default one."""
    if body.get("input") is None and model.template is not None:
        return _read_for_template(body, model)
    kind = "with an input of its own" if body.get("input") is not None else "without a template"
    if given := [name for name in ("slots", "image_key", "image_url") if body.get(name) not in (None, {}, [])]:
        raise RequestError(
            "slots_invalid" if given[0] == "slots" else "images_invalid",
            f"{given[0]} is for models that have a template (see /api/models); this is a job {kind}.",
        )
    prompt, payload = _read_prompt_and_input(body)
    return {"prompt": prompt, "payload": payload, "pictures": ()}


def _read_for_template(body: dict[str, Any], model: Model) -> dict[str, Any]:
    slots = body.get("slots")
    if not isinstance(slots, dict | None):
        raise RequestError("slots_invalid", "slots must be a JSON object with the values by their names.")
    if any("\0" in value for value in (slots or {}).values() if isinstance(value, str)):
        raise RequestError("slots_invalid", "A value in slots must not contain the NUL character.")
    optional = "default" in model.slots.get(PROMPT, {"default": ""})
    prompt = "" if optional and body.get("prompt") is None else _read_prompt(body.get("prompt"))
    return {
        "prompt": prompt,
        "payload": None,
        "slots": model.read(prompt, slots or {}),
        "pictures": _read_pictures(body, model),
    }


def _read_pictures(body: dict[str, Any], model: Model) -> tuple[str, ...]:
    """The keys of uploaded pictures, and links to others, in the order of the model's slots for them."""
    keys = [_read_key(key) for key in _as_list(body.get("image_key"))]
    links = [_read_url("image_url", url) or "" for url in _as_list(body.get("image_url"))]
    if len(keys) + len(links) != len(model.pictures):
        number = len(model.pictures)
        takes = "no picture" if number == 0 else "1 picture" if number == 1 else f"{number} pictures"
        raise RequestError(
            "images_invalid",
            f"{model.name} takes {takes}, in image_key or image_url; this has {len(keys) + len(links)}.",
        )
    return (*keys, *links)


def _as_list(given: object) -> list[object]:
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def _read_key(key: object) -> str:
    if not isinstance(key, str) or not re.fullmatch(rf"{uploads.PREFIX}[0-9a-f/-]{{10,80}}", key):
        raise RequestError("images_invalid", "image_key must be a key from POST /api/uploads, or a list of such.")
    return key


def _read_url(name: str, url: object) -> str | None:
    if url is None and name == "callback_url":
        return None
    code, most = URLS[name]
    if not isinstance(url, str) or not re.match(r"https?://", url, re.IGNORECASE) or len(url) > most:
        raise RequestError(code, f"{name} must be an http(s) address of at most {most} characters.")
    return url


def read_upload(body: dict[str, Any]) -> tuple[str, int]:
    """The type and the size of a picture that is to be uploaded."""
    content_type, size = body.get("content_type"), _whole(body.get("bytes"))
    if content_type not in uploads.TYPES:
        raise RequestError("content_type_invalid", f"content_type must be one of {', '.join(uploads.TYPES)}.")
    if size is None or not 1 <= size <= uploads.MAX_BYTES:
        raise RequestError("bytes_invalid", f"bytes must be the size of the picture, 1 to {uploads.MAX_BYTES}.")
    return str(content_type), size


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


def _read_prompt_and_input(body: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
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


def _read_priority(priority: object) -> str:
    if priority is None:
        return NORMAL
    if priority not in (NORMAL, LOW):
        raise RequestError("priority_invalid", f"priority must be {NORMAL} or {LOW}.")
    return str(priority)


def _read_deadline(deadline: object) -> int | None:
    if deadline is None:
        return None
    seconds = _whole(deadline)
    if seconds is None or not MIN_DEADLINE <= seconds <= MAX_DEADLINE:
        raise RequestError(
            "deadline_invalid",
            f"deadline must be a whole number of seconds from {MIN_DEADLINE} to {MAX_DEADLINE}.",
        )
    return seconds


def _whole(given: object) -> int | None:
    """The whole number that this is, None where it is none; JSON does not tell 60.0 from 60."""
    if isinstance(given, bool) or not isinstance(given, int | float) or given != int(given):
        return None
    return int(given)


def read_idempotency_key(request: Request) -> str | None:
    """What the caller names this create, if anything."""
    key: str | None = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[!-~]([ -~]{0,253}[!-~])?", key):
        raise RequestError(
            "idempotency_key_invalid", "Idempotency-Key must have 1 to 255 printable ASCII characters, such as a UUID."
        )
    return key


def hash_of(body: dict[str, Any]) -> str:
    """The same for the same JSON, however it is written; null is left out where a field of a job is."""
    said = _without_nulls(body)
    if isinstance(body.get("jobs"), list):
        said["jobs"] = [_without_nulls(job) for job in body["jobs"]]
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


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
    limit = DEFAULT_LIMIT if given is None else _whole(given)
    if limit is None or not 1 <= limit <= MAX_LIMIT:
        raise RequestError("limit_invalid", f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    if dry_run is not None and not isinstance(dry_run, bool):
        raise RequestError("dry_run_invalid", "dry_run must be true or false.")
    if cursor is not None and not isinstance(cursor, str):
        raise RequestError("cursor_invalid", "cursor must be a next_cursor of an earlier answer.")
    return limit, read_cursor(cursor), bool(dry_run)
