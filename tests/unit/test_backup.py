"""An export holds every row as it is, and a restore adds what is missing, never over what is there."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chalicelib.errors import IndeterminateError, PermanentError
from tests.engines.engine import D1Engine
from tests.unit.test_old_rows import AT, OLD_COLUMNS
from tools import backup, schema

BIG = '{"workflow": "' + "\\\\\\" * 60_000 + "ภาพ" * 20_000 + '"}'
JOBS = [
    {
        "id": "a",
        "status": "done",
        "prompt": "แมวสีส้ม 🐈‍⬛ \u2028",
        "model": "qwen-image",
        "result_url": "https://x/a.png",
    },
    {"id": "b", "status": "queued", "prompt": "", "model": None, "step": "submit", "due_at": ""},
    {"id": "c'", "status": "error", "prompt": "'; DROP TABLE jobs; --\n\t\"", "error_message": "007", "version": 3},
    {"id": "d", "status": "running", "prompt": "big", "input": BIG, "step": "poll", "version": 9007199254740993},
    {"id": "e", "status": "cancelled", "prompt": "a\x00b", "queue_ms": 12, "execution_ms": 0, "version": 2**62 + 1},
    {"id": "", "status": "done", "prompt": "an empty id", "attempt": -1, "queue_ms": 0.1},
    {"id": "7", "status": "done", "prompt": "42", "intent_version": "words in a column of numbers"},
]
EVENTS = [("a", 0, 0, AT, "created", '{"attempt": 1}'), ("a", 1, 0, AT, "done", "{}"), ("a", 1, 1, AT, "x", '"แ"')]
OLD = f"INSERT INTO jobs ({', '.join(OLD_COLUMNS)}) VALUES ({', '.join('?' * 11)})"


@pytest.fixture
def d1_engine(each_d1_engine):
    return each_d1_engine


@pytest.fixture
def insert(table):
    """Insert a row with its integers whole: a bound one would be REAL."""

    def insert(name, row):
        whole = {column: isinstance(value, int) for column, value in row.items()}
        marks = ["CAST(? AS INTEGER)" if whole[column] else "?" for column in row]
        params = [str(value) if whole[column] else value for column, value in row.items()]
        table(f"INSERT INTO {name} ({', '.join(row)}) VALUES ({', '.join(marks)})", *params)

    return insert


@pytest.fixture
def filled(d1, insert):
    """A database with every kind of row."""
    for row in JOBS:
        insert("jobs", {"created_at": AT, "updated_at": AT, **row})
    for event in EVENTS:
        insert("job_events", dict(zip(schema.tables()["job_events"], event, strict=True)))
    insert("job_metadata", {"key": "album", "value": "แมว", "created_at": AT, "job_id": "a"})
    insert("uploads", {"key": "uploads/1", "created_at": AT, "due_at": None})
    insert("job_uploads", {"key": "uploads/1", "job_id": "a"})
    insert(
        "deliveries",
        {"job_id": "a", "version": 3, "type": "job.done", "url": "https://a/", "data": "{}", "created_at": AT},
    )
    return d1


TABLES = ("jobs", "job_events", "job_metadata", "uploads", "job_uploads", "deliveries")


COUNTED = {"job_metadata": 1, "uploads": 1, "job_uploads": 1, "deliveries": 1, "job_events": 3, "jobs": 7}


def counted(numbers=COUNTED):
    return [f"{name}: {number} rows" for name, number in numbers.items()]


def everything(table):
    """Every row with the type of every value; integers as text, for D1's answers round them."""
    rows = []
    for name in TABLES:
        columns = [row["name"] for row in table(f"SELECT name FROM pragma_table_info('{name}')")]
        values = ", ".join(f"hex({column}) || typeof({column}) AS {column}" for column in columns)
        rows += sorted(table(f"SELECT {values} FROM {name}"), key=str)
    return rows


def empty(table):
    for name in TABLES:
        table(f"DELETE FROM {name}")


def test_what_is_exported_is_restored_as_it_was(filled, table, tmp_path, clock):
    before = everything(table)

    told = backup.export(filled, tmp_path / "b.jsonl", clock)
    empty(table)
    restored = backup.restore(filled, tmp_path / "b.jsonl", clock)

    assert told == counted()
    assert restored[:-1] == [f"{line} added, 0 were there" for line in counted()]
    assert everything(table) == before


