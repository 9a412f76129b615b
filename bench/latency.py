"""
How long users wait: `.venv/bin/python -m bench.latency [--webhooks N …] [--polling N …] [--json FILE]`.

From the end of a run at RunPod to `done`, with RunPod's callbacks and by polling alone: a whole ./run whose local cloud
answers as late as the real ones, for each number of jobs a new one. All jobs run at once when the last is made, and end
one after the other at random instants, so that fewer and fewer run. By polling alone that is over --spread seconds, so
two a second for 500: no more can come for long, for a create takes two of the four calls a second that Cloudflare
allows. With callbacks it is at eight a second, or within 15 s. Every other picture comes in RunPod's answer, the rest
behind links, each of 1 MB. A run's end is the local RunPod's own; `done` is seen in the database itself, as soon as it
is committed, which is later than `finished_at` says by the save. How late RunPod sends its callbacks is not known; the
local one does so within a tenth of a second.

What is not as in the cloud: all callbacks go to one process, and all clouds are another, where Lambda has a container
for each callback; so eight a second is all that they are asked for. The first callbacks wait until R2's client is made,
as in a container that was not used before. D1's limit of calls is not kept here: a job that ends by its callback takes
three, so that of more than some 300 ends in five minutes the rest is left to the rounds. How busy each process and the
whole machine was stands below the table, as means: near a whole core for a process, or near all cores for the machine,
the figures are this machine's and not the service's. By polling alone the work comes in bursts: while a round stores,
the schedule and the clouds are nearer to a core each than their means say.

A create: bench/one_create.py has what is measured, against the same calls without the service.
"""

import argparse
import contextlib
import json
import math
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chalicelib import settings
from chalicelib.jobs import from_text
from tests.running import ROOT, Running
from tools.cloud import runpod
from tools.cloud.runs import Run

SEED = 20261127
PICTURE_BYTES = 1_000_000
SHAPES = ("base64", "link")
PARTS = ("webhooks", "polling", "create")
LIST = 50  # jobs made by one request
LEAD = 4.0  # seconds from the first create to the first end, and those for each job
LEAD_A_JOB = 0.03
LEAST_SPREAD = 15.0  # seconds over which runs end with callbacks
MOST_ENDS = 8.0  # a second, then
PATIENCE = 60.0  # seconds after the last end
LOOK_EVERY = 0.01  # seconds
# Seconds: of the differences for creates, and at what part of them.
GOALS = {"webhooks": {50: 1.0, 99: 3.0}, "polling": {50: 9.0, 99: 18.0}, "create": {50: 0.010}}
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table, in seconds; `goals` by the percent of all that must be under them."""

    what: str
    number: int
    p50: float
    p95: float
    p99: float
    most: float
    goals: dict[int, float]

    def __str__(self) -> str:
        figures = " | ".join(f"{value:.3f}" for value in (self.p50, self.p95, self.p99, self.most))
        goals = ", ".join(f"p{part} < {goal:g}" for part, goal in self.goals.items())
        return f"| {self.what} | {self.number} | {figures} | {goals} | {self.verdict} |"

    @property
    def verdict(self) -> str:
        """Whether the goals are met."""
        if not self.goals:
            return ""
        return "yes" if all(getattr(self, f"p{part}") <= goal for part, goal in self.goals.items()) else "no"


def line(what: str, seconds: list[float], goals: dict[int, float] | None = None) -> Line:
    """The percentiles of these."""
    p50, p95, p99, most = (nearest_rank(seconds, part) for part in (50, 95, 99, 100))
    return Line(what=what, number=len(seconds), p50=p50, p95=p95, p99=p99, most=most, goals=goals or {})


def nearest_rank(values: list[float], part: int) -> float:
    """The least value that so many percent are not above."""
    return sorted(values)[max(1, math.ceil(part * len(values) / 100)) - 1]


class Load:
    """How busy the processes of a ./run are, and the whole machine, each in cores; from when it is made."""

    def __init__(self, parent: int) -> None:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        self._pids = {_name(int(pid)): int(pid) for pid in text.split()}
        self._begun = time.monotonic()
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        processes = {name: _process_seconds(pid) for name, pid in self._pids.items()}
        return {**processes, "machine": _machine_seconds(), "waiting": _waiting_seconds()}

    def until_now(self) -> dict[str, Any]:
        """
        The means since then, for which part of that time somebody waited for a core, and the load average of the last
        minute; and the seconds that each process has worked.
        """
        seconds, now = time.monotonic() - self._begun, self._now()
        worked = {name: now[name] - before for name, before in self._before.items()}
        busy = {name: round(each / seconds, 3) for name, each in worked.items()}
        return {
            "busy": busy,
            "worked": {name: round(worked[name], 2) for name in self._pids},
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 2),
        }


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return words[words.index("-m") + 1].rpartition(".")[2]


def _process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def _waiting_seconds() -> float:
    """Seconds in which somebody waited for a core: https://docs.kernel.org/accounting/psi.html"""
    pressure = Path("/proc/pressure/cpu")
    return int(pressure.read_text().partition("total=")[2].split()[0]) / 1e6 if pressure.exists() else 0.0


