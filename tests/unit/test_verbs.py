"""Cancel, retry, redrive, dead letters and RunPod's callbacks, as their callers see them."""

import json
from datetime import timedelta

import pytest
import requests

from chalicelib import bootstrap, jobs
from chalicelib.jobs import State
from chalicelib.r2 import R2
from chalicelib.spool import Spool
from chalicelib.webhooks import Webhooks
from tests.conftest import BUCKET, Bench, call
from tools.cloud.render import draw

RUN = r"POST .*/run$"
STATUS = r"GET .*/status/"
CANCEL = r"POST .*/cancel/"
D1 = r"POST .*/query$"
BUSY = (429, "", {"Retry-After": "300"})
FAILED = {"run_seconds": 1, "status": "FAILED", "error": "out of memory"}


@pytest.fixture
def environment(environment):
    return {**environment, "PUBLIC_BASE_URL": "https://api.example", "WEBHOOK_SECRET": "secret-of-the-tests"}


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def verb(client, name, job_id):
    status, body, _ = call(client, "POST", f"/api/jobs/{job_id}/{name}")
    return status, body.get("code") or body["job"]["status"]


def end_dead(bench):
    """A job whose picture R2 has not taken while RunPod had it."""
    job_id = bench.create("a cat")
    for _ in range(30):
        bench.round(after=60)
        if bench.job(job_id).dead_at:
            return job_id
    raise AssertionError(bench.timeline(job_id))


def runs(cloud):
    """Webhook, id and times of every run."""
    return cloud.runpod._execute("SELECT webhook, id, execution_timeout_ms, ttl_ms FROM runs")


def webhook_of(cloud, job_id):
    """The address that RunPod was given, and the run."""
    (found,) = [run for run in runs(cloud) if f"/{job_id}/" in run[0]]
    return found[0].removeprefix("https://api.example"), found[1]


# Cancel


def test_a_waiting_job_is_cancelled(client, bench, faults, cloud):
    faults.add(RUN, BUSY)
    job_id = bench.create()

    assert verb(client, "cancel", job_id) == (200, "cancelled")
    assert bench.timeline(job_id) == ["created", "submit_refused", "cancelled"]
    bench.round(after=400)
    assert cloud.runpod.inputs() == []


def test_a_running_job_is_stopped_at_runpod_and_ends_in_the_same_request(client, bench, cloud):
    job_id = bench.create("a cat", simulate={"run_seconds": 600})

    assert verb(client, "cancel", job_id) == (200, "cancelled")

    job = bench.job(job_id)
    assert cloud.runpod.find(job.runpod_job_id).cancelled_at is not None
    assert (job.finished_at is not None, job.error_code) == (True, None)


def test_a_cancel_that_runpod_does_not_hear_is_accepted_and_done_later(client, bench, faults):
    job_id = bench.create("a cat", simulate={"run_seconds": 600})
    faults.add(CANCEL, (500, ""))

    assert verb(client, "cancel", job_id) == (200, "running")
    assert bench.job(job_id).cancel_at is not None
    bench.round()

    assert bench.job(job_id).status == "cancelled"


@pytest.mark.parametrize(("rounds", "status"), [(1, "running"), (3, "done")])
def test_what_is_drawn_is_not_cancelled(client, bench, rounds, status, no_r2):
    if status == "done":
        no_r2()
    job_id = bench.create()
    for _ in range(rounds):
        bench.round()

    assert bench.job(job_id).status == status
    assert verb(client, "cancel", job_id) == (409, "job_not_cancellable")


def test_a_second_cancel_says_the_same_and_changes_nothing(client, bench, faults):
    faults.add(RUN, BUSY)
    job_id = bench.create()
    verb(client, "cancel", job_id)
    before = bench.job(job_id)

    assert verb(client, "cancel", job_id)[0] == 200
    assert bench.job(job_id) == before


@pytest.mark.parametrize("name", ["cancel", "retry", "redrive"])
@pytest.mark.parametrize("job_id", ["nobody", "%27%20OR%201=1", "x" * 300])
def test_an_unknown_job_is_404(client, name, job_id):
    assert verb(client, name, job_id) == (404, "job_not_found")


