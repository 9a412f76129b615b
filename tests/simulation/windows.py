"""
Aimed schedules: for every window in which two things may happen in the wrong order, a run in which they do.

Random seeds seldom hit a window of a few milliseconds between two certain calls; these always do. Each is a function
of a Stage; what must hold after every step is watched as in any world, what must come out is expected here.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from chalicelib.bootstrap import Service
from chalicelib.errors import RequestError, ServiceError, TransientError
from chalicelib.jobs import NEWEST, RUNPOD_KEEPS
from chalicelib.runtime import Deadline, Until
from tests.simulation.clouds import PICTURES, RECEIVERS, Run
from tests.simulation.faults import Fate, Faults, Plan
from tests.simulation.scenario import ENVIRONMENT, Scenario
from tests.simulation.world import REQUEST_SECONDS, Process, World

QUIET = Plan(queue_seconds=1.0, run_seconds=20.0, webhook=False)
LOST = Fate(lost=True)
BROKEN_OFF = Fate(lost=True, gives_up=0.1)  # lost too, and known at once
NEVER_SENT = Fate(effect=False)
BAD_GATEWAY = Fate(instead=(502, {}, b"<html>"))  # of the edge, behind which the call has had its effect
BUSY = Fate(effect=False, instead=(429, {"Retry-After": "300"}, b"{}"))
GONE = Fate(effect=False, instead=(404, {}, b'{"status":404}'))
NO_MORE = Fate(effect=False, instead=(410, {}, b""))
HOOK, OTHER_HOOK, _ = RECEIVERS
DAY = 86_400.0
D1_FAILS = Fate(effect=False, instead=(503, {}, b"<html>"))


class Stage(Scenario):
    """A world in which only what the schedule says goes wrong, driven step by step."""

    def step(self, kind: str, run: Callable[[Service], object], *, seconds: float = 70.0, wait: bool = True) -> Any:
        """One invocation; its result, if it is waited for and comes."""
        results: list[object] = []
        process = self.world.invoke(kind, run, results.append)
        if wait:
            self.world.run(seconds, until=lambda: bool(results) or not process.alive)
        return results[0] if results else process

    def new(self, plan: Plan = QUIET, *, callback_url: str | None = None, **payload: Any) -> str:
        """Create a job; its id."""

        def run(service: Service) -> object:
            return self.make(service, payload or None, callback_url=callback_url, plan=plan)

        self.step("api", run)
        return self.jobs[-1]

    def new_with(self, picture: str, *, wait: bool = True) -> Any:
        """Create a job that is given a picture; the job, or why not."""
        return self.step("api", lambda service: self.make(service, pictures=(picture,), plan=QUIET), wait=wait)

    def offered(self) -> str:
        """Where a picture may be put, and is; its key."""
        keys: list[str] = []
        self.offer(keys.append)
        self.world.run(10.0, until=lambda: bool(keys))
        self.world.clouds.put_picture(keys[0])
        return keys[0]

    def sweep(self, *, wait: bool = True) -> Any:
        """The sweep of the schedule."""
        return self.step("schedule", lambda service: service.uploads.sweep(Deadline(service.clock, 57.5)), wait=wait)

    def minute(self, *, wait: bool = True) -> Any:
        """One minute of the schedule, with what is told beside the rounds."""
        return self.step(
            "schedule", lambda service: service.pipeline.run_minute(Deadline(service.clock, 57.5)), wait=wait
        )

    def deliveries(self, job_id: str) -> list[dict[str, Any]]:
        """What is to be told of a job, and what came of it."""
        rows: list[dict[str, Any]] = self.world.clouds.execute(
            "SELECT * FROM deliveries WHERE job_id = ? ORDER BY version", job_id
        )
        return rows

    def heard(self, job_id: str) -> list[int]:
        """How often each end of a job was taken by its receiver."""
        told = self.world.clouds.told
        return [told[f"msg_{job_id}_{row['version']}"] for row in self.deliveries(job_id)]

    def create_with(self, plan: Plan, *, pictures: tuple[str, ...] = (), callback_url: str | None = None) -> None:
        """Begin to create a job, and do not wait for it."""
        number = len(self.jobs)
        self.jobs.append(f"job-{number}")

        def run(service: Service) -> object:
            return self.make(service, pictures=pictures, callback_url=callback_url, plan=plan, number=number)

        self.world.invoke("api", run)

    def wish(self, verb: str, number: int) -> None:
        """A user of the job with that number wants something, and does not wait for it."""
        self.verb(verb, self.jobs[number])

    def all_begun_are_final(self) -> bool:
        """Whether every job is written and has ended."""
        return all(self.exists(job) for job in self.jobs) and self.all_final()

    def exists(self, job_id: str) -> bool:
        """Whether the job was ever written."""
        return bool(self.world.clouds.execute("SELECT 1 FROM jobs WHERE id = ?", job_id))

    def round(self, *, seconds: float = 57.5, ignore_due: bool = False, wait: bool = True) -> Any:
        """One round of the schedule."""

        def run(service: Service) -> object:
            return service.pipeline.run_round(Deadline(service.clock, seconds), ignore_due=ignore_due)

        return self.step("schedule", run, wait=wait)

    def rounds(self, count: int, *, every: float = 15.0) -> None:
        """Some rounds, one after the other."""
        for _ in range(count):
            self.pass_time(every)
            self.round()

    def say(self, verb: str, job_id: str, *, wait: bool = True) -> Any:
        """What a user wants; what came of it."""
        self.world.invariants.asked[job_id][verb] += 1
        return self.step(
            "api",
            lambda service: getattr(service.verbs, verb)(job_id, Deadline(service.clock, REQUEST_SECONDS), by="user"),
            wait=wait,
        )

    def tell(self, run: Run, **other: Any) -> Any:
        """RunPod's callback at the end of a run."""
        assert run.webhook is not None
        job_id, attempt, token = run.webhook.rsplit("/", 3)[1:]
        body = json.dumps({"id": run.id, "status": "COMPLETED", **other}).encode()
        return self.step(
            "api",
            lambda service: service.pipeline.webhook(
                job_id, attempt, token, body, Deadline(service.clock, REQUEST_SECONDS)
            ),
        )

    def pass_time(self, seconds: float) -> None:
        """Let that long go by."""
        self.world.run(seconds)

    def next(self, part: str, *fates: Fate) -> None:
        """What becomes of the next calls whose "service METHOD url" has that in it."""
        self.world.faults.scripted += [(part, fate) for fate in fates]

    @contextmanager
    def trouble(self, part: str, fate: Fate) -> Iterator[None]:
        """What becomes of all such calls while this lasts."""
        self.world.faults.always.append((part, fate))
        yield
        self.world.faults.always.remove((part, fate))

    def row(self, job_id: str) -> dict[str, Any]:
        """The job as it stands in the table."""
        row: dict[str, Any] = self.world.clouds.execute("SELECT * FROM jobs WHERE id = ?", job_id)[0]
        return row

    def timeline(self, job_id: str) -> list[str]:
        """The events of a job."""
        return [event["event"] for event in self.world.invariants.events(job_id)]

    def runs(self, job_id: str) -> list[Run]:
        """What was bought for it."""
        return [run for run in self.world.clouds.runs.values() if run.job_id == job_id]

    def expect(self, holds: object, what: str) -> None:
        """Raise Violation unless it holds."""
        self.world.invariants.check(holds, what)

    def ends(self, job_id: str, status: str, *, runs: int = 1, code: str | None = None) -> None:
        """Let everything come to its end; the job must have this one."""
        self.world.faults.until = self.world.now
        self.every_minute()
        self.finish()
        row, bought = self.row(job_id), len(self.runs(job_id))
        told = self.timeline(job_id)
        self.expect(
            (row["status"], row["error_code"]) == (status, code), f"{row['status']} {row['error_code']}: {told}"
        )
        self.expect(bought == runs, f"{bought} runs were bought: {told}")


Window = Callable[[Stage], None]
WINDOWS: dict[str, tuple[Window, dict[str, str]]] = {}


def window(**environment: str) -> Callable[[Window], Window]:
    """Put the function into the list, with settings of its own."""

    def add(run: Window) -> Window:
        WINDOWS[run.__name__] = (run, environment)
        return run

    return add


