"""Deleting jobs: first their files, then their rows, so that no file is left of which nobody knows."""

import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from random import Random

from chalicelib import log
from chalicelib.errors import PermanentError, RequestError, ServiceError, TransientError, job_changed, no_such_job
from chalicelib.jobs import FINAL, Job, result_folder
from chalicelib.r2 import R2
from chalicelib.records import dataclass
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.store import CALLS_KEPT_FROM_WEBHOOKS, Store, new_nonce

DELETE_TIMEOUT = 6.0  # seconds
RETIRED_AT_ONCE = 500  # jobs
RETIRED_TOGETHER = 50
RETIRE_BUDGET = 20.0  # seconds that must be left to begin with more
RETENTION = "retention"  # by whom they are removed, in their timelines
THREADS = 16  # that remove files side by side
OWN_FILE = re.compile(r"(\d+/)?output(-\d+)?\.\w+")  # within a job's folder; the id of another job may begin like it


@dataclass(kw_only=True)
class Removal:
    """Removes jobs; one for each process."""

    store: Store
    bucket: R2
    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew] = Crew

    def remove(
        self, ids: list[str], deadline: Deadline, *, statuses: tuple[str, ...], by: str, dead_too: bool = True
    ) -> dict[str, ServiceError | None]:
        """
        Delete these jobs, if they have one of the statuses and, unless these are meant too, are no dead letters: of
        each why it was not done, None where it is gone. Raises what D1 raises.

        A row is marked first and goes last. In between no other verb can touch it, and a repeat goes on with it.
        """
        rows, gone = self.store.mark_deleted(
            ids,
            statuses=statuses,
            dead_too=dead_too,
            by=by,
            nonce=new_nonce(self.rng),
            now=self.clock.now(),
            timeout=deadline.cap(DELETE_TIMEOUT),
        )
        found = {job.id: job for job in rows}
        came = {job_id: self._why_not(found.get(job_id), job_id in gone) for job_id in ids}
        came |= self._remove_files([job for job in rows if came[job.id] is None], deadline)
        emptied = [job.id for job in rows if came[job.id] is None]
        if emptied:
            self.store.delete(emptied, by=by, now=self.clock.now(), timeout=deadline.cap(DELETE_TIMEOUT))
        return came

    def retire(self, deadline: Deadline, *, days: int) -> int:
        """
        Remove the jobs that ended before so many days, oldest first, at most RETIRED_AT_ONCE, and fewer where the time
        is short; how many. Raises what D1 raises. A job that cannot be removed now is found again.
        """
        before = self.clock.now() - timedelta(days=days)
        removed, after = 0, ("", "")
        for _ in range(RETIRED_AT_ONCE // RETIRED_TOGETHER):
            if deadline.left() < RETIRE_BUDGET or self.store.has_few_calls(CALLS_KEPT_FROM_WEBHOOKS):
                break
            found = self.store.ended_before(
                before, after=after, limit=RETIRED_TOGETHER, timeout=deadline.cap(DELETE_TIMEOUT)
            )
            removed += self._retire([job_id for _, job_id in found], deadline)
            if len(found) < RETIRED_TOGETHER:
                break
            after = found[-1]  # those that could not be removed hold up no others
        return removed

    def _retire(self, ids: list[str], deadline: Deadline) -> int:
        """How many of these could be removed."""
        try:
            came = self.remove(ids, deadline, statuses=tuple(FINAL), by=RETENTION, dead_too=False) if ids else {}
        except PermanentError as error:
            log.failed("jobs_not_removed", error)
            return 0
        return sum(refusal is None for refusal in came.values())

    def _why_not(self, job: Job | None, gone: bool) -> ServiceError | None:
        if job is None:
            return None if gone else no_such_job()
        if job.state in FINAL and job.deleted_at is None:
            return job_changed()
        return why_not_deleted(job)

    def _remove_files(self, jobs: list[Job], deadline: Deadline) -> dict[str, ServiceError | None]:
        came: dict[str, ServiceError | None] = {job.id: _too_slow() for job in jobs}

        def remove(job: Job) -> None:
            try:
                self._remove_files_of(job, deadline.less(DELETE_TIMEOUT))
                came[job.id] = None
            except ServiceError as error:
                log.failed("files_not_removed", error, job_id=job.id)
                came[job.id] = error
            except Exception:
                log.crashed("removal_crashed", job_id=job.id)

        with self.new_crew(min(THREADS, len(jobs) or 1)) as crew:
            for job in jobs:
                crew.start(partial(remove, job))
            while crew.busy:
                crew.wait(1.0)
        return came

    def _remove_files_of(self, job: Job, deadline: Deadline) -> None:
        """Those that the row names, and those of its attempts that it does not name any more."""
        folder = result_folder(job)
        named = {file["key"] for file in job.files} | ({job.result_r2_key} if job.result_r2_key else set())
        there = {key for key in self.bucket.keys(folder, deadline=deadline) if OWN_FILE.fullmatch(key[len(folder) :])}
        for key in sorted(named | there):
            self.bucket.delete(key, deadline=deadline)


def why_not_deleted(job: Job) -> RequestError | None:
    """Why a job cannot be deleted, if it cannot."""
    if job.state in FINAL:
        return None
    return RequestError(
        "job_not_deletable", f"This job is {job.status}; cancel it first, or wait for its end, and then delete it."
    )


def _too_slow() -> TransientError:
    return TransientError("r2_too_slow", "The time was over before R2 had removed the files; try again.", service="r2")
