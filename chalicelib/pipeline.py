"""
The pipeline: a request creates and sends a job, rounds carry every job on until it is final.

It runs four rounds a minute; two at once, here or in another process, do no harm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from uuid import UUID

from chalicelib import jobs, log, moves
from chalicelib.errors import IndeterminateError, PermanentError, RequestError, ServiceError, TransientError
from chalicelib.jobs import FINAL, Change, Job, State
from chalicelib.rounds import DoubtfulClaim, Report, Round
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.saver import Saver
from chalicelib.steps import Steps
from chalicelib.store import CALLS_KEPT_FROM_WEBHOOKS, Store, new_nonce
from chalicelib.webhooks import Webhooks

ROUNDS = 4  # a minute
ROUND_EVERY = 15.0  # seconds from start to start
ROUND_BUDGET = 10.0  # seconds that must be left for a round after the first
THREADS = 16  # that ask side by side

CREATE_TIMEOUT = 8.0  # seconds
VERB_TIMEOUT = 8.0  # seconds
GROUP_CHARS = 400_000  # of what dead letters carry that are saved together
CALLS_KEPT_FOR_ROUNDS = 100  # under this many D1 calls left, creating only queues: one call, not two


@dataclass(frozen=True, kw_only=True)
class Redrive:
    """Dead letters by what came of them: nothing is left of the `lost`, and of the `unknown` nobody says what is."""

    redriven: list[Job]
    lost: list[Job]
    unknown: list[Job]
    last: Job | None  # where the next ones begin, if there may be more


@dataclass(kw_only=True)
class Pipeline:
    """Everything that moves jobs; one for each process."""

    store: Store
    steps: Steps
    saver: Saver
    clock: Clock
    rng: Random
    webhooks: Webhooks
    new_crew: Callable[[int], Crew] = Crew
    doubtful: DoubtfulClaim = field(default_factory=DoubtfulClaim)

    def new_job(self, *, prompt: str, model: str, payload: dict[str, object] | None) -> Job:
        """A job with an id of its own, not yet in the table."""
        job_id = str(UUID(int=self.rng.getrandbits(128), version=4))
        now = self.clock.now()
        return jobs.new(
            job_id=job_id,
            prompt=prompt,
            model=model,
            payload=payload,
            deadline_at=self.store.deadline_at(now),
            now=now,
        )

    def create(self, job: Job, deadline: Deadline) -> None:
        """
        Insert the job and send it to RunPod at once: two D1 calls. If RunPod does not take it now, the rounds go on.

        Raises what D1 raises, and then nothing was sent.
        """
        sending = self._may_send(deadline)
        if sending:
            job = self.store.with_intent(job, now=self.clock.now())
        try:
            self.store.create(job, nonce=new_nonce(self.rng), timeout=deadline.cap(CREATE_TIMEOUT))
        except IndeterminateError:
            if sending:  # the row may be there with its intent written, and nobody will send it
                self.saver.keep([moves.return_unsent(job, now=self.clock.now())])
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
            job_id, nonce=new_nonce(self.rng), now=self.clock.now(), timeout=deadline.cap(CREATE_TIMEOUT)
        )
        if claimed is None:
            return named, None
        change = self._send(claimed, deadline)
        return change.job, change.error

    def cancel(self, job_id: str, deadline: Deadline) -> Job:
        """
        Cancel the job, or stop its run at RunPod; the job as it stands then, its run perhaps still about to be stopped.

        Raises RequestError where there is no such job, or nothing to cancel.
        """
        nonce, now = new_nonce(self.rng), self.clock.now()
        job = self.store.cancel(job_id, nonce=nonce, now=now, timeout=deadline.cap(VERB_TIMEOUT))
        if job is None:
            raise _unknown()
        if job.state is State.CANCELLED or (job.cancel_at and job.state is State.SUBMITTING):
            return job
        if job.state is not State.POLL:
            raise RequestError("job_not_cancellable", _why_not_cancelled(job))
        return self._look_at(job, deadline)

    def retry(self, job_id: str, deadline: Deadline) -> Job:
        """
        Have a job drawn once more that has ended without a picture. One more paid run.

        Raises RequestError where there is no such job, it is live, or it has its picture.
        """
        job = self._get(job_id, deadline)
        if job.state not in (State.ERROR, State.CANCELLED):
            raise RequestError("job_not_retryable", _why_not_retried(job))
        now = self.clock.now()
        return self._reopen(moves.retry_job(job, deadline_at=self.store.deadline_at(now), now=now), deadline)

    def redrive(self, job_id: str, deadline: Deadline) -> Job:
        """
        Have the result of a dead letter stored, from where it is left; no GPU is called.

        Raises RequestError where there is no such job, it is no dead letter, or nothing is left of its result.
        """
        job = self._get(job_id, deadline)
        if job.dead_at is None:
            raise RequestError(
                "not_dead", f"This job is {job.status}, and no dead letter; there is nothing to redrive."
            )
        if not self.steps.has_result(job, deadline):
            raise RequestError(
                "result_lost", "Nothing is left of this result: RunPod has forgotten it. A retry draws it again."
            )
        return self._reopen(moves.redrive(job, now=self.clock.now()), deadline)

    def redrive_many(
        self, deadline: Deadline, *, limit: int, after: tuple[str, str], error_code: str | None, dry_run: bool
    ) -> Redrive:
        """Redrive dead letters, newest first, those after the given (dead_at, id). Raises what D1 raises."""
        dead = self.store.dead_letters(
            limit=limit, after=after, error_code=error_code, timeout=deadline.cap(VERB_TIMEOUT)
        )
        left = self._ask_what_is_left(dead, deadline)
        redriven = [job for job in dead if left.get(job.id)]
        if not dry_run:
            redriven = self._redrive_all(redriven, deadline)
        return Redrive(
            redriven=redriven,
            lost=[job for job in dead if left.get(job.id) is False],
            unknown=[job for job in dead if job.id not in left],
            last=dead[-1] if len(dead) == limit else None,
        )

    def _ask_what_is_left(self, dead: list[Job], deadline: Deadline) -> dict[str, bool]:
        """Whether something is left of each; those of which nobody says are missing."""

        def ask(job: Job) -> tuple[str, bool]:
            return job.id, self.steps.has_result(job, deadline)

        answers: list[object] = []
        with self.new_crew(THREADS) as crew:
            for job in dead:
                crew.start(partial(ask, job))
            while crew.busy:
                answers += crew.wait(1.0)
        return dict(answer for answer in answers if isinstance(answer, tuple))

    def _redrive_all(self, dead: list[Job], deadline: Deadline) -> list[Job]:
        """Save in groups that D1 takes; those that nobody else has changed meanwhile."""
        now, won, group = self.clock.now(), set[str](), list[Change]()
        for job in dead:
            group.append(moves.redrive(job, now=now))
            if sum(len(change.job.outputs or "") + len(change.job.links or "") for change in group) > GROUP_CHARS:
                won |= self._save_by_user(group, deadline).keys()
                group = []
        if group:
            won |= self._save_by_user(group, deadline).keys()
        return [job for job in dead if job.id in won]

    def webhook(self, job_id: str, attempt: str, token: str, body: bytes, deadline: Deadline) -> str:
        """
        What RunPod says of a run's end is a hint to look now; in a word, what came of it.

        It also names the run whose answer to /run was lost. Raises RequestError where it is not genuine.
        """
        number, run_id = self.webhooks.read(job_id, attempt, token, body)
        calls_left = self._calls_left()
        if calls_left < CALLS_KEPT_FOR_ROUNDS:  # RunPod repeats what it has no 2xx for
            raise TransientError("webhook_later", "There are too few D1 calls left for this now; call again.")
        job = self._get(job_id, deadline)
        live = job.state in (State.SUBMIT, State.SUBMITTING, State.POLL)
        if job.attempt != number or job.attempt <= job.attempt_base or not live:
            return "nothing to do"
        if job.state is not State.POLL:
            return self._adopt(job, run_id, deadline)
        if job.runpod_job_id != run_id:
            return "nothing to do"
        if calls_left < CALLS_KEPT_FROM_WEBHOOKS:
            return "left to the next round"
        self._look_at(job, deadline)
        return "looked at"

    def _calls_left(self) -> float:
        calls_left = self.store.calls_left()
        return math.inf if calls_left is None else calls_left

    def _adopt(self, job: Job, run_id: str, deadline: Deadline) -> str:
        # Nobody but this callback knows the run's id; the rounds could only send the job again.
        change = self.steps.adopt(job, run_id, deadline)
        if change is None:
            return "nothing to do"
        saved = self.saver.save([change], deadline)
        if saved.error:
            raise saved.error
        won = next((one.job for one in saved.won if one.job.id == job.id), None)  # beside what was left over
        if won is None:
            return "nothing to do"
        if self._calls_left() >= CALLS_KEPT_FROM_WEBHOOKS:
            self._look_at(won, deadline)
        return "adopted"

    def _look_at(self, job: Job, deadline: Deadline) -> Job:
        """The next steps of one job now; the job as it is then."""
        report = self._new_round(1, deadline, lambda round_: round_.run_for([job]))
        return next((updated for updated in report.updated if updated.id == job.id), job)

    def _get(self, job_id: str, deadline: Deadline) -> Job:
        job = self.store.get(job_id, timeout=deadline.cap(VERB_TIMEOUT))
        if job is None:
            raise _unknown()
        return job

    def _reopen(self, change: Change, deadline: Deadline) -> Job:
        if self._save_by_user([change], deadline):
            return change.job
        # Somebody else did it first, or we did and the answer was lost: the row says what it is now.
        job = self._get(change.job.id, deadline)
        if job.state in FINAL:
            raise TransientError("job_changed", "The job has changed at the same moment; look at it and try again.")
        return job

    def _save_by_user(self, changes: list[Change], deadline: Deadline) -> dict[str, int]:
        # Not by the saver: what a caller was told has failed must not happen later all the same.
        return self.store.save(
            changes, nonce=new_nonce(self.rng), now=self.clock.now(), timeout=deadline.cap(VERB_TIMEOUT)
        )

    def _send(self, job: Job, deadline: Deadline) -> Change:
        change = self.steps.submit(job, deadline)
        saved = self.saver.save([change], deadline)
        if saved.error:  # kept for the next time; RunPod's answer is what the caller asked for
            log.failed("save_refused", saved.error, job_id=job.id)
        return change

    def _may_send(self, deadline: Deadline) -> bool:
        if self._calls_left() < CALLS_KEPT_FOR_ROUNDS:
            return False
        # While D1 does not take outcomes it must not be owed another one, for a paid run.
        return self.saver.flush(deadline).error is None

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
        """One pass over every due job. Raises ServiceError where the claim fails; what was won before is carried on."""
        return self._new_round(THREADS, deadline, lambda round_: round_.run(ignore_due=ignore_due))

    def _new_round(self, threads: int, deadline: Deadline, run: Callable[[Round], Report]) -> Report:
        start = self.clock.monotonic()
        with self.new_crew(threads) as crew:
            report = run(
                Round(
                    store=self.store,
                    steps=self.steps,
                    saver=self.saver,
                    clock=self.clock,
                    rng=self.rng,
                    crew=crew,
                    deadline=deadline,
                    doubtful=self.doubtful,
                )
            )
        seconds = self.clock.monotonic() - start
        log.round_over(checked=report.checked, submitted=report.submitted, updated=len(report.updated), seconds=seconds)
        return report


def _unknown() -> RequestError:
    return RequestError("job_not_found", "There is no job with this id.")


def _why_not_cancelled(job: Job) -> str:
    if job.state is State.STORE:
        return "The picture is drawn already and is being stored; there is nothing to cancel."
    return f"This job is {job.status} already; there is nothing to cancel."


def _why_not_retried(job: Job) -> str:
    if job.state is State.DONE:
        return "This job has its picture; create a new job for another one."
    return f"This job is {job.status} already; wait for its end, or cancel it first."
