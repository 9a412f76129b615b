"""Why a job waits: each word provoked, and RunPod asked seldom enough for it."""

import json
import re
from datetime import timedelta

import pytest
import requests

from chalicelib import bootstrap, reasons
from chalicelib.errors import IndeterminateError
from chalicelib.jobs import from_text
from chalicelib.wire import Wire
from tests import openapi
from tests.conftest import Bench, call
from tools.cloud import Request

CREATE = "/api/queue/create"
RUN, HEALTH = r"POST .*/run$", r"GET .*/health$"
OTHERS = tuple(f"endpoint-{number}" for number in range(8))


@pytest.fixture
def endpoints():
    return OTHERS


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


@pytest.fixture
def workers(cloud):
    """Have the endpoint's health tell these workers, none of which takes a run."""

    def tell(**counts):
        key = {"authorization": f"Bearer {cloud.account.runpod_api_key}"}
        body = json.dumps({"workers": counts, "hold": True}).encode()
        assert cloud.handle(Request("POST", "/v2/local-endpoint/simulate/health", "", key, body)).status == 200

    return tell


def create(client, **body):
    status, answer, _ = call(client, "POST", CREATE, {"prompt": "a cat", **body})
    assert status == 200, answer
    return answer["id"]


def waiting(client, bench, job_id):
    """What the job and the list say, which is the same."""
    bench.service.reads.forget()
    _, one, _ = call(client, "GET", f"/api/jobs/{job_id}")
    _, page, _ = call(client, "GET", "/api/jobs")
    (listed,) = [job for job in page["jobs"] if job["id"] == job_id]
    assert one["job"]["waiting"] == listed["waiting"]
    return one["job"]["waiting"]


def code(client, bench, job_id):
    reason = waiting(client, bench, job_id)
    return reason and reason["code"]


def in_seconds(bench, text):
    return (from_text(text) - bench.clock.now()) / timedelta(seconds=1)


def asked(wire):
    return len([made for made in wire.calls if made.request.url.endswith("/health")])


def no_calls_left(bench, monkeypatch):
    """So that a create only queues."""
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 0)


# In our queue


def test_a_job_in_our_queue_has_its_place(client, bench, monkeypatch, wire):
    no_calls_left(bench, monkeypatch)
    ids = []
    for _ in range(3):
        ids.append(create(client))
        bench.clock.advance(1)

    found = [waiting(client, bench, job_id) for job_id in ids]

    assert [(reason["code"], reason["place"], reason["until"]) for reason in found] == [
        ("our_queue", 1, None),
        ("our_queue", 2, None),
        ("our_queue", 3, None),
    ]
    assert "with no job before it" in found[0]["sentence"]
    assert "with 2 jobs before it" in found[2]["sentence"]
    assert asked(wire) == 0


def test_jobs_are_not_counted_without_end(client, bench, monkeypatch):
    no_calls_left(bench, monkeypatch)
    for _ in range(3):
        call(client, "POST", CREATE, {"jobs": [{"prompt": "a cat"}] * 70})
    bench.clock.advance(1)

    reason = waiting(client, bench, create(client))

    assert reason["place"] == reasons.COUNTED_AHEAD + 1
    assert "with 200 jobs or more before it" in reason["sentence"]


def test_a_job_of_low_priority_says_so(client, bench, monkeypatch):
    create(client, priority="low")
    bench.clock.advance(1)

    reason = waiting(client, bench, create(client, priority="low"))

    assert (reason["code"], reason["place"]) == ("low_priority", 2)


@pytest.mark.parametrize(("times", "words"), [(1, "once"), (2, "2 times in a row")])
def test_what_runpod_did_not_take_is_sent_again_at_a_moment_that_is_told(client, bench, faults, times, words):
    faults.add(RUN, (429, "", {"Retry-After": "300"}), times=times)
    job_id = create(client)
    for _ in range(times - 1):
        bench.round(after=301)

    reason = waiting(client, bench, job_id)

    assert (reason["code"], reason["place"]) == ("backoff", None)
    assert 300 <= in_seconds(bench, reason["until"]) <= 900
    assert words in reason["sentence"]
    bench.clock.advance(901)
    assert code(client, bench, job_id) == "our_queue"