def run_window(name: str) -> World:
    """Run one of them. Raises Violation."""
    play, environment = WINDOWS[name]
    with World(0, environment={**ENVIRONMENT, **environment}, faults=Faults()) as world:
        play(Stage(world))
    return world


# Submitting


@window()
def nothing_goes_wrong(stage: Stage) -> None:
    job = stage.new()
    stage.rounds(2)
    stage.ends(job, "done")
    stage.expect(
        stage.timeline(job) == ["created", "submitted", "observed", "completed", "done"], str(stage.timeline(job))
    )


@window()
def the_answer_to_run_is_lost_and_the_callback_adopts_the_run(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new()
    stage.pass_time(30.0)
    stage.expect(stage.tell(stage.runs(job)[0]) == "adopted", "the callback was not taken")
    stage.expect(stage.row(job)["status"] == "done", "the callback did not store the picture at once")
    stage.ends(job, "done")


@window()
def a_502_of_the_edge_is_no_proof_that_nothing_was_bought(stage: Stage) -> None:
    stage.next("/run", BAD_GATEWAY)
    job = stage.new()
    stage.rounds(4)
    stage.expect(len(stage.runs(job)) == 1, "it was sent again at once")
    stage.ends(job, "done", runs=2)
    stage.expect("possible_duplicate" in stage.timeline(job), "the second run has no explanation")


@window()
def the_answer_and_the_callback_are_lost_and_the_first_run_tells_late(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new()
    stage.pass_time(601.0)
    stage.round()
    stage.expect(len(stage.runs(job)) == 2, "it was not sent again after the wait")
    stage.expect(stage.tell(stage.runs(job)[0]) == "nothing to do", "an old attempt's callback did something")
    stage.ends(job, "done", runs=2)
    stage.expect("/2/output.png" in stage.row(job)["result_r2_key"], "the second attempt has no folder of its own")


@window()
def the_callback_of_the_lost_run_comes_after_its_wait_and_before_the_next(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new()
    stage.pass_time(601.0)
    with stage.trouble("/run", BUSY):  # the claim sets it free, and RunPod is busy
        stage.round()
    stage.expect(stage.tell(stage.runs(job)[0]) in ("adopted", "nothing to do"), "the callback failed")
    stage.ends(job, "done", runs=len(stage.runs(job)))


@window()
def nothing_arrives_at_runpod(stage: Stage) -> None:
    stage.next("/run", NEVER_SENT)
    job = stage.new()
    stage.ends(job, "done")
    stage.expect("possible_duplicate" in stage.timeline(job), "the wait has no explanation")


@window()
def runpod_is_busy_for_five_minutes(stage: Stage) -> None:
    stage.next("/run", BUSY)
    job = stage.new()
    stage.rounds(10)
    stage.ends(job, "done")
    stage.expect(stage.row(job)["attempt"] == 1, "a refusal has cost an attempt")


@window()
def runpod_cannot_be_reached(stage: Stage) -> None:
    stage.next("/run", Fate(refused=True))
    job = stage.new()
    stage.rounds(2)
    stage.expect(stage.row(job)["step"] == "poll", "a refused connection waited for ten minutes")
    stage.ends(job, "done")


@window()
def the_save_of_the_accepted_run_is_written_and_its_answer_lost(stage: Stage) -> None:
    stage.next("d1", Fate(), LOST, LOST)  # the insert; the save, and its repeat
    job = stage.new()
    run = stage.runs(job)[0]
    stage.rounds(3)
    stage.expect(run.cancelled is None, "the run was cancelled though the row holds it")
    stage.ends(job, "done")


@window()
def the_accepted_run_is_saved_only_in_the_next_round(stage: Stage) -> None:
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    job = stage.new()
    stage.expect(stage.row(job)["step"] == "submitting", "it was saved after all")
    other = stage.new()  # the same container: what it owes goes first
    stage.expect(stage.row(job)["step"] == "poll", "the next request did not save it")
    stage.ends(job, "done")
    stage.ends(other, "done")


@window(SUBMIT_UNKNOWN_WAIT="60")
def the_accepted_run_is_saved_when_its_wait_is_over(stage: Stage) -> None:
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    job = stage.new(replace(QUIET, run_seconds=200.0))
    stage.pass_time(61.0)
    with stage.trouble("/run", Fate(refused=True)):
        stage.round()  # another container: it goes back to be sent again
    stage.expect(stage.row(job)["runpod_job_id"] is None, "it has a run already")
    stage.new()
    stage.expect(stage.row(job)["runpod_job_id"] == stage.runs(job)[0].id, "the late answer was not taken")
    stage.ends(job, "done")


@window(SUBMIT_UNKNOWN_WAIT="60")
def an_accepted_run_that_lost_is_stopped(stage: Stage) -> None:
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.pass_time(61.0)
    stage.round()  # another container sends it again
    first, second = stage.runs(job)
    stage.new()
    stage.expect(first.cancelled is not None, "the run that no row names goes on")
    stage.expect(second.cancelled is None, "the run that the row names was stopped")
    stage.ends(job, "done", runs=2)


@window(SUBMIT_UNKNOWN_WAIT="60")
def an_accepted_run_of_a_job_that_was_cancelled_meanwhile_is_stopped(stage: Stage) -> None:
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.pass_time(61.0)
    with stage.trouble("/run", Fate(refused=True)):
        stage.round()
    with stage.trouble("d1", Fate()):
        container = [process for process in stage.world.processes if process.kind == "api"]
        for process in container:
            process.busy = True  # the user's request goes to another one
        stage.say("cancel", job)
        for process in container:
            process.busy = False
    stage.expect(stage.row(job)["status"] == "cancelled", "a waiting job was not cancelled")
    for process in stage.world.processes[-1:]:
        process.kill()
    stage.new()
    stage.new()
    stage.expect(stage.runs(job)[0].cancelled is not None, "its run goes on")
    stage.ends(job, "cancelled")


@window()
def the_accepted_run_is_saved_twice_with_a_look_at_it_between(stage: Stage) -> None:
    stage.next("d1", Fate(), LOST, LOST, LOST)
    job = stage.new(replace(QUIET, run_seconds=100.0))
    stage.rounds(1)  # another container sees it in progress: the last save is not the first one's any more
    stage.expect("observed" in stage.timeline(job), "nobody looked")
    stage.new()
    stage.expect(stage.runs(job)[0].cancelled is None, "the run was stopped though the row holds it")
    stage.ends(job, "done")


@window(SUBMIT_UNKNOWN_WAIT="60")
def the_accepted_run_is_saved_while_the_next_attempt_is_sent(stage: Stage) -> None:
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.pass_time(61.0)
    stage.next("/run", Fate(out=1.0, back=6.0))
    stage.round(wait=False)
    stage.pass_time(3.0)
    stage.new()
    stage.pass_time(10.0)
    first, second = stage.runs(job)
    stage.expect(stage.row(job)["runpod_job_id"] == second.id, "the first run is recorded as the second attempt")
    stage.pass_time(61.0)
    stage.new()
    stage.new()
    stage.expect(first.cancelled is not None, "the first run goes on")
    stage.ends(job, "done", runs=2)


@window()
def the_create_is_written_and_its_answer_lost(stage: Stage) -> None:
    stage.next("d1", LOST, LOST, LOST)
    job = stage.new()
    stage.expect(not stage.runs(job), "it was sent though nobody knew that it was written")
    stage.new()
    stage.pass_time(1.0)
    stage.round()
    stage.expect(len(stage.runs(job)) == 1, "it waits for ten minutes though it was never sent")
    stage.ends(job, "done")


@window()
def the_answer_to_a_claim_is_lost(stage: Stage) -> None:
    stage.next("/run", BUSY)
    job = stage.new()
    stage.pass_time(301.0)
    stage.next("d1", LOST, LOST, LOST)
    stage.round()
    stage.expect(stage.row(job)["step"] == "submitting", "the claim had no effect")
    stage.pass_time(15.0)
    stage.round()
    stage.expect(len(stage.runs(job)) == 1, "what it had claimed was forgotten")
    stage.ends(job, "done")
    stage.expect("possible_duplicate" not in stage.timeline(job), "it was in doubt though it was never sent")


@window()
def a_claim_takes_effect_when_its_round_is_over(stage: Stage) -> None:
    stage.next("/run", BUSY)
    job = stage.new()
    stage.pass_time(301.0)
    with stage.trouble("d1", Fate(out=20.0)):
        stage.round()
    stage.pass_time(30.0)
    stage.ends(job, "done")


@window()
def a_round_without_time_gives_its_submits_back(stage: Stage) -> None:
    stage.next("/run", BUSY)
    job = stage.new()
    stage.pass_time(301.0)
    with stage.trouble("d1", Fate(out=2.0, back=2.0)):
        stage.round(seconds=13.0)  # the claim leaves it nine seconds, too few for a paid call
    stage.expect(stage.row(job)["step"] == "submit" and stage.row(job)["attempt"] == 0, "it was not given back")
    stage.rounds(1)
    stage.expect(len(stage.runs(job)) == 1, "it was not sent in the next round")
    stage.ends(job, "done")
    stage.expect("possible_duplicate" not in stage.timeline(job), "it was in doubt though it was never sent")


@window()
def no_run_is_bought_while_outcomes_cannot_be_saved(stage: Stage) -> None:
    stage.next("/run", BUSY, BUSY)
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    first = stage.new()
    with stage.trouble("d1", D1_FAILS):
        second = stage.new()
    stage.expect(not stage.world.clouds.execute("SELECT id FROM jobs WHERE id = ?", second), "it was written after all")
    stage.ends(first, "done")


@window()
def two_rounds_at_once_share_the_work(stage: Stage) -> None:
    jobs = []
    for _ in range(4):
        stage.next("/run", BUSY)
        jobs.append(stage.new())
    stage.pass_time(302.0)
    with stage.trouble("/run", Fate(out=3.0)):
        stage.round(wait=False)
        stage.round(wait=False)
        stage.round(wait=False)
        stage.pass_time(10.0)
    for job in jobs:
        stage.ends(job, "done")


@window()
def a_job_created_twice_by_a_repeated_insert_is_one_job(stage: Stage) -> None:
    stage.next("d1", LOST)
    job = stage.new()
    stage.ends(job, "done")
    stage.expect(stage.timeline(job).count("created") == 1, "it was created twice")


# Polling


@window()
def a_404_just_after_the_submit_is_too_early(stage: Stage) -> None:
    job = stage.new(replace(QUIET, hidden_seconds=140.0))
    stage.rounds(8)
    stage.expect(stage.row(job)["step"] == "poll", "it was given up")
    stage.ends(job, "done")


@window()
def a_lost_run_gets_one_more_attempt(stage: Stage) -> None:
    job = stage.new(replace(QUIET, lost_after=10.0, run_seconds=30.0))
    stage.ends(job, "error", runs=2, code="runpod_lost")
    stage.expect(stage.timeline(job).count("attempt_lost") == 1, "the second run has no explanation")


@window()
def a_timed_out_run_gets_one_more_attempt_and_a_retry_two(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="TIMED_OUT"))
    stage.rounds(8)
    stage.expect(stage.row(job)["error_code"] == "runpod_timed_out", "it goes on")
    stage.say("retry", job)
    stage.ends(job, "error", runs=4, code="runpod_timed_out")


@window()
def a_workers_own_failure_is_final(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"))
    stage.ends(job, "error", runs=1, code="worker_failed")


@window(RETRY_WORKER_FAILED="true")
def a_workers_own_failure_is_repeated_where_the_operator_wants_it(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"))
    stage.ends(job, "error", runs=2, code="worker_failed")


@window()
def a_run_cancelled_outside_is_an_error(stage: Stage) -> None:
    job = stage.new(replace(QUIET, cancelled_after=5.0))
    stage.ends(job, "error", code="cancelled_outside")


@window()
def completed_without_a_picture_is_never_done(stage: Stage) -> None:
    job = stage.new(replace(QUIET, shape="none"))
    stage.ends(job, "error", code="no_output")


@window()
def a_word_that_nobody_knows_is_not_the_end(stage: Stage) -> None:
    job = stage.new()
    stage.next("/status/", *[Fate(instead=(200, {}, b'{"id":"x","status":"RUNNING"}'))] * 3)
    stage.rounds(3)
    stage.expect(stage.row(job)["status"] == "running", "it has ended")
    stage.ends(job, "done")


@window()
def runpod_does_not_answer_for_an_hour(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=3000.0))
    stage.world.config = replace(stage.world.config, run_deadline=7200)
    with stage.trouble("/status/", BAD_GATEWAY):
        stage.rounds(5, every=60.0)
    stage.expect(stage.row(job)["status"] == "running", "a paid run was given up for that")


@window()
def a_slow_status_loses_against_what_happened_meanwhile(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=2.0))
    stage.pass_time(2.0)
    stage.next("/status/", Fate(out=0.5, back=7.0))
    stage.round(wait=False)  # sees it in progress, and says so seven seconds later
    stage.pass_time(3.0)
    stage.round(ignore_due=True)
    stage.expect(stage.row(job)["status"] == "done", "the other round did not finish it")
    stage.pass_time(20.0)
    stage.ends(job, "done")


@window()
def in_progress_after_completed_ends_by_the_deadline(stage: Stage) -> None:
    job = stage.new()
    stage.world.faults.count("late_in_progress")
    stage.world.faults.in_progress_for_ever.add((job, 1))
    stage.ends(job, "error", code="run_deadline")


@window()
def a_run_that_nobody_takes_ends_by_the_deadline(stage: Stage) -> None:
    job = stage.new(replace(QUIET, queue_seconds=1e9))
    stage.ends(job, "error", code="start_deadline")
    run = stage.runs(job)[0]
    stage.expect(run.cancelled is not None, "it still waits at RunPod")
    stage.expect((run.timeout, run.ttl) == (500.0, 600.0 + 500.0 + 600.0), "RunPod was not told the deadlines")


@window()
def a_run_that_never_ends_is_ended(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=1e9))
    stage.ends(job, "error", code="run_deadline")


@window(TOTAL_DEADLINE="600")
def a_job_that_runpod_never_takes_ends_by_the_deadline(stage: Stage) -> None:
    with stage.trouble("/run", BUSY):
        job = stage.new()
        stage.rounds(30, every=60.0)
    stage.ends(job, "error", runs=0, code="total_deadline")


@window(TOTAL_DEADLINE="600")
def a_run_of_which_runpod_never_answers_ends(stage: Stage) -> None:
    job = stage.new()
    with stage.trouble("/status/", BAD_GATEWAY):
        stage.rounds(45, every=60.0)
    stage.expect(stage.row(job)["error_code"] == "total_deadline", "it goes on for ever")
    stage.ends(job, "error", code="total_deadline")


@window()
def completed_wins_over_the_deadline(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=499.0))
    stage.rounds(3)
    stage.pass_time(600.0)
    stage.ends(job, "done")


