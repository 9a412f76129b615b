import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from random import Random

import pytest

from chalicelib import jobs, moves
from chalicelib.errors import IllegalTransition, PermanentError, TransientError
from chalicelib.jobs import FINAL, TRANSITIONS, Job, State, Status

NOW = datetime(2026, 3, 1, 12, 0, 0, 123_456, tzinfo=UTC)
WHY = TransientError("runpod_busy", "RunPod is busy.")
RUNPOD = {"runpod_status": "COMPLETED", "queue_ms": 10, "execution_ms": 20}

VERBS = {
    "accept": lambda job: moves.accept(job, runpod_job_id="run-9", runpod_status="IN_QUEUE", now=NOW),
    "doubt": lambda job: moves.doubt(job, WHY, now=NOW),
    "give_back": lambda job: moves.give_back(job, WHY, now=NOW, rng=Random(1)),
    "observe": lambda job: moves.observe(job, runpod=RUNPOD, now=NOW),
    "complete": lambda job: moves.complete(job, lease_until="2026-03-01T12:01:00.000Z", runpod=RUNPOD, now=NOW),
    "rerun": lambda job: moves.rerun(job, WHY, runpod=RUNPOD, now=NOW),
    "hold": lambda job: moves.hold(job, WHY, now=NOW, rng=Random(1)),
    "finish": lambda job: moves.finish(job, now=NOW),
    "fail": lambda job: moves.fail(job, WHY, now=NOW),
    "bury": lambda job: moves.bury(job, WHY, now=NOW),
    "confirm_cancel": lambda job: moves.confirm_cancel(job, runpod=RUNPOD, now=NOW),
    "put_back": lambda job: moves.put_back(job, now=NOW),
    "retry": lambda job: moves.retry_job(job, by="me", deadline_at="2026-03-02T12:00:00.000Z", now=NOW),
    "redrive": lambda job: moves.redrive(job, by="me", now=NOW),
}
MADE_IN_SQL = {"claim", "expire", "cancel"}


def test_every_move_has_a_verb_or_is_made_in_sql():
    assert set(TRANSITIONS) == set(VERBS) | MADE_IN_SQL


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", list(State))
def test_a_verb_moves_a_job_only_as_the_table_says(verb, state, job_factory):
    sources, target = TRANSITIONS[verb]
    job = job_factory(state, outputs=json.dumps([{"key": "k", "url": "u", "bytes": 3}]))

    if state not in sources:
        with pytest.raises(IllegalTransition):
            VERBS[verb](job)
        return
    change = VERBS[verb](job)

    assert change.job.state is target
    assert change.job.status == jobs.STATUS_OF[target]
    assert (change.job.step is None) == (target in FINAL)
    assert (change.job.finished_at is not None) == (target in FINAL)
    assert change.job.version == job.version
    assert change.before is job


def test_final_states_are_those_that_nothing_leaves():
    assert {"done", "error", "cancelled"} == FINAL


def test_only_acceptance_is_a_fact_that_no_version_guards(job_factory):
    outputs = json.dumps([{"key": "k", "url": "u", "bytes": 3}])
    accepted = {
        verb: make(job_factory(next(iter(TRANSITIONS[verb][0])), outputs=outputs)).accepted
        for verb, make in VERBS.items()
    }

    assert {verb for verb, fact in accepted.items() if fact} == {"accept"}


def test_a_certain_refusal_gives_the_attempt_back_and_backs_off(job_factory):
    job = job_factory(State.SUBMITTING, attempt=2, failures=3)

    change = moves.give_back(job, WHY, now=NOW, rng=Random(1))

    assert change.job.attempt == 1
    assert change.job.failures == 4
    wait = jobs.from_text(change.job.due_at) - NOW
    assert timedelta(seconds=96) <= wait <= timedelta(seconds=120)
    assert change.detail["code"] == "runpod_busy"


def test_retry_after_wins_over_the_schedule(job_factory):
    locked = TransientError("runpod_busy", "RunPod is busy.", retry_after=300)

    change = moves.give_back(job_factory(State.SUBMITTING), locked, now=NOW, rng=Random(1))

    assert timedelta(seconds=299.9) <= jobs.from_text(change.job.due_at) - NOW <= timedelta(seconds=301)


def test_an_unsent_claim_counts_nothing(job_factory):
    change = moves.return_unsent(job_factory(State.SUBMITTING, attempt=1, failures=2), now=NOW)

    assert (change.job.attempt, change.job.failures) == (0, 2)
    assert change.job.due_at == jobs.to_text(NOW)


