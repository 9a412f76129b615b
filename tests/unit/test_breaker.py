"""An endpoint that answers only errors is paused, and its jobs say why they wait; RunPod has so many runs at once."""

import itertools
from dataclasses import replace
from datetime import timedelta

import pytest

from chalicelib import bootstrap, breaker, jobs, moves, settings
from chalicelib.d1 import Statement
from chalicelib.errors import PermanentError, TransientError
from chalicelib.jobs import State
from tests.conftest import call

RUN = r"POST .*/run$"
DENIED = (401, {"error": "Unauthorized"})
FAILED = {"status": "FAILED"}
OTHER = "other-endpoint"


@pytest.fixture
def endpoints():
    return (OTHER,)


@pytest.fixture
def d1_engine(each_d1_engine):
    return each_d1_engine


def sent(cloud):
    return len(cloud.runpod.inputs())


def minutes(bench, number):
    """Rounds, as the schedule makes them."""
    for _ in range(number * 4):
        bench.round()


def faults_in(table):
    return {(row["endpoint_id"], row["kind"]): row for row in table("SELECT * FROM endpoint_faults")}


def why(bench, job_id):
    bench.service.reads.forget()
    job, _ = bench.service.reads.job_with_timeline(job_id, timeout=5.0)
    return bench.service.views.job(job)["waiting"]


def refuse_calls(bench, number, answer=DENIED):
    """Jobs whose calls fail, so that the endpoint is paused from the fifth on."""
    bench.faults.add(RUN, answer, times=number)
    return [bench.create(f"cat {n}") for n in range(number)]


# When an endpoint is paused


def test_after_five_calls_that_failed_in_a_row_nothing_is_sent(bench, table, lines):
    refuse_calls(bench, 4)
    assert faults_in(table)[("local-endpoint", "call")]["paused_until"] is None
    refuse_calls(bench, 1)
    asked = len(bench.cloud.runpod.inputs()), bench.cloud.calls["runpod"]

    waiting = bench.create("later")
    bench.round()

    assert (sent(bench.cloud), bench.cloud.calls["runpod"]) == asked
    assert bench.job(waiting).state is State.SUBMIT
    assert bench.job(waiting).attempt == 0
    (line,) = [line for line in lines() if line["message"] == "endpoint_errors"]
    assert (line["endpoint_id"], line["code"], line["level"]) == ("local-endpoint", "runpod_unauthorized", "warning")


def test_a_paused_endpoints_job_says_why_it_waits_and_until_when(bench):
    refuse_calls(bench, 5)
    waiting = bench.create("later")

    reason = why(bench, waiting)
    assert (reason["code"], reason["until"]) == ("endpoint_errors", "2026-02-01T00:00:00.000Z")
    assert "taken none of the last runs, 5 in a row. RunPod refused the key" in reason["sentence"]
    assert "check RUNPOD_API_KEY" in reason["sentence"]


def test_one_job_tries_it_after_the_pause_and_all_follow_when_it_works(bench, table, lines):
    refuse_calls(bench, 5)
    for n in range(6):
        bench.create(f"later {n}")
    bench.round(after=45)
    assert sent(bench.cloud) == 0

    bench.round(after=16)
    assert sent(bench.cloud) == 1
    assert faults_in(table) == {}
    assert [line["endpoint_id"] for line in lines() if line["message"] == "endpoint_works"] == ["local-endpoint"]

    minutes(bench, 2)
    assert sent(bench.cloud) == 11
    assert {job.status for job in bench.jobs()} == {"done"}


def test_while_one_tries_it_the_others_wait(bench, table):
    refuse_calls(bench, 5)
    bench.create("later")
    bench.faults.add(RUN, TimeoutError(), times=1)  # whether it was taken nobody knows

    bench.round(after=61)
    (fault,) = faults_in(table).values()
    assert (fault["failures"], fault["pauses"], fault["probing"]) == (6, 2, 0)
    assert jobs.from_text(fault["paused_until"]).minute == 2  # two minutes after
    bench.round()
    assert sent(bench.cloud) == 0


def left(bench):
    """How many more of the faults there are."""
    return bench.faults._rules[-1]["times"]


