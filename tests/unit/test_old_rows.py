"""The owner's table: the eleven columns of the earlier version, with rows that go on where they stand."""

import re
import subprocess
import sys

import pytest

from chalicelib.errors import PermanentError
from chalicelib.jobs import State
from tests.conftest import Bench
from tools import schema

OLD_COLUMNS = (
    "id", "runpod_job_id", "status", "prompt", "model", "result_r2_key", "result_url", "finished_at", "error_message",
    "created_at", "updated_at",
)  # fmt: skip
OLD_TABLE = """CREATE TABLE jobs (
  id TEXT PRIMARY KEY, runpod_job_id TEXT, status TEXT NOT NULL DEFAULT 'queued', prompt TEXT NOT NULL, model TEXT,
  result_r2_key TEXT, result_url TEXT, finished_at TEXT, error_message TEXT, created_at TEXT NOT NULL, updated_at TEXT
)"""
AT = "2026-01-31T23:58:00.000Z"


@pytest.fixture
def d1_engine(each_d1_engine):
    return each_d1_engine


@pytest.fixture
def old(table, empty_d1):
    """A database of the earlier version, brought to what the code needs after the rows were written."""
    table(OLD_TABLE)

    def insert(job_id, **columns):
        row = {"id": job_id, "status": "queued", "prompt": "an old cat", "created_at": AT, "updated_at": AT, **columns}
        table(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", *row.values())

    return insert


@pytest.fixture
def old_bench(old, empty_d1, environment, cloud, clock, faults, s3):
    from chalicelib import bootstrap, settings

    def make():
        schema.apply(empty_d1)
        return Bench(bootstrap.build(settings.load(environment), clock), cloud, clock, faults, s3)

    return make


def test_an_added_column_keeps_its_constraint(old, table, empty_d1):
    schema.apply(empty_d1)

    with pytest.raises(Exception, match="CHECK constraint failed"):
        table("INSERT INTO jobs (id, prompt, created_at, step) VALUES ('x', '', '', 'nonsense')")


def test_a_table_of_another_program_is_left_alone(table, empty_d1):
    table("CREATE TABLE jobs (number INTEGER)")

    with pytest.raises(PermanentError, match="another program"):
        schema.apply(empty_d1)


ELEVEN = {
    "id": "TEXT PRIMARY KEY", "runpod_job_id": "TEXT", "status": "TEXT", "prompt": "TEXT", "model": "TEXT",
    "result_r2_key": "TEXT", "result_url": "TEXT", "finished_at": "TEXT", "error_message": "TEXT", "created_at": "TEXT",
    "updated_at": "TEXT",
}  # fmt: skip
UNFIT = {
    "another key": ({"id": "INTEGER PRIMARY KEY"}, "jobs.id is INTEGER, not TEXT"),
    "no key": ({"id": "TEXT"}, "jobs.id is not its primary key"),
    "a run id that must be": ({"runpod_job_id": "TEXT NOT NULL DEFAULT ''"}, "jobs.runpod_job_id must have a value"),
    "an error that must be": ({"error_message": "TEXT NOT NULL DEFAULT ''"}, "jobs.error_message must have a value"),
    "a column of the owner's": ({"user_id": "TEXT NOT NULL"}, "jobs.user_id must have a value, which the service does"),
    "our name, another type": ({"attempt": "TEXT"}, "jobs.attempt is TEXT, not INTEGER"),
    "four statuses": (
        {"status": "TEXT CHECK (status IN ('queued', 'running', 'done', 'error'))"},
        "jobs has a CHECK of its own",
    ),
}


def make_table(table, changed):
    columns = ", ".join(f"{name} {rules}" for name, rules in {**ELEVEN, **changed}.items())
    table(f"CREATE TABLE jobs ({columns})")


@pytest.mark.parametrize(("changed", "sentence"), UNFIT.values(), ids=UNFIT)
def test_a_table_whose_rules_break_the_service_is_refused_before_anything_is_done(table, empty_d1, changed, sentence):
    make_table(table, changed)

    with pytest.raises(PermanentError, match=re.escape(sentence)) as caught:
        schema.apply(empty_d1)

    assert caught.value.code == "d1_unfit"
    assert any(sentence in line for line in schema.check(empty_d1).lines())
    assert table("SELECT name FROM sqlite_master WHERE name IN ('schema_changes', 'job_events')") == []


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"id": "VARCHAR(36) PRIMARY KEY NOT NULL"},
        {"created_at": "DATETIME NOT NULL DEFAULT CURRENT_TIMESTAMP"},
        {"status": "TEXT NOT NULL", "prompt": "TEXT NOT NULL", "model": "TEXT NOT NULL DEFAULT 'qwen-image'"},
        {"user_id": "TEXT", "likes": "INTEGER NOT NULL DEFAULT 0"},
        {"runpod_job_id": "TEXT DEFAULT ''", "error_message": "TEXT DEFAULT ''"},
    ],
)
def test_a_job_goes_all_the_way_in_a_table_whose_rules_are_only_other_ones(table, empty_d1, changed, request):
    make_table(table, changed)
    schema.apply(empty_d1)
    bench = request.getfixturevalue("bench")

    job_id = bench.create()
    bench.round()
    bench.round()

    assert bench.job(job_id).status == "done"
    assert len(bench.cloud.runpod.inputs()) == 1


