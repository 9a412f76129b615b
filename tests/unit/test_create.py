"""What a create takes, once and only once, one job or many, all or nothing."""

import contextlib
import json
import threading

import pytest
import requests

from chalicelib import bootstrap, jobs, store
from chalicelib.errors import RequestError
from chalicelib.jobs import State
from tests.conftest import Bench, call

RUN = r"POST .*/run$"
D1 = r"POST .*/query$"
BUSY = (429, "", {"Retry-After": "3600"})
CREATE = "/api/queue/create"


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


def create(client, body, key=None):
    return call(client, "POST", CREATE, body, headers={"Idempotency-Key": key} if key else None)


def count(cloud, table="jobs"):
    return cloud.d1.execute(f"SELECT count(*) AS n FROM {table}")[0]["n"]


# Idempotency-Key


def test_the_same_request_again_has_the_first_answer_and_makes_nothing(client, cloud):
    first = create(client, {"prompt": "a cat", "metadata": {"order": "1"}}, "key-1")
    again = create(client, b'{ "metadata": {"order":"1"},  "prompt":"a cat" }', "key-1")

    assert first[1] == again[1]
    assert "Idempotent-Replayed" not in first[2]
    assert again[2]["Idempotent-Replayed"] == "true"
    assert (count(cloud), len(cloud.runpod.inputs())) == (1, 1)


def test_null_is_the_same_as_nothing(client, cloud):
    create(client, {"jobs": [{"prompt": "a", "model": None}], "prompt": None}, "key-1")

    assert create(client, {"jobs": [{"prompt": "a", "deadline": None}]}, "key-1")[2]["Idempotent-Replayed"] == "true"
    assert count(cloud) == 1


def test_another_request_with_the_same_key_is_a_conflict(client, cloud):
    create(client, {"prompt": "a cat"}, "key-1")

    status, body, _ = create(client, {"prompt": "a dog"}, "key-1")

    assert (status, body["code"]) == (409, "idempotency_conflict")
    assert (count(cloud), len(cloud.runpod.inputs())) == (1, 1)


def test_the_first_answer_comes_also_when_the_job_has_gone_on_and_the_queue_is_full(client, bench, cloud, monkeypatch):
    _, first, _ = create(client, {"prompt": "a cat"}, "key-1")
    bench.round()
    monkeypatch.setattr(bench.service.store, "max_queued", 0)

    status, again, headers = create(client, {"prompt": "a cat"}, "key-1")

    assert (status, again, headers["Idempotent-Replayed"]) == (200, first, "true")
    assert bench.job(first["id"]).state is State.DONE


def test_a_list_that_is_sent_again_has_the_first_answer_in_its_order(client, cloud):
    body = {"jobs": [{"prompt": f"cat {n}"} for n in range(12)]}

    _, first, _ = create(client, body, "key-1")
    _, again, headers = create(client, body, "key-1")

    assert (first, headers["Idempotent-Replayed"]) == (again, "true")
    assert count(cloud) == 12


@pytest.mark.parametrize("other", [{"prompt": "x"}, {"jobs": [{"prompt": "x"}] * 3}, {"jobs": [{"prompt": "x"}]}])
def test_no_part_of_another_list_is_made_under_a_known_key(client, cloud, other):
    create(client, {"jobs": [{"prompt": "a"}, {"prompt": "b"}]}, "key-1")

    assert create(client, other, "key-1")[1]["code"] == "idempotency_conflict"
    assert count(cloud) == 2


def test_two_at_once_agree_on_one_job(client, bench, cloud):
    answers, barrier = [], threading.Barrier(6)

    def send():
        made = bench.service.pipeline.new_job(prompt="a cat", model="m", payload=None)
        barrier.wait()
        answers.append(bench.service.pipeline.create(jobs.under_key([made], "k", "h"), bench.deadline(), by="me"))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({tuple(ids) for ids in answers}) == 1
    assert (count(cloud), len(cloud.runpod.inputs())) == (1, 1)


def test_the_index_alone_keeps_a_second_row_out(client, cloud):
    create(client, {"prompt": "a cat"}, "key-1")

    with pytest.raises(Exception, match="UNIQUE constraint failed"):
        cloud.d1.execute("INSERT INTO jobs (id, idempotency_key, idempotency_n) VALUES ('x', 'key-1', 0)")


