"""From a worker's answer to the objects in R2, through the whole pipeline."""

import hashlib
import re
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from chalicelib import bootstrap, jobs, media, settings
from chalicelib.content import Content
from chalicelib.errors import TransientError
from chalicelib.jobs import State
from chalicelib.outputs import Findings, Link
from tests.conftest import BUCKET, R2_ENDPOINT, put
from tests.shapes import A_JPG, A_MP4, A_PNG, B_PNG, JPEG, LINKS, MP4, PNG, PNG_2, PNG_3, ROWS, WEBP, b64

README = Path(__file__).parents[2] / "README.md"
FORBIDDEN = ("http://127.0.0.1:8888", "https://169.254.169.254", "http://10.0.0.1")  # never connected to
RESULT = r"GET https://(results|image)\.example/"


@pytest.fixture
def bench(bench, wire, faults):
    """The service, with the hosts that the links lead to."""

    def answer(request):
        fault = faults.take(f"GET {request.url}")
        if fault and isinstance(fault["answer"], Exception):
            return fault["answer"]
        if fault:
            status, body, *headers = fault["answer"]
            return status, headers[0] if headers else {}, body
        return 200, {"Content-Length": str(len(LINKS[request.url]))}, LINKS[request.url]

    for url in LINKS:
        wire.add_callback("GET", url, callback=answer)
    for url in FORBIDDEN:
        wire.add_passthru(url)
    return bench


def run(bench, output, *, rounds=1):
    """A job whose worker returns that."""
    job_id = bench.create("a cat", simulate={"queue_seconds": 0, "run_seconds": 0, "output": output})
    for _ in range(rounds):
        bench.round()
    return bench.job(job_id)


def later(bench, job, *, after=120):
    """The job after twenty more rounds; RunPod has forgotten its run, if they are two minutes apart."""
    for _ in range(20):
        bench.round(after=after)
    return bench.job(job.id)


def stored(bench, key):
    found = bench.s3.get_object(Bucket=BUCKET, Key=key)
    return found["Body"].read(), found["ContentType"]


def warnings(bench, job):
    return [warning["code"] for warning in bench.events(job.id)[-1].get("warnings", [])]


def bytes_of(file):
    return file if isinstance(file, bytes) else LINKS[file.replace("HTTPS", "https")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_answer_comes_to_its_right_end(bench, row):
    job = run(bench, row.output)

    if row.error:
        assert (job.status, job.error_code, job.result_url) == ("error", row.error, None)
        assert bench.objects() == []
        return
    assert job.status == "done"
    assert warnings(bench, job) == row.warnings
    assert len(job.files) == len(row.files)
    for number, (file, expected) in enumerate(zip(job.files, map(bytes_of, row.files), strict=True), 1):
        kind = media.sniff(expected)
        name = "output" if number == 1 else f"output-{number}"
        assert file["key"] == f"jobs/2026/01/{job.id}/{name}.{kind.ending}"
        assert file["url"] == f"http://cloud.test:8001/cdn/{file['key']}"
        assert stored(bench, file["key"]) == (expected, kind.content_type)
        assert (file["content_type"], file["bytes"]) == (kind.content_type, len(expected))
        assert file["sha256"] == hashlib.sha256(expected).hexdigest()
        assert (file["width"], file["height"]) == ((None, None) if kind.ending == "mp3" else (48, 32))
    assert (job.result_r2_key, job.result_url) == (job.files[0]["key"], job.files[0]["url"])


def test_no_runpod_key_travels_to_the_host_of_a_link(bench, wire):
    run(bench, [A_PNG, B_PNG])

    asked = [call.request for call in wire.calls if urlsplit(call.request.url).hostname == "results.example"]
    assert len(asked) == 2
    for request in asked:
        assert "Authorization" not in request.headers
        assert bench.service.settings.runpod_api_key not in str(request.headers)


def test_what_the_worker_returned_instead_is_in_the_timeline(bench):
    job = run(bench, {"note": "nothing to draw", "input": {"image": b64(PNG)}})

    assert "nothing to draw" in bench.events(job.id)[-1]["output"]


def test_what_a_failed_worker_returned_is_in_the_timeline(bench):
    job_id = bench.create(simulate={"status": "FAILED", "error": "boom"})
    bench.faults.add(r"GET .*/status/", (200, {"status": "FAILED", "error": "boom", "output": {"details": ["node 7"]}}))
    bench.round()

    assert "node 7" in bench.events(job_id)[-1]["output"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((503, ""), "result_unavailable"),
        ((429, ""), "result_unavailable"),
        (requests.ConnectionError("reset"), "result_cut_off"),
        ((403, ""), "link_forbidden"),
        ((404, ""), "link_not_found"),
    ],
)
def test_a_link_that_does_not_answer_now_is_asked_again(bench, answer, code):
    bench.faults.add(RESULT, answer)

    job = run(bench, {"image_url": A_PNG})
    assert (job.status, bench.events(job.id)[-1]["code"]) == ("running", code)
    bench.round(after=30)

    assert bench.job(job.id).status == "done"
    assert len(bench.cloud.runpod.inputs()) == 1


