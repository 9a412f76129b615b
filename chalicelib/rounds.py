"""
A round: one pass of the pipeline over every job that is due.

Claim → work → save: one D1 call takes what is due, threads ask RunPod and R2 side by side, and their outcomes are saved
in groups. So the number of D1 calls does not grow with the number of jobs.
"""

import contextlib
import threading
from collections import Counter
from dataclasses import field
from datetime import timedelta
from random import Random

from chalicelib import breaker, log, moves
from chalicelib.errors import IllegalTransition, ServiceError, TransientError
from chalicelib.jobs import FINAL, Change, Job, State, to_text
from chalicelib.records import dataclass
from chalicelib.room import Place, Room
from chalicelib.runpod import CALLS, CALLS_WITHIN, Answer
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.saver import Saved, Saver
from chalicelib.steps import Steps
from chalicelib.store import (
    CALLS_KEPT_FOR_SAVES,
    CALLS_KEPT_FROM_WEBHOOKS,
    IN_THE_NEXT_ROUND,
    Claimed,
    Limits,
    Measured,
    Store,
    new_nonce,
)

# Seconds between saves while work goes on, or a tenth of the round's time so far: what ends early is told early, and a
# long round makes no more calls for it. Cloudflare allows four a second for everything.
SAVE_EVERY = 0.3
SAVE_RARELY = 3.0  # where few calls to D1 are left
SAVE_SHARE = 0.1
CLAIM_TIMEOUT = 12.0  # seconds
LEASE_MARGIN = 5.5  # seconds that a lease outlives its deadline, which is half a second before the Lambda must be dead

# Seconds that must be left to begin a step; what is not begun is given back, or is due again by itself.
SUBMIT_BUDGET = 12.0
POLL_BUDGET = 4.0
STORE_MARGIN = 0.5  # over what the step itself wants

SUBMITS_PER_ROUND = 200
POLLS_PER_SECOND = CALLS["status"] / CALLS_WITHIN
POLLING_SECONDS = 14.0  # of a round, so that the next one begins in its time

# Results first, which RunPod forgets, then runs to send, which need time.
ORDER = [State.STORE, State.SUBMITTING, State.POLL]

# Bytes of RunPod's answers that are in memory at once; one takes twice its size while it is read.
ROOM_BYTES = 48_000_000
# Of them those that are kept until their results may be stored; for the others RunPod is asked again. The rest is more
# than a result may have at RunPod: who reads one waits only for others who read or store, so somebody always goes on.
KEPT_ANSWER_BYTES = 24_000_000


@dataclass(kw_only=True)
class Report:
    """
    What a round did: statuses asked, runs sent, the jobs that became final; whether there was none that was not; and
    how much there was of all when it began, where that was asked.
    """

    checked: int = 0
    submitted: int = 0
    idle: bool = False
    measured: Measured | None = None
    updated: list[Job] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a poll has seen of a result: its size in bytes, and the answer with its room where that is kept."""

    size: int
    answer: Answer | None = None
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step came to: the change to save, if any; whether RunPod was asked; what was seen of a result."""

    change: Change | None = None
    asked: bool = False
    seen: Seen | None = None


class DoubtfulClaim:
    """The nonce of a claim whose answer never came; one for each process, so that the next round can ask again."""

    def __init__(self) -> None:
        self._nonce: str | None = None
        self._lock = threading.Lock()

    def put(self, nonce: str) -> None:
        """Remember it."""
        with self._lock:
            self._nonce = nonce

    def take(self) -> str | None:
        """The nonce, for one round alone."""
        with self._lock:
            nonce, self._nonce = self._nonce, None
        return nonce


