"""A job's end is told at its callback_url: once written down, signed, again until it is heard, and never in the way."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest
import requests
from standardwebhooks import Webhook, WebhookVerificationError
from standardwebhooks import webhooks as standard

from chalicelib import bootstrap, courier, jobs, outbox, settings
from chalicelib.courier import DELAYS
from chalicelib.errors import IndeterminateError, SettingError
from chalicelib.jobs import from_text
from chalicelib.outbox import OF_HOST
from tests.conftest import Bench, call

SECRETS = ("whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "whsec_" + "YWJjZGVmMDEyMzQ1Njc4OWFiY2RlZjAx")
HOOK = "https://shop.example/hooks"
CREATE = "/api/queue/create"
TOLD = json.dumps({"id": "x", "outputs": [], "result_url": None, "result_r2_key": None})
INSERT = (
    "INSERT INTO deliveries (job_id, version, type, url, data, created_at, due_at) "
    f"VALUES (?1, 1, 'job.done', ?2, '{TOLD}', ?3, ?3)"
)
FAILED = {"status": "FAILED", "error": "out of memory"}
LONG = {"run_seconds": 900}


@pytest.fixture
def environment(environment):
    return {**environment, "CALLBACK_SECRETS": ",".join(SECRETS)}


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


class Receiver:
    """What listens at the callback_url, and what it answers next."""

    def __init__(self, clock):
        self.clock = clock
        self.got = []
        self.answers = []

    def __call__(self, request):
        body = request.body if isinstance(request.body, str) else request.body.decode()
        self.got.append((dict(request.headers), body))
        answer = self.answers.pop(0) if self.answers else (204, {}, "")
        if isinstance(answer, float):
            self.clock.advance(answer)
            raise requests.ReadTimeout("too slow")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def events(self):
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver(wire, clock):
    receiver = Receiver(clock)
    wire.add_callback("POST", HOOK, callback=receiver)
    return receiver


@pytest.fixture
def verify(clock, monkeypatch):
    """Check a message as a receiver does, by the tests' clock."""

    class At(standard.datetime):
        @classmethod
        def now(cls, tz=None):
            return clock.now()

    monkeypatch.setattr(standard, "datetime", At)
    return lambda secret, got: Webhook(secret).verify(got[1], got[0])


def create(client, prompt="a cat", *, url=HOOK, **body):
    status, answer, _ = call(client, "POST", CREATE, {"prompt": prompt, "callback_url": url, **body})
    assert status == 200, answer
    return answer["id"]


def minute(bench, seconds=57.5):
    bench.clock.advance(3)
    return bench.service.pipeline.run_minute(bench.deadline(seconds))


def end_and_tell(bench):
    """A round that ends the job, and then what tells of it, which in a minute of the schedule run side by side."""
    bench.round()
    return bench.service.courier.run(bench.deadline())


def deliveries(client, job_id):
    bootstrap.service().reads.forget()
    status, answer, _ = call(client, "GET", f"/api/jobs/{job_id}/deliveries")
    assert status == 200
    return answer["deliveries"]


def row(table, column):
    (found,) = table(f"SELECT {column} AS value FROM deliveries")
    return found["value"]


# What is told


def test_a_finished_job_is_told_within_the_same_minute_signed_by_each_secret(client, bench, receiver, verify):
    job_id = create(client, "แมวสีส้ม", metadata={"order": "17"})

    minute(bench)

    (got,) = receiver.got
    for secret in SECRETS:
        event = verify(secret, got)
    assert (event["type"], event["data"]["id"], event["data"]["status"]) == ("job.done", job_id, "done")
    assert event["data"]["result_url"] == bench.job(job_id).result_url
    assert (event["data"]["prompt"], event["data"]["metadata"]) == ("แมวสีส้ม", {"order": "17"})
    assert got[0]["webhook-id"].startswith(f"msg_{job_id}_")
    with pytest.raises(WebhookVerificationError):
        verify("whsec_" + "QUJDREVGMDEyMzQ1Njc4OWFiY2RlZjAx", got)


def test_one_that_failed_is_told_with_its_code(client, bench, receiver):
    create(client, input={"prompt": "a cat", "simulate": FAILED})

    minute(bench)

    (event,) = receiver.events()
    assert (event["type"], event["data"]["error_code"]) == ("job.error", "worker_failed")