# Retry


def test_a_retry_draws_it_again(client, bench):
    job_id = bench.create("a cat", simulate=FAILED)
    bench.round()
    assert bench.job(job_id).error_code == "worker_failed"

    assert verb(client, "retry", job_id) == (200, "queued")

    job = bench.job(job_id)
    assert (job.error_code, job.error_message, job.finished_at, job.runpod_job_id) == (None, None, None, None)
    bench.round()
    bench.round()
    assert bench.timeline(job_id)[-4:] == ["retried", "submitting", "submitted", "failed"]
    assert bench.job(job_id).attempt == 2


def test_a_retry_of_a_cancelled_job_is_not_cancelled_again(client, bench, cloud):
    job_id = bench.create("a cat", simulate={"run_seconds": 20})
    verb(client, "cancel", job_id)

    assert verb(client, "retry", job_id) == (200, "queued")
    for _ in range(4):
        bench.round()

    assert (bench.job(job_id).status, bench.job(job_id).cancel_at) == ("done", None)
    assert bench.job(job_id).result_r2_key.endswith(f"{job_id}/2/output.png")


def test_live_jobs_and_those_with_a_picture_are_not_retried(client, bench):
    job_id = bench.create()

    assert verb(client, "retry", job_id) == (409, "job_not_retryable")
    bench.round()
    assert bench.job(job_id).status == "done"
    assert verb(client, "retry", job_id) == (409, "job_not_retryable")


def test_a_retry_has_its_time_anew(client, bench):
    job_id = bench.create("a cat", simulate=FAILED)
    bench.round()
    before = bench.job(job_id).deadline_at
    bench.clock.advance(3600)

    verb(client, "retry", job_id)

    assert bench.job(job_id).deadline_at > before


# Redrive and dead letters


def test_a_dead_letter_says_what_is_left_and_is_redriven(client, bench, no_r2, s3, cloud):
    job_id = end_dead(bench)

    _, body, _ = call(client, "GET", "/api/dead-letters")
    (letter,) = body["dead_letters"]
    job = bench.job(job_id)
    assert (letter["id"], letter["error_code"], letter["left"]) == (job_id, "r2_failed", "runpod")
    assert (letter["dead_at"], letter["left_until"]) == (job.dead_at, job.result_until)
    assert letter["tries"] >= 10

    no_r2()
    assert verb(client, "redrive", job_id) == (200, "running")
    bench.round()

    job = bench.job(job_id)
    assert (job.status, job.dead_at) == ("done", None)
    assert s3.get_object(Bucket=BUCKET, Key=job.result_r2_key)["Body"].read() == draw("a cat")
    assert len(cloud.runpod.inputs()) == 1
    assert call(client, "GET", "/api/dead-letters")[1]["dead_letters"] == []


def test_a_job_that_is_no_dead_letter_is_not_redriven(client, bench):
    job_id = bench.create("a cat", simulate=FAILED)

    assert verb(client, "redrive", job_id) == (409, "not_dead")
    bench.round()
    assert verb(client, "redrive", job_id) == (409, "not_dead")


def test_nothing_left_is_410_and_stays_a_dead_letter(client, bench, no_r2):
    job_id = end_dead(bench)
    bench.clock.advance(600)

    assert verb(client, "redrive", job_id) == (410, "result_lost")
    letter = call(client, "GET", "/api/dead-letters")[1]["dead_letters"][0]
    assert (letter["id"], letter["left"], letter["left_until"]) == (job_id, "nothing", None)


def test_a_silent_runpod_is_no_proof_that_nothing_is_left(client, bench, no_r2, faults):
    job_id = end_dead(bench)
    faults.add(STATUS, (502, "<html>"))

    assert verb(client, "redrive", job_id) == (503, "runpod_bad_answer")
    assert bench.job(job_id).dead_at is not None