@pytest.mark.parametrize(("status", "code"), [(403, "link_forbidden"), (404, "link_not_found"), (400, "link_refused")])
def test_a_link_that_is_refused_for_minutes_is_believed(bench, status, code):
    bench.faults.add(RESULT, (status, ""), times=99)

    job = run(bench, {"image_url": A_PNG})

    job = later(bench, job, after=20)
    assert (job.status, job.error_code) == ("error", code)


def test_a_link_that_has_expired_is_believed_at_once(bench):
    bench.faults.add(RESULT, (403, "<Error><Message>Request has expired</Message></Error>"), times=99)

    job = run(bench, {"image_url": A_PNG})

    assert (job.status, job.error_code) == ("error", "link_expired")


def test_a_server_that_fails_until_runpod_forgets_is_a_dead_letter(bench):
    bench.faults.add(RESULT, (503, ""), times=999)

    job = run(bench, {"image_url": A_PNG})

    job = later(bench, job)
    assert (job.status, job.error_code, job.dead_at is not None) == ("error", "result_unavailable", True)


def test_files_that_are_stored_are_not_fetched_again_for_one_that_is_not(bench, wire):
    bench.faults.add("results.example/b.png", (503, ""))

    job = run(bench, [A_PNG, B_PNG, A_MP4])
    assert (job.status, [file["bytes"] for file in job.files]) == ("running", [len(PNG), len(MP4)])
    assert job.failures == 1
    bench.round(after=30)

    job = bench.job(job.id)
    assert [file["key"].rpartition("/")[2] for file in job.files] == ["output.png", "output-2.png", "output-3.mp4"]
    assert job.status == "done"
    asked = [call.request.url for call in wire.calls if "example" in call.request.url]
    assert sorted(asked) == sorted([A_PNG, B_PNG, B_PNG, A_MP4])


def test_files_that_arrived_are_the_result_though_one_never_did(bench):
    bench.faults.add("results.example/b.png", (503, ""), times=999)

    job = run(bench, [A_PNG, B_PNG])

    job = later(bench, job)
    assert (job.status, warnings(bench, job)) == ("done", ["result_unavailable"])
    assert (len(job.files), job.result_url) == (1, job.files[0]["url"])


def test_files_that_arrived_are_the_result_though_runpod_forgot_the_others(bench, monkeypatch):
    identify = media.identify

    def crash(content):
        return 1 / 0 if content.size == len(PNG_2) else identify(content)

    monkeypatch.setattr(media, "identify", crash)
    job = run(bench, [A_PNG, b64(PNG_2)])
    bench.faults.add(r"GET .*/status/", (404, {"status": 404}), times=999)

    job = later(bench, job)
    assert (job.status, warnings(bench, job), len(job.files)) == ("done", ["result_lost"], 1)


def test_files_behind_links_are_had_though_runpod_forgot_the_run(bench):
    bench.faults.add("results.example/b.png", (503, ""))
    job = run(bench, [A_PNG, B_PNG])
    bench.faults.add(r"GET .*/status/", (404, {"status": 404}), times=999)

    job = later(bench, job)
    assert (job.status, warnings(bench, job), len(job.files), job.links) == ("done", [], 2, None)


