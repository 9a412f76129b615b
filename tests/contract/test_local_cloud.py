"""
The local cloud over real sockets, spoken to by the service's own clients: what it answers is what the facts say.

What it has in common with the real engines is in test_d1_contract.py and test_r2_contract.py.
"""

import json

import pytest
import requests

from chalicelib.credentials import Credential
from chalicelib.errors import TransientError
from chalicelib.r2 import R2
from chalicelib.runpod import Runpod, Verdict
from chalicelib.runtime import Clock
from chalicelib.wire import Wire
from tests.conftest import put
from tools.cloud import LocalCloud, Request
from tools.cloud.cors import of_file
from tools.cloud.render import draw

PNG = draw("a cat")


@pytest.fixture
def settings(cloud_server):
    return cloud_server.cloud.settings()


def bucket(settings, **other):
    given = {
        "endpoint_url": settings["R2_ENDPOINT_URL"],
        "bucket": settings["R2_BUCKET"],
        "access_key_id": settings["R2_ACCESS_KEY_ID"],
        "secret_access_key": settings["R2_SECRET_ACCESS_KEY"],
        "public_base_url": settings["R2_PUBLIC_BASE_URL"],
    }
    given |= other
    keys = Credential((given.pop("access_key_id"), given.pop("secret_access_key")))
    return R2(**given, keys=keys)


def test_with_a_latency_it_answers_as_late_as_the_real_ones(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("tools.cloud.time.sleep", slept.append)
    cloud = LocalCloud(tmp_path, base_url="http://127.0.0.1:1", latency=0.1)
    paths = ["/v2/ep/run", "/v2/ep/status/run-1", "/results/run-1.png", "/client/v4/x", "/r2/x", "/cdn/x"]

    for path in paths:
        cloud.handle(Request("GET", path))

    assert slept == pytest.approx([0.015, 0.008, 0.015, 0.012, 0.012, 0.012])
    cloud.close()


def test_nothing_is_said_of_callers_who_did_not_wait(cloud_server, capsys):
    def end_by(error):
        try:
            raise error
        except OSError:
            cloud_server.handle_error(None, ("127.0.0.1", 1))
        return capsys.readouterr().err

    assert end_by(BrokenPipeError()) == ""
    assert "disk is full" in end_by(OSError("the disk is full"))


def test_r2_keeps_what_is_put_and_the_public_address_serves_it(settings):
    put(bucket(settings), "jobs/2026/01/é x/output.png", PNG)

    found = requests.get(f"{settings['R2_PUBLIC_BASE_URL']}/jobs/2026/01/é x/output.png", timeout=10)
    assert found.content == PNG
    assert found.headers["Content-Type"] == "image/png"
    assert found.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert requests.get(f"{settings['R2_PUBLIC_BASE_URL']}/nothing", timeout=10).status_code == 404


def test_r2_does_not_wait_for_a_continue_that_never_comes(settings):
    import time

    target = bucket(settings)
    put(target, "warm", PNG)
    start = time.perf_counter()
    put(target, "k", PNG)

    assert time.perf_counter() - start < 0.9


def test_r2_refuses_the_checksum_trailers_that_boto3_sends_by_default(settings, s3):
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=settings["R2_ENDPOINT_URL"],
        region_name="auto",
        aws_access_key_id=settings["R2_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["R2_SECRET_ACCESS_KEY"],
    )

    with pytest.raises(ClientError):
        client.put_object(Bucket=settings["R2_BUCKET"], Key="k", Body=PNG, ChecksumAlgorithm="SHA256")


@pytest.mark.parametrize(("method", "asked"), [("GET", "bytes=-"), ("HEAD", "bytes=0-3")])
def test_r2_heeds_no_range_that_is_none_nor_one_of_a_head(settings, method, asked):
    put(bucket(settings), "k", PNG)

    answer = requests.request(method, f"{settings['R2_PUBLIC_BASE_URL']}/k", headers={"Range": asked}, timeout=10)

    assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(len(PNG)))


PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "PUT",
    "Access-Control-Request-Headers": "content-type",
}


def preflight(settings, **other):
    return requests.options(f"{settings['R2_ENDPOINT_URL']}/a/b", headers={**PREFLIGHT, **other}, timeout=10)


def test_r2_answers_a_page_by_the_rules_in_the_file(settings):
    answer = preflight(settings)

    told = {name: value for name, value in answer.headers.items() if name.startswith("Access-Control-")}
    assert answer.status_code == 204
    assert told == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Methods": "PUT, GET, HEAD",
        "Access-Control-Allow-Headers": "content-type",
        "Access-Control-Max-Age": "3600",
    }


@pytest.mark.parametrize(
    "other",
    [
        {"Origin": None},
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Method": None},
        {"Access-Control-Request-Headers": "content-type, x-amz-acl"},
    ],
)
def test_r2_forbids_a_page_what_no_rule_allows(settings, other):
    answer = preflight(settings, **other)

    assert (answer.status_code, "<Code>AccessForbidden</Code>" in answer.text) == (403, True)
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_rule_may_be_for_one_origin(tmp_path):
    rule = {"AllowedOrigins": ["https://page.example"], "AllowedMethods": ["GET"]}
    (tmp_path / "rules.json").write_text(json.dumps([rule]))
    cors = of_file(tmp_path / "rules.json")

    def told(origin):
        return cors.headers(Request("GET", "/r2/b/k", headers={"origin": origin}))

    assert told("https://page.example")["Access-Control-Allow-Origin"] == "https://page.example"
    assert told("https://other.example") == {}


def test_a_bucket_that_was_made_is_one_of_its_own_and_goes_by_its_own_rules(cloud_server, settings, tmp_path):
    api = f"{settings['CLOUDFLARE_API_BASE']}/accounts/{settings['CLOUDFLARE_ACCOUNT_ID']}/r2/buckets"
    auth = {"Authorization": f"Bearer {settings['CLOUDFLARE_API_TOKEN']}"}
    made, again = (requests.post(api, headers=auth, json={"name": "other"}, timeout=10) for _ in range(2))
    other = {**settings, "R2_ENDPOINT_URL": f"{settings['R2_ENDPOINT_URL']}/other"}
    s3_form = {"rules": [{"AllowedOrigins": ["*"], "AllowedMethods": ["PUT"]}]}
    rules = {"rules": [{"allowed": {"origins": ["*"], "methods": ["PUT"], "headers": ["content-type"]}}]}

    before = preflight(other)
    refused = requests.put(f"{api}/other/cors", headers=auth, json=s3_form, timeout=10)
    requests.put(f"{api}/other/cors", headers=auth, json=rules, timeout=10)
    put(bucket(settings, bucket="other"), "k", PNG)
    database = requests.post(api.replace("r2/buckets", "d1/database"), headers=auth, json={"name": "x"}, timeout=10)

    assert (made.status_code, again.status_code, refused.status_code) == (200, 409, 400)
    assert (before.status_code, preflight(other).headers["Access-Control-Allow-Methods"]) == (403, "PUT")
    assert not list(cloud_server.cloud.r2._folder.glob("*.json"))
    reopened = LocalCloud(tmp_path / "served", base_url=cloud_server.base_url)
    assert reopened.cloudflare._r2["other"].read("k").body == PNG
    assert reopened.cloudflare._r2["other"].cors.rules == rules["rules"]
    assert database.json()["result"]["uuid"] in reopened.cloudflare._d1
    reopened.close()


def test_a_page_may_read_at_the_public_address_also_in_pieces(settings):
    put(bucket(settings), "k", PNG)
    asked = {"Origin": "https://page.example", "Range": "bytes=0-7"}

    answer = requests.get(f"{settings['R2_PUBLIC_BASE_URL']}/k", headers=asked, timeout=10)

    assert (answer.status_code, answer.content) == (206, PNG[:8])
    assert answer.raw.headers.getlist("Access-Control-Allow-Origin") == ["*"]


