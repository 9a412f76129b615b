"""Who may call: bearer keys with a name and a right, of which only the SHA-256 is known here."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from enum import IntEnum

from chalicelib.errors import RequestError
from chalicelib.records import dataclass

NAME = r"[A-Za-z0-9_.-]{1,40}"


class Right(IntEnum):
    """What a key may do; each has those before it."""

    READ = 1
    WRITE = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        """As an entry has it."""
        return self.name.lower()


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """An accepted key: what it is called in timelines and logs, and what it may do."""

    name: str
    hash: str
    right: Right

    @property
    def entry(self) -> str:
        """As API_KEY_HASHES has it."""
        return f"{self.name}:{self.hash}:{self.right.word}"


def hash_of(key: str) -> str:
    """The SHA-256 of the key, in hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_entries(text: str) -> tuple[ApiKey, ...]:
    """
    The keys of API_KEY_HASHES: name:hash:right, or a bare hash, which may do all; of one that stands there twice the
    first entry. Raises ValueError without a value.
    """
    keys: dict[str, ApiKey] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        key = _read_entry(entry)
        if keys.setdefault(key.hash, key).right is not key.right:
            raise ValueError("a list in which no hash stands twice with another right")
    return tuple(keys.values())


def _read_entry(entry: str) -> ApiKey:
    found = re.fullmatch(rf"(?:({NAME}):)?([0-9A-Fa-f]{{64}})(?::(read|write|admin))?", entry)
    if found is None or bool(found[1]) != bool(found[3]):
        raise ValueError(
            "a comma-separated list of name:hash:right – the right read, write or admin – or of bare SHA-256 hashes, "
            "64 hexadecimal digits each"
        )
    digest = found[2].lower()
    return ApiKey(
        name=found[1] or f"key-{digest[:8]}", hash=digest, right=Right[found[3].upper()] if found[3] else Right.ADMIN
    )


def identify(authorization: str, keys: Iterable[ApiKey]) -> ApiKey | None:
    """Which accepted key the Authorization header carries, if any."""
    scheme, _, key = authorization.strip().partition(" ")
    digest = hash_of(key.strip())
    # Every hash is compared, each in constant time, so that the time taken says nothing.
    matches = [accepted for accepted in keys if hmac.compare_digest(digest, accepted.hash)]
    return matches[0] if matches and scheme.lower() == "bearer" and key.strip() else None


def require_key(authorization: str, keys: Iterable[ApiKey]) -> ApiKey:
    """The accepted key that the header carries. Raises RequestError where there is none."""
    keys = tuple(keys)
    if not keys:
        raise RequestError(
            "keys_not_configured", "No API key is configured, so every request is refused. Set API_KEY_HASHES."
        )
    key = identify(authorization, keys)
    if key is None:
        raise RequestError("unauthorized", "This needs an API key: send `Authorization: Bearer <key>`.")
    return key


def require_right(key: ApiKey, right: Right) -> None:
    """Raises RequestError unless the key has the right."""
    if key.right < right:
        raise RequestError(
            "forbidden", f"The key {key.name} has the right {key.right.word}; this needs the right {right.word}."
        )