def test_many_are_redriven_at_once_and_only_once(client, bench, no_r2):
    dead = [bench.create("a cat"), bench.create("a dog")]
    for _ in range(29):
        bench.round(after=60)
    no_r2()

    def redrive(**wish):
        status, body, _ = call(client, "POST", "/api/dead-letters/redrive", wish)
        assert status == 200
        assert body["unknown"] == []
        return sorted(body["redriven"]), body["lost"]

    assert redrive(dry_run=True) == (sorted(dead), [])
    assert all(bench.job(job_id).dead_at for job_id in dead)
    assert redrive(error_code="result_lost") == ([], [])
    assert len(redrive(limit=1)[0]) == 1
    assert len(redrive(limit=50, error_code="r2_failed")[0]) == 1
    assert redrive() == ([], [])
    bench.round()
    assert [bench.job(job_id).status for job_id in dead] == ["done", "done"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"limit": 0}, "limit_invalid"),
        ({"limit": 101}, "limit_invalid"),
        ({"limit": True}, "limit_invalid"),
        ({"limit": "5"}, "limit_invalid"),
        ({"dry_run": "yes"}, "dry_run_invalid"),
        ({"error_code": 5}, "error_code_invalid"),
        ({"error_code": "r2' OR 1"}, "error_code_invalid"),
        ([], "body_not_object"),
    ],
)
def test_a_wrong_wish_is_refused(client, body, code):
    status, answer, _ = call(client, "POST", "/api/dead-letters/redrive", body)

    assert (status, answer["code"]) == (400, code)


def test_dead_letters_come_in_pages(client, bench, no_r2):
    dead = {bench.create(f"cat {n}") for n in range(3)}
    for _ in range(29):
        bench.round(after=60)

    first = call(client, "GET", "/api/dead-letters?limit=2")[1]
    second = call(client, "GET", f"/api/dead-letters?limit=2&cursor={first['next_cursor']}")[1]

    assert (len(first["dead_letters"]), len(second["dead_letters"]), second["next_cursor"]) == (2, 1, None)
    assert {letter["id"] for letter in first["dead_letters"] + second["dead_letters"]} == dead
    assert call(client, "GET", "/api/dead-letters?error_code=No")[1]["code"] == "error_code_invalid"


# The spool


@pytest.fixture
def spool(bench, s3):
    """The bucket where pictures wait, on moto's S3."""
    s3.create_bucket(Bucket="spool")
    spool = Spool("spool")
    spool._client = s3
    bench.service.results.spool = spool
    yield lambda: [entry["Key"] for entry in s3.list_objects_v2(Bucket="spool").get("Contents", [])]
    for entry in s3.list_objects_v2(Bucket="spool").get("Contents", []):
        s3.delete_object(Bucket="spool", Key=entry["Key"])
    s3.delete_bucket(Bucket="spool")


def test_a_picture_that_r2_does_not_take_waits_in_the_spool(client, bench, no_r2, spool, s3):
    job_id = bench.create("a cat")
    bench.round()

    job = bench.job(job_id)
    assert (job.state, job.files, len(job.spooled)) == (State.STORE, [], 1)
    assert spool() == [f"spool/jobs/2026/01/{job_id}/output.png"]
    view = call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]
    assert (view["outputs"], view["result_until"] > job.completed_at) == ([], True)

    for _ in range(70):  # over an hour: RunPod has forgotten it
        bench.round(after=60)
    assert bench.job(job_id).status == "running"
    no_r2()
    bench.round(after=700)

    job = bench.job(job_id)
    assert job.status == "done"
    assert s3.get_object(Bucket=BUCKET, Key=job.result_r2_key)["Body"].read() == draw("a cat")
    assert "spooled" not in job.outputs


def test_after_a_failure_r2_is_left_alone_for_a_while(bench, no_r2, spool, monkeypatch):
    asked = []
    fail = R2.put
    monkeypatch.setattr(R2, "put", lambda self, key, *a, **o: asked.append(key) or fail(self, key, *a, **o))
    jobs = [bench.create(f"cat {n}") for n in range(5)]

    bench.round()

    assert len(asked) == 1 or len(asked) < len(jobs)
    assert len(spool()) == len(jobs)


