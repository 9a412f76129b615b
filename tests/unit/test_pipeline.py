import hashlib
import json
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import requests

from chalicelib import bootstrap, jobs, media, moves, settings
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.jobs import State
from chalicelib.models import Model, Models
from chalicelib.rounds import Report
from chalicelib.store import Limits
from tests.conftest import BUCKET
from tools.cloud.render import draw

RUN = r"POST .*/run$"
STATUS = r"GET .*/status/"
D1 = r"POST .*/query$"
LOST = requests.ReadTimeout("the answer is lost")
SQL_ERROR = (400, {"success": False, "result": [], "errors": [{"code": 7500, "message": "no: SQLITE_ERROR"}]})


def finish(bench, job_id, rounds=3):
    for _ in range(rounds):
        bench.round()
    return bench.job(job_id)


# Creating


def test_a_job_is_created_and_sent_in_two_d1_calls(bench):
    ids = []

    calls = bench.d1_calls(lambda: ids.append(bench.create("แมว")))

    job = bench.job(ids[0])
    assert calls == 2
    assert (job.status, job.state, job.attempt, job.endpoint_id) == ("running", State.POLL, 1, "local-endpoint")
    assert bench.cloud.runpod.inputs() == [{"prompt": "แมว", "model": "qwen-image", "jobId": job.id}]
    assert bench.timeline(job.id) == ["created", "submitted"]


def test_the_intent_is_on_disk_before_the_paid_call(bench):
    seen = []
    run = bench.service.pipeline.steps.runpod.run

    def spy(*args, **options):
        seen.append(bench.cloud.d1.execute("SELECT step, intent_version, version, due_at FROM jobs"))
        return run(*args, **options)

    object.__setattr__(bench.service.pipeline.steps, "runpod", type("Spy", (), {"run": staticmethod(spy)})())
    bench.create()

    assert seen == [[{"step": "submitting", "intent_version": 1, "version": 1, "due_at": "2026-02-01T00:09:00.000Z"}]]


def test_a_finished_job_has_its_picture_in_r2(bench):
    job_id = bench.create("แมวสีส้ม")

    job = finish(bench, job_id)

    picture = draw("แมวสีส้ม")
    assert job.status == "done"
    assert job.result_r2_key == f"jobs/2026/01/{job_id}/output.png"
    assert job.result_url == f"http://cloud.test:8001/cdn/jobs/2026/01/{job_id}/output.png"
    assert bench.s3.get_object(Bucket=BUCKET, Key=job.result_r2_key)["Body"].read() == picture
    assert json.loads(job.outputs) == [
        {
            "key": job.result_r2_key,
            "url": job.result_url,
            "content_type": "image/png",
            "bytes": len(picture),
            "sha256": hashlib.sha256(picture).hexdigest(),
            "width": 512,
            "height": 512,
        }
    ]
    assert (job.queue_ms, job.execution_ms) == (1000, 3000)
    assert bench.timeline(job_id) == ["created", "submitted", "completed", "done"]


def test_month_and_year_of_the_key_are_those_of_creation(bench):
    job_id = bench.create()  # on 31 January, a minute before midnight

    job = finish(bench, job_id, rounds=8)

    assert job.finished_at.startswith("2026-01-31") or job.finished_at.startswith("2026-02-01")
    assert job.result_r2_key.startswith("jobs/2026/01/")


@pytest.mark.parametrize("shape", ["base64", "data_url", "link"])
def test_inline_data_url_and_link_all_arrive(bench, shape):
    job_id = bench.create("a cat", simulate={"shape": shape})

    job = finish(bench, job_id)

    assert bench.s3.get_object(Bucket=BUCKET, Key=job.result_r2_key)["Body"].read() == draw("a cat")


@pytest.mark.parametrize(
    ("answer", "event", "attempt"),
    [
        ((429, "", {"Retry-After": "60"}), "submit_refused", 0),
        ((401, "Unauthorized"), "submit_refused", 0),
        ((404, {"status": 404, "detail": "endpoint"}), "submit_refused", 0),
        (requests.ConnectTimeout(), "submit_refused", 0),
        ((502, "<html>"), "submit_unknown", 1),
        (requests.ReadTimeout(), "submit_unknown", 1),
    ],
)
def test_a_runpod_that_does_not_answer_leaves_the_job_queued(bench, answer, event, attempt):
    bench.faults.add(RUN, answer)

    job = bench.job(bench.create())

    assert (job.status, job.attempt) == ("queued", attempt)
    assert bench.timeline(job.id) == ["created", event]


def test_a_refused_input_is_final(bench):
    bench.faults.add(RUN, (422, {"detail": "no"}))

    job = bench.job(bench.create())

    assert (job.status, job.error_code) == ("error", "runpod_refused")
    assert bench.timeline(job.id) == ["created", "failed"]


def test_a_refusal_is_tried_again_after_its_time_and_costs_no_attempt(bench):
    bench.faults.add(RUN, (429, "", {"Retry-After": "60"}))
    job_id = bench.create()

    bench.round(after=30)
    assert bench.job(job_id).state is State.SUBMIT
    bench.round(after=35)

    job = bench.job(job_id)
    assert (job.state, job.attempt, job.failures) == (State.POLL, 1, 0)
    assert bench.timeline(job_id) == ["created", "submit_refused", "submitting", "submitted"]


def test_an_unknown_answer_is_not_sent_again_before_ten_minutes_and_then_says_so(bench):
    bench.faults.add(RUN, LOST, after_effect=True)
    job_id = bench.create()

    for _ in range(39):
        bench.round()
    assert len(bench.cloud.runpod.inputs()) == 1
    bench.round(after=20)

    job = bench.job(job_id)
    assert (job.state, job.attempt) == (State.POLL, 2)
    assert len(bench.cloud.runpod.inputs()) == 2
    assert bench.timeline(job_id) == ["created", "submit_unknown", "possible_duplicate", "submitting", "submitted"]
    assert finish(bench, job_id).result_r2_key == f"jobs/2026/01/{job_id}/2/output.png"


