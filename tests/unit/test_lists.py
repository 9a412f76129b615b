"""The list: which jobs a filter finds, page by page, what it costs D1, and what of it is known already."""

import json
import sqlite3
import threading
import time

import pytest

from chalicelib import api, bootstrap, reads
from chalicelib.errors import REQUEST_STATUS
from chalicelib.jobs import NEWEST, Status
from chalicelib.queries import QUERIES
from chalicelib.reads import Filter
from tests.conftest import Bench, call
from tests.engines.engine import D1Engine
from tools import schema

D1 = r"POST .*/query$"


@pytest.fixture
def d1_engine(request, cloud):
    """The local cloud's D1; for the tests that say so Cloudflare's own engine in turn."""
    name = getattr(request, "param", "local")
    return request.getfixturevalue("miniflare") if name == "miniflare" else D1Engine(cloud.settings(), cloud)


on_each_engine = pytest.mark.parametrize("d1_engine", ["local", "miniflare"], indirect=True)


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


@pytest.fixture
def insert(client, table):
    """Put a job behind the service's back; the n-th is made at the n-th minute."""

    def run(n, **columns):
        made_at = f"2026-01-10T{n // 60:02d}:{n % 60:02d}:00.000Z"
        metadata = columns.pop("metadata", None)
        row = {"id": f"job-{n:03d}", "status": "done", "prompt": "x", "model": "m", "created_at": made_at, **columns}
        names = [*row, "metadata"]
        table(
            f"INSERT INTO jobs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            *row.values(),
            json.dumps(metadata) if metadata else None,
        )
        for key, value in (metadata or {}).items():
            table("INSERT INTO job_metadata VALUES (?, ?, ?, ?)", key, value, made_at, row["id"])

    return run


def found(client, query):
    status, body, _ = call(client, "GET", f"/api/jobs?{query}")
    assert status == 200, body
    return [job["id"] for job in body["jobs"]]


def pages(client, query, cursor=""):
    ids = []
    while cursor is not None:
        _, body, _ = call(client, "GET", f"/api/jobs?{query}" + (f"&cursor={cursor}" if cursor else ""))
        ids.append([job["id"] for job in body["jobs"]])
        cursor = body["next_cursor"]
    return ids


# What is found


@pytest.fixture
def shelf(insert):
    """Eight jobs, no two alike."""
    insert(1, status="done", model="flux", prompt="An Orange cat", metadata={"album": "a", "page": "1"})
    insert(2, status="error", model="flux", prompt="a dog", error_message="CUDA out of memory")
    insert(3, status="done", model=None, prompt="แมวสีส้ม", metadata={"album": "a", "page": "2"})
    insert(4, status="cancelled", model="qwen-image", prompt="a 100% 'cat'_", metadata={"album": "b"})
    insert(5, status="queued", model="qwen-image", prompt="CAT", metadata={"album": "a", "page": "1"})
    insert(6, status="running", model="flux", prompt="a fish")
    insert(7, status="error", model="sdxl", prompt="bird", metadata={"album": "แมว/1"})
    insert(8, status="done", model="flux", prompt="cat and dog", metadata={"album": "a"})


FOUND = [
    ("", [8, 7, 6, 5, 4, 3, 2, 1]),
    ("status=done", [8, 3, 1]),
    ("status=done,error", [8, 7, 3, 2, 1]),
    ("status=done&status=error", [8, 7, 3, 2, 1]),
    ("status=queued,running,done,error,cancelled", [8, 7, 6, 5, 4, 3, 2, 1]),
    ("model=flux", [8, 6, 2, 1]),
    ("model=flux&status=done,running", [8, 6, 1]),
    ("model=qwen-image", [5, 4, 3]),
    ("model=qwen-image&status=done", [3]),
    ("model=nobody", []),
    ("metadata.album=a", [8, 5, 3, 1]),
    ("metadata.album=a&metadata.page=1", [5, 1]),
    ("metadata.album=a&status=done", [8, 3, 1]),
    ("metadata.album=a&model=flux&status=done", [8, 1]),
    ("metadata.album=A", []),
    ("metadata.album=%E0%B9%81%E0%B8%A1%E0%B8%A7%2F1", [7]),
    ("metadata.page=1&metadata.album=b", []),
    ("created_after=2026-01-10T00:06:00Z", [8, 7]),
    ("created_before=2026-01-10T00:03:00Z", [2, 1]),
    ("created_before=2026-01-10T07:03:00%2B07:00", [2, 1]),
    ("created_after=2026-01-10T00:02:00Z&created_before=2026-01-10T00:05:00.000Z", [4, 3]),
    ("created_after=2026-01-10&created_before=2026-01-11", [8, 7, 6, 5, 4, 3, 2, 1]),
    ("created_after=2026-01-11", []),
    ("model=flux&created_after=2026-01-10T00:02:00Z", [8, 6]),
    ("metadata.album=a&created_before=2026-01-10T00:04:00Z", [3, 1]),
    ("q=cat", [8, 5, 4, 1]),
    ("q=orange+CAT", [1]),
    ("q=100%25", [4]),
    ("q=%27cat%27_", [4]),
    ("q=%E0%B9%81%E0%B8%A1%E0%B8%A7", [3]),
    ("q=cuda", [2]),
    ("q=job-006", [6]),
    ("q=cat&status=done", [8, 1]),
    ("q=cat&model=flux&status=done&metadata.album=a&created_after=2026-01-10T00:01:30Z", [8]),
]


