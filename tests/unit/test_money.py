"""What jobs cost: each attempt's time by its model's price, what of it was wasted, and the figures of the last days."""

import json
import math
import re
from datetime import timedelta
from itertools import count
from random import Random
from urllib.parse import quote, urlsplit

import pytest
import requests

from chalicelib import bootstrap, catalogue, stats
from chalicelib.d1 import D1
from chalicelib.jobs import Status, to_text
from chalicelib.queries import QUERIES
from tests.conftest import Bench, call

CREATE = "/api/queue/create"
PRICE = 0.002  # US dollars for a second
CALLBACKS = {"PUBLIC_BASE_URL": "https://api.example", "WEBHOOK_SECRET": "w" * 32}  # of RunPod
STATUS = r"GET .*/status/"


@pytest.fixture
def d1_engine(each_d1_engine):
    return each_d1_engine


@pytest.fixture
def environment(environment):
    return {**environment, "RETRY_WORKER_FAILED": "true", **CALLBACKS}


@pytest.fixture
def bench(client, cloud, clock, faults, s3, monkeypatch, tmp_path):
    """With two models, of which the price of one is known."""
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": {"flux": {"price_per_second": PRICE}, "sdxl": {}}}))
    monkeypatch.setattr(catalogue, "FILE", file)
    bootstrap.service.cache_clear()
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def create(client, model="flux", **simulated):
    status, answer, _ = call(client, "POST", CREATE, {"model": model, "input": {"simulate": simulated}})
    assert status == 200, answer
    return answer["id"]


def shown(client, bench, job_id):
    bench.service.reads.forget()
    return call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]


def cost(client, bench, job_id):
    """US dollars in all, of them wasted, and how many attempts of which it is not known."""
    job = shown(client, bench, job_id)
    return tuple(job["cost"][name] for name in ("usd", "wasted_usd", "unknown_attempts"))


def attempts(client, bench, job_id):
    return [(attempt["outcome"], attempt["cost"]) for attempt in shown(client, bench, job_id)["attempts"]]


def seconds(number):
    return pytest.approx(number * PRICE)


# A job


def test_a_job_costs_its_time_at_the_worker(client, bench):
    job_id = create(client, queue_seconds=7, run_seconds=3)
    assert cost(client, bench, job_id) == (None, None, 0)

    bench.round()

    assert cost(client, bench, job_id) == (seconds(3), None, 0)
    assert attempts(client, bench, job_id) == [("completed", seconds(3))]
    assert call(client, "GET", "/api/jobs")[1]["jobs"][0]["cost"]["usd"] == seconds(3)


def test_what_failed_is_wasted_each_time(client, bench):
    job_id = create(client, run_seconds=3, status="FAILED")

    bench.round()
    assert cost(client, bench, job_id) == (seconds(3), seconds(3), 0)
    bench.round()
    bench.round()

    assert bench.job(job_id).status == "error"
    assert cost(client, bench, job_id) == (seconds(6), seconds(6), 0)
    assert attempts(client, bench, job_id) == [("lost", seconds(3)), ("failed", seconds(3))]


def test_of_a_job_that_is_drawn_at_last_the_runs_before_are_wasted(client, bench, faults):
    job_id = create(client, run_seconds=3)
    faults.add(STATUS, (200, {"id": "x", "status": "TIMED_OUT", "executionTime": 8000}))

    bench.round()
    bench.round()
    bench.round()

    assert bench.job(job_id).status == "done"
    assert cost(client, bench, job_id) == (seconds(11), seconds(8), 0)
    assert attempts(client, bench, job_id) == [("lost", seconds(8)), ("completed", seconds(3))]


def test_a_result_that_is_none_is_wasted(client, bench):
    job_id = create(client, run_seconds=3, shape="none")

    bench.round()

    assert bench.job(job_id).error_code == "no_output"
    assert cost(client, bench, job_id) == (seconds(3), seconds(3), 0)


def test_a_run_that_runpod_has_lost_may_have_cost_something(client, bench, faults):
    job_id = create(client, run_seconds=3)
    faults.add(STATUS, (404, ""))

    bench.round(after=151)
    assert cost(client, bench, job_id) == (None, None, 1)
    bench.round()
    bench.round()

    assert cost(client, bench, job_id) == (seconds(3), None, 1)
    assert attempts(client, bench, job_id) == [("lost", None), ("completed", seconds(3))]


