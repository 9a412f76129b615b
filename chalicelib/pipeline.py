"""
The pipeline: a request creates and sends a job, rounds carry every job on until it is final.

A round is claim → work → save: one D1 call takes what is due, threads ask RunPod and R2 side by side, and their
outcomes are saved in groups. So the number of D1 calls does not grow with the number of jobs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from uuid import UUID

from chalicelib import jobs, log
from chalicelib.errors import IndeterminateError, PermanentError, RequestError, ServiceError, TransientError
from chalicelib.jobs import FINAL, Change, Job, State
from chalicelib.runpod import Answer
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.saver import Saver
from chalicelib.steps import PUT_RESERVE, Steps
from chalicelib.store import Limits, Store

ROUNDS = 4  # a minute
ROUND_EVERY = 15.0  # seconds from start to start
ROUND_BUDGET = 10.0  # seconds that must be left for a round after the first

THREADS = 16
SAVE_EVERY = 1.0  # seconds between saves while work goes on; Cloudflare allows four calls a second for everything
CLAIM_TIMEOUT = 12.0  # seconds
CREATE_TIMEOUT = 8.0  # seconds
LEASE_MARGIN = 5.5  # seconds that a lease outlives its deadline, which is half a second before the Lambda must be dead

# Seconds that must be left to begin a step; what is not begun is given back, or is due again by itself.
SUBMIT_BUDGET = 12.0
POLL_BUDGET = 4.0
STORE_BUDGET = PUT_RESERVE + 0.5

SUBMITS_PER_ROUND = 200
KEPT_ANSWER_BYTES = (
    32_000_000  # of results held in memory until they may be stored; RunPod is asked again for the others
)
CALLS_KEPT_FOR_ROUNDS = 100  # under this many D1 calls left, creating only queues: one call, not two


@dataclass(kw_only=True)
class Report:
    """What a round did: statuses asked, runs sent, and the jobs that became final."""

    checked: int = 0
    submitted: int = 0
    updated: list[Job] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step came to: the change to save, if any; whether RunPod was asked for a status, and what it answered."""

    change: Change | None = None
    asked: bool = False
    answer: Answer | None = None


