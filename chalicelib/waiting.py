"""Holding an answer back until a job has ended."""

from chalicelib.d1 import Row
from chalicelib.errors import ServiceError
from chalicelib.jobs import FINAL, Job
from chalicelib.reads import Reads
from chalicelib.records import dataclass
from chalicelib.runtime import Clock, Deadline
from chalicelib.store import CALLS_KEPT_FROM_WEBHOOKS, Store

REQUEST_SECONDS = 25.0  # within which the answer is there, whatever D1 does
MOST_SECONDS = 24  # that a caller is kept waiting
READ_SECONDS = 10.0
FIRST_LOOK = 2.0  # seconds; most waits begin when a job is new
LOOK_EVERY = 4.0  # seconds; each waits in a Lambda of its own, and together they share four D1 calls a second

Found = tuple[Job | None, list[Row]]


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Waits by looking now and then, while there are D1 calls to spare."""

    reads: Reads
    store: Store
    clock: Clock

    def until_final(self, job_id: str, seconds: int) -> Found:
        """The job and its timeline when it has ended, or as they are after so many seconds; raises what D1 raises."""
        request = Deadline(self.clock, REQUEST_SECONDS)
        patience = Deadline(self.clock, min(seconds, MOST_SECONDS))
        found = self.reads.job_with_timeline_now(job_id, timeout=READ_SECONDS)
        pause = FIRST_LOOK
        while self._may_go_on(found[0], patience):
            self.clock.sleep(min(pause, patience.left()))
            pause = LOOK_EVERY
            try:
                found = self.reads.job_with_timeline_now(job_id, timeout=request.cap(READ_SECONDS))
            except ServiceError:
                return found  # what is a moment old is better than an error
        return found

    def _may_go_on(self, job: Job | None, patience: Deadline) -> bool:
        calls_left = self.store.calls_left()
        spare = calls_left is None or calls_left > CALLS_KEPT_FROM_WEBHOOKS
        return job is not None and job.state not in FINAL and patience.left() > 0 and spare
