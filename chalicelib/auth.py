"""Who may call: bearer keys, of which only the SHA-256 is known here."""

import hashlib
import hmac
from enum import IntEnum

from chalicelib.errors import RequestError
from chalicelib.settings import Settings


class Right(IntEnum):
    """What a key may do; each has those before it."""

    READ = 1
    WRITE = 2
    ADMIN = 3


def require_key(authorization: str, settings: Settings) -> None:
    """Raises RequestError unless the Authorization header carries an accepted key; with no key configured, always."""
    if not settings.api_key_hashes:
        raise RequestError(
            "keys_not_configured", "No API key is configured, so every request is refused. Set API_KEY_HASHES."
        )
    scheme, _, key = authorization.strip().partition(" ")
    digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest()
    # Every hash is compared, each in constant time, so that the time taken says nothing.
    matches = [hmac.compare_digest(digest, accepted) for accepted in settings.api_key_hashes]
    if scheme.lower() != "bearer" or not key.strip() or not any(matches):
        raise RequestError("unauthorized", "This needs an API key: send `Authorization: Bearer <key>`.")