def test_the_pauses_grow_to_ten_minutes(bench, table):
    refuse_calls(bench, 5)
    bench.faults.add(RUN, DENIED, times=99)
    tried = []
    for _ in range(4 * 60):
        before = left(bench)
        bench.round()
        if left(bench) < before:
            tried.append(bench.clock.at)

    gaps = [round((after - before).total_seconds() / 60) for before, after in itertools.pairwise(tried)]
    assert gaps[:5] == [2, 5, 10, 10, 10]


def test_a_probe_of_which_nothing_is_heard_is_followed_by_another(bench, table):
    refuse_calls(bench, 5)
    bench.clock.advance(61)
    (first,) = bench.claim("a")  # by somebody who ends without a word
    assert bench.claim("b") == []
    bench.clock.advance(61)
    (second,) = bench.claim("c")

    assert first.id != second.id
    assert faults_in(table)[("local-endpoint", "call")]["probing"] == 1


def test_lost_answers_count_for_each_may_be_a_paid_run(bench, table):
    refuse_calls(bench, 5, answer=(502, "bad gateway"))

    assert faults_in(table)[("local-endpoint", "call")]["code"] == "runpod_bad_answer"
    assert [bench.job(bench.create()).state for _ in range(3)] == [State.SUBMIT] * 3


@pytest.mark.parametrize("answer", [(429, ""), (400, {"detail": "bad input"})])
def test_too_many_calls_and_refused_inputs_are_no_errors_of_the_endpoint(bench, table, answer):
    refuse_calls(bench, 9, answer=answer)

    assert faults_in(table) == {}


def test_what_works_ends_the_count(bench, table):
    refuse_calls(bench, 4)
    bench.create()
    assert faults_in(table) == {}
    refuse_calls(bench, 4)

    assert faults_in(table)[("local-endpoint", "call")]["paused_until"] is None


def test_another_endpoint_goes_on(bench, table, monkeypatch):
    refuse_calls(bench, 5)
    monkeypatch.setitem(bench.service.models.known, "other", _with_endpoint(bench.service.models.get("x"), OTHER))
    job = bench.service.pipeline.new_job(prompt="p", model="other", payload=None)
    bench.service.pipeline.create([job], bench.deadline(24.0), by="test")

    assert bench.job(job.id).state is State.POLL
    assert bench.job(bench.create()).state is State.SUBMIT


def _with_endpoint(model, endpoint):
    return replace(model, name="other", endpoint=endpoint)


def test_ten_runs_that_failed_in_a_row_pause_it_too(bench, table):
    ids = [bench.create(simulate=FAILED) for _ in range(9)]
    bench.round()
    assert faults_in(table)[("local-endpoint", "run")]["paused_until"] is None
    ids += [bench.create(simulate=FAILED)]
    bench.round()

    waiting = bench.create()
    assert {bench.job(job_id).error_code for job_id in ids} == {"worker_failed"}
    assert bench.job(waiting).state is State.SUBMIT
    assert "last runs have all failed, 10 in a row. See the error of job" in why(bench, waiting)["sentence"]
    assert "simulated" not in why(bench, waiting)["sentence"]  # a worker's words may be of another's prompt


def test_of_failing_and_good_jobs_the_good_ones_get_through(bench, table):
    for _ in range(30):
        bench.create(simulate=FAILED)
    good = [bench.create() for _ in range(10)]
    minutes(bench, 30)

    assert {bench.job(job_id).status for job_id in good} == {"done"}
    assert faults_in(table) == {}


def test_by_hand_a_job_is_sent_all_the_same_and_mends_it(client, bench, table):
    refuse_calls(bench, 5)
    waiting = bench.create()

    status, answer, _ = call(client, "POST", "/dev/runpod", {"jobId": waiting})
    assert (status, answer["runpod"]["status"]) == (200, "IN_QUEUE")
    assert faults_in(table) == {}


def test_a_job_that_is_too_late_ends_though_its_endpoint_is_paused(bench):
    bench.faults.add(RUN, DENIED, times=10_000)
    ids = [bench.create() for _ in range(8)]
    minutes(bench, 2)
    bench.round(after=86_400)

    assert {bench.job(job_id).error_code for job_id in ids} == {"total_deadline"}