@on_each_engine
def test_a_filter_finds_what_fits_all_of_it_newest_first(client, shelf):
    expected = {query: [f"job-{n:03d}" for n in numbers] for query, numbers in FOUND}

    assert {query: found(client, query) for query in expected} == expected


@pytest.mark.parametrize(
    "query", ["", "status=done", "status=done,error", "model=m", "model=m&status=error", "metadata.k=v", "q=x",
              "metadata.k=v&status=done,error", "created_after=2026-01-10"],
)  # fmt: skip
def test_pages_hold_every_job_once_though_new_ones_come(client, insert, query):
    for n in range(25):
        insert(n, status="error" if n % 2 else "done", metadata={"k": "v"})
    before = found(client, f"{query}&limit=100")

    _, first, _ = call(client, "GET", f"/api/jobs?{query}&limit=7")
    insert(99, metadata={"k": "v"})
    rest = pages(client, f"{query}&limit=7", first["next_cursor"])

    assert [job["id"] for job in first["jobs"]] + [job_id for page in rest for job_id in page] == before


def test_jobs_of_one_moment_are_told_apart(client, insert):
    for n in range(7):
        insert(n, created_at="2026-01-10T00:00:00.000Z")

    assert [len(page) for page in pages(client, "status=done&limit=3")] == [3, 3, 1]


def test_a_page_ends_where_a_lambda_could_not_answer_it(client, insert, monkeypatch):
    monkeypatch.setattr(api, "PAGE_BYTES", 4_000)
    for n in range(6):
        insert(n, prompt="แมว" * (100 if n != 2 else 2_000))

    found_on = pages(client, "limit=5")

    assert [job_id for page in found_on for job_id in page] == [f"job-{n:03d}" for n in (5, 4, 3, 2, 1, 0)]
    assert max(map(len, found_on)) == 2
    assert ["job-002"] in found_on


def test_a_text_is_looked_for_among_the_newest(client, insert, monkeypatch):
    monkeypatch.setattr(reads, "SEARCHED", 5)
    for n in range(12):
        insert(n, prompt=f"cat {n}", model="m" if n % 2 else "other")

    assert pages(client, "q=cat&limit=2") == [["job-011", "job-010"], ["job-009", "job-008"], ["job-007"]]
    assert found(client, "q=cat&model=m") == ["job-011", "job-009", "job-007", "job-005", "job-003"]


@on_each_engine
def test_counts_are_those_of_every_status_under_the_rest_of_the_filter(client, shelf):
    def counts(query):
        _, body, _ = call(client, "GET", f"/api/jobs?include=counts&{query}")
        return {status: number for status, number in body["counts"].items() if number}

    assert counts("") == {"queued": 1, "running": 1, "done": 3, "error": 2, "cancelled": 1}
    assert counts("status=done&limit=1") == counts("")
    assert counts("model=flux") == {"running": 1, "done": 2, "error": 1}
    assert counts("q=cat") == {"queued": 1, "done": 2, "cancelled": 1}
    assert counts("metadata.album=a&metadata.page=1") == {"queued": 1, "done": 1}
    assert counts("created_after=2026-01-10T00:06:00Z") == {"done": 1, "error": 1}
    assert counts("model=nobody") == {}