def test_a_create_that_d1_refuses_sends_nothing(bench):
    bench.faults.add(D1, (503, "<html>"), times=3)

    with pytest.raises(ServiceError):
        bench.create()

    assert bench.cloud.runpod.inputs() == []


def test_a_create_whose_answer_is_lost_for_good_is_given_back_not_sent_twice(bench):
    bench.faults.add(D1, LOST, times=3, after_effect=True)
    with pytest.raises(IndeterminateError):
        bench.create()
    assert bench.cloud.runpod.inputs() == []

    bench.round()
    bench.round()

    assert len(bench.cloud.runpod.inputs()) == 1
    (row,) = bench.jobs()
    assert row.attempt == 1
    assert "possible_duplicate" not in bench.timeline(row.id)


def test_a_create_whose_answer_is_lost_once_makes_one_job(bench):
    bench.faults.add(D1, LOST, after_effect=True)

    job_id = bench.create()

    assert [job.id for job in bench.jobs()] == [job_id]
    assert bench.timeline(job_id) == ["created", "submitted"]


def test_an_accepted_run_that_cannot_be_saved_is_saved_first_next_time(bench):
    job = bench.service.pipeline.new_job(prompt="a cat", model="m", payload=None)
    save = bench.service.store.save
    bench.service.store.save = lambda *_, **__: (_ for _ in ()).throw(TransientError("d1_rate_limited", "locked out"))
    bench.service.pipeline.create([job], bench.deadline(), by="test")
    assert bench.service.pipeline.saver.backlog == 1
    bench.service.store.save = save

    bench.round(after=0)

    assert bench.service.pipeline.saver.backlog == 0
    assert bench.job(job.id).state is State.POLL
    assert len(bench.cloud.runpod.inputs()) == 1


def test_creating_only_queues_while_outcomes_cannot_be_saved(bench):
    job = bench.service.pipeline.new_job(prompt="first", model="m", payload=None)
    save = bench.service.store.save
    bench.service.store.save = lambda *_, **__: (_ for _ in ()).throw(TransientError("d1_rate_limited", "locked out"))
    bench.service.pipeline.create([job], bench.deadline(), by="test")
    second = bench.create("second")
    bench.service.store.save = save

    assert bench.job(second).state is State.SUBMIT
    assert len(bench.cloud.runpod.inputs()) == 1


def test_creating_only_queues_when_cloudflares_calls_run_out(bench, monkeypatch):
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 99)
    ids = []

    assert bench.d1_calls(lambda: ids.append(bench.create())) == 1
    assert bench.job(ids[0]).state is State.SUBMIT
    assert bench.cloud.runpod.inputs() == []


# Rounds


@pytest.mark.parametrize("count", [0, 1, 100, 500])
def test_a_round_with_nothing_new_is_one_d1_call(bench, count):
    _insert_running(bench, count)
    bench.round(after=15)  # notes that they are in progress
    reports = []

    calls = bench.d1_calls(lambda: reports.append(bench.round()))

    assert reports[0].checked == count
    assert calls == 1


def _insert_running(bench, count):
    for n in range(count):
        run_id = f"run-{n}"
        bench.cloud.runpod._execute(
            "INSERT INTO runs (id, endpoint_id, input, created_at) VALUES (?, 'local-endpoint', ?, ?)",
            run_id, json.dumps({"prompt": f"cat {n}", "simulate": {"run_seconds": 3600}}), bench.clock.at.timestamp(),
        )  # fmt: skip
        bench.cloud.d1.execute(
            "INSERT INTO jobs"
            " (id, status, step, runpod_job_id, endpoint_id, attempt, created_at, updated_at, submitted_at)"
            " VALUES (?, 'running', 'poll', ?, 'local-endpoint', 1, ?, ?, ?)",
            f"job-{n}", run_id, *[jobs.to_text(bench.clock.at)] * 3,
        )  # fmt: skip


def test_a_hundred_finished_jobs_are_stored_in_a_handful_of_d1_calls(bench):
    ids = [bench.create(f"cat {n}", simulate={"shape": "data_url"}) for n in range(100)]
    reports = []

    calls = bench.d1_calls(lambda: reports.append(bench.round()))

    assert {job.id for job in reports[0].updated} == set(ids)
    assert calls <= 5
    assert len(bench.objects()) == 100


@pytest.mark.parametrize(("ended", "code"), [(4, None), (5, "poison_result")])
def test_a_result_is_given_up_after_five_holders_that_ended_without_a_word(bench, ended, code):
    job_id = bench.create("a cat")
    bench.clock.advance(15)
    (job,) = bench.claim("holder 1")
    change, _ = bench.service.pipeline.steps.poll(job, bench.deadline(), lease=60.0)
    bench.service.pipeline.saver.save([change], bench.deadline())
    for number in range(2, ended + 1):
        bench.clock.advance(120)
        now, nonce = bench.clock.now(), f"holder {number}"
        claimed = bench.service.store.claim(
            nonce=nonce, now=now, limits=Limits(submits=0), lease=60.0, ignore_due=False, timeout=5.0
        )
        assert [job.id for job in (claimed.jobs if number < 4 else [claimed.suspect])] == [job_id]
        if number >= 4:
            bench.service.store.claim_suspect(claimed.suspect, nonce=nonce, now=now, lease=60.0, timeout=5.0)

    bench.round(after=120)

    assert bench.job(job_id).error_code == code
    assert bench.job(job_id).status == ("error" if code else "done")


def test_an_unchanged_poll_is_not_saved(bench):
    job_id = bench.create("a cat", simulate={"run_seconds": 600})
    bench.round()
    version = bench.job(job_id).version

    bench.round()

    assert bench.job(job_id).version == version


def test_a_run_that_a_worker_takes_is_seen_once(bench):
    job_id = bench.create("a cat", simulate={"queue_seconds": 20, "run_seconds": 600})

    for _ in range(4):
        bench.round()

    assert bench.timeline(job_id) == ["created", "submitted", "observed"]
    assert bench.job(job_id).runpod_status == "IN_PROGRESS"