def test_a_save_that_is_repeated_counts_once(bench, table):
    job = bench.job(bench.create())
    error = PermanentError("worker_failed", "It failed.", service="runpod")
    change = moves.fail(job, error, now=bench.clock.now())
    for _ in range(2):
        bench.service.store.save([change], nonce="n", now=bench.clock.now(), timeout=5.0)

    assert faults_in(table)[("local-endpoint", "run")]["failures"] == 1


def failed(bench, number, start=0):
    """Jobs whose runs have failed, not yet saved."""
    error = PermanentError("worker_failed", "It failed.", service="runpod")
    made = [bench.job(bench.create(f"cat {n}")) for n in range(start, start + number)]
    return [moves.fail(job, error, now=bench.clock.now()) for job in made]


def save(bench, changes, nonce):
    bench.service.store.save(changes, nonce=nonce, now=bench.clock.now(), timeout=5.0)


def test_who_sees_the_same_failures_too_counts_none(bench, table):
    changes = failed(bench, 5)
    for nonce in ("one", "two"):
        save(bench, changes, nonce)

    assert faults_in(table)[("local-endpoint", "run")]["failures"] == 5


def test_a_save_that_is_repeated_after_another_counts_nothing(bench, table):
    first, second = failed(bench, 1), failed(bench, 1, 1)
    for changes, nonce in ((first, "one"), (second, "two"), (first, "one")):
        save(bench, changes, nonce)
    assert faults_in(table)[("local-endpoint", "run")]["failures"] == 2
    bench.create()
    bench.round()  # its picture ends the count
    assert faults_in(table) == {}
    save(bench, first, "one")

    assert faults_in(table) == {}


def test_where_something_has_worked_in_a_batch_no_failure_counts(bench, table):
    *fail, done = failed(bench, 12)
    save(bench, [*fail, moves.complete(done.before, lease_until="", runpod={}, now=bench.clock.now())], "one")
    assert faults_in(table)[("local-endpoint", "run")]["paused_until"]
    bench.clock.advance(601)
    bench.round()

    assert faults_in(table) == {}


def test_what_only_r2_keeps_from_being_done_was_drawn(bench, table, no_r2):
    for _ in range(3):
        for n in range(9):
            bench.create(simulate=FAILED if n < 4 else {})
        bench.round()

    assert [fault["paused_until"] for fault in faults_in(table).values()] == []


def test_a_run_that_its_callback_has_adopted_says_nothing_of_calls(bench):
    job = jobs.Job(id="j", step="submitting", version=1)
    adopted = moves.accept(job, runpod_job_id="r", runpod_status="", adopted=True, now=bench.clock.now())

    assert breaker.judge([adopted]) == []


def test_of_one_list_few_are_sent_to_an_endpoint_that_fails(bench, monkeypatch):
    monkeypatch.setattr("chalicelib.pipeline.THREADS", 1)
    bench.faults.add(RUN, (502, "bad gateway"), times=1000)
    made = [bench.service.pipeline.new_job(prompt=f"p{n}", model="m", payload=None) for n in range(50)]
    bench.service.pipeline.create(made, bench.deadline(24.0), by="test")

    assert 1000 - left(bench) == 5


def test_a_job_that_is_refused_each_time_is_not_always_the_one_that_tries(bench, monkeypatch):
    """Twenty whose calls a firewall refuses, and one that is fine."""
    run = type(bench.service._runpod).run

    def refuse(self, endpoint, payload, **options):
        if payload["prompt"] == "bad":
            raise TransientError("runpod_unauthorized", "No.", service="runpod")
        return run(self, endpoint, payload, **options)

    monkeypatch.setattr(type(bench.service._runpod), "run", refuse)
    for _ in range(20):
        bench.create("bad")
    good = bench.create("good")
    minutes(bench, 240)

    assert bench.job(good).status == "done"


def test_one_good_job_among_many_that_fail_gets_through(bench):
    for _ in range(100):
        bench.create(simulate=FAILED)
    good = bench.create()
    minutes(bench, 120)

    assert bench.job(good).status == "done"


