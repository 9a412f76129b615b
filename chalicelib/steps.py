"""
One job's next step: ask a cloud, return the change to save, or None where there is nothing new. Steps never save.

What reads and stores a worker's answer is imported where there is one: a job is sent without it.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

from chalicelib import deadlines, jobs, log, moves
from chalicelib.deadlines import Deadlines
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.jobs import Change, Job
from chalicelib.models import Models
from chalicelib.records import dataclass
from chalicelib.retry import Attempts
from chalicelib.room import Place
from chalicelib.runpod import Answer, Runpod, Verdict
from chalicelib.runtime import Clock, Deadline
from chalicelib.webhooks import Webhooks

if TYPE_CHECKING:
    from chalicelib.results import Results

RUN_TIMEOUT = 10.0  # seconds for /run
STATUS_TIMEOUT = 8.0  # seconds for /status, whose answer may carry 20 MB
CANCEL_TIMEOUT = 4.0  # seconds for /cancel
SAVE_RESERVE = 2.0  # seconds of every deadline kept for the save

UNKNOWN_ATTEMPTS = 3  # beyond MAX_ATTEMPTS, of which each may have been paid without our knowing it
MIN_SIGNED = 60  # seconds that a link to a picture holds, though the job's time is nearly over

MAX_HOLDS = 5  # claims of a result without a save, at which it is not tried any more

NOT_INDEXED_YET = timedelta(seconds=150)  # RunPod may not find a run that is younger than this
# So long before a result is forgotten its last try is over; one more wait may take two minutes.
LAST_WAIT = timedelta(seconds=150)

# How RunPod ends a run that is over `policy.executionTimeout`: as a FAILED one, not as TIMED_OUT.
EXECUTION_TIMEOUT = re.compile(r"execution ?timeout exceeded", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The three steps and the clouds they ask."""

    runpod: Runpod
    results: "Callable[[], Results]"
    clock: Clock
    rng: Random
    default_endpoint_id: str
    attempts: Attempts
    deadlines: Deadlines
    models: Models
    webhooks: Webhooks

    @property
    def store_reserve(self) -> float:
        """Seconds that must be left when a result is begun to be stored."""
        return SAVE_RESERVE + self.results().put_reserve

    def submit(self, job: Job, deadline: Deadline) -> Change:
        """Begin the paid run whose intent is on disk; called at most once for each claim."""
        if deadlines.overdue(job, self.clock.now()):
            return moves.fail(job, deadlines.too_late(), now=self.clock.now())
        if job.attempt - job.attempt_base > self.attempts.maximum + UNKNOWN_ATTEMPTS:
            return moves.fail(job, _never_answered(), now=self.clock.now())
        timeout = deadline.cap(RUN_TIMEOUT, reserve=SAVE_RESERVE)
        try:
            payload = job.payload(lambda key: self._sign(key, job))
        except Exception:  # nothing was sent, which must not look like a lost answer
            log.crashed("input_not_made", job_id=job.id)
            error = TransientError("internal_error", "The job's input could not be made inside the service.")
            return moves.give_back(job, error, now=self.clock.now(), rng=self.rng)
        try:
            run_id, status = self.runpod.run(
                self._endpoint(job),
                payload,
                webhook=self.webhooks.url(job.id, job.attempt),
                policy=self.deadlines.policy(job),
                timeout=timeout,
                within=deadline.left() - SAVE_RESERVE,
            )
        except TransientError as error:
            return moves.give_back(job, _unsigned(error), now=self.clock.now(), rng=self.rng)
        except IndeterminateError as error:
            return moves.doubt(job, _unsigned(error), now=self.clock.now())
        except PermanentError as error:
            return moves.fail(job, _unsigned(error), now=self.clock.now())
        return moves.accept(job, runpod_job_id=run_id, runpod_status=status, now=self.clock.now())

    def _sign(self, key: str, job: Job) -> str:
        """Where the worker reads a picture of the job's input, for as long as the job may take."""
        left = deadlines.seconds_left(job, self.clock.now())
        return self.results().bucket.presign(key, seconds=min(max(left, MIN_SIGNED), deadlines.MAX_POLICY_SECONDS))

    def poll(
        self, job: Job, deadline: Deadline, *, lease: float, place: Place | None = None
    ) -> tuple[Change | None, Answer | None]:
        """
        Ask RunPod for the run; what it answered comes too, so that the picture in it need not be asked for again.

        Raises TransientError where there was no answer: a paid run is not given up for that.
        """
        try:
            answer = self._ask(job, deadline, reserve=SAVE_RESERVE, place=place)
        except TransientError:
            if self._ends_unseen(job, deadline):
                return self._stopped(job, deadlines.too_late(), {}), None
            raise
        why = self._why_to_stop(job, answer)
        told = why is not None and self._tell_to_stop(job, deadline)
        if told:
            with contextlib.suppress(ServiceError):  # it may have been finished just before
                answer = self._ask(job, deadline, reserve=SAVE_RESERVE, place=place)
        return self._judge(job, answer, lease, why, told=told), answer

    def _ends_unseen(self, job: Job, deadline: Deadline) -> bool:
        """Whether the job ends though RunPod gives no status of its run; one that must stop is told so all the same."""
        now = self.clock.now()
        wanted = job.cancel_at is not None or deadlines.overdue(job, now)
        told = wanted and self._tell_to_stop(job, deadline)
        return self._waited_enough(job, now, told=told and job.cancel_at is not None)

    def adopt(self, job: Job, run_id: str, deadline: Deadline) -> Change | None:
        """
        The change for a run whose own callback names it, and whose answer to /run was lost; None where it is no run of
        ours that could still come to something. Raises TransientError where RunPod does not answer.
        """
        answer = self._ask(replace(job, runpod_job_id=run_id), deadline, reserve=SAVE_RESERVE)
        if answer.verdict in (Verdict.NOT_FOUND, Verdict.CANCELLED):
            return None
        return moves.accept(job, runpod_job_id=run_id, runpod_status=answer.status, adopted=True, now=self.clock.now())

    def store(self, job: Job, answer: Answer | None, deadline: Deadline, *, place: Place | None = None) -> Change:
        """Put the finished result into R2; without the answer of the poll RunPod is asked again."""
        from chalicelib import outputs, results

        if job.holds >= MAX_HOLDS:
            return moves.bury(job, _poison(), now=self.clock.now())
        if job.warnings is None:
            try:
                answer = answer or self._ask_for_result(job, deadline, place)
            except ServiceError as error:
                if not self._can_do_without(job, error):
                    return self.not_stored(job, error)
        try:
            found = outputs.read(answer.output) if answer else results.from_row(job)
            kept = self.results().keep(job, found, deadline.less(SAVE_RESERVE), age=self._age_of_result(job))
        except PermanentError as error:
            return self._never_stored(job, error, answer)
        job = moves.keep(
            job,
            kept.files,
            links=kept.links,
            problems=kept.problems if kept.complete else None,
        )
        if kept.error:
            # What does not need RunPod any more outlives its half hour, but no link's host is waited for so long.
            if job.spooled or (job.left == "links" and kept.error.service != "result"):
                job = moves.keep_for_a_day(job, now=self.clock.now())
            return self.not_stored(job, kept.error)
        return moves.finish(job, problems=kept.problems, now=self.clock.now())

    def _can_do_without(self, job: Job, error: ServiceError) -> bool:
        """Whether the result, or what is left of it, can be stored though RunPod does not give it any more."""
        forgotten = error.code == "result_lost"
        return forgotten and (job.left == "links" or (bool(job.kept) and self._age_of_result(job) > jobs.RUNPOD_KEEPS))

    def not_stored(self, job: Job, error: ServiceError) -> Change:
        """The change for a result that could not be stored now: later again, or given up."""
        now = self.clock.now()
        if now > self._end_of_result(job) - LAST_WAIT:
            # Files that the worker's host or RunPod never gave take nothing from those that are there; what failed here
            # or in R2 can be mended.
            if job.files and not job.spooled and error.service in ("result", "runpod"):
                return moves.finish(job, problems=[error], now=now)
            return moves.bury(job, error, now=now)
        return moves.hold(job, error, now=now, rng=self.rng)

    def _never_stored(self, job: Job, error: PermanentError, answer: Answer | None) -> Change:
        from chalicelib import outputs

        now = self.clock.now()
        if job.files:  # of an earlier try, when RunPod's answer was still another
            return moves.finish(job, problems=[error], now=now)
        if answer is None:
            return moves.bury(job, error, now=now)
        return moves.fail(job, error, output=outputs.excerpt(answer.output), now=now)

    def has_result(self, job: Job, deadline: Deadline) -> bool:
        """Whether something of a dead letter's result is left to be had. Raises TransientError where nobody says."""
        if job.files or (job.spooled and self.results().has_spooled(job, deadline)):
            return True
        if job.left == "links":
            return True
        return self._ask(job, deadline, reserve=SAVE_RESERVE).verdict is Verdict.COMPLETED

    def _why_to_stop(self, job: Job, answer: Answer) -> PermanentError | None:
        """Why an unfinished run must not go on: its user has cancelled it, or a deadline is over."""
        if answer.verdict is not Verdict.UNFINISHED:
            return None
        if job.cancel_at:
            return _cancelled()
        return self.deadlines.overrun(job, answer.status, self.clock.now())

    def _tell_to_stop(self, job: Job, deadline: Deadline) -> bool:
        """Stop the run at RunPod; whether RunPod has heard it. If not, the next round tries again."""
        timeout = deadline.cap(CANCEL_TIMEOUT, reserve=SAVE_RESERVE)
        try:
            self.runpod.cancel(self._endpoint(job), job.runpod_job_id or "", timeout=timeout)
        except ServiceError:
            return False
        return True

    def _stopped(self, job: Job, why: PermanentError | None, seen: dict[str, Any]) -> Change:
        """The end of a run that had to stop: its user's wish goes before a deadline."""
        price = self._price(job)
        if job.cancel_at or why is None:
            return moves.confirm_cancel(job, runpod=seen, price=price, now=self.clock.now())
        return moves.fail(job, why, runpod=seen, price=price, now=self.clock.now())

    def _price(self, job: Job) -> float | None:
        return self.models.get(job.model).price

    def _endpoint(self, job: Job) -> str:
        return job.endpoint_id or self.default_endpoint_id

    def _ask(self, job: Job, deadline: Deadline, *, reserve: float, place: Place | None = None) -> Answer:
        timeout = deadline.cap(STATUS_TIMEOUT, reserve=reserve)
        return self.runpod.status(
            self._endpoint(job),
            job.runpod_job_id or "",
            place=place,
            timeout=timeout,
            within=deadline.left() - reserve,
        )

    def _judge(
        self, job: Job, answer: Answer, lease: float, why: PermanentError | None, *, told: bool
    ) -> Change | None:
        """The change for what RunPod says; `why` the run must stop, if it must, and whether RunPod was `told`."""
        now, price = self.clock.now(), self._price(job)
        seen = {"runpod_status": answer.status, "queue_ms": answer.queue_ms, "execution_ms": answer.execution_ms}
        match answer.verdict:
            case Verdict.UNFINISHED if why and self._waited_enough(job, now, told=told):
                return self._stopped(job, why, seen)
            case Verdict.UNFINISHED:
                return self._observed(job, answer, seen)
            case Verdict.COMPLETED:
                until = jobs.to_text(now + timedelta(seconds=lease))
                return moves.complete(job, lease_until=until, runpod=seen, price=price, now=now)
            case Verdict.FAILED if EXECUTION_TIMEOUT.search(answer.error):
                error = deadlines.took_too_long(self.deadlines.of_run(job))
                return moves.fail(job, error, runpod=seen, price=price, now=now)
            case Verdict.FAILED:
                from chalicelib import outputs

                error = _said("worker_failed", "RunPod's worker failed", answer.error)
                return self._again_or_failed(job, error, seen, output=outputs.excerpt(answer.output))
            case Verdict.CANCELLED | Verdict.TIMED_OUT if job.cancel_at or why:
                return self._stopped(job, why, seen)
            case Verdict.CANCELLED:
                return moves.fail(
                    job,
                    _said("cancelled_outside", "The run was cancelled at RunPod, not here", ""),
                    runpod=seen,
                    price=price,
                    now=now,
                )
            case Verdict.TIMED_OUT:
                error = _said("runpod_timed_out", "RunPod gave the run up", answer.error)
                return self._again_or_failed(job, error, seen)
            case Verdict.NOT_FOUND:
                return self._missing(job, why)

    def _observed(self, job: Job, answer: Answer, seen: dict[str, Any]) -> Change | None:
        from chalicelib import progress

        told = progress.read(answer.output) or job.progress
        begun = answer.status != jobs.IN_QUEUE and job.started_at is None
        if not begun and answer.status == job.runpod_status:
            return moves.go_further(job, progress=told) if told and told != job.progress else None
        return moves.observe(job, runpod=seen, progress=told, now=self.clock.now())

    def _missing(self, job: Job, why: PermanentError | None) -> Change | None:
        if _age(job.submitted_at or job.updated_at, self.clock.now()) < NOT_INDEXED_YET:
            return None
        if job.cancel_at or why:
            return self._stopped(job, why, {})
        error = _said("runpod_lost", "RunPod no longer knows the run, and its result is lost", "")
        return self._again_or_failed(job, error, {})

    def _again_or_failed(self, job: Job, error: PermanentError, seen: dict[str, Any], *, output: str = "") -> Change:
        """One more attempt where the failure is worth one, and nobody wants the job to stop."""
        now, price = self.clock.now(), self._price(job)
        if not job.cancel_at and self.attempts.allow(error.code, made=max(job.attempt, 1) - job.attempt_base):
            return moves.rerun(job, error, runpod=seen, price=price, now=now)
        return moves.fail(job, error, runpod=seen, price=price, output=output, now=now)

    def _waited_enough(self, job: Job, now: datetime, *, told: bool) -> bool:
        """Whether a job ends whose run must stop and does not: RunPod heard of it long ago, or never will."""
        return (told and self.deadlines.is_out_of_patience(job, now)) or deadlines.is_past_hope(job, now)

    def _age_of_result(self, job: Job) -> timedelta:
        return _age(job.completed_at or job.updated_at, self.clock.now())

    def _end_of_result(self, job: Job) -> datetime:
        """When the result is forgotten where it lies; of rows that do not say, half an hour after their last change."""
        try:
            if job.result_until:
                return jobs.from_text(job.result_until)
            return jobs.from_text(job.completed_at or job.updated_at) + jobs.RUNPOD_KEEPS
        except ValueError:
            return self.clock.now()

    def _ask_for_result(self, job: Job, deadline: Deadline, place: Place | None) -> Answer:
        answer = self._ask(job, deadline, reserve=self.store_reserve, place=place)
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


def _unsigned(error: ServiceError) -> ServiceError:
    """RunPod may tell back what it was sent, in which links are signed."""
    from chalicelib import outputs

    error.sentence = outputs.without_signatures(error.sentence)
    return error


def _never_answered() -> PermanentError:
    return PermanentError(
        "submit_unknown",
        "RunPod's answer was lost each time the job was sent, and each time it may have been drawn; this is the end.",
        service="runpod",
    )


def _cancelled() -> PermanentError:
    return PermanentError("cancelled", "The job was cancelled.")


def _poison() -> PermanentError:
    return PermanentError(
        "poison_result",
        "Whoever began to store this result ended before it was done, each time. Look at it before it is redriven.",
        service="result",
    )


def _said(code: str, sentence: str, reason: str) -> PermanentError:
    from chalicelib import outputs

    reason = outputs.without_signatures(reason[: 2 * moves.MAX_ERROR_CHARS])
    return PermanentError(code, f"{sentence}: {reason}" if reason else f"{sentence}.", service="runpod")
