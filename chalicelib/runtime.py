"""The two things of the machine that the pipeline uses, time and threads; a simulation puts its own in their place."""

import contextvars
import queue
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType


class Clock:
    """The machine's clock."""

    def now(self) -> datetime:
        """The wall clock's time in UTC; it may jump."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that only ever grow; for measuring and for deadlines."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block for that long."""
        time.sleep(seconds)


class Until:
    """
    For how long something from outside holds: till either clock says that it is over, for one stands still while a
    Lambda is frozen, and the other may be set.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._end = clock.monotonic() + seconds
        self._date = clock.now() + timedelta(seconds=seconds)

    def left(self) -> float:
        """Seconds until then; 0 or less afterwards."""
        return min(self._end - self._clock.monotonic(), (self._date - self._clock.now()).total_seconds())


class Deadline:
    """The instant by which an invocation must be over."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._end = clock.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self._end - self._clock.monotonic()

    def less(self, seconds: float) -> "Deadline":
        """The instant that long before."""
        return Deadline(self._clock, self.left() - seconds)

    def cap(self, seconds: float, *, reserve: float = 0.0) -> float:
        """That many seconds, or fewer where the deadline less the reserve comes first; never under a tenth of one."""
        return max(0.1, min(seconds, self.left() - reserve))


class Crew:
    """Threads that run tasks side by side; what a task returns is handed back by wait()."""

    def __init__(self, size: int) -> None:
        from concurrent.futures import ThreadPoolExecutor  # here, because a create has no use for it

        self._pool = ThreadPoolExecutor(max_workers=size, thread_name_prefix="crew")
        self._waiting: deque[Callable[[], object]] = deque()
        self._finished: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.busy = 0

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, task: Callable[[], object], *, first: bool = False) -> None:
        """
        Run the task as soon as a thread is free, before the others that wait where it goes `first`; an exception it
        raises is handed back like a result.
        """
        self.busy += 1
        (self._waiting.appendleft if first else self._waiting.append)(task)
        self._pool.submit(contextvars.copy_context().run, self._run_next)  # so that its log lines name the request

    def _run_next(self) -> None:
        try:
            self._finished.put(self._waiting.popleft()())
        except BaseException as error:  # a result that never came would be waited for in vain
            self._finished.put(error)

    def wait(self, timeout: float) -> list[object]:
        """What the tasks that have finished returned; blocks until there is one, or for the timeout."""
        finished = []
        try:
            finished.append(self._finished.get(timeout=max(0.0, timeout)))
            while True:
                finished.append(self._finished.get_nowait())
        except queue.Empty:
            self.busy -= len(finished)
            return finished
