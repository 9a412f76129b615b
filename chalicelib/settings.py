"""The settings: environment variables, read in one place on first use, never at import."""

import base64
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

from chalicelib import auth, parameters
from chalicelib.auth import ApiKey
from chalicelib.errors import ServiceError, SettingError
from chalicelib.records import dataclass

MAX_DEADLINE = 7 * 86_400  # seconds
ENV_FILE = Path(__file__).parent.parent / ".env.local"


def _text(value: str) -> str:
    return value


def _key(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value) or value[0] in "\"'":
        raise ValueError("the key itself, without spaces, quotes or `Bearer`")
    return value


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9._-]+(:[0-9]{1,5})?(/[^\s?#]*)?", value):
        raise ValueError("an http(s) URL without query")
    return value.rstrip("/")


def _url_or_empty(value: str) -> str:
    return value and _url(value)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise ValueError("made of letters, digits, dots, dashes and underscores")
    return value


def _flag(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return value.lower() == "true"


def _count(value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise ValueError("a whole number of 1 or more")
    return int(value)


def _bound(value: str) -> int:
    return 0 if value == "0" else _count(value)


def _wait(value: str) -> int:
    if _count(value) < 60:
        raise ValueError("60 or more: a call may still be under way for that long")
    return int(value)


def _deadline(value: str) -> int:
    if not 60 <= _count(value) <= MAX_DEADLINE:
        raise ValueError(f"60 to {MAX_DEADLINE}, which is what RunPod takes")
    return int(value)


def _days(value: str) -> int:
    if value != "0" and not 2 <= _count(value) <= 36_500:
        raise ValueError("0, or 2 to 36500: what is told of a job's end may take more than a day")
    return int(value)


def _secret(value: str) -> str:
    if value and len(value) < 16:
        raise ValueError("16 characters or more, hard to guess")
    return value


def _callback_secrets(value: str) -> tuple[str, ...]:
    secrets = tuple(part.strip() for part in value.split(",") if part.strip())
    for secret in secrets:
        if not 24 <= len(_decoded(secret)) <= 64:
            raise ValueError(
                "whsec_ and 24 to 64 random bytes in base64, as `echo whsec_$(openssl rand -base64 32)` makes"
            )
    return secrets


def _decoded(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True) if secret.startswith("whsec_") else b""
    except ValueError:
        return b""


def _name_or_empty(value: str) -> str:
    return value and _name(value)


def _parts(value: str) -> frozenset[str]:
    return frozenset(part.strip() for part in value.split(",") if part.strip())


def _hosts(value: str) -> frozenset[str]:
    hosts = _parts(value)
    if not all(re.fullmatch(r"[^\s:]+:[0-9]{1,5}", host) for host in hosts):
        raise ValueError("a comma-separated list of host:port")
    return hosts


def _setting(
    about: str, parse: Callable[[str], Any] = _text, *, default: str | None = None, secret: bool = False
) -> Any:
    metadata = {"about": about, "parse": parse, "default": default, "secret": secret}
    return field(metadata=metadata) if default is None else field(default=parse(default), metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Every setting; a field's environment variable is its name in capitals."""

    runpod_api_key: str = _setting("RunPod API key", _key, secret=True)
    runpod_endpoint_id: str = _setting("The serverless endpoint that draws", _name)
    runpod_api_base: str = _setting("RunPod's queue API", _url, default="https://api.runpod.ai/v2")
    cloudflare_account_id: str = _setting("Cloudflare account that has the D1 database and the R2 bucket", _name)
    cloudflare_api_token: str = _setting("API token with D1 Write", _key, secret=True)
    d1_database_id: str = _setting("Id of the D1 database", _name)
    cloudflare_api_base: str = _setting("Cloudflare's API", _url, default="https://api.cloudflare.com/client/v4")
    r2_bucket: str = _setting("Bucket for the pictures", _name, default="ob-ai-results")
    r2_access_key_id: str = _setting("Access key of an R2 token that may write the bucket", _key)
    r2_secret_access_key: str = _setting("Its secret", _key, secret=True)
    r2_endpoint_url: str = _setting("R2's S3 endpoint; empty: made from the account id", _url_or_empty, default="")
    r2_public_base_url: str = _setting(
        "Where the bucket is public; result_url is this and the key. Empty: the bucket is private, and every answer "
        "has links made for it that hold for 40 minutes or more",
        _url_or_empty,
        default="",
    )
    api_key_hashes: tuple[ApiKey, ...] = _setting(
        "Comma-separated accepted API keys, each as name:hash:right; a bare SHA-256 hash may do all. Empty: every "
        "request is refused",
        auth.read_entries,
        default="",
    )
    allow_anonymous: bool = _setting(
        "`true` opens create and status to callers without a key, for the time of a move", _flag, default="false"
    )
    result_allowed_private_hosts: frozenset[str] = _setting(
        "Comma-separated host:port that a link may lead to although private: a worker's, an image_url, a callback_url; "
        "for development",
        _hosts,
        default="",
    )
    submit_unknown_wait: int = _setting(
        "Seconds to wait after a lost answer to a paid /run before it is sent again", _wait, default="600"
    )
    max_attempts: int = _setting("Attempts of a job whose run RunPod itself lost or timed out", _count, default="2")
    retry_worker_failed: bool = _setting(
        "`true` gives a run that the worker itself failed another attempt too, up to MAX_ATTEMPTS",
        _flag,
        default="false",
    )
    start_deadline: int = _setting(
        "Seconds that a run may wait at RunPod for a worker; then it is cancelled", _deadline, default="3600"
    )
    run_deadline: int = _setting(
        "Seconds that a worker may take for a run; RunPod is told, over what the endpoint itself has",
        _deadline,
        default="1800",
    )
    total_deadline: int = _setting(
        "Seconds within which a job must have been drawn, all waiting and attempts included", _deadline, default="86400"
    )
    max_running: int = _setting(
        "Runs that RunPod may have at once, waiting or drawing; further jobs wait in our queue, where a cancel costs "
        "nothing. 0: nothing is sent",
        _bound,
        default="10000",
    )
    max_queued: int = _setting(
        "Jobs that may be unfinished at once, queued or running; a create beyond that is refused with 429",
        _count,
        default="10000",
    )
    retention_days: int = _setting(
        "Days after its end from which on a job is removed with its files, 2 or more, but no dead letter; 0: all are "
        "kept for good",
        _days,
        default="0",
    )
    public_base_url: str = _setting(
        "Where RunPod reaches this API, to tell of a run's end; empty: every end is found by polling",
        _url_or_empty,
        default="",
    )
    webhook_secret: str = _setting(
        "A secret of 16 characters or more for the addresses that RunPod is given; empty: none are given",
        _secret,
        default="",
        secret=True,
    )
    callback_secrets: tuple[str, ...] = _setting(
        "Comma-separated secrets, whsec_ and base64, each of which signs every callback; empty: none can be asked for",
        _callback_secrets,
        default="",
        secret=True,
    )
    skip_idle_rounds: bool = _setting(
        "`true` ends a minute's run of the schedule after a round that finds no unfinished job: it costs least, but "
        "the next job is looked at up to 45 s later, if RunPod does not tell of its end",
        _flag,
        default="false",
    )
    service_name: str = _setting(
        "Names this deployment in its metrics; `./deploy` sets it to the stack's name. Empty: no metrics are written",
        _name_or_empty,
        default="",
    )
    spool_bucket: str = _setting(
        "AWS S3 bucket where finished pictures wait while R2 fails; empty: they wait at RunPod, half an hour at most",
        _name_or_empty,
        default="",
    )

    @property
    def picture_urls(self) -> tuple[str, str]:
        """What the addresses of all pictures begin with: what is read, and what is signed; the first may be empty."""
        return self.r2_public_base_url, self.r2_endpoint

    @property
    def r2_endpoint(self) -> str:
        """The S3 endpoint to use."""
        return self.r2_endpoint_url or f"https://{self.cloudflare_account_id}.r2.cloudflarestorage.com"


Texts = dict[Field[Any], str]

SECRETS = frozenset(entry.name.upper() for entry in fields(Settings) if entry.metadata["secret"])


def load(environ: Mapping[str, str] = os.environ, *, env_file: Path | None = None, only: str = "") -> Settings:
    """
    The settings from the environment and, outside Lambda, from the file, over which the environment wins.

    A value `ssm:/name` is read from SSM Parameter Store. With `only`, a regular expression, settings whose names it
    does not match are left alone, and are empty where they have no default. Raises SettingError, whose sentence names
    the first setting that is missing or malformed, and as parameters.read() does.
    """
    texts = _texts(given(environ, env_file=env_file), re.compile(only))
    _require(texts)
    return Settings(**{**_empty(), **_parse(_read(texts))})


def given(environ: Mapping[str, str] = os.environ, *, env_file: Path | None = None) -> dict[str, str]:
    """What the environment and, outside Lambda, the file say, setting or not. Raises as read_env_file() does."""
    in_file = read_env_file(env_file or ENV_FILE) if "AWS_LAMBDA_FUNCTION_NAME" not in environ else {}
    return {**in_file, **environ}


def check(values: Mapping[str, str]) -> None:
    """Raises SettingError as load() does, as far as it can be told without asking SSM Parameter Store."""
    texts = _texts(values, re.compile(""))
    _require(texts)
    _parse({entry: text for entry, text in texts.items() if not text.startswith(parameters.PREFIX)})


def survey(values: Mapping[str, str]) -> tuple[Settings, dict[str, ServiceError]]:
    """Every setting by itself: those that are right, the others empty or at their defaults, and what is wrong there."""
    parsed = _empty()
    wrong: dict[str, ServiceError] = {}
    for entry, text in _texts(values, re.compile("")).items():
        try:
            _require({entry: text})
            parsed |= _parse(_read({entry: text}))
        except ServiceError as error:
            wrong[entry.name.upper()] = error
    return Settings(**parsed), wrong


def _empty() -> dict[str, Any]:
    return {entry.name: "" for entry in fields(Settings) if entry.default is MISSING}


def _texts(values: Mapping[str, str], wanted: re.Pattern[str]) -> Texts:
    return {
        entry: values.get(entry.name.upper(), "").strip()
        for entry in fields(Settings)
        if wanted.match(entry.name.upper())
    }


def _read(texts: Texts) -> Texts:
    """The texts, with what SSM Parameter Store has in the place of what only names it."""
    named = {
        entry: text.removeprefix(parameters.PREFIX).strip()
        for entry, text in texts.items()
        if text.startswith(parameters.PREFIX)
    }
    found = parameters.read(named.values())
    for entry, name in named.items():
        if not found.get(name, "").strip():
            raise SettingError(
                "setting_missing",
                f"Setting {entry.name.upper()} names the SSM parameter {name}, which is not there. Put it there, in "
                "the account and region of the function.",
            )
    return {**texts, **{entry: found[name].strip() for entry, name in named.items()}}


def _parse(texts: Texts) -> dict[str, Any]:
    values = {}
    for entry, text in texts.items():
        try:
            if text:
                values[entry.name] = entry.metadata["parse"](text)
        except ValueError as error:
            name = entry.name.upper()
            raise SettingError("setting_malformed", f"Setting {name} is malformed: it must be {error}.") from error
    return values


def _require(texts: Texts) -> None:
    missing = [entry for entry, text in texts.items() if not text and entry.default is MISSING]
    if not missing:
        return
    named = " and ".join(f"{entry.name.upper()} ({entry.metadata['about']})" for entry in missing)
    verb = "Setting {} is missing" if len(missing) == 1 else "Settings {} are missing"
    raise SettingError(
        "setting_missing", f"{verb.format(named)}; set it in the environment, or in .env.local on your own machine."
    )


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=value lines; none where there is no file. Raises SettingError that names the line which cannot be read."""
    if not path.exists():
        return {}
    # Only development has the file, so only requirements-dev.txt has the package.
    from dotenv.parser import parse_stream

    values = {}
    try:
        with path.open(encoding="utf-8") as stream:
            for binding in parse_stream(stream):
                if binding.error or (binding.key is not None and binding.value is None):
                    raise SettingError(
                        "setting_malformed",
                        f"{path.name}, line {binding.original.line}, is no NAME=value line. Mend or remove it.",
                    )
                if binding.key is not None and binding.value is not None:
                    values[binding.key] = binding.value
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("setting_malformed", f"{path.name} cannot be read: {error}") from error
    return values