def test_what_is_too_late_already_tries_no_endpoint(bench, table):
    bench.faults.add(RUN, DENIED, times=5)
    for _ in range(5):
        bench.create()
    table("UPDATE jobs SET deadline_at = '2026-01-31T23:59:30.000Z', due_at = ''")
    good = bench.create()
    bench.round(after=61)

    assert bench.job(good).state is State.POLL


def test_the_wait_for_a_run_that_tries_it_begins_when_it_is_sent(bench, table):
    for _ in range(10):
        bench.create(simulate=FAILED)
    bench.round()
    bench.create(simulate={"run_seconds": 300})
    bench.faults.add(RUN, (429, "", {"Retry-After": "1"}))
    bench.round(after=61)  # not sent, so in a minute once more
    (fault,) = faults_in(table).values()
    assert jobs.from_text(fault["paused_until"]) - bench.clock.at == timedelta(seconds=60)
    bench.round(after=61)
    (fault,) = faults_in(table).values()
    assert jobs.from_text(fault["paused_until"]) - bench.clock.at == timedelta(seconds=600)


# How many runs RunPod has at once


@pytest.fixture
def two_at_once(environment, monkeypatch):
    environment["MAX_RUNNING"] = "2"


def test_no_more_runs_are_sent_than_may_be_there(two_at_once, bench):
    ids = [bench.create() for _ in range(5)]

    assert sent(bench.cloud) == 2
    states = [bench.job(job_id).state for job_id in ids]
    assert states == [State.POLL, State.POLL, State.SUBMIT, State.SUBMIT, State.SUBMIT]
    reasons = [why(bench, job_id) for job_id in ids[2:]]
    assert {reason["code"] for reason in reasons} == {"max_running"}
    assert {reason["place"] for reason in reasons} == {1, 2, 3}
    bench.round(after=1)  # none has ended
    assert sent(bench.cloud) == 2


def test_of_a_list_as_many_are_sent_at_once_as_may_be(two_at_once, bench):
    made = [bench.service.pipeline.new_job(prompt=f"p{n}", model="m", payload=None) for n in range(5)]
    bench.service.pipeline.create(made, bench.deadline(24.0), by="test")

    assert sent(bench.cloud) == 2
    assert sorted(bench.job(job.id).attempt for job in made) == [0, 0, 0, 1, 1]


def test_those_that_wait_follow_as_others_end(two_at_once, bench):
    for _ in range(7):
        bench.create()
    most = 0
    for _ in range(12):
        bench.round()
        most = max(most, sum(job.state in (State.SUBMITTING, State.POLL) for job in bench.jobs()))

    assert most == 2
    assert {job.status for job in bench.jobs()} == {"done"}


def test_those_who_wait_go_before_those_who_come(two_at_once, bench):
    first = [bench.create(simulate={"run_seconds": 10}) for _ in range(6)]
    for _ in range(20):
        bench.clock.advance(14)
        bench.create(simulate={"run_seconds": 10})
        bench.round(after=1)
        bench.create(simulate={"run_seconds": 10})

    assert {bench.job(job_id).status for job_id in first} == {"done"}


def test_behind_very_many_a_job_still_ends_at_its_deadline(two_at_once, bench, table):
    for _ in range(2):
        bench.create(simulate={"run_seconds": 1000})
    rows = ", ".join(f"('{n:03}', 'queued', 'submit', '2026-01-31', '2026')" for n in range(250))
    table(f"INSERT INTO jobs (id, status, step, created_at, due_at) VALUES {rows}")
    late = bench.create()
    table("UPDATE jobs SET deadline_at = '2026-01-31T23:59:30.000Z' WHERE id = ?", late)
    bench.round(after=60)

    assert bench.job(late).error_code == "total_deadline"


def test_late_jobs_take_no_places_from_others(environment, bench, table):
    environment["MAX_RUNNING"] = "10"
    bench.service = bootstrap.build(settings.load(environment), bench.clock)
    rows = ", ".join(f"('{n:03}', 'queued', 'submit', '2026-01-31T23:00:00.000Z', '2026')" for n in range(30))
    table(f"INSERT INTO jobs (id, status, step, created_at, due_at) VALUES {rows}")
    table("UPDATE jobs SET deadline_at = '2026-01-31T23:30:00.000Z' WHERE id < '010'")
    bench.round()

    assert sent(bench.cloud) == 10
    assert {bench.job(f"{n:03}").error_code for n in range(10)} == {"total_deadline"}


