"""Every route, as a client sees it: Chalice's own test client over the local cloud."""

import base64
import hashlib
import json
import subprocess
import sys

import pytest
import requests
from chalice.local import LambdaContext

import app
from chalicelib import bootstrap
from chalicelib.errors import REQUEST_STATUS
from tests.conftest import BUCKET, KEY, R2_ENDPOINT, Bench, call
from tools import schedule

RUN = r"POST .*/run$"
D1 = r"POST .*/query$"


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def rows(cloud):
    return cloud.d1.execute("SELECT * FROM jobs")


# The answers that existing clients read


def test_create_answers_queued(client, cloud):
    status, body, _ = call(client, "POST", "/api/queue/create", {"prompt": "แมว"})

    assert status == 200
    assert body == {"ok": True, "id": body["id"], "status": "queued"}
    (row,) = rows(cloud)
    assert (row["id"], row["prompt"], row["model"], row["status"]) == (body["id"], "แมว", "qwen-image", "running")


def test_create_without_a_prompt(client, cloud):
    status, body, _ = call(client, "POST", "/api/queue/create", {})

    assert (status, body) == (400, {"ok": False, "error": "prompt is required", "code": "prompt_required"})


def test_a_create_of_unknown_fate_names_the_job_that_may_be_there(client, faults, cloud):
    faults.add(D1, requests.ReadTimeout(), times=3, after_effect=True)

    status, body, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})

    assert (status, body["code"]) == (503, "d1_timeout")
    assert "may have been made" in body["error"]
    assert call(client, "GET", f"/api/queue/status/{body['id']}")[1]["status"] == "queued"


def test_create_answers_queued_though_runpod_is_down(client, faults, cloud):
    faults.add(RUN, requests.ReadTimeout())

    status, body, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})

    assert (status, body["status"]) == (200, "queued")
    assert rows(cloud)[0]["step"] == "submitting"


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"]
)
def test_create_reads_json_whatever_it_is_called(client, content_type):
    status, _, _ = call(client, "POST", "/api/queue/create", {"prompt": "a"}, headers={"Content-Type": content_type})

    assert status == 200


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ({"prompt": "a", "model": "flux"}, {"prompt": "a", "model": "flux", "jobId": "ID"}),
        ({"prompt": "a", "model": None}, {"prompt": "a", "model": "qwen-image", "jobId": "ID"}),
        ({"input": {"steps": 3}}, {"steps": 3}),
        ({"prompt": "a", "input": {"steps": 3}}, {"steps": 3, "prompt": "a"}),
        ({"prompt": "a", "input": {"workflow": {"x": [1.5, None, True]}}}, {"workflow": {"x": [1.5, None, True]}}),
        ({"prompt": "a", "input": {}}, {"prompt": "a"}),
        ({"input": {"prompt": "its own"}}, {"prompt": "its own"}),
    ],
)  # fmt: skip
def test_what_runpod_gets(client, cloud, body, sent):
    _, answer, _ = call(client, "POST", "/api/queue/create", body)

    wanted = {name: answer["id"] if value == "ID" else value for name, value in sent.items()}
    assert cloud.runpod.inputs() == [wanted]
    assert rows(cloud)[0]["prompt"] == (body.get("prompt") or body["input"].get("prompt", ""))


@pytest.mark.parametrize("path", ["/api/queue/status?id={}", "/api/queue/status/{}"])
def test_status_is_flat(client, bench, path):
    job_id = bench.create("a cat")
    bench.round()

    status, body, _ = call(client, "GET", path.format(job_id))

    assert status == 200
    assert body["ok"] is True
    assert (body["id"], body["status"], body["error"]) == (job_id, "done", None)
    assert body["result_url"] == f"http://cloud.test:8001/cdn/jobs/2026/01/{job_id}/output.png"
    assert (body["prompt"], body["model"], body["attempt"]) == ("a cat", "qwen-image", 1)
    assert body["outputs"][0]["content_type"] == "image/png"
    assert body["urls_expire_at"] is None


