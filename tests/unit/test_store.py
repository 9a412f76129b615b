"""What each statement does to the table, on the local cloud's D1 and on Cloudflare's own engine."""

import threading
from datetime import timedelta

import pytest

from chalicelib import jobs, moves
from chalicelib.jobs import State
from chalicelib.models import Models
from chalicelib.store import Limits, Store


@pytest.fixture
def d1_engine(each_d1_engine):
    return each_d1_engine


@pytest.fixture
def store(d1):
    return Store(
        d1=d1,
        models=Models({}),
        default_endpoint_id="endpoint-1",
        submit_unknown_wait=600,
        total_deadline=86_400,
        max_queued=10_000,
        max_running=10_000,
        has_webhooks=False,
    )


@pytest.fixture
def claim(store, clock):
    def run(nonce="n1", *, limits=None, lease=60.0, ignore_due=False):
        claimed = store.claim(
            nonce=nonce,
            now=clock.now(),
            limits=limits or Limits(submits=200),
            lease=lease,
            ignore_due=ignore_due,
            timeout=5.0,
        )
        return claimed.jobs

    return run


@pytest.fixture
def insert(store, clock):
    """Put a job into the table at any step."""

    def run(job_id="job-1", step="submit", **columns):
        row = {
            "id": job_id,
            "status": "queued" if step in ("submit", "submitting") else "running",
            "step": step,
            "prompt": "a cat",
            "version": 1,
            "attempt": 0 if step == "submit" else 1,
            "due_at": jobs.to_text(clock.now()),
            "created_at": jobs.to_text(clock.now()),
            "updated_at": jobs.to_text(clock.now()),
            **({"runpod_job_id": f"run-{job_id}"} if step in ("poll", "store") else {}),
            **columns,
        }
        store._d1.query(
            [_insert(row)],
            timeout=5.0,
        )

    return run


def _insert(row):
    from chalicelib.d1 import Statement

    names = ", ".join(row)
    return Statement(f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))


def one(table, job_id="job-1"):
    return table("SELECT * FROM jobs WHERE id = ?", job_id)[0]


def events(table, job_id="job-1"):
    return [row["event"] for row in table("SELECT event FROM job_events WHERE job_id = ? ORDER BY version, n", job_id)]


def save(store, clock, *changes, nonce="w1"):
    return store.save(list(changes), nonce=nonce, now=clock.now(), timeout=5.0)


# Creating


def new(number, clock, **columns):
    job = jobs.new(job_id=f"job-{number}", prompt="a cat", model="m", payload=None, now=clock.now(), **columns)
    return [job]


def create(store, made, nonce="n1", **under):
    key = under.get("key")
    made = jobs.under_key(made, key, under.get("body", "hash")) if key else made
    return [job.id for job in store.create(made, by="me", nonce=nonce, timeout=5.0)[0]]


def test_a_key_is_taken_by_the_first_insert_alone(store, clock, table):
    first = create(store, new(1, clock, metadata={"a": "b"}), "n1", key="k")
    repeat = create(store, new(1, clock, metadata={"a": "b"}), "n1", key="k")
    second = create(store, new(2, clock) + new(3, clock), "n2", key="k")

    assert (first, repeat, second) == (["job-1"], ["job-1"], ["job-1"])
    assert len(table("SELECT id FROM jobs")) == len(table("SELECT 1 FROM job_metadata")) == 1
    assert events(table) == ["created"]
    with pytest.raises(Exception, match="UNIQUE"):
        table("INSERT INTO jobs (id, idempotency_key, idempotency_n) VALUES ('x', 'k', 0)")


def test_many_are_inserted_together_or_not_at_all(store, clock, table):
    store.max_queued = 3
    assert len(create(store, new(1, clock) + new(2, clock), "n1")) == 2

    assert create(store, new(3, clock) + new(4, clock), "n2") == []
    assert create(store, new(3, clock), "n3") == ["job-3"]
    assert create(store, new(3, clock), "n3") == ["job-3"]
    assert create(store, new(4, clock), "n4") == []
    assert len(table("SELECT 1 FROM jobs")) == len(table("SELECT 1 FROM job_events")) == 3


def test_low_jobs_are_claimed_as_far_as_there_is_room(store, clock, insert, claim, monkeypatch):
    monkeypatch.setattr("chalicelib.store.LOW_AHEAD", 4)
    insert("poll-1", "poll", runpod_status="IN_QUEUE")
    insert("poll-2", "poll", runpod_status="IN_PROGRESS")
    insert("normal-1")
    for n in range(4):
        insert(f"low-{n}", priority="low")
    insert("old", priority="low", created_at="2026-01-31T23:00:00.000Z", due_at="2026-01-31T23:58:00.000Z")

    claimed = [job.id for job in claim() if job.state is State.SUBMITTING]

    assert sorted(claimed) == ["low-0", "normal-1", "old"]


