"""Cloudflare's calls: what leaves them for others when few are left, so that no lock-out comes of it."""

import pytest

from chalicelib import bootstrap
from chalicelib.errors import TransientError
from tests.conftest import AUTH, call
from tools.cloud import Account, LocalCloud
from tools.cloud.rate_limit import SECONDS

LONG = {"run_seconds": 100_000}


@pytest.fixture
def cloud(tmp_path, clock):
    cloud = LocalCloud(
        tmp_path / "cloud",
        base_url="http://cloud.test:8001",
        account=Account(),
        clock=lambda: clock.at.timestamp(),
        rate_limited=True,
    )
    yield cloud
    cloud.close()


def leave(cloud, bench, calls):
    """Have so many calls left, and the service know it."""
    cloud._rate_limit.leave(calls + 1)
    bench.service.store.tables(timeout=5.0)


@pytest.fixture
def bench(client, bench):
    bench.service = bootstrap.service()  # that of the routes
    return bench


def test_with_few_calls_left_those_who_ask_are_told_when_to_come_again(client, cloud, bench):
    job_id = bench.create()
    leave(cloud, bench, 149)

    for path in ("/api/jobs", f"/api/queue/status?id={job_id}", f"/api/jobs/{job_id}", "/api/stats"):
        status, answer, headers = call(client, "GET", path)
        assert (status, answer["code"], headers["Retry-After"]) == (503, "d1_few_calls", str(int(SECONDS))), path
    assert "149 of Cloudflare's API calls are left" in answer["error"]
    assert cloud._rate_limit.calls_left() == 149
    assert call(client, "GET", "/api/models")[0] == call(client, "GET", "/api/health")[0] == 200


def test_creating_goes_on_for_longer_and_only_queues(client, cloud, bench):
    leave(cloud, bench, 99)
    assert call(client, "POST", "/api/queue/create", {"prompt": "a cat"})[0] == 200
    assert cloud._rate_limit.calls_left() == 98
    assert cloud.runpod.inputs() == []

    leave(cloud, bench, 49)
    status, answer, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    assert (status, answer["code"]) == (503, "d1_few_calls")


def test_rounds_go_on_to_the_last_calls_and_then_wait_for_the_window(cloud, bench):
    leave(cloud, bench, 11)
    bench.round()
    bench.round()
    with pytest.raises(TransientError, match="9 of Cloudflare's API calls") as refused:
        bench.round()
    assert refused.value.code == "d1_few_calls"
    assert cloud._rate_limit.calls_left() == 9

    bench.round(after=SECONDS)
    assert bench.service.store.calls_left() == 1199


def test_a_round_saves_once_where_few_calls_are_left(cloud, bench, monkeypatch):
    monkeypatch.setattr("chalicelib.rounds.SAVE_EVERY", 0.0)
    monkeypatch.setattr("chalicelib.rounds.SAVE_SHARE", 0.0)
    monkeypatch.setattr("chalicelib.pipeline.THREADS", 1)
    for _ in range(20):
        bench.create()
    leave(cloud, bench, 250)

    calls = bench.d1_calls(lambda: bench.round())
    assert calls <= 5  # the claim, that they have ended, that they are stored
    assert {job.status for job in bench.jobs()} == {"done"}


def test_a_thousand_impatient_clients_do_not_lock_the_service_out(client, cloud, bench, lines):
    """Ten minutes in which somebody asks ten times a second, jobs come, and the rounds go on all the same."""
    made, rounds = [], []
    for second in range(600):
        for _ in range(10):
            bench.service.reads.forget()  # as many containers, each with a memory of its own
            call(client, "GET", "/api/jobs?limit=1")
        if second % 10 == 0:
            made.append(call(client, "POST", "/api/queue/create", {"prompt": "a cat"}, auth=AUTH)[0])
        if second % 15 == 0:
            rounds.append(bench.service.pipeline.run_round(bench.deadline(14.0)))  # raises where it is refused
        bench.clock.advance(1)

    said = lines()
    assert not [line for line in said if line.get("code") == "d1_rate_limited"]
    assert (len(rounds), made) == (40, [200] * 60)
    assert [line["status"] for line in said if line.get("route") == "/api/jobs"].count(503) > 1000
    assert sum(job.status == "done" for job in bench.jobs()) >= 55
