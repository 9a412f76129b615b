"""Verbs for many jobs, deleting, waiting for an end, and the attempts of a job, as callers see them."""

import json

import pytest
import requests

from chalicelib import bootstrap
from chalicelib.errors import REQUEST_STATUS, IndeterminateError, TransientError
from chalicelib.jobs import State
from chalicelib.r2 import R2
from chalicelib.reads import Reads
from chalicelib.store import Store
from tests.conftest import BUCKET, Bench, call

RUN = r"POST .*/run$"
STATUS = r"GET .*/status/"
CANCEL = r"POST .*/cancel/"
D1 = r"POST .*/query$"
BUSY = (429, "", {"Retry-After": "3600"})
FAILED = {"run_seconds": 1, "status": "FAILED", "error": "out of memory"}
BULK = "/api/jobs/bulk"


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def done(bench, **payload):
    job_id = bench.create("a cat", **payload)
    bench.round()
    assert bench.job(job_id).state is State.DONE
    return job_id


def failed(bench):
    job_id = bench.create("a cat", simulate=FAILED)
    bench.round()
    assert bench.job(job_id).state is State.ERROR
    return job_id


def waiting(bench):
    bench.faults.add(RUN, BUSY)
    return bench.create("a cat")


def bulk(client, do, given=None, **more):
    given = {"created_after": "2020-01-01"} if given is None else given
    status, body, _ = call(client, "POST", BULK, {"do": do, "filter": given, **more})
    assert status == 200, body
    return body


def dead(bench, number):
    ids = [bench.create("a cat") for _ in range(number)]
    for _ in range(30):
        bench.round(after=60)
        if all(bench.job(job_id).dead_at for job_id in ids):
            return ids
    raise AssertionError(bench.timeline(ids[0]))


# Delete


def test_a_deleted_job_is_gone_and_its_files_too(client, bench, cloud):
    job_id, other = done(bench, simulate={"files": 3}), done(bench)
    kept = [key for key in bench.objects() if other in key]

    status, body, _ = call(client, "DELETE", f"/api/jobs/{job_id}")

    assert (status, body) == (200, {"ok": True, "id": job_id, "deleted": True})
    assert bench.objects() == kept
    assert [job.id for job in bench.jobs()] == [other]
    assert [row["event"] for row in cloud.d1.execute("SELECT event FROM job_events WHERE job_id = ?", job_id)] == [
        "deleted"
    ]
    assert call(client, "GET", f"/api/queue/status?id={job_id}")[0] == 404


def test_who_deleted_it_and_when_is_still_told(client, bench):
    job_id = done(bench)
    call(client, "DELETE", f"/api/jobs/{job_id}")

    status, body, _ = call(client, "GET", f"/api/jobs/{job_id}")

    assert (status, body["code"]) == (410, "job_deleted")
    assert body["error"].startswith("This job was deleted at 2026-01-31T23:59:15.000Z by ")


def test_a_second_delete_says_the_same(client, bench):
    job_id = done(bench)

    answers = [call(client, "DELETE", f"/api/jobs/{job_id}")[:2] for _ in range(3)]

    assert answers == [(200, {"ok": True, "id": job_id, "deleted": True})] * 3


@pytest.mark.parametrize("job_id", ["nobody", "%27%20OR%201=1", "x" * 500])
def test_what_was_never_there_is_not_deleted(client, job_id):
    status, body, _ = call(client, "DELETE", f"/api/jobs/{job_id}")

    assert (status, body["code"]) == (404, "job_not_found")


@pytest.mark.parametrize("state", ["submit", "submitting", "poll", "store"])
def test_a_live_job_is_not_deleted(client, bench, faults, no_r2, state):
    if state == "submit":
        job_id = waiting(bench)
    elif state == "submitting":
        faults.add(RUN, requests.ReadTimeout())
        job_id = bench.create()
    else:
        job_id = bench.create()
        if state == "store":
            bench.round()
    before = bench.job(job_id)
    assert before.state == state

    status, body, _ = call(client, "DELETE", f"/api/jobs/{job_id}")

    assert (status, body["code"]) == (409, "job_not_deletable")
    assert bench.job(job_id) == before