@pytest.mark.parametrize(
    ("begun", "said", "expected"),
    [
        (False, None, (0.0, 0.0, 0)),  # as RunPod tells of it: no time at all
        (True, {"executionTime": 4500, "delayTime": 1000}, (seconds(4.5), seconds(4.5), 0)),
        (True, {}, (None, None, 1)),
    ],
)
def test_what_is_cancelled_costs_what_a_worker_did_for_it(client, bench, faults, begun, said, expected):
    job_id = create(client, queue_seconds=1 if begun else 600, run_seconds=600)
    bench.round()
    if said is not None:
        running = {"id": "x", "status": "IN_PROGRESS", "executionTime": 4000}
        faults.add(STATUS, (200, running))
        faults.add(STATUS, (200, {"id": "x", "status": "CANCELLED", **said}))

    call(client, "POST", f"/api/jobs/{job_id}/cancel")
    bench.round()

    assert bench.job(job_id).status == "cancelled"
    assert cost(client, bench, job_id) == expected
    assert attempts(client, bench, job_id) == [("cancelled", expected[0])]


def test_what_never_left_our_queue_has_cost_nothing_that_is_known_or_not(client, bench, faults):
    faults.add(r"POST .*/run$", (429, ""))
    job_id = create(client)

    call(client, "POST", f"/api/jobs/{job_id}/cancel")

    assert cost(client, bench, job_id) == (None, None, 0)
    assert attempts(client, bench, job_id) == []


def test_when_a_user_retries_a_job_all_before_is_wasted(client, bench):
    job_id = create(client, queue_seconds=0, run_seconds=3, status="FAILED")
    for _ in range(3):
        bench.round()

    call(client, "POST", f"/api/jobs/{job_id}/retry")
    assert cost(client, bench, job_id) == (seconds(6), seconds(6), 0)
    for _ in range(4):
        bench.round()

    assert cost(client, bench, job_id)[:2] == (seconds(12), seconds(12))
    assert [cost for _, cost in attempts(client, bench, job_id)] == [seconds(3)] * 4


@pytest.fixture
def dead(client, bench, no_r2):
    job_id = create(client, run_seconds=3)
    while not bench.job(job_id).dead_at:
        bench.round(after=120)
    return job_id


def test_a_dead_letter_is_not_wasted_and_a_redrive_costs_nothing_more(client, bench, dead, no_r2):
    assert cost(client, bench, dead) == (seconds(3), None, 0)
    no_r2()

    with_result = json.dumps({"id": "x", "status": "COMPLETED", "output": {"image_url": "http://cloud.test:8001/x"}})
    bench.faults.add(STATUS, (200, with_result), times=9)
    status, answer, _ = call(client, "POST", f"/api/jobs/{dead}/redrive")

    assert (status, answer["job"]["cost"]["usd"]) == (200, seconds(3))
    assert cost(client, bench, dead) == (seconds(3), None, 0)


def test_a_dead_letter_that_is_retried_is_wasted(client, bench, dead, no_r2):
    no_r2()
    call(client, "POST", f"/api/jobs/{dead}/retry")
    assert cost(client, bench, dead) == (seconds(3), seconds(3), 0)

    bench.round()
    bench.round()

    assert bench.job(dead).status == "done"
    assert cost(client, bench, dead) == (seconds(6), seconds(3), 0)


@pytest.mark.parametrize("model", ["sdxl", "unheard-of"])
def test_without_a_price_nothing_is_known_and_each_attempt_counts(client, bench, model):
    job_id = create(client, model, run_seconds=3, status="FAILED")

    for _ in range(3):
        bench.round()

    assert cost(client, bench, job_id) == (None, None, 2)
    assert attempts(client, bench, job_id) == [("lost", None), ("failed", None)]


def test_an_end_without_its_time_counts_as_unknown(client, bench, faults):
    job_id = create(client)
    faults.add(STATUS, (200, {"id": "x", "status": "FAILED", "error": "out of memory"}))

    bench.round()

    assert cost(client, bench, job_id) == (None, None, 1)


# A run whose answer was lost


@pytest.fixture
def lost(client, bench, faults):
    """A job whose run was begun though nobody knows its id, after the ten minutes for which one waits for it."""
    faults.add(r"POST .*/run$", requests.ReadTimeout("lost"), after_effect=True)
    return create(client, run_seconds=3)