@pytest.fixture
def private(client, environment, monkeypatch):
    """The service with a bucket that has no public address."""
    monkeypatch.setenv("R2_PUBLIC_BASE_URL", "")
    bootstrap.service.cache_clear()


def test_a_private_bucket_has_links_made_for_each_answer_and_says_until_when(private, client, cloud, clock, faults, s3):
    bench = Bench(bootstrap.service(), cloud, clock, faults, s3)
    job_id = bench.create("a cat")
    bench.clock.advance(15)
    updated = call(client, "POST", "/dev/runpod-poll")[1]["updated"]

    answers = [
        call(client, "GET", f"/api/jobs/{job_id}")[1]["job"],
        call(client, "GET", f"/api/queue/status?id={job_id}")[1],
        call(client, "GET", "/api/jobs")[1]["jobs"][0],
    ]

    for view in answers:
        assert view["result_url"].startswith(f"{R2_ENDPOINT}/{BUCKET}/jobs/2026/01/{job_id}/output.png?X-Amz-")
        assert view["outputs"][0]["url"].startswith(f"{R2_ENDPOINT}/{BUCKET}/jobs/2026/01/{job_id}/output.png?X-Amz-")
        assert "X-Amz-Expires=3600" in view["result_url"]
        assert view["urls_expire_at"] == "2026-02-01T00:59:15.000Z"
    assert updated[0]["result_url"].startswith(R2_ENDPOINT)
    (row,) = rows(cloud)
    assert (row["result_url"], json.loads(row["outputs"])[0]["url"]) == (None, None)
    assert "X-Amz" not in json.dumps(cloud.d1.execute("SELECT * FROM job_events"))


def test_a_job_that_is_not_done_has_no_link_that_expires(private, client, cloud, clock, faults, s3):
    job_id = Bench(bootstrap.service(), cloud, clock, faults, s3).create("a cat")

    view = call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]

    assert (view["result_url"], view["outputs"], view["urls_expire_at"]) == (None, [], None)


def test_a_link_that_was_stored_lasts_though_the_bucket_is_private_now(private, client, cloud):
    cloud.d1.execute(
        "INSERT INTO jobs (id, status, result_r2_key, result_url, created_at) "
        "VALUES ('old', 'done', 'jobs/2025/01/old/output.png', 'https://cdn.example/old.png', '2025-01-01')"
    )

    view = call(client, "GET", "/api/jobs/old")[1]["job"]

    assert (view["result_url"], view["urls_expire_at"]) == ("https://cdn.example/old.png", None)


def test_what_was_stored_in_a_private_bucket_has_its_lasting_link_once_it_is_public(client, bench, cloud):
    job_id = bench.create("a cat")
    bench.round()
    cloud.d1.execute("UPDATE jobs SET result_url = NULL, outputs = json_set(outputs, '$[0].url', NULL)")

    view = call(client, "GET", f"/api/jobs/{job_id}")[1]["job"]

    assert view["result_url"] == f"http://cloud.test:8001/cdn/jobs/2026/01/{job_id}/output.png"
    assert (view["outputs"][0]["url"], view["urls_expire_at"]) == (view["result_url"], None)


def test_status_decodes_the_id_in_the_path(client, bench):
    bench.cloud.d1.execute("INSERT INTO jobs (id, prompt, created_at) VALUES ('an old/id', 'x', 'y')")

    assert call(client, "GET", "/api/queue/status/an%20old%2Fid")[1]["id"] == "an old/id"


def test_dev_runpod_sends_the_oldest_waiting_job(client, bench, monkeypatch):
    assert call(client, "POST", "/dev/runpod")[:2] == (200, {"ok": True, "message": "no queued job"})
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    first = bench.create("first")
    bench.clock.advance(1)
    bench.create("second")

    status, body, _ = call(client, "POST", "/dev/runpod", {})

    run_id = bench.job(first).runpod_job_id
    assert (status, body) == (200, {"ok": True, "job_id": first, "runpod": {"id": run_id, "status": "IN_QUEUE"}})