@pytest.mark.parametrize(
    ("wish", "status", "code"),
    [
        ({"status": "FAILED", "error": "CUDA out of memory"}, "error", "worker_failed"),
        ({"status": "CANCELLED"}, "error", "cancelled_outside"),
        ({"shape": "none"}, "error", "no_output"),
    ],
)
def test_a_run_without_a_picture_ends_with_a_reason(bench, wish, status, code):
    job = finish(bench, bench.create("a cat", simulate=wish))

    assert (job.status, job.error_code) == (status, code)
    assert job.error_message
    assert job.finished_at is not None
    assert bench.objects() == []


def test_a_timed_out_run_gets_a_second_attempt_and_no_third(bench):
    job_id = bench.create("a cat", simulate={"status": "TIMED_OUT"})

    job = finish(bench, job_id, rounds=6)

    assert (job.status, job.error_code, job.attempt) == ("error", "runpod_timed_out", 2)
    assert bench.timeline(job_id) == [
        "created", "submitted", "attempt_lost", "submitting", "submitted", "failed"
    ]  # fmt: skip


def test_a_404_is_too_early_at_first_and_lost_later(bench):
    job_id = bench.create()
    bench.faults.add(STATUS, (404, {"status": 404, "detail": "job not found"}), times=100)

    bench.round(after=140)
    assert bench.timeline(job_id) == ["created", "submitted"]
    bench.round(after=15)

    assert bench.timeline(job_id)[-1] == "attempt_lost"
    assert bench.events(job_id)[-1]["code"] == "runpod_lost"


def test_a_cancelled_job_ends_as_cancelled(bench):
    job_id = bench.create("a cat", simulate={"status": "CANCELLED"})
    bench.cloud.d1.execute("UPDATE jobs SET cancel_at = '2026-01-31T23:59:30.000Z'")

    job = finish(bench, job_id)

    assert (job.status, job.cancel_at) == ("cancelled", "2026-01-31T23:59:30.000Z")


@pytest.mark.parametrize("answer", [(500, {"status": 500}), (401, ""), (200, "<html>"), requests.ReadTimeout()])
def test_a_poll_without_an_answer_gives_nothing_up(bench, answer):
    job_id = bench.create()
    bench.faults.add(STATUS, answer, times=5)

    for _ in range(5):
        assert bench.round().checked == 1
    assert bench.job(job_id).state is State.POLL

    assert finish(bench, job_id).status == "done"


def test_a_crash_in_one_job_stops_no_other(bench, monkeypatch):
    bad, good = bench.create("bad"), bench.create("good")
    poll = type(bench.service.pipeline.steps).poll

    def crash(self, job, *args, **options):
        if job.id == bad:
            raise RuntimeError("a bug")
        return poll(self, job, *args, **options)

    monkeypatch.setattr(type(bench.service.pipeline.steps), "poll", crash)

    assert finish(bench, good).status == "done"
    assert bench.job(bad).state is State.POLL


def test_a_crash_while_storing_is_tried_again_and_ends_as_a_dead_letter(bench, monkeypatch):
    job_id = bench.create()
    monkeypatch.setattr(media, "identify", lambda content: 1 / 0)

    bench.round()
    assert bench.job(job_id).state is State.STORE
    assert bench.events(job_id)[-1]["code"] == "internal_error"
    for _ in range(125):
        bench.round()

    job = bench.job(job_id)
    assert (job.status, job.error_code, job.dead_at is not None) == ("error", "internal_error", True)


def test_a_result_that_r2_refuses_is_tried_again(bench):
    job_id = bench.create()
    bench.s3.delete_bucket(Bucket=BUCKET)
    bench.round()
    assert bench.timeline(job_id)[-2:] == ["completed", "store_failed"]
    bench.s3.create_bucket(Bucket=BUCKET)

    job = finish(bench, job_id)

    assert job.status == "done"
    assert len(bench.cloud.runpod.inputs()) == 1


def test_a_result_that_runpod_has_forgotten_is_a_dead_letter(bench):
    job_id = bench.create()
    bench.s3.delete_bucket(Bucket=BUCKET)
    bench.round()
    bench.s3.create_bucket(Bucket=BUCKET)

    job = finish(bench, job_id, rounds=0) and bench.round(after=1900) and bench.job(job_id)

    assert (job.status, job.error_code, job.dead_at is not None) == ("error", "result_lost", True)


def test_completion_is_saved_before_anything_is_put(bench, monkeypatch):
    job_id = bench.create()
    seen = []
    put = type(bench.service.bucket).put

    def spy(self, *args, **options):
        seen.append(bench.cloud.d1.execute("SELECT step, due_at > '' AS leased FROM jobs WHERE id = ?", job_id))
        return put(self, *args, **options)

    monkeypatch.setattr(type(bench.service.bucket), "put", spy)
    bench.round()

    assert seen == [[{"step": "store", "leased": 1}]]


def test_a_round_that_could_not_save_its_completion_does_not_store(bench):
    job_id = bench.create()
    save = bench.service.store.save
    bench.service.store.save = lambda *_, **__: (_ for _ in ()).throw(TransientError("d1_rate_limited", "locked out"))
    bench.round()
    assert bench.objects() == []
    assert bench.service.pipeline.saver.backlog == 1
    bench.service.store.save = save

    bench.round()

    assert bench.job(job_id).status == "done"
    assert bench.timeline(job_id) == ["created", "submitted", "completed", "done"]


