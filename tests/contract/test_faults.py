"""The faults of the local cloud at the wire, and what the service's own clients make of them."""

import json

import pytest
import requests

from chalicelib.credentials import Credential
from chalicelib.d1 import Statement
from chalicelib.errors import IndeterminateError, PermanentError, TransientError
from chalicelib.r2 import R2
from chalicelib.runpod import Runpod, Verdict
from chalicelib.wire import Wire
from tests.conftest import put
from tools.cloud import LocalCloud, Request
from tools.cloud.render import draw

PNG = draw("a cat")
SELECT = Statement("SELECT 1 AS n")
D1_QUERY = "/client/v4/accounts/local-account/d1/database/local-database/query"


@pytest.fixture
def endpoints():
    return ("another-endpoint",)


@pytest.fixture
def rate_limited():
    return True


def simulate(cloud, wish):
    answer = cloud.handle(Request("POST", "/simulate", body=json.dumps(wish).encode()))
    return answer.status, json.loads(answer.body)


def told(cloud):
    faults = json.loads(cloud.handle(Request("GET", "/simulate")).body)
    faults.pop("calls_left", None)
    return faults


def query(d1, *statements):
    return d1.query(list(statements) or [SELECT], timeout=20.0)


def test_faults_stay_until_others_are_wished_for_and_are_told(cloud):
    wish = {"r2": "down", "d1": {"fault": "locked", "seconds": 60}}

    assert simulate(cloud, {**wish, "cdn": None}) == (200, {**wish, "calls_left": 1200})
    assert told(cloud) == wish
    assert simulate(cloud, {"cdn": {"fault": "slow"}, "r2": {}}) == (200, {"cdn": "slow", "calls_left": 1200})
    assert simulate(cloud, {}) == (200, {"calls_left": 1200})
    simulate(cloud, wish)
    assert simulate(cloud, None) == (200, {"calls_left": 1200})


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ([], "the body must be an object"),
        ({"r3": "down"}, "there is no 'r3', but d1, r2, runpod, cdn, results and calls_left"),
        ({"r2": "dwn"}, "the fault of r2 must be one of down, slow, lost, denied"),
        ({"r2": True}, "the fault of r2 must be"),
        ({"r2": {"seconds": 1}}, "the fault of r2 must be"),
        ({"cdn": "denied"}, "the fault of cdn must be"),
        ({"r2": {"fault": "down", "seconds": 1}}, "r2 down takes no 'seconds'"),
        ({"r2": {"fault": "down", "endpoint": "local-endpoint"}}, "r2 down takes no 'endpoint'"),
        ({"d1": {"fault": "slow", "seconds": 0}}, "seconds must be a number over 0, at most 3600"),
        ({"d1": {"fault": "slow", "seconds": True}}, "seconds must be"),
        ({"d1": {"fault": "slow", "seconds": 3601}}, "seconds must be"),
        ({"d1": {"fault": "slow", "seconds": "5"}}, "seconds must be"),
        ({"runpod": {"fault": "failing", "error": 5}}, "error must be a text"),
        ({"runpod": {"fault": "failing", "only": "run"}}, "runpod failing takes no 'only'"),
        ({"runpod": {"fault": "errors", "only": "status"}}, 'only must be "run"'),
        ({"runpod": {"fault": "down", "endpoint": "x"}}, "the endpoints are local-endpoint, another-endpoint"),
        ({"calls_left": 1201}, "calls_left must be a whole number from 0 to 1200"),
        ({"calls_left": -1}, "calls_left must be"),
        ({"calls_left": True}, "calls_left must be"),
    ],
)
def test_a_wish_that_is_none_changes_nothing(cloud, wish, sentence):
    simulate(cloud, {"r2": "lost"})

    code, answer = simulate(cloud, {"results": "down", **wish} if wish else wish)

    assert code == 400
    assert answer["error"].startswith(f"Nothing was changed: {sentence}")
    assert told(cloud) == {"r2": "lost"}


def test_it_wants_json_and_one_of_two_methods(cloud):
    assert b"the body is no JSON" in cloud.handle(Request("POST", "/simulate", body=b"down")).body
    assert cloud.handle(Request("DELETE", "/simulate")).status == 405


