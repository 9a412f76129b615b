"""What the service relies on in D1: the same tests run on the local cloud and on Cloudflare's own engine."""

import contextlib
import json

import pytest
import requests

from chalicelib.d1 import Statement
from chalicelib.errors import PermanentError
from tests.engines.engine import D1Engine


@pytest.fixture(params=["local", "miniflare"])
def d1_engine(request):
    if request.param == "miniflare":
        return request.getfixturevalue("miniflare")
    served = request.getfixturevalue("cloud_server").cloud
    return D1Engine(served.settings(), served)


@pytest.fixture
def run(d1_engine):
    """Run statements as one batch, each given as [sql, *params]."""
    d1 = d1_engine.connect()

    def run(*statements):
        return d1.query([Statement(sql, tuple(params)) for sql, *params in statements], timeout=10.0)

    return run


@pytest.fixture
def numbers(run):
    """A table of the numbers one to three."""
    run(["CREATE TABLE t (k TEXT PRIMARY KEY, n INTEGER)"], ["INSERT INTO t VALUES ('a', 1), ('b', 2), ('c', 3)"])


@pytest.mark.parametrize(
    ("second", "message", "code"),
    [
        ("INSERT INTO t VALUES ('a', 2)", "UNIQUE constraint failed: t.k", "d1_row"),
        ("INSERT INTO t VALUES ('b', NULL)", "NOT NULL constraint failed: t.n", "d1_row"),
        ("INSERT INTO t VALUES ('b', -1)", "CHECK constraint failed", "d1_row"),
        ("SELECT value FROM json_each('{')", "malformed JSON", "d1_row"),
        ("SELECT abs(-9223372036854775808)", "integer overflow", "d1_sql"),
        ("SELECT missing FROM t", "no such column: missing", "d1_schema"),
    ],
)
def test_d1_runs_a_batch_as_one_transaction(run, second, message, code):
    run(["CREATE TABLE t (k TEXT PRIMARY KEY, n INTEGER NOT NULL CHECK (n > 0))"])

    with pytest.raises(PermanentError, match=message) as caught:
        run(["INSERT INTO t VALUES ('a', 1)"], [second])

    assert caught.value.code == code
    assert run(["SELECT count(*) AS n FROM t"]) == [[{"n": 0}]]


def test_d1_sees_in_a_batch_what_the_statements_before_did(run, numbers):
    assert run(["UPDATE t SET n = n + 1"], ["SELECT sum(n) AS n FROM t"], ["DELETE FROM t"], ["SELECT * FROM t"]) == [
        [],
        [{"n": 9}],
        [],
        [],
    ]


def test_d1_binds_numbers_as_real_and_json_each_keeps_integers(run):
    assert run(
        ["SELECT typeof(?1) AS type, ?1 || '' AS text, CAST(?1 AS INTEGER) || '' AS cast_back", 5],
        ["SELECT typeof(json_extract(value, '$.n')) AS type FROM json_each(?1)", '[{"n": 5}, {"n": 5.5}, {"n": null}]'],
        ["SELECT typeof(?1) AS yes, ?2 AS no, typeof(?3) AS empty", True, False, None],
    ) == [
        [{"type": "real", "text": "5.0", "cast_back": "5"}],
        [{"type": "integer"}, {"type": "real"}, {"type": "null"}],
        [{"yes": "real", "no": 0, "empty": "null"}],
    ]


def test_d1_keeps_integers_in_integer_columns_and_text_in_text_columns(run):
    run(["CREATE TABLE t (i INTEGER, s TEXT)"], ["INSERT INTO t VALUES (?1, ?2), (?2, ?1)", 7, "7"])

    assert run(["SELECT typeof(i) AS i, typeof(s) AS s, s AS text FROM t"]) == [
        [{"i": "integer", "s": "text", "text": "7"}, {"i": "integer", "s": "text", "text": "7.0"}]
    ]


