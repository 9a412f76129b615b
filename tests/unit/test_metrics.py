"""How much there is of everything, once a minute: the metrics as they stand, and runs that no worker takes."""

import json

import pytest

from chalicelib.errors import TransientError
from chalicelib.metrics import METRICS
from chalicelib.r2 import R2
from tests.conftest import AUTH, call
from tools.cloud import Request

GAUGES = list(METRICS)[:11]
NO_WORKER = {"workers": {"idle": 0}, "hold": True}


@pytest.fixture
def environment(environment):
    return {**environment, "SERVICE_NAME": "s"}


@pytest.fixture
def minute(bench, lines):
    """Run a minute of the schedule; its lines."""

    def run():
        before = len(lines())
        bench.service.pipeline.run_minute(bench.deadline(57.5))
        return lines()[before:]

    return run


def stand(said):
    (first, *others) = [line for line in said if line["message"] == "round"]
    assert not [line for line in others if "Queued" in line]
    return {name: round(first[name]) for name in GAUGES}


def simulate_health(cloud, wish):
    headers = {"authorization": "Bearer local-runpod-key"}
    body = json.dumps(wish).encode()
    return cloud.handle(Request("POST", "/v2/local-endpoint/simulate/health", "", headers, body))


def test_of_nothing_all_is_nothing(minute):
    said = minute()

    assert stand(said) == dict.fromkeys(GAUGES, 0)
    assert sum(line.get("Rounds", 0) for line in said) == 4
    assert all(line["D1CallsLeft"] == 1199 for line in said if line["message"] == "round")


def test_what_waits_runs_and_is_stored_is_told_with_its_age(bench, minute, faults, monkeypatch):
    monkeypatch.setattr(R2, "put", _fail)
    bench.create()
    for _ in range(2):
        bench.create(simulate={"queue_seconds": 10_000})
    bench.create(simulate={"run_seconds": 10_000})
    bench.round(after=60)
    faults.add("/run$", (429, "", {"Retry-After": "7200"}), times=3)
    for _ in range(3):
        bench.create()
    bench.clock.advance(600)

    found = stand(minute())
    assert {name: found[name] for name in ("Queued", "Running", "Storing", "DeadLetters")} == {
        "Queued": 3, "Running": 3, "Storing": 1, "DeadLetters": 0,
    }  # fmt: skip
    assert (found["OldestQueued"], found["OldestRunning"], found["OldestWithoutWorker"]) == (600, 660, 660)
    assert found["OldestStoring"] == 656  # its run took four seconds


def test_times_that_cannot_be_read_hide_no_others(bench, minute, table):
    for job_id, created_at in (("a", ""), ("b", "2026-01-31")):
        columns = "id, status, step, due_at, created_at"
        table(f"INSERT INTO jobs ({columns}) VALUES (?, 'queued', 'submit', '2099', ?)", job_id, created_at)

    assert stand(minute())["OldestQueued"] == 86_340


def test_what_is_no_json_stops_no_round(bench, minute, table):
    table("INSERT INTO jobs (id, status, step, outputs, due_at) VALUES ('a', 'running', 'store', 'no JSON', '2099')")

    assert stand(minute())["Storing"] == 1


def test_a_pause_that_nobody_has_waited_for_is_forgotten(bench, minute, table):
    columns = "endpoint_id, kind, failures, paused_until, code, sentence, since"
    table(f"INSERT INTO endpoint_faults ({columns}) VALUES ('e', 'call', 9, '2026-01-31T22:58:59.000Z', 'c', 's', 't')")

    assert stand(minute())["PausedEndpoints"] == 0


def _fail(self, *args, **options):
    raise TransientError("r2_failed", "R2 is down.", service="r2")


def test_a_job_that_was_retried_waits_since_then(client, bench, minute, faults):
    faults.add("/run$", (400, "no"))
    job_id = bench.create()
    bench.clock.advance(100_000)
    faults.add("/run$", (429, "", {"Retry-After": "7200"}), times=9)
    call(client, "POST", f"/api/jobs/{job_id}/retry", auth=AUTH)
    bench.round(after=15)

    assert stand(minute())["OldestQueued"] == 15


def test_dead_letters_and_the_spool_and_what_is_paused_are_told(bench, minute, table):
    bench.create(simulate={"queue_seconds": 10_000})
    files = [{"spooled": True, "bytes": 1000}, {"bytes": 5}, {"spooled": True, "bytes": 24}]
    table("UPDATE jobs SET step = 'store', outputs = ?, due_at = '2099'", json.dumps(files))
    table("INSERT INTO jobs (id, status, dead_at) VALUES ('d', 'error', '2026')")
    for kind in ("run", "call"):
        table(
            "INSERT INTO endpoint_faults (endpoint_id, kind, failures, paused_until, code, sentence, since) "
            f"VALUES ('e', '{kind}', 9, '2099', 'c', 's', 't')"
        )

    found = stand(minute())
    assert (found["DeadLetters"], found["SpooledFiles"], found["SpooledBytes"], found["PausedEndpoints"]) == (
        1, 2, 1024, 1,
    )  # fmt: skip


def test_where_the_first_round_fails_a_later_one_tells(minute, faults):
    faults.add("/query$", (500, "no"), times=3)
    said = minute()

    told = [line for line in said if line["message"] == "round"]
    assert ["Queued" in line for line in told] == [False, False, True, False]
    assert [line.get("RoundsFailed") for line in told] == [1, None, None, None]


def test_it_costs_no_call(bench):
    assert bench.d1_calls(lambda: bench.round(measure=True)) == 1


def test_an_endpoint_without_workers_is_told_each_minute_while_runs_wait(bench, minute, cloud):
    simulate_health(cloud, NO_WORKER)
    bench.create()
    assert [line for line in minute() if line["message"] == "runs_wait"] == []
    bench.clock.advance(100)
    (line,) = [line for line in minute() if line["message"] == "runs_wait"]
    assert (line["endpoint_id"], line["code"], line["level"]) == ("local-endpoint", "no_worker", "warning")
    bench.clock.advance(600)
    (line,) = [line for line in minute() if line["message"] == "runs_wait"]
    assert line["code"] == "endpoint_paused"
    assert "maximum of workers" in line["reason"]

    simulate_health(cloud, {"workers": None})
    minute()
    assert [line for line in minute() if line["message"] == "runs_wait"] == []


def test_runs_that_wait_for_a_busy_worker_are_not_worth_a_line(bench, minute):
    bench.create(simulate={"queue_seconds": 10_000})
    bench.clock.advance(1000)

    assert [line for line in minute() if line["message"] == "runs_wait"] == []
