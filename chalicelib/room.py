"""Room in memory for large answers: who finds none waits for its turn, so that a crowd of them does not end us."""

import threading
import time
from types import TracebackType


class Room:
    """So many bytes, for all threads together."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # of whoever waits: a large one must not be passed by small ones for ever

    def take(self, size: int, *, timeout: float) -> bool:
        """Take that much, once it is free or nobody else has any; False where that was not within `timeout` seconds."""
        end = time.monotonic() + timeout
        if not self._turn.acquire(timeout=max(0.0, timeout)):
            return False
        try:
            with self._changed:
                is_free = self._changed.wait_for(
                    lambda: not self._taken or self._taken + size <= self._size, max(0.0, end - time.monotonic())
                )
                self._taken += size if is_free else 0
                return is_free
        finally:
            self._turn.release()

    def give(self, size: int) -> None:
        """Give it back."""
        with self._changed:
            self._taken -= size
            self._changed.notify_all()


class Place:
    """What one thread has of the room, until the end of its `with` block."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def take(self, size: int, *, timeout: float) -> bool:
        """Have that much, unless it has it already; False where it would have had to wait for more than `timeout`."""
        if size > self._size:
            self.leave()
            self._size = size if self._room.take(size, timeout=timeout) else 0
        return size <= self._size

    def shrink(self, size: int) -> None:
        """Give back what it has over that much."""
        if size < self._size:
            self._room.give(self._size - size)
            self._size = size

    def leave(self) -> None:
        """Give back what it has."""
        self.shrink(0)
