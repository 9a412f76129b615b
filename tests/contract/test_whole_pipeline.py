"""The service on real engines: D1's own, an S3 server that is not ours, and RunPod by the local cloud, over sockets."""

import hashlib
import time

import pytest
import requests

from chalicelib import bootstrap, settings
from chalicelib.content import SMALL_BYTES
from chalicelib.runtime import Clock, Deadline
from tests.engines.engine import D1Engine, S3Engine
from tests.shapes import PNG
from tools import schema

SECONDS = 20.0
PROMPTS = [f"แมวสีส้ม {n} 🐈" for n in range(12)]


@pytest.fixture
def runpod(cloud_server):
    return cloud_server.cloud.runpod


@pytest.fixture
def service(cloud_server, miniflare: D1Engine, seaweedfs: S3Engine, s3_requests):
    given = {**cloud_server.cloud.settings(), **miniflare.settings, **seaweedfs.settings}
    hosts = [given[name].split("/")[2] for name in ("RUNPOD_API_BASE", "R2_ENDPOINT_URL")]
    config = settings.load({**given, "RESULT_ALLOWED_PRIVATE_HOSTS": ",".join(hosts)})
    schema.apply(miniflare.connect())
    return bootstrap.build(config, Clock())


def create(service, prompt, **simulate):
    payload = {"prompt": prompt, "simulate": {"queue_seconds": 0, "run_seconds": 0, **simulate}}
    job = service.pipeline.new_job(prompt=prompt, model="qwen-image", payload=payload)
    service.pipeline.create([job], Deadline(Clock(), 20.0), by="test")
    return job.id


def until_all_are_final(service, ids):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        service.pipeline.run_round(Deadline(Clock(), 57.0), ignore_due=True)
        jobs = [service.store.get(job_id, timeout=5.0) for job_id in ids]
        if all(job.step is None for job in jobs):
            return jobs
    raise AssertionError([job.status for job in jobs])


def test_a_dozen_jobs_end_with_their_pictures_as_recorded(
    service, runpod, miniflare, seaweedfs, cloud_server, monkeypatch
):
    shapes = ["base64", "data_url", "link"]
    ids = []
    for n, prompt in enumerate(PROMPTS):
        # The first half is sent at once, the second by the first round.
        monkeypatch.setattr(service.store, "calls_left", lambda left=1000 if n < 6 else 50: left)
        ids.append(create(service, prompt, shape=shapes[n % 3]))

    done = until_all_are_final(service, ids)

    assert [(job.status, job.attempt, job.prompt) for job in done] == [("done", 1, prompt) for prompt in PROMPTS]
    assert sorted(given["prompt"] for given in runpod.inputs()) == sorted(PROMPTS)
    assert cloud_server.cloud.calls["d1"] == cloud_server.cloud.calls["r2"] == 0
    stored = seaweedfs.client.list_objects_v2(Bucket=seaweedfs.bucket)["Contents"]
    assert sorted(entry["Key"] for entry in stored) == sorted(job.result_r2_key for job in done)
    for job in done:
        (file,) = job.files
        found = seaweedfs.client.get_object(Bucket=seaweedfs.bucket, Key=file["key"])
        data = found["Body"].read()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
        assert (found["ContentType"], file["content_type"]) == ("image/png", "image/png")
        assert requests.get(service.bucket.presign(file["key"], seconds=60), timeout=5).content == data
    lines = miniflare.execute("SELECT event, count(*) AS n FROM job_events GROUP BY event")
    numbers = {"completed": 12, "created": 12, "done": 12, "submitted": 12, "submitting": 6}
    assert {line["event"]: line["n"] for line in lines} == numbers


def test_files_that_a_worker_put_into_the_bucket_are_copied_there(service, seaweedfs, s3_requests):
    small, large = PNG + b"small", PNG + b"large" * (SMALL_BYTES // 5 + 1)
    for key, data in (("worker/small.png", small), ("worker/large.png", large)):
        seaweedfs.client.put_object(Bucket=seaweedfs.bucket, Key=key, Body=data)
    links = [service.bucket.presign(f"worker/{name}.png", seconds=600) for name in ("small", "large")]

    (job,) = until_all_are_final(service, [create(service, "a cat", output={"images": links})])

    assert (job.status, [file["bytes"] for file in job.files]) == ("done", [len(small), len(large)])
    for file, data in zip(job.files, (small, large), strict=True):
        found = seaweedfs.client.get_object(Bucket=seaweedfs.bucket, Key=file["key"])["Body"].read()
        assert (found == data, hashlib.sha256(data).hexdigest()) == (True, file["sha256"])
    assert [request.method for request in s3_requests] == ["PUT", "HEAD"] * 2
    assert all("x-amz-copy-source" in request.headers for request in s3_requests if request.method == "PUT")


def test_a_failure_of_the_worker_reaches_the_table_in_its_own_words(service):
    words = "CUDA out of memory: 'ไม่พอ' \ud83d \x00 \"quoted\"; DROP TABLE jobs; --"

    (job,) = until_all_are_final(service, [create(service, "a cat", status="FAILED", error=words)])

    assert (job.status, job.error_code) == ("error", "worker_failed")
    assert words.replace("\ud83d", "?") in job.error_message
