"""
Writes the tables of the D1 database that the settings name into a file, and brings such a file back.

    python -m tools.backup export FILE   every row, one JSON line each; FILE must not be there yet
    python -m tools.backup restore FILE  adds the rows that the database does not have; safe to repeat

It reads CLOUDFLARE_ACCOUNT_ID, CLOUDFLARE_API_TOKEN and D1_DATABASE_ID from the environment or the file. A row that
is in the database stays as it is there. The record of the schema's changes is left out: it tells of a database, not of
jobs.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from chalicelib.d1 import D1, Row, Statement
from chalicelib.errors import ServiceError
from chalicelib.jobs import to_text
from chalicelib.runtime import Clock
from tools import Problem, env_file, schema

FORMAT = "ob-ai-studio backup 1"
TIMEOUT = 60.0  # seconds, for all tries of a call
PAGE_ROWS = 2_000
PAGE_BYTES = 4_000_000  # of a page's values, but that its last row may go over it
BATCH_BYTES = 400_000
ROW_BYTES = 890_000  # of a line, which is about what a call to D1 holds
BATCH_ROWS = 500
PROGRESS_ROWS = 10_000
CALLS_FOR_OTHERS = 600  # of Cloudflare's 1,200 in five minutes, which the service shares
PAUSE = 5.0  # seconds
NOT_EXPORTED = ("schema_changes", "endpoint_faults")

# A value as text, its type before it: numbers in D1's own answers are JavaScript's, which rounds and knows no 1.0.
TYPED = (
    """CASE typeof("{0}") WHEN 'text' THEN 't' || "{0}" WHEN 'integer' THEN 'i' || "{0}" """
    """WHEN 'real' THEN 'r' || printf('%!.17g', "{0}") WHEN 'blob' THEN 'b' END AS "{0}\""""
)


