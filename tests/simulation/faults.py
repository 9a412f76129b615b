"""
What goes wrong in a simulated world, how often, and when: by class, so that it can be told what was survived.

Each class has the number that README's table gives it. Rates are chances for each call; windows are spans in which a
cloud does one thing to every call.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

# The classes of faults, by the names under which they are counted.
CLASSES = {
    "crash_before_effect": (1, "a process is killed just before a call has its effect"),
    "crash_after_effect": (1, "a process is killed just after a call has had its effect"),
    "run_answer_lost": (2, "the answer to /run is lost, and the run exists"),
    "run_request_lost": (2, "there is no answer to /run, and no run"),
    "overlapping_rounds": (3, "two invocations of the schedule at once"),
    "duplicate_tick": (3, "the schedule's event is delivered twice, or not at all"),
    "d1_stall": (4, "D1 answers nothing for 80 s"),
    "d1_5xx": (4, "D1 answers 5xx or 400 'internal error' without having done anything"),
    "d1_answer_lost": (4, "D1 has written, and the answer is lost"),
    "d1_lockout": (5, "Cloudflare refuses every call for five minutes (429)"),
    "r2_down": (6, "R2 takes nothing for 67 minutes"),
    "r2_answer_lost": (7, "R2 has the object, and the answer is lost"),
    "truncated_download": (7, "a download ends in the middle"),
    "runpod_404_early": (8, "/status answers 404 of a run that is too young"),
    "runpod_404_expired": (8, "RunPod has forgotten a result that nobody asked for in time"),
    "runpod_404_lost": (8, "RunPod loses a run"),
    "timed_out": (9, "RunPod says TIMED_OUT"),
    "cancelled_outside": (9, "somebody cancels the run at RunPod"),
    "unknown_state": (9, "RunPod says a word that nobody knows"),
    "no_output": (10, "COMPLETED without output, or with success_no_images"),
    "late_in_progress": (11, "IN_PROGRESS after COMPLETED, for ever"),
    "webhook_duplicate": (12, "a callback is delivered twice"),
    "webhook_late": (12, "a callback is delivered late, after others of its job"),
    "webhook_forged": (12, "a callback with a wrong token, of another attempt or an unknown job"),
    "webhook_lost": (12, "a callback is never delivered"),
    "user_cancel": (13, "a user cancels, whenever it may be"),
    "user_retry": (13, "a user retries, whenever it may be"),
    "user_redrive": (13, "a user redrives, whenever it may be"),
    "user_delete": (13, "a user deletes, whenever it may be"),
    "clock_skew": (14, "a process whose clock is up to five minutes wrong"),
    "month_boundary": (14, "the month ends between creation and upload"),
    "poison_job": (15, "a picture that kills whoever uploads it"),
    "many_due": (16, "very many jobs are due at once"),
    "bad_host": (17, "the worker's host answers 503, HTML, a redirect inward, or nothing"),
    "lambda_time_limit": (18, "the Lambda is killed at its time limit"),
    "scaled_to_zero": (20, "no worker ever takes the run"),
    "runs_for_ever": (20, "a worker never ends"),
    "endpoint_changed": (21, "the endpoint in the settings changes while jobs run"),
    "old_row": (22, "rows of the earlier version, with its eleven columns, come while the new code runs"),
    "runpod_429": (5, "RunPod refuses /run for a while (429, Retry-After)"),
    "runpod_5xx": (2, "RunPod answers 5xx"),
    "spool_down": (6, "the spool fails as well"),
    "worker_failed": (9, "the worker fails"),
    "callback_down": (23, "a callback's receiver cannot be reached"),
    "callback_slow": (23, "it takes the callback, and answers too late"),
    "callback_answer_lost": (23, "it takes the callback, and its answer is lost"),
    "callback_500": (23, "it answers 500"),
    "callback_429": (23, "it answers 429 with Retry-After"),
    "callback_redirect": (23, "it redirects"),
    "callback_410": (23, "it wants to hear nothing more"),
    "callback_never": (23, "a receiver is down for good"),
    "user_replay": (13, "a user has an end told once more, whenever it may be"),
    "picture_never_put": (24, "a picture is offered, and never put"),
    "picture_unused": (24, "a picture is put, and no job uses it"),
    "picture_shared": (24, "several jobs use one picture, or want to when it may be gone"),
}


@dataclass(frozen=True)
class Fate:
    """What becomes of one call; seconds there and back, and how long the caller waits where no answer comes."""

    out: float = 0.02
    back: float = 0.02
    refused: bool = False  # nothing is sent, and that is known
    effect: bool = True  # whether the cloud gets it
    lost: bool = False  # whether its answer does not arrive
    frozen: bool = False  # whether the process never gets further
    gives_up: float = 1e9  # after how long the caller sees that none comes, if not by its own time limit
    instead: tuple[int, dict[str, str], bytes] | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of one run."""

    queue_seconds: float = 1.0
    run_seconds: float = 3.0
    verdict: str = "COMPLETED"
    shape: str = "base64"
    files: int = 1
    hidden_seconds: float = 0.0
    lost_after: float | None = None
    cancelled_after: float | None = None
    webhook: bool = True


