"""Pictures that go into a job: offered, put, looked at, named in a create, signed for the worker, and swept."""

import base64
import io
import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from chalicelib import bootstrap, orders, uploads
from chalicelib.errors import TransientError
from chalicelib.r2 import R2
from tests.conftest import BUCKET, Bench, call
from tools.cloud.render import draw

CREATE = "/api/queue/create"
EDIT = "qwen-image-edit"
PICTURE = "https://pictures.example/garden.png"


def picture(colour="green", kind="PNG", size=(64, 48)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


@pytest.fixture
def outside(wire):
    """What a link leads to."""

    def serve(body, status=200, **headers):
        wire.remove("GET", PICTURE)
        wire.add("GET", PICTURE, body=body, status=status, headers=headers)

    serve(picture())
    return serve


def offer(client, content_type="image/png", size=1000):
    return call(client, "POST", "/api/uploads", {"content_type": content_type, "bytes": size})


def put(bench, client, data=None):
    """A picture as a page has put it there; its key."""
    data = picture() if data is None else data
    key = offer(client, size=max(1, len(data)))[1]["key"]
    bench.s3.put_object(Bucket=BUCKET, Key=key, Body=data, ContentType="image/png")
    return key


def create(client, key=None, **body):
    headers = {"Idempotency-Key": key} if key else None
    return call(client, "POST", CREATE, {"model": EDIT, "prompt": "make it snow", **body}, headers=headers)


def jobs(table):
    return table("SELECT id, pictures, input FROM jobs")


# Offer


def test_an_offer_is_one_put_of_that_type_and_size_for_ten_minutes(client, clock, table):
    status, answer, _ = offer(client, "image/jpeg", 482_113)

    query = parse_qs(urlsplit(answer["url"]).query)
    assert status == 200
    assert re.fullmatch(r"uploads/2026/01/31/[0-9a-f-]{36}", answer["key"])
    assert (answer["method"], answer["headers"]) == ("PUT", {"Content-Type": "image/jpeg"})
    assert query["X-Amz-Expires"] == ["600"]
    assert query["X-Amz-SignedHeaders"] == ["content-length;content-type;host"]
    assert answer["expires_at"] == "2026-02-01T00:09:00.000Z"
    assert [row["due_at"] for row in table("SELECT due_at FROM uploads")] == ["2026-02-01T23:59:00.000Z"]


@pytest.mark.parametrize("content_type", ["image/svg+xml", "text/html", "video/mp4", "", None, 7, ["image/png"]])
def test_what_is_no_type_of_a_picture_is_refused(client, content_type, table):
    status, answer, _ = offer(client, content_type)

    assert (status, answer["code"]) == (400, "content_type_invalid")
    assert table("SELECT * FROM uploads") == []


@pytest.mark.parametrize("size", [0, -1, 20_000_001, 1.5, "1000", None, True])
def test_what_is_no_size_of_a_picture_is_refused(client, size):
    assert offer(client, size=size)[1]["code"] == "bytes_invalid"


# Create


def test_the_worker_gets_a_link_that_lives_as_long_as_the_jobs_deadline(client, bench, cloud, table):
    key = put(bench, client)

    status, _, _ = create(client, image_key=key, deadline=7_200)

    (sent,) = cloud.runpod.inputs()
    link = urlsplit(sent["workflow"]["78"]["inputs"]["image_url"])
    assert status == 200
    assert link.path.endswith(key)
    assert parse_qs(link.query)["X-Amz-Expires"] == ["7200"]
    assert sent["workflow"]["76"]["inputs"]["prompt"] == "make it snow"
    assert "X-Amz" not in json.dumps(jobs(table))


def test_a_retry_has_a_link_of_its_own(client, bench, cloud, clock):
    key = put(bench, client)
    job_id = create(client, image_key=key, deadline=3_600)[1]["id"]
    call(client, "POST", f"/api/jobs/{job_id}/cancel")
    bench.round()
    clock.advance(40 * 60)

    call(client, "POST", f"/api/jobs/{job_id}/retry")
    bench.round()

    first, second = (sent["workflow"]["78"]["inputs"]["image_url"] for sent in cloud.runpod.inputs())
    assert first != second
    assert 3_500 < int(parse_qs(urlsplit(second).query)["X-Amz-Expires"][0]) <= 3_600


def test_a_job_shows_its_pictures(client, bench):
    key = put(bench, client)
    job_id = create(client, image_key=key)[1]["id"]

    _, answer, _ = call(client, "GET", f"/api/jobs/{job_id}")

    assert [shown["key"] for shown in answer["job"]["pictures"]] == [key]
    assert key in answer["job"]["pictures"][0]["url"]


def test_a_link_is_fetched_once_and_kept_so_that_the_worker_never_sees_it(client, bench, cloud, outside, s3):
    status, _, _ = create(client, image_url=PICTURE)

    (sent,) = cloud.runpod.inputs()
    link = sent["workflow"]["78"]["inputs"]["image_url"]
    (key,) = [key for key in bench.objects() if key.startswith("uploads/")]
    found = s3.get_object(Bucket=BUCKET, Key=key)
    assert status == 200
    assert key in link
    assert "pictures.example" not in link
    assert (found["Body"].read(), found["ContentType"]) == (picture(), "image/png")


def test_one_picture_of_many_jobs_is_looked_at_once(client, bench, outside, wire):
    job = {"model": EDIT, "prompt": "snow", "image_url": PICTURE}

    status, answer, _ = call(client, "POST", CREATE, {"jobs": [job] * 5})

    assert (status, len(answer["jobs"])) == (200, 5)
    assert len([made for made in wire.calls if made.request.url == PICTURE]) == 1
    assert len([key for key in bench.objects() if key.startswith("uploads/")]) == 1


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"<html>not a picture</html>", 200, "no picture"),
        (b"", 200, "empty"),
        (b"gone", 404, "404"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(100), 200, "no picture"),
    ],
)
def test_a_link_that_leads_to_no_picture_is_refused_and_nothing_is_made(
    client, bench, cloud, outside, table, body, status, says
):
    outside(body, status)

    code, answer, _ = create(client, image_url=PICTURE)

    assert (code, answer["code"]) == (400, "image_unusable")
    assert says in answer["error"]
    assert (jobs(table), cloud.runpod.inputs()) == ([], [])