# Deleting


def test_a_final_row_is_marked_and_only_a_marked_one_deleted(store, clock, insert, table):
    insert("live", "poll")
    insert("over", None, status="done", metadata='{"a": "b"}')
    table("INSERT INTO job_metadata VALUES ('a', 'b', ?, 'over')", jobs.to_text(clock.now()))
    ids = ["live", "over", "nobody"]
    how = {"statuses": ("done",), "dead_too": True, "by": "me"}

    store.delete(ids, by="me", now=clock.now(), timeout=5.0)
    assert len(table("SELECT 1 FROM jobs")) == 2
    rows, gone = store.mark_deleted(ids, **how, nonce="n1", now=clock.now(), timeout=5.0)
    assert ({job.id: bool(job.deleted_at) for job in rows}, gone) == ({"live": False, "over": True}, set())
    assert events(table, "over") == ["deleting"]

    store.delete(ids, by="me", now=clock.now(), timeout=5.0)

    assert [row["id"] for row in table("SELECT id FROM jobs")] == ["live"]
    assert table("SELECT 1 FROM job_metadata") == []
    assert events(table, "over") == ["deleted"]
    assert store.mark_deleted(ids, **how, nonce="n2", now=clock.now(), timeout=5.0)[1] == {"over"}


def test_a_cancel_that_is_repeated_does_not_end_a_job_that_was_retried_since(store, clock, insert, table):
    insert()
    store.cancel(["job-1"], by="me", nonce="n1", now=clock.now(), timeout=5.0)
    table("UPDATE jobs SET status = 'queued', step = 'submit', cancel_at = NULL, version = version + 1")

    (job,) = store.cancel(["job-1"], by="me", nonce="n1", now=clock.now(), timeout=5.0)

    assert job.state is State.SUBMIT


# Claiming submits


def test_claiming_a_submit_writes_the_intent(insert, claim, table):
    insert()

    (job,) = claim()

    row = one(table)
    assert (job.state, job.attempt, job.version, job.endpoint_id) == (State.SUBMITTING, 1, 2, "endpoint-1")
    assert (row["intent_version"], row["claimer"], row["due_at"]) == (2, "n1", "2026-02-01T00:09:00.000Z")
    assert job.prompt == "a cat"
    assert events(table) == ["submitting"]


def test_a_repeated_claim_finds_the_same_and_takes_nothing_twice(insert, claim, table):
    insert()
    insert("job-2", "poll")
    insert("job-3", "store")

    first = claim("n1")
    again = claim("n1")

    assert [(job.id, job.version) for job in again] == [(job.id, job.version) for job in first]
    assert one(table)["attempt"] == 1
    assert events(table) == ["submitting"]


def test_a_claim_says_how_much_there_is_where_it_is_asked(store, claim, insert, clock):
    insert("job-1", created_at="2026-01-31T23:58:00.000Z")
    insert("job-2", "submitting", due_at="2099")
    insert("job-3", "poll", submitted_at="2026-01-31T23:57:00.000Z", runpod_status="IN_QUEUE", endpoint_id="e")
    insert("job-4", "poll", submitted_at="2026-01-31T23:56:00.000Z", runpod_status="IN_PROGRESS")
    insert("job-5", "store", completed_at="2026-01-31T23:55:00.000Z", outputs='[{"spooled": true, "bytes": 7}]')
    values = {"nonce": "n", "now": clock.now(), "limits": Limits(submits=0), "lease": 9.0, "ignore_due": False}

    measured = store.claim(**values, measure=True, timeout=5.0).measured
    assert {name: round(value) for name, value in measured.metrics.items()} == {
        "Queued": 2, "OldestQueued": 60, "Running": 2, "OldestRunning": 180, "OldestWithoutWorker": 120, "Storing": 1,
        "OldestStoring": 240, "DeadLetters": 0, "PausedEndpoints": 0, "SpooledFiles": 1, "SpooledBytes": 7,
    }  # fmt: skip
    assert {endpoint: round(seconds) for endpoint, seconds in measured.waiting.items()} == {"e": 120}
    assert store.claim(**values, timeout=5.0).measured is None


def test_two_claims_share_nothing(insert, claim):
    for n in range(10):
        insert(f"job-{n}")

    first = claim("n1", limits=Limits(submits=4))
    second = claim("n2")

    assert len(first) == 4
    assert len(second) == 6
    assert not {job.id for job in first} & {job.id for job in second}


def test_what_is_not_due_is_left(insert, claim, clock):
    for n, step in enumerate(("submit", "poll", "store", "submitting")):
        insert(f"job-{n}", step, due_at=jobs.to_text(clock.now() + timedelta(milliseconds=1)))

    assert claim() == []


