"""Cloudflare's calls: what leaves them for others when few are left, so that no lock-out comes of it."""

from datetime import timedelta

import pytest

from chalicelib import bootstrap, settings
from chalicelib.errors import TransientError
from tests.conftest import AUTH, call
from tools.cloud.rate_limit import SECONDS

LONG = {"run_seconds": 100_000}


@pytest.fixture
def rate_limited():
    return True


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


def fresh(bench, environment):
    """Another container."""
    return bootstrap.build(settings.load(environment), bench.clock)


def test_what_was_bought_with_the_last_calls_is_written_down(cloud, bench, environment):
    """The answer to the insert says that nine are left: nothing is sent for that, and what is sent is saved."""
    for left in (10, 22):
        cloud._rate_limit.leave(left)
        bench.service = fresh(bench, environment)
        bench.create()
        assert bench.service._saver.backlog == 0
    cloud._rate_limit.leave(1200)
    bench.service = fresh(bench, environment)
    timelines = {tuple(bench.timeline(job.id)) for job in bench.jobs()}
    assert timelines == {("created", "not_sent"), ("created", "submitted")}


def test_a_round_with_the_last_calls_sends_nothing_and_owes_nothing(cloud, bench, environment, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bench.service.store, "calls_left", lambda: 50)
        for _ in range(30):
            bench.create()
    leave(cloud, bench, 10)
    bench.round()
    assert (len(cloud.runpod.inputs()), bench.service._saver.backlog) == (0, 0)
    bench.service = fresh(bench, environment)
    bench.round(after=SECONDS)

    assert len(cloud.runpod.inputs()) == 30


def test_what_was_bought_is_saved_soon_also_with_few_calls_left(cloud, bench, monkeypatch):
    monkeypatch.setattr("chalicelib.pipeline.THREADS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(bench.service.store, "calls_left", lambda: 50)
        for _ in range(10):
            bench.create()
    leave(cloud, bench, 250)
    run = type(bench.service._runpod).run
    unsaved = []

    def slowly(self, *args, **options):
        bench.clock.advance(1)
        unsaved.append(sum(job.state == "submitting" for job in bench.jobs()))
        return run(self, *args, **options)

    monkeypatch.setattr(type(bench.service._runpod), "run", slowly)
    bench.round()
    assert unsaved[0] == 10
    assert unsaved[-1] < 6


@pytest.mark.parametrize(("header", "for_seconds"), [("r=3;t=99999999999", 300), ("r=3;t=20", 20), ("r=0;t=0", 0)])
def test_nothing_is_refused_for_longer_than_a_window(bench, faults, header, for_seconds):
    answer = {"success": True, "errors": [], "result": [{"success": True, "results": []}]}
    faults.add("/query$", (200, answer, {"ratelimit": f'"default";{header}'}))
    bench.service.store.tables(timeout=5.0)
    refused = 0
    for _ in range(400):
        try:
            bench.service.store.tables(timeout=0.5)
            break
        except TransientError:
            refused += 1
        bench.clock.advance(1)

    assert refused == for_seconds


def test_a_clock_that_stood_still_while_frozen_refuses_nothing_after(cloud, bench):
    leave(cloud, bench, 9)
    bench.clock.at += timedelta(seconds=SECONDS + 1)  # and the other clock has not gone on

    assert bench.service.store.tables(timeout=5.0)


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