@pytest.fixture
def runpod(settings):
    return Runpod(
        wire=Wire(Clock()),
        clock=Clock(),
        base_url=settings["RUNPOD_API_BASE"],
        api_key=Credential(settings["RUNPOD_API_KEY"]),
    )


def test_runpod_walks_from_queue_to_output(runpod):
    waits, _ = runpod.run("local-endpoint", {"simulate": {"queue_seconds": 60}}, timeout=10.0)
    works, _ = runpod.run("local-endpoint", {"simulate": {"queue_seconds": 0, "run_seconds": 60}}, timeout=10.0)
    ends, _ = runpod.run("local-endpoint", {"simulate": {"queue_seconds": 0, "run_seconds": 0}}, timeout=10.0)

    answers = [runpod.status("local-endpoint", run_id, timeout=10.0) for run_id in (waits, works, ends)]

    assert [answer.status for answer in answers] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert answers[2].output["images"][0]["type"] == "base64"


def test_runpod_stops_a_run_once_and_for_all(runpod):
    run_id, _ = runpod.run("local-endpoint", {"prompt": "a cat"}, timeout=10.0)

    runpod.cancel("local-endpoint", run_id, timeout=10.0)
    runpod.cancel("local-endpoint", run_id, timeout=10.0)

    assert runpod.status("local-endpoint", run_id, timeout=10.0).verdict is Verdict.CANCELLED


def test_runpod_does_not_know_strangers(runpod, settings):
    assert runpod.status("local-endpoint", "nobody", timeout=10.0).verdict is Verdict.NOT_FOUND
    with pytest.raises(TransientError, match="404"):
        runpod.run("another-endpoint", {}, timeout=10.0)
    base_url, key = settings["RUNPOD_API_BASE"], Credential("wrong")
    stranger = Runpod(wire=Wire(Clock()), clock=Clock(), base_url=base_url, api_key=key)
    with pytest.raises(TransientError, match="401"):
        stranger.run("local-endpoint", {}, timeout=10.0)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"prompt": "x"}', b'{"input": "x"}'])
def test_runpod_refuses_a_body_without_an_input_object(settings, body):
    url = f"{settings['RUNPOD_API_BASE']}/local-endpoint/run"
    headers = {"Authorization": f"Bearer {settings['RUNPOD_API_KEY']}"}

    answer = requests.post(url, data=body, headers=headers, timeout=10)

    assert (answer.status_code, answer.json()["status"]) == (400, 400)


def test_runpod_forgets_after_half_an_hour_and_remembers_over_a_restart(cloud, tmp_path, clock):
    from tools.cloud import LocalCloud

    auth = {"authorization": "Bearer local-runpod-key"}
    sent = cloud.handle(Request("POST", "/v2/local-endpoint/run", "", auth, b'{"input": {"prompt": "x"}}'))
    run_id = json.loads(sent.body)["id"]
    again = LocalCloud(tmp_path / "cloud", base_url="http://cloud.test:8001", clock=lambda: clock.at.timestamp())

    def status():
        return json.loads(again.handle(Request("GET", f"/v2/local-endpoint/status/{run_id}", "", auth)).body)["status"]

    assert status() == "IN_QUEUE"
    clock.advance(4 + 1799)
    assert status() == "COMPLETED"
    clock.advance(2)
    assert status() == 404
    again.close()


def test_a_picture_shows_the_prompt_in_its_own_letters():
    thai, other, blank = draw("แมวสีส้ม"), draw("แมวสีดำ"), draw("")

    assert len({thai, other, blank}) == 3
    assert draw("แมวสีส้ม") == thai
    assert draw("ก" * 10_000)[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_font_has_every_thai_letter():
    from PIL import ImageFont

    from tools.cloud.render import FONT

    font = ImageFont.truetype(str(FONT), 40)
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))

    for letter in map(chr, [*range(0x0E01, 0x0E3A), *range(0x0E40, 0x0E5B)]):
        assert (font.getmask(letter).getbbox(), bytes(font.getmask(letter))) != missing, letter