def test_dev_runpod_tells_of_a_job_that_was_sent(client, bench):
    job_id = bench.create()

    status, body, _ = call(client, "POST", "/dev/runpod", {"jobId": job_id})

    assert status == 200
    assert body["runpod"] == {"id": bench.job(job_id).runpod_job_id, "status": "IN_QUEUE"}
    assert len(bench.cloud.runpod.inputs()) == 1


def test_dev_runpod_has_no_id_while_the_answer_is_out(client, bench):
    bench.faults.add(RUN, requests.ReadTimeout())
    job_id = bench.create()

    assert call(client, "POST", "/dev/runpod", {"jobId": job_id})[1]["runpod"] == {"id": None, "status": None}


def test_dev_runpod_of_a_final_and_of_an_unknown_job(client, bench):
    job_id = bench.create()
    bench.round()

    assert call(client, "POST", "/dev/runpod", {"jobId": job_id})[:2] == (
        400,
        {"ok": False, "error": "This job is done already; it is not sent again.", "code": "job_final"},
    )
    assert call(client, "POST", "/dev/runpod", {"jobId": "nobody"})[0] == 404


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ((422, {"detail": "no"}), 502, "runpod_refused"),
        ((401, ""), 503, "runpod_unauthorized"),
        ((429, "", {"Retry-After": "30"}), 503, "runpod_busy"),
        ((502, "<html>"), 503, "runpod_bad_answer"),
        (requests.ReadTimeout(), 503, "runpod_timeout"),
        (requests.ConnectTimeout(), 503, "runpod_unreachable"),
    ],
)
def test_dev_runpod_tells_of_runpods_refusal_or_silence(client, bench, monkeypatch, answer, status, code):
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    job_id = bench.create()
    bench.faults.add(RUN, answer)

    got, body, headers = call(client, "POST", "/dev/runpod", {"jobId": job_id})

    assert (got, body["ok"], body["code"]) == (status, False, code)
    assert ("Retry-After" in headers) == (code == "runpod_busy")


def test_dev_runpod_poll_is_one_whole_round_that_ignores_due_times(client, bench, monkeypatch):
    running = bench.create("runs")
    failing = bench.create("fails", simulate={"status": "FAILED", "error": "boom"})
    bench.round(after=0.5)
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 50)
    waiting = bench.create("waits")
    bench.clock.advance(4.5)  # the polls are not due again yet

    status, body, _ = call(client, "POST", "/dev/runpod-poll")

    assert status == 200
    assert body["checked"] == 2
    done = bench.job(running)
    assert sorted(body["updated"], key=lambda job: job["status"]) == [
        {"id": running, "status": "done", "result_url": done.result_url, "r2_key": done.result_r2_key},
        {"id": failing, "status": "error", "error": "RunPod's worker failed: boom"},
    ]
    assert bench.job(waiting).runpod_job_id is not None


# The other routes


def test_health_is_open_and_calls_nobody(client, cloud, monkeypatch):
    monkeypatch.delenv("D1_DATABASE_ID")
    calls = cloud.calls["d1"]

    status, body, _ = call(client, "GET", "/health", auth={})

    assert (status, body) == (200, {"ok": True, "service": "ob-ai-studio"})
    assert cloud.calls["d1"] == calls


def test_the_list_pages_through_everything_newest_first(client, bench):
    ids = []
    for n in range(5):
        ids.append(bench.create(f"cat {n}"))
        bench.clock.advance(1)

    seen, cursor = [], ""
    while cursor is not None:
        query = f"&cursor={cursor}" if cursor else ""
        _, body, _ = call(client, "GET", f"/api/jobs?limit=2{query}")
        seen += [job["id"] for job in body["jobs"]]
        cursor = body["next_cursor"]

    assert seen == ids[::-1]


def test_the_list_of_one_status(client, bench):
    done = bench.create("a")
    bench.round()
    bench.create("b")

    _, body, _ = call(client, "GET", "/api/jobs?status=done")

    assert [job["id"] for job in body["jobs"]] == [done]
    assert body["next_cursor"] is None


