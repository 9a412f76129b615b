"""
Brings the D1 database that the settings name to what the code needs, by the numbered files in changes/.

    python -m tools.schema          applies the changes that the database has not had and says which; safe to repeat
    python -m tools.schema --check  only says which those are, and what of schema.sql is missing beside them; exit
                                    status 1 if anything is

It wants CLOUDFLARE_ACCOUNT_ID, CLOUDFLARE_API_TOKEN and D1_DATABASE_ID. A change only adds, so code that does not know
it goes on; no existing value is touched. A database with a change that this checkout does not know is left as it is.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from chalicelib import bootstrap, settings
from chalicelib.d1 import D1, Row, Statement
from chalicelib.errors import PermanentError, ServiceError
from chalicelib.jobs import to_text
from chalicelib.runtime import Clock
from chalicelib.wire import Wire
from tools import env_file

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "schema.sql"
CHANGES = ROOT / "changes"
D1_SETTINGS = "CLOUDFLARE_|D1_"
TIMEOUT = 60.0  # seconds, so that one try lasts longer than the 30 that D1 works on a request

# The columns that the service writes in every row, never as NULL.
ALWAYS_WRITTEN = {"id", "status", "prompt", "model", "created_at", "updated_at"}


TABLE_AS_IT_IS = (
    """SELECT name, type, "notnull", dflt_value, pk FROM pragma_table_info('jobs')""",
    "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'jobs'",
)


@dataclass(frozen=True)
class Found:
    """
    What a database has: tables and indexes by name, columns as table.column; the changes it has had; and what of the
    earlier version's table does not go together with the rows of this one.
    """

    things: frozenset[str]
    recorded: frozenset[int]
    unfit: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One file of changes/."""

    number: int
    name: str
    statements: tuple[str, ...]

    def things(self) -> set[str]:
        """What it brings, as in Found."""
        return set(map(_brings, self.statements))

    def left(self, found: Found) -> list[str]:
        """Its statements, without those whose repeat would be an error."""
        return [
            statement
            for statement in self.statements
            if not (statement.startswith("ALTER") and _brings(statement) in found.things)
        ]


@dataclass(frozen=True)
class Report:
    """What a database lacks, and the number of a change that it has had and this code does not know."""

    found: Found
    pending: tuple[Change, ...]
    missing: tuple[str, ...]
    unknown: int | None

    def lines(self) -> list[str]:
        """A line for each thing."""
        return [
            *([_unknown(self.unknown)] if self.unknown else []),
            *(f"pending: {change.name}" for change in self.pending),
            *(f"missing: {thing}" for thing in self.missing),
            *(f"unfit: {rule}" for rule in self.found.unfit),
        ]