def test_a_queued_row_is_submitted(old, old_bench, cloud):
    old("a")
    bench = old_bench()

    bench.round(after=0)

    job = bench.job("a")
    assert (job.state, job.attempt) == (State.POLL, 1)
    assert cloud.runpod.inputs() == [{"prompt": "an old cat", "model": "qwen-image", "jobId": "a"}]
    assert bench.timeline("a") == ["adopted", "submitting", "submitted"]


def test_a_running_row_is_polled_and_its_picture_lies_where_it_always_did(old, old_bench, cloud, clock):
    cloud.runpod._execute(
        "INSERT INTO runs (id, endpoint_id, input, created_at) "
        "VALUES ('run-a', 'local-endpoint', '{\"prompt\": \"an old cat\"}', ?)",
        clock.at.timestamp() - 30,
    )
    old("a", status="running", runpod_job_id="run-a")
    bench = old_bench()

    bench.round(after=0)

    job = bench.job("a")
    assert (job.status, job.result_r2_key) == ("done", "jobs/2026/01/a/output.png")
    assert len(cloud.runpod.inputs()) == 1


def test_a_running_row_without_an_id_is_a_lost_submit(old, old_bench):
    old("a", status="running")
    bench = old_bench()

    bench.round(after=0)

    assert bench.job("a").state is State.POLL
    assert bench.timeline("a") == ["adopted", "possible_duplicate", "submitting", "submitted"]
    assert bench.job("a").attempt == 2  # the lost one counts


def test_a_queued_row_with_an_id_was_sent_and_is_not_sent_again(old, old_bench, cloud):
    old("a", runpod_job_id="run-a")
    bench = old_bench()

    bench.round(after=0)

    assert cloud.runpod.inputs() == []
    assert bench.job("a").state is State.POLL


def test_a_running_row_without_submitted_at_counts_from_updated_at(old, old_bench):
    old("a", status="running", runpod_job_id="gone", updated_at="2026-01-31T23:59:00.000Z")
    bench = old_bench()

    bench.round(after=140)
    assert bench.job("a").state is State.POLL
    bench.round(after=15)

    assert bench.events("a")[-1]["code"] == "runpod_lost"


@pytest.mark.parametrize("updated_at", [None, "", "yesterday", "1735689600000"])
def test_a_time_that_cannot_be_read_is_long_ago(old, old_bench, updated_at):
    old("a", status="running", runpod_job_id="gone", updated_at=updated_at)
    bench = old_bench()

    bench.round(after=0)

    assert bench.events("a")[-1]["code"] == "runpod_lost"


def test_a_row_without_an_id_stops_nobody(old, old_bench):
    old(None)
    old("good", runpod_job_id=None)
    bench = old_bench()

    bench.round(after=0)

    assert bench.job("good").state is State.POLL


def test_a_lost_old_run_counts_as_the_first_of_two_attempts(old, old_bench, cloud, faults):
    old("a", status="running", runpod_job_id="gone", updated_at="2026-01-01T00:00:00.000Z")
    bench = old_bench()
    faults.add("GET .*/status/", (404, {"status": 404}), times=99)

    for _ in range(30):
        bench.round()

    assert bench.job("a").error_code == "runpod_lost"
    assert len(cloud.runpod.inputs()) == 1


def test_an_old_run_is_asked_for_where_it_was_sent(old, old_bench):
    old("a", status="running", runpod_job_id="run-a", updated_at="2026-01-31T23:59:00.000Z")
    bench = old_bench()

    bench.round(after=0)

    assert bench.job("a").endpoint_id == "local-endpoint"


def test_final_rows_stay_as_they_are(old, old_bench, table):
    old("a", status="done", result_url="https://old/a.png")
    old("b", status="error", error_message="boom")
    bench = old_bench()
    before = table("SELECT * FROM jobs ORDER BY id")

    bench.round(after=0)

    assert table("SELECT * FROM jobs ORDER BY id") == before
    assert (bench.job("a").status, bench.job("b").error_message) == ("done", "boom")


def test_a_row_that_the_earlier_version_writes_meanwhile_is_taken_too(old, old_bench):
    bench = old_bench()
    old("late")

    bench.round(after=0)

    assert bench.job("late").state is State.POLL


def command(*args, env):
    return subprocess.run(
        [sys.executable, "-m", "tools.schema", *args], capture_output=True, text=True, env=env, timeout=60, check=False
    )


def test_the_command_says_what_is_pending_then_applies_it_then_finds_nothing(cloud_server):
    import os

    cloud_server.cloud.d1.execute(OLD_TABLE)
    wanted = ("CLOUDFLARE_", "D1_")
    env = {**os.environ, **{k: v for k, v in cloud_server.cloud.settings().items() if k.startswith(wanted)}}

    check = command("--check", env=env)
    assert (check.returncode, "pending: 0002_pipeline" in check.stdout) == (1, True)
    apply = command(env=env)
    assert (apply.returncode, "applied: 0002_pipeline" in apply.stdout) == (0, True)
    again = command("--check", env=env)
    assert (again.returncode, again.stdout) == (0, "The database has everything the code needs.\n")
    refused = command(env={**env, "CLOUDFLARE_API_TOKEN": "wrong"})
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("D1 refused the token")
