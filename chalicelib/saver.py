"""Changes on their way to the table: saved in groups, kept when D1 refuses, and never able to spoil each other."""

import threading
from dataclasses import replace
from random import Random

from chalicelib import jobs, log
from chalicelib.errors import PermanentError, ServiceError
from chalicelib.jobs import FINAL, Change, Job
from chalicelib.runpod import Runpod
from chalicelib.runtime import Clock, Deadline
from chalicelib.store import Store

SAVE_TIMEOUT = 8.0  # seconds
CANCEL_TIMEOUT = 4.0  # seconds
FAULTS_OF_A_ROW = ("d1_sql", "d1_request_too_large")


class Saver:
    """One for each process: what could not be saved stays here and goes first the next time."""

    def __init__(self, *, store: Store, runpod: Runpod, clock: Clock, rng: Random) -> None:
        self._store = store
        self._runpod = runpod
        self._clock = clock
        self._rng = rng
        self._unsaved: list[Change] = []
        self._lock = threading.Lock()

    @property
    def backlog(self) -> int:
        """How many changes wait to be saved."""
        return len(self._unsaved)

    def keep(self, changes: list[Change]) -> None:
        """Save these with the next flush."""
        with self._lock:
            self._unsaved += changes

    def flush(self, deadline: Deadline) -> list[Change]:
        """Save what was left over; costs nothing if there is none. Returns and raises as save() does."""
        with self._lock:
            changes, self._unsaved = self._unsaved, []
        return self._save(changes, deadline)

    def save(self, changes: list[Change], deadline: Deadline) -> list[Change]:
        """
        Save the changes, at most one a job, and return those that won, with their new versions.

        Raises ServiceError where D1 cannot take them now; then they are kept. One that D1 can never take ends its job.
        """
        try:
            first = self.flush(deadline)
        except ServiceError:
            self.keep(changes)
            raise
        return first + self._save(changes, deadline)

    def _save(self, changes: list[Change], deadline: Deadline) -> list[Change]:
        if not changes:
            return []
        nonce = f"{self._rng.getrandbits(128):032x}"
        try:
            versions = self._store.save(changes, nonce=nonce, now=self._clock.now(), timeout=deadline.cap(SAVE_TIMEOUT))
        except PermanentError as error:
            if error.code in FAULTS_OF_A_ROW:
                return self._save_apart(changes, error, deadline)
            self.keep(changes)
            raise
        except ServiceError:
            self.keep(changes)
            raise
        won = [
            replace(change, job=replace(change.job, version=versions[change.job.id]))
            for change in changes
            if change.job.id in versions
        ]
        for change in won:
            log.saved(change)
        self._stop_orphans(
            [change for change in changes if change.accepted and change.job.id not in versions], deadline
        )
        return won

    def _save_apart(self, changes: list[Change], error: PermanentError, deadline: Deadline) -> list[Change]:
        """Halve until the row that D1 refuses stands alone, and end that job."""
        if len(changes) > 1:
            middle = len(changes) // 2
            try:
                first = self._save(changes[:middle], deadline)
            except ServiceError:
                self.keep(changes[middle:])
                raise
            return first + self._save(changes[middle:], deadline)
        (change,) = changes
        log.failed("unsavable", error, job_id=change.job.id)
        if change.error and change.error.code == "unsavable":
            return []
        reason = PermanentError("unsavable", f"What happened to this job could not be written down: {error.sentence}")
        return self._save([jobs.fail(change.before, reason, now=self._clock.now())], deadline)

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