def test_the_oldest_are_taken_first(insert, claim, clock):
    for n in range(5):
        insert(f"job-{n}", due_at=jobs.to_text(clock.now() - timedelta(seconds=n)))

    assert {job.id for job in claim(limits=Limits(submits=2))} == {"job-3", "job-4"}


def test_big_inputs_are_claimed_a_few_at_a_time_and_one_always(insert, claim):
    for n in range(4):
        insert(f"job-{n}", input='"' + "x" * 1000 + '"')

    assert len(claim("n1", limits=Limits(submits=200, submit_bytes=2_500))) == 2
    assert len(claim("n2", limits=Limits(submits=200, submit_bytes=10))) == 1


def test_a_submit_that_has_moved_on_is_not_ours_to_send(insert, claim, table):
    insert()
    claim("n1")
    table("UPDATE jobs SET version = version + 1")  # a user's verb between the claim and its lost answer

    assert claim("n1") == []


def test_a_lost_submit_goes_back_and_is_sent_again_with_a_warning(insert, claim, table, clock):
    insert(step="submitting", due_at=jobs.to_text(clock.now() - timedelta(seconds=1)))

    (job,) = claim()

    assert job.attempt == 2
    assert events(table) == ["possible_duplicate", "submitting"]


def test_claiming_one_takes_the_oldest_whether_due_or_not(insert, store, clock, table):
    insert("new", created_at="2026-01-31T00:00:02.000Z")
    insert("old", created_at="2026-01-31T00:00:01.000Z", due_at="2027-01-01T00:00:00.000Z")

    claimed, named = store.claim_one(None, nonce="n1", now=clock.now(), timeout=5.0)
    again, _ = store.claim_one(None, nonce="n1", now=clock.now(), timeout=5.0)

    assert (claimed.id, again.id, named) == ("old", "old", None)
    assert one(table, "new")["step"] == "submit"


@pytest.mark.parametrize("step", ["submitting", "poll", "store"])
def test_claiming_one_leaves_what_is_sent_already(insert, store, clock, step):
    insert("job-1", step)

    claimed, named = store.claim_one("job-1", nonce="n1", now=clock.now(), timeout=5.0)

    assert (claimed, named.id, named.version) == (None, "job-1", 1)


# Claiming polls and stores


def test_a_poll_is_looked_at_again_in_the_next_round_without_a_new_version(insert, claim, table, clock):
    insert(step="poll")

    (job,) = claim("n1")
    assert (job.version, one(table)["version"]) == (1, 1)
    assert job.prompt == ""  # what is not needed is not read
    assert claim("n2") == []
    clock.advance(15)
    assert len(claim("n3")) == 1


def test_a_poll_that_is_not_due_is_taken_when_asked_for_but_never_a_leased_store(insert, claim):
    insert("job-1", "poll")
    insert("job-2", "store")
    claim("n1")

    assert [job.id for job in claim("n2", ignore_due=True)] == ["job-1"]


def test_a_store_is_leased_for_as_long_as_the_invocation_lives(insert, claim, clock):
    insert(step="store")

    (job,) = claim("n1", lease=30.0)
    assert job.version == 2
    clock.advance(29)
    assert claim("n2") == []
    clock.advance(2)
    assert len(claim("n3")) == 1


def test_a_claim_cannot_find_a_row_that_was_saved_since(insert, claim, store, clock, table):
    insert(step="poll")
    (job,) = claim("n1")
    # Another round saves `completed`; the answer to our claim was lost and it is sent again.
    lease = jobs.to_text(clock.now() + timedelta(seconds=60))
    save(store, clock, moves.complete(job, lease_until=lease, runpod={"runpod_status": "COMPLETED"}, now=clock.now()))

    assert claim("n1") == []


# Saving


def completed(job, clock, lease_until="2026-02-01T00:00:30.000Z"):
    return moves.complete(job, lease_until=lease_until, runpod={"runpod_status": "COMPLETED"}, now=clock.now())


def test_a_save_bumps_the_version_and_writes_one_line(insert, claim, store, clock, table):
    insert(step="poll")
    (job,) = claim()

    assert save(store, clock, completed(job, clock)) == {"job-1": 2}

    row = one(table)
    assert (row["step"], row["version"], row["writer"], row["claimer"]) == ("store", 2, "w1", None)
    assert events(table) == ["completed"]


def test_a_repeated_save_has_the_same_winners(insert, claim, store, clock, table):
    insert(step="poll")
    (job,) = claim()
    change = completed(job, clock)

    assert save(store, clock, change) == save(store, clock, change) == {"job-1": 2}
    assert one(table)["version"] == 2
    assert events(table) == ["completed"]


