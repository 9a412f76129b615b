"""
The pipeline: a request creates and sends a job, rounds carry every job on until it is final.

It runs four rounds a minute; two at once, here or in another process, do no harm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from datetime import timedelta
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from chalicelib import jobs, log, metrics, moves
from chalicelib.errors import (
    IndeterminateError,
    PermanentError,
    RequestError,
    ServiceError,
    TransientError,
    no_picture,
    no_such_job,
)
from chalicelib.jobs import FINAL, LOW, NORMAL, Change, Job, State
from chalicelib.models import Models
from chalicelib.records import dataclass
from chalicelib.rounds import DoubtfulClaim, Report, Round
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.saver import Saver
from chalicelib.steps import Steps
from chalicelib.store import CALLS_KEPT_FOR_SAVES, CALLS_KEPT_FROM_WEBHOOKS, IN_THE_NEXT_ROUND, Store, new_nonce
from chalicelib.webhooks import Webhooks

if TYPE_CHECKING:
    from chalicelib.courier import Courier
    from chalicelib.reasons import Reasons
    from chalicelib.removal import Removal
    from chalicelib.uploads import Uploads

ROUNDS = 4  # a minute
ROUND_EVERY = 15.0  # seconds from start to start
ROUND_BUDGET = 10.0  # seconds that must be left for a round after the first
THREADS = 32  # that ask side by side; bench/README.md has why
ERRANDS = 5  # threads beside the rounds: what is told after each of them, and the sweep

CREATE_TIMEOUT = 8.0  # seconds
QUEUE_FULL_WAIT = 30.0  # seconds after which a client may try again
VERB_TIMEOUT = 8.0  # seconds
TOLD_WITHIN = 14.0  # seconds from a run's end as RunPod's callback tells it: a caller's own address, and D1 twice
SWEEP_EVERY = 10  # minutes
WAITED_LONG = 120.0  # seconds that a run waits for a worker, from which on the log tells why
CALLS_KEPT_FOR_ROUNDS = 100  # under this many D1 calls left, creating only queues: one call, not two


@dataclass(kw_only=True)
class Pipeline:
    """Everything that moves jobs; one for each process. What not every request needs is made when it is called for."""

    store: Store
    steps: Steps
    saver: Saver
    clock: Clock
    rng: Random
    webhooks: Webhooks
    models: Models
    courier: "Callable[[], Courier]"
    uploads: "Callable[[], Uploads]"
    reasons: "Callable[[], Reasons]"
    removal: "Callable[[], Removal]"
    retention_days: int = 0
    skip_idle_rounds: bool = False
    new_crew: Callable[[int], Crew] = Crew
    doubtful: DoubtfulClaim = field(default_factory=DoubtfulClaim)

    def new_job(
        self,
        *,
        prompt: str,
        model: str,
        payload: dict[str, object] | None,
        metadata: Mapping[str, str] | None = None,
        priority: str = NORMAL,
        deadline: int | None = None,
        slots: Mapping[str, object] | None = None,
        pictures: Sequence[str] = (),
        callback_url: str | None = None,
    ) -> Job:
        """
        A job with an id of its own, not yet in the table; `deadline` are the seconds it has in all, `slots` what the
        model's input is filled with, and `pictures` the keys of those that go into it.
        """
        now = self.clock.now()
        if slots is not None:
            payload = self.models.get(model).fill(slots, self.rng)
        places = self.models.get(model).places() if pictures else []
        return jobs.new(
            job_id=jobs.new_id(self.rng),
            prompt=prompt,
            model=model,
            payload=payload,
            endpoint_id=self.store.endpoint_of(model),
            metadata=metadata,
            priority=priority,
            deadline=deadline,
            deadline_at=self.store.deadline_at(now, model=model, deadline=deadline),
            pictures=[{"key": key, "at": at} for key, at in zip(pictures, places, strict=True)],
            callback_url=callback_url,
            now=now,
        )

    def create(self, wanted: list[Job], deadline: Deadline, *, by: str) -> list[str]:
        """
        Insert the jobs, all or none, and send them to RunPod at once: two D1 calls. What RunPod does not take now, and
        what is of low priority, is left to the rounds.

        Returns their ids; those of the first time, where one idempotency key came twice. Raises RequestError where it
        came with another request, or the queue is full, and what D1 raises; then nothing was sent.
        """
        sending = self._may_send(deadline)
        now = self.clock.now()
        made = [self.store.with_intent(job, now=now) if sending and job.priority != LOW else job for job in wanted]
        claimed = [job for job in made if job.state is State.SUBMITTING]
        try:
            there, gone = self.store.create(
                made, by=by, nonce=new_nonce(self.rng), timeout=deadline.cap(CREATE_TIMEOUT)
            )
        except IndeterminateError:
            # The rows may be there with their intent written, and nobody will send them.
            self.saver.keep([moves.return_unsent(job, now=self.clock.now()) for job in claimed])
            raise
        except PermanentError as error:
            if error.code == "d1_request_too_large":
                sentence = "This is too large to be stored; make the inputs smaller, or send fewer jobs at once."
                raise RequestError("body_too_large", sentence) from error
            raise
        if not there:
            raise no_picture(min(gone)) if gone else self._no_room(len(wanted))
        _require_same_request(there, wanted[0].request_hash, len(wanted))
        if there[0].id in {job.id for job in wanted}:
            may_be_sent = {job.id for job in there if job.state is State.SUBMITTING}
            self._send_all([job for job in claimed if job.id in may_be_sent], deadline)
            return [job.id for job in wanted]
        return [job.id for job in there]

    def made_before(self, key: str, request_hash: str, number: int, deadline: Deadline) -> list[str]:
        """The ids of the jobs that the same request has made; none where it was not made. Raises as create() does."""
        there = self.store.made_under(key, timeout=deadline.cap(CREATE_TIMEOUT))
        if there:
            _require_same_request(there, request_hash, number)
        return [job.id for job in there]

    def _no_room(self, number: int) -> RequestError:
        most = self.store.max_queued
        if number > most:
            return RequestError(
                "jobs_invalid", f"jobs must be at most {most} here, for no more may be unfinished at once."
            )
        return RequestError(
            "queue_full",
            "Too many jobs are unfinished already, so nothing was made. Try again later.",
            retry_after=QUEUE_FULL_WAIT,
        )

    def _send_all(self, to_send: list[Job], deadline: Deadline) -> None:
        if to_send and self.store.has_few_calls(CALLS_KEPT_FOR_SAVES):  # as the answer to the insert has said
            self.saver.save([moves.return_unsent(job, now=self.clock.now()) for job in to_send], deadline)
        elif len(to_send) == 1:
            self._send(to_send[0], deadline)
        elif to_send:
            self._new_round(THREADS, deadline, lambda round_: round_.run_for(to_send))

    def send_one(self, job_id: str | None, deadline: Deadline) -> tuple[Job | None, ServiceError | None]:
        """
        Send one waiting job now, the oldest where no id is given.

        Returns the job as it stands then (None: there is no such job) and why RunPod did not take it, if it did not.
        """
        claimed, named = self.store.claim_one(
            job_id, nonce=new_nonce(self.rng), now=self.clock.now(), timeout=deadline.cap(CREATE_TIMEOUT)
        )
        if claimed is None:
            return named, None
        change = self._send(claimed, deadline)
        return change.job, change.error

    def webhook(self, job_id: str, attempt: str, token: str, body: bytes, deadline: Deadline) -> str:
        """
        What RunPod says of a run's end is a hint to look now; in a word, what came of it.

        It also names the run whose answer to /run was lost. Raises RequestError where it is not genuine.
        """
        number, run_id = self.webhooks.read(job_id, attempt, token, body)
        few_calls = self.store.has_few_calls(CALLS_KEPT_FROM_WEBHOOKS)
        if self.store.has_few_calls(CALLS_KEPT_FOR_ROUNDS):  # RunPod repeats what it has no 2xx for
            raise TransientError("webhook_later", "There are too few D1 calls left for this now; call again.")
        job = self._get(job_id, deadline)
        live = job.state in (State.SUBMIT, State.SUBMITTING, State.POLL)
        if job.attempt != number or job.attempt <= job.attempt_base or not live:
            return "nothing to do"
        if job.state is not State.POLL:
            return self._adopt(job, run_id, deadline)
        if job.runpod_job_id != run_id:
            return "nothing to do"
        if few_calls:
            return "left to the next round"
        self._tell(self._look_until_seen(job, deadline), deadline)
        return "looked at"

    def _look_until_seen(self, job: Job, deadline: Deadline) -> Job:
        """
        As look_at(); once more where meanwhile a round has saved what it saw before the run's end. By such a save this
        look loses the row, and the next one would be a round's, 12 s later or more.
        """
        seen = self.look_at(job, deadline)
        if seen.state in FINAL:
            return seen
        now = self._get(job.id, deadline)
        is_lost = now.version != job.version and now.runpod_job_id == job.runpod_job_id
        seen = self.look_at(now, deadline) if is_lost and now.state is State.POLL else seen
        if seen.state is State.POLL:  # RunPod does not yet say what it has just told, and will not tell it again
            at = jobs.to_text(self.clock.now() + timedelta(seconds=IN_THE_NEXT_ROUND))
            self.saver.save([moves.look_again(seen, at=at)], deadline)
        return seen

    def _tell(self, job: Job, deadline: Deadline) -> None:
        """Tell of the end at once, if it is one, but not for long: RunPod waits for our answer."""
        if job.state in FINAL and job.callback_url:
            self.courier().run(deadline.less(max(0.0, deadline.left() - TOLD_WITHIN)), job_id=job.id)

    def _adopt(self, job: Job, run_id: str, deadline: Deadline) -> str:
        # Nobody but this callback knows the run's id; the rounds could only send the job again.
        change = self.steps.adopt(job, run_id, deadline)
        if change is None:
            return "nothing to do"
        saved = self.saver.save([change], deadline)
        if saved.error:
            raise saved.error
        won = next((one.job for one in saved.won if one.job.id == job.id), None)  # beside what was left over
        if won is None:
            return "nothing to do"
        if not self.store.has_few_calls(CALLS_KEPT_FROM_WEBHOOKS):
            self._tell(self.look_at(won, deadline), deadline)
        return "adopted"

    def look_at(self, job: Job, deadline: Deadline) -> Job:
        """The next steps of one job now; the job as it is then."""
        report = self._new_round(1, deadline, lambda round_: round_.run_for([job]))
        return next((updated for updated in report.updated if updated.id == job.id), job)

    def _get(self, job_id: str, deadline: Deadline) -> Job:
        job = self.store.get(job_id, timeout=deadline.cap(VERB_TIMEOUT))
        if job is None:
            raise no_such_job()
        return job

    def _send(self, job: Job, deadline: Deadline) -> Change:
        change = self.steps.submit(job, deadline)
        saved = self.saver.save([change], deadline)
        if saved.error:  # kept for the next time; RunPod's answer is what the caller asked for
            log.failed("save_refused", saved.error, job_id=job.id)
        return change

    def _may_send(self, deadline: Deadline) -> bool:
        if self.store.has_few_calls(CALLS_KEPT_FOR_ROUNDS):
            return False
        # While D1 does not take outcomes it must not be owed another one, for a paid run.
        return self.saver.flush(deadline).error is None

    def run_minute(self, deadline: Deadline) -> list[Report]:
        """
        Four rounds, 15 s from start to start; the first always, a later one if there is time for it, and where that is
        set, if the first has seen any job that is not final.

        A slot that a long round has run over is left out. A round that fails does not keep the others from running.
        """
        with self.new_crew(ERRANDS) as errands:
            errands.start(lambda: self._try("callbacks_not_sent", lambda: self.courier().run(deadline)))
            if self.clock.now().minute % SWEEP_EVERY == 0:
                errands.start(lambda: self._try("uploads_not_swept", lambda: self.uploads().sweep(deadline)))
                if self.retention_days:
                    errands.start(lambda: self._try("jobs_not_removed", lambda: self._retire(deadline)))
            reports = self._rounds(deadline, errands)
            while errands.busy:
                errands.wait(1.0)
        return reports

    def _rounds(self, deadline: Deadline, errands: Crew) -> list[Report]:
        start = self.clock.monotonic()
        reports: list[Report] = []
        slot = 0
        while slot < ROUNDS:
            pause = max(0.0, start + slot * ROUND_EVERY - self.clock.monotonic())
            if slot > 0 and deadline.left() - pause < ROUND_BUDGET:
                break
            if pause:
                self.clock.sleep(pause)
            # Once more after a round that failed, but not at once: it may be the measuring that failed.
            measure = slot % 2 == 0 and not any(one.measured for one in reports)
            report = self._guarded_round(deadline, measure=measure)
            for one in report:
                if one.measured and one.measured.waiting:
                    tell = partial(self._tell_why_runs_wait, one.measured.waiting)
                    errands.start(partial(self._try, "waiting_not_told", tell))
            if any(job.callback_url for one in report for job in one.updated):
                # Beside the rounds, which no receiver may delay.
                errands.start(lambda: self._try("callbacks_not_sent", lambda: self.courier().run(deadline)))
            reports += report
            if self.skip_idle_rounds and any(one.idle for one in report):
                break
            slot = max(slot + 1, math.ceil((self.clock.monotonic() - start) / ROUND_EVERY))
        return reports

    def _retire(self, deadline: Deadline) -> None:
        self.removal().retire(deadline, days=self.retention_days)

    def _try(self, what: str, errand: Callable[[], object]) -> None:
        """An errand that fails is done the next time."""
        try:
            errand()
        except ServiceError as error:
            log.failed(what, error)
        except Exception:
            log.crashed("errand_crashed")

    def _tell_why_runs_wait(self, waiting: Mapping[str, float]) -> None:
        """Log it of endpoints at which that needs a hand, so that it is known though nobody asks for a job."""
        for endpoint_id, seconds in waiting.items():
            if seconds > WAITED_LONG:
                reason = self.reasons().trouble_at(endpoint_id, timedelta(seconds=seconds))
                if reason:
                    log.runs_wait(endpoint_id, reason["code"], reason["sentence"], seconds)

    def _guarded_round(self, deadline: Deadline, *, measure: bool) -> list[Report]:
        try:
            return [self.run_round(deadline, measure=measure)]
        except ServiceError as error:
            log.failed("round_failed", error)
        except Exception:
            log.crashed("round_crashed")
        return []

    def run_round(self, deadline: Deadline, *, ignore_due: bool = False, measure: bool = False) -> Report:
        """One pass over every due job. Raises ServiceError where the claim fails; what was won before is carried on."""
        begun = self.clock.monotonic()
        report = Report()
        try:
            report = self._new_round(
                THREADS, deadline, lambda round_: round_.run(ignore_due=ignore_due, measure=measure)
            )
            return report
        except Exception:
            metrics.count("RoundsFailed")
            raise
        finally:
            self._say(report, self.clock.monotonic() - begun)

    def _say(self, report: Report, seconds: float) -> None:
        for name, value in report.measured.metrics.items() if report.measured else ():
            metrics.tell(name, value)
        # Where an alarm finds nothing it looks further back: of ends and costs there is always something, if only 0.
        for name in ("Rounds", "Done", "Errors", "CostUSD"):
            metrics.count(name, name == "Rounds")
        metrics.tell("RoundSeconds", seconds)
        log.round_over(checked=report.checked, submitted=report.submitted, updated=len(report.updated), seconds=seconds)

    def _new_round(self, threads: int, deadline: Deadline, run: Callable[[Round], Report]) -> Report:
        with self.new_crew(threads) as crew:
            return run(
                Round(
                    store=self.store,
                    steps=self.steps,
                    saver=self.saver,
                    clock=self.clock,
                    rng=self.rng,
                    crew=crew,
                    deadline=deadline,
                    doubtful=self.doubtful,
                )
            )


def _require_same_request(there: list[Job], request_hash: str | None, number: int) -> None:
    if there[0].request_hash != request_hash:
        raise RequestError(
            "idempotency_conflict",
            "Another request was made with this Idempotency-Key before; nothing was made now. Give each its own key.",
        )
    if len(there) < number:
        raise RequestError(
            "job_deleted", "This request was made before, and some of its jobs have been deleted; nothing was made now."
        )
