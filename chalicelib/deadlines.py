"""How long a job may take: until a worker has it, at the worker, and in all. RunPod is told too."""

import math
from datetime import UTC, datetime, timedelta

from chalicelib import jobs
from chalicelib.errors import PermanentError
from chalicelib.jobs import IN_QUEUE, Job
from chalicelib.models import Models
from chalicelib.records import dataclass

# RunPod deletes a run without a word when its `ttl` is over, which looks like a run that it has lost; ours come first.
TTL_MARGIN = 600  # seconds
MAX_POLICY_SECONDS = 7 * 86_400  # RunPod's bound on both times

NEVER = datetime(9998, 1, 1, tzinfo=UTC)

# RunPod may not do as it is told, or not answer at all; so long after the deadline a job ends all the same.
STOP_PATIENCE = timedelta(minutes=10)
SILENCE_PATIENCE = jobs.RUNPOD_KEEPS  # by then it has forgotten any result


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """
    Seconds that a run may wait for a worker, and that a worker may take, where its model has none of its own; a job in
    all has its own instant.
    """

    start: int
    run: int
    models: Models

    def of_start(self, job: Job) -> int:
        """Seconds that a run of this job may wait for a worker."""
        return self.models.get(job.model).start or self.start

    def of_run(self, job: Job) -> int:
        """Seconds that a worker may take for it."""
        return self.models.get(job.model).run or self.run

    def policy(self, job: Job) -> dict[str, int]:
        """What RunPod is told with its run, in milliseconds."""
        ttl = min(self.of_start(job) + self.of_run(job) + TTL_MARGIN, MAX_POLICY_SECONDS)
        return {"executionTimeout": self.of_run(job) * 1000, "ttl": ttl * 1000}

    def overrun(self, job: Job, runpod_status: str, now: datetime) -> PermanentError | None:
        """Which deadline an unfinished run is over, as the error that the job ends with."""
        if overdue(job, now):
            return too_late()
        start = self.of_start(job)
        if runpod_status == IN_QUEUE and job.started_at is None and _end(job.submitted_at, start) < now:
            return PermanentError(
                "start_deadline",
                f"No worker took the run within {_words(start)}, so it was cancelled; check the endpoint.",
            )
        if _end(job.started_at, self.of_run(job)) < now:
            return took_too_long(self.of_run(job))
        return None

    def is_out_of_patience(self, job: Job, now: datetime) -> bool:
        """Whether RunPod has been told to stop for so long that the job ends without its consent."""
        ends = [
            _end(job.cancel_at),
            _end(job.deadline_at),
            _end(job.started_at, self.of_run(job)),
            _end(None if job.started_at else job.submitted_at, self.of_start(job)),
        ]
        return min(ends) + STOP_PATIENCE < now


def seconds_left(job: Job, now: datetime) -> int:
    """How long the job may still take in all, rounded up."""
    return math.ceil((_end(job.deadline_at) - now).total_seconds())


def overdue(job: Job, now: datetime) -> bool:
    """Whether the job's time in all is over."""
    return _end(job.deadline_at) < now


def is_past_hope(job: Job, now: datetime) -> bool:
    """Whether its time was over so long ago that nothing can be had of RunPod any more."""
    return _end(job.deadline_at) + SILENCE_PATIENCE < now


def too_late() -> PermanentError:
    """The error of a job whose time in all is over."""
    return PermanentError("total_deadline", "The job was not drawn in the time it had in all, so it was given up.")


def took_too_long(seconds: int) -> PermanentError:
    """The error of a run that a worker did not finish in time."""
    return PermanentError(
        "run_deadline", f"The worker did not finish within {_words(seconds)}, so the run was cancelled."
    )


def _end(text: str | None, seconds: int = 0) -> datetime:
    """So long after that moment; never, where there is none."""
    return jobs.from_text(text) + timedelta(seconds=seconds) if text else NEVER


def _words(seconds: int) -> str:
    return f"{seconds // 60} minutes" if seconds % 60 == 0 else f"{seconds} seconds"
