"""
README's move from the earlier version, and back, over real sockets and with the real commands.

What happens is told: pytest -s tests/contract/test_takeover.py.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from chalicelib import bootstrap, settings
from chalicelib.runtime import Deadline
from tests.conftest import AUTH, KEY_HASH
from tests.contract import fast_clock
from tests.contract.earlier import Earlier, Routes
from tests.contract.fast_clock import FastClock
from tests.running import free_port
from tools import schema
from tools.cloud import Answer, LocalCloud
from tools.cloud.render import draw
from tools.cloud.server import CloudServer

ROOT = Path(__file__).parents[2]
OPERATOR = {"Authorization": "Bearer operator"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PATIENCE = 20.0  # seconds
LOST = "the answer to this one is lost"
FOR_EVER = {"simulate": {"queue_seconds": 100_000}}


def sql_of(title):
    """The SQL that a section of README gives, in its order."""
    section = re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", README, flags=re.MULTILINE | re.DOTALL)[1]
    return [found.strip() for found in re.findall(r"```sql\n(.*?);\n", section, flags=re.DOTALL)]


GIVE_UP, NOT_TAKEN_UP = sql_of("Moving from the earlier version")
LIVE, MAKE_KNOWN = sql_of("And back")


class Cloud(LocalCloud):
    """Remembers what was put where, and loses the answer to one /run."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.puts = []
        self.refused = []

    def handle(self, request):
        answer = super().handle(request)
        if request.method == "PUT" and request.path.startswith("/r2/"):
            self.puts.append((request.path.split("/", 3)[3], request.body))
        if request.path.endswith("/run") and LOST.encode() in request.body and not self.refused:
            self.refused.append(request)
            return Answer(502, b"<html>")
        return answer


@dataclass
class Client:
    """A client of the earlier version: creates jobs and asks for them, at whatever address it is pointed to."""

    name: str
    url: str
    headers: dict = field(default_factory=dict)
    created: dict = field(default_factory=dict)  # prompts by id
    wrong: list = field(default_factory=list)

    def __post_init__(self):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(0.1):
            prompt = f"{self.name} {len(self.created)}"
            answer = requests.post(
                f"{self.url}/api/queue/create", json={"prompt": prompt}, headers=self.headers, timeout=30
            ).json()
            if answer.get("status") != "queued":
                self.wrong.append(answer)
                continue
            self.created[answer["id"]] = prompt
            oldest = next(iter(self.created))
            status = requests.get(f"{self.url}/api/queue/status?id={oldest}", headers=self.headers, timeout=30).json()
            if status.get("id") != oldest or status["status"] not in ("queued", "running", "done"):
                self.wrong.append(status)

    def wait_for(self, count):
        """Until it has created so many more."""
        enough = len(self.created) + count
        wait(lambda: len(self.created) >= enough or self.wrong)

    def stop(self):
        self._stop.set()
        self._thread.join()


class Schedule:
    """The rounds of the schedule, one after the other by the fast clock."""

    def __init__(self, given):
        self._service = bootstrap.build(settings.load(given), FastClock())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(0.05):
            self._service.pipeline.run_round(Deadline(self._service.clock, 57.0))

    def stop(self):
        """Stop it; the round under way is waited for."""
        self._stop.set()
        self._thread.join()


def wait(done):
    end = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.03)
    return found