def test_a_create_whose_answer_was_lost_is_found_by_its_key(client, bench, faults, cloud):
    faults.add(D1, requests.ReadTimeout(), times=3, after_effect=True)
    status, body, _ = create(client, {"prompt": "a cat"}, "key-1")
    assert (status, "id" in body) == (503, False)
    assert "same Idempotency-Key" in body["error"]

    status, body, headers = create(client, {"prompt": "a cat"}, "key-1")

    assert (status, headers["Idempotent-Replayed"], count(cloud)) == (200, "true", 1)
    bench.round()
    assert len(cloud.runpod.inputs()) == 1


def test_a_key_is_free_again_when_its_job_is_deleted(client, bench, cloud):
    _, first, _ = create(client, {"prompt": "a cat"}, "key-1")
    bench.round()
    assert call(client, "DELETE", f"/api/jobs/{first['id']}")[0] == 200

    _, second, headers = create(client, {"prompt": "a dog"}, "key-1")

    assert second["id"] != first["id"]
    assert "Idempotent-Replayed" not in headers


def test_a_list_of_which_a_job_was_deleted_has_no_shorter_answer(client, bench, cloud):
    body = {"jobs": [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]}
    _, first, _ = create(client, body, "key-1")
    bench.round()
    call(client, "DELETE", f"/api/jobs/{first['jobs'][1]['id']}")

    status, again, _ = create(client, body, "key-1")

    assert (status, again["code"], count(cloud)) == (410, "job_deleted", 2)


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "caf\u00e9", "a\tb", " a", "a "])
def test_a_key_that_is_none_is_refused(client, cloud, key):
    status, body, _ = call(client, "POST", CREATE, {"prompt": "a"}, headers={"Idempotency-Key": key})

    assert (status, body["code"], count(cloud)) == (400, "idempotency_key_invalid", 0)


@pytest.mark.parametrize("key", ["x", "x" * 255, "3ea2e9a2-83a5-45e8-9b61-6f83b273d5cc", "order 17/2 ~!"])
def test_a_key_is_any_printable_text(client, key):
    assert create(client, {"prompt": "a"}, key)[0] == 200


# Many


def test_a_list_is_made_in_its_order_and_sent_at_once(client, bench, cloud):
    wanted = [{"prompt": f"cat {n}", "model": f"m{n}", "metadata": {"n": str(n)}} for n in range(100)]

    before = cloud.calls["d1"]
    status, body, _ = create(client, {"jobs": wanted})
    calls = cloud.calls["d1"] - before

    assert (status, list(body)) == (200, ["ok", "jobs"])
    assert {job["status"] for job in body["jobs"]} == {"queued"}
    rows = {row["id"]: row for row in cloud.d1.execute("SELECT * FROM jobs")}
    assert [rows[job["id"]]["prompt"] for job in body["jobs"]] == [job["prompt"] for job in wanted]
    assert {row["step"] for row in rows.values()} == {"poll"}
    assert (len(cloud.runpod.inputs()), calls) == (100, 2)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_bad_job_of_a_list_keeps_all_from_being_made(client, cloud, at):
    wanted = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    wanted[at] = {"prompt": ""}

    status, body, _ = create(client, {"jobs": wanted})

    assert (status, body["code"]) == (400, "prompt_required")
    assert body["error"].startswith(f"jobs[{at}]: ")
    assert (count(cloud), cloud.runpod.inputs()) == (0, [])


@pytest.mark.parametrize(
    "jobs",
    [[], {}, "a", 1, True, [None], [[]], ["a"], [1], [{"prompt": "a"}] * 101, [{"prompt": "a"}, 5]],
)
def test_a_list_that_is_none_is_refused(client, cloud, jobs):
    status, body, _ = create(client, {"jobs": jobs})

    assert (status, body["code"], count(cloud)) == (400, "jobs_invalid", 0)


@pytest.mark.parametrize(
    "beside",
    [
        {"prompt": "a"},
        {"model": "m"},
        {"input": {"a": 1}},
        {"metadata": {"a": "b"}},
        {"priority": "low"},
        {"deadline": 60},
    ],
)  # fmt: skip
def test_a_field_beside_the_list_is_refused(client, cloud, beside):
    status, body, _ = create(client, {"jobs": [{"prompt": "a"}], **beside})

    assert (status, body["code"], count(cloud)) == (400, "jobs_invalid", 0)
    assert body["error"].startswith(next(iter(beside)))


