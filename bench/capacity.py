"""
How many runs one poller can look at: `.venv/bin/python -m bench.capacity [--minutes N] [--json FILE]`.

The service's own code in the simulated world of the tests: threads, clock and wire are replaced, SQL is real. RunPod
answers /status after 80 ms and refuses with 429 what is over its 2,000 in ten seconds for each endpoint, D1 answers
after 120 ms, and each look costs the processor what bench.rounds has measured, of which a function has as much as its
memory gives it. All runs are unfinished and older than four minutes, so that each is due every 60 s; its callback never
comes.
"""

import argparse
import itertools
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.bill import FULL_MEMORY
from chalicelib.jobs import to_text
from chalicelib.runtime import Deadline
from tests.simulation.clouds import Run
from tests.simulation.faults import Fate, Faults
from tests.simulation.scenario import ENVIRONMENT
from tests.simulation.world import LAMBDA_SECONDS, RESERVE, START, World

SECONDS = {"d1": 0.12, "runpod": 0.08}
LIMIT, WINDOW = 2_000, 10.0  # RunPod's, calls and seconds
LOOK_SECONDS = 0.0016  # of a whole processor, for one look: bench.rounds
DUE = 90.0  # seconds: due after 60, and then the grid of the rounds, and the length of one
AGE = timedelta(minutes=10)
DAY = 86_400.0


FILL = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
INSERT INTO jobs (
  id, status, step, prompt, version, attempt, endpoint_id, runpod_job_id, runpod_status, due_at, created_at, updated_at,
  submitted_at, started_at, deadline_at
)
SELECT
  'job-' || i, 'running', 'poll', 'a cat', 3, 1, 'ep-' || (i % ?), 'run-' || i, 'IN_PROGRESS', ?, ?, ?, ?, ?,
  '2099-01-01T00:00:00.000Z'
FROM n
"""


@dataclass
class Seen:
    """What came of it."""

    runs: int
    pollers: int
    endpoints: int
    memory: int
    gap_p50: float = 0.0
    gap_most: float = 0.0
    late: float = 0.0  # the part of all runs that were at some time not looked at for longer than DUE
    most_in_window: int = 0
    refused: int = 0
    d1_calls: float = 0.0  # in five minutes


class Limits(Faults):
    """The clouds' latencies and limits, and what a look costs each process."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.cost = LOOK_SECONDS * FULL_MEMORY / memory
        self.looks: dict[str, list[float]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.refused = 0
        self.most = 0
        self._windows: dict[str, deque[float]] = defaultdict(deque)
        self._free: dict[str, float] = defaultdict(float)

    def fate(self, world: Any, service: str, method: str, url: str) -> Fate:
        """Late, and refused where it is over the limit."""
        self.calls[service] += 1
        way = SECONDS[service] / 2
        if service != "runpod":
            return Fate(out=way, back=way)
        name = world.current().process.name
        self._free[name] = max(world.now, self._free[name]) + self.cost
        wait = self._free[name] - world.now
        endpoint, _, run_id = url.partition("/v2/")[2].split("/")
        window = self._windows[endpoint]
        while window and window[0] <= world.now - WINDOW:
            window.popleft()
        if len(window) >= LIMIT:
            self.refused += 1
            return Fate(out=wait + way, back=way, effect=False, instead=(429, {}, b"{}"))
        window.append(world.now)
        self.most = max(self.most, len(window))
        self.looks[run_id].append(world.now)
        return Fate(out=wait + way, back=way)


@contextmanager
def crowd(count: int, endpoints: int, faults: Limits) -> Iterator[World]:
    """A world with so many unfinished runs."""
    deadlines = {name: str(int(DAY)) for name in ("START_DEADLINE", "RUN_DEADLINE", "TOTAL_DEADLINE")}
    with World(0, environment={**ENVIRONMENT, **deadlines}, faults=faults) as world:
        world.invariants.watching = False
        world.clouds.execute(FILL, count, endpoints, to_text(START), *[to_text(START - AGE)] * 4)
        for number in range(1, count + 1):
            world.clouds.runs[f"run-{number}"] = _run(number, number % endpoints)
        yield world


def _run(number: int, endpoint: int) -> Run:
    return Run(
        id=f"run-{number}", endpoint=f"ep-{endpoint}", job_id=f"job-{number}", attempt=1, webhook=None, created=0.0,
        starts=0.0, ends=DAY, verdict="COMPLETED", shape="base64", ttl=7 * DAY, timeout=7 * DAY, visible=0.0,
    )  # fmt: skip


def watch(count: int, *, pollers: int, endpoints: int, memory: int, minutes: int) -> Seen:
    """Let the schedule run for so long; of it the first two minutes are not counted."""
    faults, seen = Limits(memory), Seen(count, pollers, endpoints, memory)
    with crowd(count, endpoints, faults) as world:
        for minute in range(minutes):
            for poller in range(pollers):
                world.at(60.0 * minute + 0.3 * poller, lambda: world.invoke("schedule", _minute))
        world.run(60.0 * minutes)
        gaps = [_longest(faults.looks[run_id], 120.0, world.now) for run_id in world.clouds.runs]
    seen.gap_p50, seen.gap_most = sorted(gaps)[len(gaps) // 2], max(gaps)
    seen.late = sum(gap > DUE for gap in gaps) / len(gaps)
    seen.most_in_window, seen.refused = faults.most, faults.refused
    seen.d1_calls = faults.calls["d1"] * 5 / minutes
    return seen


def _minute(service: Any) -> object:
    seconds = LAMBDA_SECONDS["schedule"] - RESERVE
    return service.pipeline.run_minute(Deadline(service.clock, seconds))


def _longest(looks: list[float], begin: float, end: float) -> float:
    """The longest time without a look from `begin` to `end`, in seconds."""
    times = [begin, *(at for at in looks if begin <= at), end]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


CASES = [
    *[(count, 1, 1, 1024) for count in (1_000, 10_000, 12_500, 15_000)],
    (15_000, 2, 1, 1024),
    *[(count, 2, 2, 1024) for count in (10_000, 15_000)],
    (10_000, 1, 1, 512),
]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.capacity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=int, default=5, help="of the simulated world (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    columns = ("runs", "pollers", "endpoints", "MB", "gap p50, s", "longest, s", "late", "most in 10 s", "429s", "D1")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    found = []
    for count, pollers, endpoints, memory in CASES:
        seen = watch(count, pollers=pollers, endpoints=endpoints, memory=memory, minutes=options.minutes)
        found.append(asdict(seen))
        gaps = f"{seen.gap_p50:.0f} | {seen.gap_most:.0f} | {seen.late:.0%}"
        calls = f"{seen.most_in_window:,} | {seen.refused:,} | {seen.d1_calls:.0f}"
        print(f"| {count:,} | {pollers} | {endpoints} | {memory} | {gaps} | {calls} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