class Stage:
    """The cloud, both versions of the service, and what is told of it."""

    def __init__(self, folder):
        self.folder = folder
        self.begun = time.monotonic()
        self._ends = []
        self.server = CloudServer(0)
        clock = FastClock()
        self.cloud = self.server.cloud = Cloud(
            folder / "cloud", base_url=self.server.base_url, clock=lambda: clock.now().timestamp()
        )
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        self.at_end(self.cloud.close, self.server.server_close, thread.join, self.server.shutdown)
        self.given = {**self.cloud.settings(), "API_KEY_HASHES": KEY_HASH, "SUBMIT_UNKNOWN_WAIT": "60"}
        self.earlier = Earlier(self.given, clock)
        self.at_end(self.earlier.stop_cron)

    def at_end(self, *actions):
        self._ends += actions

    def end(self):
        for action in reversed(self._ends):
            action()

    def tell(self, text):
        print(f"{time.monotonic() - self.begun:5.1f} s  {text}", flush=True)

    def table(self, sql, *params):
        return self.cloud.d1.execute(sql, *params)

    def tell_jobs(self):
        rows = self.table("SELECT status, count(*) AS n FROM jobs GROUP BY status ORDER BY status")
        self.tell("        the table: " + ", ".join(f"{row['n']} {row['status']}" for row in rows))

    def command(self, *words, expect=0, **settings):
        """Run a command of README as a process; what it says."""
        run = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=self._env(**settings), capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        said = (run.stdout + run.stderr).strip()
        self.tell(f"$ python -m {' '.join(word.rpartition('/')[2] for word in words)}")
        for line in said.splitlines():
            self.tell(f"        {line}")
        assert run.returncode == expect, said
        return said

    def _env(self, **more):
        kept = {name: os.environ[name] for name in ("PATH", "HOME", fast_clock.START) if name in os.environ}
        return {**kept, "AWS_DEFAULT_REGION": "us-east-1", **self.given, **more}

    def deploy(self, **more):
        """Begin to start the API; its address."""
        port = free_port()
        log = (self.folder / f"api-{port}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.contract.fast_api", str(port)], cwd=ROOT, env=self._env(**more),
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self.at_end(log.close, process.stdin.close, process.wait, process.kill)
        return f"http://127.0.0.1:{port}"


def answers(url):
    try:
        return requests.get(f"{url}/health", timeout=2).ok
    except requests.ConnectionError:
        return False


@dataclass
class Left:
    """What the move and the way back leave, and what was seen on the way."""

    jobs: list
    timelines: dict
    runs: Counter  # by prompt
    cloud: Cloud
    stage: Stage
    clients: list
    old: dict  # ids of the jobs that the earlier version left, by what they were
    before: list  # the rows as they were exported
    old_pictures: dict  # by URL
    seen: dict


def fill(stage):
    """Leave jobs of every kind in the earlier version's table; their ids."""
    earlier = stage.earlier
    for statement in schema.changes()[0].statements[:1]:
        earlier.d1(statement)
    old = {kind: earlier.create(f"an old one, {kind}") for kind in ("done", "refused")}
    earlier.send_queued()
    run_id = earlier.d1("SELECT runpod_job_id FROM jobs WHERE id = ?", old["refused"])[0]["runpod_job_id"]
    earlier.runpod("POST", f"cancel/{run_id}")
    wait(lambda: earlier.poll_running() or not earlier.d1(LIVE.replace("step, due_at", "id")))
    for kind in ("running", "finished at RunPod"):
        old[kind] = earlier.create(f"an old one, {kind}")
    earlier.send_queued()
    for kind in ("running without an id", "running without an id, unsent"):
        old[kind] = earlier.create(f"an old one, {kind}")
        earlier.d1("UPDATE jobs SET status = 'running' WHERE id = ?", old[kind])
    (row,) = earlier.d1("SELECT * FROM jobs WHERE id = ?", old["running without an id"])
    earlier.send(row)  # and ended before it was written down
    old["queued"] = earlier.create("an old one, queued")
    return old


def move(stage, old_client, api):
    """Steps 1 to 6."""
    stage.earlier.stop_cron()
    stage.tell("1. the Worker's cron is stopped; its routes stay")
    old_client.wait_for(2)
    stage.tell_jobs()
    stage.tell("2. export")
    stage.command("tools.backup", "export", str(stage.folder / "before.jsonl"))
    stage.tell("3. change the schema")
    stage.command("tools.schema", "--check", expect=1)
    stage.command("tools.schema")
    old_client.wait_for(2)
    stage.tell(f"        the client without a key still creates at the Worker: {len(old_client.created)} jobs so far")
    wait(lambda: answers(api))
    schedule = Schedule(stage.given)
    stage.at_end(schedule.stop)
    stage.tell("4. deployed with ALLOW_ANONYMOUS=true; the schedule runs")
    old_client.wait_for(2)
    old_client.url = api
    stage.tell("5. the client is pointed to the new address")
    old_client.wait_for(4)
    old_client.stop()
    wait(lambda: not stage.table(LIVE))
    stage.tell("6. every job has ended:")
    stage.tell_jobs()
    assert stage.table(NOT_TAKEN_UP) == []
    said = stage.command("tools.doctor", ALLOW_ANONYMOUS="true")
    assert "its schema is at change" in said
    assert "Anybody may create jobs" in said
    assert "0 errors" in said
    return schedule