@pytest.mark.parametrize("when", ["waiting", "running", "in_between"])
def test_one_that_is_cancelled_is_told_however_it_ends(client, bench, receiver, faults, when):
    if when != "running":
        answer = (429, "", {"Retry-After": "900"}) if when == "waiting" else (500, "")
        faults.add(r"POST .*/run$", answer)
    job_id = create(client, input={"prompt": "a cat", "simulate": LONG})
    if when == "running":
        bench.round()

    assert call(client, "POST", f"/api/jobs/{job_id}/cancel")[0] == 200
    bench.clock.advance(601 if when == "in_between" else 0)
    minute(bench)
    minute(bench)

    assert [event["type"] for event in receiver.events()] == ["job.cancelled"]
    assert receiver.events()[0]["data"]["status"] == "cancelled"
    assert receiver.events()[0]["data"]["finished_at"] == bench.job(job_id).finished_at


def test_every_end_is_told_one_after_a_retry_too(client, bench, receiver):
    job_id = create(client, input={"prompt": "a cat", "simulate": FAILED})
    minute(bench)

    call(client, "POST", f"/api/jobs/{job_id}/retry")
    minute(bench)
    minute(bench)

    assert [event["type"] for event in receiver.events()] == ["job.error", "job.error"]
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 2
    assert [one["n"] for one in deliveries(client, job_id)] == [1, 2]


def test_a_job_without_an_address_is_not_told(client, bench, receiver, table):
    call(client, "POST", CREATE, {"prompt": "a cat"})

    minute(bench)

    assert (receiver.got, table("SELECT * FROM deliveries")) == ([], [])


def test_what_is_told_is_how_it_ended_though_it_has_gone_on_since(client, bench, receiver):
    receiver.answers = [(500, {}, "")] * 2
    job_id = create(client, input={"prompt": "a cat", "simulate": FAILED})
    end_and_tell(bench)
    call(client, "POST", f"/api/jobs/{job_id}/retry")

    bench.clock.advance(DELAYS[1])
    bench.service.courier.run(bench.deadline())

    assert {event["data"]["status"] for event in receiver.events()} == {"error"}
    assert receiver.events()[2]["data"] == receiver.events()[0]["data"]


def test_a_message_is_under_20_kb_and_says_what_was_left_out(client, bench, receiver, table):
    words = {f"name-{n}": "ไ" * 500 for n in range(20)}
    create(client, "ก" * 9_000, metadata=words)

    minute(bench)

    ((_, body),) = receiver.got
    assert len(body.encode()) < 20_000
    assert json.loads(body)["data"]["left_out"] == ["outputs", "metadata"]
    assert json.loads(body)["data"]["result_url"]


def test_a_private_bucket_is_linked_when_it_is_sent(client, bench, receiver, monkeypatch):
    create(client)
    monkeypatch.setattr(bench.service.bucket, "_public_base_url", "")

    minute(bench)

    assert "X-Amz-Signature" in receiver.events()[0]["data"]["result_url"]


def test_the_callback_of_runpod_has_it_told_at_once(client, bench, receiver, environment, monkeypatch):
    job_id = create(client)
    bench.clock.advance(10)

    bench.service.pipeline._tell(
        bench.service.pipeline.look_at(bench.job(job_id), bench.deadline(24)), bench.deadline(24)
    )

    assert [event["type"] for event in receiver.events()] == ["job.done"]
    assert deliveries(client, job_id)[0]["status"] == "delivered"


# Again, and no more


def test_what_fails_is_tried_again_by_the_schedule_and_given_up_after_a_day(client, bench, receiver, table):
    receiver.answers = [(503, {}, "")] * 99
    job_id = create(client)
    begun = bench.clock.now()

    times = []
    while not times or deliveries(client, job_id)[0]["next_at"]:
        minute(bench)
        times = [line["at"] for line in deliveries(client, job_id)[0]["log"]]
        due = deliveries(client, job_id)[0]["next_at"]
        if due and (wait := (from_text(due) - bench.clock.now()).total_seconds()) > 60:
            bench.clock.advance(wait)

    waits = [(from_text(after) - from_text(before)).total_seconds() for before, after in pairwise(times)]
    assert len(times) == 1 + len(DELAYS)
    # At the latest in the next minute, of which the rounds beside it may have moved the one clock to the end.
    assert all(wait <= waited < wait + 120 for wait, waited in zip(DELAYS, waits, strict=True))
    assert 24 * 3600 < (bench.clock.now() - begun).total_seconds() < 29 * 3600
    assert deliveries(client, job_id)[0]["status"] == "failed"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_the_second_try_comes_in_the_same_minute(client, bench, receiver):
    receiver.answers = [(500, {}, "")]
    create(client)

    assert end_and_tell(bench) == 2
    assert len(receiver.got) == 2