def test_files_of_every_attempt_are_removed_and_none_of_another_job(client, bench, s3):
    job_id = done(bench)
    folder = f"jobs/2026/01/{job_id}"
    for key in (f"{folder}/2/output.png", f"{folder}/2/output-2.webp", f"{folder}/notes.txt", f"{folder}-b/output.png",
                f"{folder}/other-id/output.png"):  # fmt: skip
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")

    call(client, "DELETE", f"/api/jobs/{job_id}")

    assert bench.objects() == [f"{folder}-b/output.png", f"{folder}/notes.txt", f"{folder}/other-id/output.png"]


def test_the_file_of_an_old_row_is_removed_wherever_it_lies(client, bench, cloud, s3):
    s3.put_object(Bucket=BUCKET, Key="elsewhere/old.png", Body=b"x")
    cloud.d1.execute(
        "INSERT INTO jobs (id, status, result_r2_key, created_at) "
        "VALUES ('old', 'done', 'elsewhere/old.png', '2025-01-01')"
    )

    assert call(client, "DELETE", "/api/jobs/old")[0] == 200
    assert (bench.objects(), bench.jobs()) == ([], [])


def test_metadata_finds_a_deleted_job_no_more(client, bench, cloud):
    _, body, _ = call(client, "POST", "/api/queue/create", {"prompt": "a", "metadata": {"k": "v", "l": "w"}})
    bench.round()

    call(client, "DELETE", f"/api/jobs/{body['id']}")

    assert cloud.d1.execute("SELECT * FROM job_metadata") == []


def test_while_a_file_cannot_be_removed_the_row_stays_and_no_verb_touches_it(client, bench, monkeypatch, no_r2):
    (job_id,) = dead(bench, 1)
    no_r2()
    keys = R2.keys
    monkeypatch.setattr(R2, "keys", lambda *_, **__: (_ for _ in ()).throw(TransientError("r2_failed", "R2 is down.")))

    status, body, _ = call(client, "DELETE", f"/api/jobs/{job_id}")

    assert (status, body["code"]) == (503, "r2_failed")
    job = call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]
    assert (job["status"], job["deleted_at"] is None) == ("error", False)
    assert job["timeline"][-1]["event"] == "deleting"
    for verb, code in (("retry", "job_not_retryable"), ("redrive", "not_dead"), ("cancel", "job_not_cancellable")):
        assert call(client, "POST", f"/api/jobs/{job_id}/{verb}")[1]["code"] == code
    assert bulk(client, "retry")["done"] == bulk(client, "redrive")["done"] == []
    assert call(client, "POST", "/api/dead-letters/redrive", {})[1]["redriven"] == []

    monkeypatch.setattr(R2, "keys", keys)
    assert call(client, "DELETE", f"/api/jobs/{job_id}")[0] == 200
    assert bench.jobs() == []


def test_a_retry_that_read_the_job_before_it_was_marked_does_nothing(client, bench, monkeypatch):
    job_id = failed(bench)
    save = Store.save

    def save_late(self, *args, **options):
        monkeypatch.setattr(Store, "save", save)
        assert call(client, "DELETE", f"/api/jobs/{job_id}")[0] == 200
        return save(self, *args, **options)

    monkeypatch.setattr(Store, "save", save_late)

    status, body, _ = call(client, "POST", f"/api/jobs/{job_id}/retry")

    assert (status, body["code"]) == (404, "job_not_found")
    assert bench.jobs() == []


# Many


def test_many_are_cancelled_and_those_at_runpod_soon(client, bench, cloud):
    resting, running, over = waiting(bench), bench.create(simulate={"run_seconds": 900}), done(bench)

    calls = cloud.calls["d1"]
    body = bulk(client, "cancel")
    calls = cloud.calls["d1"] - calls

    assert set(body["done"]) == {resting, running}
    assert (body["refused"], body["next_cursor"], calls) == ([], None, 2)
    assert bench.job(resting).state is State.CANCELLED
    assert bench.job(running).cancel_at
    bench.round()
    assert (bench.job(running).state, bench.job(over).state) == (State.CANCELLED, State.DONE)