def _machine_seconds() -> float:
    """Seconds that its cores were busy for anybody."""
    user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9])
    return (user + nice + system + sum(others)) / TICK


class Database:
    """A database of the local cloud, which is only read."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        self._version: int | None = None

    def rows(self, sql: str) -> list[Any]:
        """The rows of one query."""
        return self._connection.execute(sql).fetchall()

    def has_changed(self) -> bool:
        """Whether anybody has written since this was asked last."""
        before, self._version = self._version, self.rows("PRAGMA data_version")[0][0]
        return self._version != before

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


@contextlib.contextmanager
def opened(*paths: Path) -> Iterator[list[Database]]:
    """The databases until the end of the block."""
    databases = [Database(path) for path in paths]
    try:
        yield databases
    finally:
        for database in databases:
            database.close()


class Stack(Running):
    """A ./run whose log is listened to: how many seconds each round of the schedule has taken."""

    def __init__(self, *options: Any) -> None:
        self.rounds: list[float] = []
        super().__init__(*options)

    def _read_on(self) -> None:
        for text in self.process.stdout:
            if '"message": "round"' in text and '"caller"' not in text:  # those of a callback name the caller
                self.rounds.append(json.loads(text)["seconds"])


@contextlib.contextmanager
def stack(folder: str, *options: str) -> Iterator[Stack]:
    """A ./run in that folder; it ends with the block."""
    running = Stack(folder, "--no-rate-limit", *options)
    running.leave_alone()
    try:
        yield running
    finally:
        running.stop()


def make_jobs(running: Running, count: int, seconds: float) -> float:
    """Make jobs whose runs end at random instants of so many seconds; the first of these instants."""
    rng = random.Random(SEED)
    first = time.time() + LEAD + LEAD_A_JOB * count
    ends = [first + seconds * rng.random() for _ in range(count)]
    for start in range(0, count, LIST):
        now = time.time()
        jobs = [job(SHAPES[number % 2], ends[number] - now) for number in range(start, min(start + LIST, count))]
        answer = running.call("POST", "/api/queue/create", json={"jobs": jobs})
        assert answer["ok"], answer
    if time.time() > first:
        raise SystemExit("The machine is too busy: runs ended before the last job was made.")
    return first


def job(shape: str, seconds: float) -> dict[str, Any]:
    """One whose run takes so long."""
    wish = {"queue_seconds": 0, "run_seconds": seconds, "bytes": PICTURE_BYTES, "shape": shape}
    return {"input": {"prompt": "a cat", "simulate": wish}}


def watch(database: Database, count: int, until: float) -> dict[str, float]:
    """When each job was done, by its id. Raises AssertionError where one is not, or not by then."""
    done: dict[str, float] = {}
    while len(done) < count and time.time() < until:
        if database.has_changed():
            now = time.time()
            for job_id, status in database.rows("SELECT id, status FROM jobs WHERE step IS NULL"):
                assert status == "done", f"{job_id} is {status}"
                done.setdefault(job_id, now)
        time.sleep(LOOK_EVERY)
    assert len(done) == count, f"{count - len(done)} of {count} jobs are not done"
    return done


def completions(how: str, count: int, latency: float, seconds: float) -> dict[str, Any]:
    """
    Seconds from the end of each run to `done`, by the shape of its result, and how busy all was meanwhile; the runs end
    within so many `seconds`.
    """
    options = ["--latency", str(latency), *(["--no-webhooks"] if how == "polling" else [])]
    with tempfile.TemporaryDirectory() as folder, stack(folder, *options) as running:
        cloud = Path(folder, "cloud")
        with opened(cloud / "d1.sqlite", cloud / "runpod.sqlite") as (d1, runs):
            first = make_jobs(running, count, seconds)
            load = Load(running.process.pid)
            done = watch(d1, count, first + seconds + PATIENCE)
            figures = {"how": how, "jobs": count, "spread": seconds, "rounds": running.rounds, **load.until_now()}
            return {**figures, **waits(d1, runs, done)}


def waits(d1: Database, runs: Database, done: dict[str, float]) -> dict[str, Any]:
    """What the two databases say of the jobs, and how many ran at once."""
    known = {run.id: run for run in (Run(**read_run(row)) for row in runs.rows(runpod.SELECT))}
    seconds: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    by_row, ends = [], {}
    for job_id, run_id, finished_at in d1.rows("SELECT id, runpod_job_id, finished_at FROM jobs"):
        run = known[run_id]
        ends[job_id] = run.ends_at
        seconds[run.wish["shape"]].append(done[job_id] - run.ends_at)
        by_row.append(from_text(finished_at).timestamp() - run.ends_at)
    assert all(done[job_id] > end for job_id, end in ends.items()), "done before its end"
    slowest = max(ends, key=lambda job_id: done[job_id] - ends[job_id])
    last_created = max(run.created_at for run in known.values())
    return {
        "running_at_once": sum(run.ends_at > last_created for run in known.values()),
        "seconds": {shape: sorted(round(value, 3) for value in each) for shape, each in seconds.items()},
        "finished_at_p50": round(nearest_rank(by_row, 50), 3),
        "slowest": timeline(d1, slowest, ends[slowest]),
    }


def timeline(d1: Database, job_id: str, end: float) -> dict[str, float]:
    """What happened to a job, in seconds after its run's end."""
    rows = d1.rows(f"SELECT event, at FROM job_events WHERE job_id = '{job_id}' ORDER BY version, n")
    return {event: round(from_text(at).timestamp() - end, 3) for event, at in rows}