def test_410_is_the_end(client, bench, receiver):
    receiver.answers = [(410, {}, "")]
    job_id = create(client)

    minute(bench)
    bench.clock.advance(90_000)
    minute(bench)

    assert len(receiver.got) == 1
    (one,) = deliveries(client, job_id)
    assert (one["status"], one["next_at"], one["log"][0]["status"]) == ("failed", None, 410)


def test_a_redirect_is_not_followed(client, bench, receiver, wire):
    elsewhere = wire.add_callback("POST", "https://other.example/", callback=lambda request: (200, {}, ""))
    receiver.answers = [(307, {"Location": "https://other.example/"}, "")]
    job_id = create(client)

    end_and_tell(bench)

    assert "redirects" in deliveries(client, job_id)[0]["log"][0]["error"]
    assert len(receiver.got) == 2  # the second try, at the same address
    assert elsewhere is None or elsewhere.call_count == 0


def test_retry_after_is_heeded(client, bench, receiver, table):
    receiver.answers = [(429, {"Retry-After": "700"}, "")]
    job_id = create(client)

    minute(bench)

    (one,) = deliveries(client, job_id)
    assert (from_text(one["next_at"]) - from_text(one["log"][0]["at"])).total_seconds() == 700


@pytest.mark.parametrize("answer", [requests.ConnectionError("reset"), requests.ReadTimeout("slow"), ValueError("odd")])
def test_a_receiver_that_is_not_there_is_a_failed_try(client, bench, receiver, answer):
    receiver.answers = [answer]
    job_id = create(client)

    end_and_tell(bench)

    (one,) = deliveries(client, job_id)
    assert (one["status"], one["tries"], one["log"][0]["status"]) == ("delivered", 2, None)
    assert one["log"][0]["error"]


# Outbox


def test_a_save_whose_answer_is_lost_writes_one_line(client, bench, receiver, faults, table):
    create(client)
    faults.add(r"POST .*/query$", requests.ConnectionError("reset"), after_effect=True, times=0)
    bench.clock.advance(10)
    save = bench.service.store.save

    def twice(changes, **options):
        save(changes, **options)
        return save(changes, **options)

    bench.service.pipeline.saver._store.save = twice
    bench.round()

    assert len(table("SELECT * FROM deliveries")) == 1


def test_two_who_claim_at_once_share_nothing_and_a_dead_ones_lease_ends(client, bench, receiver):
    create(client)
    bench.round()
    outbox, now = bench.service.outbox, bench.clock.now()

    first = outbox.claim(nonce="a", now=now, lease=60, timeout=5)
    second = outbox.claim(nonce="b", now=now, lease=60, timeout=5)
    bench.clock.advance(61)
    third = outbox.claim(nonce="c", now=bench.clock.now(), lease=60, timeout=5)

    assert (len(first), second, len(third)) == (1, [], 1)


def test_what_came_of_a_try_is_not_written_by_who_has_lost_the_claim(client, bench, receiver, table):
    create(client)
    bench.round()
    outbox = bench.service.outbox
    (ours,) = outbox.claim(nonce="a", now=bench.clock.now(), lease=1, timeout=5)
    bench.clock.advance(2)
    outbox.claim(nonce="b", now=bench.clock.now(), lease=60, timeout=5)

    outcome = courier.Outcome(delivery=ours, status="failed", due_at=None, line={})
    outbox.settle([outcome], nonce="a", timeout=5)

    assert (row(table, "status"), row(table, "claimer")) == ("pending", "b")


def test_one_host_that_has_much_due_leaves_room_for_others(client, bench, receiver, wire):
    wire.add_callback("POST", "https://small.example/", callback=lambda request: (200, {}, ""))
    for n in range(OF_HOST + 4):
        create(client, f"cat {n}")
    create(client, "a dog", url="https://small.example/")
    bench.round()

    claimed = bench.service.outbox.claim(nonce="a", now=bench.clock.now(), lease=60, timeout=5)

    hosts = [delivery.url.split("/")[2] for delivery in claimed]
    assert (hosts.count("shop.example"), hosts.count("small.example")) == (OF_HOST, 1)
    assert "small.example" in hosts[:2]


def test_one_host_with_very_much_due_does_not_hide_what_is_new(client, bench, receiver, table, monkeypatch):
    monkeypatch.setattr(outbox, "WINDOW", 5)
    for n in range(12):
        table(INSERT, f"old-{n}", HOOK, f"2026-01-31T00:00:{n:02d}.000Z")
    table(INSERT, "new", "https://small.example/", "2026-01-31T01:00:00.000Z")

    claimed = bench.service.outbox.claim(nonce="a", now=bench.clock.now(), lease=60, timeout=5)

    assert "new" in [delivery.job_id for delivery in claimed]