def test_many_are_retried(client, bench):
    ids = [failed(bench) for _ in range(3)]
    done(bench)

    body = bulk(client, "retry", {"status": "error"})

    assert set(body["done"]) == set(ids)
    bench.round()
    assert {bench.job(job_id).attempt for job_id in ids} == {2}
    assert bulk(client, "retry", {"status": "cancelled"})["done"] == []


def test_many_are_retried_however_much_their_callers_say_of_them(client, bench, cloud):
    words = {f"name-{n}": "x" * 500 for n in range(20)}
    for _ in range(3):
        call(client, "POST", "/api/queue/create", {"jobs": [{"prompt": "a", "metadata": words}] * 30})
    cloud.d1.execute("UPDATE jobs SET status = 'error', step = NULL")

    assert len(bulk(client, "retry", limit=100)["done"]) == 90


def test_many_are_redriven(client, bench, no_r2):
    ids = dead(bench, 3)
    other = failed(bench)
    no_r2()

    body = bulk(client, "redrive", {"model": "qwen-image"})

    assert set(body["done"]) == set(ids)
    bench.round()
    assert {bench.job(job_id).state for job_id in ids} == {State.DONE}
    assert bench.job(other).state is State.ERROR


def test_a_dead_letter_is_not_bought_again_with_many(client, bench, no_r2):
    (job_id,) = dead(bench, 1)

    body = bulk(client, "retry", {"status": "error"})

    assert (body["done"], [(one["id"], one["code"]) for one in body["refused"]]) == (
        [],
        [(job_id, "job_not_retryable")],
    )
    assert bench.job(job_id).dead_at
    assert call(client, "POST", f"/api/jobs/{job_id}/retry")[0] == 200


def test_what_has_changed_since_it_was_found_is_not_deleted(client, bench, table, monkeypatch):
    job_id = failed(bench)
    find = Reads.find

    def find_and_lose(self, *args, **options):
        found = find(self, *args, **options)
        table("UPDATE jobs SET status = 'done' WHERE id = ?", job_id)
        return found

    monkeypatch.setattr(Reads, "find", find_and_lose)

    body = bulk(client, "delete", {"status": "error"})

    assert (body["done"], [one["code"] for one in body["refused"]]) == ([], ["job_changed"])
    assert (bench.job(job_id).state, bench.job(job_id).deleted_at) == (State.DONE, None)


def test_many_that_are_too_large_together_are_saved_in_parts(client, bench, no_r2, table):
    ids = dead(bench, 6)
    no_r2()
    table("UPDATE jobs SET warnings = ?", json.dumps([{"code": "x", "reason": '"แ' * 15_000}], ensure_ascii=False))

    body = bulk(client, "redrive")

    assert set(body["done"]) == set(ids)


def test_what_is_lost_is_said_of_each(client, bench, no_r2):
    lost, *_ = dead(bench, 1)
    bench.round(after=3600)

    body = bulk(client, "redrive")

    assert (body["done"], [(one["id"], one["code"]) for one in body["refused"]]) == ([], [(lost, "result_lost")])


def test_many_are_deleted_with_their_files(client, bench):
    ids = [done(bench) for _ in range(4)]
    live = bench.create(simulate={"run_seconds": 900})

    body = bulk(client, "delete", {"model": "qwen-image"})

    assert set(body["done"]) == set(ids)
    assert ([job.id for job in bench.jobs()], bench.objects()) == ([live], [])


@pytest.mark.parametrize(("do", "make"), [("cancel", waiting), ("retry", failed), ("delete", done)])
def test_a_dry_run_only_says(client, bench, do, make):
    job_id = make(bench)
    before = bench.job(job_id)

    body = bulk(client, do, dry_run=True)

    assert (body["do"], body["dry_run"], body["done"]) == (do, True, [job_id])
    assert (bench.job(job_id), len(bench.objects())) == (before, before.state is State.DONE)


@pytest.mark.parametrize(("do", "make"), [("cancel", waiting), ("retry", failed), ("delete", done)])
def test_the_same_again_does_nothing_more(client, bench, do, make):
    make(bench)

    first, second = bulk(client, do), bulk(client, do)

    assert (len(first["done"]), second["done"], second["refused"]) == (1, [], [])


