import json

import pytest
import requests

from chalicelib.credentials import Credential
from chalicelib.errors import IndeterminateError, PermanentError, TransientError
from chalicelib.room import Place, Room
from chalicelib.runpod import CALLS, Runpod, Verdict
from chalicelib.wire import Wire

BASE = "https://runpod.test/v2"
RUN = f"{BASE}/ep/run"
STATUS = f"{BASE}/ep/status/run-1"
CANCEL = f"{BASE}/ep/cancel/run-1"


@pytest.fixture
def runpod(clock):
    return Runpod(wire=Wire(clock), clock=clock, base_url=BASE, api_key=Credential("secret"))


def test_run_sends_the_payload_once_with_the_key(answers, runpod):
    answers.add("POST", RUN, json={"id": "run-1", "status": "IN_QUEUE"})

    assert runpod.run("ep", {"prompt": "แมว"}, timeout=5.0) == ("run-1", "IN_QUEUE")
    request = answers.calls[0].request
    assert json.loads(request.body) == {"input": {"prompt": "แมว"}}
    assert request.headers["Authorization"] == "Bearer secret"


ENVELOPE = {"status": 400, "title": "Bad Request", "detail": "body: exceeded max body size of 10MiB"}


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, ENVELOPE, PermanentError),
        (413, "", PermanentError),
        (422, {"detail": [{"msg": "no"}]}, PermanentError),
        (401, "Unauthorized", TransientError),
        (403, "error code: 1010", TransientError),
        (404, {"status": 404, "title": "Not Found", "detail": "endpoint"}, TransientError),
        (429, "", TransientError),
        (500, {"status": 500, "title": "Internal Server Error"}, IndeterminateError),
        (502, "<html>bad gateway</html>", IndeterminateError),
        (520, "<html>", IndeterminateError),
        (302, "", IndeterminateError),
        (200, "<html>", IndeterminateError),
        (200, {"status": "IN_QUEUE"}, IndeterminateError),
        (200, {"id": 7, "status": "IN_QUEUE"}, IndeterminateError),
        (200, {"id": ""}, IndeterminateError),
        (200, [], IndeterminateError),
    ],
)
def test_each_answer_to_run_says_whether_it_may_be_sent_again(answers, runpod, status, body, error):
    answers.add("POST", RUN, status=status, body=body if isinstance(body, str) else json.dumps(body))

    with pytest.raises(error):
        runpod.run("ep", {}, timeout=5.0)

    assert len(answers.calls) == 1


@pytest.mark.parametrize(
    ("failure", "error"),
    [(requests.ConnectTimeout(), TransientError), (requests.ReadTimeout(), IndeterminateError)],
)
def test_silence_on_run_is_sent_once(answers, runpod, failure, error):
    answers.add("POST", RUN, body=failure)

    with pytest.raises(error):
        runpod.run("ep", {}, timeout=5.0)

    assert len(answers.calls) == 1


def test_a_busy_runpod_says_for_how_long(answers, runpod):
    answers.add("POST", RUN, status=429, headers={"Retry-After": "17"})

    with pytest.raises(TransientError) as caught:
        runpod.run("ep", {}, timeout=5.0)

    assert caught.value.retry_after == 17


@pytest.mark.parametrize(
    ("body", "verdict", "queue_ms", "execution_ms"),
    [
        ({"id": "run-1", "status": "IN_QUEUE"}, Verdict.UNFINISHED, None, None),
        (
            {"status": "IN_PROGRESS", "delayTime": 18378, "output": {"progress": "4/10"}},
            Verdict.UNFINISHED,
            18378,
            None,
        ),
        ({"status": "RUNNING"}, Verdict.UNFINISHED, None, None),
        ({"status": "SOMETHING_NEW"}, Verdict.UNFINISHED, None, None),
        ({"status": "COMPLETED", "output": 1, "delayTime": 5, "executionTime": 7.0}, Verdict.COMPLETED, 5, 7),
        ({"status": "COMPLETED"}, Verdict.COMPLETED, None, None),
        ({"status": "FAILED", "error": "x", "output": {"status": "failed"}}, Verdict.FAILED, None, None),
        ({"status": "CANCELLED"}, Verdict.CANCELLED, None, None),
        ({"status": "TIMED_OUT", "delayTime": "soon", "executionTime": -1}, Verdict.TIMED_OUT, None, None),
    ],
)
def test_each_status_has_a_verdict(answers, runpod, body, verdict, queue_ms, execution_ms):
    answers.add("GET", STATUS, json=body)

    answer = runpod.status("ep", "run-1", timeout=5.0)

    assert (answer.verdict, answer.status) == (verdict, body["status"])
    assert (answer.queue_ms, answer.execution_ms) == (queue_ms, execution_ms)
    assert answer.output == body.get("output")


def test_status_never_has_a_parameter(answers, runpod):
    answers.add("GET", STATUS, json={"status": "IN_QUEUE"})

    runpod.status("ep", "run-1", timeout=5.0)

    assert answers.calls[0].request.url == STATUS