def test_the_loser_of_a_save_neither_stores_nor_writes_a_line(bench):
    job_id = bench.create()
    bench.clock.advance(15)
    store, deadline = bench.service.store, bench.deadline()
    claim = {"now": bench.clock.now(), "limits": Limits(submits=200), "lease": 60.0, "ignore_due": True, "timeout": 5.0}
    (first,) = store.claim(nonce="a", **claim).jobs
    (second,) = store.claim(nonce="b", **claim).jobs
    steps, saver = bench.service.pipeline.steps, bench.service.pipeline.saver
    one, _ = steps.poll(first, deadline, lease=60.0)
    two, _ = steps.poll(second, deadline, lease=60.0)

    assert len(saver.save([one], deadline).won) == 1
    assert saver.save([two], deadline).won == []
    assert bench.timeline(job_id) == ["created", "submitted", "completed"]


def test_a_save_whose_answer_was_lost_has_still_won(bench):
    job_id = bench.create()
    bench.clock.advance(15)
    deadline = bench.deadline()
    (job,) = bench.claim()
    change, _ = bench.service.pipeline.steps.poll(job, deadline, lease=60.0)
    bench.faults.add(D1, LOST, after_effect=True)

    won = bench.service.pipeline.saver.save([change], deadline).won

    assert [one.job.id for one in won] == [job_id]
    assert bench.timeline(job_id) == ["created", "submitted", "completed"]


def test_a_save_of_unknown_fate_keeps_its_nonce_and_has_won_when_it_is_known(bench):
    job_id = bench.create()
    bench.clock.advance(15)
    (job,) = bench.claim()
    change, _ = bench.service.pipeline.steps.poll(job, bench.deadline(), lease=60.0)
    saver = bench.service.pipeline.saver
    bench.faults.add(D1, LOST, times=3, after_effect=True)
    assert isinstance(saver.save([change], bench.deadline()).error, IndeterminateError)
    assert saver.backlog == 1

    won = saver.flush(bench.deadline()).won

    assert [(one.job.id, one.event) for one in won] == [(job_id, "completed")]
    assert saver.backlog == 0


def test_when_one_batch_is_refused_those_behind_it_are_kept_too(bench, monkeypatch):
    saver = bench.service.pipeline.saver
    ids = [bench.create(f"cat {n}") for n in range(2)]
    held = [bench.job(job_id) for job_id in ids]
    changes = [moves.fail(job, PermanentError("worker_failed", "boom"), now=bench.clock.now()) for job in held]
    bench.faults.add(D1, LOST, times=3)
    assert isinstance(saver.save([changes[0]], bench.deadline()).error, IndeterminateError)
    bench.faults.add(D1, LOST, times=3)
    assert isinstance(saver.save([changes[1]], bench.deadline()).error, IndeterminateError)
    assert saver.backlog == 2

    assert len(saver.flush(bench.deadline()).won) == 2
    assert [bench.job(job_id).status for job_id in ids] == ["error", "error"]


def test_a_save_repeated_after_another_claimed_the_store_has_not_won_it(bench):
    job_id = bench.create()
    bench.clock.advance(15)
    saver = bench.service.pipeline.saver
    (job,) = bench.claim("a", lease=30.0)
    change, _ = bench.service.pipeline.steps.poll(job, bench.deadline(), lease=30.0)
    bench.faults.add(D1, LOST, times=3, after_effect=True)
    saver.save([change], bench.deadline())
    bench.clock.advance(31)
    assert len(bench.claim("b", lease=30.0)) == 1

    assert saver.flush(bench.deadline()).won == []
    assert bench.timeline(job_id) == ["created", "submitted", "completed"]


def test_two_changes_of_one_job_are_not_saved_as_one(bench):
    bench.faults.add(RUN, LOST, after_effect=True)
    late = bench.job(bench.create())
    orphan = bench.cloud.runpod._execute("SELECT id FROM runs")[0][0]
    saver, now = bench.service.pipeline.saver, bench.clock.now()
    accepted = moves.accept(late, runpod_job_id=orphan, runpod_status="IN_QUEUE", now=now)
    refused = moves.return_unsent(late, now=now)

    won = saver.save([accepted, refused], bench.deadline()).won

    assert [change.event for change in won] == ["submitted"]
    assert bench.job(late.id).runpod_job_id == orphan
    assert bench.timeline(late.id)[-1] == "submitted"


@pytest.mark.parametrize("code", ["d1_unauthorized", "d1_sql"])
def test_a_save_that_d1_refuses_for_other_reasons_than_a_row_is_kept_whole(bench, code):
    save, calls = bench.service.store.save, []

    def refuse(changes, **_):
        calls.append(len(changes))
        raise PermanentError(code, "no such column: step")

    bench.service.store.save = refuse
    job_id = bench.create()
    assert calls == [1]
    assert bench.service.pipeline.saver.backlog == 1
    bench.service.store.save = save

    bench.round(after=0)

    assert bench.job(job_id).state is State.POLL
    assert len(bench.cloud.runpod.inputs()) == 1


def test_a_paid_run_whose_acceptance_cannot_be_written_is_cancelled(bench):
    save = bench.service.store.save

    def refuse(changes, **options):
        if changes[0].accepted:
            raise PermanentError("d1_row", "string or blob too big")
        return save(changes, **options)

    bench.service.store.save = refuse
    job_id = bench.create()

    assert bench.job(job_id).error_code == "unsavable"
    (run,) = bench.cloud.runpod._execute("SELECT cancelled_at FROM runs")
    assert run[0] is not None


@pytest.mark.parametrize("result", [[], [{"results": None}] * 4, [None] * 4])
def test_a_senseless_answer_to_a_save_loses_no_run(bench, result):
    job = bench.service.pipeline.new_job(prompt="a cat", model="m", payload=None)
    create = bench.service.store.create

    def then_senseless(*args, **options):
        made = create(*args, **options)
        bench.faults.add(D1, (200, {"success": True, "result": result}), times=3)
        return made

    bench.service.store.create = then_senseless
    bench.service.pipeline.create([job], bench.deadline(), by="test")
    assert bench.service.pipeline.saver.backlog == 1

    bench.round(after=0)

    assert bench.job(job.id).state is State.POLL
    assert len(bench.cloud.runpod.inputs()) == 1


