"""Rounds that run at once, with real threads over real sockets: nothing is sent twice, nothing is stored twice."""

import threading
from collections import Counter

import pytest

from chalicelib import bootstrap, settings
from chalicelib.runtime import Clock, Deadline
from chalicelib.wire import Wire
from tools import schema

JOBS = 40
ROUNDS_AT_ONCE = 3


@pytest.fixture
def make_service(cloud_server):
    environment = cloud_server.cloud.settings()
    clock = Clock()
    schema.apply(bootstrap.make_d1(settings.load(environment), Wire(clock), clock))

    def make():
        return bootstrap.build(settings.load(environment), Clock())

    return make


@pytest.fixture
def puts(cloud_server, monkeypatch):
    """How often each object was put."""
    counted = Counter()
    handle = cloud_server.cloud.r2.handle

    def count(request):
        counted[request.path] += request.method == "PUT"
        return handle(request)

    parts = cloud_server.cloud._parts
    monkeypatch.setitem(parts, "/r2/", ("r2", count))
    return counted


def at_once(services):
    barrier, reports = threading.Barrier(len(services)), []

    def run(service):
        barrier.wait()
        reports.append(service.pipeline.run_round(Deadline(Clock(), 57.0), ignore_due=True))

    threads = [threading.Thread(target=run, args=(service,)) for service in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


def test_rounds_at_once_submit_and_store_each_job_once(cloud_server, make_service, puts, monkeypatch):
    creator = make_service()
    monkeypatch.setattr(creator.store, "calls_left", lambda: 0)  # create only queues, the rounds send
    ids = set()
    for n in range(JOBS):
        payload = {"prompt": f"cat {n}", "simulate": {"queue_seconds": 0, "run_seconds": 0}}
        job = creator.pipeline.new_job(prompt=f"cat {n}", model="m", payload=payload)
        creator.pipeline.create([job], Deadline(Clock(), 20.0), by="test")
        ids.add(job.id)
    services = [make_service() for _ in range(ROUNDS_AT_ONCE)]

    finished = Counter()
    for _ in range(3):
        for report in at_once(services):
            finished.update(job.id for job in report.updated)

    prompts = Counter(given["prompt"] for given in cloud_server.cloud.runpod.inputs())
    assert prompts == Counter({f"cat {n}": 1 for n in range(JOBS)})
    assert finished == Counter(dict.fromkeys(ids, 1))
    assert sorted(puts.values()) == [1] * JOBS
    rows = cloud_server.cloud.d1.execute("SELECT status, attempt, result_r2_key FROM jobs")
    assert {(row["status"], row["attempt"]) for row in rows} == {("done", 1)}
    assert all(cloud_server.cloud.r2.read(row["result_r2_key"]) for row in rows)
    lines = cloud_server.cloud.d1.execute("SELECT job_id, event, count(*) AS n FROM job_events GROUP BY 1, 2")
    assert {line["n"] for line in lines} == {1}
    assert {line["event"] for line in lines} == {"created", "submitting", "submitted", "completed", "done"}