def test_one_job_with_its_timeline(client, bench):
    job_id = bench.create("a")
    bench.round()

    status, body, _ = call(client, "GET", f"/api/jobs/{job_id}")

    assert status == 200
    assert body["job"]["status"] == "done"
    assert [line["event"] for line in body["job"]["timeline"]] == ["created", "submitted", "completed", "done"]
    assert body["job"]["timeline"][0]["at"] == "2026-01-31T23:59:00.000Z"


# Bad input: 4xx, our shape, nothing written

DEEP = "[" * 100_000
BAD_CREATES = [
    (b"", "body_not_json"),
    (b"   ", "body_not_json"),
    (b"{", "body_not_json"),
    (b"prompt=a", "body_not_json"),
    (b"\xff\xfe{}", "body_not_json"),
    ('{"prompt": "a"}'.encode("utf-16"), "body_not_json"),
    (b'{"prompt": NaN}', "body_not_json"),
    (b'{"prompt": "a", "input": {"x": Infinity}}', "body_not_json"),
    (b'{"prompt": "a", "input": {"x": 1e999}}', "body_not_json"),
    (b'{"prompt": "half \\ud83d"}', "body_not_json"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "body_not_json"),
    (DEEP.encode(), "body_not_json"),
    (b"[]", "body_not_object"),
    (b'"a cat"', "body_not_object"),
    (b"null", "body_not_object"),
    (b"7", "body_not_object"),
    ({}, "prompt_required"),
    ({"prompt": ""}, "prompt_required"),
    ({"prompt": " \n\t "}, "prompt_required"),
    ({"prompt": None}, "prompt_required"),
    ({"prompt": 7}, "prompt_invalid"),
    ({"prompt": ["a"]}, "prompt_invalid"),
    ({"prompt": {"a": 1}}, "prompt_invalid"),
    ({"prompt": True}, "prompt_invalid"),
    ({"prompt": "", "input": {"a": 1}}, "prompt_required"),
    ({"prompt": 7, "input": {"a": 1}}, "prompt_invalid"),
    ({"prompt": "nul\0"}, "prompt_invalid"),
    ({"prompt": "ก" * 10_001}, "prompt_too_long"),
    ({"prompt": "a", "input": []}, "input_invalid"),
    ({"prompt": "a", "input": "x"}, "input_invalid"),
    ({"input": 7}, "input_invalid"),
    ({"input": {}}, "input_invalid"),
    ({"prompt": "a", "model": 7}, "model_invalid"),
    ({"prompt": "a", "model": ""}, "model_invalid"),
    ({"prompt": "a", "model": " "}, "model_invalid"),
    ({"prompt": "a", "model": ["x"]}, "model_invalid"),
    ({"prompt": "a", "model": "x" * 201}, "model_invalid"),
    ({"prompt": "a", "model": "x\0"}, "model_invalid"),
    (b'{"prompt": "' + b"a" * 524_288 + b'"}', "body_too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code"), BAD_CREATES)
def test_a_bad_create_writes_nothing(client, cloud, body, code):
    calls = cloud.calls["d1"]

    status, answer, _ = call(client, "POST", "/api/queue/create", body)

    assert (status, answer["ok"], answer["code"]) == (REQUEST_STATUS[code], False, code)
    assert answer["error"]
    assert cloud.calls["d1"] == calls
    assert cloud.runpod.inputs() == []


def test_the_longest_prompt_and_the_largest_body_are_taken(client, cloud):
    assert call(client, "POST", "/api/queue/create", {"prompt": "ก" * 10_000})[0] == 200
    filler = "x" * (512 * 1024 - len('{"input": {"x": ""}}'))
    assert call(client, "POST", "/api/queue/create", '{"input": {"x": "' + filler + '"}}')[0] == 200
    assert len(cloud.runpod.inputs()) == 2


