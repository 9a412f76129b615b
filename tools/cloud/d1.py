"""D1's REST protocol over a SQLite file, with D1's limits and its habit of binding every number as REAL."""

import json
import math
import re
import sqlite3
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from tools.cloud import Account, Answer, Request, json_answer, open_database

# https://developers.cloudflare.com/d1/platform/limits/ ; the last three are of the engine itself
LIMITS = {
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 100,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LENGTH: 2_000_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 32,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 5,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
}
TRANSACTION = re.compile(r"\s*(BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE)\b", re.IGNORECASE)
COMMENT_OR_QUOTED = re.compile(r"--[^\n]*|/\*.*?\*/|'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]", re.DOTALL)
# What D1's engine lets through and refuses beside the statements themselves.
ALLOWED_PRAGMAS = {
    "case_sensitive_like", "data_version", "defer_foreign_keys", "foreign_key_check", "foreign_key_list",
    "foreign_keys", "ignore_check_constraints", "index_info", "index_list", "index_xinfo", "legacy_alter_table",
    "optimize", "quick_check", "recursive_triggers", "reverse_unordered_selects", "table_info", "table_list",
    "table_xinfo",
}  # fmt: skip
REFUSED_ACTIONS = {
    sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_CREATE_TEMP_INDEX, sqlite3.SQLITE_CREATE_TEMP_TABLE,
    sqlite3.SQLITE_CREATE_TEMP_TRIGGER, sqlite3.SQLITE_CREATE_TEMP_VIEW,
}  # fmt: skip
MOST_EXACT = 2**53  # the integers up to here are JavaScript's too
RATE_HEADERS = {"ratelimit": '"default";r=1199;t=1', "ratelimit-policy": '"default";q=1200;w=300'}


class D1:
    """One database of one account."""

    def __init__(self, path: Path, account: Account) -> None:
        self._path = f"/client/v4/accounts/{account.account_id}/d1/database/{account.database_id}/query"
        self._account = account
        self._lock = threading.Lock()
        self._connection = open_database(path)
        self._connection.execute("PRAGMA foreign_keys = ON")
        for limit, value in LIMITS.items():
            self._connection.setlimit(limit, value)
        self._connection.set_authorizer(_authorize)

    def handle(self, request: Request) -> Answer:
        """Answer one API call."""
        if refusal := self._refusal(request):
            return refusal
        try:
            statements = _read(json.loads(request.body))
        except (ValueError, TypeError, KeyError) as error:
            return _fail(400, 7400, f"The request is malformed: {error}")
        if not statements:
            return _fail(400, 7500, "No SQL statements detected.")
        return self._run(statements)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def execute(self, sql: str, *params: object) -> list[dict[str, Any]]:
        """Run one statement directly; for tests that look at the table or put old rows into it."""
        with self._lock:
            cursor = self._connection.execute(sql, _numbered(sql, list(params)))
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor]

    @property
    def changes(self) -> int:
        """How many rows were ever written."""
        return self._connection.total_changes

    def _refusal(self, request: Request) -> Answer | None:
        if request.headers.get("authorization") != f"Bearer {self._account.api_token}":
            return _fail(401, 10000, "Authentication error")
        if f"/accounts/{self._account.account_id}/" not in request.path:
            return _fail(403, 7403, "The given account is not valid or is not authorized to access this service")
        if f"/database/{self._account.database_id}/" not in request.path:
            return _fail(404, 7404, "The database could not be found")
        if request.path != self._path or request.method != "POST":
            return _fail(404, 7003, f"Could not route to {request.path}, perhaps your object identifier is invalid?")
        return None

    def _run(self, statements: list[tuple[str, list[Any]]]) -> Answer:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                results = [self._run_one(sql, params) for sql, params in statements]
            except (sqlite3.Error, sqlite3.Warning) as error:
                self._connection.execute("ROLLBACK")
                return _fail(400, 7500, _said(error))
            self._connection.execute("COMMIT")
        return json_answer(200, {"result": results, "errors": [], "messages": [], "success": True}, RATE_HEADERS)

    def _run_one(self, sql: str, params: list[Any]) -> dict[str, Any]:
        if TRANSACTION.match(_bare(sql)):
            raise sqlite3.Warning(
                "To execute a transaction, please use the state.storage.transaction() or"
                " state.storage.transactionSync() APIs instead of the SQL BEGIN TRANSACTION or SAVEPOINT statements."
            )
        cursor = self._connection.execute(sql, _numbered(sql, [_bound(value) for value in params]))
        names = [column[0] for column in cursor.description or ()]
        rows = [dict(zip(names, map(_unbound, row), strict=True)) for row in cursor]
        meta = {
            "served_by": "local",
            "served_by_primary": True,
            "duration": 0,
            "changes": max(cursor.rowcount, 0),
            "total_attempts": 1,
        }
        return {"results": rows, "success": True, "meta": meta}