def test_much_that_is_due_is_told_in_one_run(client, bench, receiver, table):
    for n in range(120):
        table(INSERT, f"job-{n}", HOOK, "2026-01-31T00:00:00.000Z")

    assert bench.service.courier.run(bench.deadline()) == 120
    assert {one["status"] for one in table("SELECT status FROM deliveries")} == {"delivered"}


def test_a_receiver_that_does_not_answer_is_left_alone_for_a_minute(client, bench, receiver, table):
    receiver.answers = [requests.ReadTimeout("slow")] * 99
    for n in range(40):
        table(INSERT, f"job-{n}", HOOK, "2026-01-31T00:00:00.000Z")

    tried = bench.service.courier.run(bench.deadline(20))

    found = table("SELECT tries, due_at, log FROM deliveries")
    assert tried == len(receiver.got) <= courier.THREADS
    assert sum(one["tries"] for one in found) == tried
    assert all(one["due_at"] > jobs.to_text(bench.clock.now()) for one in found)


def test_a_message_that_cannot_be_made_is_a_failed_try(client, bench, receiver, table):
    table(INSERT.replace("outputs", "puts"), "a", HOOK, "2026-01-31T00:00:00.000Z")

    bench.service.courier.run(bench.deadline(20))

    assert (row(table, "tries"), row(table, "status")) == (1, "pending")
    assert "could not be sent" in json.loads(row(table, "log"))[0]["error"]


def test_a_slow_receiver_delays_no_round(client, bench, receiver):
    """Rounds begin on their grid though every receiver is waited for: what is told runs beside them."""
    released = threading.Event()
    receiver.answers = []
    started = []
    run_round = bench.service.pipeline.run_round

    def counted(deadline, **options):
        started.append(bench.clock.elapsed)
        if len(started) == 4:
            released.set()
        return run_round(deadline, **options)

    def slow(request):
        assert released.wait(20)
        return 204, {}, ""

    receiver.__class__ = type("Slow", (Receiver,), {"__call__": lambda self, request: slow(request)})
    bench.service.pipeline.run_round = counted
    create(client)

    minute(bench)

    assert [round(at - started[0]) for at in started] == [0, 15, 30, 45]


def test_while_d1_fails_the_courier_nothing_is_lost(client, bench, receiver, monkeypatch):
    create(client)
    bench.round()

    def fails(*args, **options):
        raise IndeterminateError("d1_timeout", "D1 did not answer in time.")

    with monkeypatch.context() as patch:
        patch.setattr(bench.service.outbox, "settle", fails)
        assert bench.service.courier.run(bench.deadline(30)) == 0
    bench.clock.advance(60)

    assert bench.service.courier.run(bench.deadline(30)) == 1
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_an_idle_minute_costs_one_call_more_and_none_without_secrets(bench):
    assert bench.d1_calls(lambda: bench.service.pipeline.run_minute(bench.deadline())) == 5

    object.__setattr__(bench.service.courier, "secrets", ())
    bench.clock.advance(120)
    assert bench.d1_calls(lambda: bench.service.pipeline.run_minute(bench.deadline())) == 4


def test_a_deleted_job_is_told_of_no_more(client, bench, receiver, table):
    receiver.answers = [(500, {}, "")] * 9
    job_id = create(client)
    minute(bench)

    assert call(client, "DELETE", f"/api/jobs/{job_id}")[0] == 200

    assert table("SELECT * FROM deliveries") == []


# Replay, and what is said of it


def test_a_replay_tells_it_again_now_with_the_same_id(client, bench, receiver):
    receiver.answers = [(410, {}, "")]
    job_id = create(client)
    minute(bench)

    status, answer, _ = call(client, "POST", f"/api/jobs/{job_id}/deliveries/1/replay")

    assert (status, answer["delivery"]["status"], answer["delivery"]["tries"]) == (200, "delivered", 1)
    assert len(receiver.got) == 2
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert [line["status"] for line in answer["delivery"]["log"]] == [410, 204]


def test_a_replay_that_fails_has_the_whole_schedule_again(client, bench, receiver):
    receiver.answers = [(204, {}, ""), (500, {}, "")]
    job_id = create(client)
    minute(bench)

    _, answer, _ = call(client, "POST", f"/api/jobs/{job_id}/deliveries/1/replay")

    assert (answer["delivery"]["status"], answer["delivery"]["tries"]) == ("pending", 1)
    assert answer["delivery"]["next_at"]