def test_an_orphan_whose_cancel_fails_or_whose_row_cannot_be_read_is_looked_after_again(bench):
    bench.faults.add(RUN, LOST, after_effect=True)
    late = bench.job(bench.create())
    orphan = bench.cloud.runpod._execute("SELECT id FROM runs")[0][0]
    bench.cloud.d1.execute("UPDATE jobs SET status = 'cancelled', step = NULL")
    bench.cloud.runpod._execute("UPDATE runs SET created_at = created_at + 900")
    saver = bench.service.pipeline.saver
    recorded_runs = bench.service.store.recorded_runs
    bench.service.store.recorded_runs = lambda *_, **__: (_ for _ in ()).throw(TransientError("d1_timeout", "late"))
    saver.save([moves.accept(late, runpod_job_id=orphan, runpod_status="", now=bench.clock.now())], bench.deadline())
    bench.service.store.recorded_runs = recorded_runs
    bench.faults.add(r"POST .*/cancel/", (500, ""))

    bench.round(after=61)
    assert bench.cloud.runpod.find(orphan).cancelled_at is None
    bench.round(after=61)

    assert bench.cloud.runpod.find(orphan).cancelled_at is not None


def test_an_orphan_is_kept_while_its_row_has_no_run_yet(bench):
    bench.faults.add(RUN, LOST, after_effect=True)
    late = bench.job(bench.create())
    orphan = bench.cloud.runpod._execute("SELECT id FROM runs")[0][0]
    bench.cloud.d1.execute("UPDATE jobs SET attempt = 2")  # another attempt is under way
    saver = bench.service.pipeline.saver
    accepted = moves.accept(late, runpod_job_id=orphan, runpod_status="", now=bench.clock.now())
    saver.save([accepted], bench.deadline())
    assert (saver.backlog, bench.cloud.runpod.find(orphan).cancelled_at) == (1, None)

    bench.cloud.d1.execute("UPDATE jobs SET attempt = 1")  # it was refused, and given back
    saver.flush(bench.deadline())

    assert bench.job(late.id).runpod_job_id == orphan


def test_a_claim_whose_answer_is_lost_for_good_is_asked_for_again_by_its_name(bench, monkeypatch):
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    job_id = bench.create()
    bench.faults.add(D1, LOST, times=3, after_effect=True)
    with pytest.raises(IndeterminateError):
        bench.round()

    bench.round()

    assert bench.timeline(job_id) == ["created", "submitting", "submitted"]
    assert len(bench.cloud.runpod.inputs()) == 1


def test_a_claim_in_doubt_is_not_forgotten_when_the_next_is_refused(bench, monkeypatch):
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    job_id = bench.create()
    bench.faults.add(D1, LOST, times=3, after_effect=True)
    with pytest.raises(IndeterminateError):
        bench.round()
    bench.faults.add(D1, (429, {"errors": [{"code": 971}]}, {"Retry-After": "20"}))
    with pytest.raises(TransientError):
        bench.round()

    bench.round(after=21)

    assert bench.timeline(job_id) == ["created", "submitting", "submitted"]
    assert len(bench.cloud.runpod.inputs()) == 1


def test_stores_that_a_flush_began_are_saved_though_the_claim_fails(bench, monkeypatch):
    job_id = bench.create()
    bench.clock.advance(15)
    deadline = bench.deadline()
    (job,) = bench.claim(lease=70.0)
    change, _ = bench.service.pipeline.steps.poll(job, deadline, lease=70.0)
    bench.faults.add(D1, LOST, times=3)
    bench.service.pipeline.saver.save([change], deadline)
    claim = bench.service.store.claim
    bench.service.store.claim = lambda **_: (_ for _ in ()).throw(TransientError("d1_timeout", "late"))

    with pytest.raises(TransientError):
        bench.service.pipeline.run_round(deadline)

    bench.service.store.claim = claim
    assert bench.job(job_id).status == "done"


def test_the_lease_outlives_the_deadline(bench, monkeypatch):
    job_id = bench.create()
    leases = []
    put = type(bench.service.bucket).put

    def spy(self, *args, **options):
        leases.append(jobs.from_text(bench.job(job_id).due_at) - bench.clock.now())
        return put(self, *args, **options)

    monkeypatch.setattr(type(bench.service.bucket), "put", spy)
    bench.s3.delete_bucket(Bucket=BUCKET)
    bench.round(seconds=40.0)  # leased by the save of `completed`, then put off by R2
    bench.s3.create_bucket(Bucket=BUCKET)
    bench.round(seconds=50.0)  # leased by the claim

    assert [lease.total_seconds() for lease in leases] == [45.5, 55.5]


def test_without_time_for_it_no_poll_and_no_store_is_begun(bench):
    polled = bench.create("polled")
    asked = bench.cloud.calls["runpod"]
    assert bench.round(seconds=3.9).checked == 0
    bench.round(seconds=9.0)  # enough to poll, not to store
    assert bench.job(polled).state is State.STORE
    assert bench.cloud.calls["runpod"] == asked + 1

    bench.round(after=20)

    assert bench.job(polled).status == "done"


def test_a_result_whose_lease_ends_before_we_do_is_left_to_the_next_claim(bench):
    job_id = bench.create()
    bench.clock.advance(15)
    (job,) = bench.claim(lease=30.0)
    change, _ = bench.service.pipeline.steps.poll(job, bench.deadline(), lease=30.0)
    bench.faults.add(D1, LOST, times=3)
    bench.service.pipeline.saver.save([change], bench.deadline(30.0))

    bench.round(after=15)
    assert (bench.job(job_id).state, bench.objects()) == (State.STORE, [])
    bench.round(after=16)

    assert bench.job(job_id).status == "done"


def test_one_404_does_not_bury_a_finished_picture(bench):
    job_id = bench.create()
    bench.s3.delete_bucket(Bucket=BUCKET)
    bench.round()
    bench.s3.create_bucket(Bucket=BUCKET)
    bench.faults.add(STATUS, (404, {"status": 404, "detail": "job not found"}))

    bench.round()
    assert bench.events(job_id)[-1]["code"] == "result_lost"
    bench.round(after=30)

    assert bench.job(job_id).status == "done"


