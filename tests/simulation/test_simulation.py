"""Aimed schedules, every crash point, random seeds; `python -m tests.simulation` runs more of the last."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.crashes import STORIES, kill_twice, single_kills, tell
from tests.simulation.crowd import run_crowd
from tests.simulation.faults import CLASSES
from tests.simulation.mutants import MUTANTS, ROOT
from tests.simulation.scenario import RATES, run_seed
from tests.simulation.scenario import WINDOWS as LONG_FAULTS
from tests.simulation.windows import WINDOWS, run_window

SEEDS = 300
CHUNK = 50


@pytest.mark.parametrize("name", WINDOWS)
def test_window(name):
    run_window(name)


@pytest.mark.parametrize("story", STORIES)
def test_a_kill_at_any_call_loses_nothing(story):
    kills = list(single_kills(story))

    assert len(kills) >= 30
    for kill in kills:
        tell(story, kill)


FIRST_KILLS = [
    (story, first) for story in ("one_job_by_all_ways", "one_job_by_polling") for first in single_kills(story)
]


@pytest.mark.parametrize(("story", "first"), FIRST_KILLS, ids=[f"{story}-{first}" for story, first in FIRST_KILLS])
def test_kills_at_any_two_calls_lose_nothing(story, first):
    kill_twice(story, first)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeds(first):
    outcomes = [run_seed(seed) for seed in range(first, first + CHUNK)]

    assert [outcome.violation for outcome in outcomes if outcome.violation] == []
    injected = sum((outcome.faults for outcome in outcomes), Counter())
    assert set(RATES) | set(LONG_FAULTS) | set(injected) <= set(CLASSES)
    assert sum(injected.values()) > 10 * CHUNK


def test_a_seed_is_replayed_call_by_call():
    code = "from tests.simulation.scenario import run_seed; print(*run_seed(3).trace, sep='\\n')"
    traces = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }

    assert len(traces) == 1
    assert len(traces.pop().splitlines()) > 40


def test_ten_thousand_due_jobs_all_end_in_a_bounded_number_of_calls():
    crowd = run_crowd(10_000)

    assert crowd.finals == {"done": 200, "error": 9_800}
    assert crowd.most_calls <= 3 + 20  # a save a second is what a round may do while it saves
    assert crowd.minutes < 60


def test_there_are_enough_mutants_and_each_breaks_one_place():
    assert len(MUTANTS) >= 15
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        text = (ROOT / "chalicelib" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, mutant.name