@dataclass(frozen=True)
class Table:
    """A table as the database has it."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    def page(self, after: Row | None) -> Statement:
        """The next rows in the order of the key, with typed values. (A TEXT key may be NULL; that row is nobody's.)"""
        key = _names(self.key)
        begin = f'"{self.key[0]}" IS NOT NULL'
        if after is not None:
            # As text: D1 binds numbers as REAL, which is not exact.
            last = (
                f"CAST(?{n} AS INTEGER)" if isinstance(after[name], int) else f"?{n}"
                for n, name in enumerate(self.key, start=1)
            )
            begin += f" AND ({key}) > ({', '.join(last)})"
        # length() of a text ends at NUL
        size = " + ".join(f'coalesce(length(CAST("{name}" AS BLOB)), 0)' for name in self.columns)
        return Statement(
            f"""
            WITH sizes AS (
              SELECT {key}, {size} AS size FROM {self.name} WHERE {begin} ORDER BY {key} LIMIT {PAGE_ROWS}
            ), page AS (
              SELECT {key}, sum(size) OVER (ORDER BY {key} ROWS UNBOUNDED PRECEDING) - size AS size_before FROM sizes
            )
            SELECT {", ".join(TYPED.format(name) for name in self.columns)}
            FROM page JOIN {self.name} USING ({key})
            WHERE size_before < {PAGE_BYTES}
            ORDER BY {", ".join(f'page."{name}"' for name in self.key)}
            """,
            tuple(str(after[name]) for name in self.key) if after is not None else (),
        )


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def tables(d1: D1) -> list[Table]:
    """
    Those tables of schema.sql that the database has, but for what is of this database and moment alone; `jobs` last, so
    that of a job that goes on meanwhile a line of the timeline may be missing rather than one too many be there.
    """
    names = sorted((name for name in schema.tables() if name not in NOT_EXPORTED), key="jobs".__eq__)
    asked = [Statement(f"SELECT name, pk FROM pragma_table_info('{name}')") for name in names]
    found = []
    for name, columns in zip(names, d1.query(asked, timeout=TIMEOUT), strict=True):
        if columns:
            key = sorted((row["pk"], row["name"]) for row in columns if row["pk"])
            found.append(Table(name, tuple(row["name"] for row in columns), tuple(column for _, column in key)))
    return found


def export(d1: D1, path: Path, clock: Clock) -> list[str]:
    """Write every row into a new file; a line for each table. Raises Problem and what D1.query raises."""
    if path.exists():
        raise Problem(f"{path} is there already; name another file, or remove it.")
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # of mode 0600
    try:
        with open(descriptor, "wb") as file:
            written = _write(d1, file, clock)
            file.flush()
            os.fsync(descriptor)
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return [f"{name}: {count} rows" for name, count in written.items()]


def _write(d1: D1, file: BinaryIO, clock: Clock) -> dict[str, int]:
    found = tables(d1)
    if not found:
        raise Problem("The database has none of the tables that there are to export. Check D1_DATABASE_ID.")
    counts = {table.name: _count(d1, table) for table in found}
    digest = hashlib.sha256()

    def write(line: dict[str, Any]) -> None:
        # Lone surrogates, which SQLite may give back of broken text, have no UTF-8 form.
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        digest.update(data)
        file.write(data)

    write({"format": FORMAT, "taken_at": to_text(clock.now()), "counts": counts})
    written = dict.fromkeys(counts, 0)
    for table in found:
        for row in _rows(d1, table, clock):
            write({"table": table.name, "row": row})
            written[table.name] += 1
            _say_progress("written", table.name, written[table.name], counts[table.name])
    write({"end": written, "sha256": digest.hexdigest()})
    return written


def _count(d1: D1, table: Table) -> int:
    sql = f"SELECT count(*) AS n FROM {table.name} WHERE {table.key[0]} IS NOT NULL"
    count: int = d1.query([Statement(sql)], timeout=TIMEOUT)[0][0]["n"]
    return count


def _rows(d1: D1, table: Table, clock: Clock) -> Iterator[Row]:
    after: Row | None = None
    while True:
        page = _ask(d1, table.page(after), clock)
        if not page:
            return
        for typed in page:
            after = {name: _value(text) for name, text in typed.items()}
            yield after


def _ask(d1: D1, statement: Statement, clock: Clock) -> list[Row]:
    while (calls_left := d1.calls_left()) is not None and calls_left < CALLS_FOR_OTHERS:
        clock.sleep(PAUSE)
    return d1.query([statement], timeout=TIMEOUT)[0]


def _value(typed: str | None) -> str | int | float | None:
    if typed is None:
        return None
    kind, text = typed[0], typed[1:]
    if kind == "b":
        raise Problem("A row holds a BLOB, which no version of this service writes; it cannot be exported.")
    return text if kind == "t" else int(text) if kind == "i" else float(text)


def _say_progress(verb: str, table: str, done: int, of: int) -> None:
    if done % PROGRESS_ROWS == 0:
        print(f"{table}: {done:,} of {of:,} rows {verb}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Contents:
    """What a whole, undamaged file holds: rows and columns by table, jobs that were live, rows too large for D1."""

    rows: dict[str, int]
    columns: dict[str, tuple[str, ...]]
    live: int
    too_large: list[str]


def read_contents(path: Path) -> Contents:
    """Read the file to its end. Raises Problem where it is cut, damaged, or no export."""
    rows: Counter[str] = Counter()
    columns: dict[str, tuple[str, ...]] = {}
    live, too_large = 0, []
    digest, sealed, end = hashlib.sha256(), "", {}
    with path.open("rb") as file:
        for number, data in enumerate(file):
            line = _read_line(data, number)
            if number == 0 and line.get("format") != FORMAT:
                raise Problem(f"{path} is no file of `python -m tools.backup export`.")
            if "row" in line:
                rows[line["table"]] += 1
                columns[line["table"]] = tuple(line["row"])
                live += line["table"] == "jobs" and line["row"].get("status") in ("queued", "running")
                if len(data) > ROW_BYTES:
                    name = line["row"].get("id") or line["row"].get("job_id")
                    too_large.append(
                        f"{line['table']} {name} is left out: it has {len(data):,} bytes, too many for D1."
                    )
            sealed, end = digest.hexdigest(), line
            digest.update(data)
    if not isinstance(end.get("end"), dict):
        raise Problem(f"{path} is cut off: its last line is missing. Nothing was written.")
    if end["sha256"] != sealed or {name: count for name, count in end["end"].items() if count} != rows:
        raise Problem(f"{path} is damaged: it is not what was exported. Nothing was written.")
    return Contents(end["end"], columns, live, too_large)


def _read_line(data: bytes, number: int) -> dict[str, Any]:
    try:
        line = json.loads(data)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise Problem(f"Line {number + 1} is cut off or damaged. Nothing was written.")
    return line


def restore(d1: D1, path: Path, clock: Clock) -> list[str]:
    """Add the rows that the database does not have; a line for each table. Raises Problem and what D1.query raises."""
    contents = read_contents(path)
    there = {table.name: table.columns for table in tables(d1)}
    for name, columns in contents.columns.items():
        if name not in there:
            raise Problem(f"The database has no table {name}: run `python -m tools.schema` first. Nothing was written.")
        if unknown := [column for column in columns if column not in there[name]]:
            ours = schema.definitions()[name]
            mend = "run `python -m tools.schema` first" if set(unknown) <= ours.keys() else "add it (ALTER TABLE) first"
            raise Problem(f"The table {name} has no column {', '.join(unknown)}: {mend}. Nothing was written.")
    added: Counter[str] = Counter()
    read: Counter[str] = Counter()
    for name, batch in _batches(path):
        added[name] += _insert(d1, name, contents.columns[name], batch, clock)
        for _ in batch:
            read[name] += 1
            _say_progress("read", name, read[name], contents.rows[name])
    lines = [f"{name}: {added[name]} rows added, {count - added[name]} were there" for name, count in read.items()]
    live = [f"{contents.live} jobs were live when this was exported."] if contents.live else []
    return [*lines, *live, *contents.too_large]


def _batches(path: Path) -> Iterator[tuple[str, list[Row]]]:
    """The rows of one table after the other, in groups that one call may carry."""
    batch: list[Row] = []
    size, table = 0, ""
    with path.open("rb") as file:
        for data in file:
            line = json.loads(data)
            if "row" not in line or len(data) > ROW_BYTES:
                continue
            full = size + len(data) > BATCH_BYTES or len(batch) == BATCH_ROWS
            if batch and (full or line["table"] != table):
                yield table, batch
                batch, size = [], 0
            table = line["table"]
            batch.append(line["row"])
            size += len(data)
    if batch:
        yield table, batch


def _insert(d1: D1, table: str, columns: tuple[str, ...], rows: list[Row], clock: Clock) -> int:
    """Insert those that are not there; how many those were."""
    together = [row for row in rows if not _needs_own_call(row)]
    statements = [_insert_one(table, columns, row) for row in rows if _needs_own_call(row)]
    if together:
        statements.append(_insert_many(table, columns, together))
    return sum(len(_ask(d1, statement, clock)) for statement in statements)


def _needs_own_call(row: Row) -> bool:
    """Whether it does not pass as JSON: SQLite ends a text there at NUL, and all quotes are escaped once more."""
    text = json.dumps(row, ensure_ascii=False)
    return "\\u0000" in text or len(text.encode()) > BATCH_BYTES


def _insert_many(table: str, columns: tuple[str, ...], rows: list[Row]) -> Statement:
    values = ", ".join(f"""json_extract(value, '$."{name}"')""" for name in columns)
    source = f"SELECT {values} FROM json_each(?1) WHERE true"
    return Statement(_into(table, columns, source), (json.dumps(rows, ensure_ascii=False),))


def _insert_one(table: str, columns: tuple[str, ...], row: Row) -> Statement:
    """The values as parameters. D1 binds numbers as REAL; an integer goes as text, of which its column makes one."""
    params = tuple(str(row[name]) if isinstance(row[name], int) else row[name] for name in columns)
    return Statement(_into(table, columns, f"VALUES ({', '.join('?' * len(columns))})"), params)


def _into(table: str, columns: tuple[str, ...], source: str) -> str:
    return f"INSERT INTO {table} ({_names(columns)}) {source} ON CONFLICT DO NOTHING RETURNING 1 AS added"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.backup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["export", "restore"])
    parser.add_argument("file", type=Path)
    env_file.add_option(parser)
    options = parser.parse_args()
    try:
        d1 = schema.connect(options.env)
        lines = export(d1, options.file, Clock()) if options.action == "export" else restore(d1, options.file, Clock())
    except (ServiceError, OSError, Problem) as error:
        sys.exit(error.sentence if isinstance(error, ServiceError) else str(error))
    print("\n".join(lines) or "There was nothing to restore.")


if __name__ == "__main__":
    main()