def test_a_link_whose_host_fails_may_be_tried_again(client, bench, outside, table):
    outside(b"later", 503)

    status, answer, _ = create(client, image_url=PICTURE)

    assert (status, answer["code"]) == (503, "image_unavailable")
    assert jobs(table) == []


def test_no_sentence_has_the_secrets_of_a_link(client, bench, wire):
    link = PICTURE.replace("://", "://me:geheim@") + "?token=geheim"

    assert "geheim" not in json.dumps(create(client, image_url=link)[1])


def test_a_picture_that_is_too_large_is_refused(client, bench, outside, monkeypatch, table):
    monkeypatch.setattr(uploads, "MAX_BYTES", 100)

    assert create(client, image_url=PICTURE)[1]["code"] == "image_unusable"
    assert create(client, image_key=put_large(bench, client))[1]["code"] == "image_unusable"
    assert jobs(table) == []


def put_large(bench, client):
    key = offer(client, size=100)[1]["key"]
    bench.s3.put_object(Bucket=BUCKET, Key=key, Body=picture(size=(300, 300)))
    return key


@pytest.mark.parametrize(
    "link",
    ["http://169.254.169.254/latest", "http://127.0.0.1/x.png", "http://0x7f000001/", "https://u:p@pictures.example/"],
)
def test_a_link_goes_through_the_guard_of_downloads(client, bench, link, table, wire):
    wire.add_passthru("http://1")
    wire.add_passthru("http://0x7f000001")

    status, answer, _ = create(client, image_url=link)

    assert (status, answer["code"]) == (400, "image_unusable")
    assert jobs(table) == []


