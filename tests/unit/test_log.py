"""What is logged of a job's life, what never is, and the metrics in it."""

import json
import logging
from dataclasses import replace

import pytest

from chalicelib import log, metrics
from tests.conftest import AUTH, call

SIGNED = "https://host/picture.png?X-Amz-Signature=abc"


@pytest.fixture
def environment(environment):
    return {**environment, "SERVICE_NAME": "ob-ai-studio-test"}


def poll(client, clock, seconds=15):
    clock.advance(seconds)
    return call(client, "POST", "/dev/runpod-poll")


def of_job(lines):
    return [line for line in lines() if "job_id" in line]


def test_every_move_of_a_jobs_life_is_a_line(client, clock, lines):
    _, made, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    poll(client, clock)

    said = of_job(lines)
    assert [(line["message"], line.get("step_from"), line.get("step_to")) for line in said] == [
        ("created", None, None),
        ("submitted", "submitting", "poll"),
        ("completed", "poll", "store"),
        ("done", "store", "done"),
    ]
    assert {line["job_id"] for line in said} == {made["id"]}
    assert [line["attempt"] for line in said] == [1, 1, 1, 1]
    assert [line.get("ms") for line in said] == [None, 0, 15000, 0]
    assert all(line["runpod_job_id"] and line["endpoint_id"] == "local-endpoint" for line in said[1:])


def test_what_the_table_itself_moves_is_a_line_too(client, clock, faults, lines):
    faults.add("/run$", (500, "no"))
    _, made, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    poll(client, clock, 601)
    call(client, "POST", f"/api/jobs/{made['id']}/cancel")
    poll(client, clock)

    assert [line["message"] for line in of_job(lines)] == [
        "created", "submit_unknown", "possible_duplicate", "submitting", "submitted", "cancel_asked", "cancelled",
    ]  # fmt: skip


def test_a_cancel_while_it_waits_and_a_retry_are_lines(client, clock, faults, lines):
    faults.add("/run$", (401, "no"))
    _, made, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    call(client, "POST", f"/api/jobs/{made['id']}/cancel")
    call(client, "POST", f"/api/jobs/{made['id']}/retry")
    clock.advance(1)
    call(client, "POST", f"/api/jobs/{made['id']}/cancel")
    call(client, "DELETE", f"/api/jobs/{made['id']}")

    assert [line["message"] for line in of_job(lines)] == [
        "created", "submit_refused", "cancelled", "retried", "cancelled", "deleting", "deleted",
    ]  # fmt: skip


def test_of_a_bug_only_words_of_the_code_are_told(lines):
    try:
        try:
            raise ValueError(SIGNED)
        except ValueError as error:
            raise TypeError("'NoneType' object is not iterable") from error
    except TypeError:
        log.crashed("it_crashed", job_id="j")

    (line,) = lines()
    assert line["level"] == "error"
    told = line["exception"].splitlines()
    assert [told[0], *(line for line in told if line.startswith("TypeError"))] == [
        "ValueError",
        "TypeError: 'NoneType' object is not iterable",
    ]
    assert "test_log.py" in line["exception"]


def test_what_runpod_says_of_an_input_is_left_to_the_timeline(client, clock, faults, lines):
    faults.add("/run$", (401, "no"))
    _, made, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    faults.add("/run$", (400, {"detail": "bad request: a cat is no prompt"}))
    status, answer, _ = call(client, "POST", "/dev/runpod", {"jobId": made["id"]})

    assert status == 502
    assert "a cat is no prompt" in answer["error"]
    (line,) = [line for line in lines() if line["message"] == "request_failed"]
    assert (line["code"], line["reason"]) == ("runpod_refused", "RunPod refused the input (HTTP 400).")


def test_nor_does_another_job_tell_what_runpod_says_of_one(client, faults, lines):
    faults.add("/run$", (401, {"error": "no key for a cat"}), times=5)
    for _ in range(6):
        _, made, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    _, answer, _ = call(client, "GET", f"/api/jobs/{made['id']}")

    assert answer["job"]["waiting"]["sentence"].endswith("RunPod refused the key (HTTP 401); check RUNPOD_API_KEY.")
    (line,) = [line for line in lines() if line["message"] == "endpoint_errors"]
    assert "no key" not in line["reason"]