@dataclass
class Faults:
    """No fault at all; a seed makes its own from this."""

    rates: dict[str, float] = field(default_factory=dict)
    windows: list[tuple[str, float, float]] = field(default_factory=list)  # class, from, until
    until: float = float("inf")  # when the random ones stop
    recycled: float = 0.0
    max_skew: float = 0.0
    plans: dict[tuple[str, int], Plan] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)
    scripted: list[tuple[str, Any]] = field(default_factory=list)  # (part of "service METHOD path", Fate), once each
    always: list[tuple[str, Fate]] = field(default_factory=list)  # the same, for as long as they stand here
    in_progress_for_ever: set[Any] = field(default_factory=set)

    def count(self, name: str) -> None:
        """One more of that class."""
        assert name in CLASSES, name
        self.counted[name] += 1

    def skew(self, rng: Random) -> float:
        """By how much the clock of a new process is wrong."""
        if not self.max_skew:
            return 0.0
        self.count("clock_skew")
        return rng.uniform(-self.max_skew, self.max_skew)

    def hits(self, rng: Random, name: str, now: float) -> bool:
        """Whether it happens now."""
        if now >= self.until or rng.random() >= self.rates.get(name, 0.0):
            return False
        self.count(name)
        return True

    def within(self, name: str, now: float) -> float:
        """How long the window of that class still lasts; 0 outside."""
        return max(
            (until - now for kind, begin, until in self.windows if kind == name and begin <= now < until), default=0.0
        )

    def fate(self, world: Any, service: str, method: str, url: str) -> Fate:
        """What becomes of this call."""
        rng, now = world.rng, world.now
        line = f"{service} {method} {url}"
        for n, (part, fate) in enumerate(self.scripted):
            if part in line:
                del self.scripted[n]
                return self._told(service, fate)
        for part, fate in self.always:
            if part in line:
                return self._told(service, fate)
        base = Fate(out=rng.uniform(0.005, 0.1), back=rng.uniform(0.005, 0.1))
        if self.hits(rng, "lambda_time_limit", now):
            return replace(base, frozen=True)
        if service in ("r2", "spool") and method == "PUT" and any(job in url for job in world.clouds.poison):
            self.count("poison_job")
            world.current().process.kill()
            return replace(base, effect=False, gives_up=1e9)
        for name, rate in (("crash_before_effect", "before"), ("crash_after_effect", "after")):
            if self.hits(rng, name, now):
                world.kill_at[world.calls] = rate
        return getattr(self, f"_{service}")(rng, now, method, url, base)

    def _told(self, service: str, fate: Fate) -> Fate:
        if service == "d1" and (fate.lost or not fate.effect):
            self.count("d1_answer_lost" if fate.effect else "d1_5xx")
        return fate

    def _d1(self, rng: Random, now: float, method: str, url: str, base: Fate) -> Fate:
        if left := self.within("d1_lockout", now):
            self.count("d1_lockout")
            return replace(base, **_answer(429, {"Retry-After": str(int(left) + 1)}))
        if left := self.within("d1_stall", now):
            self.count("d1_stall")
            return replace(base, out=left + rng.uniform(0, 1))
        if self.hits(rng, "d1_5xx", now):
            return replace(base, **_answer(rng.choice([500, 502, 504, 400])))
        if self.hits(rng, "d1_answer_lost", now):
            return replace(base, out=rng.choice([0.01, 0.5, 5.0, 20.0]), lost=True, gives_up=rng.choice([0.1, 1e9]))
        return base

    def _runpod(self, rng: Random, now: float, method: str, url: str, base: Fate) -> Fate:
        if self.hits(rng, "runpod_429", now):
            return replace(base, **_answer(429, {"Retry-After": str(rng.choice([5, 60, 300]))}))
        if url.endswith("/run"):
            if self.hits(rng, "run_answer_lost", now):
                return replace(base, lost=True, out=rng.choice([0.1, 3.0, 12.0]), gives_up=rng.choice([0.5, 1e9]))
            if self.hits(rng, "run_request_lost", now):
                return replace(base, effect=False, gives_up=rng.choice([0.5, 1e9]))
            if self.hits(rng, "runpod_5xx", now):
                # An edge's 5xx says nothing about whether the run exists.
                return (
                    replace(base, instead=(502, {}, b"<html>")) if rng.random() < 0.5 else replace(base, **_answer(502))
                )
        elif self.hits(rng, "runpod_5xx", now):
            return replace(base, **_answer(rng.choice([500, 502])))
        elif "/status/" in url and self.hits(rng, "unknown_state", now):
            return replace(base, instead=(200, {}, b'{"id":"x","status":"RUNNING"}'))
        return base

    def _r2(self, rng: Random, now: float, method: str, url: str, base: Fate) -> Fate:
        if self.within("r2_down", now):
            self.count("r2_down")
            kind = rng.choice(["refused", "dropped", "500"])
            if kind == "500":
                return replace(base, **_answer(500))
            return replace(base, refused=True) if kind == "refused" else replace(base, effect=False)
        if method == "PUT" and self.hits(rng, "r2_answer_lost", now):
            return replace(base, lost=True)
        return base

    def _spool(self, rng: Random, now: float, method: str, url: str, base: Fate) -> Fate:
        if self.within("spool_down", now) or self.hits(rng, "spool_down", now):
            return replace(base, **_answer(503))
        return base

    def _result(self, rng: Random, now: float, method: str, url: str, base: Fate) -> Fate:
        if self.hits(rng, "truncated_download", now):
            return replace(base, instead=(200, {"x-truncated": "1"}, b"\x89PNG\r\n\x1a\nhalf of it"))
        if self.hits(rng, "bad_host", now):
            kind = rng.choice(["503", "404", "slow", "closed"])
            if kind in ("503", "404"):
                return replace(base, **_answer(int(kind)))
            return replace(base, effect=False, gives_up=30.0 if kind == "slow" else 0.1)
        return base

    def _callback(self, rng: Random, now: float, method: str, url: str, base: Fate) -> Fate:
        fates: dict[str, dict[str, Any]] = {
            "callback_down": {"refused": True},
            "callback_slow": {"back": 30.0},
            "callback_answer_lost": {"lost": True, "gives_up": 0.1},
            "callback_500": _answer(500),
            "callback_429": _answer(429, {"Retry-After": str(rng.choice([1, 20, 600]))}),
            "callback_redirect": _answer(302, {"Location": url}),
            "callback_410": _answer(410),
        }
        for name, fate in fates.items():
            if self.hits(rng, name, now):
                return replace(base, **fate)
        return base

    def run_plan(self, rng: Random, job_id: str, attempt: int) -> Plan:
        """What becomes of a new run."""
        return self.plans.get((job_id, attempt)) or self.plans.get((job_id, 0)) or Plan()

    def says_in_progress(self, run: Any) -> bool:
        """Whether the progress of this run came after its result, and hides it."""
        return run.id in self.in_progress_for_ever or (run.job_id, run.attempt) in self.in_progress_for_ever

    def send_webhooks(self, world: Any, run: Any) -> None:
        """Have RunPod tell of the run's end; a scenario says how."""
        world.scenario.send_webhooks(run)


def _answer(status: int, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Fields of a Fate by which the cloud answers that, and does nothing."""
    body = b'{"errors":[{"code":7500,"message":"internal error"}],"success":false}' if status == 400 else b"<html>"
    return {"instead": (status, headers or {}, body), "effect": False}