def create(api, prompt, given=None):
    """Create a job with a key; its id."""
    body = {"prompt": prompt, "input": {"prompt": prompt, **given}} if given else {"prompt": prompt}
    return requests.post(f"{api}/api/queue/create", json=body, headers=AUTH, timeout=10).json()["id"]


def close(stage, api):
    """Step 7: what a client without a key is told, one that has one, and a job whose send has no answer."""
    wait(lambda: answers(api))
    refused = requests.post(f"{api}/api/queue/create", json={"prompt": "no key"}, timeout=10)
    stage.tell(f"7. ALLOW_ANONYMOUS=false; without a key: {refused.status_code} {refused.json()['code']}")
    lost = create(api, LOST)
    client = Client("with a key", api, headers=AUTH)
    client.wait_for(4)
    client.stop()
    return refused.status_code, client, lost


def go_back(stage, schedule, api, own_api, routes, lost):
    """The way back, with jobs of the new code at every step of their life."""
    long, last = create(api, "waits for ever", FOR_EVER), [create(api, f"the last but {n}") for n in range(3)]
    steps = {row["id"]: row["step"] for row in stage.table(LIVE)}
    wait(lambda: answers(own_api))
    refused = requests.post(f"{own_api}/api/queue/create", json={"prompt": "too late"}, headers=AUTH, timeout=10)
    stage.tell(f"And back. 1. deployed with a key of the operator's alone; clients get {refused.status_code}")
    stage.tell(f"        live jobs are at {dict(Counter(steps.values()))}")
    wait(lambda: set(row["id"] for row in stage.table(LIVE)) == {long})
    stage.tell(f"2. drained, but for one that waits for a worker: {LIVE}")
    requests.post(f"{own_api}/api/jobs/{long}/cancel", headers=OPERATOR, timeout=10).raise_for_status()
    wait(lambda: not stage.table(LIVE))
    stage.tell("        it is cancelled")
    schedule.stop()
    stage.tell(f"3. the schedule is stopped; live jobs: {len(stage.table(LIVE))}")
    stage.table(MAKE_KNOWN)
    stage.tell("4. cancelled is told as an error")
    client = Client("back at the Worker", routes.url)
    client.wait_for(3)
    stage.earlier.start_cron()
    stage.tell("5. the client is pointed to the Worker, whose cron is started")
    client.wait_for(3)
    client.stop()
    wait(lambda: not stage.table(LIVE))
    stage.earlier.stop_cron()
    stage.tell_jobs()
    return client, {"lost": lost, "long": long, "last": last, "steps": steps, "refused": refused.status_code}


def rehearse(stage):
    old = fill(stage)
    open_api, closed_api = stage.deploy(ALLOW_ANONYMOUS="true"), stage.deploy(ALLOW_ANONYMOUS="false")
    own_api = stage.deploy(API_KEY_HASHES=hashlib.sha256(b"operator").hexdigest())
    before = stage.table("SELECT * FROM jobs WHERE status IN ('done', 'error') ORDER BY id")
    old_pictures = {
        row["result_url"]: requests.get(row["result_url"], timeout=10).content for row in before if row["result_url"]
    }
    stage.tell("The earlier version at work:")
    stage.tell_jobs()
    routes = Routes(stage.earlier)
    stage.at_end(routes.stop)
    old_client = Client("without a key", routes.url)
    stage.at_end(old_client.stop)
    stage.earlier.start_cron()
    schedule = move(stage, old_client, open_api)
    refused, new_client, lost = close(stage, closed_api)
    back_client, seen = go_back(stage, schedule, closed_api, own_api, routes, lost)
    timelines = {}
    for row in stage.table("SELECT job_id, event FROM job_events ORDER BY job_id, version, n"):
        timelines.setdefault(row["job_id"], []).append(row["event"])
    return Left(
        jobs=stage.table("SELECT * FROM jobs"),
        timelines=timelines,
        runs=Counter(given["prompt"] for given in stage.cloud.runpod.inputs()),
        cloud=stage.cloud,
        stage=stage,
        clients=[old_client, new_client, back_client],
        old=old,
        before=before,
        old_pictures=old_pictures,
        seen={**seen, "refused": refused},
    )


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fast_clock.start().items():
            patch.setenv(name, value)
        stage = Stage(tmp_path_factory.mktemp("takeover"))
        print()
        try:
            yield rehearse(stage)
        finally:
            stage.end()