def test_what_was_not_put_there_is_refused(client, bench, cloud, table):
    key = offer(client)[1]["key"]

    status, answer, _ = create(client, image_key=key)

    assert (status, answer["code"]) == (400, "image_not_found")
    assert (jobs(table), cloud.runpod.inputs()) == ([], [])


@pytest.mark.parametrize("data", [b"<svg/>", b"%PDF-1.7", b"\x00\x00\x00\x20ftypisom" + bytes(100)])
def test_what_is_no_picture_is_refused(client, bench, data, table):
    status, answer, _ = create(client, image_key=put(bench, client, data))

    assert (status, answer["code"]) == (400, "image_unusable")
    assert jobs(table) == []


def test_an_object_that_was_never_offered_is_no_picture_of_a_job(client, bench, s3, table):
    key = "uploads/2026/01/31/00000000-0000-4000-8000-000000000000"
    s3.put_object(Bucket=BUCKET, Key=key, Body=picture())

    status, answer, _ = create(client, image_key=key)

    assert (status, answer["code"]) == (400, "image_not_found")
    assert jobs(table) == []


@pytest.mark.parametrize(
    "given",
    [
        {"image_key": "jobs/2026/01/x/output.png"},
        {"image_key": "uploads/../secrets"},
        {"image_key": 7},
        {"image_key": [None]},
        {"image_url": "ftp://x/y"},
        {"image_url": "not a link"},
        {"image_key": "uploads/2026/01/31/0000", "image_url": PICTURE},
        {"image_url": [PICTURE, PICTURE]},
        {},
    ],
)
def test_a_wrong_word_for_a_picture_is_refused_before_anything_is_asked(client, bench, given, table):
    calls = bench.d1_calls(lambda: check(create(client, **given)))

    assert (calls, jobs(table)) == (0, [])


def check(answered):
    assert (answered[0], answered[1]["code"]) == (400, "images_invalid")


def test_no_more_than_twenty_pictures_in_one_create(client, bench):
    made = [{"model": EDIT, "prompt": "x", "image_url": f"{PICTURE}?{n}"} for n in range(orders.MAX_PICTURES + 1)]

    status, answer, _ = call(client, "POST", CREATE, {"jobs": made})

    assert (status, answer["code"]) == (400, "images_invalid")


@pytest.mark.parametrize("broken", ["beginning", "put"])
def test_while_r2_fails_nothing_is_made_and_the_caller_may_try_again(
    client, bench, outside, monkeypatch, table, broken
):
    def fail(self, *args, **options):
        raise TransientError("r2_failed", "R2 is down.", service="r2")

    given = {"image_url": PICTURE} if broken == "put" else {"image_key": put(bench, client)}
    monkeypatch.setattr(R2, broken, fail)

    assert create(client, **given)[0] == 503
    assert jobs(table) == []


# Once


def test_the_same_request_again_is_answered_though_the_link_leads_nowhere_by_now(client, bench, outside, cloud):
    first = create(client, "key-1", image_url=PICTURE)
    outside(b"gone", 404)

    again = create(client, "key-1", image_url=PICTURE)

    assert first[1] == again[1]
    assert again[2]["Idempotent-Replayed"] == "true"
    assert len(cloud.runpod.inputs()) == 1


def test_the_same_request_again_fetches_nothing_anew(client, bench, outside, wire, monkeypatch):
    create(client, "key-1", image_url=PICTURE)
    monkeypatch.setattr(R2, "put", None)

    assert create(client, "key-1", image_url=PICTURE)[0] == 200
    assert len([made for made in wire.calls if made.request.url == PICTURE]) == 1
    assert create(client, "key-1", image_url=PICTURE, prompt="rain")[1]["code"] == "idempotency_conflict"


@pytest.mark.parametrize("there", [None, b"no picture"])
def test_a_key_does_not_get_a_picture_past_the_look_at_it(client, bench, cloud, table, there):
    key = offer(client)[1]["key"] if there is None else put(bench, client, there)

    status, _, _ = create(client, "key-1", image_key=key)

    assert status == 400
    assert (jobs(table), cloud.runpod.inputs()) == ([], [])


