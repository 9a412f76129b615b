"""How often a service may be called: who would be over its limit waits for a turn."""

import threading
from collections import deque

from chalicelib.runtime import Clock

SHORT_REST = 2.0  # seconds
LONGEST_REST = 30.0  # for a result that waits is forgotten in half an hour


class Pace:
    """At most so many `calls` within any so many `seconds`, of all threads together."""

    def __init__(self, clock: Clock, *, calls: int, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._turns: deque[float] = deque(maxlen=calls)  # the last ones, some of them still to come
        self._rests_until = 0.0
        self._refusals = 0  # in a row
        self._lock = threading.Lock()

    def take_turn(self, *, within: float, patient: bool = False) -> bool:
        """
        Wait for the next turn and take it; False, at once, where it does not come within so many seconds.

        Only the `patient` wait through a rest that is long, or not the first in a row: others have better to do.
        """
        with self._lock:
            now = self._clock.monotonic()
            rest = self._rests_until - now
            if rest > 0 and not patient and (self._refusals > 1 or rest > SHORT_REST):
                return False
            is_full = len(self._turns) == self._turns.maxlen
            at = max(now, self._rests_until, self._turns[0] + self._seconds if is_full else 0.0)
            if at - now > max(0.0, within):
                return False
            self._turns.append(at)
        if at > now:
            self._clock.sleep(at - now)
        return True

    def refused(self, seconds: float | None) -> None:
        """Rest for so long as the service has said, or for SHORT_REST: somebody else has used up the turns."""
        with self._lock:
            now = self._clock.monotonic()
            self._refusals += now >= self._rests_until  # not for calls that were under way together
            rest = SHORT_REST if seconds is None else min(seconds, LONGEST_REST)
            self._rests_until = max(self._rests_until, now + rest)

    def taken(self) -> None:
        """A call was answered."""
        self._refusals = 0