def test_d1_gives_numbers_back_as_javascript_has_them(run):
    ((row,),) = run(
        ["SELECT 1 AS i, 1.0 AS whole, -0.5 AS half, 1e300 AS large, 9e999 AS endless, 9007199254740993 AS rounded,"
         " NULL AS empty, x'00ff' AS blob, 1 AS twice, 2 AS twice"]
    )  # fmt: skip

    assert row == {
        "i": 1,
        "whole": 1,
        "half": -0.5,
        "large": 1e300,
        "endless": None,
        "rounded": 9007199254740992,
        "empty": None,
        "blob": [0, 255],
        "twice": 2,
    }
    assert isinstance(row["whole"], int)


REFUSED = {
    "syntax": (["SELEC 1"], "syntax error", "d1_sql"),
    "unfinished": (["SELECT ("], "incomplete input", "d1_sql"),
    "no table": (["SELECT * FROM missing"], "no such table: missing", "d1_schema"),
    "begin": (["BEGIN"], "To execute a transaction", "d1_sql"),
    "commit": (["COMMIT"], "To execute a transaction", "d1_sql"),
    "savepoint": (["SAVEPOINT a"], "To execute a transaction", "d1_sql"),
    "101 params": ([f"SELECT {','.join('?' * 101)}"], "too many SQL variables", "d1_sql"),
    "parameter 101": (["SELECT ?101"], r"variable number must be between \?1 and \?100", "d1_sql"),
    "too long": ([f"SELECT '{'x' * 100_001}'"], "statement too long: SQLITE_TOOBIG", "d1_row"),
    "no params": (["SELECT ?1, ?2"], "Wrong number of parameter bindings", "d1_sql"),
    "a param too few": (["SELECT ?1, ?2", "a"], "Wrong number of parameter bindings", "d1_sql"),
    "a param too many": (["SELECT ?1", "a", "b"], "Wrong number of parameter bindings", "d1_sql"),
    "a param for none": (["SELECT 1", "a"], "Wrong number of parameter bindings", "d1_sql"),
    "a nameless param too few": (["SELECT ?, ?", "a"], "Wrong number of parameter bindings", "d1_sql"),
    "six selects": (["SELECT 1" + " UNION ALL SELECT 1" * 5], "too many terms in compound SELECT", "d1_sql"),
    "a long pattern": (["SELECT 'x' LIKE ?1", "x" * 51], "LIKE or GLOB pattern too complex", "d1_sql"),
    "101 columns": ([f"CREATE TABLE t ({','.join(f'c{n}' for n in range(101))})"], "too many columns", "d1_sql"),
    "begin after a comment": (["-- BEGIN\n/* ; */ begin"], "To execute a transaction", "d1_sql"),
    "end": (["END"], "To execute a transaction", "d1_sql"),
    "the version": (["SELECT sqlite_version()"], "not authorized to use function: sqlite_version", "d1_sql"),
    "a temporary table": (["CREATE TEMP TABLE x (a)"], "not authorized: SQLITE_AUTH", "d1_read_only"),
    "a value too large": (["SELECT zeroblob(9000000)"], "string or blob too big: SQLITE_TOOBIG", "d1_row"),
    "another database": (["ATTACH 'x.db' AS x"], "not authorized", "d1_read_only"),
    "nothing": ([";"], "No SQL statements detected", "d1_sql"),
}


@pytest.mark.parametrize(("statement", "message", "code"), REFUSED.values(), ids=REFUSED)
def test_d1_refuses_a_statement_for_the_same_reason_everywhere(run, statement, message, code):
    with pytest.raises(PermanentError, match=message) as caught:
        run(statement)

    assert caught.value.code == code


@pytest.mark.parametrize(
    ("pragma", "allowed"),
    [
        ("table_info(t)", True),
        ("table_list", True),
        ("index_list(t)", True),
        ("quick_check", True),
        ("foreign_keys", True),
        ("defer_foreign_keys = on", True),
        ("TABLE_LIST", False),
        ("function_list", False),
        ("pragma_list", False),
        ("module_list", False),
        ("user_version", False),
        ("journal_mode", False),
        ("integrity_check", False),
        ("writable_schema = on", False),
        ("database_list", False),
    ],
)
def test_d1_takes_only_some_pragmas(run, pragma, allowed):
    taken = contextlib.nullcontext() if allowed else pytest.raises(PermanentError, match="not authorized: SQLITE_AUTH")
    with taken:
        run([f"PRAGMA {pragma}"])