def job(left, job_id):
    (found,) = [row for row in left.jobs if row["id"] == job_id]
    return found


def test_every_job_of_the_earlier_version_ends_as_it_should(left):
    ends = {kind: job(left, job_id)["status"] for kind, job_id in left.old.items()}

    assert ends == {**dict.fromkeys(left.old, "done"), "refused": "error"}
    assert left.stage.table(LIVE) == []


def test_no_client_is_refused_or_forgotten_on_the_way(left):
    for client in left.clients:
        assert client.wrong == []
        assert {job(left, job_id)["status"] for job_id in client.created} == {"done"}
        assert {job_id: job(left, job_id)["prompt"] for job_id in client.created} == client.created
    assert [len(client.created) >= least for client, least in zip(left.clients, (10, 4, 6), strict=True)] == [True] * 3
    assert left.seen["refused"] == 401


def test_no_job_is_sent_twice_but_where_its_timeline_says_that_it_may_be(left):
    twice = set()
    for row in left.jobs:
        told = left.timelines.get(row["id"], []).count("possible_duplicate")
        assert left.runs[row["prompt"]] <= 1 + told, (row, left.timelines.get(row["id"]))
        if left.runs[row["prompt"]] > 1:
            twice.add(row["id"])

    assert twice >= {left.old["running without an id"], left.seen["lost"]}


def test_no_picture_is_put_over_another(left):
    by_key = {}
    for key, body in left.cloud.puts:
        by_key.setdefault(key, set()).add(body)

    assert {len(bodies) for bodies in by_key.values()} == {1}
    for row in left.jobs:
        if row["status"] == "done":
            assert requests.get(row["result_url"], timeout=10).content == draw(row["prompt"]), row
            assert f"/{row['id']}/" in row["result_r2_key"]


def test_old_rows_and_old_pictures_stay_as_they_are(left):
    assert len(left.before) == 2
    for row in left.before:
        assert {name: job(left, row["id"])[name] for name in row} == row
    for url, picture in left.old_pictures.items():
        assert requests.get(url, timeout=10).content == picture


def test_the_export_holds_what_the_table_held(left):
    lines = [json.loads(line) for line in (left.stage.folder / "before.jsonl").read_bytes().splitlines()]
    exported = {line["row"]["id"]: line["row"] for line in lines if "row" in line}

    assert set(left.old.values()) <= set(exported)
    assert all(len(row) == 11 for row in exported.values())
    assert [exported[row["id"]] for row in left.before] == left.before


def test_the_way_back_met_jobs_that_the_worker_would_have_bought_again(left):
    steps = left.seen["steps"]

    assert steps[left.seen["lost"]] == "submitting"
    assert job(left, left.seen["lost"])["status"] == "done"
    assert job(left, left.seen["long"])["status"] == "error"
    assert job(left, left.seen["long"])["error_message"] == "cancelled"
    assert {job(left, job_id)["status"] for job_id in left.seen["last"]} == {"done"}
    assert {row["status"] for row in left.jobs} == {"done", "error"}


def test_a_lost_row_can_be_given_up_before_the_move(left):
    earlier = left.stage.earlier
    job_id = earlier.create("given up")
    earlier.d1("UPDATE jobs SET status = 'running', runpod_job_id = '' WHERE id = ?", job_id)

    earlier.d1(GIVE_UP)

    assert [row["status"] for row in earlier.d1("SELECT status FROM jobs WHERE id = ?", job_id)] == ["error"]
    assert left.stage.table(LIVE) == []