def test_no_more_is_counted_than_is_worth_it(client, insert, monkeypatch):
    monkeypatch.setattr(reads, "COUNTED", 3)
    for n in range(10):
        insert(n, status="done" if n < 8 else "error")

    assert counts(reads.Filter()) == (3, 2)


def test_each_status_is_counted_so_far_among_those_of_one_word_too(client, insert, monkeypatch):
    monkeypatch.setattr(reads, "COUNTED", 3)
    for n in range(10):
        insert(n, status="done" if n > 1 else "error", metadata={"album": "a"})

    assert counts(reads.Filter(metadata=(("album", "a"),))) == (3, 2)


def counts(wanted):
    """The numbers of jobs of the filter that are done and that have failed."""
    found = bootstrap.service().reads.page(wanted, limit=1, after=NEWEST, counts=True, timeout=5.0)
    return found.counts["done"], found.counts["error"]


def test_without_include_nothing_is_counted(client, shelf):
    assert list(call(client, "GET", "/api/jobs")[1]) == ["ok", "jobs", "next_cursor"]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("stauts=error", "query_invalid"),
        ("metadata=a", "query_invalid"),
        ("Status=done", "query_invalid"),
        ("limit=1&limit=2", "query_invalid"),
        ("metadata.a=b&metadata.a=c", "query_invalid"),
        ("q=a&q=a", "query_invalid"),
        ("status=", "status_invalid"),
        ("status=done,", "status_invalid"),
        ("status=done&status=nope", "status_invalid"),
        ("status=DONE", "status_invalid"),
        ("model=", "model_invalid"),
        ("model=%20", "model_invalid"),
        ("model=" + "x" * 201, "model_invalid"),
        ("model=a%00", "model_invalid"),
        ("metadata.=a", "metadata_invalid"),
        ("metadata.a%20b=a", "metadata_invalid"),
        ("metadata." + "x" * 41 + "=a", "metadata_invalid"),
        ("metadata.a=" + "x" * 501, "metadata_invalid"),
        ("metadata.a=%00", "metadata_invalid"),
        ("&".join(f"metadata.k{n}=v" for n in range(21)), "metadata_invalid"),
        ("created_after=", "created_invalid"),
        ("created_after=yesterday", "created_invalid"),
        ("created_after=2026-13-01", "created_invalid"),
        ("created_after=1600000000", "created_invalid"),
        ("created_before=2026-01-10T00:00:00+07:00", "created_invalid"),
        ("created_before=0001-01-01T00:00:00%2B14:00", "created_invalid"),
        ("created_before=9999-12-31T23:59:59-14:00", "created_invalid"),
        ("q=", "q_invalid"),
        ("q=%20", "q_invalid"),
        ("q=" + "x" * 201, "q_invalid"),
        ("q=a%00b", "q_invalid"),
        ("include=", "include_invalid"),
        ("include=jobs", "include_invalid"),
    ],
)
def test_a_filter_that_is_none_is_refused_before_any_call(client, cloud, query, code):
    before = cloud.calls["d1"]

    status, body, _ = call(client, "GET", f"/api/jobs?{query}")

    assert (status, body["code"], cloud.calls["d1"]) == (REQUEST_STATUS[code], code, before)


# What it costs


@pytest.fixture(scope="module")
def large():
    """A hundred thousand jobs, most of them done, on SQLite alone."""
    connection = sqlite3.connect(":memory:")
    for statement in schema.statements():
        connection.execute(statement)
    connection.executescript("""
        WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < 99999)
        INSERT INTO jobs (id, status, prompt, model, metadata, created_at)
        SELECT
          printf('job-%06d', n),
          CASE WHEN n % 1000 = 0 THEN 'error' WHEN n % 5000 = 1 THEN 'running' ELSE 'done' END,
          'prompt ' || n,
          CASE n % 3 WHEN 0 THEN 'flux' WHEN 1 THEN 'sdxl' END,
          json_object('app', 'one', 'n', CAST(n AS TEXT)),
          printf('2026-01-%02dT%02d:%02d:00.000Z', 1 + n / 4000, n / 60 % 24, n % 60)
        FROM numbers;
        INSERT INTO job_metadata
        SELECT word.key, word.value, jobs.created_at, jobs.id FROM jobs, json_each(metadata) AS word;
    """)
    yield connection
    connection.close()


