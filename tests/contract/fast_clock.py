"""A clock twenty times as fast as the machine's, the same in every process that a test gives its start to."""

import os
import time
from datetime import UTC, datetime

from chalicelib.runtime import Clock

FACTOR = 20
START = "FAST_CLOCK_START"


def start() -> dict[str, str]:
    """The environment of processes whose clocks all begin now."""
    return {START: f"{time.time()} {time.monotonic()}"}


class FastClock(Clock):
    """Waits, leases and due times pass as fast; only what is asked of a socket still takes the machine's time."""

    def __init__(self) -> None:
        # On Linux and macOS the monotonic clock counts from the same instant in every process.
        self._wall, self._monotonic = map(float, os.environ[START].split())

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._wall + self.monotonic(), UTC)

    def monotonic(self) -> float:
        return (time.monotonic() - self._monotonic) * FACTOR

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / FACTOR)