def test_a_stale_save_wins_nothing_and_writes_no_line(insert, claim, store, clock, table):
    insert(step="poll")
    (job,) = claim()
    save(store, clock, completed(job, clock), nonce="w1")

    assert save(store, clock, completed(job, clock), nonce="w2") == {}
    assert events(table) == ["completed"]


def test_a_stale_save_writes_no_line_even_where_there_is_none_to_collide_with(insert, claim, store, clock, table):
    insert(step="poll")
    (job,) = claim("n1")
    save(store, clock, completed(job, clock, lease_until=jobs.to_text(clock.now())), nonce="w1")
    claim("n2")  # the store claim has a version of its own, and no line

    assert save(store, clock, completed(job, clock), nonce="w2") == {}
    assert events(table) == ["completed"]


def test_a_final_row_is_not_changed_even_by_its_own_version(insert, store, clock, table, job_factory):
    insert(step="poll")
    table("UPDATE jobs SET status = 'done', step = NULL")  # by the earlier version, which counts no versions

    assert save(store, clock, moves.fail(job_factory(version=1), _error(), now=clock.now())) == {}
    assert one(table)["status"] == "done"


def _error():
    from chalicelib.errors import PermanentError

    return PermanentError("worker_failed", "boom")


def test_a_save_leaves_prompt_input_and_a_users_cancel_alone(insert, claim, store, clock, table):
    insert(step="poll", input='{"a":1}', model="m")
    (job,) = claim()
    table("UPDATE jobs SET cancel_at = 'now'")  # set after the claim, without a new version

    save(store, clock, completed(job, clock))

    row = one(table)
    assert (row["prompt"], row["input"], row["model"], row["cancel_at"]) == ("a cat", '{"a":1}', "m", "now")


def test_integers_stay_integers(insert, claim, store, clock, table):
    insert(step="poll")
    (job,) = claim()
    runpod = {"runpod_status": "COMPLETED", "queue_ms": 12, "execution_ms": 34}

    save(store, clock, moves.complete(job, lease_until="x", runpod=runpod, now=clock.now()))

    types = table("SELECT typeof(version) v, typeof(attempt) a, typeof(failures) f, typeof(queue_ms) q FROM jobs")
    assert types == [{"v": "integer", "a": "integer", "f": "integer", "q": "integer"}]


def accepted(job, clock, run_id="run-9"):
    return moves.accept(job, runpod_job_id=run_id, runpod_status="IN_QUEUE", now=clock.now())


def test_acceptance_is_saved_whatever_was_written_meanwhile(insert, claim, store, clock, table):
    insert()
    (job,) = claim()
    clock.advance(601)
    table("UPDATE jobs SET step = 'submit', version = version + 3")  # it has gone back by now

    assert save(store, clock, accepted(job, clock)) == {"job-1": 6}
    row = one(table)
    assert (row["step"], row["status"], row["runpod_job_id"], row["attempt"]) == ("poll", "running", "run-9", 1)


@pytest.mark.parametrize(
    "meanwhile",
    [
        "attempt = attempt + 1",
        "runpod_job_id = 'another', step = 'poll', status = 'running'",
        "status = 'cancelled', step = NULL",
        "runpod_job_id = 'run-9', step = 'submit'",  # recorded, lost by RunPod, and waiting for the next attempt
    ],
)
def test_acceptance_of_an_attempt_that_is_over_wins_nothing(insert, claim, store, clock, table, meanwhile):
    insert()
    (job,) = claim()
    table(f"UPDATE jobs SET {meanwhile}")
    before = one(table)

    assert save(store, clock, accepted(job, clock)) == {}
    assert one(table) == before


def test_one_save_carries_moves_of_every_kind(insert, claim, store, clock, table):
    insert("job-1")
    insert("job-2", "poll")
    insert("job-3", "store")
    held = {job.id: job for job in claim()}

    winners = save(
        store,
        clock,
        accepted(held["job-1"], clock),
        completed(held["job-2"], clock),
        moves.finish(
            moves.keep(held["job-3"], [{"key": "k", "url": "u", "bytes": 1}], links=[None], problems=None),
            now=clock.now(),
        ),
    )

    assert set(winners) == {"job-1", "job-2", "job-3"}
    assert [row["status"] for row in table("SELECT status FROM jobs ORDER BY id")] == ["running", "running", "done"]


def test_threads_that_claim_at_once_never_share_a_job(insert, store, clock):
    for n in range(60):
        insert(f"job-{n}", "submit" if n % 2 else "store")
    taken, barrier = [], threading.Barrier(6)

    def take(n):
        barrier.wait()
        for turn in range(4):
            held = store.claim(
                nonce=f"{n}-{turn}",
                now=clock.now(),
                limits=Limits(submits=4, stores=4),
                lease=60.0,
                ignore_due=False,
                timeout=20.0,
            )
            taken.extend(job.id for job in held.jobs)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(taken) == len(set(taken)) == 60
