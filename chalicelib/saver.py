"""Changes on their way to the table: saved in groups, kept when D1 refuses, and never able to spoil each other."""

import threading
from dataclasses import field, replace
from datetime import datetime
from random import Random

from chalicelib import jobs, log, moves
from chalicelib.errors import PermanentError, ServiceError, TransientError
from chalicelib.jobs import FINAL, Change, Job
from chalicelib.records import dataclass
from chalicelib.runpod import Runpod
from chalicelib.runtime import Clock, Deadline
from chalicelib.store import Store, new_nonce

SAVE_TIMEOUT = 8.0  # seconds
CANCEL_TIMEOUT = 4.0  # seconds
ORPHANS_EVERY = 60.0  # seconds between two looks at the same runs without a row
FAULTS_OF_A_ROW = ("d1_row", "d1_request_too_large")


@dataclass(frozen=True)
class Batch:
    """Changes that are saved together, under one nonce for all tries; at most one change a job."""

    nonce: str
    changes: list[Change]


@dataclass(kw_only=True)
class Saved:
    """What came of a save: the changes that won, with their new versions, and what kept the others from the table."""

    won: list[Change] = field(default_factory=list)
    error: ServiceError | None = None


class Saver:
    """One for each process: what could not be saved stays here and goes first the next time."""

    def __init__(self, *, store: Store, runpod: Runpod, clock: Clock, rng: Random) -> None:
        self._store = store
        self._runpod = runpod
        self._clock = clock
        self._rng = rng
        self._unsaved: list[Change] = []
        self._unknown: list[Batch] = []
        self._orphans: list[Change] = []
        self._orphans_due = 0.0
        self._lock = threading.Lock()

    @property
    def backlog(self) -> int:
        """How many changes wait to be saved."""
        return len(self._unsaved) + sum(len(batch.changes) for batch in self._unknown)

    def keep(self, changes: list[Change]) -> None:
        """Save these with the next flush."""
        with self._lock:
            self._unsaved += changes

    def flush(self, deadline: Deadline) -> Saved:
        """Save what was left over; costs nothing if there is none."""
        return self._save_all(self._left_over(), deadline)

    def save(self, changes: list[Change], deadline: Deadline) -> Saved:
        """
        Save what was left over, then the changes.

        With an error in the answer D1 could not take all of them now, and the rest is kept. A change that D1 can never
        take ends its job.
        """
        return self._save_all([*self._left_over(), *self._batches(changes)], deadline)

    def _left_over(self) -> list[Batch]:
        with self._lock:
            unknown, self._unknown = self._unknown, []
            unsaved, self._unsaved = self._unsaved, []
        return [*unknown, *self._batches([self._without_lease(change) for change in unsaved])]

    def _without_lease(self, change: Change) -> Change:
        """A change as it is saved late: the lease that came with it is running out, so whoever claims next stores."""
        if change.event != "completed":
            return change
        return replace(change, job=replace(change.job, due_at=jobs.to_text(self._clock.now())))

    def _save_all(self, batches: list[Batch], deadline: Deadline) -> Saved:
        saved = Saved()
        while batches:
            batch = batches.pop(0)
            try:
                batches[:0] = self._save(batch, saved, deadline)
            except ServiceError as error:
                saved.error = error
                self._keep_batches(batches)
                return saved
            except Exception:
                self._keep_batches(batches)
                raise
        self._look_for_orphans(deadline)
        return saved

    def _batches(self, changes: list[Change]) -> list[Batch]:
        """Groups in which no job stands twice: the first save of a job decides about the second."""
        groups: list[dict[str, Change]] = []
        for change in changes:
            free = next((group for group in groups if change.job.id not in group), None)
            if free is None:
                groups.append(free := {})
            free[change.job.id] = change
        return [Batch(new_nonce(self._rng), list(group.values())) for group in groups]

    def _keep_batches(self, batches: list[Batch]) -> None:
        with self._lock:
            self._unknown += batches

    def _keep_orphans(self, orphans: list[Change]) -> None:
        with self._lock:
            self._orphans += orphans

    def _save(self, batch: Batch, saved: Saved, deadline: Deadline) -> list[Batch]:
        """Save one batch; the batches that are to be tried in its place, if a row of it is at fault."""
        now = self._clock.now()
        try:
            versions = self._store.save(batch.changes, nonce=batch.nonce, now=now, timeout=deadline.cap(SAVE_TIMEOUT))
        except Exception as error:
            if isinstance(error, PermanentError) and error.code in FAULTS_OF_A_ROW:
                return self._without_fault(batch.changes, error, deadline)
            if isinstance(error, (TransientError, PermanentError)):
                self.keep(batch.changes)
            else:
                # It may be in the table under this nonce; under another one that would look like a lost race.
                self._keep_batches([batch])
            raise
        self._settle(batch.changes, versions, saved, now)
        return []

    def _settle(self, changes: list[Change], versions: dict[str, int], saved: Saved, now: datetime) -> None:
        for change in changes:
            if change.job.id in versions:
                version, updated_at = versions[change.job.id], jobs.to_text(now)
                won = replace(change, job=replace(change.job, version=version, updated_at=updated_at))
                saved.won.append(won)
                log.saved(won, now)
            elif change.accepted:
                self._keep_orphans([change])
                self._orphans_due = self._clock.monotonic()

    def _without_fault(self, changes: list[Change], error: PermanentError, deadline: Deadline) -> list[Batch]:
        """Halve until the row that D1 refuses stands alone, and end that job."""
        if len(changes) > 1:
            middle = len(changes) // 2
            return [*self._batches(changes[:middle]), *self._batches(changes[middle:])]
        (change,) = changes
        log.failed("unsavable", error, job_id=change.job.id)
        if change.error is not None and change.error.code == "unsavable":
            return []
        if change.accepted:
            self._cancel(change, deadline)
        reason = PermanentError("unsavable", f"What happened to this job could not be written down: {error.sentence}")
        return self._batches([moves.fail(change.before, reason, now=self._clock.now())])

    def _look_for_orphans(self, deadline: Deadline) -> None:
        """
        Cancel runs that RunPod accepted but no row will ever name.

        A lost save alone proves nothing: the row may hold this very run by a save whose answer went astray. While it
        holds none and is still live, the run may yet be recorded, so it is saved and looked at again later.
        """
        if not self._orphans or self._clock.monotonic() < self._orphans_due:
            return
        with self._lock:
            orphans, self._orphans = self._orphans, []
        self._orphans_due = self._clock.monotonic() + ORPHANS_EVERY
        try:
            rows = self._store.recorded_runs([change.job.id for change in orphans], timeout=deadline.cap(SAVE_TIMEOUT))
        except ServiceError as error:
            log.failed("orphans_unread", error)
            self._keep_orphans(orphans)
            return
        for change in orphans:
            row = rows.get(change.job.id)
            if row is None or _is_superseded(row, change.job):
                self._cancel(change, deadline)
            elif not row.runpod_job_id:
                self.keep([change])

    def _cancel(self, change: Change, deadline: Deadline) -> None:
        job = change.job
        try:
            self._runpod.cancel(job.endpoint_id or "", job.runpod_job_id or "", timeout=deadline.cap(CANCEL_TIMEOUT))
        except ServiceError as error:
            log.failed("orphan_not_cancelled", error, job_id=job.id)
            self._keep_orphans([change])


def _is_superseded(row: Job, ours: Job) -> bool:
    if row.runpod_job_id == ours.runpod_job_id:
        return False
    return bool(row.runpod_job_id) or row.status in FINAL