def test_large_inputs_that_come_too_late_stop_no_round(bench, table):
    refuse_calls(bench, 5)
    values = "'queued', 'submit', '2026-01-31', '', '2026-01-31', hex(zeroblob(200000))"
    rows = ", ".join(f"('{n:03}', {values})" for n in range(90))
    table(f"INSERT INTO jobs (id, status, step, created_at, due_at, deadline_at, input) VALUES {rows}")
    bench.round()

    assert {bench.job(f"{n:03}").error_code for n in range(90)} == {"total_deadline"}


def test_with_few_calls_left_none_is_claimed_to_be_given_back(bench, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bench.service.store, "calls_left", lambda: 50)
        job_id = bench.create()
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 15)
    for _ in range(3):
        bench.round()

    assert bench.timeline(job_id) == ["created"]


def test_jobs_that_were_sent_too_often_are_no_fault_of_the_endpoint(bench, table):
    for _ in range(6):
        bench.create(simulate={"queue_seconds": 9000})
    table("UPDATE jobs SET step = 'submit', status = 'queued', attempt = 9, runpod_job_id = NULL, due_at = ''")
    bench.round()

    assert {job.error_code for job in bench.jobs()} == {"submit_unknown"}
    assert faults_in(table) == {}


def test_an_endpoint_that_refuses_an_input_has_looked_at_it(bench, table):
    refuse_calls(bench, 5)
    bench.faults.add(RUN, (400, {"detail": "bad input"}))
    bench.round(after=61)

    assert faults_in(table) == {}


def test_a_low_job_comes_after_the_others_there_too(environment, bench):
    environment["MAX_RUNNING"] = "1"
    service = bootstrap.build(settings.load(environment), bench.clock)
    bench.service = service
    bench.create(simulate={"run_seconds": 20})
    low = service.pipeline.new_job(prompt="low", model="m", payload=None, priority="low")
    service.pipeline.create([low], bench.deadline(24.0), by="test")
    later = bench.create()
    for _ in range(3):
        bench.round()

    assert (bench.job(low.id).attempt, bench.job(later).attempt) == (0, 1)


def test_a_probe_is_bounded_too(two_at_once, bench):
    bench.create(simulate={"run_seconds": 600})
    bench.create(simulate={"run_seconds": 600})
    bench.service.store._d1.query([_paused("2026-01-31T23:58:00.000Z")], timeout=5.0)
    bench.create()
    bench.round()

    assert sent(bench.cloud) == 2


def test_probes_of_several_endpoints_are_bounded_together(environment, bench, table, monkeypatch):
    environment["MAX_RUNNING"] = "1"
    bench.service = bootstrap.build(settings.load(environment), bench.clock)
    monkeypatch.setitem(bench.service.models.known, "other", _with_endpoint(bench.service.models.get("x"), OTHER))
    for endpoint in ("local-endpoint", OTHER):
        bench.service.store._d1.query([_paused("2026-01-31T23:58:00.000Z", endpoint)], timeout=5.0)
    table("INSERT INTO jobs (id, status, step, model) VALUES ('a', 'queued', 'submit', 'x')")
    table("INSERT INTO jobs (id, status, step, model) VALUES ('b', 'queued', 'submit', 'other')")
    bench.round()

    assert sent(bench.cloud) == 1


def _paused(until, endpoint="local-endpoint"):
    columns = "endpoint_id, kind, failures, paused_until, code, sentence, since"
    return Statement(
        f"INSERT INTO endpoint_faults ({columns}) VALUES (?1, 'call', 5, ?2, 'c', 's', 't')", (endpoint, until)
    )



def test_with_none_allowed_nothing_is_sent_but_by_hand(environment, client, bench):
    environment["MAX_RUNNING"] = "0"
    bench.service = bootstrap.build(settings.load(environment), bench.clock)
    job_id = bench.create()
    bench.round()
    assert (sent(bench.cloud), why(bench, job_id)["code"]) == (0, "max_running")
    assert call(client, "POST", "/dev/runpod")[0] == 200

    assert sent(bench.cloud) == 1
