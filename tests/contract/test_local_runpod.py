"""The local RunPod's webhooks, policy and counters: what the service cannot ask for is what the facts say."""

import base64
import http.server
import io
import json
import sqlite3
import threading

import pytest
import requests
from PIL import Image

from tools.cloud import Account, LocalCloud, Request
from tools.cloud.render import draw, draw_over
from tools.cloud.worker import MOST_BYTES, PICTURES_KEPT, fetch

AUTH = {"authorization": "Bearer local-runpod-key"}
HOOK = "https://hooks.test/runpod?job=1"
AT_ONCE = {"simulate": {"queue_seconds": 0, "run_seconds": 0}}


def call(cloud, method, operation, body=None, *, endpoint="local-endpoint"):
    answer = cloud.handle(Request(method, f"/v2/{endpoint}/{operation}", "", AUTH, json.dumps(body).encode()))
    return answer.status, json.loads(answer.body)


def run(cloud, given=None, **siblings):
    status, answer = call(cloud, "POST", "run", {"input": {"prompt": "a cat", **(given or {})}, **siblings})
    assert (status, answer["status"]) == (200, "IN_QUEUE")
    return answer["id"]


def status(cloud, run_id):
    code, answer = call(cloud, "GET", f"status/{run_id}")
    return code if code != 200 else answer["status"]