def test_a_new_key_with_a_link_that_leads_nowhere_says_what_is_wrong(client, bench, outside, table):
    outside(b"gone", 404)

    status, answer, _ = create(client, "key-1", image_url=PICTURE)

    assert (status, answer["code"]) == (400, "image_unusable")
    assert jobs(table) == []


# Sweep


def test_what_no_job_has_used_in_a_day_is_swept(client, bench, clock, table):
    used, unused = put(bench, client), put(bench, client)
    create(client, image_key=used)
    offer(client)

    clock.advance(86_000)
    assert bench.service.uploads.sweep(bench.deadline()) == 0
    clock.advance(401)
    assert bench.service.uploads.sweep(bench.deadline()) == 2

    assert unused not in bench.objects()
    assert used in bench.objects()
    assert [row["key"] for row in table("SELECT key FROM uploads")] == [used]
    assert bench.d1_calls(lambda: bench.service.uploads.sweep(bench.deadline())) == 1


def test_the_schedule_sweeps_every_ten_minutes(client, bench, clock):
    unused = put(bench, client)
    clock.advance(86_400 + 8 * 60)
    bench.service.pipeline.run_minute(bench.deadline())
    assert unused in bench.objects()

    clock.advance(10 * 60 - 45 - (clock.now().minute % 10) * 60 + 45)
    bench.service.pipeline.run_minute(bench.deadline())

    assert unused not in bench.objects()


def test_a_picture_is_swept_when_the_last_job_that_uses_it_is_deleted(client, bench, clock, table):
    key = put(bench, client)
    ids = [create(client, image_key=key)[1]["id"] for _ in range(2)]
    for job_id in ids:
        call(client, "POST", f"/api/jobs/{job_id}/cancel")
    bench.round()
    bench.round()

    call(client, "DELETE", f"/api/jobs/{ids[0]}")
    clock.advance(90_000)
    assert bench.service.uploads.sweep(bench.deadline()) == 0
    call(client, "DELETE", f"/api/jobs/{ids[1]}")
    assert bench.service.uploads.sweep(bench.deadline()) == 0  # an address to put it may still hold
    clock.advance(901)
    assert bench.service.uploads.sweep(bench.deadline()) == 1

    assert key not in bench.objects()
    assert table("SELECT * FROM job_uploads") == table("SELECT * FROM uploads") == []


def test_what_is_being_swept_cannot_be_used_any_more(client, bench, clock, monkeypatch, table):
    """The mark comes before the object goes: a create in between is refused, and the picture under no job's feet."""
    put(bench, client)
    clock.advance(90_000)
    delete, answers = R2.delete, []

    def in_between(self, key, **options):
        answers.append(create(client, image_key=key))
        delete(self, key, **options)

    monkeypatch.setattr(R2, "delete", in_between)
    bench.service.uploads.sweep(bench.deadline())

    assert [(status, answer["code"]) for status, answer, _ in answers] == [(400, "image_not_found")]
    assert jobs(table) == []


def test_an_object_that_could_not_be_removed_is_by_the_next_sweep(client, bench, clock, monkeypatch):
    key = put(bench, client)
    clock.advance(90_000)
    with monkeypatch.context() as patch:
        patch.setattr(R2, "delete", lambda *args, **options: (_ for _ in ()).throw(TransientError("r2_failed", "down")))
        assert bench.service.uploads.sweep(bench.deadline()) == 0
    assert key in bench.objects()

    assert bench.service.uploads.sweep(bench.deadline()) == 1
    assert key not in bench.objects()