def test_a_run_whose_answer_was_lost_counts_as_unknown_once_it_is_sent_again(client, bench, lost):
    assert cost(client, bench, lost) == (None, None, 0)

    bench.round(after=600)
    assert cost(client, bench, lost) == (None, None, 1)
    bench.round()

    assert cost(client, bench, lost) == (seconds(3), None, 1)
    assert attempts(client, bench, lost) == [("unknown", None), ("completed", seconds(3))]


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("looked_at", [True, False])
def test_one_that_is_adopted_counts_no_more(client, bench, cloud, lost, faults, given_up, looked_at):
    """RunPod's own callback names it, though it was given up; the look that follows at once must not count it again."""
    bench.round(after=600 if given_up else 15, seconds=11)  # too few to send it again
    assert cost(client, bench, lost) == (None, None, int(given_up))
    if not looked_at:
        faults.add(STATUS, (200, {"id": "x", "status": "IN_QUEUE"}), times=2)

    cloud.runpod.deliver_due(lambda url, _, body: call(client, "POST", urlsplit(url).path, body.decode(), auth={})[0])
    assert bench.job(lost).status == ("done" if looked_at else "running")
    bench.round()

    assert cost(client, bench, lost) == (seconds(3), None, 0)
    assert attempts(client, bench, lost)[-1] == ("completed", seconds(3))
    assert len(cloud.runpod.inputs()) == 1


# The figures of the last days

DAY = timedelta(days=1)


@pytest.fixture
def insert(table, clock):
    """Rows as the pipeline leaves them, in one statement."""
    numbers = count()

    def rows(number, *, age=timedelta(), **columns):
        at = to_text(clock.now() - age)
        given = [{"id": f"row-{next(numbers)}", "prompt": "", "created_at": at, **columns} for _ in range(number)]
        names = list(given[0])
        read = ", ".join(f"json_extract(value, '$.{name}')" for name in names)
        table(f"INSERT INTO jobs ({', '.join(names)}) SELECT {read} FROM json_each(?)", json.dumps(given))

    return rows


def figures(client, bench, days=None):
    bench.clock.advance(31)
    status, answer, _ = call(client, "GET", "/api/stats" if days is None else f"/api/stats?days={days}")
    assert status == 200, answer
    return answer


def test_without_a_job_there_is_nothing_to_tell(client, bench):
    found = figures(client, bench)

    nothing = {"p50": None, "p95": None, "p99": None, "jobs": 0}
    assert found["jobs"] == {status.value: 0 for status in Status}
    assert (found["success_rate"], found["complete"], found["days"]) == (None, True, 7)
    assert found["milliseconds"] == {span: nothing for span in stats.SPANS}
    assert found["costs"] == []
    assert found["cost"] == {"usd": None, "wasted_usd": None, "unknown_attempts": 0}


def test_jobs_are_counted_by_their_status_and_a_cancelled_one_is_no_failure(client, bench, insert):
    for status, number in (("done", 6), ("error", 2), ("cancelled", 5), ("queued", 3), ("running", 1)):
        insert(number, status=status)

    found = figures(client, bench)

    assert found["jobs"] == {"done": 6, "error": 2, "cancelled": 5, "queued": 3, "running": 1}
    assert found["success_rate"] == 0.75


@pytest.mark.parametrize("number", [1, 2, 19, 20, 21, 100, 101])
def test_the_times_are_those_of_the_nearest_rank(client, bench, clock, table, number):
    """Against the same rows, looked at in Python."""
    rng, begun, rows = Random(number), clock.now(), []
    for n in range(number):
        queue, run, store = rng.randrange(90_000), rng.randrange(60_000), rng.randrange(5_000)
        completed = begun + timedelta(milliseconds=queue + run)
        row = {"id": f"row-{n}", "status": "done", "created_at": to_text(begun), "execution_ms": run}
        row |= {"completed_at": to_text(completed), "finished_at": to_text(completed + timedelta(milliseconds=store))}
        rows.append(({"queue": queue, "run": run, "store": store, "total": queue + run + store}, row))
    names = list(rows[0][1])
    read = ", ".join(f"json_extract(value, '$.{name}')" for name in names)
    given = json.dumps([row for _, row in rows])
    table(f"INSERT INTO jobs ({', '.join(names)}) SELECT {read} FROM json_each(?)", given)

    found = figures(client, bench)["milliseconds"]

    for span in stats.SPANS:
        times = sorted(spans[span] for spans, _ in rows)
        marks = {f"p{mark}": times[math.ceil(number * mark / 100) - 1] for mark in (50, 95, 99)}
        assert {mark: found[span][mark] for mark in marks} == pytest.approx(marks, abs=1), span
        assert found[span]["jobs"] == number


def test_a_job_of_which_not_all_times_are_known_is_left_out_where_they_are_not(client, bench, clock, insert):
    done = to_text(clock.now() + timedelta(seconds=9))
    insert(1, status="done", completed_at=to_text(clock.now()), finished_at=done, execution_ms=None)
    insert(1, status="done", completed_at=None, finished_at=None, execution_ms=2000)
    insert(1, status="error", completed_at=to_text(clock.now()), finished_at=done, execution_ms=7000)

    found = figures(client, bench)["milliseconds"]

    assert {span: found[span]["jobs"] for span in stats.SPANS} == {"queue": 0, "run": 1, "store": 1, "total": 1}
    assert (found["run"]["p50"], found["total"]["p99"]) == (2000, 9000)


