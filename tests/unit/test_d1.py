import json
from random import Random

import pytest

from chalicelib.credentials import Credential
from chalicelib.d1 import D1, Statement
from chalicelib.errors import IndeterminateError, PermanentError, TransientError
from chalicelib.wire import Wire

URL = "https://d1.test/client/v4/accounts/acc/d1/database/db/query"


@pytest.fixture
def database(clock):
    return D1(
        wire=Wire(clock),
        clock=clock,
        rng=Random(1),
        base_url="https://d1.test/client/v4",
        account_id="acc",
        database_id="db",
        token=Credential("secret"),
    )


def ok(*results):
    return {"result": [{"results": rows, "success": True, "meta": {}} for rows in results], "success": True}


def failed(code, message):
    return {"result": [], "success": False, "errors": [{"code": code, "message": message}], "messages": []}


def select(database, **options):
    return database.query([Statement("SELECT 1")], **{"timeout": 20.0, **options})


def test_a_batch_carries_each_statement_with_its_own_params(answers, database):
    answers.add("POST", URL, json=ok([{"x": 1}], []))

    rows = database.query([Statement("SELECT ?1 AS x", ("ก", 1, None)), Statement("SELECT 2")], timeout=5.0)

    assert rows == [[{"x": 1}], []]
    request = answers.calls[0].request
    assert json.loads(request.body) == {
        "batch": [{"sql": "SELECT ?1 AS x", "params": ["ก", 1, None]}, {"sql": "SELECT 2", "params": []}]
    }
    assert "ก".encode() in request.body
    assert request.headers["Authorization"] == "Bearer secret"


TABLE = [
    # HTTP, body, class, code
    (400, failed(7500, 'near "SELEC": syntax error at offset 0: SQLITE_ERROR'), PermanentError, "d1_sql"),
    (400, failed(7500, "UNIQUE constraint failed: jobs.id: SQLITE_CONSTRAINT"), PermanentError, "d1_row"),
    (400, failed(7400, "The request is malformed"), PermanentError, "d1_sql"),
    (400, failed(7500, "internal error; reference = abc"), IndeterminateError, "d1_internal"),
    (400, failed(7500, "Network connection lost."), IndeterminateError, "d1_internal"),
    (400, failed(7500, "Cannot resolve D1 DB due to transient issue"), IndeterminateError, "d1_internal"),
    (400, failed(7500, "Your account has exceeded D1's free tier daily row write limit"), TransientError, "d1_quota"),
    (401, failed(10000, "Authentication error"), PermanentError, "d1_unauthorized"),
    (403, failed(7403, "The given account is not valid"), PermanentError, "d1_account"),
    (404, {**failed(7404, "not found"), "result": None}, PermanentError, "d1_not_found"),
    (429, failed(7429, "D1 DB is overloaded. Requests queued for too long."), TransientError, "d1_rate_limited"),
    (429, failed(7429, "D1 DB storage operation exceeded timeout"), IndeterminateError, "d1_reset"),
    (429, failed(971, "More than 1200 requests per 300 seconds reached"), TransientError, "d1_rate_limited"),
    (429, "<html>slow down</html>", TransientError, "d1_rate_limited"),
    (500, failed(7500, "oops"), IndeterminateError, "d1_bad_answer"),
    (504, "<!DOCTYPE html><h1>Gateway time-out</h1>", IndeterminateError, "d1_bad_answer"),
    (200, "<html>maintenance</html>", IndeterminateError, "d1_bad_answer"),
    (200, "", IndeterminateError, "d1_bad_answer"),
    (200, [], IndeterminateError, "d1_bad_answer"),
    (200, {"success": True, "result": None}, IndeterminateError, "d1_bad_answer"),
    (200, {"success": False, "result": [], "errors": []}, IndeterminateError, "d1_bad_answer"),
    (200, {"success": True, "result": [{"meta": {}}]}, IndeterminateError, "d1_bad_answer"),
    (400, {"success": False, "errors": "none"}, IndeterminateError, "d1_bad_answer"),
    (400, "<html>bad request</html>", IndeterminateError, "d1_bad_answer"),
    (400, failed(7500, "string or blob too big: SQLITE_TOOBIG"), PermanentError, "d1_row"),
    (400, failed(7500, "malformed JSON: SQLITE_ERROR"), PermanentError, "d1_row"),
    (400, failed(7500, "not authorized: SQLITE_AUTH"), PermanentError, "d1_read_only"),
    (400, failed(7500, "database or disk is full: SQLITE_FULL"), PermanentError, "d1_sql"),
    (400, failed(7500, "no such column: step: SQLITE_ERROR"), PermanentError, "d1_schema"),
    (400, failed(7500, "D1 DB is overloaded. Requests queued for too long."), TransientError, "d1_overloaded"),
    (400, failed(7500, "isolate exceeded its memory limit and was reset."), IndeterminateError, "d1_internal"),
    (200, {"success": True, "result": []}, IndeterminateError, "d1_bad_answer"),
    (200, {"success": True, "result": [{"results": None}]}, IndeterminateError, "d1_bad_answer"),
    (200, {"success": True, "result": [None]}, IndeterminateError, "d1_bad_answer"),
    (200, {"success": True, "result": [None, {"results": []}]}, IndeterminateError, "d1_bad_answer"),
]