def test_many_are_done_page_by_page(client, bench):
    ids = [failed(bench) for _ in range(5)]
    seen, cursor = [], None
    for _ in range(9):
        body = bulk(client, "retry", limit=2, dry_run=True, **({"cursor": cursor} if cursor else {}))
        seen += body["done"]
        cursor = body["next_cursor"]
        if cursor is None:
            break

    assert seen == ids[::-1]


@pytest.mark.parametrize(
    "given", [{"model": "nobody"}, {"q": "dog"}, {"metadata": {"a": "b"}}, {"created_before": "2020-01-01"}]
)
def test_only_what_the_filter_finds_is_meant(client, bench, given):
    job_id = done(bench)

    assert bulk(client, "delete", given)["done"] == []
    assert bench.job(job_id).state is State.DONE


def test_who_did_it_is_in_the_timeline(client, bench):
    cancelled, again = waiting(bench), failed(bench)
    running = bench.create(simulate={"run_seconds": 900})
    bulk(client, "cancel")
    bulk(client, "retry", {"status": "error"})

    for job_id, event in ((cancelled, "cancelled"), (running, "cancel_asked"), (again, "retried")):
        (line,) = [line for line in bench.events(job_id) if line["event"] == event]
        assert line["by"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "do_invalid"),
        ({"do": "purge", "filter": {"q": "a"}}, "do_invalid"),
        ({"do": None, "filter": {"q": "a"}}, "do_invalid"),
        ({"do": ["cancel"], "filter": {"q": "a"}}, "do_invalid"),
        ({"do": "cancel"}, "filter_invalid"),
        ({"do": "cancel", "filter": None}, "filter_invalid"),
        ({"do": "cancel", "filter": []}, "filter_invalid"),
        ({"do": "delete", "filter": {}}, "filter_invalid"),
        ({"do": "delete", "filter": {"status": None, "q": None}}, "filter_invalid"),
        ({"do": "delete", "filter": {"metadata": {}}}, "filter_invalid"),
        ({"do": "delete", "filter": {"stauts": "error"}}, "filter_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "max": 5}, "filter_invalid"),
        ({"do": "delete", "filter": {"status": "queued"}}, "filter_invalid"),
        ({"do": "cancel", "filter": {"status": ["done", "error"]}}, "filter_invalid"),
        ({"do": "retry", "filter": {"status": "done"}}, "filter_invalid"),
        ({"do": "redrive", "filter": {"status": "cancelled"}}, "filter_invalid"),
        ({"do": "delete", "filter": {"status": "finished"}}, "status_invalid"),
        ({"do": "delete", "filter": {"status": []}}, "status_invalid"),
        ({"do": "delete", "filter": {"status": [1]}}, "status_invalid"),
        ({"do": "delete", "filter": {"status": {"done": 1}}}, "status_invalid"),
        ({"do": "delete", "filter": {"model": 1}}, "model_invalid"),
        ({"do": "delete", "filter": {"model": ""}}, "model_invalid"),
        ({"do": "delete", "filter": {"created_after": 5}}, "created_invalid"),
        ({"do": "delete", "filter": {"created_before": "soon"}}, "created_invalid"),
        ({"do": "delete", "filter": {"metadata": []}}, "metadata_invalid"),
        ({"do": "delete", "filter": {"metadata": {"a": 1}}}, "metadata_invalid"),
        ({"do": "delete", "filter": {"q": 1}}, "q_invalid"),
        ({"do": "delete", "filter": {"q": " "}}, "q_invalid"),
        ({"do": "delete", "filter": {"status": "done", "q": {}}}, "q_invalid"),
        ({"do": "delete", "filter": {"model": "a", "status": {}}}, "status_invalid"),
        ({"do": "delete", "filter": {"model": "a", "created_after": {}}}, "created_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "limit": 0}, "limit_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "limit": 101}, "limit_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "limit": "5"}, "limit_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "limit": True}, "limit_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "limit": 1.5}, "limit_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "dry_run": 1}, "dry_run_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "cursor": 1}, "cursor_invalid"),
        ({"do": "delete", "filter": {"q": "a"}, "cursor": "x"}, "cursor_invalid"),
        (b"", "body_not_json"),
        (b"[]", "body_not_object"),
    ],
)  # fmt: skip
def test_a_wrong_wish_for_many_is_refused_and_does_nothing(client, bench, body, code):
    job_id = done(bench)
    before = bench.job(job_id)

    status, answer, _ = call(client, "POST", BULK, body)

    assert (status, answer["code"]) == (REQUEST_STATUS[code], code)
    assert bench.job(job_id) == before


