"""The settings: environment variables, read in one place on first use, never at import."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from chalicelib.errors import SettingError

MAX_DEADLINE = 7 * 86_400  # seconds
ENV_FILE = Path(__file__).parent.parent / ".env.local"


def _text(value: str) -> str:
    return value


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", value):
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


def _wait(value: str) -> int:
    if _count(value) < 60:
        raise ValueError("60 or more: a call may still be under way for that long")
    return int(value)


def _deadline(value: str) -> int:
    if not 60 <= _count(value) <= MAX_DEADLINE:
        raise ValueError(f"60 to {MAX_DEADLINE}, which is what RunPod takes")
    return int(value)


def _secret(value: str) -> str:
    if value and len(value) < 16:
        raise ValueError("16 characters or more, hard to guess")
    return value


def _name_or_empty(value: str) -> str:
    return value and _name(value)


def _parts(value: str) -> frozenset[str]:
    return frozenset(part.strip() for part in value.split(",") if part.strip())


def _hashes(value: str) -> frozenset[str]:
    hashes = frozenset(part.lower() for part in _parts(value))
    if not all(re.fullmatch(r"[0-9a-f]{64}", part) for part in hashes):
        raise ValueError("a comma-separated list of SHA-256 hashes, 64 hexadecimal digits each")
    return hashes


def _hosts(value: str) -> frozenset[str]:
    hosts = _parts(value)
    if not all(re.fullmatch(r"[^\s:]+:[0-9]{1,5}", host) for host in hosts):
        raise ValueError("a comma-separated list of host:port")
    return hosts


def _setting(about: str, parse: Callable[[str], Any] = _text, *, default: str | None = None) -> Any:
    metadata = {"about": about, "parse": parse, "default": default}
    return field(metadata=metadata) if default is None else field(default=parse(default), metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Every setting; a field's environment variable is its name in capitals."""

    runpod_api_key: str = _setting("RunPod API key")
    runpod_endpoint_id: str = _setting("The serverless endpoint that draws", _name)
    runpod_api_base: str = _setting("RunPod's queue API", _url, default="https://api.runpod.ai/v2")
    cloudflare_account_id: str = _setting("Cloudflare account that has the D1 database and the R2 bucket", _name)
    cloudflare_api_token: str = _setting("API token with D1 Write")
    d1_database_id: str = _setting("Id of the D1 database", _name)
    cloudflare_api_base: str = _setting("Cloudflare's API", _url, default="https://api.cloudflare.com/client/v4")
    r2_bucket: str = _setting("Bucket for the pictures", _name, default="ob-ai-results")
    r2_access_key_id: str = _setting("Access key of an R2 token that may write the bucket")
    r2_secret_access_key: str = _setting("Its secret")
    r2_endpoint_url: str = _setting("R2's S3 endpoint; empty: made from the account id", _url_or_empty, default="")
    r2_public_base_url: str = _setting(
        "Where the bucket is public; result_url is this and the key. Empty: the bucket is private, and every answer "
        "has links made for it that hold for an hour",
        _url_or_empty,
        default="",
    )
    api_key_hashes: frozenset[str] = _setting(
        "Comma-separated SHA-256 hashes of the accepted API keys; empty: every request is refused", _hashes, default=""
    )
    allow_anonymous: bool = _setting(
        "`true` opens create and status to callers without a key, for the time of a move", _flag, default="false"
    )
    result_allowed_private_hosts: frozenset[str] = _setting(
        "Comma-separated host:port that a worker's link may point to although private; for development",
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
    public_base_url: str = _setting(
        "Where RunPod reaches this API, to tell of a run's end; empty: every end is found by polling",
        _url_or_empty,
        default="",
    )
    webhook_secret: str = _setting(
        "A secret of 16 characters or more for the addresses that RunPod is given; empty: none are given",
        _secret,
        default="",
    )
    spool_bucket: str = _setting(
        "AWS S3 bucket where finished pictures wait while R2 fails; empty: they wait at RunPod, half an hour at most",
        _name_or_empty,
        default="",
    )

    @property
    def r2_endpoint(self) -> str:
        """The S3 endpoint to use."""
        return self.r2_endpoint_url or f"https://{self.cloudflare_account_id}.r2.cloudflarestorage.com"


def load(environ: Mapping[str, str] = os.environ, *, env_file: Path | None = None, only: str = "") -> Settings:
    """
    The settings from the environment and, outside Lambda, from the file, over which the environment wins.

    With `only`, a regular expression, settings whose names it does not match may be missing; they are empty then.
    Raises SettingError, whose sentence names the first setting that is missing or malformed.
    """
    in_file = read_env_file(env_file or ENV_FILE) if "AWS_LAMBDA_FUNCTION_NAME" not in environ else {}
    return Settings(**_parse({**in_file, **environ}, re.compile(only)))


def _parse(given: Mapping[str, str], needed: re.Pattern[str]) -> dict[str, Any]:
    texts = {entry: given.get(entry.name.upper(), "").strip() for entry in fields(Settings)}
    missing = [entry for entry, text in texts.items() if not text and entry.default is MISSING]
    _require([entry for entry in missing if needed.match(entry.name.upper())])
    values: dict[str, Any] = {entry.name: "" for entry in missing}
    for entry, text in texts.items():
        try:
            if text:
                values[entry.name] = entry.metadata["parse"](text)
        except ValueError as error:
            name = entry.name.upper()
            raise SettingError("setting_malformed", f"Setting {name} is malformed: it must be {error}.") from error
    return values


def _require(missing: list[Field[Any]]) -> None:
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