def test_the_cost_is_told_by_day_and_model(client, bench, insert):
    insert(2, status="done", model="flux", cost=0.25, wasted=0.1)
    insert(1, status="error", model="flux", cost=0.5, wasted=0.5, uncosted=1)
    insert(3, status="done", model="sdxl", uncosted=2)
    insert(1, status="done", model=None, cost=1, age=DAY)

    found = figures(client, bench)

    assert [tuple(line.values()) for line in found["costs"]] == [
        ("2026-01-31", "flux", 3, 1.0, 0.7, 1),
        ("2026-01-31", "sdxl", 3, None, None, 6),
        ("2026-01-30", "qwen-image", 1, 1.0, None, 0),
    ]
    assert found["cost"] == {"usd": 2.0, "wasted_usd": 0.7, "unknown_attempts": 7}


def test_the_sum_is_of_all_though_the_list_ends_somewhere(client, bench, insert, monkeypatch):
    sql, names = QUERIES["sum_costs"]
    assert "LIMIT 1000" in sql
    monkeypatch.setitem(QUERIES, "sum_costs", (sql.replace("LIMIT 1000", "LIMIT 2"), names))
    for model in ("flux", "sdxl", "qwen-image"):
        insert(1, status="done", model=model, cost=0.5, uncosted=1)

    found = figures(client, bench)

    assert len(found["costs"]) == 2
    assert (found["cost"]["usd"], found["cost"]["unknown_attempts"]) == (1.5, 3)


@pytest.mark.parametrize("days", ["0", "91", "-1", "1.5", "7d", "", "1000", "٧"])
def test_days_that_are_none_are_refused(client, bench, days):
    status, answer, _ = call(client, "GET", f"/api/stats?days={quote(days)}")

    assert (status, answer["code"]) == (400, "days_invalid")


@pytest.mark.parametrize(("days", "jobs"), [(1, 1), (2, 2), (7, 3), (None, 3), (90, 4)])
def test_only_jobs_of_those_days_are_looked_at(client, bench, clock, insert, days, jobs):
    for age in (0.5, 1.5, 6.5, 89.5, 91):
        insert(1, status="done", age=age * DAY)

    found = figures(client, bench, days)

    assert (found["jobs"]["done"], found["complete"], found["days"]) == (jobs, True, days or 7)
    assert found["since"] == to_text(clock.now().replace(second=0) - (days or 7) * DAY)


def test_of_very_many_the_newest_are_looked_at_and_it_is_said(client, bench, insert, monkeypatch, clock):
    monkeypatch.setattr(stats, "LOOKED_AT", 3)
    insert(2, status="error", age=3 * DAY, cost=5)
    insert(1, status="done", age=2 * DAY, cost=1)
    insert(2, status="done", age=DAY, cost=1)
    oldest = to_text(clock.now() - 2 * DAY)

    found = figures(client, bench)

    assert (found["complete"], found["since"]) == (False, oldest)
    assert (found["jobs"]["done"], found["jobs"]["error"], found["cost"]["usd"]) == (3, 0, 3)


def test_they_are_one_call_and_stand_for_half_a_minute(client, bench, insert, monkeypatch):
    query, calls = D1.query, []
    monkeypatch.setattr(D1, "query", lambda self, *given, **how: calls.append(1) or query(self, *given, **how))

    def ask(days=7):
        _, answer, headers = call(client, "GET", f"/api/stats?days={days}")
        return answer["jobs"]["done"], headers["ETag"]

    _, etag = ask()
    assert len(calls) == 1
    insert(1, status="done")
    calls.clear()
    bench.clock.advance(29)
    assert ask() == (0, etag)
    assert call(client, "GET", "/api/stats?days=7", headers={"If-None-Match": etag})[0] == 304
    assert len(calls) == 0
    assert ask(days=8)[0] == 1
    bench.clock.advance(1)
    assert ask()[0] == 1
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["count_by_status", "measure_spans", "sum_costs"])
def test_they_are_read_by_the_index_of_time(name, table, d1):
    sql, names = QUERIES[name]
    plan = [row["detail"] for row in table(f"EXPLAIN QUERY PLAN {sql}", *["[]"] * len(names))]

    assert any("jobs_created (created_at>?" in line for line in plan), plan
    assert not [line for line in plan if re.match(r"SCAN jobs\b", line)], plan