@pytest.mark.parametrize(
    ("fault", "error", "code"),
    [
        ("down", IndeterminateError, "d1_bad_answer"),
        ("lost", IndeterminateError, "d1_bad_answer"),
        ("denied", PermanentError, "d1_unauthorized"),
        ("locked", TransientError, "d1_rate_limited"),
    ],
)
def test_each_fault_of_d1(cloud, empty_d1, clock, fault, error, code):
    simulate(cloud, {"d1": fault})

    with pytest.raises(error) as caught:
        query(empty_d1, Statement("CREATE TABLE IF NOT EXISTS made (n)"))

    assert caught.value.code == code
    made = cloud.d1.execute("SELECT name FROM sqlite_master WHERE name = 'made'")
    assert bool(made) is (fault == "lost")
    simulate(cloud, {})
    clock.advance(300)
    assert query(empty_d1) == [[{"n": 1}]]


def test_a_locked_d1_says_for_how_long_and_the_client_leaves_it_alone_until_then(cloud, empty_d1, clock):
    simulate(cloud, {"d1": {"fault": "locked", "seconds": 59.5}})
    with pytest.raises(TransientError) as caught:
        query(empty_d1)
    assert caught.value.retry_after == 60
    simulate(cloud, {})

    calls = cloud.calls["d1"]
    clock.advance(30)
    with pytest.raises(TransientError, match="refusing"):
        query(empty_d1)
    assert cloud.calls["d1"] == calls
    clock.advance(30)
    assert query(empty_d1) == [[{"n": 1}]]


@pytest.fixture
def runpod(cloud, wire, clock):
    return Runpod(
        wire=Wire(clock),
        clock=clock,
        base_url=cloud.settings()["RUNPOD_API_BASE"],
        api_key=Credential("local-runpod-key"),
    )


def run(runpod, endpoint="local-endpoint"):
    return runpod.run(endpoint, {"prompt": "a cat"}, timeout=10.0)[0]


def status(runpod, run_id):
    return runpod.status("local-endpoint", run_id, timeout=10.0)


@pytest.mark.parametrize(
    ("fault", "error", "code", "asked"),
    [
        ("down", IndeterminateError, "runpod_bad_answer", "HTTP 503"),
        ("lost", IndeterminateError, "runpod_bad_answer", "HTTP 502"),
        ("errors", IndeterminateError, "runpod_bad_answer", "HTTP 500"),
        ("denied", TransientError, "runpod_unauthorized", "HTTP 401"),
    ],
)
def test_each_fault_of_runpod(cloud, runpod, fault, error, code, asked):
    run_id = run(runpod)
    simulate(cloud, {"runpod": fault})

    with pytest.raises(error) as caught:
        run(runpod)
    with pytest.raises(TransientError, match=asked):
        status(runpod, run_id)

    assert caught.value.code == code
    assert len(cloud.runpod.inputs()) == (2 if fault == "lost" else 1)
    simulate(cloud, {})
    run(runpod)


def test_a_fault_of_run_alone_or_of_one_endpoint_leaves_the_rest_alone(cloud, runpod):
    run_id = run(runpod)

    simulate(cloud, {"runpod": {"fault": "errors", "only": "run", "endpoint": "local-endpoint"}})

    assert status(runpod, run_id).status == "IN_QUEUE"
    run(runpod, "another-endpoint")
    with pytest.raises(IndeterminateError):
        run(runpod)


def test_an_endpoint_without_workers_can_be_had_beside_a_fault(cloud):
    simulate(cloud, {"runpod": "down"})

    key, body = {"authorization": "Bearer local-runpod-key"}, b'{"workers": {"throttled": 1}, "hold": true}'
    answer = cloud.handle(Request("POST", "/v2/local-endpoint/simulate/health", "", key, body))

    assert json.loads(answer.body)["workers"]["throttled"] == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [("failing", "CUDA out of memory"), ({"fault": "failing", "error": "no such node"}, "no such node")],
)
def test_workers_fail_the_runs_that_are_sent_meanwhile(cloud, runpod, clock, fault, error):
    before = run(runpod)
    simulate(cloud, {"runpod": fault})
    meanwhile = run(runpod)
    with pytest.raises(PermanentError, match="input is required"):
        runpod.run("local-endpoint", None, timeout=10.0)
    simulate(cloud, {})
    after = run(runpod)
    clock.advance(5)

    verdicts = [status(runpod, run_id).verdict for run_id in (before, meanwhile, after)]

    assert verdicts == [Verdict.COMPLETED, Verdict.FAILED, Verdict.COMPLETED]
    assert status(runpod, meanwhile).error == error


