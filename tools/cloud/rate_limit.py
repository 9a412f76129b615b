"""Cloudflare's limit of API calls. https://developers.cloudflare.com/fundamentals/api/reference/limits/"""

import math
import threading
from collections.abc import Callable
from dataclasses import replace

from tools.cloud import Answer, Request, json_answer

CALLS = 1200
SECONDS = 300.0


class RateLimit:
    """
    1,200 calls of an account in five minutes, and for five minutes none to whoever goes over them.

    A window begins with the first call after the one before it. That calls during the lock-out do not prolong it is a
    guess, and so is what the real headers say meanwhile.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._left = CALLS  # negative: locked out
        self._ends_at = -math.inf

    def handle(self, request: Request, part: Callable[[Request], Answer]) -> Answer:
        """What the part answers, or the refusal of a call that is one too many; with the headers that tell the rest."""
        left, seconds = self._take()
        answer = part(request) if left >= 0 else refusal(seconds)
        told = {"ratelimit": f'"default";r={max(left, 0)};t={math.ceil(seconds)}'}
        return replace(answer, headers={**answer.headers, **told, "ratelimit-policy": '"default";q=1200;w=300'})

    def calls_left(self) -> int:
        """Calls that would still be answered now."""
        with self._lock:
            return CALLS if self._clock() >= self._ends_at else max(self._left, 0)

    def leave(self, calls: int) -> None:
        """Begin a window with so many calls."""
        with self._lock:
            self._left, self._ends_at = calls, self._clock() + SECONDS

    def _take(self) -> tuple[int, float]:
        """Take one call: how many are left then, and the seconds until there are more."""
        with self._lock:
            now = self._clock()
            if now >= self._ends_at:
                self._left, self._ends_at = CALLS, now + SECONDS
            if self._left == 0:
                self._ends_at = now + SECONDS
            self._left = max(self._left - 1, -1)
            return self._left, self._ends_at - now


def refusal(seconds: float) -> Answer:
    """What every call is answered during the lock-out."""
    error = {"code": 971, "message": "Please wait and consider throttling your request speed"}
    return json_answer(
        429,
        {"result": None, "success": False, "errors": [error], "messages": []},
        {"retry-after": str(math.ceil(seconds))},
    )
