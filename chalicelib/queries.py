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
    for kind, block in re.findall(r"^-- (name|part): (.*?)(?=^-- (?:name|part): |\Z)", text, re.MULTILINE | re.DOTALL):
        name, _, body = block.partition("\n")
        sql = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("--")).strip()
        texts[name.strip()] = re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], sql)
        names += [name.strip()] if kind == "name" else []
    return {name: _numbered(texts[name]) for name in names}


def _numbered(sql: str) -> tuple[str, tuple[str, ...]]:
    names = tuple(dict.fromkeys(re.findall(r"(?<![:\w]):([a-z_]+)", sql)))
    for number, parameter in enumerate(names, start=1):
        sql = re.sub(rf":{parameter}\b", f"?{number}", sql)
    return sql, names


QUERIES = load_queries((Path(__file__).parent / "queries.sql").read_text(encoding="utf-8"))


def bind(query: str, values: dict[str, Any]) -> Statement:
    """The named query with the values it asks for; the others are left aside."""
    sql, names = QUERIES[query]
    return Statement(sql, tuple(values[name] for name in names))