def test_an_input_that_grows_over_d1s_limit_is_refused_as_too_large(client, cloud):
    quotes = ",".join(['""'] * 170_000)

    status, answer, _ = call(client, "POST", "/api/queue/create", f'{{"input": {{"x": [{quotes}]}}}}')

    assert (status, answer["code"]) == (413, "body_too_large")
    assert cloud.runpod.inputs() == []


def test_a_bad_create_to_the_other_writing_route(client):
    for body, code in [
        ({"jobId": 7}, "job_id_invalid"), ({"jobId": ""}, "job_id_invalid"), ({"jobId": []}, "job_id_invalid"),
        ({"jobid": "x"}, "job_id_invalid"), ({"jobId": None}, "job_id_invalid"),
        (b"{", "body_not_json"), (b"[]", "body_not_object"), ({"jobId": "x" * 300}, "job_not_found"),
    ]:  # fmt: skip
        status, answer, _ = call(client, "POST", "/dev/runpod", body)
        assert (status, answer["code"]) == (REQUEST_STATUS[code], code)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/queue/status", "id_required"),
        ("/api/queue/status?id=", "id_required"),
        ("/api/queue/status?id=%20", "id_required"),
        ("/api/queue/status?id=nobody", "job_not_found"),
        ("/api/queue/status/%20", "id_required"),
        ("/api/queue/status/nobody", "job_not_found"),
        ("/api/queue/status/%27%20OR%201=1", "job_not_found"),
        ("/api/jobs/nobody", "job_not_found"),
        ("/api/jobs/" + "x" * 500, "job_not_found"),
        ("/api/jobs?limit=0", "limit_invalid"),
        ("/api/jobs?limit=101", "limit_invalid"),
        ("/api/jobs?limit=-1", "limit_invalid"),
        ("/api/jobs?limit=ten", "limit_invalid"),
        ("/api/jobs?limit=1.5", "limit_invalid"),
        ("/api/jobs?limit=%E0%B9%95", "limit_invalid"),
        ("/api/jobs?limit=", "limit_invalid"),
        ("/api/jobs?limit=" + "9" * 5000, "limit_invalid"),
        ("/api/jobs?status=finished", "status_invalid"),
        ("/api/jobs?status=", "status_invalid"),
        ("/api/jobs?cursor=", "cursor_invalid"),
        ("/api/jobs?cursor=%%%", "cursor_invalid"),
        ("/api/jobs?cursor=abc", "cursor_invalid"),
        ("/api/jobs?cursor=" + base64.urlsafe_b64encode(b"[1,2]").decode(), "cursor_invalid"),
        ("/api/jobs?cursor=" + base64.urlsafe_b64encode(b'["a"]').decode(), "cursor_invalid"),
        ("/api/jobs?cursor=" + base64.urlsafe_b64encode(b'{"a":1,"b":2}').decode(), "cursor_invalid"),
        ("/api/jobs?cursor=" + base64.urlsafe_b64encode(b'["\\ud83d","b"]').decode(), "cursor_invalid"),
    ],
)
def test_a_bad_question_is_told_what_is_wrong(client, path, code):
    status, answer, _ = call(client, "GET", path)

    assert (status, answer["ok"], answer["code"]) == (REQUEST_STATUS[code], False, code)


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", "/api/queue/create"), ("GET", "/api/queue/create"), ("POST", "/api/jobs"), ("GET", "/dev/runpod")],
)
def test_a_wrong_method_has_our_shape(client, method, path):
    status, answer, headers = call(client, method, path)

    assert (status, answer["ok"], answer["code"]) == (405, False, "method_not_allowed")
    assert headers["Allow"]
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_a_wrong_content_type_has_our_shape(client):
    status, answer, headers = call(client, "POST", "/api/queue/create", b"<x/>", headers={"Content-Type": "text/xml"})

    assert (status, answer["ok"], answer["code"]) == (415, False, "unsupported_media_type")
    assert headers["Access-Control-Allow-Origin"] == "*"


# Keys