class Receiver:
    """What was sent, and what it answers."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []

    def __call__(self, url, headers, body):
        self.sent.append((url, headers, json.loads(body)))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer


class Crash(Exception):
    """Ends a delivery in the middle."""


def test_a_picture_has_as_many_bytes_as_are_asked_for_and_can_be_read(cloud, clock):
    run_id = run(cloud, {"simulate": {"bytes": 200_000}})
    clock.advance(5)

    _, answer = call(cloud, "GET", f"status/{run_id}")

    picture = base64.b64decode(answer["output"]["images"][0]["data"])
    assert len(picture) == 200_000
    assert Image.open(io.BytesIO(picture)).size == (512, 512)


def test_a_webhook_tells_the_status_the_input_and_itself(cloud, clock):
    run_id, receiver = run(cloud, webhook=HOOK), Receiver()
    clock.advance(3.9)
    cloud.runpod.deliver_due(receiver)
    assert receiver.sent == []

    clock.advance(0.2)
    cloud.runpod.deliver_due(receiver)
    cloud.runpod.deliver_due(receiver)

    _, shown = call(cloud, "GET", f"status/{run_id}")
    headers = {"Content-Type": "application/json", "User-Agent": "Go-http-client/2.0"}
    assert receiver.sent == [(HOOK, headers, {**shown, "input": {"prompt": "a cat"}, "webhook": HOOK})]
    assert (shown["status"], shown["id"]) == ("COMPLETED", run_id)
    assert "webhook" not in shown


def test_a_failed_run_is_told_too(cloud, clock):
    run(cloud, {"simulate": {"status": "FAILED", "error": "CUDA out of memory"}}, webhook=HOOK)
    receiver = Receiver()
    clock.advance(5)

    cloud.runpod.deliver_due(receiver)

    ((_, _, body),) = receiver.sent
    assert (body["status"], body["error"]) == ("FAILED", "CUDA out of memory")


@pytest.mark.parametrize("last", ["TIMED_OUT", "CANCELLED"])
def test_what_ends_from_outside_is_not_told(cloud, clock, last):
    run(cloud, {"simulate": {"status": last}}, webhook=HOOK)
    cancelled, receiver = run(cloud, webhook=HOOK), Receiver()
    call(cloud, "POST", f"cancel/{cancelled}")
    run(cloud, {"simulate": {"run_seconds": 60}}, webhook=HOOK, policy={"ttl": 10_000})
    run(cloud)
    clock.advance(120)

    cloud.runpod.deliver_due(receiver)

    assert receiver.sent == []


@pytest.mark.parametrize("webhook", [None, ""])
def test_without_a_webhook_nobody_is_told(cloud, clock, webhook):
    run(cloud, webhook=webhook)
    receiver = Receiver()
    clock.advance(120)

    cloud.runpod.deliver_due(receiver)

    assert receiver.sent == []


@pytest.mark.parametrize("answer", [500, 302, 404, ConnectionRefusedError()])
def test_a_webhook_is_tried_again_after_5_and_15_seconds_and_then_never(cloud, clock, answer):
    run(cloud, AT_ONCE, webhook=HOOK)
    receiver = Receiver(*[answer] * 9)
    tried = []
    for second in range(120):
        before = len(receiver.sent)
        cloud.runpod.deliver_due(receiver)
        tried += [second] * (len(receiver.sent) - before)
        clock.advance(1)

    assert tried == [0, 5, 20]


def test_a_webhook_that_is_taken_at_the_second_try_is_not_sent_again(cloud, clock):
    run(cloud, AT_ONCE, webhook=HOOK)
    receiver = Receiver(503, 204)
    for _ in range(60):
        cloud.runpod.deliver_due(receiver)
        clock.advance(1)

    assert len(receiver.sent) == 2


def test_an_address_that_is_none_does_not_keep_others_from_being_told(cloud):
    from tools.cloud.server import send

    run(cloud, AT_ONCE, webhook="nowhere")
    run(cloud, AT_ONCE, webhook="http://[")
    run(cloud, AT_ONCE, webhook=HOOK)
    sent = []

    def send_or_note(url, headers, body):
        sent.append(url)
        return 200 if url == HOOK else send(url, headers, body)

    cloud.runpod.deliver_due(send_or_note)

    assert sent == ["nowhere", "http://[", HOOK]


def test_webhooks_survive_a_restart_with_the_tries_they_had(cloud, clock, tmp_path):
    run(cloud, AT_ONCE, webhook=HOOK)
    run(cloud, webhook=HOOK)
    before, after = Receiver(500), Receiver(*[500] * 9)
    cloud.runpod.deliver_due(before)

    again = LocalCloud(tmp_path / "cloud", base_url="http://cloud.test:8001", clock=lambda: clock.at.timestamp())
    for _ in range(60):
        again.runpod.deliver_due(after)
        clock.advance(1)
    again.close()

    assert (len(before.sent), len(after.sent)) == (1, 2 + 3)


def test_a_crash_in_the_middle_of_a_delivery_sends_it_again(cloud):
    run(cloud, AT_ONCE, webhook=HOOK)
    crashing, receiver = Receiver(Crash()), Receiver()
    with pytest.raises(Crash):
        cloud.runpod.deliver_due(crashing)

    cloud.runpod.deliver_due(receiver)

    assert len(receiver.sent) == 1


def test_a_file_of_an_earlier_version_still_opens(tmp_path, clock):
    (tmp_path / "cloud").mkdir()
    old = sqlite3.connect(tmp_path / "cloud" / "runpod.sqlite")
    old.execute(
        "CREATE TABLE runs (id TEXT PRIMARY KEY, endpoint_id TEXT, input TEXT, created_at REAL, cancelled_at REAL)"
    )
    old.execute(
        "INSERT INTO runs VALUES ('old-run', 'local-endpoint', '{\"prompt\": \"x\"}', ?, NULL)",
        [clock.at.timestamp()],
    )
    old.commit()
    old.close()

    receiver = Receiver()
    for _ in range(2):  # the second time there is nothing left to add
        cloud = LocalCloud(tmp_path / "cloud", base_url="http://cloud.test:8001", clock=lambda: clock.at.timestamp())
        run(cloud, webhook=HOOK)
        clock.advance(10)
        cloud.runpod.deliver_due(receiver)
        assert status(cloud, "old-run") == "COMPLETED"
        cloud.close()

    assert len(receiver.sent) == 2


def test_a_run_that_works_for_too_long_fails_then(cloud, clock):
    slow = {"simulate": {"queue_seconds": 7, "run_seconds": 60}}
    run_id, receiver = run(cloud, slow, policy={"executionTimeout": 5_000}, webhook=HOOK), Receiver()
    clock.advance(11.9)
    assert status(cloud, run_id) == "IN_PROGRESS"

    clock.advance(0.2)

    _, shown = call(cloud, "GET", f"status/{run_id}")
    cloud.runpod.deliver_due(receiver)
    assert (shown["status"], shown["error"]) == ("FAILED", "executionTimeout exceeded")
    assert (shown["delayTime"], shown["executionTime"]) == (7_000, 5_000)
    assert [body["status"] for _, _, body in receiver.sent] == ["FAILED"]


def test_a_run_may_work_for_ten_minutes_where_nothing_else_is_said(cloud, clock):
    fits = run(cloud, {"simulate": {"queue_seconds": 0, "run_seconds": 600}})
    too_long = run(cloud, {"simulate": {"queue_seconds": 0, "run_seconds": 601}})

    clock.advance(602)

    assert [status(cloud, fits), status(cloud, too_long)] == ["COMPLETED", "FAILED"]


@pytest.mark.parametrize("simulate", [{"queue_seconds": 60}, {"queue_seconds": 0, "run_seconds": 60}])
def test_a_run_is_gone_at_the_end_of_its_ttl_even_if_it_works(cloud, clock, simulate):
    run_id = run(cloud, {"simulate": simulate}, policy={"ttl": 10_000})
    clock.advance(9.9)
    assert status(cloud, run_id) in ("IN_QUEUE", "IN_PROGRESS")

    clock.advance(0.2)

    assert call(cloud, "GET", f"status/{run_id}") == (
        404,
        {"status": 404, "title": "Not Found", "detail": "job not found"},
    )
    assert call(cloud, "POST", f"cancel/{run_id}")[0] == 404


def test_a_run_that_is_over_is_kept_for_half_an_hour_whatever_its_ttl(cloud, clock):
    run_id = run(cloud, policy={"ttl": 10_000})

    clock.advance(4 + 1799)
    assert status(cloud, run_id) == "COMPLETED"

    clock.advance(2)
    assert status(cloud, run_id) == 404


@pytest.mark.parametrize(
    "policy",
    [
        {"executionTimeout": 5_000, "ttl": 10_000},
        {"executionTimeout": 604_800_000, "ttl": 604_800_000},
        {"executionTimeout": None, "ttl": None},
        {"lowPriority": True},
        {},
        None,
    ],
)
def test_a_policy_within_its_bounds_is_taken(cloud, policy):
    assert status(cloud, run(cloud, policy=policy)) == "IN_QUEUE"


@pytest.mark.parametrize(
    "siblings",
    [
        {"policy": {"executionTimeout": 4_999}},
        {"policy": {"executionTimeout": 604_800_001}},
        {"policy": {"ttl": 9_999}},
        {"policy": {"ttl": 604_800_001}},
        {"policy": {"ttl": "60000"}},
        {"policy": {"ttl": True}},
        {"policy": []},
        {"webhook": 5},
    ],
)
def test_what_is_beside_the_input_is_refused_where_it_is_wrong(cloud, siblings):
    code, answer = call(cloud, "POST", "run", {"input": {"prompt": "a cat"}, **siblings})

    assert (code, answer["status"], answer["title"]) == (400, 400, "Bad Request")
    assert cloud.runpod.inputs() == []


def test_health_counts_the_runs_that_are_known(cloud, clock):
    forgotten = run(cloud)
    clock.advance(3600)
    for simulate in (
        {"queue_seconds": 60},
        {"queue_seconds": 0, "run_seconds": 60},
        {"queue_seconds": 0, "run_seconds": 60},
        {"queue_seconds": 0, "run_seconds": 0},
        {"queue_seconds": 0, "run_seconds": 0, "status": "FAILED"},
        {"queue_seconds": 0, "run_seconds": 0, "status": "TIMED_OUT"},
    ):
        run(cloud, {"simulate": simulate})
    call(cloud, "POST", f"cancel/{run(cloud)}")

    assert status(cloud, forgotten) == 404
    assert call(cloud, "GET", "health") == (
        200,
        {
            "jobs": {"completed": 1, "failed": 2, "inProgress": 2, "inQueue": 1, "retried": 0},
            "workers": {"idle": 0, "initializing": 0, "ready": 0, "running": 2, "throttled": 0, "unhealthy": 0},
        },
    )


def test_health_of_an_endpoint_with_nothing_to_do_has_a_worker_that_waits(cloud):
    code, answer = call(cloud, "GET", "health")

    assert (code, set(answer["jobs"].values())) == (200, {0})
    assert (answer["workers"]["idle"], answer["workers"]["running"]) == (1, 0)


def test_health_wants_the_key(cloud):
    assert cloud.handle(Request("GET", "/v2/local-endpoint/health")).status == 401


@pytest.fixture
def larger(tmp_path, clock):
    """A local cloud whose account has an endpoint more."""
    account = Account(endpoints=("edit-endpoint",))
    cloud = LocalCloud(
        tmp_path / "larger", base_url="http://cloud.test:8001", account=account, clock=lambda: clock.at.timestamp()
    )
    yield cloud
    cloud.close()


def test_an_account_may_have_several_endpoints(larger, cloud):
    sent = {"input": {"prompt": "a cat"}}

    assert call(larger, "POST", "run", sent, endpoint="edit-endpoint")[0] == 200
    assert call(larger, "POST", "run", sent)[0] == 200
    assert call(larger, "POST", "run", sent, endpoint="another")[0] == 404
    assert call(cloud, "POST", "run", sent, endpoint="edit-endpoint")[0] == 404


def test_a_run_is_found_only_on_its_own_endpoint(larger):
    run_id = run(larger)

    for method, operation in (("GET", "status"), ("POST", "cancel")):
        code, answer = call(larger, method, f"{operation}/{run_id}", endpoint="edit-endpoint")
        assert (code, answer["detail"]) == (404, "job not found")
    assert status(larger, run_id) == "IN_QUEUE"


def test_health_is_that_of_one_endpoint(larger):
    run(larger)

    assert call(larger, "GET", "health")[1]["jobs"]["inQueue"] == 1
    assert call(larger, "GET", "health", endpoint="edit-endpoint")[1]["jobs"]["inQueue"] == 0


def test_a_worker_tells_its_progress_while_it_works(cloud, clock):
    run_id = run(cloud, {"simulate": {"queue_seconds": 1, "run_seconds": 10, "progress": 4}})
    told = []
    for _ in range(6):
        told.append(call(cloud, "GET", f"status/{run_id}")[1].get("output", {}).get("progress"))
        clock.advance(2.5)

    assert told == [None, "0/4", "1/4", "2/4", "3/4", None]


def test_a_run_that_says_nothing_of_progress_has_no_output_before_its_end(cloud, clock):
    run_id = run(cloud)
    clock.advance(2)

    assert "output" not in call(cloud, "GET", f"status/{run_id}")[1]


def workflow(**inputs):
    """A workflow as ComfyUI's API takes it, with the node that loads a picture where there is an address."""
    nodes = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "qwen.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "TextEncodeQwenImageEdit", "inputs": {"prompt": "", "clip": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["2", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat on the moon"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry"}},
    }
    return {**nodes, "6": {"class_type": "LoadImageFromHttpURL", "inputs": inputs}} if inputs else nodes