def read_run(row: tuple[Any, ...]) -> dict[str, Any]:
    """A row of the local RunPod as the fields of a Run."""
    fields = dict(zip(runpod.FIELDS, row, strict=True))
    return {**fields, "input": json.loads(fields["input"])}


def lines_of(figures: dict[str, Any]) -> list[Line]:
    """All of them together, which the goals are for, and each shape by itself."""
    how = {"webhooks": "callbacks", "polling": "polling alone"}[figures["how"]]
    ends = figures["jobs"] / figures["spread"]
    name = f"run's end to `done`, {how}, {figures['running_at_once']} running, {ends:.1f} ends a second"
    seconds = figures["seconds"]
    goals = GOALS[figures["how"]]
    return [
        line(name, [value for each in seconds.values() for value in each], goals),
        *(line(f"– results: {shape}", each) for shape, each in seconds.items()),
    ]


def creates(times: int, latency: float) -> dict[str, Any]:
    """Seconds of so many creates, ours and bare, in turn."""
    with tempfile.TemporaryDirectory() as folder, stack(folder, "--latency", str(latency), "--cloud-only") as running:
        load = Load(running.process.pid)
        env = {**os.environ, **settings.read_env_file(Path(folder, "local.env"))}
        done = subprocess.run(
            [sys.executable, "-m", "bench.one_create"],
            cwd=ROOT, env=env, input=json.dumps({"key": running.key, "times": times}),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        )  # fmt: skip
        return {"how": "create", **load.until_now(), **json.loads(done.stdout)}