def test_other_libraries_tell_no_address(lines, capfd):
    root = logging.getLogger()
    handler = logging.StreamHandler()  # as Lambda's runtime sets one up
    root.addHandler(handler)
    try:
        for name in ("urllib3.connectionpool", "botocore.endpoint"):
            logging.getLogger(name).warning("Failed to parse headers (url=%s)", SIGNED)
    finally:
        root.removeHandler(handler)

    assert capfd.readouterr().err == ""


def test_a_chain_that_bites_its_tail_is_told_once(lines):
    try:
        try:
            raise ValueError("one")
        except ValueError as error:
            error.__context__ = other = KeyError("two")
            other.__context__ = error
            raise
    except ValueError:
        log.crashed("it_crashed")

    (line,) = lines()
    assert line["exception"].splitlines()[0] == "KeyError"


def test_a_bug_in_telling_undoes_nothing(lines, monkeypatch):
    monkeypatch.setattr(log, "_count", lambda event: 1 / 0)
    log.happened("created", "j")

    (line,) = lines()
    assert (line["message"], line["level"]) == ("not_told", "error")


def test_what_has_no_json_is_told_by_its_kind(lines):
    log.happened("created", object())

    assert lines()[0]["job_id"] == "object"


def test_a_request_says_what_it_came_to_in_metrics(client, lines):
    call(client, "POST", "/api/queue/create", {"prompt": "a cat"})

    line = lines()[-1]
    assert (line["Service"], line["D1Calls"], line["Submits"]) == ("ob-ai-studio-test", 2, 1)
    (told,) = line["_aws"]["CloudWatchMetrics"]
    assert (told["Namespace"], told["Dimensions"]) == ("OBAIStudio", [["Service"]])
    assert {metric["Name"] for metric in told["Metrics"]} <= line.keys() & metrics.METRICS.keys()
    assert line["D1CallsLeft"] == 1199


def test_a_round_says_what_it_came_to(client, clock, lines):
    call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    poll(client, clock)

    (line,) = [line for line in lines() if line["message"] == "round"]
    assert (line["Rounds"], line["Done"], line["CostUSD"], line["RoundSeconds"]) == (1, 1, 0, 0)
    assert "Done" not in lines()[-1]  # counted once


def test_a_round_that_fails_says_so(client, clock, faults, lines):
    faults.add("/query$", (500, "no"), times=9)
    poll(client, clock)

    (line,) = [line for line in lines() if line["message"] == "round"]
    assert (line["Rounds"], line["RoundsFailed"], line["D1Calls"]) == (1, 1, 3)


def test_a_failed_job_is_counted_by_its_code(client, clock, lines):
    wish = {"prompt": "a cat", "simulate": {"status": "FAILED"}}
    call(client, "POST", "/api/queue/create", {"input": wish})
    poll(client, clock)

    (line,) = [line for line in lines() if line.get("Errors")]
    assert (line["message"], line["Code"], line["Errors"]) == ("failed", "worker_failed", 1)
    (told,) = line["_aws"]["CloudWatchMetrics"]
    assert told["Dimensions"] == [["Service"], ["Service", "Code"]]


def test_what_a_lock_out_leaves_is_nothing(client, faults, lines):
    faults.add("/query$", (429, {"errors": [{"code": 971, "message": "wait"}]}, {"Retry-After": "300"}))
    call(client, "GET", "/api/jobs")

    assert lines()[-1]["D1CallsLeft"] == 0


def test_without_a_name_no_line_has_metrics(client, clock, lines, monkeypatch):
    monkeypatch.delenv("SERVICE_NAME")
    call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    poll(client, clock)
    poll(client, clock)

    assert not [line for line in lines() if "_aws" in line]
    assert [line["message"] for line in lines()].count("round") == 1  # the second had nothing to do
    assert metrics.take(clock.now()) == {}


def test_costs_are_counted_as_they_come(bench, lines):
    metrics.name("s")
    job = bench.job(bench.create())
    before = replace(job, cost=0.25, wasted=None)
    log.saved(_change(before, replace(job, cost=0.75, wasted=0.75)), bench.clock.now())

    taken = metrics.take(bench.clock.now())
    assert (taken["CostUSD"], taken["WastedUSD"]) == (0.5, 0.75)


def _change(before, job):
    from chalicelib.jobs import Change

    return Change(job=job, before=before, event="failed")


def test_lines_are_json_and_keys_are_not_in_them(client, lines):
    call(client, "GET", "/api/jobs", auth={"Authorization": "Bearer wrong"})
    call(client, "GET", "/api/jobs", auth=AUTH)

    assert [line["status"] for line in lines()] == [401, 200]
    assert "wrong" not in json.dumps(lines())