def test_what_the_spool_has_lost_is_a_dead_letter_after_a_day_and_then_gone(client, bench, no_r2, spool, s3):
    job_id = bench.create("a cat")
    bench.round()
    for key in spool():
        s3.delete_object(Bucket="spool", Key=key)

    bench.round(after=60)
    assert bench.job(job_id).status == "running"
    bench.round(after=86_400)

    job = bench.job(job_id)
    assert (job.status, job.error_code, job.dead_at is not None) == ("error", "spool_lost", True)
    assert verb(client, "redrive", job_id) == (410, "result_lost")


def test_a_damaged_file_in_the_spool_is_not_stored(bench, no_r2, spool, s3):
    job_id = bench.create("a cat")
    bench.round()
    s3.put_object(Bucket="spool", Key=spool()[0], Body=draw("a dog"))
    no_r2()

    bench.round(after=60)

    job = bench.job(job_id)
    assert (job.status, job.files) == ("running", [])
    assert bench.events(job_id)[-1]["code"] == "spool_damaged"


# RunPod's callbacks


def test_a_callback_finishes_the_job_at_once(client, bench, cloud):
    job_id = bench.create("a cat")
    path, run_id = webhook_of(cloud, job_id)
    bench.clock.advance(5)

    status, body, _ = call(client, "POST", path, {"id": run_id, "status": "COMPLETED"}, auth={})

    assert (status, body["message"]) == (200, "looked at")
    assert bench.job(job_id).status == "done"
    assert call(client, "POST", path, {"id": run_id}, auth={})[1]["message"] == "nothing to do"


def test_a_callback_looks_again_where_a_look_from_before_the_end_is_saved_meanwhile(client, bench, cloud, monkeypatch):
    job_id = bench.create("a cat")
    path, run_id = webhook_of(cloud, job_id)
    bench.clock.advance(2)
    seen, _ = bench.service.pipeline.steps.poll(bench.job(job_id), bench.deadline(), lease=60)
    bench.clock.advance(3)
    store, waiting = bench.service.store, [seen]
    get = store.get

    def get_then_lose(*args, **options):
        job = get(*args, **options)
        if waiting:
            store.save([waiting.pop()], nonce="of the round", now=bench.clock.now(), timeout=5.0)
        return job

    monkeypatch.setattr(store, "get", get_then_lose)
    call(client, "POST", path, {"id": run_id, "status": "COMPLETED"}, auth={})

    assert bench.job(job_id).status == "done"
    assert bench.timeline(job_id) == ["created", "submitted", "observed", "completed", "done"]


def test_a_callback_before_the_end_looks_once_and_has_the_next_round_look_again(client, bench, cloud):
    job_id = bench.create("a cat", simulate={"run_seconds": 4000})
    path, run_id = webhook_of(cloud, job_id)
    bench.round(after=600)
    bench.cloud.d1.execute("UPDATE jobs SET due_at = '2099-01-01T00:00:00.000Z'")
    before = cloud.calls["runpod"]

    call(client, "POST", path, {"id": run_id}, auth={})

    assert cloud.calls["runpod"] - before == 1
    assert bench.job(job_id).status == "running"
    assert bench.job(job_id).due_at == jobs.to_text(bench.clock.now() + timedelta(seconds=12))


def test_a_callback_adopts_the_run_whose_answer_was_lost(client, bench, cloud, faults):
    faults.add(RUN, requests.ReadTimeout(), after_effect=True)
    job_id = bench.create("a cat")
    path, run_id = webhook_of(cloud, job_id)
    bench.clock.advance(5)

    assert call(client, "POST", path, {"id": run_id, "status": "COMPLETED"}, auth={})[1]["message"] == "adopted"
    assert bench.job(job_id).status == "done"
    assert bench.timeline(job_id) == ["created", "submit_unknown", "submitted", "completed", "done"]