class Pipeline:
    """Everything that moves jobs; one for each process."""

    def __init__(
        self,
        *,
        store: Store,
        steps: Steps,
        saver: Saver,
        clock: Clock,
        rng: Random,
        new_crew: Callable[[int], Crew] = Crew,
    ) -> None:
        self.store = store
        self.steps = steps
        self.saver = saver
        self.clock = clock
        self.rng = rng
        self.new_crew = new_crew

    def nonce(self) -> str:
        """A name for one batch that no other has."""
        return f"{self.rng.getrandbits(128):032x}"

    def new_job(self, *, prompt: str, model: str, payload: dict[str, object] | None) -> Job:
        """A job with an id of its own, not yet in the table."""
        job_id = str(UUID(int=self.rng.getrandbits(128), version=4))
        return jobs.new(job_id=job_id, prompt=prompt, model=model, payload=payload, now=self.clock.now())

    def create(self, job: Job, deadline: Deadline) -> None:
        """
        Insert the job and send it to RunPod at once: two D1 calls. If RunPod does not take it now, the rounds go on.

        Raises what D1 raises, and then nothing was sent.
        """
        sending = self._may_send(deadline)
        if sending:
            job = self.store.with_intent(job, now=self.clock.now())
        try:
            self.store.create(job, nonce=self.nonce(), timeout=deadline.cap(CREATE_TIMEOUT))
        except IndeterminateError:
            if sending:  # the row may be there with its intent written, and nobody will send it
                self.saver.keep([jobs.return_unsent(job, now=self.clock.now())])
            raise
        except PermanentError as error:
            if error.code == "d1_request_too_large":
                raise RequestError("body_too_large", "The input is too large to be stored; make it smaller.") from error
            raise
        if sending:
            self._send(job, deadline)

    def send_one(self, job_id: str | None, deadline: Deadline) -> tuple[Job | None, ServiceError | None]:
        """
        Send one waiting job now, the oldest where no id is given.

        Returns the job as it stands then (None: there is no such job) and why RunPod did not take it, if it did not.
        """
        claimed, named = self.store.claim_one(
            job_id, nonce=self.nonce(), now=self.clock.now(), timeout=deadline.cap(CREATE_TIMEOUT)
        )
        if claimed is None:
            return named, None
        change = self._send(claimed, deadline)
        return change.job, change.error

    def _send(self, job: Job, deadline: Deadline) -> Change:
        change = self.steps.submit(job, deadline)
        try:
            self.saver.save([change], deadline)
        except ServiceError as error:  # kept for the next time; RunPod's answer is what the caller asked for
            log.failed("save_refused", error, job_id=job.id)
        return change

    def _may_send(self, deadline: Deadline) -> bool:
        calls_left = self.store.calls_left()
        if calls_left is not None and calls_left < CALLS_KEPT_FOR_ROUNDS:
            return False
        try:
            self.saver.flush(deadline)
        except ServiceError:
            return False  # D1 does not take outcomes; it must not be owed another one for a paid run
        return True

    def run_minute(self, deadline: Deadline) -> list[Report]:
        """
        Four rounds, 15 s from start to start; the first always, a later one if there is time for it.

        A slot that a long round has run over is left out. A round that fails does not keep the others from running.
        """
        start = self.clock.monotonic()
        reports = []
        slot = 0
        while slot < ROUNDS:
            pause = max(0.0, start + slot * ROUND_EVERY - self.clock.monotonic())
            if slot > 0 and deadline.left() - pause < ROUND_BUDGET:
                break
            if pause:
                self.clock.sleep(pause)
            reports += self._guarded_round(deadline)
            slot = max(slot + 1, math.ceil((self.clock.monotonic() - start) / ROUND_EVERY))
        return reports

    def _guarded_round(self, deadline: Deadline) -> list[Report]:
        try:
            return [self.run_round(deadline)]
        except ServiceError as error:
            log.failed("round_failed", error)
        except Exception:
            log.crashed("round_crashed")
        return []

    def run_round(self, deadline: Deadline, *, ignore_due: bool = False) -> Report:
        """One pass over every due job. Raises ServiceError where the claim fails; then nothing was begun."""
        start = self.clock.monotonic()
        with self.new_crew(THREADS) as crew:
            report = Round(self, crew, deadline).run(ignore_due=ignore_due)
        seconds = self.clock.monotonic() - start
        log.round_over(checked=report.checked, submitted=report.submitted, updated=len(report.updated), seconds=seconds)
        return report


