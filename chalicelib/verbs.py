"""What users do to jobs that are there: cancel, retry, redrive."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from chalicelib import moves
from chalicelib.errors import RequestError, TransientError
from chalicelib.jobs import FINAL, Change, Job, State
from chalicelib.pipeline import THREADS, VERB_TIMEOUT, Pipeline
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.steps import Steps
from chalicelib.store import Store, new_nonce

GROUP_CHARS = 400_000  # of what dead letters carry that are saved together


@dataclass(frozen=True, kw_only=True)
class Redrive:
    """Dead letters by what came of them: nothing is left of the `lost`, and of the `unknown` nobody says what is."""

    redriven: list[Job]
    lost: list[Job]
    unknown: list[Job]
    last: Job | None  # where the next ones begin, if there may be more


@dataclass(kw_only=True)
class Verbs:
    """Each may be said again, and does nothing more then."""

    store: Store
    steps: Steps
    pipeline: Pipeline
    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew] = Crew

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
        return self.pipeline.look_at(job, deadline)

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
