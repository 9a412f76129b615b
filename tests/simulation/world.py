"""
Time, processes and the wire of a simulated world.

Every invocation and every thread of it is a greenlet; one that waits, for a time or for an answer, gives the word to
the loop, which goes on with whatever is next by the simulated clock. Nothing is left to chance but what the seed says.
"""

import heapq
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import greenlet

from chalicelib import bootstrap, settings
from chalicelib.bootstrap import Machine, Service
from chalicelib.errors import IndeterminateError, ServiceError, TransientError
from chalicelib.rounds import Report
from chalicelib.runtime import Clock
from chalicelib.wire import Reply
from tests.simulation import s3
from tests.simulation.clouds import Clouds
from tests.simulation.faults import Fate, Faults
from tests.simulation.invariants import Invariants, Violation

START = datetime(2026, 1, 31, 23, 55, tzinfo=UTC)  # so that the month ends soon
LAMBDA_SECONDS = {"schedule": 58.0, "api": 29.0}
RESERVE = 0.5  # what api.run_minute keeps of the Lambda's time
REQUEST_SECONDS = 24.0


class Task:
    """One thread of a process."""

    def __init__(self, process: "Process", run: Callable[[], object]) -> None:
        self.process = process
        self._run = run
        self.greenlet = greenlet.greenlet(self._body, process.world.hub)  # where it goes when it ends
        self.greenlet.task = self
        self.over = False

    def _body(self) -> None:
        try:
            self._run()
        finally:
            self.over = True


class Process:
    """One container: its own service, memory and clock, until it is killed or thrown away."""

    def __init__(self, world: "World", kind: str, *, skew: float) -> None:
        self.world = world
        self.kind = kind
        self.name = f"{kind}-{len(world.processes)}"
        self.skew = skew
        self.alive = True
        self.busy = False
        self.frozen = False
        self.rounds: list[float] = []  # when they began
        self.service = self._build()

    def _build(self) -> Service:
        world = self.world
        clock = SimClock(self)
        service = bootstrap.build_on(
            Machine(
                clock=clock,
                rng=Random(world.rng.getrandbits(64)),
                new_crew=lambda size: SimCrew(self, size),
                new_wire=lambda resolve: SimWire(self),
            ),
            world.config,
        )
        service.bucket._client = s3.r2_client()
        if service.spool:
            service.spool._client = s3.spool_client()
        run_round = service.pipeline.run_round

        def told_round(*args: Any, **kwargs: Any) -> Report:
            self.rounds.append(world.now)
            return run_round(*args, **kwargs)

        service.pipeline.run_round = told_round
        return service

    def kill(self) -> None:
        """End it as SIGKILL does: nothing of it runs any more, not even what would clean up."""
        self.alive = False


class SimClock(Clock):
    """The clock of one process; its wall clock may be wrong."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def now(self) -> datetime:
        return START + timedelta(seconds=self._process.world.now + self._process.skew)

    def monotonic(self) -> float:
        return self._process.world.now

    def sleep(self, seconds: float) -> None:
        self._process.world.sleep(seconds)


class SimCrew:
    """Threads of a process, as runtime.Crew has them: so many at work, the others wait for their turn."""

    def __init__(self, process: Process, size: int) -> None:
        self._process = process
        self._free = size
        self._queue: deque[Callable[[], object]] = deque()
        self._finished: list[object] = []
        self._waiting: Task | None = None
        self.busy = 0

    def __enter__(self) -> "SimCrew":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, run: Callable[[], object], *, first: bool = False) -> None:
        self.busy += 1
        (self._queue.appendleft if first else self._queue.append)(run)
        if self._free:
            self._free -= 1
            self._process.world.spawn(self._process, self._work)

    def _work(self) -> None:
        while self._queue:
            try:
                result = self._queue.popleft()()
            except Exception as error:
                result = error
            self._finished.append(result)
            if self._waiting is not None:
                self._process.world.wake(self._waiting)
                self._waiting = None
        self._free += 1

    def wait(self, timeout: float) -> list[object]:
        world = self._process.world
        if not self._finished:
            self._waiting = world.current()
            world.sleep(timeout, can_wake=True)
            self._waiting = None
        finished, self._finished = self._finished, []
        self.busy -= len(finished)
        return finished


class SimWire:
    """What requests is to the service; the answers come from the simulated clouds."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def exchange(
        self,
        service: str,
        method: str,
        url: str,
        *,
        headers: Any,
        body: bytes | None = None,
        timeout: float,
        max_bytes: int,
        on_large: Any = None,
    ) -> Reply:
        status, head, content = self._process.world.call(service, method, url, body or b"", timeout, headers)
        return Reply(status, s3.Headers(head), content)

    @contextmanager
    def open(
        self, service: str, method: str, url: str, *, headers: Any, body: bytes | None = None, timeout: float
    ) -> Iterator["SimStream"]:
        status, head, content = self._process.world.call(service, method, url, body or b"", timeout, headers)
        yield SimStream(status, s3.Headers(head), content)


