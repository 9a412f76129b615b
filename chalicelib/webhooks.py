"""The callbacks by which RunPod tells of a run's end: their address, and whether one is genuine."""

import hashlib
import hmac
import json
import re
from urllib.parse import quote

from chalicelib.errors import RequestError
from chalicelib.records import dataclass

MAX_BODY_BYTES = 6 * 1024 * 1024  # what Lambda takes; the body has the input and, inline, the pictures
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
ATTEMPT = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True, repr=False)
class Webhooks:
    """Where RunPod reaches us, and the secret by which only it knows where; without both there are no callbacks."""

    base_url: str
    secret: str

    @property
    def are_on(self) -> bool:
        """Whether RunPod is given an address."""
        return bool(self.base_url and self.secret)

    def url(self, job_id: str, attempt: int) -> str | None:
        """The address for the end of one attempt."""
        if not self.are_on:
            return None
        token = self._token(job_id, attempt).decode()
        return f"{self.base_url}/webhooks/runpod/{quote(job_id, safe='')}/{attempt}/{token}"

    def read(self, job_id: str, attempt: str, token: str, body: bytes) -> tuple[int, str]:
        """The attempt and the RunPod id that a callback is about. Raises RequestError where it is not genuine."""
        genuine = self.secret and ATTEMPT.fullmatch(attempt)
        if not genuine or not hmac.compare_digest(self._token(job_id, int(attempt)), token.encode("utf-8", "replace")):
            raise RequestError("webhook_forbidden", "This is no address that RunPod was given.")
        if len(body) > MAX_BODY_BYTES:
            raise RequestError("body_too_large", f"The body is over {MAX_BODY_BYTES // 1024 // 1024} MB.")
        return int(attempt), _run_id(body)

    def _token(self, job_id: str, attempt: int) -> bytes:
        signed = f"{job_id}/{attempt}".encode("utf-8", "replace")
        return hmac.new(self.secret.encode(), signed, hashlib.sha256).hexdigest().encode()


def _run_id(body: bytes) -> str:
    """All that is believed of the body; the rest RunPod is asked for."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("body_not_json", "The body must be JSON in UTF-8.") from error
    run_id = told.get("id") if isinstance(told, dict) else None
    if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
        raise RequestError("run_id_invalid", "The body must have the id of the run.")
    return run_id