def test_a_404_is_a_verdict_although_its_status_is_a_number(answers, runpod):
    answers.add("GET", STATUS, status=404, json={"status": 404, "title": "Not Found", "detail": "job not found"})

    assert runpod.status("ep", "run-1", timeout=5.0).verdict is Verdict.NOT_FOUND


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"status": 404, "title": "Not Found"}),
        (200, "<html>"),
        (200, "null"),
        (200, {}),
        (500, {"status": 500, "title": "Internal Server Error"}),
        (500, {"status": "COMPLETED"}),
        (502, "<html>bad gateway</html>"),
        (401, ""),
        (429, ""),
    ],
)
def test_no_usable_status_is_asked_for_again_later(answers, runpod, status, body):
    answers.add("GET", STATUS, status=status, body=body if isinstance(body, str) else json.dumps(body))

    with pytest.raises(TransientError):
        runpod.status("ep", "run-1", timeout=5.0)


def test_silence_on_status_is_asked_for_again_later(answers, runpod):
    answers.add("GET", STATUS, body=requests.ReadTimeout())

    with pytest.raises(TransientError):
        runpod.status("ep", "run-1", timeout=5.0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("boom", "boom"),
        (json.dumps({"error_type": "ValueError", "error_message": "bad size", "hostname": "h-1"}), "bad size"),
        ({"a": 1}, '{"a": 1}'),
        (None, ""),
        (7, "7"),
    ],
)
def test_an_error_is_text_without_traceback_and_host(answers, runpod, error, text):
    answers.add("GET", STATUS, json={"status": "FAILED", "error": error})

    assert runpod.status("ep", "run-1", timeout=5.0).error == text


def test_ids_are_quoted(answers, runpod):
    answers.add("GET", f"{BASE}/ep/status/a%2F..%3Fttl%3D1", json={"status": "IN_QUEUE"})

    runpod.status("ep", "a/..?ttl=1", timeout=5.0)


@pytest.mark.parametrize("status", [200, 404])
def test_cancelling_what_is_gone_is_fine(answers, runpod, status):
    answers.add("POST", CANCEL, status=status, json={})

    runpod.cancel("ep", "run-1", timeout=5.0)


def test_a_refused_cancel_is_an_error(answers, runpod):
    answers.add("POST", CANCEL, status=429)

    with pytest.raises(TransientError):
        runpod.cancel("ep", "run-1", timeout=5.0)


def test_a_call_over_runpods_limit_is_not_made(answers, runpod, clock, monkeypatch):
    monkeypatch.setitem(CALLS, "status", 2)
    answers.add("GET", f"{BASE}/ep/status/run-1", json={"id": "run-1", "status": "IN_QUEUE"})
    for _ in range(2):
        runpod.status("ep", "run-1", timeout=5.0)

    with pytest.raises(TransientError) as caught:
        runpod.status("ep", "run-1", timeout=5.0, within=10.9)

    assert caught.value.code == "runpod_busy"
    assert len(answers.calls) == 2
    runpod.status("ep", "run-1", timeout=5.0, within=20.0)
    assert clock.slept == [10.0]


def test_each_endpoint_has_a_limit_of_its_own(answers, runpod, monkeypatch):
    monkeypatch.setitem(CALLS, "status", 1)
    for endpoint in ("ep", "other"):
        answers.add("GET", f"{BASE}/{endpoint}/status/run-1", json={"id": "run-1", "status": "IN_QUEUE"})
        runpod.status(endpoint, "run-1", timeout=5.0)

    assert len(answers.calls) == 2


def test_a_run_is_not_sent_with_less_time_than_it_should_have(answers, runpod, clock, monkeypatch):
    monkeypatch.setitem(CALLS, "run", 1)
    answers.add("POST", RUN, json={"id": "run-1", "status": "IN_QUEUE"})
    runpod.run("ep", {}, timeout=5.0)

    with pytest.raises(TransientError):
        runpod.run("ep", {}, timeout=5.0, within=14.9)

    assert len(answers.calls) == 1
    runpod.run("ep", {}, timeout=5.0, within=15.0)
    assert len(answers.calls) == 2


@pytest.mark.parametrize(("headers", "seconds"), [({}, 2.0), ({"Retry-After": "1"}, 1.0)])
def test_after_a_429_nobody_asks_for_a_while(answers, runpod, clock, headers, seconds):
    answers.add("GET", f"{BASE}/ep/status/run-1", status=429, headers=headers)
    answers.add("GET", f"{BASE}/ep/status/run-2", json={"id": "run-2", "status": "IN_QUEUE"})
    with pytest.raises(TransientError):
        runpod.status("ep", "run-1", timeout=5.0)

    runpod.status("ep", "run-2", timeout=5.0, within=20.0)

    assert clock.slept == [seconds]


@pytest.mark.parametrize("tells_its_size", [True, False])
def test_a_large_answer_without_room_is_not_read(answers, runpod, monkeypatch, tells_its_size):
    monkeypatch.setattr("chalicelib.wire.LARGE_BYTES", 50)
    body = json.dumps({"id": "run-1", "status": "COMPLETED", "output": "x" * 100})
    answers.add("GET", STATUS, body=body, auto_calculate_content_length=tells_its_size)
    room = Room(200)
    room.take(200, timeout=0.0)

    with Place(room) as place, pytest.raises(TransientError) as caught:
        runpod.status("ep", "run-1", place=place, timeout=0.1)

    assert caught.value.code == "runpod_no_room"
    room.give(200)
    with Place(room) as place:
        assert runpod.status("ep", "run-1", place=place, timeout=0.1).bytes == len(body)
        assert not room.take(200, timeout=0.0)
        assert room.take(200 - len(body), timeout=0.0)