def test_a_senseless_retry_after_does_not_stop_a_job_for_years(bench):
    bench.faults.add(RUN, (429, "", {"Retry-After": "1769990400"}))
    job_id = bench.create()

    bench.round(after=902)

    assert bench.job(job_id).state is State.POLL


def test_large_answers_are_not_all_kept_in_memory(bench, monkeypatch):
    monkeypatch.setattr("chalicelib.rounds.KEPT_ANSWER_BYTES", 1)
    ids = [bench.create(f"cat {n}") for n in range(5)]
    calls = bench.cloud.calls["runpod"]

    bench.round()

    assert {bench.job(job_id).status for job_id in ids} == {"done"}
    assert bench.cloud.calls["runpod"] - calls == 10  # each was asked for twice


def test_answers_for_which_there_is_little_room_wait_for_one_another(bench, monkeypatch):
    monkeypatch.setattr("chalicelib.rounds.ROOM_BYTES", 1)  # so that each is let in alone
    monkeypatch.setattr("chalicelib.rounds.KEPT_ANSWER_BYTES", 0)
    ids = [bench.create(f"cat {n}") for n in range(5)]

    bench.round()

    assert {bench.job(job_id).status for job_id in ids} == {"done"}


def test_the_room_of_an_answer_whose_save_was_lost_is_given_back(bench):
    bench.create()
    bench.service.store.save = lambda *_, **__: (_ for _ in ()).throw(TransientError("d1_rate_limited", "locked out"))
    rounds = []
    monkeypatched = bench.service.pipeline._new_round
    bench.service.pipeline._new_round = lambda threads, deadline, run: monkeypatched(
        threads, deadline, lambda round_: (rounds.append(round_), run(round_))[1]
    )

    bench.round()

    assert rounds[0]._room._taken == rounds[0]._kept_bytes == 0


def test_a_bug_while_saving_loses_no_outcome(bench, monkeypatch):
    job_id = bench.create()
    monkeypatch.setattr("chalicelib.log.saved", lambda change, now: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.round()
    monkeypatch.undo()

    bench.round(after=70)

    assert bench.job(job_id).status == "done"


def test_one_bad_row_poisons_no_other_and_ends_with_a_reason(bench):
    ids = [bench.create(f"cat {n}") for n in range(7)]
    save = bench.service.store.save

    def refuse(changes, **options):
        if any(change.job.id == ids[3] and change.event == "completed" for change in changes):
            raise PermanentError("d1_row", "D1 refused the statement: string or blob too big")
        return save(changes, **options)

    bench.service.store.save = refuse
    bench.round()

    assert [bench.job(job_id).status for job_id in ids] == ["done"] * 3 + ["error"] + ["done"] * 3
    assert bench.job(ids[3]).error_code == "unsavable"


def test_an_accepted_run_that_lost_its_place_is_cancelled(bench):
    bench.faults.add(RUN, LOST, after_effect=True)
    job_id = bench.create()
    deadline = bench.deadline()
    late = bench.job(job_id)
    bench.round(after=700)  # sent again, accepted as another run
    assert bench.job(job_id).attempt == 2
    orphan = bench.cloud.runpod._execute("SELECT id FROM runs ORDER BY rowid")[0][0]
    bench.cloud.runpod._execute("UPDATE runs SET created_at = ? WHERE id = ?", bench.clock.at.timestamp(), orphan)

    accepted = moves.accept(late, runpod_job_id=orphan, runpod_status="IN_QUEUE", now=bench.clock.now())
    assert bench.service.pipeline.saver.save([accepted], deadline).won == []

    assert bench.cloud.runpod.find(orphan).cancelled_at is not None
    kept = bench.cloud.runpod.find(bench.job(job_id).runpod_job_id)
    assert kept.cancelled_at is None


def test_a_late_acceptance_adopts_the_run_while_nothing_else_was_sent(bench):
    bench.faults.add(RUN, LOST, after_effect=True)
    job_id = bench.create()
    late = bench.job(job_id)
    (orphan,) = bench.cloud.runpod._execute("SELECT id FROM runs")

    accepted = moves.accept(late, runpod_job_id=orphan[0], runpod_status="IN_QUEUE", now=bench.clock.now())
    stale = moves.accept(
        late.__class__(**{**late.__dict__, "version": 99}),
        runpod_job_id=orphan[0],
        runpod_status="",
        now=bench.clock.now(),
    )

    assert len(bench.service.pipeline.saver.save([stale], bench.deadline()).won) == 1  # the version does not matter
    assert bench.service.pipeline.saver.save([accepted], bench.deadline()).won == []  # it is recorded already
    assert bench.cloud.runpod.find(orphan[0]).cancelled_at is None
    assert finish(bench, job_id).status == "done"
    assert len(bench.cloud.runpod.inputs()) == 1


def test_without_time_for_it_nothing_is_sent_and_nothing_is_lost(bench, monkeypatch):
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    job_id = bench.create()
    monkeypatch.undo()

    bench.round(seconds=11.0)

    assert bench.job(job_id).state is State.SUBMIT
    assert bench.cloud.runpod.inputs() == []


def test_claimed_submits_that_cannot_be_sent_in_time_are_given_back(bench, monkeypatch):
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    job_id = bench.create()
    monkeypatch.undo()
    claim = bench.service.store.claim

    def slowly(**options):
        claimed = claim(**options)
        bench.clock.advance(50)
        return claimed

    monkeypatch.setattr(bench.service.store, "claim", slowly)
    bench.round()

    job = bench.job(job_id)
    assert (job.state, job.attempt, bench.cloud.runpod.inputs()) == (State.SUBMIT, 0, [])
    assert bench.timeline(job_id) == ["created", "submitting", "not_sent"]


def test_the_first_refused_save_stops_sending(bench, monkeypatch):
    monkeypatch.setattr("chalicelib.pipeline.THREADS", 1)
    monkeypatch.setattr("chalicelib.rounds.SAVE_EVERY", 0.0)
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    for n in range(5):
        bench.create(f"cat {n}")
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: None)
    refused = threading.Event()
    run = type(bench.service.pipeline.steps.runpod).run

    def wait_for_refusal(self, *args, **options):
        answer = run(self, *args, **options)
        if len(bench.cloud.runpod.inputs()) > 1:
            refused.wait(5)
        return answer

    def refuse(*_, **__):
        refused.set()
        raise TransientError("d1_rate_limited", "locked out")

    monkeypatch.setattr(type(bench.service.pipeline.steps.runpod), "run", wait_for_refusal)
    monkeypatch.setattr(bench.service.store, "save", refuse)
    bench.round()

    assert 1 <= len(bench.cloud.runpod.inputs()) <= 3
    assert bench.service.pipeline.saver.backlog == 5