# Being sent


def test_a_job_is_just_being_sent_and_then_its_answer_is_lost(client, bench, faults):
    faults.add(RUN, requests.ReadTimeout("lost"), after_effect=True)
    job_id = create(client)

    assert waiting(client, bench, job_id)["code"] == "sending"
    bench.clock.advance(31)
    reason = waiting(client, bench, job_id)

    assert reason["code"] == "answer_lost"
    assert in_seconds(bench, reason["until"]) == 600 - 31
    bench.round(after=600)
    bench.round()
    assert bench.job(job_id).status == "done"


def test_a_row_of_the_earlier_version_without_a_run_is_as_if_its_answer_was_lost(client, bench, table):
    table(
        "INSERT INTO jobs (id, status, prompt, created_at, updated_at) "
        "VALUES ('old', 'running', 'a cat', '2026-01-31 10:00:00', '2026-01-31 10:00:00')"
    )

    reason = waiting(client, bench, "old")

    assert (reason["code"], reason["until"]) == ("answer_lost", None)


# At RunPod


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"running": 1}, "runpod_queue"),
        ({"idle": 1, "ready": 1}, "runpod_queue"),
        ({"ready": 1, "throttled": 3}, "runpod_queue"),
        ({"initializing": 1, "throttled": 1}, "worker_starting"),
        ({"throttled": 1, "unhealthy": 1}, "throttled"),
        ({"unhealthy": 2}, "unhealthy"),
        ({}, "scaled_to_zero"),
    ],
)
def test_at_runpod_it_is_what_the_endpoints_workers_do(client, bench, workers, there, expected):
    workers(**there)
    job_id = create(client)

    assert code(client, bench, job_id) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (59, "scaled_to_zero"),
        (60, "no_worker"),
        (599, "no_worker"),
        (600, "endpoint_paused"),
    ],
)
def test_an_endpoint_that_starts_no_worker_looks_paused_after_a_while(client, bench, workers, seconds, expected):
    workers()
    job_id = create(client)
    bench.clock.advance(seconds)

    assert code(client, bench, job_id) == expected


def test_a_job_that_is_drawn_waits_for_nothing(client, bench):
    job_id = create(client, input={"simulate": {"run_seconds": 60}})
    bench.round()

    assert bench.job(job_id).runpod_status == "IN_PROGRESS"
    assert waiting(client, bench, job_id) is None


def test_nor_does_one_that_has_ended(client, bench, faults):
    done, failed, cancelled = create(client), create(client, input={"simulate": {"status": "FAILED"}}), create(client)
    call(client, "POST", f"/api/jobs/{cancelled}/cancel")
    bench.round()

    assert [bench.job(job_id).status for job_id in (done, failed, cancelled)] == ["done", "error", "cancelled"]
    assert [waiting(client, bench, job_id) for job_id in (done, failed, cancelled)] == [None, None, None]


def test_a_job_that_is_to_be_cancelled_says_so_until_runpod_has_stopped_it(client, bench, faults):
    job_id = create(client, input={"simulate": {"queue_seconds": 600}})
    faults.add(r"POST .*/cancel/", (500, ""))

    call(client, "POST", f"/api/jobs/{job_id}/cancel")

    assert code(client, bench, job_id) == "cancelling"
    bench.round()
    assert waiting(client, bench, job_id) is None


# Being stored


def test_a_result_that_could_not_be_stored_is_tried_again_at_a_moment_that_is_told(client, bench, no_r2):
    job_id = create(client)
    bench.round()

    reason = waiting(client, bench, job_id)

    assert reason["code"] == "store_backoff"
    assert 0 < in_seconds(bench, reason["until"]) <= 60
    assert "once" in reason["sentence"]
    bench.clock.advance(61)
    assert code(client, bench, job_id) == "storing"


