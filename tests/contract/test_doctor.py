"""The doctor before a local cloud in which one thing is wrong at a time; with -s every case prints what it said."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import boto3
import pytest
import requests
from chalice.config import Config
from chalice.local import create_local_server
from moto import mock_aws

import app
from chalicelib import bootstrap, settings
from chalicelib.advice import Level
from chalicelib.jobs import to_text
from chalicelib.runtime import Clock, Deadline
from tests import openapi
from tests.conftest import KEY, KEY_HASH
from tests.engines import processes
from tools import doctor, env_file, schema
from tools.cloud import Answer, json_answer
from tools.processes import ROOT

SECRET = "sixteen characters at least"


def d1_says(status, code, message, headers=None):
    return json_answer(
        status, {"success": False, "result": None, "errors": [{"code": code, "message": message}]}, headers
    )


def s3_says(status, code):
    return Answer(
        status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {"Content-Type": "application/xml"}
    )


def workers(queued=0, **counts):
    none = {"idle": 0, "initializing": 0, "ready": 0, "running": 0, "throttled": 0, "unhealthy": 0}
    return json_answer(200, {"jobs": {"inQueue": queued, "inProgress": 0}, "workers": {**none, **counts}})


class Sickness:
    """What is wrong: other settings, other answers by "METHOD path", or rows; and by what it must be known."""

    def __init__(self, sentence, *, answers=None, sql="", key="", clock=None, without=(), **changed):
        self.sentence, self.answers, self.sql, self.key = sentence, answers or {}, sql, key
        self.clock, self.without, self.changed = clock or Clock(), without, changed


class FastClock(Clock):
    """Five minutes ahead."""

    def now(self):
        return super().now() + timedelta(minutes=5)


class Dreamer(Clock):
    """Does not sleep, and is that much ahead then."""

    def __init__(self):
        self.slept = 0.0

    def now(self):
        return super().now() + timedelta(seconds=self.slept)

    def monotonic(self):
        return super().monotonic() + self.slept

    def sleep(self, seconds):
        """Meanwhile the deployed service has its rounds, as by its schedule."""
        self.slept += seconds
        bootstrap.service().pipeline.run_round(Deadline(Clock(), 20.0), ignore_due=True)


def hashed(text):
    return hashlib.sha256(text.encode()).hexdigest()


def row(job_id, **columns):
    now = datetime.now(UTC)
    made = {"id": job_id, "created_at": to_text(now), "updated_at": to_text(now), **columns}
    return f"INSERT INTO jobs ({', '.join(made)}) VALUES ({', '.join(repr(value) for value in made.values())})"


LONG_AGO = to_text(datetime.now(UTC) - timedelta(minutes=10))
NOWHERE = "http://127.0.0.1:9"  # the port of "discard", where nobody listens
RUNPOD, D1, PUT, CDN, HOOK = "GET /v2/", "POST /client/v4/", "PUT /r2/", "GET /cdn/", "POST /hook"

SICKNESSES = {
    "setting_missing": Sickness("Setting RUNPOD_ENDPOINT_ID (The serverless", without=["RUNPOD_ENDPOINT_ID"]),
    "setting_malformed": Sickness("Setting MAX_ATTEMPTS is malformed", MAX_ATTEMPTS="two"),
    "setting_malformed: a bearer": Sickness(
        "RUNPOD_API_KEY is malformed: it must be the key", RUNPOD_API_KEY="Bearer x"
    ),
    "setting_missing: parameter": Sickness(
        "R2_SECRET_ACCESS_KEY names the SSM parameter /ob/x", R2_SECRET_ACCESS_KEY="ssm:/ob/x"
    ),
    "setting_unknown": Sickness("R2_BUKET is no setting; R2_BUCKET is one", R2_BUKET="x"),
    "keys_not_configured": Sickness("No API key is configured", API_KEY_HASHES=""),
    "key_unknown": Sickness("The key in API_KEY is not accepted", key="another-key"),
    "key_with_line_end": Sickness(
        "the hash of this key with a line end", key="new-key", API_KEY_HASHES=hashed("new-key\n")
    ),
    "anonymous": Sickness("Anybody may create jobs", ALLOW_ANONYMOUS="true"),
    "d1_unreachable": Sickness("D1 could not be reached", CLOUDFLARE_API_BASE=NOWHERE),
    "d1_unauthorized": Sickness("D1 refused the token (HTTP 401", CLOUDFLARE_API_TOKEN="wrong"),
    "d1_account": Sickness("D1 does not let this token into this account", CLOUDFLARE_ACCOUNT_ID="other"),
    "d1_not_found": Sickness("D1 does not know the database", D1_DATABASE_ID="other"),
    "d1_read_only": Sickness(
        "D1 lets this token only read",
        answers={f"{D1}.*UPDATE": d1_says(400, 7500, "not authorized: SQLITE_AUTH")},
    ),
    "d1_quota": Sickness(
        "D1's daily quota is used up",
        answers={D1: d1_says(400, 7500, "Your account has exceeded D1's free tier daily row read limit")},
    ),
    "d1_rate_limited": Sickness(
        "Cloudflare is refusing API calls", answers={D1: d1_says(429, 971, "wait", {"Retry-After": "250"})}
    ),
    "d1_bad_answer": Sickness("D1 gave no usable answer (HTTP 502)", answers={D1: Answer(502, b"<html>")}),
    "d1_no_tables": Sickness("The database has no table `jobs`", sql="DROP TABLE jobs"),
    "d1_old_schema": Sickness("The tables are those of an earlier version", sql="DROP TABLE schema_changes"),
    "d1_old_schema: without a table": Sickness("those of an earlier version", sql="DROP TABLE endpoint_faults"),
    "d1_old_schema: a change behind": Sickness(
        "has change 1 of its schema", sql="DELETE FROM schema_changes WHERE number > 1"
    ),
    "d1_newer_schema": Sickness("the code knows only", sql="INSERT INTO schema_changes VALUES (999, 'x', '')"),
    "d1_other_table": Sickness(
        "it is another program's", sql="DROP TABLE jobs; CREATE TABLE jobs (number INTEGER); DROP TABLE schema_changes"
    ),
    "d1_unfit": Sickness(
        "rules that break the service: jobs.user_id must have a value",
        sql="DROP TABLE jobs; DROP TABLE schema_changes; CREATE TABLE jobs (id TEXT PRIMARY KEY, user_id INT NOT NULL)",
    ),
    "d1_drift": Sickness("The database lacks jobs_dead", sql="DROP INDEX jobs_dead"),
    "clock_wrong": Sickness("This machine's clock is 300 seconds ahead of D1's", clock=FastClock()),
    "no_rounds": Sickness(
        "no round has looked",
        sql=row("late", status="running", step="poll", runpod_job_id="x", due_at=LONG_AGO),
    ),
    "jobs_refused": Sickness(
        "failed of those made within a day, with runpod_refused: no such key",
        sql=row("refused", status="error", error_code="runpod_refused", error_message="no such key"),
    ),
    "jobs_failed": Sickness(
        "failed of those made within a day, with no_output: nothing came",
        sql=row("empty", status="error", error_code="no_output", error_message="nothing came"),
    ),
    "dead_letters": Sickness("a result that could not be stored", sql=row("dead", status="error", dead_at=LONG_AGO)),
    "endpoint_errors": Sickness(
        "answers only errors (7 calls in a row); nothing is sent there until 2099. It refused the key.",
        sql="INSERT INTO endpoint_faults (endpoint_id, kind, failures, paused_until, code, sentence, since) "
        "VALUES ('e', 'call', 7, '2099', 'c', 'It refused the key.', '')",
    ),
    "r2_unreachable": Sickness("R2 did not answer", R2_ENDPOINT_URL=NOWHERE),
    "r2_unauthorized": Sickness("R2 does not know the access key", R2_ACCESS_KEY_ID="wrong"),
    "r2_signature": Sickness("R2 says that the secret is not that of the access key", R2_SECRET_ACCESS_KEY="wrong"),
    "r2_no_bucket": Sickness("R2 does not know the bucket", R2_BUCKET="other"),
    "r2_denied": Sickness("does not let this token do that", answers={PUT: s3_says(403, "AccessDenied")}),
    "r2_refused": Sickness("R2 refused the key, or what it was to do", answers={"HEAD /r2/": Answer(403)}),
    "r2_checksum": Sickness("did not take the upload with its checksum", answers={PUT: s3_says(501, "NotImplemented")}),
    "r2_clock": Sickness(
        "R2 says that this machine's clock is wrong", answers={PUT: s3_says(403, "RequestTimeTooSkewed")}
    ),
    "r2_mismatch": Sickness("gave back other bytes", answers={"GET /r2/": Answer(200, b"else", {"ETag": '"x"'})}),
    "r2_not_deleted": Sickness("could not be removed", answers={"DELETE /r2/": s3_says(403, "AccessDenied")}),
    "public_unreachable": Sickness("The bucket's public address could not be reached", R2_PUBLIC_BASE_URL=NOWHERE),
    "public_not_found": Sickness("does not know a file that was just put", R2_PUBLIC_BASE_URL="{base}/cdn/elsewhere"),
    "public_forbidden": Sickness("lets nobody read (403)", answers={CDN: Answer(403, b"<html>")}),
    "public_redirect": Sickness(
        "public address leads on to https://x", answers={CDN: Answer(301, b"", {"Location": "https://x"})}
    ),
    "public_other": Sickness("answers 200 with something else", answers={CDN: Answer(200, b"<html>Sign in")}),
    "presign_failed": Sickness(
        "a file of the private bucket answers 403",
        answers={"GET /r2/.*X-Amz-Signature": s3_says(403, "AccessDenied")},
        R2_PUBLIC_BASE_URL="",
    ),
    "spool_failed": Sickness("NoSuchBucket", SPOOL_BUCKET="not-there"),
    "runpod_unreachable": Sickness("RunPod could not be reached", RUNPOD_API_BASE=NOWHERE),
    "runpod_unauthorized": Sickness("RunPod refused the key (HTTP 401", RUNPOD_API_KEY="wrong"),
    "runpod_no_endpoint": Sickness("RunPod does not know the endpoint", RUNPOD_ENDPOINT_ID="other"),
    "runpod_bad_answer": Sickness("no counts of workers", answers={RUNPOD: json_answer(200, {"ping": "pong"})}),
    "workers_none": Sickness("has no worker, and gets none; 3 jobs are waiting", answers={RUNPOD: workers(3)}),
    "workers_scaled_to_zero": Sickness("has no worker now, and no job", answers={RUNPOD: workers()}),
    "workers_throttled": Sickness("workers are throttled", answers={RUNPOD: workers(1, throttled=2)}),
    "workers_unhealthy": Sickness("workers are unhealthy", answers={RUNPOD: workers(1, unhealthy=1)}),
    "workers_starting": Sickness("workers are only just starting", answers={RUNPOD: workers(1, initializing=1)}),
    "webhook_unreachable": Sickness("callbacks could not be reached", PUBLIC_BASE_URL=NOWHERE),
    "webhook_other_secret": Sickness(
        "its WEBHOOK_SECRET is another one", WEBHOOK_SECRET="another secret, of some length"
    ),
    "webhook_no_route": Sickness("PUBLIC_BASE_URL has no such route (403)", PUBLIC_BASE_URL="{api}/v2"),
    "webhook_redirect": Sickness(
        "PUBLIC_BASE_URL leads on to https://y",
        answers={HOOK: Answer(308, b"", {"Location": "https://y"})},
        PUBLIC_BASE_URL="{base}/hook",
    ),
    "webhook_other_service": Sickness(
        "is not this service", answers={HOOK: Answer(200, b"hello")}, PUBLIC_BASE_URL="{base}/hook"
    ),
    "webhook_failing": Sickness(
        "cannot take callbacks (500 internal_error)",
        answers={HOOK: json_answer(500, {"ok": False, "code": "internal_error", "error": "Something failed."})},
        PUBLIC_BASE_URL="{base}/hook",
    ),
    "webhook_no_d1": Sickness(
        "which has no D1: D1 refused the token.",
        answers={HOOK: json_answer(502, {"ok": False, "code": "d1_unauthorized", "error": "D1 refused the token."})},
        PUBLIC_BASE_URL="{base}/hook",
    ),
    "d1_few_calls": Sickness(
        "Callbacks are put off",
        answers={HOOK: json_answer(503, {"ok": False, "code": "webhook_later", "error": "Call again."})},
        PUBLIC_BASE_URL="{base}/hook",
    ),
    "webhook_half": Sickness("PUBLIC_BASE_URL is set, but WEBHOOK_SECRET is not", WEBHOOK_SECRET=""),
}


@pytest.fixture(scope="module")
def deployed():
    """The API over a real socket, with whatever settings the environment has then."""
    server = create_local_server(app.app, Config(), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield "http://{}:{}".format(*server.server.server_address[:2])
    server.shutdown()
    thread.join()
    server.server.server_close()


@pytest.fixture
def healthy(cloud_server, deployed, monkeypatch):
    """The settings of a service that is deployed and has all that it needs."""
    session = processes.s3_session()
    monkeypatch.setattr(boto3.session, "Session", lambda: session)  # to make one takes longer than most tests
    values = {
        **cloud_server.cloud.settings(),
        "API_KEY_HASHES": KEY_HASH,
        "PUBLIC_BASE_URL": deployed,
        "WEBHOOK_SECRET": SECRET,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    bootstrap.service.cache_clear()
    clock = Clock()
    schema.apply(bootstrap.make_d1(settings.load(values), bootstrap.machine(clock).new_wire(None), clock))
    yield values
    bootstrap.service.cache_clear()


@pytest.fixture
def fall_ill(healthy, cloud_server, monkeypatch):
    """Make something wrong; the settings are then these."""

    def make(sickness):
        cloud, handle = cloud_server.cloud, cloud_server.cloud.handle
        for statement in filter(None, sickness.sql.split(";")):
            cloud.d1.execute(statement)

        def answer(request):
            asked = f"{request.method} {request.path}?{request.query} {request.body.decode('utf-8', 'replace')}"
            wrong = (given for pattern, given in sickness.answers.items() if re.match(pattern, asked, re.DOTALL))
            return next(wrong, None) or handle(request)

        monkeypatch.setattr(cloud, "handle", answer)
        names = {"base": cloud_server.base_url, "api": healthy["PUBLIC_BASE_URL"]}
        changed = {name: value.format(**names) for name, value in sickness.changed.items()}
        return {name: value for name, value in {**healthy, **changed}.items() if name not in sickness.without}

    return make


@pytest.fixture(scope="module", autouse=True)
def _aws():
    """AWS's own services, empty: SSM and S3."""
    patch = pytest.MonkeyPatch()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        patch.setenv(f"AWS_{name}", "role")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        yield
    patch.undo()