def lines_of_creates(figures: dict[str, Any]) -> list[Line]:
    """Ours, the bare calls, and what lies between their percentiles."""
    ours, bare = line("POST create", figures["ours"]), line("the same calls bare", figures["bare"])
    less = {name: getattr(ours, name) - getattr(bare, name) for name in ("p50", "p95", "p99", "most")}
    calls = f"{figures['d1_calls']} D1 calls, {figures['runpod_calls']} RunPod"
    return [ours, bare, Line(what=f"– the difference ({calls})", number=ours.number, goals=GOALS["create"], **less)]


def say_load(figures: dict[str, Any]) -> str:
    """How busy all was, in a sentence."""
    busy = dict(figures["busy"])
    machine, waiting = busy.pop("machine"), busy.pop("waiting")
    processes = ", ".join(f"{name} {cores:.2f}" for name, cores in busy.items())
    name = " ".join(str(figures[key]) for key in ("how", "jobs") if key in figures)
    more = ""
    if "rounds" in figures:
        more = f" The schedule's rounds took {', '.join(f'{each:.1f}' for each in figures['rounds'])} s."
    if figures["how"] == "create":
        cpu = {kind: statistics.median(figures[f"{kind}_cpu"]) * 1000 for kind in ("ours", "bare")}
        more = f" A create takes {cpu['ours']:.1f} ms of a core, the bare calls {cpu['bare']:.1f} ms."
    return (
        f"* {name}: cores in use {processes}; of the machine {machine:.2f} of {figures['cores']}, "
        f"load average {figures['load_average']}; somebody waited for one in {waiting:.0%} of the time.{more}"
    )


def measure(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[Line]]]:
    """What was asked for, one after the other."""
    for how in ("webhooks", "polling"):
        for count in getattr(options, how) if how in options.parts else ():
            seconds = options.spread if how == "polling" else max(LEAST_SPREAD, count / MOST_ENDS)
            figures = completions(how, count, options.latency, seconds)
            yield figures, lines_of(figures)
    if "create" in options.parts:
        figures = creates(options.creates, options.latency)
        yield figures, lines_of_creates(figures)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for how, default in (("webhooks", [100, 500]), ("polling", [500])):
        numbers = " ".join(map(str, default))
        parser.add_argument(
            f"--{how}", type=int, nargs="+", default=default, metavar="N", help=f"jobs at once (default: {numbers})"
        )
    parser.add_argument(
        "--spread",
        type=float,
        default=250.0,
        metavar="SECONDS",
        help="over which runs end by polling alone, at least 60 (default: %(default)g)",
    )
    parser.add_argument("--creates", type=int, default=100, help="of either kind (default: %(default)s)")
    parser.add_argument(
        "--latency", type=float, default=1.0, metavar="FACTOR", help="as ./run has it (default: %(default)g)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too, with every job's")
    return parser.parse_args()


def main() -> None:
    """The command."""
    options = read_arguments()
    found: list[dict[str, Any]] = []
    print("| seconds | n | p50 | p95 | p99 | most | goal | met |\n|---|---|---|---|---|---|---|---|")
    for figures, lines in measure(options):
        print("\n".join(map(str, lines)), flush=True)
        found.append({**figures, "lines": [{**asdict(each), "met": each.verdict} for each in lines]})
    print("\n" + "\n".join(map(say_load, found)))
    if options.json:
        options.json.write_text(json.dumps({"latency": options.latency, "seed": SEED, "parts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
