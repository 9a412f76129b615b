"""
Brings the D1 database that the settings name to what the code needs.

    python -m tools.schema          adds what is missing and says what it did; safe to repeat
    python -m tools.schema --check  only says what is missing; exit status 1 if anything is

It reads CLOUDFLARE_ACCOUNT_ID, CLOUDFLARE_API_TOKEN and D1_DATABASE_ID from the environment or .env.local. Columns are
added one by one, then schema.sql is run. No existing value is touched, nothing is dropped.
"""

import argparse
import re
import sys
from pathlib import Path

from chalicelib import bootstrap, settings
from chalicelib.d1 import D1, Statement
from chalicelib.errors import PermanentError, ServiceError
from chalicelib.runtime import Clock
from chalicelib.wire import Wire

SCHEMA = Path(__file__).parent.parent / "schema.sql"
D1_SETTINGS = "CLOUDFLARE_|D1_"
TIMEOUT = 30.0  # seconds, the longest that D1 works on one request


def statements() -> list[str]:
    """The statements of schema.sql, without comments."""
    text = re.sub(r"^\s*--.*$", "", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def tables() -> dict[str, dict[str, str]]:
    """Each table of schema.sql with its columns, by name: the line that defines each."""
    found = {}
    for statement in statements():
        if match := re.match(r"CREATE TABLE IF NOT EXISTS (\w+) \(\n(.*)\n\)", statement, flags=re.DOTALL):
            lines = [line.strip().rstrip(",") for line in match[2].splitlines() if line.strip()]
            found[match[1]] = {line.split()[0]: line for line in lines if not line.startswith("PRIMARY KEY")}
    return found


def indexes() -> list[str]:
    """The names of the indexes in schema.sql."""
    found = (re.match(r"CREATE INDEX IF NOT EXISTS (\w+)", statement) for statement in statements())
    return [match[1] for match in found if match]


def missing(d1: D1) -> tuple[list[str], list[str]]:
    """What the database lacks: statements that add columns to tables it has, and names of tables and indexes."""
    wanted = tables()
    there = _names(d1, "SELECT name FROM sqlite_master WHERE type IN ('table', 'index')")
    columns = []
    for table in wanted.keys() & there:
        has = _names(d1, f"SELECT name FROM pragma_table_info('{table}')")
        if "id" in wanted[table] and "id" not in has:
            raise SystemExit(f"The table `{table}` has no column `id`: it is another program's. Check D1_DATABASE_ID.")
        columns += [f"ALTER TABLE {table} ADD COLUMN {line}" for name, line in wanted[table].items() if name not in has]
    return columns, [name for name in (*wanted, *indexes()) if name not in there]


def _names(d1: D1, sql: str) -> set[str]:
    return {row["name"] for row in d1.query([Statement(sql)], timeout=TIMEOUT)[0]}


def apply(d1: D1) -> list[str]:
    """Add what is missing; a line for each thing that was done."""
    columns, objects = missing(d1)
    for statement in columns:
        _add_column(d1, statement)
    if objects:
        d1.query([Statement(statement) for statement in statements()], timeout=TIMEOUT)
    return [*(_said(statement) for statement in columns), *(f"created {name}" for name in objects)]


def _add_column(d1: D1, statement: str) -> None:
    try:
        d1.query([Statement(statement)], timeout=TIMEOUT)
    except PermanentError as error:
        # A repeat after a lost answer, or a run of this beside us, finds the column already there.
        if "duplicate column name" not in error.sentence:
            raise


def _said(statement: str) -> str:
    words = statement.split()
    return f"added column {words[2]}.{words[5]}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.schema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    check = parser.parse_args().check
    try:
        clock = Clock()
        d1 = bootstrap.make_d1(settings.load(only=D1_SETTINGS), Wire(clock), clock)
        if check:
            columns, objects = missing(d1)
            lines = [
                *(f"missing: {_said(statement).removeprefix('added ')}" for statement in columns),
                *(f"missing: {name}" for name in objects),
            ]
        else:
            lines = apply(d1)
    except ServiceError as error:
        sys.exit(error.sentence)
    print("\n".join(lines) if lines else "The database has everything the code needs.")
    sys.exit(1 if check and lines else 0)


if __name__ == "__main__":
    main()
