"""Keys with names and rights, and the request's id that the answer and the logs have."""

import json
import subprocess
import sys

import pytest

import app
from chalicelib import auth, bootstrap, settings
from chalicelib.auth import ApiKey, Right
from chalicelib.errors import RequestError, SettingError
from tests.conftest import KEY, KEY_HASH, Bench, call
from tools import keys

NAMED = {right: keys.new(f"the-{right.word}-key", right) for right in Right}

# What each route wants; a new one cannot be forgotten.
RIGHTS = {
    ("GET", "/"): None,
    ("GET", "/ui/{name}"): None,
    ("GET", "/health"): None,
    ("GET", "/openapi.json"): None,
    ("POST", "/webhooks/runpod/{job_id}/{attempt}/{token}"): None,
    ("GET", "/api/health"): Right.READ,
    ("GET", "/api/models"): Right.READ,
    ("POST", "/api/uploads"): Right.WRITE,
    ("POST", "/api/queue/create"): Right.WRITE,
    ("GET", "/api/queue/status"): Right.READ,
    ("GET", "/api/queue/status/{job_id}"): Right.READ,
    ("GET", "/api/jobs"): Right.READ,
    ("POST", "/api/jobs/bulk"): Right.ADMIN,
    ("GET", "/api/jobs/{job_id}"): Right.READ,
    ("DELETE", "/api/jobs/{job_id}"): Right.WRITE,
    ("POST", "/api/jobs/{job_id}/cancel"): Right.WRITE,
    ("POST", "/api/jobs/{job_id}/retry"): Right.WRITE,
    ("POST", "/api/jobs/{job_id}/redrive"): Right.WRITE,
    ("GET", "/api/jobs/{job_id}/deliveries"): Right.READ,
    ("POST", "/api/jobs/{job_id}/deliveries/{n}/replay"): Right.WRITE,
    ("GET", "/api/stats"): Right.READ,
    ("GET", "/api/dead-letters"): Right.READ,
    ("POST", "/api/dead-letters/redrive"): Right.ADMIN,
    ("POST", "/dev/runpod"): Right.ADMIN,
    ("POST", "/dev/runpod-poll"): Right.ADMIN,
}
OPEN_AT_TIMES = [
    ("POST", "/api/queue/create"), ("GET", "/api/queue/status"), ("GET", "/api/queue/status/{job_id}"),
]  # fmt: skip


@pytest.fixture
def environment(environment):
    return {**environment, "API_KEY_HASHES": ",".join([KEY_HASH, *(entry.entry for _, entry in NAMED.values())])}


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def ask(client, method, path, auth):
    path = path.replace("{job_id}", "x").replace("{attempt}", "1").replace("{token}", "t").replace("{n}", "1")
    return call(client, method, f"{path}?id=x" if path.endswith("/status") else path, {"prompt": "a"}, auth=auth)


def routes():
    return {(method, path) for path, methods in app.app.routes.items() for method in methods}


def test_every_route_has_its_right():
    assert {route for route in RIGHTS if route in routes()} == routes()


@pytest.mark.parametrize("right", Right)
@pytest.mark.parametrize(("method", "path"), [route for route, wanted in RIGHTS.items() if wanted])
def test_a_key_opens_what_its_right_says_and_nothing_else(client, cloud, method, path, right):
    calls = cloud.calls["d1"]

    status, body, _ = ask(client, method, path, bearer(NAMED[right][0]))

    wanted = RIGHTS[method, path]
    assert (status == 403) == (right < wanted), body
    if status == 403:
        assert body["code"] == "forbidden"
        assert (
            body["error"]
            == f"The key the-{right.word}-key has the right {right.word}; this needs the right {wanted.word}."
        )
        assert cloud.calls["d1"] == calls


