"""The numbered changes: together they are schema.sql, old code survives each, and a run may break off anywhere."""

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from chalicelib.d1 import MAX_STATEMENTS
from chalicelib.errors import IndeterminateError, ServiceError
from chalicelib.queries import QUERIES
from chalicelib.store import SCHEMA_CHANGE
from tests.unit.test_old_rows import AT, OLD_COLUMNS, OLD_TABLE
from tools import schema

ROOT = Path(__file__).parents[2]
BEFORE_CHANGES = Path(__file__).with_name("schema_before_changes.sql")
STATEMENTS = [(change.number, statement) for change in schema.changes() for statement in change.statements]
ROW = "INSERT INTO jobs (id, status, prompt, model, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)"


@pytest.fixture
def d1_engine(each_d1_engine):
    return each_d1_engine


def shape(table):
    """Every table and index as the engine has it, without the layout: columns, types, defaults, checks, keys."""
    made = {}
    for row in table("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
        if not row["name"].startswith(("_cf_", "sqlite_")):
            bare = re.sub(r"\s+", " ", re.sub(r"--[^\n]*", "", row["sql"]))
            made[row["name"]] = re.sub(r" ?([(),]) ?", r"\1", bare)
    return made


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The shape that schema.sql gives."""
    from tools.cloud import LocalCloud

    cloud = LocalCloud(tmp_path_factory.mktemp("wanted"), base_url="http://wanted.test:1")
    for statement in schema.statements():
        cloud.d1.execute(statement)
    yield shape(cloud.d1.execute)
    cloud.close()


def nothing(table):
    """Leave the database empty."""


def earlier(table):
    table(schema.changes()[0].statements[0])
    table(ROW, "old-1", "done", "an old cat", "qwen-image", AT, AT)
    table(ROW, "old-2", "queued", "แมว", None, AT, AT)


def unnumbered(table):
    for statement in schema.statements(BEFORE_CHANGES):
        table(statement)
    table(ROW, "new-1", "running", "a cat", "qwen-image", AT, AT)


def earlier_and_unnumbered(table):
    earlier(table)
    for statement in schema.changes()[1].statements:
        table(statement)


STARTS = [nothing, earlier, unnumbered, earlier_and_unnumbered]


@pytest.fixture(params=STARTS)
def start(request, table):
    request.param(table)
    return request.param


def rows_of_old_columns(table):
    return table(f"SELECT {', '.join(OLD_COLUMNS)} FROM jobs ORDER BY id")


def recorded(table):
    return [row["number"] for row in table("SELECT number FROM schema_changes ORDER BY number")]


def test_all_changes_give_what_schema_sql_gives_and_touch_no_value(start, table, empty_d1, wanted):
    before = [] if start is nothing else rows_of_old_columns(table)

    did = schema.apply(empty_d1)

    assert did == [f"applied: {change.name}" for change in schema.changes()]
    assert shape(table) == wanted
    assert rows_of_old_columns(table) == before
    assert recorded(table) == [change.number for change in schema.changes()]
    assert (schema.check(empty_d1).lines(), schema.apply(empty_d1)) == ([], [])


def test_a_table_that_is_stricter_than_the_first_change_keeps_its_own_first_columns(table, empty_d1, wanted):
    table(OLD_TABLE)

    schema.apply(empty_d1)

    tail = wanted["jobs"].partition("updated_at TEXT,")[2]
    assert shape(table)["jobs"].partition("updated_at TEXT,")[2] == tail != ""
    assert {**shape(table), "jobs": ""} == {**wanted, "jobs": ""}


@pytest.mark.parametrize("done", range(len(STATEMENTS) + 1))
def test_a_run_that_was_killed_after_any_statement_is_finished_by_the_next(done, table, empty_d1, wanted):
    for number, statement in STATEMENTS[:done]:
        table(statement)
        if statement == schema.changes()[number - 1].statements[-1] and done % 2:  # its record is written, or lost
            table(f"INSERT INTO schema_changes VALUES ({number}, 'x', '')")

    schema.apply(empty_d1)

    assert shape(table) == wanted
    assert recorded(table) == [change.number for change in schema.changes()]


@pytest.mark.parametrize("start", [nothing, earlier], indirect=True)
@pytest.mark.parametrize("after_effect", [False, True])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_run_whose_call_is_lost_may_be_repeated(start, call, after_effect, table, empty_d1, wanted, monkeypatch):
    ask, calls = empty_d1.query, Counter()

    def dies(statements, **options):
        calls["all"] += 1
        if calls["all"] == call and not after_effect:
            raise IndeterminateError("d1_lost", "lost", service="d1")
        rows = ask(statements, **options)
        if calls["all"] == call:
            raise IndeterminateError("d1_lost", "lost", service="d1")
        return rows

    monkeypatch.setattr(empty_d1, "query", dies)
    try:
        schema.apply(empty_d1)
    except ServiceError:
        schema.apply(empty_d1)

    assert calls["all"] > 2
    assert shape(table) == wanted


def test_an_answer_that_is_lost_and_tried_again_inside_one_call_is_no_error(
    table, d1_engine, empty_d1, faults, wanted, monkeypatch
):
    if d1_engine.local is None:
        pytest.skip("faults are put on the wire to the local cloud")
    earlier(table)
    ask = empty_d1.query

    def lost(statements, **options):
        if statements[0].sql.startswith("ALTER"):
            faults.add("POST .*/d1/", (502, "<html>"), after_effect=True)
        return ask(statements, **options)

    monkeypatch.setattr(empty_d1, "query", lost)

    assert schema.apply(empty_d1) == [f"applied: {change.name}" for change in schema.changes()]
    assert shape(table) == wanted


def test_runs_at_once_do_no_harm(d1_engine, table, wanted, cloud_server):
    from tests.engines.engine import D1Engine

    served = D1Engine(cloud_server.cloud.settings(), cloud_server.cloud) if d1_engine.local else d1_engine
    earlier(served.execute)
    barrier, failed = threading.Barrier(4), []

    def run():
        d1 = served.connect()
        ask = d1.query

        def together(statements, **options):
            if statements[0].sql.startswith("ALTER"):
                barrier.wait(10)  # all have looked before one writes
            return ask(statements, **options)

        d1.query = together
        try:
            schema.apply(d1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []
    assert shape(served.execute) == wanted
    assert recorded(served.execute) == [change.number for change in schema.changes()]


def test_a_database_that_is_ahead_is_left_alone_and_said_to_be(table, empty_d1):
    schema.apply(empty_d1)
    table("INSERT INTO schema_changes VALUES (9, '0009_later', '')")
    table("DELETE FROM schema_changes WHERE number = 2")
    table("DROP INDEX jobs_dead")
    before = shape(table)

    assert schema.apply(empty_d1) == []
    assert shape(table) == before
    report = schema.check(empty_d1)
    assert (report.unknown, report.pending, report.missing) == (9, (), ("jobs_dead",))
    assert "The database has had change 9" in report.lines()[0]


@pytest.mark.parametrize(
    ("harm", "missing"),
    [
        ("DROP INDEX jobs_dead", ("jobs_dead",)),
        ("ALTER TABLE jobs DROP COLUMN warnings", ("jobs.warnings",)),
        ("DROP TABLE job_events", ("job_events",)),
    ],
)  # fmt: skip
def test_what_is_missing_of_recorded_changes_is_said_and_brought_again(harm, missing, table, empty_d1):
    schema.apply(empty_d1)
    table(harm)

    assert schema.check(empty_d1).missing == missing
    assert schema.apply(empty_d1) == ["applied again, because something of it was missing: 0002_pipeline"]
    assert schema.check(empty_d1).lines() == []


def test_what_a_pending_change_brings_is_not_called_missing(table, empty_d1):
    earlier(table)

    assert schema.check(empty_d1).lines() == [f"pending: {change.name}" for change in schema.changes()]


def test_statements_of_the_earlier_version_run_on_the_newest_schema(table, empty_d1):
    schema.apply(empty_d1)

    row = ("a", None, "queued", "a cat", "qwen-image", None, None, None, None, AT, AT)
    table(f"INSERT INTO jobs ({', '.join(OLD_COLUMNS)}) VALUES ({', '.join('?' * 11)})", *row)
    table("UPDATE jobs SET status = ?, runpod_job_id = ?, updated_at = ? WHERE id = ?", "running", "run-1", AT, "a")
    (found,) = table("SELECT * FROM jobs WHERE status = ? ORDER BY created_at LIMIT 10", "running")

    assert tuple(found)[:11] == OLD_COLUMNS
    assert (found["runpod_job_id"], found["step"], found["version"]) == ("run-1", None, 0)


def prepared(table, name):
    sql, names = QUERIES[name]
    return table(f"EXPLAIN {sql}", *["[]"] * len(names))


def test_the_queries_need_just_the_changes_up_to_the_one_that_the_store_names(table):
    for number, statement in STATEMENTS:
        if number < SCHEMA_CHANGE:
            table(statement)
    with pytest.raises(Exception, match=r"no such (column|table)|has no column named"):
        [prepared(table, name) for name in QUERIES]

    for number, statement in STATEMENTS:
        if number == SCHEMA_CHANGE:
            table(statement)
    assert all([prepared(table, name) for name in QUERIES])


FORMS = [
    r"CREATE TABLE IF NOT EXISTS \w+ \(.*\)( WITHOUT ROWID)?",
    r"CREATE INDEX IF NOT EXISTS \w+ ON \w+ \(.*\)( WHERE .*)?",
    r"ALTER TABLE \w+ ADD COLUMN \w+ (TEXT|INTEGER|REAL)(?P<rest>.*)",
]
HARMFUL = r"(?i)\b(DROP|RENAME|UPDATE|DELETE|REPLACE|TRIGGER|BEGIN|UNIQUE|REFERENCES|GENERATED|AS SELECT)\b"
# Of a column that the same change brings; old code leaves it NULL.
UNIQUE = r"CREATE UNIQUE INDEX IF NOT EXISTS \w+ ON (\w+) \((\w+)\b.*\) WHERE \2 IS NOT NULL"


def refusal(statement, brought=()):
    """Why code that does not know the change might not survive the statement; None if it does."""
    found = re.fullmatch(UNIQUE, statement)
    if found and f"{found[1]}.{found[2]}" in brought:
        return None
    if found := re.search(HARMFUL, statement):
        return f"{found[0]} may break the code that is still running"
    form = next(filter(None, (re.fullmatch(form, statement, flags=re.DOTALL) for form in FORMS)), None)
    if form is None:
        return "only CREATE TABLE or INDEX IF NOT EXISTS and ALTER TABLE ADD COLUMN"
    rest = form.groupdict().get("rest") or ""
    if re.search(r"DEFAULT (?!('[^']*'|-?\d+(\.\d+)?|NULL)( |$))", rest):
        return "its default is no constant"
    return "a row of old code has no value for it" if "NOT NULL" in rest and "DEFAULT" not in rest else None


@pytest.mark.parametrize(("number", "statement"), STATEMENTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(STATEMENTS)])
def test_old_code_survives_every_statement(number, statement):
    brought = {schema._brings(other) for which, other in STATEMENTS if which == number}

    assert refusal(statement, brought) is None


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE jobs",
        "DROP INDEX jobs_due",
        "ALTER TABLE jobs RENAME COLUMN step TO stage",
        "ALTER TABLE jobs DROP COLUMN step",
        "ALTER TABLE jobs ADD COLUMN x TEXT NOT NULL",
        "ALTER TABLE jobs ADD COLUMN x TEXT NOT NULL DEFAULT (datetime('now'))",
        "ALTER TABLE jobs ADD COLUMN x TEXT DEFAULT CURRENT_TIMESTAMP",
        "ALTER TABLE jobs ADD COLUMN x TEXT UNIQUE",
        "UPDATE jobs SET step = 'poll'",
        "DELETE FROM jobs",
        "INSERT INTO jobs (id) VALUES ('x')",
        "CREATE TABLE x (a TEXT)",
        "CREATE INDEX x ON jobs (id)",
        "CREATE UNIQUE INDEX IF NOT EXISTS x ON jobs (prompt)",
        "CREATE UNIQUE INDEX IF NOT EXISTS x ON jobs (prompt) WHERE prompt IS NOT NULL",
        "CREATE TRIGGER IF NOT EXISTS x AFTER INSERT ON jobs BEGIN SELECT 1; END",
        "create table if not exists x (a TEXT)",
    ],
)
def test_a_statement_that_old_code_may_not_survive_is_refused(statement):
    assert refusal(statement)


def test_the_changes_are_numbered_without_a_gap():
    names = sorted(path.name for path in (ROOT / "changes").iterdir())

    assert [name[:5] for name in names] == [f"{number:04d}_" for number in range(1, len(names) + 1)]
    assert all(re.fullmatch(r"\d{4}_[a-z_]+\.sql", name) for name in names)


@pytest.mark.parametrize("change", schema.changes(), ids=lambda change: change.name)
def test_a_change_and_its_record_are_one_request_that_d1_can_split(change):
    text = (ROOT / "changes" / f"{change.name}.sql").read_bytes().decode("ascii")

    assert "\r" not in text
    assert text.startswith("-- ")
    assert 0 < len(change.statements) < MAX_STATEMENTS
    assert all(";" not in statement and "--" not in statement for statement in change.statements)


@pytest.fixture
def command(cloud_server):
    env = {**os.environ, **cloud_server.cloud.settings()}

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "tools.schema", *args],
            capture_output=True, text=True, env=env, timeout=60, check=False, cwd=ROOT,
        )  # fmt: skip

    return run


def test_the_command_says_that_the_database_is_ahead(command, cloud_server):
    command()
    cloud_server.cloud.d1.execute("INSERT INTO schema_changes VALUES (7, '0007_later', '')")

    check, apply = command("--check"), command()

    assert (check.returncode, apply.returncode) == (1, 0)
    assert "The database has had change 7" in check.stdout
    assert check.stdout == apply.stdout
