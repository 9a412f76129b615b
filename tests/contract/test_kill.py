"""
Processes that are killed in the middle of what they do lose nothing, and buy nothing twice that is not told.

What came of it is printed: pytest -s tests/contract/test_kill.py.
"""

import contextlib
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from chalicelib import bootstrap, settings
from chalicelib.runtime import Clock
from chalicelib.wire import Wire
from tests.contract import fast_clock
from tools import schema
from tools.cloud import Account, LocalCloud, settings_for
from tools.cloud.render import draw

ROOT = Path(__file__).parents[2]
SEED = 20261122
KILLS_OF_ROUNDS = 30
KILLS_OF_CREATES = 8
IN_PEACE = "create {log} peace 48 1.5"  # by a process that is left alone
IN_HASTE = "create {log} killed-{number} 10 0"
LEAST_KILLS = 25
LONGEST_LIFE = 0.3  # seconds
# A result whose holders have ended without a word five times is given up as what ends them. A lease lasts three seconds
# here, so what is killed for longer than this could be unlucky five times.
KILLING_SECONDS = 9.0
PATIENCE = 30.0  # seconds for what is left after the last kill
WATCHDOG_SECONDS = 120.0

LIVE = "SELECT id, status, step, attempt, version, due_at FROM jobs WHERE status IN ('queued', 'running')"


class Stage:
    """The cloud, the process that forks the others, and everything that was started."""

    def __init__(self, folder):
        self.folder = folder
        self.base_url = ""
        self._processes = []
        self._forked = set()
        self._errors = (folder / "stderr").open("w")
        self._watchdog = threading.Timer(WATCHDOG_SECONDS, self._kill_all)

    def begin(self):
        self._watchdog.start()
        env = {**{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}, **fast_clock.start()}
        cloud = self._spawn("tests.contract.fast_cloud", str(self.folder / "cloud"), env=env)
        self.base_url = cloud.stdout.readline().strip()
        assert self.base_url, self.said()
        given = {**settings_for(self.base_url, Account()), "SUBMIT_UNKNOWN_WAIT": "60"}
        clock = Clock()
        schema.apply(bootstrap.make_d1(settings.load(given), Wire(clock), clock))
        self._forker = self._spawn("tests.contract.rounds_forever", env={**env, **given})

    def _spawn(self, module, *args, env):
        process = subprocess.Popen(
            [sys.executable, "-m", module, *args], cwd=ROOT, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def _kill_all(self):
        for process in self._processes:
            process.kill()

    def _ask(self, line):
        self._forker.stdin.write(f"{line}\n")
        self._forker.stdin.flush()
        answer = self._forker.stdout.readline()
        assert answer, self.said()
        return int(answer)

    def start(self, task):
        pid = self._ask(task)
        self._forked.add(pid)
        return pid

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)  # ours still: its id is given anew only when it is reaped
        self._ask(f"reap {pid}")
        self._forked.discard(pid)

    def rows(self, sql):
        """What stands in D1's file at this instant; asking through the cloud would be one more caller."""
        path = self.folder / "cloud" / "d1.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql)]

    def wait(self, done, seconds):
        end = time.monotonic() + seconds
        while not (over := done()) and time.monotonic() < end:
            time.sleep(0.05)
        return over

    def log(self):
        path = self.folder / "log"
        return [tuple(line.split(" ", 2)) for line in path.read_text().splitlines()] if path.exists() else []

    def said(self):
        return (self.folder / "stderr").read_text()[-4_000:]

    def stop(self):
        """End everything, and be sure of it."""
        self._watchdog.cancel()
        with contextlib.suppress(OSError, AssertionError):  # the forker is gone, and with it those that it forked
            for pid in list(self._forked):
                self.kill(pid)
        for process in reversed(self._processes):
            process.kill()
            process.wait(10)
            process.stdin.close()
            process.stdout.close()
        self._errors.close()


@dataclass(frozen=True)
class Left:
    """What all of it leaves behind."""

    kills: int
    in_mid_step: Counter[str]  # jobs that were being sent or stored when a kill fell
    live: list[dict]  # rows that are not final
    said: str  # what the processes wrote to their standard error
    jobs: list[dict]
    events: dict[str, list[str]]
    runs: dict[str, list[str]]  # ids of runs, by prompt
    tried: set[str]  # ids of jobs whose create was begun
    made: set[str]  # and of those whose create came back
    cloud: LocalCloud