@pytest.mark.parametrize("n", ["2", "0", "-1", "x", "999999999999"])
def test_there_is_no_such_delivery(client, bench, receiver, n):
    job_id = create(client)
    minute(bench)

    status, answer, _ = call(client, "POST", f"/api/jobs/{job_id}/deliveries/{n}/replay")

    assert (status, answer["code"]) == (404, "delivery_not_found")
    assert (len(receiver.got), deliveries(client, job_id)[0]["status"]) == (1, "delivered")


def test_a_replay_of_a_job_that_is_deleted_meanwhile_finds_nothing(client, bench, receiver, table):
    job_id = create(client)
    minute(bench)

    def deleted(request):
        table("DELETE FROM deliveries")
        return 204, {}, ""

    receiver.__class__ = type("Deleting", (Receiver,), {"__call__": lambda self, request: deleted(request)})
    status, answer, _ = call(client, "POST", f"/api/jobs/{job_id}/deliveries/1/replay")

    assert (status, answer["code"]) == (404, "delivery_not_found")


def test_a_job_that_is_not_there_has_no_deliveries(client, bench):
    assert call(client, "GET", "/api/jobs/nobody/deliveries")[0] == 404


def test_no_log_line_has_the_address(client, bench, receiver, lines):
    create(client, url=HOOK)

    minute(bench)

    assert HOOK not in json.dumps(lines())
    assert [line["outcome"] for line in lines() if line["message"] == "callback"] == ["delivered"]


# Addresses and secrets


@pytest.mark.parametrize(
    "url",
    [
        "ftp://shop.example/",
        "shop.example",
        "https://",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest",
        "http://[::1]/",
        "http://2130706433/",
        "http://localhost:9000/",
        "https://user:secret@shop.example/",
        "https://shop.example:99999/",
        "https://shop.example/" + "a" * 2_000,
        7,
        ["https://shop.example/"],
    ],
)
def test_an_address_that_cannot_be_called_is_refused_and_nothing_is_made(client, bench, url, table):
    status, answer, _ = call(client, "POST", CREATE, {"prompt": "a cat", "callback_url": url})

    assert (status, answer["code"]) == (400, "callback_url_invalid")
    assert table("SELECT * FROM jobs") == []


def test_without_a_secret_no_callback_can_be_asked_for(client, bench):
    object.__setattr__(bench.service.courier, "secrets", ())

    status, answer, _ = call(client, "POST", CREATE, {"prompt": "a cat", "callback_url": HOOK})

    assert (status, answer["code"]) == (400, "callbacks_not_configured")


@pytest.mark.parametrize(
    "secrets", ["whsec_", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "whsec_c2hvcnQ=", "whsec_!", SECRETS[0] + ",x"]
)
def test_a_secret_that_is_none_is_a_malformed_setting(environment, secrets):
    with pytest.raises(SettingError, match="CALLBACK_SECRETS is malformed"):
        settings.load({**environment, "CALLBACK_SECRETS": secrets})


class Private(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.visits += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_name_that_leads_into_a_private_network_is_not_called(
    environment, d1, cloud, clock, wire, monkeypatch, table
):
    """The guard is asked for the address really connected to, when it is connected to."""
    server = HTTPServer(("127.0.0.1", 0), Private)
    server.visits = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wire.add_passthru("http://innocent.example")
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: real("127.0.0.1" if host == "innocent.example" else host, *rest, **more),
    )
    service = bootstrap.build(settings.load(environment), clock)
    url = f"http://innocent.example:{server.server_port}/"
    table(
        "INSERT INTO deliveries (job_id, version, type, url, data, created_at, due_at) "
        "VALUES ('a', 1, 'job.done', ?, ?, '', '')",
        url,
        json.dumps({"id": "a", "outputs": [], "result_url": None, "result_r2_key": None}),
    )

    service.courier.run(Bench(service, cloud, clock, None, None).deadline(30))

    server.shutdown()
    server.server_close()
    (line,) = json.loads(row(table, "log"))
    assert "leads back to this machine" in line["error"]
    assert (server.visits, row(table, "status")) == (0, "failed")


def test_the_log_keeps_the_last_twenty_tries(client, bench, receiver, table):
    job_id = create(client)
    minute(bench)
    table(
        "UPDATE deliveries SET log = ?",
        json.dumps([{"at": str(n), "status": 500, "ms": 1, "error": "x"} for n in range(20)]),
    )

    call(client, "POST", f"/api/jobs/{job_id}/deliveries/1/replay")

    kept = json.loads(row(table, "log"))
    assert (len(kept), kept[0]["at"], kept[-1]["status"]) == (20, "1", 204)
