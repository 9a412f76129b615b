"""RETENTION_DAYS: jobs that ended long ago are removed with their files, some at a time, and never a dead letter."""

import pytest

from chalicelib import removal
from chalicelib.errors import TransientError
from chalicelib.r2 import R2
from chalicelib.removal import RETIRED_TOGETHER, Removal
from tests.conftest import AUTH, BUCKET, call

DAY = 86_400


@pytest.fixture
def environment(environment):
    return {**environment, "RETENTION_DAYS": "30"}


@pytest.fixture
def retire(bench):
    """Remove what is to be removed so many days later."""

    def run(days=0.0):
        bench.clock.advance(days * DAY)
        return bench.service._removal.retire(bench.deadline(57.5), days=30)

    return run


def done(bench, number=1):
    ids = [bench.create() for _ in range(number)]
    bench.round()
    return ids


def kept(table):
    return {row["id"] for row in table("SELECT id FROM jobs")}


def test_a_job_and_its_files_go_when_its_days_are_over(client, bench, retire, table):
    (job_id,) = done(bench)
    retire(29.9)
    assert kept(table) == {job_id}
    retire(0.2)

    assert (kept(table), bench.objects()) == (set(), [])
    status, answer, _ = call(client, "GET", f"/api/jobs/{job_id}", auth=AUTH)
    assert (status, answer["code"]) == (410, "job_deleted")
    assert answer["error"].endswith("by retention.")


def test_a_dead_letter_stays_however_old(bench, retire, table, no_r2):
    job_id = bench.create()
    while not bench.job(job_id).dead_at:
        bench.round(after=60)
    no_r2()
    retire(400)

    assert kept(table) == {job_id}


def test_what_becomes_a_dead_letter_at_the_last_moment_stays_too(bench, table, monkeypatch):
    (job_id,) = done(bench)
    table("UPDATE jobs SET status = 'error', dead_at = '2026' WHERE id = ?", job_id)
    monkeypatch.setattr(bench.service.store, "ended_before", lambda *args, **options: [("", job_id)])
    bench.service._removal.retire(bench.deadline(), days=30)

    assert bench.job(job_id).deleted_at is None


def test_what_lives_or_has_ended_lately_stays(bench, retire, table):
    old = bench.create(simulate={"status": "FAILED"})
    bench.round()
    bench.clock.advance(40 * DAY)
    bench.service.verbs.retry(old, bench.deadline(20.0), by="me")
    retire()
    assert kept(table) == {old}
    bench.round()
    bench.round()
    retire(1)
    assert kept(table) == {old}
    retire(29)
    assert kept(table) == {old}
    retire(2)
    assert kept(table) == set()


def test_rows_of_the_earlier_version_go_with_their_picture(bench, retire, table):
    bench.s3.put_object(Bucket=BUCKET, Key="jobs/2025/01/old/output.png", Body=b"x")
    table(
        "INSERT INTO jobs (id, status, result_r2_key, created_at, updated_at) "
        "VALUES ('old', 'done', 'jobs/2025/01/old/output.png', '2025-01-01 00:00:00', '2025-01-01 00:00:00')"
    )
    retire()

    assert (kept(table), bench.objects()) == (set(), [])


def test_only_so_many_go_at_once_the_oldest_first(bench, retire, table, monkeypatch):
    monkeypatch.setattr(removal, "RETIRED_AT_ONCE", 2 * RETIRED_TOGETHER)
    rows = ", ".join(
        f"('job-{n:03}', 'cancelled', '2025-01-01T00:00:00.{n:03}Z', '2025-01-02T00:00:00.000Z')" for n in range(130)
    )
    table(f"INSERT INTO jobs (id, status, created_at, finished_at) VALUES {rows}")
    calls = bench.d1_calls(retire)
    assert kept(table) == {f"job-{n:03}" for n in range(100, 130)}
    assert calls == 2 * 3  # for each fifty a find, a mark and a removal
    retire()

    assert kept(table) == set()


def test_those_that_cannot_be_removed_hold_up_no_others(bench, retire, table, monkeypatch):
    monkeypatch.setattr(removal, "RETIRED_TOGETHER", 2)
    rows = ", ".join(f"('{n}', 'done', '2025-01-0{n}', 'jobs/2025/01/{n}/output.png')" for n in range(1, 6))
    table(f"INSERT INTO jobs (id, status, created_at, result_r2_key) VALUES {rows}")
    table("UPDATE jobs SET outputs = 'no JSON' WHERE id = '1'")
    table("UPDATE jobs SET metadata = 'no JSON', pictures = 'nor this' WHERE id = '3'")
    delete = R2.delete

    def fail(self, key, **options):
        if "/2/" in key:
            raise TransientError("r2_failed", "Not this one.", service="r2")
        delete(self, key, **options)

    monkeypatch.setattr(R2, "delete", fail)
    retire()

    assert kept(table) == {"1", "2"}


@pytest.mark.parametrize(
    ("finished_at", "updated_at", "goes"),
    [
        ("", "2026-01-31T20:00:00.000Z", False),
        ("01/31/2026 22:00", "2026-01-01", False),
        (None, "2025-12-01 10:00:00", True),
        ("", "", True),
    ],
)
def test_a_time_that_nobody_can_read_is_not_over(retire, table, finished_at, updated_at, goes):
    columns = "id, status, created_at, finished_at, updated_at"
    table(f"INSERT INTO jobs ({columns}) VALUES ('a', 'done', '2025-01-01', ?, ?)", finished_at, updated_at)
    retire()

    assert kept(table) == (set() if goes else {"a"})


def test_it_leaves_the_calls_to_others_where_there_are_few(bench, table, monkeypatch):
    table("INSERT INTO jobs (id, status, created_at) VALUES ('a', 'done', '2025')")
    monkeypatch.setattr(bench.service.store, "calls_left", lambda: 299)

    assert bench.service._removal.retire(bench.deadline(57.5), days=30) == 0


def test_it_stops_where_the_time_is_short(bench, table):
    table("INSERT INTO jobs (id, status, created_at) VALUES ('a', 'done', '2025')")

    assert bench.service._removal.retire(bench.deadline(19.0), days=30) == 0
    assert bench.service._removal.retire(bench.deadline(21.0), days=30) == 1


def test_what_r2_does_not_remove_is_removed_later(bench, retire, table, monkeypatch):
    done(bench, 3)

    def fail(self, *args, **options):
        raise TransientError("r2_failed", "R2 is down.", service="r2")

    with monkeypatch.context() as patch:
        patch.setattr(R2, "delete", fail)
        retire(31)
    assert len(kept(table)) == 3
    retire()

    assert (kept(table), bench.objects()) == (set(), [])


@pytest.mark.parametrize(("minute", "days", "asked"), [(10, 30, [30]), (11, 30, []), (10, 0, [])])
def test_the_schedule_does_it_every_ten_minutes_where_it_is_wanted(bench, monkeypatch, minute, days, asked):
    wanted = []
    monkeypatch.setattr(Removal, "retire", lambda self, deadline, *, days: wanted.append(days))
    bench.service.pipeline.retention_days = days
    bench.clock.at = bench.clock.at.replace(minute=minute)
    bench.service.pipeline.run_minute(bench.deadline(57.5))

    assert wanted == asked