@pytest.fixture
def bucket(cloud_server):
    given = cloud_server.cloud.settings()
    return R2(
        endpoint_url=given["R2_ENDPOINT_URL"],
        bucket=given["R2_BUCKET"],
        keys=Credential((given["R2_ACCESS_KEY_ID"], given["R2_SECRET_ACCESS_KEY"])),
        public_base_url=given["R2_PUBLIC_BASE_URL"],
    )


@pytest.mark.parametrize(
    ("fault", "error", "code"),
    [
        ("down", TransientError, "r2_failed"),
        ("lost", TransientError, "r2_failed"),
        ("denied", PermanentError, "r2_unauthorized"),
    ],
)
def test_each_fault_of_r2_but_the_public_address_goes_on(cloud_server, bucket, fault, error, code):
    said = requests.post(f"{cloud_server.base_url}/simulate", data=json.dumps({"r2": fault}), timeout=10)
    assert said.json() == {"r2": fault}

    with pytest.raises(error) as caught:
        put(bucket, "k", PNG)

    assert caught.value.code == code
    public = f"{cloud_server.base_url}/cdn/k"
    assert requests.get(public, timeout=10).status_code == (200 if fault == "lost" else 404)
    simulate(cloud_server.cloud, {})
    put(bucket, "k", PNG)
    assert requests.get(public, timeout=10).content == PNG


def test_a_link_that_a_revoked_key_has_signed_is_refused(cloud_server, bucket):
    put(bucket, "k", PNG)
    link = bucket._s3().generate_presigned_url("get_object", Params={"Bucket": "ob-ai-results", "Key": "k"})
    assert requests.get(link, timeout=10).content == PNG

    simulate(cloud_server.cloud, {"r2": "denied"})

    assert requests.get(link, timeout=10).status_code == 403


@pytest.mark.parametrize("part", ["cdn", "results"])
def test_where_pictures_are_fetched_may_be_down(cloud, part):
    simulate(cloud, {part: "down"})

    answers = [cloud.handle(Request(method, f"/{part}/k")) for method in ("GET", "HEAD")]

    assert [(answer.status, b"503" in answer.body) for answer in answers] == [(503, True), (503, False)]


@pytest.mark.parametrize("part", ["d1", "r2", "runpod", "cdn", "results"])
def test_a_slow_part_answers_late_but_as_usual(cloud, part, monkeypatch):
    slept = []
    monkeypatch.setattr("tools.cloud.faults.time.sleep", slept.append)
    path = {"d1": D1_QUERY, "runpod": "/v2/local-endpoint/health"}.get(part, f"/{part}/k")
    usual = cloud.handle(Request("GET", path))

    simulate(cloud, {part: "slow"})
    late = cloud.handle(Request("GET", path))
    simulate(cloud, {part: {"fault": "slow", "seconds": 2.5}})
    cloud.handle(Request("GET", path))

    assert (late.status, late.body) == (usual.status, usual.body)
    assert slept == [5.0, 2.5]


def test_the_calls_left_may_be_few_or_all(cloud, empty_d1, clock):
    assert simulate(cloud, {"calls_left": 1}) == (200, {"calls_left": 1})
    query(empty_d1)
    assert empty_d1.calls_left() == 0
    with pytest.raises(TransientError, match="Only 0 of"):
        query(empty_d1)

    assert simulate(cloud, {}) == (200, {"calls_left": 0})
    assert simulate(cloud, {"calls_left": 1200}) == (200, {"calls_left": 1200})
    answer = cloud.handle(Request("POST", D1_QUERY))
    assert (answer.status, answer.headers["ratelimit"]) == (401, '"default";r=1199;t=300')
    clock.advance(299)
    assert simulate(cloud, {}) == (200, {"calls_left": 1199})
    clock.advance(1)
    assert simulate(cloud, {}) == (200, {"calls_left": 1200})


def test_where_calls_are_not_counted_there_are_none_left_to_set(tmp_path):
    cloud = LocalCloud(tmp_path / "uncounted", base_url="http://cloud.test:8001")

    refused = simulate(cloud, {"calls_left": 5})

    assert refused == (400, {"error": "Nothing was changed: calls are not counted here, so there is no calls_left."})
    assert simulate(cloud, {"r2": "down"}) == (200, {"r2": "down"})
    cloud.close()