FILTERS = {
    "nothing": Filter(),
    "one status": Filter(statuses=("error",)),
    "a status that nearly all have": Filter(statuses=("done",)),
    "several statuses": Filter(statuses=("running", "error")),
    "a model": Filter(model="flux"),
    "the default model": Filter(model="qwen-image"),
    "a model that none has": Filter(model="none"),
    "a model and a status": Filter(model="flux", statuses=("running",)),
    "metadata of one": Filter(metadata=(("n", "77"),)),
    "metadata of all": Filter(metadata=(("app", "one"),)),
    "two metadata": Filter(metadata=(("app", "one"), ("n", "77"))),
    "metadata and a status": Filter(metadata=(("app", "one"),), statuses=("running",)),
    "a range": Filter(created_after="2026-01-03", created_before="2026-01-04"),
    "text": Filter(text="prompt 4"),
    "text that none has": Filter(text="nowhere", statuses=("done",), model="flux"),
    "all": Filter(statuses=("done",), model="flux", metadata=(("app", "one"),), text="9", created_after="2026-01-02"),
}


ALL_ROWS = 550  # thousand instructions: less than it takes to look at every row once


def steps(connection, name, values):
    """How much SQLite does for the query: its virtual machine's instructions, in thousands."""
    sql, names = QUERIES[name]
    count = 0

    def tick():
        nonlocal count
        count += 1

    connection.set_progress_handler(tick, 1_000)
    connection.execute(sql, [values[one] for one in names]).fetchall()
    connection.set_progress_handler(None, 0)
    return count


@pytest.mark.parametrize("query", ["list_jobs", "count_jobs", "find_jobs"])
@pytest.mark.parametrize("wanted", FILTERS.values(), ids=FILTERS)
def test_no_filter_reads_a_table_of_a_hundred_thousand_rows(large, query, wanted):
    if query == "count_jobs":
        values = reads._values_to_count(wanted)
    else:
        values = {**reads._values(wanted, limit=51, after=NEWEST), "max_running": 10_000}

    plan = [row[3] for row in large.execute(f"EXPLAIN QUERY PLAN {QUERIES[query][0]}", [None] * len(QUERIES[query][1]))]
    assert not [line for line in plan if line.startswith(("SCAN jobs", "SCAN found", "SCAN job_metadata", "SCAN meta"))]
    assert steps(large, query, values) < ALL_ROWS


def test_the_measure_sees_a_query_that_reads_all(large, monkeypatch):
    monkeypatch.setitem(QUERIES, "all", ("SELECT count(*) FROM jobs WHERE prompt LIKE '%x%' AND status = 'done'", ()))

    assert steps(large, "all", {}) > ALL_ROWS


def test_twelve_clients_that_poll_a_list_cost_less_than_a_call_a_second(client, bench):
    bench.create()
    before, start = bench.cloud.calls["d1"], bench.clock.elapsed

    for _ in range(30):
        for _ in range(12):
            call(client, "GET", "/api/jobs?status=queued,running&include=counts")
            bench.clock.advance(1 / 12)

    assert (bench.cloud.calls["d1"] - before) / (bench.clock.elapsed - start) < 1


def test_twelve_clients_that_poll_twelve_jobs_cost_less_than_a_call_a_second(client, bench):
    ids = [bench.create() for _ in range(12)]
    before, start = bench.cloud.calls["d1"], bench.clock.elapsed

    for _ in range(15):
        for job_id in ids:
            status, body, _ = call(client, "GET", f"/api/queue/status?id={job_id}")
            assert (status, body["id"]) == (200, job_id)
            bench.clock.advance(1 / 6)

    assert (bench.cloud.calls["d1"] - before) / (bench.clock.elapsed - start) < 1


def test_what_this_process_has_written_is_read_at_once(client, bench):
    assert found(client, "") == []
    _, body, _ = call(client, "POST", "/api/queue/create", {"prompt": "a"})
    assert found(client, "") == [body["id"]]
    assert call(client, "GET", f"/api/queue/status?id={body['id']}")[1]["status"] == "running"

    call(client, "POST", f"/api/jobs/{body['id']}/cancel")

    assert call(client, "GET", f"/api/queue/status?id={body['id']}")[1]["status"] == "cancelled"


def test_an_answer_stands_for_a_moment_and_no_longer(client, bench, insert):
    assert found(client, "") == []
    insert(1)
    assert found(client, "") == []

    bench.clock.advance(reads.KEPT_SECONDS)

    assert found(client, "") == ["job-001"]