def test_an_unknown_answer_keeps_the_attempt_and_the_waiting_time(job_factory):
    job = job_factory(State.SUBMITTING, due_at="2026-03-01T12:10:00.000Z")

    change = moves.doubt(job, WHY, now=NOW)

    assert (change.job.attempt, change.job.due_at) == (job.attempt, job.due_at)


def test_a_long_error_is_cut(job_factory):
    change = moves.fail(job_factory(), PermanentError("worker_failed", "x" * 10_000), now=NOW)

    assert len(change.job.error_message) == moves.MAX_ERROR_CHARS
    assert len(change.detail["reason"]) == moves.MAX_ERROR_CHARS


@pytest.mark.parametrize(
    ("columns", "state"),
    [
        ({"status": "queued"}, State.SUBMIT),
        ({"status": "running", "runpod_job_id": "run-1"}, State.POLL),
        ({"status": "queued", "runpod_job_id": "run-1"}, State.POLL),
        ({"status": "running"}, State.SUBMITTING),
        ({"status": "done", "runpod_job_id": "run-1"}, State.DONE),
        ({"status": "error"}, State.ERROR),
    ],
)
def test_a_row_of_the_earlier_version_stands_where_it_looks(columns, state):
    assert Job(id="old", **columns).state is state


@pytest.mark.parametrize(
    ("attempt", "number", "stem"),
    [
        (0, 1, "jobs/2026/01/job-1/output"),
        (1, 1, "jobs/2026/01/job-1/output"),
        (1, 2, "jobs/2026/01/job-1/output-2"),
        (2, 1, "jobs/2026/01/job-1/2/output"),
        (2, 3, "jobs/2026/01/job-1/2/output-3"),
    ],
)
def test_the_key_is_a_function_of_the_row_and_the_place_in_the_answer(attempt, number, stem, job_factory):
    assert jobs.result_stem(job_factory(attempt=attempt), number) == stem


def test_a_store_that_comes_further_forgets_its_failures(job_factory):
    job = job_factory(State.STORE, failures=3)

    spooled = moves.keep(job, [{"key": "k.png", "spooled": True}], links=[None], problems=None)
    further = moves.keep(replace(spooled, failures=2), [{"key": "k.png"}], links=[None], problems=None)

    assert (spooled.failures, spooled.files) == (0, [])
    assert (further.failures, further.files) == (0, [{"key": "k.png"}])
    assert moves.keep(replace(further, failures=2), [{"key": "k.png"}], links=[None], problems=None).failures == 2
    assert moves.keep(job, [], links=[None], problems=None).failures == 3


def sign(key):
    return f"https://r2.example/{key}?X-Amz-Signature=1"


def test_the_default_payload_is_prompt_model_and_job_id():
    job = jobs.new(job_id="job-1", prompt="แมว", model="qwen-image", payload=None, now=NOW)

    assert job.payload(sign) == {"prompt": "แมว", "model": "qwen-image", "jobId": "job-1"}


@pytest.mark.parametrize(
    ("given", "prompt", "sent"),
    [
        ({"steps": 4}, "", {"steps": 4}),
        ({"steps": 4}, "a cat", {"steps": 4, "prompt": "a cat"}),
        ({"prompt": "its own"}, "a cat", {"prompt": "its own"}),
        ({"workflow": {"1": {}}}, "a cat", {"workflow": {"1": {}}}),
        ({}, "a cat", {"prompt": "a cat"}),
    ],
)
def test_an_own_input_is_sent_unchanged_but_for_a_missing_prompt(given, prompt, sent):
    job = jobs.new(job_id="job-1", prompt=prompt, model="m", payload=jobs.payload_from(given, prompt), now=NOW)

    assert job.payload(sign) == sent
    assert json.loads(job.input) == sent


def test_a_new_job_is_due_at_once():
    job = jobs.new(job_id="job-1", prompt="a cat", model="m", payload=None, now=NOW)

    assert (job.state, job.status, job.due_at, job.attempt) == (State.SUBMIT, Status.QUEUED, job.created_at, 0)


def test_times_are_utc_with_milliseconds():
    bangkok = timezone(timedelta(hours=7))

    assert jobs.to_text(datetime(2026, 3, 1, 19, 0, 0, 123_456, tzinfo=bangkok)) == "2026-03-01T12:00:00.123Z"
    assert jobs.from_text("2026-03-01T12:00:00.123Z") == datetime(2026, 3, 1, 12, 0, 0, 123_000, tzinfo=UTC)
    assert jobs.from_text("2026-03-01 12:00:00") == datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