class SimStream(Reply):
    """An answer that is read piece by piece, and may end too early."""

    def pieces(self, *, decode: bool = True) -> Iterator[bytes]:
        half = len(self.body) // 2 or 1
        yield self.body[:half]
        if "x-truncated" in self.headers:
            raise IndeterminateError("result_cut_off", "The host broke the connection off.", service="result")
        if self.body[half:]:
            yield self.body[half:]


class World:
    """Everything of one run: seed in, violations out."""

    def __init__(self, seed: int, *, environment: dict[str, str], faults: Faults | None = None) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now = 0.0
        self.config = settings.load(environment, env_file=Path(os.devnull))
        self.faults = faults or Faults()
        self.processes: list[Process] = []
        self.calls = 0
        self.kill_at: dict[int, str] = {}
        self.trace: list[str] = []
        self.clouds = Clouds(self)
        self.invariants = Invariants(self)
        self.hub = greenlet.getcurrent()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._tasks: list[Task] = []  # kept: a greenlet that is collected would run its finally blocks
        self._closed = False

    # Time

    def at(self, seconds: float, run: Callable[[], None]) -> None:
        """Have it run that many seconds from now."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + max(0.0, seconds), self._count, run))

    def run(self, seconds: float, *, until: Callable[[], bool] | None = None) -> None:
        """Let the world go on for that long, or until the condition holds. Raises Violation."""
        end = self.now + seconds
        with s3.wired(self):
            while self._heap and self._heap[0][0] <= end:
                self.now, _, run = heapq.heappop(self._heap)
                run()
                if until is not None and until():
                    return
        self.now = max(self.now, end) if until is None or not self._heap else self.now

    def current(self) -> Task:
        """The thread that is running."""
        task: Task = greenlet.getcurrent().task
        return task

    def sleep(self, seconds: float, *, can_wake: bool = False) -> None:
        """Block the running thread for that long, or until it is woken."""
        if self._closed:
            raise greenlet.GreenletExit
        task = self.current()
        token = object()
        task.token = token

        def go_on() -> None:
            if task.token is token:
                self._resume(task)

        self.at(seconds, go_on)
        self.hub.switch()

    def wake(self, task: Task) -> None:
        """Let a thread go on that sleeps."""
        token = task.token
        self.at(0.0, lambda: self._resume(task) if task.token is token else None)

    def _resume(self, task: Task) -> None:
        task.token = None
        if task.process.alive:
            self._switch(task)

    def spawn(self, process: Process, run: Callable[[], None]) -> Task:
        """Begin a thread."""
        task = Task(process, run)
        task.token = None
        self._tasks.append(task)
        self.at(0.0, lambda: self._switch(task) if process.alive else None)
        return task

    def _switch(self, task: Task) -> None:
        task.greenlet.switch()

    # Processes

    def invoke(
        self, kind: str, run: Callable[[Service], object], done: Callable[[object], None] | None = None
    ) -> Process:
        """Begin an invocation in a container that is idle, or in a new one; it is killed at the Lambda's time limit."""
        idle = [process for process in self.processes if process.kind == kind and process.alive and not process.busy]
        if idle and self.rng.random() < self.faults.recycled:
            idle.pop().kill()
        process = idle[-1] if idle else self._new_process(kind)
        process.busy = True

        def body() -> None:
            try:
                result = run(process.service)
            except ServiceError as error:
                result = error
            except Exception as error:
                self.invariants.check(False, f"an invocation crashed: {error!r}")
            process.busy = False
            process.invocation = None
            if done:
                done(result)

        task = self.spawn(process, body)
        process.invocation = task

        def time_is_up() -> None:
            if process.invocation is task and process.alive:
                process.kill()
                self.invariants.check(process.frozen, f"{process.name} has not ended in its time")

        self.at(LAMBDA_SECONDS[kind], time_is_up)
        return process

    def _new_process(self, kind: str) -> Process:
        process = Process(self, kind, skew=self.faults.skew(self.rng))
        process.invocation = None
        self.processes.append(process)
        return process

    # The wire

    def call(
        self, service: str, method: str, url: str, body: bytes, timeout: float, headers: Any
    ) -> tuple[int, dict[str, str], bytes]:
        """One exchange over the wire, as the faults will have it; raises what wire.Wire raises."""
        if self._closed:
            raise greenlet.GreenletExit
        process = self.current().process
        self.calls += 1
        number = self.calls
        operation = f"{service} {method} {urlsplit(url).path}"
        self.trace.append(f"{self.now:10.3f} {process.name:12} {operation}")
        self.invariants.before_call(process, service, method, url, headers, body)
        fate = self.faults.fate(self, service, method, url)
        if self.kill_at.get(number) == "before":
            self._die(process)
        if fate.frozen:
            process.frozen = True
            self.sleep(1e9)
        try:
            if fate.refused:
                self.sleep(0.01)
                raise TransientError(f"{service}_unreachable", "Nothing was sent.", service=service)
            answer = self._exchange(process, number, service, method, url, headers, body, fate, timeout)
        finally:
            self.invariants.call_over(process, url, headers)
        self.invariants.after_call(process, service, method, url, body, answer)
        return answer

    def _exchange(
        self,
        process: Process,
        number: int,
        service: str,
        method: str,
        url: str,
        headers: Any,
        body: bytes,
        fate: Fate,
        timeout: float,
    ) -> tuple[int, dict[str, str], bytes]:
        begun, slot = self.now, []

        def effect() -> None:
            if fate.effect:
                slot.append(self.clouds.handle(service, method, url, headers, body, process))
            if self.kill_at.get(number) == "after":
                process.kill()

        self.at(fate.out, effect)
        answered = fate.instead is not None or (fate.effect and not fate.lost)
        if not answered or fate.out + fate.back >= timeout:
            self.sleep(min(timeout, fate.gives_up))
            code = "cut_off" if self.now - begun < timeout else "timeout"
            raise IndeterminateError(f"{service}_{code}", "There was no answer.", service=service)
        self.sleep(fate.out + fate.back)
        return fate.instead or slot[0]

    def _die(self, process: Process) -> None:
        process.kill()
        self.hub.switch()
        raise AssertionError("a dead thread went on")

    def __enter__(self) -> "World":
        logger = logging.getLogger("ob-ai-studio")
        self._log_state = (logger.level, logger.propagate, list(logger.handlers))
        logger.handlers = [self.invariants.log_handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
        return self

    def __exit__(self, *error: object) -> None:
        logger = logging.getLogger("ob-ai-studio")
        logger.level, logger.propagate, logger.handlers = self._log_state
        self._closed = True
        for task in self._tasks:
            if task.greenlet:
                task.greenlet.throw(greenlet.GreenletExit)
        self.clouds.close()


__all__ = ["START", "Process", "Violation", "World"]