def test_d1_takes_what_is_just_within_its_limits(run):
    run(
        [f"SELECT {','.join('?' * 100)}", *["x"] * 100],
        ["SELECT 1" + " UNION ALL SELECT 1" * 4],
        ["SELECT 'x' LIKE ?1", "x" * 50],
        [f"CREATE TABLE wide ({','.join(f'c{n}' for n in range(100))})"],
        [f"SELECT 1 AS n -- {'x' * 99_900}"],
    )

    assert run([f"SELECT column1 AS n FROM (VALUES {','.join(['(1)'] * 600)})"]) == [[{"n": 1}] * 600]


@pytest.mark.parametrize(
    ("other", "code", "says"),
    [
        ({"token": "wrong"}, "d1_unauthorized", "Authentication error"),
        ({"account_id": "wrong"}, "d1_account", "given account is not valid"),
        ({"database_id": "wrong"}, "d1_not_found", "could not be found"),
    ],
)
def test_d1_knows_its_own(d1_engine, other, code, says):
    with pytest.raises(PermanentError, match=says) as caught:
        d1_engine.connect(**other).query([Statement("SELECT 1")], timeout=10.0)

    assert caught.value.code == code


@pytest.fixture
def post(d1_engine):
    """A request as no client of ours would make it."""
    there = d1_engine.settings
    account, database = there["CLOUDFLARE_ACCOUNT_ID"], there["D1_DATABASE_ID"]
    url = f"{there['CLOUDFLARE_API_BASE']}/accounts/{account}/d1/database/{database}"

    def post(body, path="query"):
        headers = {"Authorization": f"Bearer {there['CLOUDFLARE_API_TOKEN']}"}
        return requests.post(f"{url}/{path}", data=body, headers=headers, timeout=10)

    return post


def test_d1_takes_several_statements_only_without_params(post):
    several = post(json.dumps({"sql": "SELECT ';' AS x; -- one;\nSELECT 2 AS y;"}))
    refused = post(json.dumps({"sql": "SELECT ?1; SELECT 2", "params": [1]}))

    assert [part["results"] for part in several.json()["result"]] == [[{"x": ";"}], [{"y": 2}]]
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (400, 7400)


@pytest.mark.parametrize(
    ("body", "path", "status", "code"),
    [
        ("{", "query", 400, 7400),
        ("null", "query", 400, 7400),
        ('{"sql": 1}', "query", 400, 7400),
        ('{"sql": "SELECT ?1", "params": [[1]]}', "query", 400, 7400),
        ('{"sql": "SELECT ?1", "params": {"a": 1}}', "query", 400, 7400),
        ('{"sql": "SELECT 1"}', "elsewhere", 404, 7003),
    ],
)
def test_d1_refuses_a_malformed_request(post, body, path, status, code):
    answer = post(body, path)

    assert (answer.status_code, answer.json()["success"]) == (status, False)
    assert answer.json()["errors"][0]["code"] == code


def test_d1_tells_how_many_calls_are_left(d1_engine):
    d1 = d1_engine.connect()
    d1.query([Statement("SELECT 1")], timeout=10.0)

    assert d1.calls_left() == 1199


def test_d1_changes_many_rows_by_one_json_text_and_returns_them(run, numbers):
    rows = json.dumps([{"k": "a", "n": 100}, {"k": "b", "n": 2.0}, {"k": "nobody", "n": 1}])

    changed, types = run(
        [
            "UPDATE t SET n = json_extract(row.value, '$.n') FROM json_each(?1) AS row"
            " WHERE t.k = json_extract(row.value, '$.k') RETURNING t.k, t.n",
            rows,
        ],
        ["SELECT DISTINCT typeof(n) AS type FROM t"],
    )

    assert sorted(changed, key=lambda row: row["k"]) == [{"k": "a", "n": 100}, {"k": "b", "n": 2}]
    assert types == [{"type": "integer"}]