GUARDED = [
    ("POST", "/api/queue/create"), ("GET", "/api/queue/status?id=x"), ("GET", "/api/queue/status/x"),
    ("GET", "/api/jobs"), ("GET", "/api/jobs/x"), ("POST", "/dev/runpod"), ("POST", "/dev/runpod-poll"),
    ("POST", "/api/jobs/x/cancel"), ("POST", "/api/jobs/x/retry"), ("POST", "/api/jobs/x/redrive"),
    ("GET", "/api/dead-letters"), ("POST", "/api/dead-letters/redrive"),
    ("DELETE", "/api/jobs/x"), ("POST", "/api/jobs/bulk"),
]  # fmt: skip


def test_the_monitors_health_wants_a_key(client):
    assert call(client, "GET", "/api/health", auth={})[0] == 401
    assert call(client, "GET", "/api/health")[:2] == (200, {"ok": True, "service": "ob-ai-studio"})
    assert call(client, "GET", "/api/health?deep=0")[0] == 200


@pytest.mark.parametrize("deep", ["yes", "true", "2", ""])
def test_deep_is_0_or_1(client, deep):
    status, body, _ = call(client, "GET", f"/api/health?deep={deep}")

    assert (status, body["code"]) == (400, "flag_invalid")


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "auth",
    [
        {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY} x"}, {"Authorization": "Bearer ก"}, {"X-Api-Key": KEY},
    ],
)  # fmt: skip
def test_without_an_accepted_key_nothing_is_done(client, cloud, method, path, auth):
    calls = cloud.calls["d1"]

    status, answer, headers = call(client, method, path, {"prompt": "a"} if method == "POST" else None, auth=auth)

    assert (status, answer["code"]) == (401, "unauthorized")
    assert headers["WWW-Authenticate"] == "Bearer"
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert cloud.calls["d1"] == calls


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_configured_keys_everything_is_refused(client, monkeypatch, method, path):
    monkeypatch.delenv("API_KEY_HASHES")
    bootstrap.service.cache_clear()

    status, answer, _ = call(client, method, path)

    assert (status, answer["code"]) == (401, "keys_not_configured")
    assert "API_KEY_HASHES" in answer["error"]


def test_several_keys_are_accepted_and_the_scheme_is_case_insensitive(client, monkeypatch, environment):
    monkeypatch.setenv("API_KEY_HASHES", "0" * 64 + ", " + environment["API_KEY_HASHES"].upper())
    bootstrap.service.cache_clear()

    assert call(client, "GET", "/api/jobs", auth={"authorization": f"bearer {KEY}"})[0] == 200


def test_the_hash_of_nothing_lets_nobody_in(client, monkeypatch):
    monkeypatch.setenv("API_KEY_HASHES", hashlib.sha256(b"").hexdigest())
    bootstrap.service.cache_clear()

    assert call(client, "GET", "/api/jobs", auth={"Authorization": "Bearer "})[0] == 401


def test_anonymous_callers_may_create_and_ask_only_while_it_is_allowed(client, monkeypatch):
    monkeypatch.setenv("ALLOW_ANONYMOUS", "true")
    bootstrap.service.cache_clear()

    answers = {(method, path): call(client, method, path, auth={})[0] for method, path in GUARDED}

    open_routes = {route for route, status in answers.items() if status != 401}
    assert open_routes == set(GUARDED[:3])