def test_null_is_left_out(client, cloud):
    nothing = dict.fromkeys(("jobs", "model", "input", "metadata", "priority", "deadline"))

    assert create(client, {**nothing, "prompt": "a"})[0] == 200
    assert create(client, {"jobs": [{**nothing, "prompt": "a"}], "prompt": None})[0] == 200


# The queue's end


def test_a_full_queue_refuses_and_writes_nothing(client, bench, cloud, faults, monkeypatch):
    monkeypatch.setattr(bench.service.store, "max_queued", 3)
    faults.add(RUN, BUSY, times=99)
    create(client, {"jobs": [{"prompt": "a"}, {"prompt": "b"}]})

    status, body, headers = create(client, {"jobs": [{"prompt": "c"}, {"prompt": "d"}]})

    assert (status, body["code"], headers["Retry-After"]) == (429, "queue_full", "30")
    assert (count(cloud), count(cloud, "job_events")) == (2, 4)
    assert create(client, {"prompt": "c"})[0] == 200
    assert create(client, {"prompt": "d"})[0] == 429


def test_a_list_that_never_fits_is_not_to_be_sent_again(client, bench, cloud, monkeypatch):
    monkeypatch.setattr(bench.service.store, "max_queued", 3)

    status, body, headers = create(client, {"jobs": [{"prompt": "a"}] * 4})

    assert (status, body["code"], "Retry-After" in headers, count(cloud)) == (400, "jobs_invalid", False, 0)


def test_jobs_that_have_ended_leave_room(client, bench, monkeypatch):
    monkeypatch.setattr(bench.service.store, "max_queued", 1)
    create(client, {"prompt": "a"})
    assert create(client, {"prompt": "b"})[0] == 429

    bench.round()

    assert create(client, {"prompt": "b"})[0] == 200


def test_creates_at_once_do_not_overfill_the_queue(client, bench, cloud, monkeypatch):
    monkeypatch.setattr(bench.service.store, "max_queued", 5)

    def send():
        job = bench.service.pipeline.new_job(prompt="a", model="m", payload=None)
        with contextlib.suppress(RequestError):
            bench.service.pipeline.create([job], bench.deadline(), by="me")

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert count(cloud) == 5


# Metadata, priority, deadline


def test_metadata_comes_back(client):
    words = {"album": "แมว", "Order.id-1_x": "", "long": "x" * 500}

    _, body, _ = create(client, {"prompt": "a", "metadata": words})

    assert call(client, "GET", f"/api/queue/status/{body['id']}")[1]["metadata"] == words
    assert call(client, "GET", f"/api/jobs/{body['id']}")[1]["job"]["metadata"] == words
    assert call(client, "GET", "/api/jobs")[1]["jobs"][0]["metadata"] == words


def test_a_job_without_words_of_its_caller_has_the_usual_ones(client):
    _, body, _ = create(client, {"prompt": "a"})

    job = call(client, "GET", f"/api/jobs/{body['id']}")[1]["job"]
    assert (job["metadata"], job["priority"], job["deadline"]) == ({}, "normal", None)


@pytest.mark.parametrize(
    "metadata",
    [
        [], "a", 1, True, [["a", "b"]], {"a": 1}, {"a": None}, {"a": True}, {"a": ["b"]}, {"a": {}}, {"": "b"},
        {"a b": "c"}, {"ก": "x"}, {"x" * 41: "a"}, {"a": "x" * 501}, {"a": "b\0"}, {f"k{n}": "v" for n in range(21)},
    ],
)  # fmt: skip
def test_bad_metadata_is_refused(client, cloud, metadata):
    status, body, _ = create(client, {"prompt": "a", "metadata": metadata})

    assert (status, body["code"], count(cloud)) == (400, "metadata_invalid", 0)


@pytest.mark.parametrize("priority", ["high", "", "LOW", 1, 0, True, False, [], {}, ["low"]])
def test_a_bad_priority_is_refused(client, cloud, priority):
    status, body, _ = create(client, {"prompt": "a", "priority": priority})

    assert (status, body["code"], count(cloud)) == (400, "priority_invalid", 0)


def test_a_whole_number_is_whole_however_it_is_written(client):
    _, body, _ = create(client, b'{"prompt": "a", "deadline": 60.0}')

    view = call(client, "GET", f"/api/jobs/{body['id']}")[1]["job"]
    assert json.dumps(view["deadline"]) == "60"


