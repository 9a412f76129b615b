"""What users do to jobs that are there: cancel, retry, redrive and delete, one or many."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from functools import partial
from random import Random

from chalicelib import log, moves
from chalicelib.errors import RequestError, ServiceError, TransientError, job_changed, no_such_job
from chalicelib.jobs import FINAL, Change, Job, State, Status
from chalicelib.pipeline import THREADS, VERB_TIMEOUT, Pipeline
from chalicelib.reads import Cursor, Filter, Reads
from chalicelib.records import dataclass
from chalicelib.removal import Removal, why_not_deleted
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.steps import Steps
from chalicelib.store import Store, new_nonce

GROUP_CHARS = 400_000  # of what dead letters carry that are saved together

# Which jobs each verb is for.
MEANT_FOR = {
    "cancel": (Status.QUEUED, Status.RUNNING),
    "retry": (Status.ERROR, Status.CANCELLED),
    "redrive": (Status.ERROR,),
    "delete": (Status.DONE, Status.ERROR, Status.CANCELLED),
}


@dataclass(frozen=True, kw_only=True)
class Came:
    """What came of a verb for many: the jobs it was done to, and why it was not done to the others."""

    done: list[str] = field(default_factory=list)
    refused: dict[str, ServiceError] = field(default_factory=dict)


@dataclass(kw_only=True)
class Verbs:
    """Each may be said again, and does nothing more then. Raises what D1 raises; `by` is who wants it."""

    store: Store
    reads: Reads
    steps: Steps
    removal: Removal
    pipeline: Pipeline
    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew] = Crew

    def cancel(self, job_id: str, deadline: Deadline, *, by: str) -> Job:
        """
        Cancel the job, or stop its run at RunPod; the job as it stands then, its run perhaps still about to be stopped.

        Raises RequestError where there is no such job, or nothing to cancel.
        """
        job = self._ask_to_cancel([job_id], deadline, by=by).get(job_id)
        if job is None:
            raise no_such_job()
        if refusal := _why_not_cancelled(job):
            raise refusal
        return self.pipeline.look_at(job, deadline) if job.state is State.POLL else job

    def _ask_to_cancel(self, ids: list[str], deadline: Deadline, *, by: str) -> dict[str, Job]:
        nonce, now = new_nonce(self.rng), self.clock.now()
        rows = self.store.cancel(ids, by=by, nonce=nonce, now=now, timeout=deadline.cap(VERB_TIMEOUT))
        return {job.id: job for job in rows}

    def retry(self, job_id: str, deadline: Deadline, *, by: str) -> Job:
        """
        Have a job drawn once more that has ended without a picture. One more paid run.

        Raises RequestError where there is no such job, it is live, or it has its picture.
        """
        job = self._get(job_id, deadline)
        if job.state not in FINAL and self._was_retried(job_id, deadline):
            return job
        if refusal := _why_not_retried(job):
            raise refusal
        return self._reopen(self._retried(job, by=by), deadline)

    def _was_retried(self, job_id: str, deadline: Deadline) -> bool:
        _, timeline = self.reads.job_with_timeline_now(job_id, timeout=deadline.cap(VERB_TIMEOUT))
        return any(line["event"] == "retried" for line in timeline)

    def _retried(self, job: Job, *, by: str) -> Change:
        now = self.clock.now()
        deadline_at = self.store.deadline_at(now, model=job.model, deadline=job.deadline)
        return moves.retry_job(job, by=by, deadline_at=deadline_at, now=now)

    def redrive(self, job_id: str, deadline: Deadline, *, by: str) -> Job:
        """
        Have the result of a dead letter stored, from where it is left; no GPU is called.

        Raises RequestError where there is no such job, it is no dead letter, or nothing is left of its result.
        """
        job = self._get(job_id, deadline)
        if job.state is State.STORE:  # redriven already
            return job
        if refusal := _why_not_redriven(job):
            raise refusal
        if not self.steps.has_result(job, deadline):
            raise _lost()
        return self._reopen(moves.redrive(job, by=by, now=self.clock.now()), deadline)

    def delete(self, job_id: str, deadline: Deadline, *, by: str) -> None:
        """
        Remove the job's files and then its row; where that breaks off, the job is marked, and a repeat goes on.

        Raises RequestError where there is no such job, or it is live.
        """
        came = self.removal.remove([job_id], deadline, statuses=MEANT_FOR["delete"], by=by)
        for refusal in came.values():
            if refusal is not None:
                raise refusal

    def find(self, do: str, wanted: Filter, deadline: Deadline, *, limit: int, after: Cursor) -> list[Cursor]:
        """The (created_at, id) of the newest jobs of the filter that the verb is for."""
        statuses = tuple(status for status in MEANT_FOR[do] if status in wanted.statuses)
        if not statuses:
            raise RequestError("filter_invalid", f"{do} is only for jobs that are {' or '.join(MEANT_FOR[do])}.")
        meant = replace(wanted, statuses=statuses, dead_only=do == "redrive")
        return self.reads.find(meant, limit=limit, after=after, timeout=deadline.cap(VERB_TIMEOUT))

    def do_to_all(self, do: str, ids: list[str], wanted: Filter, deadline: Deadline, *, dry_run: bool, by: str) -> Came:
        """Do it to each of the jobs that it can be done to; with `dry_run` only say to which."""
        if not ids:
            return Came()
        if do == "delete" and not dry_run:
            return _came(self.removal.remove(ids, deadline, statuses=wanted.statuses, by=by))
        if do == "cancel" and not dry_run:
            return self._sort_out(do, ids, self._ask_to_cancel(ids, deadline, by=by), deadline)
        found = {job.id: job for job in self.reads.several(ids, timeout=deadline.cap(VERB_TIMEOUT))}
        came = self._sort_out(do, ids, found, deadline)
        return came if dry_run else self._reopen_all(do, found, came, deadline, by=by)

    def _sort_out(self, do: str, ids: list[str], found: dict[str, Job], deadline: Deadline) -> Came:
        """Which jobs it can be done to."""
        why_not = {
            "cancel": _why_not_cancelled,
            "retry": _why_not_retried_with_many,
            "redrive": _why_not_redriven,
            "delete": why_not_deleted,
        }[do]
        refusals: dict[str, ServiceError | None] = {
            job_id: why_not(found[job_id]) if job_id in found else no_such_job() for job_id in ids
        }
        if do == "redrive":
            dead = [found[job_id] for job_id in ids if refusals[job_id] is None]
            refusals |= {job.id: _unanswered() for job in dead} | self._ask_what_is_left(dead, deadline)
        return _came(refusals)

    def _reopen_all(self, do: str, found: dict[str, Job], came: Came, deadline: Deadline, *, by: str) -> Came:
        """Save what can be; those that somebody else has changed meanwhile are refused, too."""
        now, meant = self.clock.now(), [found[job_id] for job_id in came.done]
        if do == "retry":
            changes = [self._retried(job, by=by) for job in meant]
        else:
            changes = [moves.redrive(job, by=by, now=now) for job in meant]
        return _came({**came.refused, **self._save_all(changes, deadline)})

    def redrive_all(
        self, deadline: Deadline, *, limit: int, after: Cursor, error_code: str | None, dry_run: bool, by: str
    ) -> tuple[Came, Job | None]:
        """Redrive dead letters, newest first, those after the given (dead_at, id); second the last of them."""
        dead = self.reads.dead_letters(
            limit=limit, after=after, error_code=error_code, timeout=deadline.cap(VERB_TIMEOUT)
        )
        found = {job.id: job for job in dead}
        came = self._sort_out("redrive", list(found), found, deadline)
        if not dry_run:
            came = self._reopen_all("redrive", found, came, deadline, by=by)
        return came, dead[-1] if len(dead) == limit else None

    def _ask_what_is_left(self, dead: list[Job], deadline: Deadline) -> dict[str, ServiceError | None]:
        """Why each cannot be redriven, None where something is left of it; those of which nobody says are missing."""

        def ask(job: Job) -> tuple[str, ServiceError | None]:
            return job.id, None if self.steps.has_result(job, deadline) else _lost()

        answers: list[object] = []
        with self.new_crew(THREADS) as crew:
            for job in dead:
                crew.start(partial(ask, job))
            while crew.busy:
                answers += crew.wait(1.0)
        return dict(answer for answer in answers if isinstance(answer, tuple))

    def _save_all(self, changes: Iterable[Change], deadline: Deadline) -> dict[str, ServiceError | None]:
        """Save in groups that D1 takes; of each job why not, None where it was saved."""
        came: dict[str, ServiceError | None] = {}
        group: list[Change] = []
        for change in changes:
            group.append(change)
            if sum(len(one.job.outputs or "") + len(one.job.links or "") for one in group) > GROUP_CHARS:
                came |= self._save_group(group, deadline)
                group = []
        return came | self._save_group(group, deadline)

    def _save_group(self, group: list[Change], deadline: Deadline) -> dict[str, ServiceError | None]:
        if not group:
            return {}
        try:
            won = self._save_by_user(group, deadline)
        except ServiceError as error:
            if error.code == "d1_request_too_large" and len(group) > 1:
                half = len(group) // 2
                return self._save_group(group[:half], deadline) | self._save_group(group[half:], deadline)
            # Told job by job, so that nobody repeats it for others.
            return dict.fromkeys((change.job.id for change in group), error)
        return {change.job.id: None if change.job.id in won else job_changed() for change in group}

    def _get(self, job_id: str, deadline: Deadline) -> Job:
        job = self.store.get(job_id, timeout=deadline.cap(VERB_TIMEOUT))
        if job is None:
            raise no_such_job()
        return job

    def _reopen(self, change: Change, deadline: Deadline) -> Job:
        if self._save_by_user([change], deadline):
            return change.job
        # Somebody else did it first, or we did and the answer was lost: the row says what it is now.
        job = self._get(change.job.id, deadline)
        if job.state in FINAL:
            raise job_changed()
        return job

    def _save_by_user(self, changes: list[Change], deadline: Deadline) -> dict[str, int]:
        # Not by the saver: what a caller was told has failed must not happen later all the same.
        now = self.clock.now()
        won = self.store.save(changes, nonce=new_nonce(self.rng), now=now, timeout=deadline.cap(VERB_TIMEOUT))
        for change in changes:
            if change.job.id in won:
                log.saved(change, now)
        return won


def _came(refusals: Mapping[str, ServiceError | None]) -> Came:
    return Came(
        done=[job_id for job_id, refusal in refusals.items() if refusal is None],
        refused={job_id: refusal for job_id, refusal in refusals.items() if refusal is not None},
    )


def _lost() -> RequestError:
    return RequestError(
        "result_lost", "Nothing is left of this result: RunPod has forgotten it. A retry draws it again."
    )


def _unanswered() -> TransientError:
    return TransientError("runpod_unreachable", "RunPod gives no answer about this result just now; try again.")


def _why_not_cancelled(job: Job) -> RequestError | None:
    if job.state in (State.SUBMIT, State.SUBMITTING, State.POLL, State.CANCELLED):
        return None
    if job.state is State.STORE:
        return RequestError(
            "job_not_cancellable", "The picture is drawn already and is being stored; there is nothing to cancel."
        )
    return RequestError("job_not_cancellable", f"This job is {job.status} already; there is nothing to cancel.")


def _why_not_retried(job: Job) -> RequestError | None:
    if job.deleted_at:
        return RequestError("job_not_retryable", "This job is being deleted.")
    if job.state is State.DONE:
        return RequestError("job_not_retryable", "This job has its picture; create a new job for another one.")
    if job.state in FINAL:
        return None
    return RequestError("job_not_retryable", f"This job is {job.status} already; wait for its end, or cancel it first.")


def _why_not_retried_with_many(job: Job) -> RequestError | None:
    if job.dead_at:  # its picture is paid for already
        return RequestError("job_not_retryable", "This is a dead letter: redrive it, or retry it alone.")
    return _why_not_retried(job)


def _why_not_redriven(job: Job) -> RequestError | None:
    if job.deleted_at:
        return RequestError("not_dead", "This job is being deleted.")
    if job.dead_at is None:
        return RequestError("not_dead", f"This job is {job.status}, and no dead letter; there is nothing to redrive.")
    return None
