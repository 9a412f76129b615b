"""Loads queries.sql: each statement by its name, with D1's numbered parameters in the place of the named ones."""

import re
from pathlib import Path
from typing import Any

from chalicelib.d1 import Statement


def load_queries(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """
    Each `-- name: x` block as x: (SQL with ?1, ?2…, the names those stand for). {y} is the text of block y above, which
    may be a `-- part: y`, no statement by itself.
    """
    texts: dict[str, str] = {}
    names = []
    _, *blocks = re.split(r"^-- (name|part): (.*)$", text, flags=re.MULTILINE)
    for kind, name, body in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        sql = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("--")).strip()
        texts[name.strip()] = re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], sql)
        names += [name.strip()] if kind == "name" else []
    return {name: _numbered(texts[name]) for name in names}


def _numbered(sql: str) -> tuple[str, tuple[str, ...]]:
    numbers: dict[str, int] = {}
    # The colon first: a search that begins with it is several times as fast, and every cold start makes it.
    sql = re.sub(r":(?<![:\w]:)([a-z_]+)", lambda found: f"?{numbers.setdefault(found[1], len(numbers) + 1)}", sql)
    return sql, tuple(numbers)


QUERIES = load_queries((Path(__file__).parent / "queries.sql").read_text(encoding="utf-8"))


def bind(query: str, values: dict[str, Any]) -> Statement:
    """The named query with the values it asks for; the others are left aside."""
    sql, names = QUERIES[query]
    return Statement(sql, tuple(values[name] for name in names))