def test_files_that_arrived_are_the_result_though_runpod_says_something_else_later(bench):
    bench.faults.add("results.example/b.png", (503, ""))
    job = run(bench, [A_PNG, B_PNG])
    bench.faults.add(r"GET .*/status/", (200, {"status": "COMPLETED"}))

    bench.round(after=30)

    job = bench.job(job.id)
    assert (job.status, warnings(bench, job), len(job.files)) == ("done", ["no_output"], 1)


def test_files_that_r2_refuses_are_a_dead_letter_beside_those_that_it_took(bench, monkeypatch):
    put_one = type(bench.service.bucket).put

    def refuse_the_second(self, key, *args, **options):
        if "output-2" in key:
            raise TransientError("r2_failed", "R2 is down.", service="r2")
        return put_one(self, key, *args, **options)

    monkeypatch.setattr(type(bench.service.bucket), "put", refuse_the_second)
    job = run(bench, [b64(PNG), b64(PNG_2)])

    job = later(bench, job)
    assert (job.status, job.error_code, job.dead_at is not None, len(job.files)) == ("error", "r2_failed", True, 1)


def test_a_crash_over_one_file_concerns_that_file_alone(bench, monkeypatch):
    identify = media.identify

    def crash(content):
        found = identify(content)
        return 1 / 0 if found.kind.ending == "mp4" else found

    monkeypatch.setattr(media, "identify", crash)
    job = run(bench, [A_PNG, A_MP4, b64(PNG_2)])
    assert (job.status, len(job.files)) == ("running", 2)

    job = later(bench, job)
    assert (job.status, warnings(bench, job), len(job.files)) == ("done", ["internal_error"], 2)


def test_links_that_take_all_the_time_keep_no_other_file_waiting(bench, monkeypatch):
    hanging = {A_PNG, B_PNG, A_JPG}
    download = type(bench.service.results.fetch).download

    def hang(self, url, into, *, timeout):
        if url in hanging:
            bench.clock.advance(timeout)
            raise TransientError("result_timeout", "silence", service="result")
        return download(self, url, into, timeout=timeout)

    monkeypatch.setattr(type(bench.service.results.fetch), "download", hang)

    job = run(bench, [A_PNG, B_PNG, A_JPG, A_MP4, b64(PNG_3)])
    assert [file["bytes"] for file in job.files] == [len(PNG_3)]
    for _ in range(6):
        bench.round(after=120)

    assert [file["bytes"] for file in bench.job(job.id).files] == [len(MP4), len(PNG_3)]


def test_a_host_cannot_put_a_result_off_until_runpod_has_forgotten_it(bench):
    bench.faults.add(RESULT, (503, "", {"Retry-After": "900"}))

    job = run(bench, {"image_url": A_PNG})

    assert (job.status, bench.clock.now() < jobs.from_text(job.due_at)) == ("running", True)
    assert (jobs.from_text(job.due_at) - bench.clock.now()).total_seconds() < 130


def test_a_link_is_not_believed_to_be_gone_after_a_minute_however_often(bench):
    bench.faults.add(RESULT, (404, ""), times=3)

    job = run(bench, {"image_url": A_PNG})
    for after in (30, 30, 60):
        bench.round(after=after)

    assert bench.job(job.id).status == "done"


def test_a_link_is_not_believed_to_be_gone_at_the_first_look_however_late(bench):
    job_id = bench.create(simulate={"queue_seconds": 0, "run_seconds": 0, "output": {"image_url": A_PNG}})
    bench.s3.delete_bucket(Bucket=BUCKET)
    bench.round()
    bench.s3.create_bucket(Bucket=BUCKET)
    bench.faults.add(RESULT, (404, ""))

    bench.round(after=600)
    assert bench.events(job_id)[-1]["code"] == "link_not_found"
    bench.round(after=60)

    assert bench.job(job_id).status == "done"


def test_one_link_that_leads_nowhere_does_not_take_the_others_with_it(bench):
    job = run(bench, [A_PNG, "https://169.254.169.254/latest/meta-data/", A_MP4])

    assert (job.status, warnings(bench, job)) == ("done", ["link_metadata"])
    assert [file["key"].rpartition("/")[2] for file in job.files] == ["output.png", "output-3.mp4"]


def test_one_link_that_is_refused_for_minutes_does_not_take_the_others_with_it(bench):
    bench.faults.add("results.example/b.png", (404, ""), times=99)

    job = run(bench, [A_PNG, B_PNG])

    job = later(bench, job, after=20)
    assert (job.status, warnings(bench, job), len(job.files)) == ("done", ["link_not_found"], 1)