@pytest.mark.parametrize(("status", "body", "error", "code"), TABLE)
def test_each_answer_says_what_to_do_next(answers, database, status, body, error, code):
    answers.add("POST", URL, status=status, body=body if isinstance(body, str) else json.dumps(body))

    with pytest.raises(error) as caught:
        select(database)

    assert caught.value.code == code
    assert caught.value.service == "d1"


def test_what_may_have_happened_is_sent_again_and_can_succeed(answers, database, clock):
    answers.add("POST", URL, status=504, body="<html>")
    answers.add("POST", URL, status=429, json=failed(7429, "Requests queued for too long"))
    answers.add("POST", URL, json=ok([{"x": 1}]))

    assert select(database) == [[{"x": 1}]]
    assert len(clock.slept) == 2
    bodies = {call.request.body for call in answers.calls}
    assert len(bodies) == 1


@pytest.mark.parametrize("then", [(429, failed(971, "More than 1200 requests")), (401, failed(10000, "token"))])
def test_what_may_have_happened_once_stays_in_doubt(answers, database, then):
    answers.add("POST", URL, status=504, body="<html>")
    answers.add("POST", URL, status=then[0], json=then[1])

    with pytest.raises(IndeterminateError):
        select(database)


def test_three_tries_are_the_end(answers, database):
    answers.add("POST", URL, status=504, body="<html>")

    with pytest.raises(IndeterminateError):
        select(database)

    assert len(answers.calls) == 3


def test_a_refused_statement_is_not_sent_again(answers, database):
    answers.add("POST", URL, status=400, json=failed(7500, "no such column: x: SQLITE_ERROR"))

    with pytest.raises(PermanentError):
        select(database)

    assert len(answers.calls) == 1


def test_nothing_is_repeated_without_time_for_it(answers, database):
    answers.add("POST", URL, status=504, body="<html>")

    with pytest.raises(IndeterminateError):
        select(database, timeout=1.0)

    assert len(answers.calls) == 1


def test_a_lock_out_is_waited_for_without_calling_again(answers, database, clock):
    answers.add("POST", URL, status=429, headers={"Retry-After": "300"}, json=failed(971, "More than 1200 requests"))
    with pytest.raises(TransientError) as caught:
        select(database)
    assert caught.value.retry_after == 300

    clock.advance(100)
    with pytest.raises(TransientError) as caught:
        select(database)
    assert caught.value.retry_after == pytest.approx(200)
    assert len(answers.calls) == 1

    answers.replace("POST", URL, json=ok([]))
    clock.advance(201)
    assert select(database) == [[]]


def test_the_calls_left_are_known_until_the_window_is_over(answers, database, clock):
    answers.add("POST", URL, json=ok([]), headers={"ratelimit": '"default";r=250;t=40'})
    assert database.calls_left() is None

    select(database)

    assert database.calls_left() == 250
    clock.advance(41)
    assert database.calls_left() is None


@pytest.mark.parametrize(
    "statements",
    [
        [Statement("SELECT 1")] * 51,
        [Statement("SELECT 1", tuple(range(101)))],
        [Statement("SELECT ?1", ("x" * 900_000,))],
    ],
)
def test_a_request_over_the_limits_is_never_sent(database, statements):
    with pytest.raises(PermanentError) as caught:
        database.query(statements, timeout=5.0)

    assert caught.value.code == "d1_request_too_large"


def test_half_characters_do_not_stop_a_save(answers, database):
    answers.add("POST", URL, json=ok([]))

    database.query([Statement("SELECT ?1", ("broken \ud83d here",))], timeout=5.0)

    assert b"broken ? here" in answers.calls[0].request.body
