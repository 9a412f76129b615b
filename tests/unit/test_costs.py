"""How many calls to D1 each route costs, as README says it. Cloudflare takes four a second for everything."""

import re
from pathlib import Path

import pytest

from chalicelib import bootstrap
from chalicelib.errors import TransientError
from chalicelib.r2 import R2
from tests.conftest import BUCKET, Bench, call
from tools.cloud.render import draw

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FAILED = {"run_seconds": 1, "status": "FAILED", "error": "out of memory"}
LONG = {"run_seconds": 900}
HOOK, PICTURE = "https://shop.example/hooks", "https://pictures.example/garden.png"


@pytest.fixture
def environment(environment):
    return {**environment, "CALLBACK_SECRETS": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"}


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def made(bench, number=1, *, rounds=1, **payload):
    ids = [bench.create("a cat", **payload) for _ in range(number)]
    for _ in range(rounds):
        bench.round()
    return ids


def dead(bench, monkeypatch, number):
    def fail(self, *args, **options):
        raise TransientError("r2_failed", "R2 is down.", service="r2")

    with monkeypatch.context() as patch:
        patch.setattr(R2, "put", fail)
        ids = made(bench, number)
        while not all(bench.job(job_id).dead_at for job_id in ids):
            bench.round(after=60)
    return ids


def offered(client, bench):
    key = call(client, "POST", "/api/uploads", {"content_type": "image/png", "bytes": 100})[1]["key"]
    bench.s3.put_object(Bucket=BUCKET, Key=key, Body=draw("a garden"))
    return key


def measure(client, bench, monkeypatch):
    """Each row of the table: what is asked, and how many calls it took."""

    def calls(method, path, body=None, **headers):
        bench.clock.advance(2)
        before = bench.cloud.calls["d1"]
        status, answer, _ = call(client, method, path, body, headers=headers)
        assert status == 200, answer
        return bench.cloud.calls["d1"] - before

    def bulk(do):
        return calls("POST", "/api/jobs/bulk", {"do": do, "filter": {"model": "qwen-image"}})

    many = {"jobs": [{"prompt": f"cat {n}"} for n in range(100)]}
    yield "create, one job", calls("POST", "/api/queue/create", {"prompt": "a cat"})
    yield "create, 100 jobs", calls("POST", "/api/queue/create", many)
    edit = {"model": "qwen-image-edit", "prompt": "snow", "callback_url": HOOK}
    key = offered(client, bench)
    yield "create, with an uploaded picture", calls("POST", "/api/queue/create", {**edit, "image_key": key})
    yield "create, with a picture behind a link", calls("POST", "/api/queue/create", {**edit, "image_url": PICTURE})
    yield "a place for a picture", calls("POST", "/api/uploads", {"content_type": "image/png", "bytes": 100})
    bench.round()
    (job_id,) = made(bench)
    yield "status", calls("GET", f"/api/queue/status/{job_id}")
    yield "list, with counts", calls("GET", "/api/jobs?include=counts")
    yield "one job", calls("GET", f"/api/jobs/{job_id}")
    (running,) = made(bench, simulate=LONG)
    yield "one job, held for 20 s", calls("GET", f"/api/jobs/{running}", Prefer="wait=20")
    told = next(job.id for job in bench.jobs() if job.callback_url and job.finished_at)
    yield "deliveries", calls("GET", f"/api/jobs/{told}/deliveries")
    yield "replay", calls("POST", f"/api/jobs/{told}/deliveries/1/replay")
    yield "figures", calls("GET", "/api/stats")
    yield "models", calls("GET", "/api/models")
    yield "delete", calls("DELETE", f"/api/jobs/{job_id}")
    yield "delete, 50 jobs", bulk("delete")
    bench.faults.add(r"POST .*/run$", (429, "", {"Retry-After": "3600"}))
    yield "cancel, waiting", calls("POST", f"/api/jobs/{bench.create()}/cancel")
    yield "cancel, running", calls("POST", f"/api/jobs/{made(bench, simulate=LONG)[0]}/cancel")
    made(bench, 20, simulate=LONG)
    yield "cancel, 20 jobs", bulk("cancel")
    bench.round()
    ids = made(bench, 9, simulate=FAILED)  # of ten in a row the endpoint would be paused
    made(bench)
    yield "retry", calls("POST", f"/api/jobs/{ids[0]}/retry")
    yield "retry, 50 jobs", bulk("retry")
    bench.round()
    ids = dead(bench, monkeypatch, 5)
    yield "dead letters", calls("GET", "/api/dead-letters")
    yield "redrive", calls("POST", f"/api/jobs/{ids[0]}/redrive")
    yield "redrive, 4 jobs", bulk("redrive")


def test_readme_says_what_each_route_costs(client, bench, monkeypatch, wire):
    wire.add("POST", HOOK, status=204)
    wire.add("GET", PICTURE, body=draw("a garden"))
    table = README.split("### What a request costs")[1].split("\n###")[0]
    shown = [(what, int(calls)) for what, calls in re.findall(r"^\| (.+?) \| (\d+) \|$", table, flags=re.MULTILINE)]

    measured = list(measure(client, bench, monkeypatch))
    for what, calls in measured:
        print(f"{what:20} {calls} calls to D1")

    assert shown == measured