def test_a_row_that_is_there_stays_as_it_is_and_a_repeat_adds_nothing(filled, table, tmp_path, clock):
    backup.export(filled, tmp_path / "b.jsonl", clock)
    table("UPDATE jobs SET status = 'done', step = NULL WHERE id = 'b'")
    table("DELETE FROM jobs WHERE id = 'a'")
    table("DELETE FROM job_events WHERE version = 1")

    first = backup.restore(filled, tmp_path / "b.jsonl", clock)
    after = everything(table)
    second = backup.restore(filled, tmp_path / "b.jsonl", clock)

    assert first[-3:-1] == ["job_events: 2 rows added, 1 were there", "jobs: 1 rows added, 6 were there"]
    assert second[-3:-1] == ["job_events: 0 rows added, 3 were there", "jobs: 0 rows added, 7 were there"]
    assert everything(table) == after
    assert table("SELECT status FROM jobs WHERE id = 'b'") == [{"status": "done"}]


def test_pages_and_batches_of_any_size_hold_the_same_rows(filled, table, tmp_path, clock, monkeypatch):
    before = everything(table)
    backup.export(filled, tmp_path / "whole.jsonl", clock)
    for limit, value in (("PAGE_ROWS", 2), ("PAGE_BYTES", 50), ("BATCH_ROWS", 2), ("BATCH_BYTES", 900)):
        monkeypatch.setattr(backup, limit, value)

    backup.export(filled, tmp_path / "pages.jsonl", clock)
    empty(table)
    backup.restore(filled, tmp_path / "pages.jsonl", clock)

    assert (tmp_path / "pages.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert everything(table) == before


def test_a_page_carries_few_large_rows_and_a_batch_fits_into_a_request(d1, insert, table, tmp_path, clock, monkeypatch):
    for number in range(12):
        insert("jobs", {"id": f"large {number}", "input": BIG, "prompt": '"' * 100_000, "created_at": AT})
        insert("jobs", {"id": f"middling {number}", "prompt": '"' * 50_000, "created_at": AT})
    sizes, ask = [], d1.query

    def watch(statements, **options):
        rows = ask(statements, **options)
        sizes.append(sum(len(text) for row in rows[0] for text in row.values() if isinstance(text, str)))
        return rows

    monkeypatch.setattr(backup, "PAGE_BYTES", 1_000_000)
    monkeypatch.setattr(d1, "query", watch)
    before = everything(table)

    backup.export(d1, tmp_path / "b.jsonl", clock)
    largest = max(sizes)
    empty(table)
    backup.restore(d1, tmp_path / "b.jsonl", clock)

    assert largest < 1_000_000 + 400_000
    assert everything(table) == before


@pytest.fixture
def old_file(table, empty_d1, tmp_path, clock):
    """An export of the earlier version's table; it is dropped then."""
    table(schema.changes()[0].statements[0])
    table(OLD, "old-1", None, "queued", "แมว", None, None, None, None, None, AT, AT)
    table(OLD, "old-2", "run-2", "done", "a cat", "m", "jobs/k.png", "https://x/k.png", AT, None, AT, AT)
    told = backup.export(empty_d1, tmp_path / "old.jsonl", clock)
    assert told == ["jobs: 2 rows"]
    table("DROP TABLE jobs")
    return tmp_path / "old.jsonl"


def test_eleven_columns_go_into_the_new_schema(old_file, empty_d1, table, clock):
    schema.apply(empty_d1)

    told = backup.restore(empty_d1, old_file, clock)

    assert told == ["jobs: 2 rows added, 0 were there", "1 jobs were live when this was exported."]
    one, two = table("SELECT * FROM jobs ORDER BY id")
    assert [one[name] for name in OLD_COLUMNS] == [
        "old-1", None, "queued", "แมว", None, None, None, None, None, AT, AT
    ]  # fmt: skip
    assert (one["version"], one["due_at"], one["step"]) == (0, "", None)
    assert (two["result_url"], two["attempt"]) == ("https://x/k.png", 0)


def test_columns_that_the_database_lacks_are_refused_before_anything_is_written(filled, table, tmp_path, clock):
    backup.export(filled, tmp_path / "b.jsonl", clock)
    table("DROP TABLE jobs")
    table(schema.changes()[0].statements[0])
    for name in TABLES[3:]:
        table(f"DELETE FROM {name}")
    table("DELETE FROM job_events")
    table("DELETE FROM job_metadata")

    with pytest.raises(backup.Problem, match=r"The table jobs has no column step, input, .*tools.schema"):
        backup.restore(filled, tmp_path / "b.jsonl", clock)

    assert everything(table) == []


def test_a_database_without_the_table_is_refused(old_file, empty_d1, clock):
    with pytest.raises(backup.Problem, match=r"no table jobs: run `python -m tools.schema` first"):
        backup.restore(empty_d1, old_file, clock)
    with pytest.raises(backup.Problem, match="none of the tables"):
        backup.export(empty_d1, old_file.with_name("other"), clock)


def damage(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:-1], "cut off"),
        (lambda lines: lines[:3], "cut off"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "cut off"),
        (lambda lines: [*lines[:3], lines[3][:40]], "cut off"),
        (lambda lines: [*lines[:2], *lines[3:]], "is damaged"),
        (lambda lines: [lines[0], lines[1].replace(b"queued", b"runnin"), *lines[2:]], "is damaged"),
        (lambda lines: [*lines[:-1], lines[-1].replace(b'"jobs": 2', b'"jobs": 3')], "is damaged"),
        (lambda lines: [*lines, lines[1]], "cut off"),
        (lambda lines: [], "cut off"),
        (lambda lines: [b'{"a": 1}\n'], "is no file of"),
        (lambda lines: [b"\x89PNG"], "damaged"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_before_anything_is_written(change, says, old_file, empty_d1, table, clock):
    schema.apply(empty_d1)
    damage(old_file, change)

    with pytest.raises(backup.Problem, match=says):
        backup.restore(empty_d1, old_file, clock)

    assert table("SELECT * FROM jobs") == []


def test_a_restore_that_broke_off_is_finished_by_the_next(filled, table, tmp_path, clock, monkeypatch):
    before = everything(table)
    backup.export(filled, tmp_path / "b.jsonl", clock)
    empty(table)
    monkeypatch.setattr(backup, "BATCH_ROWS", 1)
    ask, calls = filled.query, []

    def breaks(statements, **options):
        calls.append(statements)
        if len(calls) == 13:
            raise IndeterminateError("d1_lost", "lost", service="d1")
        return ask(statements, **options)

    monkeypatch.setattr(filled, "query", breaks)
    with pytest.raises(IndeterminateError):
        backup.restore(filled, tmp_path / "b.jsonl", clock)
    assert 0 < len(table("SELECT id FROM jobs")) < len(JOBS)

    backup.restore(filled, tmp_path / "b.jsonl", clock)

    assert everything(table) == before


def test_an_export_that_fails_leaves_no_file_and_one_that_is_there_is_kept(filled, tmp_path, clock, monkeypatch):
    there = tmp_path / "there.jsonl"
    there.write_text("precious")
    with pytest.raises(backup.Problem, match="is there already"):
        backup.export(filled, there, clock)
    ask = filled.query

    def fails(statements, **options):
        if "WITH sizes" in statements[0].sql:
            raise PermanentError("d1_unauthorized", "refused", service="d1")
        return ask(statements, **options)

    monkeypatch.setattr(filled, "query", fails)
    with pytest.raises(PermanentError):
        backup.export(filled, tmp_path / "new.jsonl", clock)

    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["there.jsonl"]
    assert there.read_text() == "precious"


def test_the_file_says_what_it_is_and_is_for_nobody_else(filled, tmp_path, clock):
    path = tmp_path / "b.jsonl"
    backup.export(filled, path, clock)
    first, *rows, last = map(json.loads, path.read_bytes().splitlines())

    assert [found for found in tmp_path.iterdir() if found.is_file()] == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first == {
        "format": "ob-ai-studio backup 1",
        "taken_at": "2026-01-31T23:59:00.000Z",
        "counts": COUNTED,
    }
    others = ["job_metadata", "uploads", "job_uploads", "deliveries"]
    assert [line["table"] for line in rows] == others + ["job_events"] * 3 + ["jobs"] * 7
    assert {line["row"]["id"]: line["row"]["version"] for line in rows[7:]}["d"] == 9007199254740993
    assert last["end"] == first["counts"]


def test_rows_without_a_key_are_nobodys_and_left_out(filled, table, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(backup, "PAGE_ROWS", 1)
    table("INSERT INTO jobs (id, prompt) VALUES (NULL, 'whose?')")

    assert backup.export(filled, tmp_path / "b.jsonl", clock) == counted()


def test_it_leaves_most_calls_to_the_service(filled, tmp_path, clock, monkeypatch):
    left = iter([200, 599, 600, *[1_199] * 19])
    monkeypatch.setattr(filled, "calls_left", lambda: next(left))
    monkeypatch.setattr(filled, "require_calls", lambda number: None)

    backup.export(filled, tmp_path / "b.jsonl", clock)

    assert clock.slept[:2] == [backup.PAUSE] * 2
    assert sum(clock.slept) == 2 * backup.PAUSE


def test_a_long_table_says_how_far_it_is(filled, tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr(backup, "PROGRESS_ROWS", 3)

    backup.export(filled, tmp_path / "b.jsonl", clock)
    backup.restore(filled, tmp_path / "b.jsonl", clock)

    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["job_events: 3 of 3 rows written", "jobs: 3 of 7 rows written", "jobs: 6 of 7 rows written"]
    assert said[3:] == ["job_events: 3 of 3 rows read", "jobs: 3 of 7 rows read", "jobs: 6 of 7 rows read"]


def test_an_export_of_one_engine_is_restored_by_the_other(
    miniflare, cloud_server, filled, table, d1_engine, wire, tmp_path, clock
):
    before = everything(table)
    backup.export(filled, tmp_path / "b.jsonl", clock)
    served = cloud_server.cloud
    other = miniflare if d1_engine.local else D1Engine(served.settings(), served)
    wire.add_passthru(other.settings["CLOUDFLARE_API_BASE"])
    schema.apply(other.connect())

    backup.restore(other.connect(), tmp_path / "b.jsonl", clock)

    assert everything(other.execute) == before


ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(cloud_server):
    env = {**os.environ, **cloud_server.cloud.settings()}

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "tools.backup", *args],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def test_the_commands_say_what_they_did_or_what_is_wrong(command, cloud_server, tmp_path):
    d1, path = cloud_server.cloud.d1, str(tmp_path / "b.jsonl")
    for statement in schema.statements():
        d1.execute(statement)
    d1.execute("INSERT INTO jobs (id, status, created_at) VALUES ('a', 'done', ?)", AT)

    exported, again = command("export", path), command("export", path)
    d1.execute("DELETE FROM jobs")
    restored, nowhere = command("restore", path), command("restore", str(tmp_path / "none"))

    assert (exported.returncode, exported.stdout) == (
        0,
        "\n".join(counted({**dict.fromkeys(COUNTED, 0), "jobs": 1})) + "\n",
    )
    assert (again.returncode, again.stderr) == (1, f"{path} is there already; name another file, or remove it.\n")
    assert (restored.returncode, restored.stdout) == (0, "jobs: 1 rows added, 0 were there\n")
    assert (nowhere.returncode, "No such file" in nowhere.stderr) == (1, True)


def test_after_readmes_sql_nothing_of_a_restored_table_is_sent(bench, table, empty_d1, tmp_path):
    job_id = bench.create("a cat")
    backup.export(empty_d1, tmp_path / "b.jsonl", bench.clock)
    empty(table)
    backup.restore(empty_d1, tmp_path / "b.jsonl", bench.clock)
    sent, calls = len(bench.cloud.runpod.inputs()), bench.cloud.calls["runpod"]
    (sql,) = re.findall(r"```sql\n(UPDATE jobs\nSET status = 'cancelled'[^;]*);\n", (ROOT / "README.md").read_text())

    table(sql)
    bench.round()

    assert (len(bench.cloud.runpod.inputs()), bench.cloud.calls["runpod"]) == (sent, calls)
    assert bench.job(job_id).status == "cancelled"
    assert bench.job(job_id).finished_at


def test_a_row_that_no_call_to_d1_holds_is_left_out_and_named(filled, table, tmp_path, clock):
    table("UPDATE jobs SET error_message = replace(hex(zeroblob(500000)), '0', 'x') WHERE id = 'd'")
    backup.export(filled, tmp_path / "b.jsonl", clock)
    empty(table)

    told = backup.restore(filled, tmp_path / "b.jsonl", clock)

    assert "jobs: 6 rows added, 0 were there" in told
    assert "jobs d is left out: it has 1,5" in told[-1]
    assert len(table("SELECT id FROM jobs")) == 6
