"""What a create may say, and an upload: read and checked; a RequestError says what to change."""

import hashlib
import json
import re
from typing import Any

from chalice.app import Request

from chalicelib import jobs
from chalicelib.errors import RequestError
from chalicelib.inputs import read_metadata, read_model, whole
from chalicelib.jobs import LOW, NORMAL
from chalicelib.models import MAX_PROMPT_CHARS, PROMPT, Model, Models
from chalicelib.settings import MAX_DEADLINE

MAX_JOBS = 100  # in one create
MIN_DEADLINE = 60  # seconds
MAX_PICTURES = 20  # different ones in one create, which are looked at before it
# The code of what is no address in a field, and the most characters that one may have.
URLS = {"callback_url": ("callback_url_invalid", 2_000), "image_url": ("images_invalid", 4_000)}
JOB_FIELDS = (
    "prompt", "model", "input", "slots", "image_key", "image_url", "callback_url", "metadata", "priority", "deadline",
)  # fmt: skip


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
    from chalicelib import uploads  # here, because few jobs have a picture

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


def _read_priority(priority: object) -> str:
    if priority is None:
        return NORMAL
    if priority not in (NORMAL, LOW):
        raise RequestError("priority_invalid", f"priority must be {NORMAL} or {LOW}.")
    return str(priority)


def _read_deadline(deadline: object) -> int | None:
    if deadline is None:
        return None
    seconds = whole(deadline)
    if seconds is None or not MIN_DEADLINE <= seconds <= MAX_DEADLINE:
        raise RequestError(
            "deadline_invalid",
            f"deadline must be a whole number of seconds from {MIN_DEADLINE} to {MAX_DEADLINE}.",
        )
    return seconds


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


def read_upload(body: dict[str, Any]) -> tuple[str, int]:
    """The type and the size of a picture that is to be uploaded."""
    from chalicelib import uploads

    content_type, size = body.get("content_type"), whole(body.get("bytes"))
    if content_type not in uploads.TYPES:
        raise RequestError("content_type_invalid", f"content_type must be one of {', '.join(uploads.TYPES)}.")
    if size is None or not 1 <= size <= uploads.MAX_BYTES:
        raise RequestError("bytes_invalid", f"bytes must be the size of the picture, 1 to {uploads.MAX_BYTES}.")
    return str(content_type), size