# Four rounds a minute


def starts(bench, lengths, monkeypatch):
    """When each round began, in seconds from the start, if they last as given."""
    at, begun = bench.clock.elapsed, []
    remaining = iter(lengths)

    def run_round(deadline, **_):
        begun.append(bench.clock.elapsed - at)
        bench.clock.advance(next(remaining))
        return Report()

    monkeypatch.setattr(bench.service.pipeline, "run_round", run_round)
    bench.service.pipeline.run_minute(bench.deadline(57.5))
    return begun


@pytest.mark.parametrize(
    ("lengths", "begun"),
    [
        ([1, 1, 1, 1], [0, 15, 30, 45]),
        ([0, 0, 0, 0], [0, 15, 30, 45]),
        ([15, 15, 2, 2], [0, 15, 30, 45]),
        ([16, 1, 1], [0, 30, 45]),
        ([1, 20, 1], [0, 15, 45]),
        ([44, 3], [0, 45]),
        ([46], [0]),
        ([60], [0]),
        ([1, 1, 17], [0, 15, 30]),
    ],
)
def test_rounds_keep_to_the_grid_and_leave_missed_slots_out(bench, monkeypatch, lengths, begun):
    assert starts(bench, lengths, monkeypatch) == begun


def test_there_is_no_sleep_after_the_fourth_round(bench, monkeypatch):
    starts(bench, [1, 1, 1, 1], monkeypatch)

    assert bench.clock.slept == [14, 14, 14]


def test_a_late_start_runs_only_what_fits(bench, monkeypatch):
    begun = []

    def run_round(deadline, **_):
        begun.append(bench.clock.elapsed)
        return Report()

    monkeypatch.setattr(bench.service.pipeline, "run_round", run_round)

    bench.service.pipeline.run_minute(bench.deadline(27.0))

    assert begun == [0, 15]


def test_the_first_round_runs_however_little_time_there_is(bench):
    assert len(bench.service.pipeline.run_minute(bench.deadline(0.5))) == 1


@pytest.fixture
def thrifty(bench):
    """Ends a minute where there is nothing to do."""
    bench.service.pipeline.skip_idle_rounds = True
    return bench


def test_without_the_setting_an_idle_minute_has_four_rounds(bench):
    assert len(bench.service.pipeline.run_minute(bench.deadline())) == 4


def test_with_it_an_idle_minute_is_over_at_once(thrifty):
    assert len(thrifty.service.pipeline.run_minute(thrifty.deadline())) == 1
    assert thrifty.clock.slept == []


@pytest.mark.parametrize("step", ["submit", "submitting", "poll", "store"])
def test_a_minute_with_a_job_that_is_not_yet_due_is_not_idle(thrifty, step):
    thrifty.create()
    status = "queued" if step in ("submit", "submitting") else "running"
    thrifty.cloud.d1.execute("UPDATE jobs SET status = ?, step = ?, due_at = '2099'", status, step)

    assert len(thrifty.service.pipeline.run_minute(thrifty.deadline())) == 4


def test_a_minute_in_which_the_last_job_ends_has_one_more_round(thrifty):
    thrifty.create()
    thrifty.clock.advance(15)

    assert [report.idle for report in thrifty.service.pipeline.run_minute(thrifty.deadline())] == [False, True]
    assert [job.status for job in thrifty.jobs()] == ["done"]


def test_a_minute_that_owes_a_save_is_not_idle(thrifty):
    job = thrifty.service.store.get(thrifty.create(), timeout=5.0)
    thrifty.cloud.d1.execute("DELETE FROM jobs")
    save = thrifty.service.store.save
    thrifty.service.store.save = lambda *_, **__: (_ for _ in ()).throw(TransientError("d1_rate_limited", "locked out"))
    thrifty.service.pipeline.saver.keep([moves.put_back(replace(job, step="store"), now=thrifty.clock.now())])

    report = thrifty.service.pipeline.run_round(thrifty.deadline())
    thrifty.service.store.save = save

    assert not report.idle
    assert thrifty.service.pipeline.run_round(thrifty.deadline()).idle


# How often a run is looked at


def seconds_to_the_next_look(bench):
    (row,) = bench.cloud.d1.execute("SELECT due_at FROM jobs")
    return (jobs.from_text(row["due_at"]) - bench.clock.now()).total_seconds()


@pytest.fixture
def with_webhooks(bench, environment):
    """The same with RunPod's callbacks on, though none comes."""
    given = {**environment, "PUBLIC_BASE_URL": "https://api.test", "WEBHOOK_SECRET": "a secret of the tests"}
    bench.service = bootstrap.build(settings.load(given), bench.clock)
    return bench


@pytest.mark.parametrize(("age", "seconds"), [(15, 12), (119, 12), (121, 27), (185, 42), (241, 57), (3000, 57)])
def test_with_webhooks_a_run_is_looked_at_the_less_often_the_longer_it_takes(with_webhooks, age, seconds):
    with_webhooks.create("a cat", simulate={"run_seconds": 4000})

    with_webhooks.round(after=age)

    assert seconds_to_the_next_look(with_webhooks) == seconds