def test_a_job_that_is_not_there_is_asked_for_once(client, bench):
    calls = bench.d1_calls(lambda: [call(client, "GET", "/api/queue/status?id=nobody") for _ in range(5)])

    assert calls == 1


def test_a_d1_that_fails_is_left_alone_for_a_moment(client, bench, faults):
    faults.add(D1, (400, {"errors": [{"code": 7500, "message": "no such table: jobs: SQLITE_ERROR"}]}), times=9)

    calls = bench.d1_calls(lambda: [call(client, "GET", "/api/jobs") for _ in range(5)])
    left = sum(rule["times"] for rule in faults._rules)

    assert (calls, left) == (0, 8)
    faults.clear()
    bench.clock.advance(reads.KEPT_SECONDS)
    assert call(client, "GET", "/api/jobs")[0] == 200


def test_of_many_who_ask_at_once_one_reads():
    clock, calls, go = type("C", (), {"monotonic": staticmethod(time.monotonic)})(), [], threading.Event()
    recent = reads.Recent(clock)

    def read():
        calls.append(1)
        go.wait(5)
        return "read"

    answers = []
    threads = [threading.Thread(target=lambda: answers.append(recent.get("key", read))) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not calls:
        pass
    go.set()
    for thread in threads:
        thread.join()

    assert (answers, len(calls)) == (["read"] * 8, 1)


def test_what_began_before_a_write_is_not_kept_after_it(clock):
    recent = reads.Recent(clock)

    recent.get("key", lambda: recent.clear() or "old")

    assert recent.get("key", lambda: "new") == "new"


def test_answers_do_not_pile_up(clock):
    recent = reads.Recent(clock)
    for n in range(2 * reads.KEPT_ANSWERS):
        recent.get(n, lambda: "x")

    assert len(recent._kept) <= reads.KEPT_ANSWERS


# ETag


@pytest.mark.parametrize("path", ["/api/jobs", "/api/jobs/{}", "/api/queue/status?id={}", "/api/queue/status/{}"])
def test_what_has_not_changed_is_304(client, bench, path):
    job_id = bench.create()
    path = path.format(job_id)
    _, _, headers = call(client, "GET", path)
    etag = headers["ETag"]

    for tags in (etag, f'"other", {etag}', etag.removeprefix("W/"), "*"):
        status, body, again = call(client, "GET", path, headers={"If-None-Match": tags})
        assert (status, body, again["ETag"]) == (304, None, etag)
    assert headers["Cache-Control"] == "private, no-cache"

    bench.round()
    status, _, headers = call(client, "GET", path, headers={"If-None-Match": etag})
    assert (status, headers["ETag"] == etag) == (200, False)


def test_a_304_wants_a_key_too(client, bench):
    _, _, headers = call(client, "GET", "/api/jobs")

    assert call(client, "GET", "/api/jobs", headers={"If-None-Match": headers["ETag"]}, auth={})[0] == 401


def test_an_error_has_no_etag(client):
    _, _, headers = call(client, "GET", "/api/jobs/nobody")

    assert ("ETag" in headers, headers["Cache-Control"]) == (False, "no-store")


def test_links_into_a_private_bucket_stay_the_same_for_a_while(
    client, environment, monkeypatch, cloud, clock, faults, s3
):
    monkeypatch.setenv("R2_PUBLIC_BASE_URL", "")
    bootstrap.service.cache_clear()
    bench = Bench(bootstrap.service(), cloud, clock, faults, s3)
    job_id = bench.create()
    bench.round()
    first = call(client, "GET", f"/api/jobs/{job_id}")

    bench.clock.advance(19 * 60)
    again = call(client, "GET", f"/api/jobs/{job_id}")
    bench.clock.advance(2 * 60)
    later = call(client, "GET", f"/api/jobs/{job_id}")

    assert first[1]["job"]["urls_expire_at"] == "2026-02-01T00:59:15.000Z"
    assert again[2]["ETag"] == first[2]["ETag"]
    assert later[1]["job"]["urls_expire_at"] == "2026-02-01T01:20:15.000Z"


def test_the_names_of_the_counts_are_all_statuses(client):
    assert list(call(client, "GET", "/api/jobs?include=counts")[1]["counts"]) == [status.value for status in Status]