def test_nothing_is_wrong_with_a_healthy_service(healthy, cloud_server):
    found = list(doctor.look(healthy, key=KEY))

    assert [finding for finding in found if finding.level is not Level.OK] == []
    assert {finding.check for finding in found} == {
        "settings", "models", "keys", "d1", "clock", "schedule", "endpoints", "jobs", "r2", "public", "spool", "runpod",
        "webhook",
    }  # fmt: skip
    print("\n" + "\n".join(map(doctor.lines, found)))
    assert not [path for path in (cloud_server.cloud.r2._folder).iterdir() if path.suffix == ".json"]


@pytest.mark.parametrize(("name", "sickness"), SICKNESSES.items(), ids=SICKNESSES)
def test_what_is_wrong_is_told_by_its_own_sentence(fall_ill, name, sickness):
    code = name.partition(":")[0]

    found = list(doctor.look(fall_ill(sickness), key=sickness.key, clock=sickness.clock))

    (told,) = [finding for finding in found if finding.code == code]
    assert sickness.sentence in told.sentence
    assert told.mend
    print("\n" + doctor.lines(told))


def test_a_monitor_gets_the_same_in_short(fall_ill, healthy):
    asked = f"{healthy['PUBLIC_BASE_URL']}/api/health?deep=1"
    auth = {"Authorization": f"Bearer {KEY}"}

    well = requests.get(asked, headers=auth, timeout=10)
    fall_ill(SICKNESSES["r2_denied"])
    fall_ill(SICKNESSES["workers_scaled_to_zero"])
    ill = requests.get(asked, headers=auth, timeout=10)

    assert (well.status_code, well.json()["ok"], well.json()["problems"]) == (200, True, [])
    assert (ill.status_code, ill.json()["ok"], ill.json()["code"]) == (503, False, "unhealthy")
    for answer in (well, ill):
        openapi.check("GET", "/api/health", answer.status_code, answer.headers, answer.content)
    assert ill.json()["error"].startswith("R2 does not let this token do that")
    assert (ill.json()["checks"]["r2"], ill.json()["checks"]["runpod"], ill.json()["checks"]["d1"]) == (
        "error", "warning", "ok",
    )  # fmt: skip
    assert {problem["code"] for problem in ill.json()["problems"]} == {"r2_denied", "workers_scaled_to_zero"}