@pytest.mark.parametrize(("method", "path"), [route for route, wanted in RIGHTS.items() if wanted])
def test_without_a_key_it_stays_shut(client, cloud, method, path):
    calls = cloud.calls["d1"]

    status, body, headers = ask(client, method, path, {})

    assert (status, body["code"], headers["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
    assert cloud.calls["d1"] == calls


def test_a_bare_hash_may_do_all(client):
    assert call(client, "POST", "/dev/runpod")[0] == 200


@pytest.mark.parametrize(("method", "path"), OPEN_AT_TIMES)
def test_while_all_may_call_no_key_keeps_anybody_out(client, monkeypatch, method, path):
    monkeypatch.setenv("ALLOW_ANONYMOUS", "true")
    bootstrap.service.cache_clear()

    for headers in ({}, bearer("wrong"), bearer(NAMED[Right.READ][0])):
        assert ask(client, method, path, headers)[0] in (200, 404)


@pytest.mark.parametrize(
    ("allow", "headers", "name"),
    [
        ("false", bearer(KEY), f"key-{KEY_HASH[:8]}"),
        ("false", bearer(NAMED[Right.WRITE][0]), "the-write-key"),
        ("true", bearer(NAMED[Right.READ][0]), "the-read-key"),
        ("true", bearer("wrong"), "anonymous"),
        ("true", {}, "anonymous"),
    ],
)
def test_the_timeline_has_the_name_of_whoever_made_the_job(client, monkeypatch, cloud, allow, headers, name):
    monkeypatch.setenv("ALLOW_ANONYMOUS", allow)
    bootstrap.service.cache_clear()

    call(client, "POST", "/api/queue/create", {"prompt": "a"}, auth=headers)

    (line,) = cloud.d1.execute("SELECT detail FROM job_events WHERE event = 'created'")
    assert json.loads(line["detail"])["by"] == name


def test_the_timeline_has_the_name_of_whoever_acted(client, bench):
    admin = bearer(NAMED[Right.ADMIN][0])
    job_id = bench.create(simulate={"run_seconds": 1, "status": "FAILED", "error": "out of memory"})
    bench.round()

    call(client, "POST", f"/api/jobs/{job_id}/retry", auth=admin)
    call(client, "POST", f"/api/jobs/{job_id}/cancel", auth=bearer(NAMED[Right.WRITE][0]))

    said = {line["event"]: line.get("by") for line in bench.events(job_id)}
    assert (said["retried"], said["cancelled"]) == ("the-admin-key", "the-write-key")
    call(client, "DELETE", f"/api/jobs/{job_id}", auth=admin)
    assert "by the-admin-key" in call(client, "GET", f"/api/jobs/{job_id}")[1]["error"]


# The entries


def test_entries_are_read():
    entries = f" web:{'A' * 64}:read ,{'b' * 64},, ops.1_x-y:{'c' * 64}:admin"

    assert auth.read_entries(entries) == (
        ApiKey(name="web", hash="a" * 64, right=Right.READ),
        ApiKey(name="key-bbbbbbbb", hash="b" * 64, right=Right.ADMIN),
        ApiKey(name="ops.1_x-y", hash="c" * 64, right=Right.ADMIN),
    )


def test_two_keys_may_have_one_name():
    assert len(auth.read_entries(f"web:{'a' * 64}:read,web:{'b' * 64}:read")) == 2


def test_a_hash_that_stands_twice_with_one_right_is_one_key_with_its_first_name():
    assert [key.name for key in auth.read_entries(f"{'a' * 64},local:{'A' * 64}:admin,{'a' * 64}")] == ["key-aaaaaaaa"]


@pytest.mark.parametrize(
    "entry",
    [
        "the-secret-key-itself", "a" * 63, "a" * 65, "g" * 64, f"web:{'a' * 64}", f"{'a' * 64}:read",
        f":{'a' * 64}:read",
        f"web:{'a' * 64}:", f"web:{'a' * 64}:root", f"web:{'a' * 64}:read:write", f"a b:{'a' * 64}:read",
        f"{'n' * 41}:{'a' * 64}:read", f"ชื่อ:{'a' * 64}:read", f"web:{'a' * 64}:READ", f"{'a' * 64} {'b' * 64}",
        f"web:{'a' * 64}:read,web:{'a' * 64}:write", f"web:{'a' * 64}:read,{'A' * 64}",
    ],
)  # fmt: skip
def test_an_entry_that_is_none_is_refused_without_its_value(environment, entry):
    with pytest.raises(SettingError, match="Setting API_KEY_HASHES is malformed") as caught:
        settings.load({**environment, "API_KEY_HASHES": entry})

    assert "a" * 32 not in caught.value.sentence
    assert "itself" not in caught.value.sentence


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic x", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer é"]
)
def test_a_header_without_an_accepted_key(header):
    entries = (ApiKey(name="me", hash=KEY_HASH, right=Right.ADMIN),)

    assert auth.identify(header, entries) is None
    with pytest.raises(RequestError, match="This needs an API key"):
        auth.require_key(header, entries)


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer  {KEY} ", f" BEARER {KEY}"])
def test_a_header_with_an_accepted_key(header):
    entries = auth.read_entries(f"other:{'0' * 64}:read,me:{KEY_HASH}:read")

    assert auth.require_key(header, entries).name == "me"


def test_every_hash_is_compared_though_the_first_is_that_of_the_key(monkeypatch):
    entries = auth.read_entries(",".join([KEY_HASH, *(entry.entry for _, entry in NAMED.values())]))
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda one, other: compared.append(other) or one == other)

    auth.identify(f"Bearer {KEY}", entries)

    assert compared == [entry.hash for entry in entries]