@pytest.mark.parametrize(
    ("change", "body", "status", "code"),
    [
        (lambda path: path[:-4] + "0000", b'{"id":"run-1"}', 403, "webhook_forbidden"),
        (lambda path: path.replace("/1/", "/2/"), b'{"id":"run-1"}', 403, "webhook_forbidden"),
        (lambda path: path.replace("/1/", "/01/"), b'{"id":"run-1"}', 403, "webhook_forbidden"),
        (lambda path: path.replace("/1/", "/x/"), b'{"id":"run-1"}', 403, "webhook_forbidden"),
        (lambda path: path, b"<html>", 400, "body_not_json"),
        (lambda path: path, b"[]", 400, "run_id_invalid"),
        (lambda path: path, b'{"id":"../x"}', 400, "run_id_invalid"),
        (lambda path: path, b'{"id":5}', 400, "run_id_invalid"),
        (lambda path: path, b"x" * (6 * 1024 * 1024 + 1), 413, "body_too_large"),
    ],
)
def test_a_callback_that_is_not_genuine_is_refused_before_any_call(client, bench, cloud, change, body, status, code):
    job_id = bench.create("a cat")
    path, _ = webhook_of(cloud, job_id)
    before = bench.job(job_id)
    answers = []

    calls = bench.d1_calls(lambda: answers.append(call(client, "POST", change(path), body, auth={})))

    assert (answers[0][0], answers[0][1]["code"], calls) == (status, code, 0)
    assert bench.job(job_id) == before


def test_a_callback_of_an_unknown_job_is_404(client, bench):
    url = bench.service.pipeline.webhooks.url("nobody", 1).removeprefix("https://api.example")

    assert call(client, "POST", url, {"id": "run-1"}, auth={})[0] == 404


def test_no_callback_is_taken_where_no_secret_is_set(client, bench, cloud, monkeypatch):
    job_id = bench.create("a cat")
    path, _ = webhook_of(cloud, job_id)
    unset = Webhooks("", "")
    monkeypatch.setattr(bench.service.pipeline, "webhooks", unset)

    assert unset.url(job_id, 1) is None
    assert call(client, "POST", path, {"id": "run-1"}, auth={})[0] == 403


def test_the_address_names_job_and_attempt_and_only_the_secret_makes_it(bench):
    one, other = Webhooks("https://a", "secret-of-the-tests"), Webhooks("https://a", "another-secret-of-them")

    assert one.url("a/b", 3).startswith("https://a/webhooks/runpod/a%2Fb/3/")
    assert one.url("j", 1) != other.url("j", 1)
    assert len({one.url("j", 1), one.url("j", 2), one.url("k", 1)}) == 3


# Deadlines


def test_runpod_is_told_the_deadlines_and_where_to_call(bench, cloud):
    bench.create()

    ((webhook, _, execution_timeout, ttl),) = runs(cloud)
    assert (execution_timeout, ttl) == (1_800_000, (3600 + 1800 + 600) * 1000)
    assert webhook.startswith("https://api.example/webhooks/runpod/")


def test_a_run_that_no_worker_takes_is_cancelled(client, bench, cloud):
    job_id = bench.create("a cat", simulate={"queue_seconds": 100_000})
    bench.round(after=3500)
    assert bench.job(job_id).status == "running"
    bench.round(after=200)

    job = bench.job(job_id)
    assert (job.status, job.error_code) == ("error", "start_deadline")
    assert cloud.runpod.find(job.runpod_job_id).cancelled_at is not None


def test_runpods_own_end_of_a_long_run_has_the_same_code(bench):
    job_id = bench.create("a cat", simulate={"run_seconds": 100_000})
    bench.round()
    bench.round(after=1790)

    job = bench.job(job_id)
    assert (job.status, job.error_code) == ("error", "run_deadline")
    assert bench.timeline(job_id)[-1] == "failed"


def test_nothing_in_an_answer_names_a_link_or_the_secret(client, bench, cloud, no_r2):
    job_id = bench.create("a cat", simulate={"shape": "link"})
    bench.round()
    bench.round(after=60)

    paths = ("/api/jobs", "/api/dead-letters", f"/api/jobs/{job_id}", f"/api/queue/status/{job_id}")
    texts = [json.dumps(call(client, "GET", path)[1]) for path in paths]
    assert cloud.d1.execute("SELECT links FROM jobs WHERE links LIKE '%/results/%'")
    assert not any("/results/" in text or "secret-of-the-tests" in text for text in texts)