@window()
def the_endpoint_changes_while_jobs_run(stage: Stage) -> None:
    job = stage.new()
    stage.world.config = replace(stage.world.config, runpod_endpoint_id="another-endpoint")
    for process in stage.world.processes:
        process.kill()
    stage.world.faults.count("endpoint_changed")
    stage.ends(job, "done")


# Storing


@window()
def two_rounds_at_once_put_once(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    with stage.trouble("r2 PUT", Fate(out=2.0)):
        stage.round(wait=False)
        stage.pass_time(0.5)
        stage.round(wait=False, ignore_due=True)
        stage.round(wait=False, ignore_due=True)
        stage.pass_time(20.0)
    puts = [line for line in stage.world.trace if " r2 PUT " in line]
    stage.expect(len(puts) == 1, f"{len(puts)} puts")
    stage.ends(job, "done")


@window()
def whoever_loses_the_save_of_completed_does_not_store(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    with stage.trouble("/status/", Fate(out=1.0)):
        stage.round(wait=False)
        stage.round(wait=False, ignore_due=True)
        with stage.trouble("r2 PUT", Fate(out=3.0)):
            stage.pass_time(20.0)
    puts = [line for line in stage.world.trace if " r2 PUT " in line]
    stage.expect(len(puts) == 1, f"{len(puts)} puts")
    stage.ends(job, "done")


@window()
def the_save_of_completed_is_lost_and_nobody_stores_before_it(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    stage.round()
    stage.expect(not [line for line in stage.world.trace if " r2 PUT " in line], "it was stored before it was saved")
    stage.ends(job, "done")


@window()
def the_lease_of_a_killed_holder_ends(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    with stage.trouble("r2 PUT", Fate(out=30.0)):
        process = stage.round(wait=False)
        stage.pass_time(3.0)
        process.kill()
    stage.round()
    stage.expect(stage.row(job)["step"] == "store", "the lease was not kept")
    stage.rounds(6)
    stage.expect(stage.row(job)["status"] == "done", "nobody went on when the lease had ended")
    stage.ends(job, "done")


@window()
def the_answer_to_a_put_is_lost(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    stage.next("r2 PUT", LOST)
    stage.round()
    stage.ends(job, "done")


@window()
def the_save_of_done_is_lost(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    stage.next("d1", Fate(), Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    process = stage.round(wait=False)
    stage.pass_time(25.0)
    process.kill()
    stage.ends(job, "done")


@window()
def the_save_of_done_is_written_and_its_answer_lost(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    stage.next("d1", Fate(), Fate(), LOST, LOST, LOST)
    stage.round()
    stage.expect(stage.row(job)["status"] == "done", "it was not written")
    report = stage.round()
    stage.expect([updated.id for updated in report.updated] == [job], "a lost answer looks like a lost race")
    stage.ends(job, "done")


@window()
def a_save_takes_effect_when_others_have_gone_on(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(5.0)
    stage.next("d1", Fate(), Fate(out=100.0), D1_FAILS, D1_FAILS)
    stage.round()  # sees it in progress, and gives up saving that
    for process in stage.world.processes:
        process.kill()
    stage.pass_time(20.0)
    with stage.trouble("r2 PUT", Fate(out=30.0)):
        holder = stage.round(wait=False)
        stage.pass_time(3.0)
        holder.kill()
        stage.pass_time(70.5)
        stage.round(wait=False)  # takes the result when the lease has ended; the first save comes in while it stores
        stage.pass_time(20.0)
    stage.ends(job, "done")


@window()
def r2_is_down_for_longer_than_runpod_remembers(stage: Stage) -> None:
    job = stage.new()
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(130)
    row = stage.row(job)
    stage.expect(
        row["dead_at"] is not None and row["error_code"].startswith("r2_"), f"no dead letter: {row['error_code']}"
    )
    stage.pass_time(600.0)
    refusal = stage.say("redrive", job)
    stage.expect(isinstance(refusal, RequestError) and refusal.http_status == 410, f"not 410: {refusal!r}")
    stage.ends(job, "error", code=row["error_code"])


@window()
def a_dead_letter_is_redriven_while_runpod_still_has_it(stage: Stage) -> None:
    job = stage.new()
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(115)
        stage.expect(stage.row(job)["dead_at"] is not None, "no dead letter yet")
    stage.say("redrive", job)
    stage.say("redrive", job)
    stage.ends(job, "done")


@window(SPOOL_BUCKET="spool")
def r2_is_down_for_67_minutes_and_the_spool_has_it(stage: Stage) -> None:
    jobs = [stage.new(), stage.new(replace(QUIET, shape="link", files=3))]
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(268)
    for job in jobs:
        stage.ends(job, "done")


@window(SPOOL_BUCKET="spool")
def the_spool_fails_too_for_a_while(stage: Stage) -> None:
    job = stage.new(replace(QUIET, files=3))
    with stage.trouble("r2 ", Fate(refused=True)):
        with stage.trouble("spool PUT", Fate(effect=False, instead=(503, {}, b""))):
            stage.rounds(40)
        stage.rounds(200)
        with stage.trouble("spool GET", Fate(effect=False, instead=(503, {}, b""))):
            stage.rounds(10)
    stage.ends(job, "done")


@window(SPOOL_BUCKET="spool")
def a_picture_in_the_spool_is_a_dead_letter_after_a_day_and_redriven_after_two(stage: Stage) -> None:
    job = stage.new()
    with stage.trouble("r2 ", Fate(effect=False, instead=(403, {}, b""))):
        stage.rounds(300, every=400.0)
    row = stage.row(job)
    stage.expect((row["dead_at"] is not None, row["error_code"]) == (True, "r2_refused"), f"{row['error_code']}")
    stage.pass_time(86_400.0)
    stage.say("redrive", job)
    stage.ends(job, "done")


@window()
def r2_is_down_for_67_minutes_and_the_links_are_kept(stage: Stage) -> None:
    job = stage.new(replace(QUIET, shape="link", files=2))
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(268)
    stage.ends(job, "done")


@window()
def a_result_nobody_fetched_in_time_is_lost_and_says_so(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(RUNPOD_KEEPS.total_seconds() + 60.0)
    stage.world.faults.count("runpod_404_expired")
    stage.round()
    stage.expect("attempt_lost" in stage.timeline(job), "it does not say so")
    stage.ends(job, "done", runs=2)


@window()
def a_download_breaks_off(stage: Stage) -> None:
    job = stage.new(replace(QUIET, shape="link"))
    stage.next("result GET", *[Fate(instead=(200, {"x-truncated": "1"}, b"\x89PNG\r\n\x1a\nhalf"))] * 4)
    stage.ends(job, "done")


@window()
def a_picture_that_kills_its_holders_ends_alone(stage: Stage) -> None:
    jobs = [stage.new(webhook) for webhook in (QUIET, QUIET, QUIET)]
    stage.world.clouds.poison.add(jobs[1])
    stage.ends(jobs[1], "error", code="poison_result")
    for job in (jobs[0], jobs[2]):
        stage.ends(job, "done")
    stage.expect(stage.world.faults.counted["poison_job"] == 5, "it was not tried five times")


@window()
def a_result_without_time_is_put_back_and_not_suspected(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.round()
    for _ in range(12):
        stage.pass_time(130.0)
        stage.round(seconds=9.0)  # less than a store wants
    stage.expect(stage.row(job)["holds"] <= 1, "it is suspected though nobody began it")
    stage.ends(job, "done")


@window()
def the_month_ends_between_creation_and_upload(stage: Stage) -> None:
    stage.pass_time(240.0)
    job = stage.new(replace(QUIET, run_seconds=120.0))
    stage.world.faults.count("month_boundary")
    stage.ends(job, "done")
    stage.expect(stage.row(job)["result_r2_key"].startswith("jobs/2026/01/"), stage.row(job)["result_r2_key"])


# Users


@window()
def a_waiting_job_is_cancelled_at_once(stage: Stage) -> None:
    stage.next("/run", BUSY)
    job = stage.new()
    stage.say("cancel", job)
    stage.expect(stage.row(job)["status"] == "cancelled", "it waits")
    stage.ends(job, "cancelled", runs=0)


@window()
def a_running_job_is_cancelled_at_runpod_at_once(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.rounds(1)
    answer = stage.say("cancel", job)
    stage.expect(answer.status == "cancelled" and stage.runs(job)[0].cancelled, "its run goes on")
    stage.ends(job, "cancelled")


@window()
def a_cancel_whose_call_to_runpod_is_lost_is_repeated(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.next("/cancel/", NEVER_SENT, NEVER_SENT)
    stage.say("cancel", job)
    stage.expect(stage.row(job)["status"] == "running", "it has ended though its run goes on")
    stage.ends(job, "cancelled")
    stage.expect(stage.runs(job)[0].cancelled is not None, "its run goes on")


@window()
def a_cancel_between_the_paid_call_and_its_answer(stage: Stage) -> None:
    stage.next("/run", Fate(out=1.0, back=4.0))
    stage.world.at(2.0, lambda: stage.say("cancel", stage.jobs[0], wait=False))
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.expect(stage.row(job)["runpod_job_id"], "the answer to the paid call was thrown away")
    stage.ends(job, "cancelled")
    stage.expect(stage.runs(job)[0].cancelled is not None, "its run goes on")


@window()
def a_cancel_while_runpod_refuses(stage: Stage) -> None:
    stage.next("/run", Fate(out=1.0, back=4.0, effect=False, instead=(429, {}, b"{}")))
    stage.world.at(2.0, lambda: stage.say("cancel", stage.jobs[0], wait=False))
    job = stage.new()
    stage.rounds(1)
    stage.expect(stage.row(job)["status"] == "cancelled", f"it waits: {stage.timeline(job)}")
    stage.ends(job, "cancelled", runs=0)


@window()
def a_cancel_of_a_run_whose_answer_is_lost(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.say("cancel", job)
    stage.ends(job, "cancelled")
    stage.expect("submitting" not in stage.timeline(job), "it was sent again")


@window()
def a_cancel_comes_when_the_picture_is_drawn(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    stage.say("cancel", job)
    stage.expect(stage.row(job)["status"] == "done", "a finished picture was thrown away")
    stage.ends(job, "done")


@window()
def a_run_completes_between_the_look_and_the_cancel(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=20.0))
    stage.pass_time(20.5)
    stage.next("/cancel/", Fate(out=2.0))
    stage.say("cancel", job)
    stage.ends(job, "done")


@window()
def a_cancel_while_it_is_stored_is_refused(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.round()
    refusal = stage.say("cancel", job)
    stage.expect(isinstance(refusal, RequestError) and refusal.http_status == 409, f"not 409: {refusal!r}")
    stage.ends(job, "done")


@window()
def a_cancel_that_runpod_does_not_obey_ends_all_the_same(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=450.0))
    with stage.trouble("/cancel/", Fate(effect=False, instead=(200, {}, b"{}"))):
        stage.say("cancel", job)
        stage.world.faults.in_progress_for_ever.add((job, 1))
        stage.rounds(50)
    stage.expect(stage.row(job)["status"] == "cancelled", "it goes on for ever")


@window()
def a_cancelled_run_that_is_lost_is_not_drawn_again(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=400.0, lost_after=160.0))
    with stage.trouble("/cancel/", NEVER_SENT):
        stage.say("cancel", job)
        stage.rounds(12)
    stage.ends(job, "cancelled")


@window()
def a_cancel_that_is_repeated_is_told_once(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.pass_time(5.0)
    stage.next("d1", LOST)
    with stage.trouble("/cancel/", NEVER_SENT):
        stage.world.at(0.5, lambda: stage.round(wait=False, ignore_due=True))  # sees it in progress: a new version
        stage.say("cancel", job)
    stage.ends(job, "cancelled")
    stage.expect(stage.timeline(job).count("cancel_asked") == 1, f"{stage.timeline(job)}")


@window()
def a_callback_that_comes_twice_does_not_undo_a_retry(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"))
    stage.rounds(3)
    with stage.trouble("/run", BUSY):
        stage.say("retry", job)
        stage.expect(stage.tell(stage.runs(job)[0]) == "nothing to do", "the old run was recorded again")
        stage.rounds(2)
        stage.expect(stage.tell(stage.runs(job)[0]) == "nothing to do", "the old run was recorded again")
    stage.ends(job, "error", runs=2, code="worker_failed")


@window()
def a_save_that_is_repeated_does_not_undo_a_retry(stage: Stage) -> None:
    stage.next("d1", Fate(), LOST, LOST, LOST)
    job = stage.new(replace(QUIET, verdict="FAILED"))
    owing = stage.world.processes[0]
    owing.busy = True  # nobody invokes it for a while
    stage.rounds(3)
    with stage.trouble("/run", BUSY):
        stage.say("retry", job)
        owing.busy = False
        for process in stage.world.processes:
            process.busy = process is not owing and process.kind == "api"
        stage.new()
    stage.expect(stage.row(job)["runpod_job_id"] is None, "the old run was recorded again")
    stage.ends(job, "error", runs=2, code="worker_failed")


@window()
def a_cancel_reaches_runpod_though_it_gives_no_status(stage: Stage) -> None:
    job = stage.new(replace(QUIET, run_seconds=400.0))
    stage.pass_time(5.0)
    with stage.trouble("/status/", BAD_GATEWAY):
        stage.say("cancel", job)
        stage.expect(stage.runs(job)[0].cancelled is not None, "RunPod was not told")
        stage.rounds(50)
    stage.expect(stage.row(job)["status"] == "cancelled", "it goes on for ever")
    stage.ends(job, "cancelled")


@window()
def a_deadline_counts_from_when_runpod_was_told(stage: Stage) -> None:
    job = stage.new(replace(QUIET, queue_seconds=1e9))
    stage.pass_time(1500.0)
    stage.next("/cancel/", NEVER_SENT)
    stage.round()
    stage.expect(stage.row(job)["status"] == "running", "it has ended though RunPod was not told")
    stage.ends(job, "error", code="start_deadline")
    stage.expect(stage.runs(job)[0].cancelled is not None, "it still waits at RunPod")


@window(SUBMIT_UNKNOWN_WAIT="60")
def unknown_answers_do_not_buy_for_ever(stage: Stage) -> None:
    with stage.trouble("/run", BAD_GATEWAY):
        job = stage.new(replace(QUIET, run_seconds=400.0))
        stage.rounds(100)
    stage.ends(job, "error", runs=5, code="submit_unknown")


@window(SPOOL_BUCKET="spool")
def many_suspects_are_stored_one_after_the_other(stage: Stage) -> None:
    jobs = [stage.new() for _ in range(12)]
    stage.pass_time(30.0)
    with stage.trouble("r2 PUT", Fate(out=30.0)):
        for _ in range(3):
            holder = stage.round(wait=False)
            stage.pass_time(3.0)
            holder.kill()
            stage.pass_time(65.0)
    held = [stage.row(job)["holds"] for job in jobs]
    stage.expect(min(held) >= 2, f"they are not suspected: {held}")
    stage.round()
    stage.expect(all(stage.row(job)["status"] == "done" for job in jobs), "one round has not stored them all")
    for job in jobs:
        stage.ends(job, "done")


@window(SPOOL_BUCKET="spool")
def the_spool_does_not_find_a_file_for_a_while(stage: Stage) -> None:
    job = stage.new(replace(QUIET, files=2))
    stage.pass_time(30.0)
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(4)
    missing = Fate(effect=False, instead=(404, {}, b"<Error><Code>NoSuchKey</Code></Error>"))
    with stage.trouble("spool GET", missing):
        stage.rounds(20)
    stage.ends(job, "done")
    stage.expect(len(json.loads(stage.row(job)["outputs"])) == 2, "a file was given up")


@window(SPOOL_BUCKET="spool")
def one_file_is_in_the_spool_and_the_other_was_forgotten(stage: Stage) -> None:
    job = stage.new(replace(QUIET, files=2))
    stage.pass_time(30.0)
    with stage.trouble("r2 ", Fate(refused=True)), stage.trouble("output-2", Fate(refused=True)):
        stage.rounds(130)
    stage.expect(stage.row(job)["status"] == "running", "what is in the spool was given up")
    stage.ends(job, "done")
    stage.expect(len(json.loads(stage.row(job)["outputs"])) == 1, "a file came from nowhere")
    stage.expect("result_lost" in stage.world.invariants.events(job)[-1]["detail"], "the lost file is not told")


@window()
def what_is_wrong_with_a_file_is_told_though_another_took_long(stage: Stage) -> None:
    job = stage.new(replace(QUIET, shape="link", files=2))
    stage.pass_time(30.0)
    html = Fate(instead=(200, {}, b"<html>no picture</html>" * 10))
    with stage.trouble("/0.png", html):
        with stage.trouble("r2 ", Fate(refused=True)):
            stage.rounds(130)
        stage.ends(job, "done")
    stage.expect("unknown_type" in stage.world.invariants.events(job)[-1]["detail"], "the bad file is not told")


@window()
def two_retries_at_once_are_one(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"))
    stage.rounds(3)
    with stage.trouble("d1", Fate(out=0.3, back=0.3)):
        stage.say("retry", job, wait=False)
        stage.say("retry", job, wait=False)
        stage.pass_time(5.0)
    stage.ends(job, "error", runs=2, code="worker_failed")
    stage.expect(stage.timeline(job).count("retried") == 1, "it was retried twice")


@window()
def a_retry_whose_answer_is_lost_is_made_once(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"))
    stage.rounds(3)
    stage.next("d1", Fate(), LOST, LOST)
    stage.say("retry", job)
    stage.ends(job, "error", runs=2, code="worker_failed")
    stage.expect(stage.timeline(job).count("retried") == 1, "it was retried twice")


@window()
def a_retry_of_a_dead_letter_forgets_what_it_had(stage: Stage) -> None:
    job = stage.new(replace(QUIET, files=2))
    stage.pass_time(30.0)
    with stage.trouble("output-2.png", Fate(refused=True)):
        stage.rounds(125)
    stage.expect(len(json.loads(stage.row(job)["outputs"])) == 1, "nothing was stored")
    stage.say("retry", job)
    row = stage.row(job)
    stage.expect(
        (row["outputs"], row["runpod_job_id"], row["dead_at"]) == (None, None, None), "it shows the old result"
    )
    stage.ends(job, "done", runs=2)


@window()
def a_redrive_and_a_retry_at_once_are_the_first_of_them(stage: Stage) -> None:
    job = stage.new()
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(115)
    stage.expect(stage.row(job)["dead_at"] is not None, "no dead letter")
    stage.world.faults.plans[job, 2] = Plan(queue_seconds=0.0, run_seconds=0.0, verdict="FAILED", webhook=False)
    stage.next("/status/", Fate(out=3.0, back=4.0))
    stage.say("redrive", job, wait=False)  # reads the row, and asks RunPod for long
    stage.pass_time(0.5)
    stage.say("retry", job)
    stage.round()
    stage.pass_time(1.0)
    stage.round(ignore_due=True)
    stage.expect(stage.row(job)["error_code"] == "worker_failed", f"{stage.timeline(job)}")
    stage.pass_time(10.0)
    stage.ends(job, "error", runs=2, code="worker_failed")


@window()
def a_delete_while_a_retry_is_under_way_leaves_nothing_behind(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"))
    stage.rounds(3)
    stage.next("d1", Fate(), Fate(out=4.0, back=0.1))  # the retry reads the row, and saves late
    stage.say("retry", job, wait=False)
    stage.pass_time(1.0)
    with stage.trouble("r2 ", Fate(out=0.5, back=2.5)):
        stage.say("delete", job, wait=False)
        stage.pass_time(60.0)
    stage.rounds(3)
    stage.expect(not stage.exists(job), f"it is still there: {stage.timeline(job)}")
    stage.expect(len(stage.runs(job)) == 1, "a deleted job was drawn")


@window()
def a_delete_that_breaks_off_is_gone_on_with(stage: Stage) -> None:
    job = stage.new(replace(QUIET, files=2))
    stage.rounds(4)
    with stage.trouble("r2 DELETE", Fate(refused=True)):
        stage.say("delete", job)
    stage.expect(stage.row(job)["deleted_at"], "it is not marked")
    for verb in ("retry", "redrive", "cancel"):
        stage.expect(isinstance(stage.say(verb, job), RequestError), f"{verb} of a job that is being deleted")
    stage.next("d1", Fate(), LOST, LOST, LOST)
    stage.say("delete", job)
    stage.say("delete", job)
    stage.expect(not stage.exists(job), "it is still there")
    stage.expect(not [key for key in stage.world.clouds.r2.objects if job in key], "a file is left")


@window()
def a_live_job_is_not_deleted(stage: Stage) -> None:
    job = stage.new()
    stage.expect(isinstance(stage.say("delete", job), RequestError), "it was deleted")
    stage.ends(job, "done")


@window()
def a_done_job_is_not_retried_and_a_live_one_neither(stage: Stage) -> None:
    job = stage.new()
    for status in ("running", "done"):
        refusal = stage.say("retry", job)
        stage.world.invariants.asked[job]["retry"] -= 1
        stage.expect(isinstance(refusal, RequestError) and refusal.http_status == 409, f"{status}: {refusal!r}")
        if status == "running":
            stage.pass_time(30.0)
            stage.round()
    stage.ends(job, "done")


@window()
def many_dead_letters_are_redriven_and_those_without_a_result_are_told(stage: Stage) -> None:
    lost = stage.new()
    with stage.trouble("r2 ", Fate(refused=True)):
        stage.rounds(60)
        late = [stage.new(), stage.new()]
        stage.rounds(115)
    for job in (lost, *late):
        stage.expect(stage.row(job)["dead_at"] is not None, "no dead letter")

    def redrive(service: Service) -> object:
        deadline = Deadline(service.clock, REQUEST_SECONDS)
        return service.verbs.redrive_all(deadline, limit=50, after=NEWEST, error_code=None, dry_run=False, by="user")

    for job in late:
        stage.world.invariants.asked[job]["redrive"] += 1
    came, _ = stage.step("api", redrive)
    stage.expect(set(came.done) == set(late), f"redriven: {came.done}")
    stage.expect(list(came.refused) == [lost], f"gone: {came.refused}")
    stage.expect(not stage.step("api", redrive)[0].done, "they were redriven twice")
    for job in late:
        stage.ends(job, "done")


# Callbacks


@window()
def a_callback_adopts_its_run_beside_what_was_left_over(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new()
    stage.next("d1", LOST, LOST, LOST)
    other = stage.new()  # written, and to be given back as never sent: that is owed to the table
    stage.pass_time(30.0)
    stage.expect(stage.tell(stage.runs(job)[0]) == "adopted", "it was not adopted")
    stage.ends(job, "done")
    stage.ends(other, "done")


@window()
def forged_callbacks_change_nothing(stage: Stage) -> None:
    job = stage.new()
    before = stage.row(job)
    run = stage.runs(job)[0]
    calls = len(stage.world.trace)
    stage.forged(run)
    stage.pass_time(5.0)
    stage.world.faults.count("webhook_forged")
    stage.expect(stage.row(job) == before, "it changed something")
    stage.expect(len(stage.world.trace) == calls, "it was looked up before its token was checked")
    stage.ends(job, "done")


@window()
def a_callback_with_another_run_is_not_believed(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new()
    other = stage.new()
    before = stage.row(job)
    stage.expect(stage.tell(stage.runs(job)[0], id="run-of-nobody") == "nothing to do", "it was taken")
    stage.expect(stage.row(job) == before, "it changed something")
    stage.ends(job, "done", runs=2)
    stage.ends(other, "done")


@window()
def callbacks_twice_and_late_do_nothing_more(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    run = stage.runs(job)[0]
    for expected in ("looked at", "nothing to do", "nothing to do"):
        stage.expect(stage.tell(run) == expected, f"not {expected}")
        stage.pass_time(10.0)
    stage.ends(job, "done")


@window()
def a_callback_and_a_round_at_once_put_once(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    with stage.trouble("r2 PUT", Fate(out=2.0)):
        stage.round(wait=False)
        stage.tell(stage.runs(job)[0])
        stage.pass_time(20.0)
    puts = [line for line in stage.world.trace if " r2 PUT " in line]
    stage.expect(len(puts) == 1, f"{len(puts)} puts")
    stage.ends(job, "done")


@window()
def a_callback_of_a_cancelled_lost_run_does_not_adopt_it(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new(replace(QUIET, cancelled_after=5.0))
    stage.pass_time(10.0)
    stage.expect(stage.tell(stage.runs(job)[0]) == "nothing to do", "a cancelled run was adopted")
    stage.ends(job, "error", runs=2, code="cancelled_outside")


# D1


@window()
def cloudflare_locks_the_account_out(stage: Stage) -> None:
    job = stage.new()
    stage.world.faults.windows.append(("d1_lockout", stage.world.now + 10.0, stage.world.now + 310.0))
    stage.rounds(24)
    stage.expect(stage.world.faults.counted["d1_lockout"] <= 4, "it was asked again and again")
    stage.ends(job, "done")


@window()
def d1_stalls_for_80_seconds(stage: Stage) -> None:
    job = stage.new()
    stage.world.faults.windows.append(("d1_stall", stage.world.now + 10.0, stage.world.now + 90.0))
    stage.every_minute()
    stage.pass_time(200.0)
    stage.ends(job, "done")


@window()
def few_calls_are_left_and_the_callbacks_leave_them_to_the_rounds(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    service = next(process for process in stage.world.processes if process.kind == "api").service
    service.store._d1._calls_left = (299, Until(service.clock, 60.0))
    calls = len(stage.world.trace)
    stage.expect(stage.tell(stage.runs(job)[0]) == "left to the next round", "it was not left")
    stage.expect(len(stage.world.trace) == calls + 1, "it made more than one call")
    service.store._d1._calls_left = (99, Until(service.clock, 60.0))
    stage.expect(isinstance(stage.tell(stage.runs(job)[0]), TransientError), "it was not put off")
    stage.ends(job, "done")


@window()
def a_lost_run_is_adopted_though_few_calls_are_left(stage: Stage) -> None:
    stage.next("/run", LOST)
    job = stage.new()
    stage.pass_time(30.0)
    service = next(process for process in stage.world.processes if process.kind == "api").service
    service.store._d1._calls_left = (299, Until(service.clock, 60.0))
    stage.expect(stage.tell(stage.runs(job)[0]) == "adopted", "it is sent again")
    stage.ends(job, "done")


@window()
def a_lambda_at_its_time_limit_is_killed_in_mid_upload(stage: Stage) -> None:
    job = stage.new()
    stage.pass_time(30.0)
    stage.next("r2 PUT", Fate(frozen=True))
    process = stage.round(wait=False)
    stage.pass_time(57.0)
    stage.expect(process.alive, "it was killed before its time")
    stage.pass_time(2.0)
    stage.expect(not process.alive and stage.row(job)["step"] == "store", "it was not killed in the middle")
    stage.ends(job, "done")


@window()
def rows_of_the_earlier_version_go_on(stage: Stage) -> None:
    stage.old_row("old-queued", "queued")
    stage.old_row("old-running", "running")
    stage.world.faults.count("old_row")
    stage.rounds(2)
    stage.expect(len(stage.runs("old-queued")) == 1 and stage.row("old-queued")["deadline_at"], "it was not sent")
    stage.ends("old-queued", "done")
    stage.ends("old-running", "done")
    stage.expect("possible_duplicate" in stage.timeline("old-running"), "its run has no explanation")


@window()
def clocks_are_five_minutes_wrong(stage: Stage) -> None:
    stage.world.faults.max_skew = 300.0
    jobs = [stage.new() for _ in range(3)]
    for _ in range(20):
        stage.rounds(1)
        for process in stage.world.processes[-1:]:
            process.kill()
    for job in jobs:
        stage.ends(job, "done")


# Callbacks to a caller's own address


@window()
def an_end_is_told_once(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    stage.pass_time(25.0)
    stage.minute()
    stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")
    stage.minute()
    stage.ends(job, "done")
    stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")


@window()
def a_lambda_is_killed_between_the_post_and_its_settling(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    stage.pass_time(25.0)
    stage.next("callback", Fate(back=5.0))
    process = stage.minute(wait=False)
    stage.pass_time(3.0)
    stage.expect(stage.heard(job) == [1], "it was not sent")
    process.kill()
    stage.minute()
    stage.expect(stage.heard(job) == [1], "it was told again while the claim held")
    stage.pass_time(30.0)
    stage.minute()
    stage.expect(stage.heard(job) == [2], "it was not told again")
    stage.ends(job, "done")


@window()
def what_came_of_a_callback_is_written_and_the_answer_lost(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    stage.pass_time(25.0)
    stage.round()
    stage.next("d1", Fate(), LOST, LOST)  # the claim; what came of it, and its repeat
    stage.step("schedule", lambda service: service.courier.run(Deadline(service.clock, 57.5)))
    stage.expect([row["tries"] for row in stage.deliveries(job)] == [1], "its try was counted twice")
    stage.ends(job, "done")
    stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")


@window()
def the_claim_of_callbacks_is_written_and_its_answer_lost(stage: Stage) -> None:
    jobs = [stage.new(callback_url=url) for url in (HOOK, HOOK, OTHER_HOOK)]
    stage.pass_time(25.0)
    stage.round()
    stage.next("d1", BROKEN_OFF, BROKEN_OFF)
    stage.step("schedule", lambda service: service.courier.run(Deadline(service.clock, 57.5)))
    for job in jobs:
        stage.expect(stage.heard(job) == [1], "the repeated claim has not found what it took")
        stage.ends(job, "done")


@window()
def a_waiting_job_is_cancelled_by_a_claim_whose_answer_is_lost(stage: Stage) -> None:
    stage.next("/run", Fate(out=3.0, back=3.0, effect=False, instead=(429, {"Retry-After": "5"}, b"{}")))
    stage.create_with(QUIET, callback_url=HOOK)
    stage.pass_time(2.0)
    job = stage.jobs[0]
    stage.say("cancel", job)
    stage.expect(stage.row(job)["status"] == "queued", "it has ended while it was being sent")
    stage.pass_time(10.0)
    stage.next("d1", LOST, LOST, LOST)
    stage.round()
    stage.expect(stage.row(job)["status"] == "cancelled", "the claim has not ended it")
    stage.ends(job, "cancelled", runs=0)
    stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")


@window()
def a_job_that_waits_is_cancelled_and_told_of(stage: Stage) -> None:
    with stage.trouble("/run", BUSY):
        job = stage.new(callback_url=HOOK)
        stage.next("d1", LOST)
        stage.say("cancel", job)
    stage.ends(job, "cancelled", runs=0)
    stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")


@window()
def two_couriers_at_once_tell_once(stage: Stage) -> None:
    jobs = [stage.new(callback_url=url) for url in RECEIVERS]
    stage.pass_time(25.0)
    stage.round()
    with stage.trouble("callback", Fate(back=3.0)):
        stage.minute(wait=False)
        stage.pass_time(1.0)
        stage.minute()
    for job in jobs:
        stage.ends(job, "done")
        stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")


@window()
def an_end_is_saved_twice_under_one_nonce_and_told_between(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    stage.pass_time(25.0)
    stage.next("d1", Fate(), Fate(), LOST, LOST, LOST)  # the claim, `completed`; the end, and its repeats
    stage.round()
    stage.expect(stage.row(job)["status"] == "done", "the end was not written")
    stage.next("d1", Fate(effect=False))  # the same container owes it: first another one tells
    owing = [process for process in stage.world.processes if process.service.pipeline.saver.backlog]
    stage.expect(owing, "nothing is to be saved again")
    for process in owing:
        process.busy = True
    stage.minute()
    stage.expect(stage.heard(job) == [1], "it was not told")
    for process in stage.world.processes:
        process.busy = process not in owing
    stage.minute()
    stage.expect(not owing[0].service.pipeline.saver.backlog, "it was not saved again")
    stage.ends(job, "done")
    stage.expect(stage.heard(job) == [1], f"it was heard {stage.heard(job)}")


@window()
def a_retry_while_the_error_is_still_to_be_told(stage: Stage) -> None:
    job = stage.new(replace(QUIET, verdict="FAILED"), callback_url=HOOK)
    with stage.trouble("callback", Fate(refused=True)):
        stage.pass_time(25.0)
        stage.minute()
        stage.world.faults.plans[job, 2] = QUIET
        stage.say("retry", job)
        stage.pass_time(25.0)
        stage.minute()
    stage.expect(stage.heard(job) == [0, 0], "it was heard though nobody could")
    stage.ends(job, "done", runs=2)
    told = [(row["type"], row["status"]) for row in stage.deliveries(job)]
    stage.expect(told == [("job.error", "delivered"), ("job.done", "delivered")], str(told))
    stage.expect(stage.heard(job) == [1, 1], f"they were heard {stage.heard(job)}")


@window()
def slow_receivers_delay_no_round(stage: Stage) -> None:
    jobs = [stage.new(callback_url=url) for url in RECEIVERS for _ in range(3)]
    stage.pass_time(25.0)
    with stage.trouble("callback", Fate(back=60.0)):
        begun = stage.world.now
        process = stage.minute(wait=False)
        stage.pass_time(59.0)
        began = [round(at - begun, 1) for at in process.rounds]
        stage.expect(began == [0.0, 15.0, 30.0, 45.0], f"the rounds began at {began}")
        stage.expect(process.alive and not process.busy, "the minute has not ended")
    for job in jobs:
        stage.ends(job, "done")


@window()
def a_host_that_is_down_holds_up_no_other(stage: Stage) -> None:
    jobs = [stage.new(callback_url=HOOK) for _ in range(42)]
    other = stage.new(callback_url=OTHER_HOOK)
    stage.pass_time(25.0)
    stage.round()
    with stage.trouble(f"callback POST {HOOK}", Fate(back=60.0)):
        stage.minute()
        stage.expect(stage.heard(other) == [1], "it was not told in a minute")
    stage.ends(other, "done")
    stage.expect(all(sum(stage.heard(job)) >= 1 for job in jobs), "some were never told")


@window()
def a_receiver_wants_to_hear_nothing_more_until_it_is_told_again(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    stage.pass_time(25.0)
    stage.next("callback", NO_MORE)
    stage.minute()
    stage.pass_time(DAY)
    stage.minute()
    stage.expect([row["status"] for row in stage.deliveries(job)] == ["failed"], "410 is not the end")
    stage.expect(stage.heard(job) == [0], "it was told again")
    stage.replay(job)
    stage.pass_time(10.0)
    stage.expect(stage.heard(job) == [1], "the replay was not told")
    stage.ends(job, "done")


@window()
def a_receiver_that_never_hears_is_given_up_after_eight_tries(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    with stage.trouble("callback", Fate(refused=True)):
        stage.ends(job, "done")
    (row,) = stage.deliveries(job)
    stage.expect((row["status"], row["tries"]) == ("failed", 8), f"{row['status']} after {row['tries']} tries")


@window()
def a_job_is_deleted_while_its_end_is_told_once_more(stage: Stage) -> None:
    job = stage.new(callback_url=HOOK)
    stage.pass_time(25.0)
    stage.minute()
    stage.next("callback", Fate(back=5.0))
    stage.replay(job)
    stage.pass_time(1.0)
    stage.say("delete", job)
    stage.pass_time(10.0)
    stage.expect(not stage.exists(job), "it was not deleted")


# Pictures that go into jobs


@window()
def a_create_while_its_picture_is_being_swept_is_refused(stage: Stage) -> None:
    key = stage.offered()
    stage.pass_time(DAY + 60.0)
    stage.next("r2 DELETE", Fate(out=3.0))
    stage.sweep(wait=False)  # marks it, and takes long to remove it
    stage.pass_time(1.0)
    refusal = stage.new_with(key)
    stage.expect(isinstance(refusal, RequestError) and refusal.code == "image_not_found", f"{refusal!r}")
    stage.pass_time(10.0)
    stage.expect(key not in stage.world.clouds.r2.objects, "it was not removed")


@window()
def a_picture_is_swept_between_a_creates_look_and_its_insert(stage: Stage) -> None:
    key = stage.offered()
    stage.pass_time(DAY + 60.0)
    stage.next("d1", Fate(out=5.0))
    stage.new_with(key, wait=False)
    stage.pass_time(1.0)
    stage.sweep()
    stage.pass_time(10.0)
    stage.expect(not stage.world.clouds.execute("SELECT 1 FROM jobs"), "it was made without its picture")


@window()
def a_create_that_comes_before_the_sweep_keeps_its_picture(stage: Stage) -> None:
    key = stage.offered()
    stage.pass_time(DAY + 60.0)
    stage.next("d1", BROKEN_OFF)
    job = stage.new_with(key)
    stage.sweep()
    stage.ends(job.id, "done")
    stage.expect(key in stage.world.clouds.r2.objects, "its picture is gone")


@window()
def a_picture_stays_until_the_last_of_its_jobs_is_deleted(stage: Stage) -> None:
    key = stage.offered()
    first, second = stage.new_with(key), stage.new_with(key)
    stage.pass_time(25.0)
    stage.rounds(2)
    stage.say("delete", first.id)
    stage.pass_time(DAY + 60.0)
    stage.sweep()
    stage.expect(key in stage.world.clouds.r2.objects, "it is gone, and a job uses it")
    stage.next("d1", Fate(), LOST, LOST)  # the mark; the delete, and its repeat
    stage.say("delete", second.id)
    stage.pass_time(901.0)  # until no address to put it holds any more
    stage.sweep()
    stage.expect(key not in stage.world.clouds.r2.objects, "it was left")


@window()
def a_sweep_that_breaks_off_is_gone_on_with(stage: Stage) -> None:
    key = stage.offered()
    stage.pass_time(DAY + 60.0)
    with stage.trouble("r2 DELETE", Fate(refused=True)):
        stage.sweep()
    stage.expect(isinstance(stage.new_with(key), RequestError), "a job uses what is being removed")
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)
    stage.sweep()
    stage.expect(key not in stage.world.clouds.r2.objects, "it was left")
    stage.sweep()
    stage.expect(not stage.world.clouds.execute("SELECT 1 FROM uploads"), "it is written down for ever")


@window()
def a_copy_that_no_job_was_made_for_is_swept(stage: Stage) -> None:
    stage.next("d1", Fate(), D1_FAILS, D1_FAILS, D1_FAILS)  # its key; the insert
    refusal = stage.new_with(f"{PICTURES}/1.png")
    stage.expect(isinstance(refusal, ServiceError), f"it was made: {refusal!r}")
    stage.expect(len(stage.world.clouds.r2.objects) == 1, "there is no copy")
    stage.pass_time(DAY + 60.0)
    stage.sweep()
    stage.expect(not stage.world.clouds.r2.objects, "the copy was left")


# Endpoints that fail, and how much RunPod has at once


def _all_end_well(stage: Stage, jobs: list[str]) -> None:
    """A run whose answer was lost is bought once more, no other."""
    for job in jobs:
        stage.ends(job, "done", runs=2 if "submit_unknown" in stage.timeline(job) else 1)


@window()
def an_endpoint_that_fails_every_call_is_left_alone(stage: Stage) -> None:
    with stage.trouble("/run", BAD_GATEWAY):
        jobs = [stage.new() for _ in range(12)]
        stage.expect(sum(len(stage.runs(job)) for job in jobs) == 5, "more than five were sent")
        stage.rounds(8)
    lost = [job for job in jobs if "submit_unknown" in stage.timeline(job)]
    stage.expect(len(lost) == 6, f"{len(lost)} may have been bought")  # one has tried it after a minute
    stage.pass_time(120.0)
    stage.rounds(2)
    waiting = [job for job in jobs if stage.row(job)["step"] == "submit"]
    stage.expect(not waiting, f"{len(waiting)} still wait, and one was taken")
    _all_end_well(stage, jobs)


@window()
def one_job_alone_tries_it_again(stage: Stage) -> None:
    with stage.trouble("/run", replace(BAD_GATEWAY, out=5.0)):
        jobs = [stage.new() for _ in range(10)]
        stage.pass_time(61.0)
        stage.round(wait=False)
        stage.round()  # another container at the same time
        stage.pass_time(10.0)
    stage.expect(sum(len(stage.runs(job)) for job in jobs) == 6, "more than one tried it")
    _all_end_well(stage, jobs)


@window()
def it_is_tried_again_though_whoever_tried_it_died(stage: Stage) -> None:
    with stage.trouble("/run", BAD_GATEWAY):
        jobs = [stage.new() for _ in range(6)]
    stage.pass_time(61.0)
    stage.next("/run", Fate(effect=False, frozen=True))
    stage.round(wait=False)
    stage.pass_time(61.0)
    stage.new()
    for job in jobs:
        stage.ends(job, "done", runs=2 if job in jobs[:5] else 1)


@window(MAX_RUNNING="2")
def runpod_has_no_more_runs_than_it_may(stage: Stage) -> None:
    plan = replace(QUIET, run_seconds=40.0)
    for _ in range(6):
        stage.create_with(plan)
    for _ in range(20):
        stage.rounds(1)
        (there,) = stage.world.clouds.execute("SELECT count(*) AS n FROM jobs WHERE step IN ('submitting', 'poll')")
        stage.expect(there["n"] <= 2, f"RunPod has {there['n']}")
    for job in stage.jobs:
        stage.ends(job, "done")


__all__ = ["WINDOWS", "Process", "Stage", "run_window"]