# Verbs that are said twice


def test_a_retry_that_is_said_twice_is_one(client, bench):
    job_id = failed(bench)

    first = call(client, "POST", f"/api/jobs/{job_id}/retry")
    second = call(client, "POST", f"/api/jobs/{job_id}/retry")

    assert (first[0], second[0]) == (200, 200)
    assert second[1]["job"]["status"] == "queued"
    assert bench.timeline(job_id).count("retried") == 1


def test_so_is_that_of_a_job_that_was_never_sent(client, bench):
    job_id = waiting(bench)
    call(client, "POST", f"/api/jobs/{job_id}/cancel")

    assert [call(client, "POST", f"/api/jobs/{job_id}/retry")[0] for _ in range(2)] == [200, 200]
    assert bench.timeline(job_id).count("retried") == 1


def test_a_redrive_that_is_said_twice_is_one(client, bench, no_r2):
    (job_id,) = dead(bench, 1)

    assert [call(client, "POST", f"/api/jobs/{job_id}/redrive")[0] for _ in range(2)] == [200, 200]
    assert bench.timeline(job_id).count("redriven") == 1


def test_a_retry_of_many_whose_save_gets_no_answer_says_so_of_each(client, bench, monkeypatch):
    ids = {failed(bench) for _ in range(2)}
    save = Store.save

    def lose(self, changes, **options):
        save(self, changes, **options)
        raise IndeterminateError("d1_timeout", "D1 did not answer in time.", service="d1")

    monkeypatch.setattr(Store, "save", lose)

    body = bulk(client, "retry", limit=2)

    assert (body["done"], {(one["id"], one["code"]) for one in body["refused"]}) == (
        [],
        {(job_id, "d1_timeout") for job_id in ids},
    )


# Waiting


@pytest.fixture
def while_waiting(client, monkeypatch):
    """What happens while an answer is held back, second by second."""
    clock = bootstrap.service().clock

    def do(action):
        def sleep(seconds):
            clock.slept.append(seconds)
            clock.advance(seconds)
            action(clock)

        monkeypatch.setattr(clock, "sleep", sleep)

    return do


def wait_for(client, job_id, prefer):
    return call(client, "GET", f"/api/jobs/{job_id}", headers={"Prefer": prefer})


def test_an_answer_is_held_until_the_job_has_ended(client, bench, while_waiting):
    job_id = bench.create()
    while_waiting(lambda clock: bench.service.pipeline.run_round(bench.deadline(), ignore_due=True))

    status, body, headers = wait_for(client, job_id, "wait=20")

    assert (status, body["job"]["status"], headers["Preference-Applied"]) == (200, "done", "wait=20")
    assert bench.clock.slept[:1] == [2.0]
    assert body["job"]["timeline"][-1]["event"] == "done"


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [("wait=7", 7), ("wait=20", 20), ("wait=600", 24), ('respond-async, Wait="5"', 5), ("wait=0", 0)],
)
def test_it_is_held_no_longer_than_the_caller_prefers_or_25_seconds(client, bench, prefer, seconds):
    job_id = bench.create(simulate={"run_seconds": 900})
    before, calls = bench.clock.elapsed, bench.cloud.calls["d1"]

    status, body, headers = wait_for(client, job_id, prefer)

    assert (status, body["job"]["status"], headers["Preference-Applied"]) == (200, "running", f"wait={seconds}")
    assert bench.clock.elapsed - before == seconds
    assert bench.cloud.calls["d1"] - calls <= 3 + seconds / 4


@pytest.mark.parametrize(
    "prefer", ["", "wait", "wait=", "wait=-5", "wait=soon", "wait=1.5", "handling=lenient", "wait=9999999"]
)
def test_a_preference_that_is_not_understood_counts_for_nothing(client, bench, prefer):
    job_id = bench.create()

    status, _, headers = wait_for(client, job_id, prefer)

    assert (status, "Preference-Applied" in headers, bench.clock.slept) == (200, False, [])