def _read(body: Any) -> list[tuple[str, list[Any]]]:
    statements = []
    for item in body["batch"] if "batch" in body else [body]:
        parts, params = _split(item["sql"]), item.get("params", [])
        if len(parts) > 1 and params:
            raise ValueError("params with multiple statements is not supported")
        if not isinstance(params, list) or not all(
            value is None or isinstance(value, (str, int, float)) for value in params
        ):
            raise ValueError("invalid params")
        statements += [(part, params) for part in parts]
    return statements


@lru_cache(maxsize=512)
def _split(sql: str) -> tuple[str, ...]:
    parts, current = [], ""
    for piece in re.split(r"(;)", sql):
        current += piece
        if piece == ";" and sqlite3.complete_statement(current):
            parts.append(current)
            current = ""
    return tuple(part for part in [*parts, current] if _bare(part).strip(" \t\r\n;"))


@lru_cache(maxsize=512)
def _bare(sql: str) -> str:
    """The statement without its comments, and with nothing between its quotes."""
    return COMMENT_OR_QUOTED.sub(lambda found: " " if found[0][:2] in ("--", "/*") else "''", sql)


@lru_cache(maxsize=512)
def _numbers(sql: str) -> frozenset[int]:
    return frozenset(int(number) for number in re.findall(r"\?(\d+)", _bare(sql)))


def _numbered(sql: str, values: list[Any]) -> list[Any] | dict[str, Any]:
    # Python's sqlite3 takes a list for ? and wants a dictionary for ?1, of which it looks only at what it needs.
    numbers = _numbers(sql)
    if not numbers:
        return values
    if max(numbers) < len(values):
        raise sqlite3.ProgrammingError("too many values")
    return {str(number): value for number, value in enumerate(values, start=1)}


def _bound(value: Any) -> Any:
    return float(value) if isinstance(value, (int, float)) else value


def _unbound(value: Any) -> Any:
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, int) and abs(value) > MOST_EXACT:
        return int(float(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return int(value) if isinstance(value, float) and abs(value) <= MOST_EXACT and value.is_integer() else value


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    allowed = action not in REFUSED_ACTIONS
    if action == sqlite3.SQLITE_PRAGMA:
        allowed = first in ALLOWED_PRAGMAS
    elif action == sqlite3.SQLITE_FUNCTION:
        allowed = second != "sqlite_version"
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _said(error: sqlite3.Error | sqlite3.Warning) -> str:
    """The error in D1's words, as far as Python lets them through: it drops where in the statement it is."""
    if isinstance(error, sqlite3.ProgrammingError):
        return "Wrong number of parameter bindings for SQL query."
    if isinstance(error, sqlite3.Warning):
        return str(error)
    # Python itself refuses a statement that is too long.
    message = "statement too long" if "query string is too large" in str(error) else str(error)
    full = getattr(
        error, "sqlite_errorname", "SQLITE_TOOBIG" if isinstance(error, sqlite3.DataError) else "SQLITE_ERROR"
    )
    name = "_".join(full.split("_")[:2])
    return f"{message}: {name}" if name == full else f"{message}: {name} (extended: {full})"


def _fail(status: int, code: int, message: str) -> Answer:
    return json_answer(
        status,
        {"result": None, "success": False, "errors": [{"code": code, "message": message}], "messages": []},
        RATE_HEADERS,
    )