# Upstream failures while serving a request


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ((504, "<!DOCTYPE html>"), 503, "d1_bad_answer"),
        ((429, {"errors": [{"code": 971}]}, {"Retry-After": "300"}), 503, "d1_rate_limited"),
        ((401, {"errors": [{"code": 10000, "message": "Authentication error"}]}), 502, "d1_unauthorized"),
        ((400, {"errors": [{"code": 7500, "message": "no such table: jobs: SQLITE_ERROR"}]}), 502, "d1_schema"),
        (requests.ConnectTimeout(), 503, "d1_unreachable"),
        (requests.ReadTimeout(), 503, "d1_timeout"),
    ],
)
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_d1_that_fails_is_a_503_or_502_with_a_code(client, faults, clock, method, path, answer, status, code):
    faults.add(D1, answer, times=99)
    start = clock.elapsed

    bodies = {"/api/queue/create": {"prompt": "a"}, "/api/jobs/bulk": {"do": "cancel", "filter": {"q": "a"}}}
    got, body, headers = call(client, method, path, bodies.get(path))

    assert (got, body["ok"], body["code"]) == (status, False, code)
    assert headers.get("Retry-After") == ("300" if code == "d1_rate_limited" else None)
    assert clock.elapsed - start < 25
    assert "Traceback" not in json.dumps(body)


def test_a_missing_setting_is_one_sentence_and_mended_without_a_restart(client, monkeypatch):
    monkeypatch.delenv("R2_SECRET_ACCESS_KEY")
    bootstrap.service.cache_clear()

    status, body, _ = call(client, "GET", "/api/jobs")
    assert (status, body["code"]) == (500, "setting_missing")
    assert "R2_SECRET_ACCESS_KEY" in body["error"]

    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "local-secret-key")
    assert call(client, "GET", "/api/jobs")[0] == 200


def test_a_bug_is_a_500_without_a_word_of_it(client, monkeypatch):
    monkeypatch.setattr(type(bootstrap.service().reads), "page", lambda *_, **__: 1 / 0)

    status, body, headers = call(client, "GET", "/api/jobs")

    assert (status, body["code"]) == (500, "internal_error")
    assert "division" not in json.dumps(body)
    assert headers["Access-Control-Allow-Origin"] == "*"


# The schedule


def test_the_schedule_runs_four_rounds_through_the_lambdas_own_handler(client, bench):
    job_id = bench.create()

    answer = app.poll_jobs(schedule.event(), LambdaContext("poll_jobs", 512, max_runtime_ms=58_000))

    assert answer == {"rounds": 4, "checked": 2, "submitted": 0, "updated": 1}
    assert bench.clock.slept == pytest.approx([15, 15, 15])
    assert bench.job(job_id).status == "done"


def test_the_schedule_is_named_and_timed_as_deployed(request):
    config = json.loads((request.config.rootpath / ".chalice" / "config.json").read_text())

    (source,) = app.app.event_sources
    assert (source.name, source.handler_string) == ("poll_jobs", "app.poll_jobs")
    assert source.schedule_expression.to_string() == "rate(1 minute)"
    assert config["app_name"] == "ob-ai-studio"
    seconds = config["lambda_functions"]["poll_jobs"]["lambda_timeout"]
    assert seconds * 1000 == schedule.TIMEOUT_MS == 58_000


def test_importing_the_app_needs_no_settings_and_loads_nothing_heavy():
    code = "import sys, app; print([name for name in ('boto3', 'botocore', 'PIL', 'dotenv') if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={}, timeout=60, check=True)

    assert found.stdout == "[]\n"


# What RunPod is given


def test_a_job_is_answered_with_what_runpod_is_given_where_that_is_wanted(client):
    own = {"workflow": {"3": {"inputs": {"seed": 7}}}}
    _, made, _ = call(client, "POST", "/api/queue/create", {"prompt": "a cat"})
    _, with_own, _ = call(client, "POST", "/api/queue/create", {"input": own})

    _, plain, _ = call(client, "GET", f"/api/jobs/{made['id']}")
    _, usual, _ = call(client, "GET", f"/api/jobs/{made['id']}?include=input")
    _, given, _ = call(client, "GET", f"/api/jobs/{with_own['id']}?include=input")

    assert "input" not in plain["job"]
    assert usual["job"]["input"] == {"prompt": "a cat", "model": "qwen-image", "jobId": made["id"]}
    assert given["job"]["input"] == own


def test_nothing_else_is_included(client):
    status, body, _ = call(client, "GET", "/api/jobs/x?include=counts")

    assert (status, body["code"]) == (400, "include_invalid")