def kill_again_and_again(stage, rng):
    """Kill processes at random instants while jobs come in; how many, and the jobs that were in mid-step then."""
    in_mid_step, alive = set(), []
    kinds = ["rounds"] * KILLS_OF_ROUNDS + ["create"] * KILLS_OF_CREATES
    rng.shuffle(kinds)
    kills, end = 0, time.monotonic() + KILLING_SECONDS
    for number, kind in enumerate(kinds):
        if kills >= LEAST_KILLS and time.monotonic() > end:
            break
        while len(alive) < 1 + (number // 6) % 2:  # two at once half of the time
            alive.append(stage.start("rounds"))
        haste = IN_HASTE.format(log=stage.folder / "log", number=number)
        victim = stage.start(haste) if kind == "create" else alive.pop(rng.randrange(len(alive)))
        time.sleep(rng.uniform(0, LONGEST_LIFE))
        stage.kill(victim)
        kills += 1
        in_mid_step |= {(row["id"], row["step"]) for row in stage.rows(LIVE) if row["step"] in ("submitting", "store")}
    for pid in alive:
        stage.kill(pid)
    return kills + len(alive), Counter(step for _, step in in_mid_step)


def bring_to_an_end(stage):
    """Let one process go on in peace until every job is final; the rows that are not even then."""
    stage.start("rounds")
    stage.wait(lambda: ("over", "-", "peace") in stage.log(), PATIENCE)
    stage.wait(lambda: not stage.rows(LIVE), PATIENCE)
    return stage.rows(LIVE)


def look(stage, cloud, *, live, **counted):
    """Read the tables, the bucket and RunPod's runs, now that nothing works on them."""
    events, runs = defaultdict(list), defaultdict(list)
    for row in cloud.d1.execute("SELECT job_id, event FROM job_events ORDER BY job_id, version, n"):
        events[row["job_id"]].append(row["event"])
    for run_id, given in cloud.runpod._execute("SELECT id, input FROM runs"):
        runs[json.loads(given)["prompt"]].append(run_id)
    log = stage.log()
    return Left(
        **counted,
        said=stage.said(),
        live=[{**row, "timeline": events[row["id"]]} for row in live],
        jobs=cloud.d1.execute("SELECT * FROM jobs"),
        events=events,
        runs=runs,
        tried={job_id for word, job_id, _ in log if word == "try"},
        made={job_id for word, job_id, _ in log if word == "made"},
        cloud=cloud,
    )


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    stage = Stage(tmp_path_factory.mktemp("kill"))
    try:
        stage.begin()
        began = time.monotonic()
        stage.start(IN_PEACE.format(log=stage.folder / "log"))
        kills, in_mid_step = kill_again_and_again(stage, Random(SEED))
        killed = time.monotonic()
        live = bring_to_an_end(stage)
        ended = time.monotonic()
    finally:
        stage.stop()
    cloud = LocalCloud(stage.folder / "cloud", base_url=stage.base_url)
    left = look(stage, cloud, live=live, kills=kills, in_mid_step=in_mid_step)
    print(f"\n{summary(left)}; {killed - began:.1f} s of kills, then {ended - killed:.1f} s to the end")
    yield left
    cloud.close()


def summary(left):
    runs = sum(map(len, left.runs.values()))
    return (
        f"{left.kills} kills, while {left.in_mid_step['submitting']} jobs were being sent and "
        f"{left.in_mid_step['store']} being stored; {len(left.tried)} creates begun, {len(left.made)} answered, "
        f"{len(left.jobs)} jobs; {runs} runs, {runs - len(left.runs)} of them a second one, which the timelines call "
        f"possible {sum(map(extra_attempts, left.events.values()))} times"
    )


def extra_attempts(events):
    return events.count("possible_duplicate")


def test_the_kills_fell_in_the_middle_of_steps(left):
    assert left.kills >= LEAST_KILLS
    assert left.in_mid_step["submitting"] > 0
    assert left.in_mid_step["store"] > 0


def test_every_job_that_a_kill_fell_upon_is_done_in_the_end(left):
    assert not left.live, "\n".join([*map(str, left.live), left.said])
    assert {job["status"] for job in left.jobs} == {"done"}
    assert len(left.jobs) >= 48


def test_a_killed_create_is_there_or_not_and_an_answered_one_is_there(left):
    there = {job["id"] for job in left.jobs}

    assert left.made <= there <= left.tried
    assert len(left.made) < len(left.tried)


def test_no_run_is_bought_twice_unless_the_timeline_says_so(left):
    untold = {
        job["prompt"]: left.events[job["id"]]
        for job in left.jobs
        if len(left.runs[job["prompt"]]) > 1 + extra_attempts(left.events[job["id"]])
    }

    assert untold == {}
    assert set(left.runs) == {job["prompt"] for job in left.jobs}
    assert all(job["runpod_job_id"] in left.runs[job["prompt"]] for job in left.jobs)


def test_every_picture_is_that_of_its_prompt_as_recorded(left):
    for job in left.jobs:
        found, (file,) = left.cloud.r2.read(str(job["result_r2_key"])), json.loads(job["outputs"] or "[{}]")

        assert found, job
        assert found.body == draw(job["prompt"])
        assert (file["key"], file["bytes"]) == (job["result_r2_key"], len(found.body))
        assert file["sha256"] == hashlib.sha256(found.body).hexdigest()


def test_every_job_begins_and_ends_once(left):
    wrong = {
        job_id: events
        for job_id, events in left.events.items()
        if events.count("created") != 1 or events.count("done") != 1
    }

    assert wrong == {}
    assert set(left.events) == {job["id"] for job in left.jobs}
