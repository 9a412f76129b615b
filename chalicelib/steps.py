"""One job's next step: ask a cloud, return the change to save, or None where there is nothing new. Steps never save."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any

from chalicelib import jobs, outputs, results
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.jobs import Change, Job
from chalicelib.results import Results
from chalicelib.runpod import Answer, Runpod, Verdict
from chalicelib.runtime import Clock, Deadline

RUN_TIMEOUT = 10.0  # seconds for /run
STATUS_TIMEOUT = 8.0  # seconds for /status, whose answer may carry 20 MB
SAVE_RESERVE = 2.0  # seconds of every deadline kept for the save
STORE_RESERVE = SAVE_RESERVE + results.PUT_RESERVE  # what must be left when a put begins

NOT_INDEXED_YET = timedelta(seconds=150)  # RunPod may not find a run that is younger than this
LAST_TRY = timedelta(minutes=27, seconds=30)  # RunPod forgets after 30 minutes; one more wait may take two of them


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The three steps and the clouds they ask."""

    runpod: Runpod
    results: Results
    clock: Clock
    rng: Random
    default_endpoint_id: str
    max_attempts: int

    def submit(self, job: Job, deadline: Deadline) -> Change:
        """Begin the paid run whose intent is on disk; called at most once for each claim."""
        timeout = deadline.cap(RUN_TIMEOUT, reserve=SAVE_RESERVE)
        try:
            run_id, status = self.runpod.run(self._endpoint(job), job.payload, timeout=timeout)
        except TransientError as error:
            return jobs.give_back(job, error, now=self.clock.now(), rng=self.rng)
        except IndeterminateError as error:
            return jobs.doubt(job, error, now=self.clock.now())
        except PermanentError as error:
            return jobs.fail(job, error, now=self.clock.now())
        return jobs.accept(job, runpod_job_id=run_id, runpod_status=status, now=self.clock.now())

    def poll(self, job: Job, deadline: Deadline, *, lease: float) -> tuple[Change | None, Answer]:
        """
        Ask RunPod for the run; what it answered comes too, so that the picture in it need not be asked for again.

        Raises TransientError where there was no answer: a paid run is not given up for that.
        """
        answer = self._ask(job, deadline, reserve=SAVE_RESERVE)
        return self._judge(job, answer, lease), answer

    def store(self, job: Job, answer: Answer | None, deadline: Deadline) -> Change:
        """Put the finished result into R2; without the answer of the poll RunPod is asked again."""
        try:
            answer = answer or self._ask_for_result(job, deadline)
        except ServiceError as error:
            return self.not_stored(job, error)
        try:
            found = outputs.read(answer.output)
            kept = self.results.keep(job, found, deadline.less(SAVE_RESERVE), age=self._age_of_result(job))
        except PermanentError as error:
            if job.files:  # of an earlier try, when RunPod's answer was still another
                return jobs.finish(job, problems=[error], now=self.clock.now())
            return jobs.fail(job, error, output=outputs.excerpt(answer.output), now=self.clock.now())
        job = jobs.keep(job, kept.files)
        if kept.error:
            return self.not_stored(job, kept.error)
        return jobs.finish(job, problems=kept.problems, now=self.clock.now())

    def not_stored(self, job: Job, error: ServiceError) -> Change:
        """The change for a result that could not be stored now: later again, or given up."""
        now = self.clock.now()
        if self._age_of_result(job) > LAST_TRY:
            # Files that the worker's host or RunPod never gave take nothing from those that are there; what failed here
            # or in R2 can be mended.
            if job.files and error.service in ("result", "runpod"):
                return jobs.finish(job, problems=[error], now=now)
            return jobs.bury(job, error, now=now)
        return jobs.hold(job, error, now=now, rng=self.rng)

    def _endpoint(self, job: Job) -> str:
        return job.endpoint_id or self.default_endpoint_id

    def _ask(self, job: Job, deadline: Deadline, *, reserve: float) -> Answer:
        timeout = deadline.cap(STATUS_TIMEOUT, reserve=reserve)
        return self.runpod.status(self._endpoint(job), job.runpod_job_id or "", timeout=timeout)

    def _judge(self, job: Job, answer: Answer, lease: float) -> Change | None:
        now = self.clock.now()
        seen = {"runpod_status": answer.status, "queue_ms": answer.queue_ms, "execution_ms": answer.execution_ms}
        match answer.verdict:
            case Verdict.UNFINISHED:
                return jobs.observe(job, runpod=seen, now=now) if answer.status != job.runpod_status else None
            case Verdict.COMPLETED:
                return jobs.complete(
                    job, lease_until=jobs.to_text(now + timedelta(seconds=lease)), runpod=seen, now=now
                )
            case Verdict.FAILED:
                error = _said("worker_failed", "RunPod's worker failed", answer.error)
                return jobs.fail(job, error, runpod=seen, output=outputs.excerpt(answer.output), now=now)
            case Verdict.CANCELLED if job.cancel_at:
                return jobs.confirm_cancel(job, runpod=seen, now=now)
            case Verdict.CANCELLED:
                return jobs.fail(
                    job,
                    _said("cancelled_outside", "The run was cancelled at RunPod, not here", ""),
                    runpod=seen,
                    now=now,
                )
            case Verdict.TIMED_OUT:
                return self._lost(job, _said("runpod_timed_out", "RunPod gave the run up", answer.error), seen)
            case Verdict.NOT_FOUND:
                return self._missing(job)

    def _missing(self, job: Job) -> Change | None:
        if _age(job.submitted_at or job.updated_at, self.clock.now()) < NOT_INDEXED_YET:
            return None
        return self._lost(job, _said("runpod_lost", "RunPod no longer knows the run, and its result is lost", ""), {})

    def _lost(self, job: Job, error: ServiceError, seen: dict[str, Any]) -> Change:
        now = self.clock.now()
        if max(job.attempt, 1) < self.max_attempts:
            return jobs.rerun(job, error, runpod=seen, now=now)
        return jobs.fail(job, error, runpod=seen, now=now)

    def _age_of_result(self, job: Job) -> timedelta:
        return _age(job.completed_at or job.updated_at, self.clock.now())

    def _ask_for_result(self, job: Job, deadline: Deadline) -> Answer:
        answer = self._ask(job, deadline, reserve=STORE_RESERVE)
        if answer.verdict is Verdict.NOT_FOUND:
            # It was there; a single 404 is no proof that it is gone, and trying again costs nothing.
            raise TransientError(
                "result_lost", "RunPod no longer finds the result, which is not yet stored.", service="runpod"
            )
        if answer.verdict is not Verdict.COMPLETED:
            raise TransientError(
                "runpod_bad_answer", f"RunPod says {answer.status} of a run that it had completed.", service="runpod"
            )
        return answer


def _age(text: str, now: datetime) -> timedelta:
    """How long ago that was; a time of the earlier version that cannot be read is long ago."""
    try:
        return now - jobs.from_text(text)
    except ValueError:
        return timedelta.max


def _said(code: str, sentence: str, reason: str) -> PermanentError:
    return PermanentError(code, f"{sentence}: {reason}" if reason else f"{sentence}.", service="runpod")