def test_the_same_picture_inline_and_behind_a_link_is_one_file(bench):
    job = run(bench, {"images": [b64(PNG)], "image_url": A_PNG})

    assert len(job.files) == 1


def test_r2_that_fails_stops_the_other_files_of_the_job(bench, wire):
    bench.s3.delete_bucket(Bucket=BUCKET)

    job = run(bench, [A_PNG, B_PNG])
    bench.s3.create_bucket(Bucket=BUCKET)

    assert job.status == "running"
    assert [call.request.url for call in wire.calls if "example" in call.request.url] == [A_PNG]


def test_a_job_with_more_files_than_time_goes_on_where_it_stopped(bench, monkeypatch):
    put_one = type(bench.service.bucket).put

    def slow(self, *args, **options):
        bench.clock.advance(16)
        return put_one(self, *args, **options)

    monkeypatch.setattr(type(bench.service.bucket), "put", slow)
    job = run(bench, {"images": [b64(PNG), b64(PNG_2), b64(PNG_3), b64(JPEG), b64(WEBP)]})
    assert (job.status, len(job.files), bench.events(job.id)[-1]["code"]) == ("running", 3, "store_unfinished")
    bench.round(after=15)

    job = bench.job(job.id)
    assert (job.status, len(job.files)) == ("done", 5)
    assert [entry["event"] for entry in bench.events(job.id)].count("store_failed") == 1


def test_a_truncated_upload_is_never_done(bench, monkeypatch):
    put_object = bench.service.bucket._s3().put_object

    def cut(**params):
        whole = params.pop("Body").read()
        del params["ChecksumSHA256"]
        return put_object(**{**params, "Body": whole[:-1], "ContentLength": len(whole) - 1})

    monkeypatch.setattr(bench.service.bucket._s3(), "put_object", cut)
    job = run(bench, b64(PNG))
    assert (job.status, bench.events(job.id)[-1]["code"]) == ("running", "r2_mismatch")
    monkeypatch.undo()
    bench.round(after=30)

    job = bench.job(job.id)
    assert (job.status, stored(bench, job.result_r2_key)[0]) == ("done", PNG)


OWN = f"{R2_ENDPOINT}/{BUCKET}/"


@pytest.fixture
def sent(bench, monkeypatch):
    """The objects that were copied and put."""
    done, client = [], bench.service.bucket._s3()

    def watch(verb):
        call = getattr(client, verb)
        monkeypatch.setattr(client, verb, lambda **given: (done.append(verb), call(**given))[1])

    for verb in ("copy_object", "put_object", "get_object"):
        watch(verb)
    return done


def test_what_lies_in_our_own_bucket_is_copied_there(bench, wire, sent):
    put(bench.service.bucket, "worker/tmp.bin", JPEG)
    url = f"{OWN}worker/tmp.bin?X-Amz-Signature=abc"
    wire.add("GET", url, body=JPEG, headers={"ETag": f'"{hashlib.md5(JPEG).hexdigest()}"'})
    sent.clear()

    job = run(bench, {"image_url": url})

    assert job.status == "done"
    assert stored(bench, f"jobs/2026/01/{job.id}/output.jpg") == (JPEG, "image/jpeg")
    assert sent[0] == "copy_object"
    assert "put_object" not in sent


def test_what_r2_does_not_copy_is_sent(bench, wire, sent):
    put(bench.service.bucket, "worker/tmp.bin", JPEG)
    wire.add("GET", f"{OWN}worker/tmp.bin", body=JPEG, headers={"ETag": '"another"'})

    job = run(bench, {"image_url": f"{OWN}worker/tmp.bin"})

    assert (job.status, stored(bench, job.result_r2_key)) == ("done", (JPEG, "image/jpeg"))


def test_what_names_the_run_is_read_though_its_link_has_no_signature(bench, sent):
    job_id = bench.create()
    key = f"{bench.job(job_id).runpod_job_id}/a.jpg"
    put(bench.service.bucket, key, JPEG)
    bench.faults.add(r"GET .*/status/", (200, {"status": "COMPLETED", "output": {"image_url": OWN + key}}))
    sent.clear()
    bench.round()

    assert sent == ["get_object", "copy_object"]
    assert bench.job(job_id).status == "done"