def run_command(*arguments):
    return subprocess.run([sys.executable, "-m", "tools.keys", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "right"), [([], "write"), (["--rights", "read"], "read"), (["--rights", "admin"], "admin")]
)
def test_the_command_makes_a_key_whose_entry_is_accepted(arguments, right):
    first, second = run_command("new", "web-shop", *arguments), run_command("new", "web-shop", *arguments)

    assert first.returncode == 0
    made = dict(line.split(maxsplit=1) for line in first.stdout.splitlines()[:2])
    (accepted,) = auth.read_entries(made["entry"])
    assert (accepted.name, accepted.right.word) == ("web-shop", right)
    assert auth.identify(f"Bearer {made['key']}", [accepted]) == accepted
    assert first.stdout != second.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["new"], ["new", "a b"], ["new", "a,b"], ["new", "x", "--rights", "root"], ["list"]]
)
def test_the_command_refuses_what_would_be_no_entry(arguments):
    refused = run_command(*arguments)

    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr


# The request's id


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/health", {}, 200),
        ("GET", "/api/jobs", {}, 200),
        ("GET", "/api/jobs/nobody", {}, 404),
        ("GET", "/api/jobs?limit=x", {}, 400),
        ("GET", "/api/jobs", {"Authorization": "Bearer wrong"}, 401),
        ("PUT", "/api/jobs", {}, 405),
        ("POST", "/api/queue/create", {"Content-Type": "text/xml"}, 415),
        ("POST", "/webhooks/runpod/x/1/secret-token", {}, 403),
    ],
)
def test_the_answer_and_the_log_have_the_same_id(client, lines, method, path, headers, status):
    got, _, answered = call(client, method, path, headers=headers)

    assert got == status
    (line,) = [line for line in lines() if line["message"] == "request"]
    assert line["request_id"] == answered["X-Request-Id"]
    assert len(line["request_id"]) == 36
    assert (line["method"], line["status"]) == (method, status)
    assert "secret-token" not in json.dumps(lines())
    assert "limit" not in line["route"]


def test_an_error_of_ours_has_it_too(client, lines, monkeypatch):
    monkeypatch.setattr(type(bootstrap.service().reads), "page", lambda *_, **__: 1 / 0)

    status, _, headers = call(client, "GET", "/api/jobs")

    assert status == 500
    assert {line["request_id"] for line in lines()} == {headers["X-Request-Id"]}
    assert [line["message"] for line in lines()] == ["request_crashed", "request_failed", "request"]


def test_every_line_of_a_request_has_its_id_and_caller_those_of_threads_too(client, lines):
    _, _, headers = call(client, "POST", "/api/queue/create", {"jobs": [{"prompt": "a"}, {"prompt": "b"}]})
    _, _, other = call(client, "POST", "/dev/runpod-poll")

    said = [line for line in lines() if line["request_id"] == headers["X-Request-Id"]]
    assert [line["message"] for line in said] == ["created", "created", "submitted", "submitted", "request"]
    assert {line["caller"] for line in said} == {f"key-{KEY_HASH[:8]}"}
    assert other["X-Request-Id"] != headers["X-Request-Id"]


def test_a_thread_of_the_crew_has_the_request_of_whoever_started_it(client, lines, bench, faults):
    faults.add(r"GET .*/status/", (500, "no"), times=9)
    bench.create()
    bench.clock.advance(15)

    _, _, headers = call(client, "POST", "/dev/runpod-poll")

    (line,) = [line for line in lines() if line["message"] == "no_answer"]
    assert line["request_id"] == headers["X-Request-Id"]


def test_the_line_of_a_refused_request_names_the_key_that_lacks_the_right(client, lines):
    call(client, "POST", "/dev/runpod", auth=bearer(NAMED[Right.READ][0]))

    (line,) = lines()
    assert (line["status"], line["caller"]) == (403, "the-read-key")


def test_a_request_without_an_accepted_key_has_no_caller_and_not_the_one_before(client, lines):
    call(client, "GET", "/api/jobs")
    call(client, "GET", "/api/jobs", auth=bearer("wrong"))

    before, line = lines()
    assert (before["caller"], line["status"]) == (f"key-{KEY_HASH[:8]}", 401)
    assert "caller" not in line


def test_a_minute_of_the_schedule_has_the_lambdas_id(client, lines, bench):
    from chalice.local import LambdaContext

    from tools import schedule

    bench.create()
    context = LambdaContext("poll_jobs", 512, max_runtime_ms=58_000)

    app.poll_jobs(schedule.event(), context)

    assert "done" in [line["message"] for line in lines()]
    assert {line["request_id"] for line in lines() if line["request_id"] != "before"} == {context.aws_request_id}