def drawn(cloud, run_id):
    """The picture in the output of a run."""
    _, answer = call(cloud, "GET", f"status/{run_id}")
    return base64.b64decode(answer["output"]["images"][0]["data"])


def test_a_workflow_draws_the_first_prompt_that_is_in_it(cloud, clock):
    run_id = run(cloud, {"prompt": "another", "workflow": workflow()})
    clock.advance(5)

    assert drawn(cloud, run_id) == draw("a cat on the moon")


@pytest.mark.parametrize("given", [[], "x", {}, {"1": None}, {"1": {}}, {"1": {"inputs": []}}])
def test_a_workflow_without_a_prompt_draws_that_of_the_input(cloud, clock, given):
    run_id = run(cloud, {"prompt": "a dog", "workflow": given})
    clock.advance(5)

    assert drawn(cloud, run_id) == draw("a dog")


SECRET_URL = "https://pictures.test/uploads/a.png?X-Amz-Signature=secret"


def picture(width, height, colour):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


class Pictures:
    """Stands for the hosts of pictures: what they answer, and what was asked for."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def __call__(self, url):
        self.asked.append(url)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def edit(cloud, clock, monkeypatch):
    """A run whose workflow edits a picture, and that is over; and the hosts of the picture."""

    def make(answer, **more):
        pictures = Pictures(answer)
        monkeypatch.setattr(cloud.runpod.worker, "fetch", pictures)
        run_id = run(cloud, {"workflow": workflow(image_url=SECRET_URL), **more}, webhook=HOOK)
        clock.advance(5)
        return run_id, pictures

    return make


def test_an_edit_shows_the_picture_darker_in_a_frame_with_the_prompt_on_it(cloud, edit):
    half = Image.open(io.BytesIO(picture(400, 100, "white")))
    half.paste("red", (0, 0, 200, 100))
    file = io.BytesIO()
    half.save(file, "PNG")
    run_id, pictures = edit(file.getvalue())

    found = Image.open(io.BytesIO(drawn(cloud, run_id)))

    assert pictures.asked == [SECRET_URL]
    assert (found.size, found.format) == ((512, 512), "PNG")
    assert found.getpixel((100, 40)) == (170, 0, 0)
    assert found.getpixel((400, 40)) == (170, 170, 170)
    assert found.getpixel((5, 256)) == found.getpixel((256, 506)) not in ((170, 0, 0), (170, 170, 170))
    assert [most for _, most in found.getextrema()] == [255, 255, 255]


def test_another_prompt_makes_another_edit_of_the_same_picture():
    under = picture(30, 20, "blue")

    assert len({draw_over("a cat", under), draw_over("a dog", under), draw("a cat")}) == 3
    assert draw_over("a cat", under) == draw_over("a cat", under)


def test_the_picture_of_an_edit_is_fetched_once(cloud, edit):
    run_id, pictures = edit(picture(8, 8, "blue"))

    assert drawn(cloud, run_id) == drawn(cloud, run_id)
    cloud.runpod.deliver_due(Receiver())
    assert len(pictures.asked) == 1


def test_the_picture_of_an_edit_is_not_fetched_before_its_end(cloud, clock, edit):
    _, pictures = edit(picture(8, 8, "blue"), simulate={"run_seconds": 60, "progress": 2})

    call(cloud, "GET", "health")
    assert pictures.asked == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (OSError("HTTP 403"), "HTTP 403"),
        (b"<html>", "it is no picture that can be read"),
        (b"", "it is no picture that can be read"),
        (picture(64, 64, "red")[:60], "it is no picture that can be read"),
    ],
    ids=["refused", "a page", "nothing", "cut off"],
)
@pytest.mark.parametrize("shape", ["base64", "data_url", "link"])
def test_an_edit_whose_picture_cannot_be_had_fails(cloud, edit, answer, why, shape):
    run_id, pictures = edit(answer, simulate={"shape": shape})
    receiver = Receiver()

    _, shown = call(cloud, "GET", f"status/{run_id}")
    cloud.runpod.deliver_due(receiver)

    told = f"image could not be loaded: https://pictures.test/uploads/a.png: {why}"
    assert (shown["status"], shown["error"], "output" in shown) == ("FAILED", told, False)
    assert [(body["status"], body["error"]) for _, _, body in receiver.sent] == [("FAILED", told)]
    assert len(pictures.asked) == 1


def test_an_edit_that_failed_stays_so(cloud, clock, edit, tmp_path):
    run_id, pictures = edit(OSError("HTTP 403"))
    assert status(cloud, run_id) == "FAILED"
    pictures.answer = picture(8, 8, "blue")

    again = LocalCloud(tmp_path / "cloud", base_url="http://cloud.test:8001", clock=lambda: clock.at.timestamp())
    assert (status(cloud, run_id), status(again, run_id)) == ("FAILED", "FAILED")
    again.close()
    assert call(cloud, "POST", f"cancel/{run_id}")[1]["status"] == "FAILED"
    assert call(cloud, "GET", "health")[1]["jobs"]["failed"] == 1
    assert cloud.handle(Request("GET", f"/results/{run_id}.png")).status == 404


def test_a_cancel_that_comes_too_late_tells_that_an_edit_failed(cloud, edit):
    run_id, _ = edit(OSError("HTTP 403"))

    assert call(cloud, "POST", f"cancel/{run_id}") == (200, {"id": run_id, "status": "FAILED"})


def test_only_the_newest_edits_are_kept(cloud, edit):
    run_id, pictures = edit(picture(8, 8, "blue"))
    first = drawn(cloud, run_id)
    for _ in range(PICTURES_KEPT):
        drawn(cloud, edit(picture(8, 8, "blue"))[0])

    cloud.runpod.worker.fetch = pictures
    assert drawn(cloud, run_id) == first
    assert len(pictures.asked) == 2


def test_a_link_to_an_edit_leads_to_its_picture(cloud, edit):
    run_id, pictures = edit(picture(8, 8, "blue"), simulate={"shape": "link"})

    _, shown = call(cloud, "GET", f"status/{run_id}")
    found = cloud.handle(Request("GET", shown["output"]["image_url"].removeprefix("http://cloud.test:8001")))

    assert found.body == draw_over("a cat on the moon", picture(8, 8, "blue"))
    assert len(pictures.asked) == 1


def test_others_wait_for_the_picture_that_is_under_way_and_the_cloud_goes_on(cloud, edit):
    run_id, _ = edit(b"")
    begun, go_on, asked, found = threading.Event(), threading.Event(), [], []

    def slow(url):
        asked.append(url)
        begun.set()
        assert go_on.wait(10)
        return picture(8, 8, "blue")

    cloud.runpod.worker.fetch = slow
    threads = [threading.Thread(target=lambda: found.append(drawn(cloud, run_id))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert status(cloud, run(cloud)) == "IN_QUEUE"
    go_on.set()
    for thread in threads:
        thread.join()

    assert (len(asked), len(found), len(set(found))) == (1, 3, 1)


def test_the_served_cloud_edits_a_picture_of_its_own_bucket(cloud_server):
    server, blue = cloud_server, picture(8, 8, "blue")
    server.cloud.r2._keep("a.png", blue, {"cache-control": "no-store"}, '"etag"')
    given = {"workflow": workflow(image_url=f"{server.base_url}/cdn/a.png?x=1"), **AT_ONCE}

    run_id = post(server, input=given).json()["id"]

    assert drawn(server.cloud, run_id) == draw_over("a cat on the moon", blue)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("{base}/cdn/nothing?key=secret", "HTTP 404"),
        ("http://127.0.0.1:1/?key=secret", "no answer"),
        ("file:///etc/hostname?key=secret", "no answer"),
        ("nowhere?key=secret", "no answer"),
        ("http://[?key=secret", "no answer"),
    ],
)
def test_what_is_no_address_of_a_picture_is_told_without_its_query(cloud_server, url, why):
    with pytest.raises(OSError, match=why) as caught:
        fetch(url.format(base=cloud_server.base_url))

    assert "secret" not in str(caught.value)


def test_a_picture_is_not_loaded_by_a_proxy(cloud_server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    cloud_server.cloud.r2._keep("a.png", b"png", {}, '"etag"')

    assert fetch(f"{cloud_server.base_url}/cdn/a.png") == b"png"


def test_a_picture_of_more_than_20_mb_is_not_loaded(cloud_server):
    for size in (MOST_BYTES, MOST_BYTES + 1):
        cloud_server.cloud.r2._keep(f"{size}", bytes(size), {}, '"etag"')

    assert len(fetch(f"{cloud_server.base_url}/cdn/{MOST_BYTES}")) == MOST_BYTES
    with pytest.raises(OSError, match="20 MB"):
        fetch(f"{cloud_server.base_url}/cdn/{MOST_BYTES + 1}")


def simulate_health(cloud, **wish):
    code, answer = call(cloud, "POST", "simulate/health", wish)
    assert code == 200, answer
    return answer


NO_WORKERS = {"idle": 0, "initializing": 0, "ready": 0, "running": 0, "throttled": 0, "unhealthy": 0}


def test_health_tells_the_workers_that_it_is_told_until_it_is_told_otherwise(cloud, clock):
    usual = call(cloud, "GET", "health")
    run(cloud)
    simulate_health(cloud, workers={"throttled": 3, "unhealthy": 1})
    clock.advance(3600)
    run(cloud)

    assert call(cloud, "GET", "health")[1] == {
        "jobs": {**usual[1]["jobs"], "inQueue": 1},
        "workers": {**NO_WORKERS, "throttled": 3, "unhealthy": 1},
    }
    assert simulate_health(cloud, workers={})["workers"] == NO_WORKERS
    assert simulate_health(cloud, workers=None)["workers"] == usual[1]["workers"]
    assert call(cloud, "GET", "health")[1]["workers"] == usual[1]["workers"]


def test_the_health_that_is_told_is_that_of_one_endpoint(larger):
    simulate_health(larger, workers={"throttled": 3}, hold=True)
    sent = {"input": {"prompt": "a cat", **AT_ONCE}}
    _, other = call(larger, "POST", "run", sent, endpoint="edit-endpoint")

    assert call(larger, "GET", "health", endpoint="edit-endpoint")[1]["workers"]["throttled"] == 0
    assert call(larger, "GET", f"status/{other['id']}", endpoint="edit-endpoint")[1]["status"] == "COMPLETED"


def test_the_health_to_tell_wants_the_key(cloud):
    assert cloud.handle(Request("POST", "/v2/local-endpoint/simulate/health", body=b'{"workers": {}}')).status == 401
    assert call(cloud, "GET", "health")[1]["workers"]["idle"] == 1


@pytest.mark.parametrize(
    "wish",
    [
        {},
        [],
        {"workers": []},
        {"workers": {"asleep": 1}},
        {"workers": {"idle": -1}},
        {"workers": {"idle": True}},
        {"workers": {"idle": "1"}},
        {"workers": {}, "hold": 1},
    ],
)
def test_a_health_that_is_none_is_refused(cloud, wish):
    code, answer = call(cloud, "POST", "simulate/health", wish)

    assert (code, answer["title"]) == (400, "Bad Request")
    assert call(cloud, "GET", "health")[1]["workers"]["idle"] == 1


def test_while_runs_are_held_none_begins_and_then_they_do(cloud, clock):
    works, waits = run(cloud, {"simulate": {"queue_seconds": 0, "run_seconds": 600}}), run(cloud, webhook=HOOK)
    receiver = Receiver()
    simulate_health(cloud, workers={"throttled": 1}, hold=True)
    later = run(cloud, AT_ONCE, webhook=HOOK)
    clock.advance(300)
    cloud.runpod.deliver_due(receiver)

    assert [status(cloud, run_id) for run_id in (works, waits, later)] == ["IN_PROGRESS", "IN_QUEUE", "IN_QUEUE"]
    assert call(cloud, "GET", "health")[1]["jobs"] == {
        "completed": 0,
        "failed": 0,
        "inProgress": 1,
        "inQueue": 2,
        "retried": 0,
    }
    assert receiver.sent == []

    simulate_health(cloud, workers=None)

    assert [status(cloud, run_id) for run_id in (works, waits, later)] == ["IN_PROGRESS", "IN_PROGRESS", "COMPLETED"]
    assert status(cloud, run(cloud, AT_ONCE)) == "COMPLETED"
    clock.advance(2.9)
    assert status(cloud, waits) == "IN_PROGRESS"
    clock.advance(0.2)
    _, shown = call(cloud, "GET", f"status/{waits}")
    assert (shown["status"], shown["delayTime"], shown["executionTime"]) == ("COMPLETED", 300_000, 3_000)
    cloud.runpod.deliver_due(receiver)
    assert {body["id"] for _, _, body in receiver.sent} == {waits, later}


def test_a_held_run_can_be_cancelled_and_expires(cloud, clock):
    simulate_health(cloud, workers={}, hold=True)
    cancelled, expires = run(cloud, webhook=HOOK), run(cloud, policy={"ttl": 10_000})
    receiver = Receiver()
    assert call(cloud, "POST", f"cancel/{cancelled}")[1]["status"] == "CANCELLED"
    clock.advance(11)
    assert status(cloud, expires) == 404

    simulate_health(cloud, workers=None)
    clock.advance(60)
    cloud.runpod.deliver_due(receiver)

    assert (status(cloud, cancelled), status(cloud, expires), receiver.sent) == ("CANCELLED", 404, [])


def test_what_was_held_goes_on_after_a_restart(cloud, clock, tmp_path):
    simulate_health(cloud, workers={}, hold=True)
    run_id = run(cloud)
    clock.advance(60)

    again = LocalCloud(tmp_path / "cloud", base_url="http://cloud.test:8001", clock=lambda: clock.at.timestamp())

    assert status(again, run_id) == "IN_PROGRESS"
    again.close()


@pytest.mark.parametrize("wish", ["COMPLETED", "FAILED"])
def test_a_cancel_changes_nothing_of_a_run_that_is_over(cloud, clock, wish):
    run_id = run(cloud, {"simulate": {"status": wish}}, webhook=HOOK)
    receiver = Receiver()
    clock.advance(10)

    assert call(cloud, "POST", f"cancel/{run_id}") == (200, {"id": run_id, "status": wish})
    assert status(cloud, run_id) == wish
    cloud.runpod.deliver_due(receiver)
    assert len(receiver.sent) == 1


@pytest.fixture
def listener():
    """A receiver on a real port: what came, with an event; requests to /slow wait until they are let go."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/slow":
                self.server.let_go.wait(20)
            self.send_response(204)
            self.end_headers()
            self.server.came.append((self.path, dict(self.headers), json.loads(body)))
            self.server.something_came.set()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.came, server.something_came, server.let_go = [], threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.let_go.set()
    server.shutdown()
    thread.join()
    server.server_close()


def post(cloud_server, **body):
    url = f"{cloud_server.base_url}/v2/local-endpoint/run"
    return requests.post(url, json={"input": AT_ONCE, **body}, headers={"Authorization": AUTH["authorization"]})


def test_the_served_cloud_sends_a_webhook_by_itself(cloud_server, listener):
    run_id = post(cloud_server, webhook=f"{listener.url}/hook?job=1").json()["id"]

    assert listener.something_came.wait(10)
    ((path, headers, body),) = listener.came
    assert (path, body["id"], body["status"], body["input"]) == ("/hook?job=1", run_id, "COMPLETED", AT_ONCE)
    assert (headers["Content-Type"], headers["User-Agent"]) == ("application/json", "Go-http-client/2.0")
    assert "Authorization" not in headers


def test_a_slow_receiver_does_not_hold_up_the_others(cloud_server, listener):
    for path in ("slow", "slow", "quick"):
        post(cloud_server, webhook=f"{listener.url}/{path}")

    assert listener.something_came.wait(8)
    assert [path for path, _, _ in listener.came] == ["/quick"]
    listener.let_go.set()