@pytest.mark.parametrize("deadline", [0, -1, 59, 604_801, 59.0, 60.5, 1e300, "60", True, [], {}, 10**30])
def test_a_bad_deadline_is_refused(client, cloud, deadline):
    status, body, _ = create(client, {"prompt": "a", "deadline": deadline})

    assert (status, body["code"], count(cloud)) == (400, "deadline_invalid", 0)


def test_a_job_has_the_time_that_its_caller_gave_it_and_so_has_its_retry(client, bench):
    _, body, _ = create(client, {"input": {"simulate": {"run_seconds": 9_999}}, "deadline": 90})
    job_id = body["id"]
    assert bench.job(job_id).deadline_at == "2026-02-01T00:00:30.000Z"

    bench.round(after=60)
    assert bench.job(job_id).state is State.POLL
    bench.round(after=60)
    bench.round(after=1)
    assert bench.job(job_id).error_code == "total_deadline"

    call(client, "POST", f"/api/jobs/{job_id}/retry")
    assert bench.job(job_id).deadline_at == "2026-02-01T00:02:31.000Z"


@pytest.fixture
def slow(bench):
    """RunPod's queue with so many runs that no worker has begun."""

    def fill(number):
        for _ in range(number):
            bench.create("busy", simulate={"queue_seconds": 9_999})

    return fill


def low(client):
    return create(client, {"prompt": "low", "priority": "low"})[1]["id"]


def test_a_low_job_is_left_to_the_rounds_which_send_it_at_once_while_nobody_waits(client, bench):
    job_id = low(client)
    assert bench.job(job_id).state is State.SUBMIT

    bench.round(after=1)

    assert bench.job(job_id).state is State.POLL


def test_low_jobs_wait_while_runpods_queue_is_long(client, bench, slow):
    slow(store.LOW_AHEAD)
    job_id = low(client)

    bench.round()
    assert bench.job(job_id).state is State.SUBMIT

    bench.clock.advance(store.LOW_WAIT.total_seconds())
    bench.round()
    assert bench.job(job_id).state is State.POLL


def test_a_low_job_with_little_time_waits_for_nobody(client, bench, slow):
    slow(store.LOW_AHEAD)
    soon, later = (
        create(client, {"prompt": "low", "priority": "low", "deadline": deadline})[1]["id"] for deadline in (1200, 1201)
    )

    bench.round()

    assert [bench.job(job_id).state for job_id in (soon, later)] == [State.POLL, State.SUBMIT]


def test_low_jobs_fill_up_what_is_free_of_runpods_queue(client, bench, slow):
    slow(store.LOW_AHEAD - 3)
    waiting = [low(client) for _ in range(5)]

    bench.round()

    assert [bench.job(job_id).state for job_id in waiting] == [State.POLL] * 3 + [State.SUBMIT] * 2


def test_a_normal_job_that_waits_here_goes_before_low_ones(client, bench, faults):
    faults.add(RUN, (429, ""))
    _, body, _ = create(client, {"prompt": "normal"})
    waiting = [low(client) for _ in range(store.LOW_AHEAD)]
    assert bench.job(body["id"]).state is State.SUBMIT

    bench.round(after=60)

    assert bench.job(body["id"]).state is State.POLL
    assert [bench.job(job_id).state for job_id in waiting].count(State.SUBMIT) == 1


def test_a_normal_job_that_is_held_back_keeps_low_ones_back(client, bench, faults):
    faults.add(RUN, BUSY, times=store.LOW_AHEAD)
    create(client, {"jobs": [{"prompt": "normal"}] * store.LOW_AHEAD})
    job_id = low(client)

    bench.round()

    assert bench.job(job_id).state is State.SUBMIT


def test_a_low_job_of_a_list_waits_alone(client, bench):
    _, body, _ = create(client, {"jobs": [{"prompt": "a"}, {"prompt": "b", "priority": "low"}]})

    assert [bench.job(job["id"]).state for job in body["jobs"]] == [State.POLL, State.SUBMIT]


def test_who_made_a_job_is_in_its_timeline(client, bench):
    _, body, _ = create(client, {"prompt": "a"})

    assert bench.events(body["id"])[0]["event"] == "created"
    assert bench.events(body["id"])[0]["by"]