def test_one_whose_run_was_finished_before_it_could_be_cancelled_is_stored_not_cancelled(client, bench, no_r2, faults):
    job_id = create(client)
    bench.clock.advance(15)
    faults.add(r"GET .*/status/", (500, ""))
    call(client, "POST", f"/api/jobs/{job_id}/cancel")

    bench.round()

    assert bench.job(job_id).cancel_at is not None
    assert code(client, bench, job_id) == "store_backoff"


# What it costs


def test_runpod_is_asked_once_in_ten_seconds_however_many_jobs_wait(client, bench, wire):
    for _ in range(5):
        create(client, input={"simulate": {"queue_seconds": 600}})
    for _ in range(4):
        bench.clock.advance(2)
        assert len(call(client, "GET", "/api/jobs")[1]["jobs"]) == 5
    assert asked(wire) == 1

    bench.clock.advance(10)
    call(client, "GET", "/api/jobs")

    assert asked(wire) == 2


def test_each_endpoint_is_asked_for_itself(client, bench, wire, table, workers):
    workers(throttled=1)
    ids = [create(client, input={"simulate": {"queue_seconds": 600}}) for _ in range(3)]
    table("UPDATE jobs SET endpoint_id = ? WHERE id = ?", OTHERS[0], ids[1])
    table("UPDATE jobs SET endpoint_id = ? WHERE id = ?", OTHERS[1], ids[2])

    assert [code(client, bench, job_id) for job_id in ids] == ["throttled", "runpod_queue", "runpod_queue"]
    assert asked(wire) == 3


def test_runpod_is_not_asked_where_nothing_waits_there(client, bench, wire):
    create(client)
    drawn = create(client, input={"simulate": {"run_seconds": 600}})
    bench.round()

    assert waiting(client, bench, drawn) is None
    assert asked(wire) == 0


@pytest.mark.parametrize("answer", [(500, ""), (404, ""), (200, "{}"), requests.ConnectTimeout("no")])
def test_that_runpod_says_nothing_is_said(client, bench, wire, faults, answer):
    faults.add(HEALTH, answer, times=9)
    job_id = create(client, input={"simulate": {"queue_seconds": 600}})

    reason = waiting(client, bench, job_id)

    assert reason["code"] == "runpod_queue"
    assert "RunPod does not say" in reason["sentence"]
    assert asked(wire) == 1


def test_a_silent_runpod_costs_two_seconds_though_jobs_wait_at_many_endpoints(client, bench, table, monkeypatch):
    ids = [create(client, input={"simulate": {"queue_seconds": 600}}) for _ in OTHERS]
    for job_id, endpoint in zip(ids, OTHERS, strict=True):
        table("UPDATE jobs SET endpoint_id = ? WHERE id = ?", endpoint, job_id)
    exchange, given = Wire.exchange, []

    def silent(self, service, method, url, *, timeout, **how):
        if not url.endswith("/health"):
            return exchange(self, service, method, url, timeout=timeout, **how)
        given.append(timeout)
        bench.clock.advance(timeout)
        raise IndeterminateError("runpod_timeout", "RunPod did not answer in time.")

    monkeypatch.setattr(Wire, "exchange", silent)
    _, page, _ = call(client, "GET", "/api/jobs")

    assert given == [2.0]
    assert {job["waiting"]["code"] for job in page["jobs"]} == {"runpod_queue"}
    bench.clock.advance(20)
    call(client, "GET", "/api/jobs")
    assert given == [2.0, 2.0]


def test_an_old_rows_time_that_cannot_be_read_is_long_ago(bench, workers, job_factory):
    workers()

    shown = bench.service.views.job(job_factory(submitted_at="yesterday", runpod_status="IN_QUEUE"))

    assert shown["waiting"]["code"] == "endpoint_paused"


def test_the_document_has_every_word(request):
    text = (request.config.rootpath / "chalicelib" / "reasons.py").read_text()
    words = set(re.findall(r'_reason\(\s*"(\w+)"', text))

    assert words == set(openapi.DOCUMENT["components"]["schemas"]["Reason"]["properties"]["code"]["enum"])
    assert len(words) == 17
