"""Changes on their way to the table: saved in groups, kept when D1 refuses, and never able to spoil each other."""

import threading
from dataclasses import dataclass, replace
from random import Random

from chalicelib import jobs, log
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError
from chalicelib.jobs import FINAL, Change, Job
from chalicelib.runpod import Runpod
from chalicelib.runtime import Clock, Deadline
from chalicelib.store import Store, new_nonce

SAVE_TIMEOUT = 8.0  # seconds
CANCEL_TIMEOUT = 4.0  # seconds
FAULTS_OF_A_ROW = ("d1_sql", "d1_request_too_large")


@dataclass(frozen=True)
class Batch:
    """Changes that are saved together, under one nonce for all tries."""

    nonce: str
    changes: list[Change]


class Saver:
    """One for each process: what could not be saved stays here and goes first the next time."""

    def __init__(self, *, store: Store, runpod: Runpod, clock: Clock, rng: Random) -> None:
        self._store = store
        self._runpod = runpod
        self._clock = clock
        self._rng = rng
        self._unsaved: list[Change] = []
        self._unknown: list[Batch] = []
        self._lock = threading.Lock()

    @property
    def backlog(self) -> int:
        """How many changes wait to be saved."""
        return len(self._unsaved) + sum(len(batch.changes) for batch in self._unknown)

    def keep(self, changes: list[Change]) -> None:
        """Save these with the next flush."""
        with self._lock:
            self._unsaved += changes

    def flush(self, deadline: Deadline) -> list[Change]:
        """Save what was left over; costs nothing if there is none. Returns and raises as save() does."""
        with self._lock:
            batches, self._unknown = self._unknown, []
            batches += self._batch(self._unsaved)
            self._unsaved = []
        return self._save_all(batches, deadline)

    def save(self, changes: list[Change], deadline: Deadline) -> list[Change]:
        """
        Save the changes, at most one a job, and return those that won, with their new versions.

        Raises ServiceError where D1 cannot take them now; then they are kept. One that D1 can never take ends its job.
        """
        self.keep(changes)
        return self.flush(deadline)

    def _batch(self, changes: list[Change]) -> list[Batch]:
        return [Batch(new_nonce(self._rng), changes)] if changes else []

    def _save_all(self, batches: list[Batch], deadline: Deadline) -> list[Change]:
        won: list[Change] = []
        for number, batch in enumerate(batches):
            try:
                won += self._save(batch, deadline)
            except ServiceError:
                self._keep_batches(batches[number + 1 :])
                raise
        return won

    def _keep_batches(self, batches: list[Batch]) -> None:
        with self._lock:
            self._unknown += batches

    def _save(self, batch: Batch, deadline: Deadline) -> list[Change]:
        try:
            versions = self._store.save(
                batch.changes, nonce=batch.nonce, now=self._clock.now(), timeout=deadline.cap(SAVE_TIMEOUT)
            )
        except PermanentError as error:
            if error.code in FAULTS_OF_A_ROW:
                return self._save_apart(batch.changes, error, deadline)
            self.keep(batch.changes)
            raise
        except IndeterminateError:
            # It may be in the table under this nonce; under another one it would look like a lost race.
            self._keep_batches([batch])
            raise
        except ServiceError:
            self.keep(batch.changes)
            raise
        return self._settle(batch.changes, versions, deadline)

    def _settle(self, changes: list[Change], versions: dict[str, int], deadline: Deadline) -> list[Change]:
        """The winners; a paid run that lost is looked after."""
        won = [
            replace(change, job=replace(change.job, version=versions[change.job.id]))
            for change in changes
            if change.job.id in versions
        ]
        for change in won:
            log.saved(change)
        lost = [change for change in changes if change.job.id not in versions]
        self._stop_orphans([change for change in lost if change.accepted], deadline)
        return won

    def _save_apart(self, changes: list[Change], error: PermanentError, deadline: Deadline) -> list[Change]:
        """Halve until the row that D1 refuses stands alone, and end that job."""
        if len(changes) > 1:
            middle = len(changes) // 2
            return self._save_all([*self._batch(changes[:middle]), *self._batch(changes[middle:])], deadline)
        (change,) = changes
        log.failed("unsavable", error, job_id=change.job.id)
        if change.error and change.error.code == "unsavable":
            return []
        reason = PermanentError("unsavable", f"What happened to this job could not be written down: {error.sentence}")
        return self._save_all(self._batch([jobs.fail(change.before, reason, now=self._clock.now())]), deadline)

    def _stop_orphans(self, lost: list[Change], deadline: Deadline) -> None:
        """
        Cancel runs that RunPod accepted but no row will ever name.

        A lost save alone proves nothing: the row may hold this very run by a save whose answer went astray. While it
        holds none and is still live, the run may yet be recorded, so it is tried again with the next flush.
        """
        if not lost:
            return
        try:
            rows = self._store.recorded_runs([change.job.id for change in lost], timeout=deadline.cap(SAVE_TIMEOUT))
        except ServiceError as error:
            log.failed("orphans_unread", error)
            self.keep(lost)
            return
        for change in lost:
            row = rows.get(change.job.id)
            if row is None or _is_superseded(row, change.job):
                self._cancel(change.job, deadline)
            elif row.runpod_job_id is None:
                self.keep([change])

    def _cancel(self, job: Job, deadline: Deadline) -> None:
        try:
            self._runpod.cancel(job.endpoint_id or "", job.runpod_job_id or "", timeout=deadline.cap(CANCEL_TIMEOUT))
        except ServiceError as error:
            log.failed("orphan_not_cancelled", error, job_id=job.id)


def _is_superseded(row: Job, ours: Job) -> bool:
    if row.runpod_job_id == ours.runpod_job_id:
        return False
    return row.runpod_job_id is not None or row.status in FINAL