def test_d1_inserts_or_changes_by_one_json_text(run, numbers):
    upsert = (
        "INSERT INTO t (k, n) SELECT value ->> 'k', value ->> 'n' FROM json_each(?1) WHERE true"
        " ON CONFLICT (k) DO UPDATE SET n = excluded.n WHERE excluded.n > t.n RETURNING k, n"
    )
    ignore = upsert.partition("DO UPDATE")[0] + "DO NOTHING RETURNING k"
    rows = json.dumps([{"k": "a", "n": 9}, {"k": "b", "n": 1}, {"k": "d", "n": 4}])

    assert run([upsert, rows], [ignore, rows]) == [[{"k": "a", "n": 9}, {"k": "d", "n": 4}], []]


def test_d1_has_window_functions_and_row_values(run, numbers):
    assert run(
        ["SELECT k, row_number() OVER w AS nth, sum(n) OVER w AS total FROM t WINDOW w AS (ORDER BY n DESC, k)"],
        ["SELECT k FROM t WHERE (n, k) < (?1, ?2) ORDER BY n DESC, k DESC LIMIT CAST(?3 AS INTEGER)", 3, "c", 1],
    ) == [
        [{"k": "c", "nth": 1, "total": 3}, {"k": "b", "nth": 2, "total": 5}, {"k": "a", "nth": 3, "total": 6}],
        [{"k": "b"}],
    ]


def test_d1_takes_a_number_inside_quotes_or_a_comment_for_no_parameter(run):
    assert run(["SELECT '?2' AS \"?3\" -- ?4\n"], ["SELECT '?2' AS x, ?1 AS y /* ?9 */", "a"]) == [
        [{"?3": "?2"}],
        [{"x": "?2", "y": "a"}],
    ]


def test_d1_takes_a_limit_that_is_bound_without_a_cast(run, numbers):
    assert run(["SELECT k FROM t ORDER BY k LIMIT ?1", 1]) == [[{"k": "a"}]]


def test_d1_takes_an_unknown_name_in_double_quotes_for_a_text(run, numbers):
    assert run(['SELECT "nothing" AS x, "k" FROM t WHERE k = "a"']) == [[{"x": "nothing", "k": "a"}]]


def test_d1_compares_text_and_numbers_as_different(run):
    assert run(["SELECT 5 = '5' AS same, ?1 = '5' AS bound, ?2 = 5 AS text", 5, "5"]) == [
        [{"same": 0, "bound": 0, "text": 0}]
    ]


@pytest.mark.parametrize(
    ("sent", "kept", "length"),
    [
        ("แมวสีส้มนั่งบนดวงจันทร์", "แมวสีส้มนั่งบนดวงจันทร์", 23),
        ("🐈‍⬛ e\u0301 \u2028 \ufeff", "🐈‍⬛ e\u0301 \u2028 \ufeff", 10),
        ("half \ud83d here", "half ? here", 11),
        ("'; DROP TABLE t; --", "'; DROP TABLE t; --", 19),
        ('\x01\x1f\x7f\t\r\n\\"', '\x01\x1f\x7f\t\r\n\\"', 8),
        ("a\x00b", "a\x00b", 1),
        ("", "", 0),
    ],
    ids=["Thai", "emoji", "half a character", "quotes", "controls", "NUL", "empty"],
)
def test_d1_keeps_text_as_it_is(run, sent, kept, length):
    run(["CREATE TABLE t (s TEXT)"], ["INSERT INTO t VALUES (?1)", sent])

    assert run(["SELECT s, length(s) AS n FROM t"]) == [[{"s": kept, "n": length}]]


def test_d1_keeps_text_inside_json_as_it_is(run):
    text = 'แมว 🐈 "quoted" \\ \x01 \u2028'

    assert run(["SELECT json_extract(value, '$.s') AS s FROM json_each(?1)", json.dumps([{"s": text}])]) == [
        [{"s": text}]
    ]


def test_d1_takes_a_text_of_the_size_of_a_request(run):
    text = "ก" * 290_000

    assert run(["SELECT length(?1) AS n, ?1 AS s", text]) == [[{"n": 290_000, "s": text}]]