@dataclass(kw_only=True)
class Round:
    """One pass: claims, starts a step for each job, saves outcomes, and stores what it has won."""

    store: Store
    steps: Steps
    saver: Saver
    clock: Clock
    rng: Random
    crew: Crew
    deadline: Deadline
    doubtful: DoubtfulClaim

    def __post_init__(self) -> None:
        self._report = Report()
        self._room = Room(ROOM_BYTES)
        self._seen: dict[str, Seen] = {}
        self._kept_bytes = 0
        self._keeping = threading.Lock()
        self._saves_refused = False
        self._failed_calls: Counter[str] = Counter()  # in a row, by endpoint
        self._saved_at = self._begun_at = self.clock.monotonic()

    def run(self, *, ignore_due: bool, measure: bool) -> Report:
        """Run to the end: no thread is left at work when this returns. Raises ServiceError where D1 fails it."""
        self._go_on(self.saver.flush(self.deadline))
        suspect = None
        try:
            claimed = self._claim(ignore_due, measure)
            suspect, self._report.measured = claimed.suspect, claimed.measured
            self._report.idle = not claimed.any_live and not self.saver.backlog
            for job in sorted(claimed.jobs, key=lambda job: ORDER.index(job.state)):
                self._start(job)
        finally:
            self._collect()
        while suspect is not None:
            suspect = self._try_alone(suspect)
        return self._report

    def _try_alone(self, suspect: Job) -> Job | None:
        """Store what may have killed its holders, when nobody works beside it; the next one of these."""
        if self.deadline.left() < self._store_budget() + CLAIM_TIMEOUT:
            return None
        try:
            job, following = self.store.claim_suspect(
                suspect,
                nonce=new_nonce(self.rng),
                now=self.clock.now(),
                lease=self._lease(),
                timeout=self.deadline.cap(CLAIM_TIMEOUT),
            )
        except ServiceError as error:
            log.failed("suspect_not_claimed", error, job_id=suspect.id)
            return None
        if job is not None:
            if not self._leased(job):  # it would be the next one again, and again
                return None
            self._start(job)
            self._collect()
        return following

    def run_for(self, jobs_at_hand: list[Job]) -> Report:
        """Take the next step of these jobs alone: at `poll`, where a look does no harm, or claimed by their insert."""
        self._go_on(self.saver.flush(self.deadline))
        for job in jobs_at_hand:
            self._start(job)
        self._collect()
        return self._report

    def _claim(self, ignore_due: bool, measure: bool) -> Claimed:
        """What is due; a result that must be stored alone is not yet claimed."""
        left = self.deadline.left()
        may_send = left > SUBMIT_BUDGET and not self._saves_refused and not self._has_too_few_calls()
        submits = SUBMITS_PER_ROUND if may_send else 0
        # A poll that is claimed and not begun is one more row to save, and is looked at a round later.
        polls = int(POLLS_PER_SECOND * max(0.0, min(POLLING_SECONDS, left - POLL_BUDGET)))
        nonce = self.doubtful.take() or new_nonce(self.rng)
        try:
            return self.store.claim(
                nonce=nonce,
                now=self.clock.now(),
                limits=Limits(submits=submits, polls=polls),
                lease=self._lease(),
                ignore_due=ignore_due,
                measure=measure,
                timeout=self.deadline.cap(CLAIM_TIMEOUT),
            )
        except ServiceError:
            # What it may have claimed, now or at an earlier try, nobody else will send for ten minutes; the next round
            # asks for it by this name.
            self.doubtful.put(nonce)
            raise

    def _lease(self) -> float:
        """Seconds for which a result is ours: until this invocation must be dead, and a little more."""
        return max(0.0, self.deadline.left()) + LEASE_MARGIN

    def _start(self, job: Job, seen: Seen | None = None) -> None:
        if job.state is not State.STORE or self._leased(job):
            # A result that is at hand is stored before others are looked at: it waits in memory, and somebody for it.
            self.crew.start(lambda: self._work(job, seen), first=seen is not None and seen.answer is not None)

    def _work(self, job: Job, seen: Seen | None) -> Outcome:
        """One step in a thread of the crew; whatever goes wrong concerns this job alone."""
        try:
            match job.state:
                case State.SUBMITTING:
                    return self._submit(job)
                case State.POLL:
                    return self._poll(job)
                case State.STORE:
                    return self._store_result(job, seen)
                case _:
                    raise IllegalTransition(
                        "illegal_transition", f"Job {job.id} is at {job.state}: no step of a round."
                    )
        except TransientError as error:
            log.failed("no_answer", error, job_id=job.id)
            return Outcome(change=self._sooner(job), asked=True)
        except Exception:
            log.crashed("step_crashed", job_id=job.id)
            if job.state is State.STORE:
                return Outcome(
                    change=self.steps.not_stored(
                        job, TransientError("internal_error", "Storing the result failed inside the service.")
                    )
                )
        return Outcome()

    def _submit(self, job: Job) -> Outcome:
        endpoint = job.endpoint_id or ""
        fails = self._failed_calls[endpoint] >= breaker.MOST["call"]  # the table will know it with the next save
        too_few = self._has_too_few_calls()  # as the answer to the claim may have said
        if self.deadline.left() < SUBMIT_BUDGET or self._saves_refused or too_few or fails:
            return Outcome(change=moves.return_unsent(job, now=self.clock.now()))
        change = self.steps.submit(job, self.deadline)
        if change.accepted:
            self._failed_calls[endpoint] = 0
        elif breaker.what_fails(change):
            self._failed_calls[endpoint] += 1
        return Outcome(change=change)

    def _has_too_few_calls(self) -> bool:
        return self.store.has_few_calls(CALLS_KEPT_FOR_SAVES)

    def _poll(self, job: Job) -> Outcome:
        if self.deadline.left() < POLL_BUDGET:
            return Outcome(change=self._sooner(job))
        with contextlib.ExitStack() as until_here:
            place = until_here.enter_context(Place(self._room))
            change, answer = self.steps.poll(job, self.deadline, lease=self._lease(), place=place)
            if answer is None or change is None or change.event != "completed":
                return Outcome(change=change, asked=True)
            if not self._may_keep(answer):
                return Outcome(change=change, asked=True, seen=Seen(size=answer.bytes))
            until_here.pop_all()
            return Outcome(change=change, asked=True, seen=Seen(size=answer.bytes, answer=answer, place=place))

    def _sooner(self, job: Job) -> Change | None:
        """Have a run that gave no answer looked at in the next round, where it would else be due later."""
        at = to_text(self.clock.now() + timedelta(seconds=IN_THE_NEXT_ROUND))
        return moves.look_again(job, at=at) if job.due_at > at else None

    def _may_keep(self, answer: Answer) -> bool:
        with self._keeping:
            fits = self._kept_bytes + answer.bytes <= KEPT_ANSWER_BYTES
            self._kept_bytes += answer.bytes if fits else 0
            return fits

    def _store_result(self, job: Job, seen: Seen | None) -> Outcome:
        time_left = self.deadline.left() - self._store_budget()
        with self._place_for(seen) as place:
            try:
                if time_left < 0 or not place.take(seen.size if seen else 0, timeout=time_left):
                    return Outcome(change=moves.put_back(job, now=self.clock.now()))
                answer = seen.answer if seen else None
                return Outcome(change=self.steps.store(job, answer, self.deadline, place=place))
            finally:
                self._let_go(seen)

    def _place_for(self, seen: Seen | None) -> Place:
        return seen.place if seen and seen.place else Place(self._room)

    def _let_go(self, seen: Seen | None) -> None:
        if seen and seen.place:
            seen.place.leave()
            with self._keeping:
                self._kept_bytes -= seen.size

    def _store_budget(self) -> float:
        return self.steps.store_reserve + STORE_MARGIN

    def _collect(self) -> None:
        """Gather outcomes until all work is done; save when the last is in, and now and then before."""
        changes: list[Change] = []
        while self.crew.busy or changes:
            if self.crew.busy:
                changes += self._gather(SAVE_EVERY)
            if changes and (not self.crew.busy or self._is_time_to_save()):
                self._save(changes)
                changes = []

    def _is_time_to_save(self) -> bool:
        now = self.clock.monotonic()
        least = SAVE_RARELY if self.store.has_few_calls(CALLS_KEPT_FROM_WEBHOOKS) else SAVE_EVERY
        return now - self._saved_at >= max(least, SAVE_SHARE * (now - self._begun_at))

    def _gather(self, timeout: float) -> list[Change]:
        changes = []
        for outcome in self.crew.wait(timeout):
            if not isinstance(outcome, Outcome):
                log.failed("step_ended", ServiceError("internal_error", f"A step ended with {type(outcome).__name__}."))
                continue
            self._report.checked += outcome.asked
            if outcome.change is not None:
                changes.append(outcome.change)
                if outcome.seen:
                    self._seen[outcome.change.job.id] = outcome.seen
        return changes

    def _save(self, changes: list[Change]) -> None:
        self._saved_at = self.clock.monotonic()
        self._go_on(self.saver.save(changes, self.deadline))
        for seen in self._seen.values():  # of those that did not win
            self._let_go(seen)
        self._seen.clear()

    def _go_on(self, saved: Saved) -> None:
        """Take the next step of what was won: whoever saved `completed` holds the lease and stores."""
        if saved.error:
            self._saves_refused = True  # no new paid run while its outcome could not be written down
            log.failed("save_refused", saved.error)
        for change in saved.won:
            job = change.job
            if change.accepted:
                self._report.submitted += 1
            if job.state in FINAL:
                self._report.updated.append(job)
            elif change.event == "completed":
                self._start(job, self._seen.pop(job.id, None))

    def _leased(self, job: Job) -> bool:
        """Whether the lease lasts for as long as we do; that of a save kept from an earlier invocation does not."""
        return job.due_at >= to_text(self.clock.now() + timedelta(seconds=self.deadline.left()))
