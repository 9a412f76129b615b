"""How far a worker says that it is: read from whatever it reports, shown while it runs, and nowhere else."""

import json

import pytest

from chalicelib import bootstrap, progress
from tests.conftest import Bench, call

STATUS = r"GET .*/status/"


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


@pytest.mark.parametrize(
    ("output", "text", "fraction"),
    [
        ("4/10", "4/10", 0.4),
        ("step 3 / 8 of the second pass", "step 3 / 8 of the second pass", 0.375),
        ("1/3", "1/3", 0.333),
        ("5/4", "5/4", None),
        ("0/0", "0/0", None),
        ("40%", "40%", 0.4),
        ("12.5 % done", "12.5 % done", 0.125),
        ("140%", "140%", None),
        ("loading the model", "loading the model", None),
        ("กำลังวาด 2/4", "กำลังวาด 2/4", 0.5),
        (0.25, "0.25", 0.25),
        (1, "1", 1),
        (0, "0", 0),
        (55, "55", 0.55),
        (101, "101", None),
        (-1, "-1", None),
        pytest.param(10**400, str(10**400)[:200], None, id="a number without end"),
        (float("nan"), "NaN", None),
        (float("inf"), "Infinity", None),
        ({"progress": "7/8"}, "7/8", 0.875),
        ({"progress": 0.5}, "0.5", 0.5),
        ({"percentage": 0.5}, "0.5", 0.005),
        ({"percent": 100}, "100", 1),
        ({"message": "warming up", "progress": ""}, "warming up", None),
        ({"status": "2 of 4", "message": "50%"}, "50%", 0.5),
        ({"progress": None, "status": "loading"}, "loading", None),
        ({"progress": {"step": 4}, "percent": 10}, "10", 0.1),
        ("x" * 300, "x" * 200, None),
        ("half a character: \ud83d", "half a character: ?", None),
        (
            "reading https://r2.example/uploads/a.png?X-Amz-Signature=abc",
            "reading https://r2.example/uploads/a.png?…",
            None,
        ),
    ],
)
def test_it_is_a_text_and_a_share_of_one_where_that_can_be_told(output, text, fraction):
    assert json.loads(progress.read(output)) == {"text": text, "fraction": fraction}


@pytest.mark.parametrize(
    "output", [None, "", {}, [], ["4/10"], True, {"progress": True}, {"progress": ["4/10"]}, {"images": ["x"]}]
)
def test_what_reports_nothing_is_nothing(output):
    assert progress.read(output) is None


def shown(client, bench, job_id):
    bench.service.reads.forget()
    answers = [
        call(client, "GET", f"/api/jobs/{job_id}")[1]["job"],
        call(client, "GET", "/api/jobs")[1]["jobs"][0],
    ]
    assert answers[0]["progress"] == answers[1]["progress"]
    return answers[0]["progress"]


def test_it_is_shown_while_the_job_runs_and_gone_when_it_is_done(client, bench):
    job_id = bench.create(simulate={"queue_seconds": 20, "run_seconds": 40, "progress": 4})
    seen = []

    for _ in range(4):
        bench.round()
        seen.append(shown(client, bench, job_id))

    assert seen == [None, {"text": "1/4", "fraction": 0.25}, {"text": "2/4", "fraction": 0.5}, None]
    assert bench.job(job_id).status == "done"


def test_it_has_no_line_in_the_timeline(bench):
    job_id = bench.create(simulate={"run_seconds": 60, "progress": 10})

    for _ in range(5):
        bench.round()

    assert bench.timeline(job_id) == ["created", "submitted", "observed", "completed", "done"]


def test_progress_that_is_the_same_is_not_saved(bench):
    bench.create(simulate={"run_seconds": 900, "progress": 2})
    assert bench.d1_calls(bench.round) == 2

    assert [bench.d1_calls(bench.round) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("said", ["half a character: \\ud83d", "\\u0000", "1" + "0" * 400])
def test_whatever_a_worker_says_its_run_goes_on_and_the_same_again_is_not_saved(client, bench, faults, said):
    job_id = bench.create(simulate={"run_seconds": 60})
    value = said if said.isdigit() else f'"{said}"'
    faults.add(STATUS, (200, f'{{"id": "x", "status": "IN_PROGRESS", "output": {{"progress": {value}}}}}'), times=2)

    assert bench.d1_calls(bench.round) == 2
    assert bench.d1_calls(bench.round) == 1

    assert shown(client, bench, job_id)["text"]
    bench.round(after=60)
    assert bench.job(job_id).status == "done"


def test_progress_of_a_run_that_was_lost_is_forgotten(client, bench, faults):
    job_id = bench.create(simulate={"run_seconds": 900, "progress": 2})
    bench.round()
    assert shown(client, bench, job_id) == {"text": "0/2", "fraction": 0}
    faults.add(STATUS, (200, '{"id": "x", "status": "TIMED_OUT"}'))

    bench.round()

    assert bench.job(job_id).attempt == 1
    assert shown(client, bench, job_id) is None


def test_a_failed_job_shows_none(client, bench):
    job_id = bench.create(simulate={"run_seconds": 20, "progress": 2, "status": "FAILED"})
    bench.round()
    assert shown(client, bench, job_id) is not None

    bench.round()

    assert bench.job(job_id).status == "error"
    assert shown(client, bench, job_id) is None


def test_a_worker_that_stops_telling_is_shown_with_what_it_told_last(client, bench, faults):
    job_id = bench.create(simulate={"run_seconds": 900, "progress": 2})
    bench.round()
    faults.add(STATUS, (200, '{"id": "x", "status": "IN_PROGRESS"}'))

    assert bench.d1_calls(bench.round) == 1

    assert shown(client, bench, job_id) == {"text": "0/2", "fraction": 0}