def test_a_wait_begins_with_what_is_so_now(client, bench, table, while_waiting):
    job_id = failed(bench)
    assert call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]["status"] == "error"
    table("UPDATE jobs SET status = 'running', step = 'poll' WHERE id = ?", job_id)  # by another container

    wait_for(client, job_id, "wait=4")

    assert bench.clock.slept


def test_nobody_waits_for_what_is_not_there_or_has_ended(client, bench):
    job_id = done(bench)

    assert wait_for(client, job_id, "wait=20")[1]["job"]["status"] == "done"
    assert wait_for(client, "nobody", "wait=20")[0] == 404
    assert bench.clock.slept == []


def test_nobody_waits_while_d1_calls_are_short(client, bench, monkeypatch):
    job_id = bench.create(simulate={"run_seconds": 900})
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 250)

    assert wait_for(client, job_id, "wait=20")[0] == 200
    assert bench.clock.slept == []


def test_a_d1_that_fails_meanwhile_ends_the_wait_with_what_is_known(client, bench, while_waiting, faults):
    job_id = bench.create(simulate={"run_seconds": 900})
    while_waiting(lambda clock: faults.add(D1, requests.ConnectTimeout(), times=9))

    status, body, _ = wait_for(client, job_id, "wait=20")

    assert (status, body["job"]["id"]) == (200, job_id)


# Attempts


def attempts(client, bench, job_id):
    bench.service.reads.forget()
    return call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]["attempts"]


def test_a_job_has_its_one_attempt(client, bench):
    job_id = done(bench)

    (attempt,) = attempts(client, bench, job_id)

    assert attempt == {
        "attempt": 1,
        "runpod_job_id": bench.job(job_id).runpod_job_id,
        "outcome": "completed",
        "submitted_at": "2026-01-31T23:59:00.000Z",
        "started_at": None,
        "ended_at": "2026-01-31T23:59:15.000Z",
        "queue_ms": bench.job(job_id).queue_ms,
        "execution_ms": bench.job(job_id).execution_ms,
        "cost": None,
        "error_code": None,
        "error": None,
    }


def test_each_attempt_says_what_came_of_it(client, bench, cloud, faults):
    job_id = failed(bench)
    call(client, "POST", f"/api/jobs/{job_id}/retry")
    faults.add(RUN, requests.ReadTimeout())
    bench.round()
    bench.round(after=660)
    bench.round(after=15)

    found = attempts(client, bench, job_id)

    assert [(one["attempt"], one["outcome"], one["error_code"]) for one in found] == [
        (1, "failed", "worker_failed"),
        (2, "unknown", None),
        (3, "failed", "worker_failed"),
    ]
    assert found[1]["runpod_job_id"] is None


def test_a_running_attempt_says_since_when(client, bench):
    job_id = bench.create(simulate={"run_seconds": 900})
    bench.round()

    (attempt,) = attempts(client, bench, job_id)

    assert (attempt["outcome"], attempt["ended_at"]) == ("running", None)
    assert attempt["started_at"] == "2026-01-31T23:59:15.000Z"


def test_a_cancelled_attempt(client, bench):
    job_id = bench.create(simulate={"run_seconds": 900})
    call(client, "POST", f"/api/jobs/{job_id}/cancel")

    assert [one["outcome"] for one in attempts(client, bench, job_id)] == ["cancelled"]


def test_a_job_that_was_never_sent_has_none(client, bench):
    assert attempts(client, bench, waiting(bench)) == []


def test_an_old_row_has_the_attempt_that_it_tells_of(client, bench, cloud):
    cloud.d1.execute(
        "INSERT INTO jobs (id, status, runpod_job_id, created_at, finished_at) "
        "VALUES ('old', 'done', 'r1', '2025-01-01', '2025-01-02')"
    )

    (attempt,) = attempts(client, bench, "old")

    assert (attempt["attempt"], attempt["runpod_job_id"], attempt["outcome"]) == (1, "r1", "completed")
    assert attempt["ended_at"] == "2025-01-02"