@pytest.mark.parametrize(("usual", "seconds"), [(10, 12), (150, 27), (600, 57)])
def test_with_webhooks_a_slow_model_is_looked_at_less_often_from_the_start(with_webhooks, usual, seconds):
    models = Models({"qwen-image": Model(name="qwen-image", usual_seconds=usual)})
    with_webhooks.service.store._models = models
    with_webhooks.create("a cat", simulate={"run_seconds": 4000})

    with_webhooks.round()

    assert seconds_to_the_next_look(with_webhooks) == seconds


def test_without_webhooks_every_run_is_looked_at_in_each_round(bench):
    bench.create("a cat", simulate={"run_seconds": 4000})

    bench.round(after=3000)

    assert seconds_to_the_next_look(bench) == 12


def test_a_run_of_which_there_was_no_answer_is_looked_at_in_the_next_round(with_webhooks):
    job_id = with_webhooks.create("a cat", simulate={"run_seconds": 4000})
    with_webhooks.round(after=600)
    version = with_webhooks.job(job_id).version
    with_webhooks.faults.add(STATUS, (429, ""))

    with_webhooks.round(after=60)

    assert seconds_to_the_next_look(with_webhooks) == 12
    assert with_webhooks.job(job_id).version == version
    with_webhooks.round()
    assert seconds_to_the_next_look(with_webhooks) == 57


def test_a_run_without_an_answer_is_not_looked_at_later_than_it_was_due(with_webhooks):
    job_id = with_webhooks.create("a cat", simulate={"run_seconds": 4000})
    with_webhooks.clock.advance(600)
    (job,) = with_webhooks.claim()
    with_webhooks.service.store.cancel([job_id], by="test", nonce="n", now=with_webhooks.clock.now(), timeout=5.0)
    later = moves.look_again(job, at=jobs.to_text(with_webhooks.clock.now() + timedelta(seconds=12)))

    with_webhooks.service.pipeline.saver.save([later], with_webhooks.deadline())

    assert seconds_to_the_next_look(with_webhooks) == 0


@pytest.mark.parametrize("column", ["cancel_at", "deadline_at"])
def test_a_run_that_must_stop_is_looked_at_in_each_round(with_webhooks, column):
    with_webhooks.create("a cat", simulate={"run_seconds": 4000})
    with_webhooks.cloud.d1.execute(f"UPDATE jobs SET {column} = '2026-02-01T00:00:00.000Z'")
    for _ in range(2):
        with_webhooks.faults.add(r"POST .*/cancel/", (429, ""))

    with_webhooks.round(after=600)

    assert seconds_to_the_next_look(with_webhooks) == 12


def test_a_run_that_a_user_cancels_is_looked_at_at_once(with_webhooks):
    job_id = with_webhooks.create("a cat", simulate={"run_seconds": 4000})
    with_webhooks.round(after=600)
    with_webhooks.service.store.cancel(
        [job_id], by="test", nonce="n", now=with_webhooks.clock.now(), timeout=5.0
    )

    with_webhooks.round()

    assert with_webhooks.job(job_id).status == "cancelled"


def test_two_pollers_at_once_look_at_each_run_once(bench):
    ids = {bench.create(f"cat {n}", simulate={"run_seconds": 4000}) for n in range(20)}
    bench.clock.advance(15)
    store = bench.service.store
    claim = {"now": bench.clock.now(), "lease": 60.0, "ignore_due": False, "timeout": 5.0}

    one = store.claim(nonce="one", limits=Limits(submits=0, polls=12), **claim).jobs
    two = store.claim(nonce="two", limits=Limits(submits=0, polls=12), **claim).jobs

    assert (len(one), len(two)) == (12, 8)
    assert {job.id for job in [*one, *two]} == ids


@pytest.mark.parametrize("error", [TransientError("d1_rate_limited", "locked out"), RuntimeError("a bug")])
def test_a_round_that_fails_does_not_stop_the_next(bench, monkeypatch, error):
    outcomes = iter([error, Report(checked=1), error, Report(checked=2)])

    def run_round(deadline, **_):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(bench.service.pipeline, "run_round", run_round)

    assert bench.service.pipeline.run_minute(bench.deadline()) == [Report(checked=1), Report(checked=2)]


@pytest.mark.parametrize("spool", ["", "spool"])
def test_the_last_round_of_a_minute_stores_what_it_finds(bench, environment, spool):
    bench.service = bootstrap.build(settings.load({**environment, "SPOOL_BUCKET": spool}), bench.clock)
    job_id = bench.create()

    bench.round(seconds=57.5 - 3 * 15.0 - 2.5)  # two seconds and a half after it has begun

    assert bench.job(job_id).status == "done"


def _noted(name, act, order):
    """Does the same, and says so."""

    def do(*args, **options):
        order.append(name)
        return act(*args, **options)

    return do


def test_a_result_that_is_at_hand_is_stored_before_others_are_looked_at(bench, monkeypatch):
    order = []
    monkeypatch.setattr("chalicelib.pipeline.THREADS", 1)
    monkeypatch.setattr("chalicelib.rounds.SAVE_EVERY", 0.0)
    steps = bench.service.pipeline.steps
    for name in ("poll", "store"):
        object.__setattr__(steps, name, _noted(name, getattr(steps, name), order))
    for n in range(20):
        bench.create(f"cat {n}")

    bench.round()

    assert sorted(order) == ["poll"] * 20 + ["store"] * 20
    assert order.index("store") < 20


def test_a_round_ends_with_all_its_threads(bench):
    bench.create()
    bench.round()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crew")]


def test_two_services_on_one_table_do_not_disturb_each_other(bench, environment):
    other = bootstrap.build(settings.load(environment), bench.clock)
    job_id = bench.create()
    bench.clock.advance(15)

    first = bench.service.pipeline.run_round(bench.deadline())
    second = other.pipeline.run_round(bench.deadline())

    assert ([job.id for job in first.updated], second.updated, second.checked) == ([job_id], [], 0)