def test_a_warning_alone_alarms_no_monitor(fall_ill, healthy):
    fall_ill(SICKNESSES["workers_scaled_to_zero"])

    answer = requests.get(
        f"{healthy['PUBLIC_BASE_URL']}/api/health?deep=1", headers={"Authorization": f"Bearer {KEY}"}, timeout=10
    )

    assert (answer.status_code, answer.json()["ok"]) == (200, True)


SOON = to_text(datetime.now(UTC) + timedelta(minutes=10))
HOURS_AGO = to_text(datetime.now(UTC) - timedelta(hours=2))
SCHEDULES = {
    "nothing to do": ([], True),
    "a running job renewed a moment ago": ([("poll", SOON)], True),
    "a running job that nobody looks at": ([("poll", LONG_AGO)], False),
    "a queue of which a round has just taken some": ([("submit", LONG_AGO)] * 300 + [("submitting", SOON)], True),
    "a queue that nobody takes from": ([("submit", LONG_AGO)] * 300, False),
    "results of which a round has just taken some": ([("store", LONG_AGO)] * 300 + [("store", SOON)], True),
    "a queue of old rows just taken up": ([("submit", "")] * 300 + [("submitting", SOON)], True),
    "a job due for hours beside new ones": ([("submit", HOURS_AGO), ("poll", SOON)], False),
    "a job that backs off": ([("submit", SOON)], True),
}


