"""How often a service may be called: who would be over its limit waits for a turn."""

import threading
from collections import deque

from chalicelib.runtime import Clock


class Pace:
    """At most so many `calls` within any so many `seconds`, of all threads together."""

    def __init__(self, clock: Clock, *, calls: int, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._turns: deque[float] = deque(maxlen=calls)  # the last ones, some of them still to come
        self._rests_until = 0.0
        self._lock = threading.Lock()

    def take_turn(self, *, within: float) -> bool:
        """Wait for the next turn and take it; False, at once, where it does not come within so many seconds."""
        with self._lock:
            now = self._clock.monotonic()
            is_full = len(self._turns) == self._turns.maxlen
            at = max(now, self._rests_until, self._turns[0] + self._seconds if is_full else 0.0)
            if at - now > max(0.0, within):
                return False
            self._turns.append(at)
        if at > now:
            self._clock.sleep(at - now)
        return True

    def rest(self, seconds: float) -> None:
        """Give no turn for that long: somebody else has used them up."""
        with self._lock:
            self._rests_until = self._clock.monotonic() + seconds