def test_no_object_that_names_another_is_read_with_our_right(bench, wire, sent):
    put(bench.service.bucket, "private/backup.png", PNG)
    wire.add("GET", f"{OWN}private/backup.png", status=403)
    sent.clear()

    job = run(bench, {"image_url": f"{OWN}private/backup.png"})

    assert (job.status, bench.events(job.id)[-1]["code"], sent) == ("running", "link_forbidden", [])


def test_a_worker_may_put_its_file_where_it_belongs(bench):
    job_id = bench.create(simulate={"queue_seconds": 0, "run_seconds": 0, "output": {"image_url": "later"}})
    key = f"jobs/2026/01/{job_id}/output.png"
    put(bench.service.bucket, key, PNG)
    bench.faults.add(
        r"GET .*/status/", (200, {"status": "COMPLETED", "output": {"image_url": f"{R2_ENDPOINT}/{BUCKET}/{key}"}})
    )
    bench.round()

    assert (bench.job(job_id).status, stored(bench, key)) == ("done", (PNG, "image/png"))


@pytest.mark.parametrize("ids", [{"id": "a", "runpod_job_id": "b"}, {"id": "a", "runpod_job_id": None}])
def test_an_id_too_short_to_be_one_alone_gives_no_right(bench, wire, sent, job_factory, ids):
    put(bench.service.bucket, "private/ab.png", PNG)
    wire.add("GET", f"{OWN}private/ab.png", status=403)
    sent.clear()
    found = Findings((Link(f"{OWN}private/ab.png"),))

    kept = bench.service.results.keep(job_factory(State.STORE, **ids), found, bench.deadline(), age=timedelta(0))

    assert (kept.error.code, sent) == ("link_forbidden", [])


def test_a_link_to_nothing_in_our_own_bucket_is_like_any_other(bench):
    job_id = bench.create()
    output = {"image_url": f"{OWN}{bench.job(job_id).runpod_job_id}/a.png"}
    bench.faults.add(r"GET .*/status/", (200, {"status": "COMPLETED", "output": output}))
    bench.round()

    assert (bench.job(job_id).status, bench.events(job_id)[-1]["code"]) == ("running", "link_not_found")


def test_without_a_public_address_none_is_stored(environment, bench):
    bench.service = bootstrap.build(settings.load({**environment, "R2_PUBLIC_BASE_URL": ""}), bench.clock)

    job = run(bench, {"images": [b64(PNG), b64(PNG_2)]})

    assert (job.status, job.result_url) == ("done", None)
    assert [file["url"] for file in job.files] == [None, None]
    assert job.result_r2_key == f"jobs/2026/01/{job.id}/output.png"


def test_a_second_attempt_has_a_folder_of_its_own(bench):
    bench.faults.add(r"GET .*/status/", (200, {"status": "TIMED_OUT"}))

    job = run(bench, [A_PNG, A_JPG], rounds=4)

    assert job.attempt == 2
    assert [file["key"] for file in job.files] == [
        f"jobs/2026/01/{job.id}/2/output.png",
        f"jobs/2026/01/{job.id}/2/output-2.jpg",
    ]


def test_a_file_is_given_back_to_the_disk(bench, monkeypatch):
    opened = []
    create = Content.__init__
    monkeypatch.setattr(Content, "__init__", lambda self, given: (opened.append(self), create(self, given))[1])

    run(bench, [A_PNG, "http://10.0.0.1/a.png", b64(PNG_2)])

    assert len(opened) == 3
    assert all(content.file.closed for content in opened)


def test_after_readmes_sql_older_jobs_are_under_the_new_address(bench, table):
    job = run(bench, {"images": [b64(PNG), b64(PNG_2)]})
    (sql,) = re.findall(r"(UPDATE jobs\s+SET result_url = replace[^;]*);", README.read_text(encoding="utf-8"))

    table(sql.replace("https://old.example/", job.result_url.removesuffix(job.result_r2_key)))

    moved = bench.job(job.id)
    assert moved.result_url == f"https://new.example/{job.result_r2_key}"
    assert [file["url"] for file in moved.files] == [f"https://new.example/{file['key']}" for file in job.files]