@pytest.mark.parametrize(("rows", "alive"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_stands_still_is_told_from_one_that_has_much_to_do(healthy, cloud_server, rows, alive):
    for number, (step, due_at) in enumerate(rows):
        status = "running" if step in ("poll", "store") else "queued"
        cloud_server.cloud.d1.execute(row(f"job-{number}", status=status, step=step, due_at=due_at))

    found = [finding for finding in doctor.look(healthy) if finding.check == "schedule"]

    assert [finding.code for finding in found] == ["ok" if alive else "no_rounds"]


def test_a_row_of_the_earlier_version_that_no_round_has_taken_up_is_told(healthy, cloud_server):
    old = row("old", status="queued").replace(to_text(datetime.now(UTC))[:10], "2025-01-01")
    cloud_server.cloud.d1.execute(old)

    assert "no_rounds" in [finding.code for finding in doctor.look(healthy)]


@pytest.fixture
def dreamer(cloud_server):
    """A clock for the doctor by which the local RunPod goes, too."""
    clock = Dreamer()
    cloud_server.cloud.runpod._clock = lambda: clock.now().timestamp()
    return clock


def test_a_picture_is_drawn_from_end_to_end_if_asked_for(healthy, cloud_server, dreamer):
    (drawn,) = doctor.draw(healthy, clock=dreamer)

    assert drawn.level is Level.OK
    url = re.search(r"http\S+", drawn.sentence)[0]
    assert requests.get(url, timeout=5).content.startswith(b"\x89PNG")
    assert [given["prompt"] for given in cloud_server.cloud.runpod.inputs()] == [doctor.PROMPT]


def test_a_refused_input_is_told_with_runpods_words(fall_ill, dreamer):
    refusal = json_answer(400, {"status": 400, "title": "Bad Request", "detail": "Unexpected input: jobId"})
    ill = fall_ill(Sickness("", answers={"POST /v2/.*/run": refusal}))

    (told,) = doctor.draw(ill, clock=dreamer)

    assert told.code == "drawing_failed"
    assert "Unexpected input: jobId" in told.sentence


def test_a_picture_that_nobody_draws_is_not_waited_for_for_ever(healthy, cloud_server, dreamer):
    cloud_server.cloud.runpod._clock = lambda: 0.0

    (told,) = doctor.draw(healthy, clock=dreamer)

    assert told.code == "drawing_late"
    assert dreamer.slept <= doctor.DRAW_SECONDS + doctor.DRAW_EVERY


def run_doctor(values, tmp_path):
    (tmp_path / "stage.env").write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
    plain = {name: value for name, value in os.environ.items() if name not in values}
    plain |= {"AWS_SECRET_ACCESS_KEY": "role", "DEPLOY_DOMAIN": "x"}  # near R2's, and ./deploy's: no mistakes
    command = [sys.executable, "-m", "tools.doctor", "--env", str(tmp_path / "stage.env")]
    return subprocess.run(command, env=plain, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_prints_it_and_tells_by_its_status(healthy, tmp_path):
    well = run_doctor(healthy, tmp_path)
    ill = run_doctor({**healthy, "R2_BUCKET": "other"}, tmp_path)

    assert (well.returncode, well.stdout.splitlines()[-1]) == (0, "0 errors, 0 warnings.")
    assert (ill.returncode, ill.stdout.splitlines()[-1]) == (1, "1 error, 0 warnings.")
    assert "ERROR    r2        R2 does not know the bucket" in ill.stdout
    assert "→ Set R2_BUCKET" in ill.stdout
    for secret in settings.SECRETS & healthy.keys():
        assert healthy[secret] not in well.stdout + well.stderr + ill.stdout + ill.stderr


def test_a_domain_of_its_own_is_where_the_callbacks_are_looked_for(healthy):
    there = {name: value for name, value in healthy.items() if name != "PUBLIC_BASE_URL"}

    completed = env_file.complete({**there, "DEPLOY_DOMAIN": "api.example.com"})

    assert completed["PUBLIC_BASE_URL"] == "https://api.example.com"
    assert env_file.complete({**healthy, "DEPLOY_DOMAIN": "x.y"})["PUBLIC_BASE_URL"] == healthy["PUBLIC_BASE_URL"]


def test_a_malformed_setting_is_told_once_and_its_check_left_out(healthy):
    found = list(doctor.look({**healthy, "API_KEY_HASHES": "the-key-itself", "SPOOL_BUCKET": "a b"}))

    assert [finding.code for finding in found if finding.level is Level.ERROR] == ["setting_malformed"] * 2
    assert {finding.check for finding in found if finding.code == "left_out"} == {"keys", "spool"}


def test_a_test_object_is_removed_although_r2_did_not_confirm_it(fall_ill, cloud_server):
    ill = fall_ill(Sickness("", answers={"HEAD /r2/": s3_says(503, "InternalError")}))

    assert "r2_failed" in [finding.code for finding in doctor.look(ill)]
    assert not [path for path in cloud_server.cloud.r2._folder.iterdir() if path.suffix == ".json"]


@pytest.mark.parametrize("command", ["doctor", "schema", "backup export x.jsonl"])
def test_a_file_of_settings_that_is_not_there_is_named(command):
    words = [sys.executable, "-m", *f"tools.{command} --env /nowhere/.env.prod".split()]

    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "there is no file /nowhere/.env.prod" in done.stderr


def test_no_two_are_told_alike():
    sentences = [sickness.sentence for sickness in SICKNESSES.values()]

    assert len(SICKNESSES) >= 25
    assert len(set(sentences)) == len(sentences)