# What a worker gives back


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ({"image_url": "LINK"}, "no_output"),
        (["LINK"], "no_output"),
        ({"output": [], "source": "LINK"}, "no_output"),
        ({"error": "CUDA out of memory", "image_url": "LINK"}, "worker_failed"),
    ],
)
def test_a_worker_that_returns_only_what_it_was_given_has_drawn_nothing(client, bench, cloud, output, code):
    link = bench.service.bucket.presign(put(bench, client), seconds=60)
    output = json.loads(json.dumps(output).replace("LINK", link))
    job_id = bench.create(simulate={"output": output})

    bench.round()

    job = bench.job(job_id)
    assert (job.status, job.error_code) == ("error", code)
    assert "X-Amz" not in (job.error_message or "")


def test_it_counts_for_nothing_beside_a_result(client, bench, cloud):
    key = put(bench, client)
    drawn = base64.b64encode(draw("a cat")).decode()
    link = bench.service.bucket.presign(key, seconds=60)
    job_id = bench.create(simulate={"output": {"images": [drawn, link]}})

    bench.round()

    assert (bench.job(job_id).status, len(bench.job(job_id).files)) == ("done", 1)


# What must not be told


def test_a_link_that_runpod_tells_back_is_shown_without_its_signature(client, bench, faults, table):
    faults.add(r"POST .*/run$", (400, {"error": "bad input https://r2.example/x.png?X-Amz-Signature=deadbeef"}))

    job_id = create(client, image_key=put(bench, client))[1]["id"]

    assert bench.job(job_id).error_code == "runpod_refused"
    assert "deadbeef" not in json.dumps([table("SELECT * FROM jobs"), table("SELECT * FROM job_events")])


def test_an_input_that_cannot_be_made_is_sent_later_not_taken_for_sent(client, bench, cloud, monkeypatch):
    key = put(bench, client)
    presign = R2.presign

    def breaks(self, *args, **options):
        raise ValueError("no keys")

    monkeypatch.setattr(R2, "presign", breaks)
    job_id = create(client, image_key=key)[1]["id"]
    assert (bench.job(job_id).step, cloud.runpod.inputs()) == ("submit", [])
    monkeypatch.setattr(R2, "presign", presign)
    bench.round(after=60)

    assert len(cloud.runpod.inputs()) == 1


@pytest.fixture
def anonymous(bench):
    object.__setattr__(bench.service.settings, "allow_anonymous", True)
    object.__setattr__(bench.service.courier, "secrets", ("whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3",))
    return {"auth": {}}


@pytest.mark.parametrize("given", [{"image_url": PICTURE}, {"image_key": "uploads/2026/01/31/0000-0000"}])
def test_without_a_key_nothing_is_fetched(client, bench, outside, wire, anonymous, given):
    status, answer, _ = call(client, "POST", CREATE, {"model": EDIT, "prompt": "x", **given}, **anonymous)

    assert (status, answer["code"]) == (401, "unauthorized")
    assert not [made for made in wire.calls if made.request.url == PICTURE]


def test_without_a_key_no_callback_is_made_and_none_is_shown(client, bench, anonymous):
    order = {"model": EDIT, "prompt": "x", "callback_url": "https://shop.example/?token=geheim"}
    job_id = create(client, image_key=put(bench, client), callback_url=order["callback_url"])[1]["id"]

    refused = call(client, "POST", CREATE, {**order, "model": "qwen-image"}, **anonymous)
    _, shown, _ = call(client, "GET", f"/api/queue/status/{job_id}", **anonymous)

    assert (refused[0], refused[1]["code"]) == (401, "unauthorized")
    assert (shown["callback_url"], shown["pictures"]) == (None, [])
    assert call(client, "GET", f"/api/queue/status/{job_id}")[1]["callback_url"] == order["callback_url"]


def test_in_the_input_that_is_shown_a_picture_stands_by_its_key_and_not_by_a_link(client, bench):
    key = put(bench, client)
    body = {"model": EDIT, "prompt": "snow", "image_key": key}
    _, made, _ = call(client, "POST", "/api/queue/create", body)

    _, answer, _ = call(client, "GET", f"/api/jobs/{made['id']}?include=input")

    assert answer["job"]["input"]["workflow"]["78"]["inputs"]["image_url"] == key