class Round:
    """One pass: claims, starts a step for each job, saves outcomes, and stores what it has won."""

    def __init__(self, pipeline: Pipeline, crew: Crew, deadline: Deadline) -> None:
        self._pipeline = pipeline
        self._crew = crew
        self._deadline = deadline
        self._report = Report()
        self._answers: dict[str, Answer] = {}
        self._saves_refused = False
        self._saved_at = pipeline.clock.monotonic()

    def run(self, *, ignore_due: bool) -> Report:
        """Run to the end: no thread is left at work when this returns."""
        self._go_on(self._pipeline.saver.flush(self._deadline))
        for job in self._claim(ignore_due):
            self._start(job)
        self._collect()
        return self._report

    def _claim(self, ignore_due: bool) -> list[Job]:
        """What is due: results first, which RunPod forgets, then runs to send, which need time, then polls."""
        submits = SUBMITS_PER_ROUND if self._deadline.left() > SUBMIT_BUDGET else 0
        claimed = self._pipeline.store.claim(
            nonce=self._pipeline.nonce(),
            now=self._pipeline.clock.now(),
            limits=Limits(submits=submits),
            lease=self._lease(),
            ignore_due=ignore_due,
            timeout=self._deadline.cap(CLAIM_TIMEOUT),
        )
        order = [State.STORE, State.SUBMITTING, State.POLL]
        return sorted(claimed, key=lambda job: order.index(job.state))

    def _lease(self) -> float:
        """Seconds for which a result is ours: until this invocation must be dead, and a little more."""
        return max(0.0, self._deadline.left()) + LEASE_MARGIN

    def _start(self, job: Job, answer: Answer | None = None) -> None:
        self._crew.start(lambda: self._work(job, answer))

    def _work(self, job: Job, answer: Answer | None) -> Outcome:
        """One step in a thread of the crew; whatever goes wrong concerns this job alone."""
        try:
            match job.state:
                case State.SUBMITTING:
                    return self._submit(job)
                case State.POLL:
                    return self._poll(job)
                case _:
                    return self._store(job, answer)
        except TransientError as error:
            log.failed("no_answer", error, job_id=job.id)
            return Outcome(asked=True)
        except Exception:
            log.crashed("step_crashed", job_id=job.id)
            if job.state is State.STORE:
                return Outcome(
                    change=self._pipeline.steps.not_stored(
                        job, TransientError("internal_error", "Storing the result failed inside the service.")
                    )
                )
        return Outcome()

    def _submit(self, job: Job) -> Outcome:
        if self._deadline.left() < SUBMIT_BUDGET or self._saves_refused:
            return Outcome(change=jobs.return_unsent(job, now=self._pipeline.clock.now()))
        return Outcome(change=self._pipeline.steps.submit(job, self._deadline))

    def _poll(self, job: Job) -> Outcome:
        if self._deadline.left() < POLL_BUDGET:
            return Outcome()
        change, answer = self._pipeline.steps.poll(job, self._deadline, lease=self._lease())
        return Outcome(change=change, asked=True, answer=answer)

    def _store(self, job: Job, answer: Answer | None) -> Outcome:
        if self._deadline.left() < STORE_BUDGET:
            return Outcome()
        return Outcome(change=self._pipeline.steps.store(job, answer, self._deadline))

    def _collect(self) -> None:
        """Gather outcomes until all work is done; save when the last is in, or a second after the last save."""
        changes: list[Change] = []
        while self._crew.busy or changes:
            if self._crew.busy:
                changes += self._gather(SAVE_EVERY)
            if changes and (not self._crew.busy or self._pipeline.clock.monotonic() - self._saved_at >= SAVE_EVERY):
                self._save(changes)
                changes = []

    def _gather(self, timeout: float) -> list[Change]:
        changes = []
        for outcome in self._crew.wait(timeout):
            if not isinstance(outcome, Outcome):
                log.failed("step_ended", ServiceError("internal_error", f"A step ended with {outcome!r}."))
                continue
            self._report.checked += outcome.asked
            if outcome.change is not None:
                changes.append(outcome.change)
                self._keep_answer(outcome.change, outcome.answer)
        return changes

    def _keep_answer(self, change: Change, answer: Answer | None) -> None:
        kept = sum(answer.bytes for answer in self._answers.values())
        if change.event == "completed" and answer is not None and kept + answer.bytes <= KEPT_ANSWER_BYTES:
            self._answers[change.job.id] = answer

    def _save(self, changes: list[Change]) -> None:
        self._saved_at = self._pipeline.clock.monotonic()
        try:
            self._go_on(self._pipeline.saver.save(changes, self._deadline))
        except ServiceError as error:
            self._saves_refused = True  # no new paid run while its outcome could not be written down
            log.failed("save_refused", error)

    def _go_on(self, won: list[Change]) -> None:
        """Take the next step of what was won: whoever saved `completed` holds the lease and stores."""
        for change in won:
            job = change.job
            if change.accepted:
                self._report.submitted += 1
            if job.state in FINAL:
                self._report.updated.append(job)
            elif change.event == "completed":
                self._start(job, self._answers.pop(job.id, None))