def statements(path: Path = SCHEMA) -> list[str]:
    """The statements of schema.sql or of a change, without comments."""
    text = re.sub(r"^\s*--.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [statement.strip() for statement in text.split(";") if statement.strip()]


@cache
def changes() -> tuple[Change, ...]:
    """The files of changes/, in their order."""
    return tuple(
        Change(int(path.name[:4]), path.stem, tuple(statements(path))) for path in sorted(CHANGES.glob("*.sql"))
    )


def tables() -> dict[str, tuple[str, ...]]:
    """Each table of schema.sql with the names of its columns."""
    return {table: tuple(columns) for table, columns in definitions().items()}


def definitions() -> dict[str, dict[str, str]]:
    """Each table of schema.sql with its columns, by name: what is said of each, its type first."""
    found = {}
    for statement in statements():
        if match := re.match(r"CREATE TABLE IF NOT EXISTS (\w+) \(\n(.*)\n\)", statement, flags=re.DOTALL):
            lines = (line.strip().rstrip(",").partition(" ") for line in match[2].splitlines() if line.strip())
            found[match[1]] = {name: rules for name, _, rules in lines if name != "PRIMARY"}
    return found


def _brings(statement: str) -> str:
    """What a statement of schema.sql or of a change brings: a table or an index by name, a column as table.column."""
    if match := re.match(r"CREATE (?:TABLE|(?:UNIQUE )?INDEX) IF NOT EXISTS (\w+)", statement):
        return match[1]
    if match := re.match(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", statement):
        return f"{match[1]}.{match[2]}"
    raise ValueError(f"No change may hold this: {statement}")


def check(d1: D1) -> Report:
    """Compare the database with this code's changes and with schema.sql."""
    return _report(_look(d1))


def _look(d1: D1) -> Found:
    wanted = tables()
    asked = ["SELECT name FROM sqlite_master WHERE type IN ('table', 'index')"]
    asked += [f"SELECT '{table}.' || name AS name FROM pragma_table_info('{table}')" for table in wanted]
    *names, columns, made_by = _query(d1, [*asked, *TABLE_AS_IT_IS])
    things = {row["name"] for rows in names for row in rows}
    if "jobs" in things and "jobs.id" not in things:
        raise PermanentError(
            "d1_other_table", "The table `jobs` has no column `id`: it is another program's. Check D1_DATABASE_ID."
        )
    (recorded,) = _query(d1, ["SELECT number FROM schema_changes"]) if "schema_changes" in things else [[]]
    unfit = _unfit(columns, "".join(row["sql"] for row in made_by))
    return Found(frozenset(things), frozenset(row["number"] for row in recorded), tuple(unfit))


def _unfit(columns: list[Row], sql: str) -> Iterator[str]:
    """The rules of a `jobs` table, made by whomever, that the service's rows break, or that break the service."""
    wanted = definitions()["jobs"]
    for column in columns:
        name, kind, required = column["name"], affinity(column["type"]), bool(column["notnull"])
        if name not in wanted:
            if required and column["dflt_value"] is None and not column["pk"]:
                yield f"jobs.{name} must have a value, which the service does not know"
        elif not wanted[name].startswith(kind) and not (name.endswith("_at") and kind == "NUMERIC"):
            yield f"jobs.{name} is {column['type'] or 'of no type'}, not {wanted[name].split()[0]}"
        elif required and name not in ALWAYS_WRITTEN and "NOT NULL" not in wanted[name]:
            yield f"jobs.{name} must have a value, which the service does not always have"
    if columns and [column["name"] for column in columns if column["pk"]] != ["id"]:
        yield "jobs.id is not its primary key"
    for _, ours, rule in (rules.partition("CHECK ") for rules in wanted.values()):
        sql = sql.replace(ours + rule, "") if ours else sql
    if re.search(r"\bCHECK\b", sql, flags=re.IGNORECASE):
        yield "jobs has a CHECK of its own"


def affinity(kind: str) -> str:
    """What SQLite makes of a column's type: https://www.sqlite.org/datatype3.html#determination_of_column_affinity"""
    signs = {"INT": "INTEGER", "CHAR": "TEXT", "CLOB": "TEXT", "TEXT": "TEXT", "BLOB": "BLOB", "REAL": "REAL"}
    return next((named for sign, named in signs.items() if sign in kind.upper()), "NUMERIC" if kind else "BLOB")


def _query(d1: D1, sql: Iterable[str]) -> list[list[Row]]:
    return d1.query([Statement(statement) for statement in sql], timeout=TIMEOUT)


def _report(found: Found) -> Report:
    newest = max(found.recorded, default=0)
    ahead = newest > changes()[-1].number
    pending = tuple(change for change in changes() if change.number not in found.recorded and not ahead)
    to_come = {thing for change in pending for thing in change.things()}
    wanted = [*map(_brings, statements()), *_columns_of(found)]
    missing = tuple(thing for thing in wanted if thing not in found.things | to_come)
    return Report(found, pending, missing, newest if ahead else None)


def _columns_of(found: Found) -> list[str]:
    """The columns that schema.sql has in the tables that are there."""
    return [f"{table}.{name}" for table, names in tables().items() for name in names if table in found.things]


def apply(d1: D1) -> list[str]:
    """
    Apply the changes that the database has not had, and again those of which something is missing; a line for each.

    Does nothing where the database is ahead of this code.
    """
    report = check(d1)
    if report.unknown:
        return []
    if report.found.unfit:
        raise PermanentError(
            "d1_unfit",
            f"The table has rules that the service's rows would break: {'; '.join(report.found.unfit)}. SQLite cannot "
            "take a rule away: export the rows, make another database, run this there, restore them. Nothing was done.",
        )
    again = [change for change in changes() if change.things() & set(report.missing)]
    for change in (*report.pending, *again):
        _apply(d1, change, report.found)
    return [
        *(f"applied: {change.name}" for change in report.pending),
        *(f"applied again, because something of it was missing: {change.name}" for change in again),
    ]


def _apply(d1: D1, change: Change, found: Found) -> None:
    """
    Send what is left of the change and its record as one batch.

    SQLite has no ADD COLUMN IF NOT EXISTS. A run beside this one, or an earlier try whose answer was lost, may have
    added columns since we looked; then we look again, until there is nothing new to see.
    """
    while True:
        try:
            d1.query([*map(Statement, change.left(found)), _record(change)], timeout=TIMEOUT)
            return
        except ServiceError as error:
            seen, found = found, _look(d1)
            if "duplicate column name" not in error.sentence or found == seen:
                raise


def _record(change: Change) -> Statement:
    return Statement(
        "INSERT INTO schema_changes (number, name, applied_at) "
        f"VALUES ({change.number}, ?1, ?2) ON CONFLICT DO NOTHING",
        (change.name, to_text(Clock().now())),
    )


def _unknown(number: int) -> str:
    known = changes()[-1].number
    return (
        f"The database has had change {number}, this code knows those up to {known}: it is an older checkout, which "
        "goes on with this database. Nothing is changed."
    )


def connect(path: Path) -> D1:
    """The database that the settings in the environment and in the file name; raises as settings.load() does."""
    clock = Clock()
    return bootstrap.make_d1(settings.load(env_file=path, only=D1_SETTINGS), Wire(clock), clock)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.schema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say what is pending or missing")
    env_file.add_option(parser)
    options = parser.parse_args()
    try:
        d1 = connect(options.env)
        did = [] if options.check else apply(d1)
        report = check(d1)
    except ServiceError as error:
        sys.exit(error.sentence)
    print("\n".join([*did, *report.lines()]) or "The database has everything the code needs.")
    sys.exit(1 if report.pending or report.missing or report.found.unfit or (options.check and report.unknown) else 0)


if __name__ == "__main__":
    main()
