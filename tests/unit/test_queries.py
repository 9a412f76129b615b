"""The SQL itself: it is loaded as written, prepared on the engine, and looks rows up instead of reading all of them."""

import re

import pytest

from chalicelib.jobs import TRANSITIONS
from chalicelib.queries import QUERIES, load_queries
from tests.engines.engine import D1Engine
from tools import schema
from tools.cloud import LocalCloud


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    cloud = LocalCloud(tmp_path_factory.mktemp("queries"), base_url="http://queries.test:1")
    for statement in schema.statements():
        cloud.d1.execute(statement)
    yield D1Engine(cloud.settings(), cloud)
    cloud.close()


@pytest.fixture(scope="module", params=["local", "miniflare"])
def table(request):
    """Each engine with the schema, once for all queries: a plan changes nothing."""
    if request.param == "local":
        return request.getfixturevalue("local").execute
    engine = request.getfixturevalue("_miniflare")
    engine.clear()
    schema.apply(engine.connect())
    return engine.execute


def test_a_query_is_its_sql_and_the_names_in_their_order():
    text = "-- head\n\n-- name: one\n-- Why.\nSELECT :b, :a, :b -- end\n-- in\nFROM t\n\n-- name: two\nSELECT 2\n"

    queries = load_queries(text)

    assert queries == {"one": ("SELECT ?1, ?2, ?1 -- end\nFROM t", ("b", "a")), "two": ("SELECT 2", ())}


@pytest.mark.parametrize("name", QUERIES)
def test_the_engine_prepares_it(name, table):
    sql, names = QUERIES[name]

    assert table(f"EXPLAIN {sql}", *["[]"] * len(names))


@pytest.mark.parametrize("name", QUERIES)
def test_it_never_reads_the_whole_table(name, table):
    sql, names = QUERIES[name]
    plan = [row["detail"] for row in table(f"EXPLAIN QUERY PLAN {sql}", *["[]"] * len(names))]

    scans = [line for line in plan if re.match(r"SCAN (jobs|job_events)\b", line)]
    # A list without a filter reads the index of its order, and stops at its limit.
    assert all("USING INDEX jobs_created" in line for line in scans), plan
    # Every live row has one of two statuses: only what stops at the first few may look rows up by it.
    lists = ("matching", "list_jobs", "count_jobs", "find_jobs")
    assert name in (*lists, "claim_one_submit", "count_failures") or not any(
        "jobs_status_created" in line for line in plan
    ), plan


@pytest.mark.parametrize("name", QUERIES)
def test_it_keeps_d1s_limits(name):
    sql, names = QUERIES[name]

    assert len(names) <= 100
    assert len(sql) < 100_000
    assert "BEGIN" not in sql
    assert "strftime" not in sql
    assert "datetime(" not in sql


def test_each_has_a_sentence(request):
    text = (request.config.rootpath / "chalicelib" / "queries.sql").read_text()

    for block in re.split(r"^-- name: ", text, flags=re.MULTILINE)[1:]:
        assert re.match(r"\w+\n-- [A-Za-z]", block), block[:40]


def test_the_arrows_in_the_comments_are_those_of_the_table_of_moves(request):
    text = (request.config.rootpath / "chalicelib" / "queries.sql").read_text()
    arrows = re.findall(r"^-- (\w+): ([\w, ]+) -> (\w+)\.", text, flags=re.MULTILINE)

    assert {verb for verb, _, _ in arrows} == {"claim", "expire", "accept", "cancel", "retry", "redrive"}
    for verb, sources, target in arrows:
        assert TRANSITIONS[verb] == (frozenset(sources.split(", ")), target)


def test_the_schema_is_within_one_d1_request():
    assert len(schema.statements()) <= 50
    assert not re.search(r"\bTRIGGER\b", " ".join(schema.statements()))
