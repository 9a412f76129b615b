"""
Whether and when to try again: values, and two pure functions. README says what they come to.

Two loops use them and never mix: inside a call (idempotent ones only, while time is left) and between rounds (due_at).
That RunPod does not tell a run's status has no policy: the next round asks again, until the job's deadline.
"""

from random import Random

from chalicelib.records import dataclass


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Wait initial × factor^(n-1) seconds after the n-th failure in a row, at most maximum, less up to jitter of it."""

    initial: float
    factor: float
    maximum: float
    jitter: float


# Inside one call to D1: 0.2 s, 0.4 s, then the error is the caller's. A third try has seldom helped a stalled D1.
CALL = Backoff(initial=0.2, factor=2, maximum=2, jitter=0.5)
CALL_ATTEMPTS = 3

# RunPod refused /run and nothing was bought: 15 s, 30 s, 1 min, 2 min, 4 min, then every 5 min. The tenth try comes
# half an hour after the first.
SUBMIT = Backoff(initial=15, factor=2, maximum=300, jitter=0.2)

# A finished picture could not be fetched or put: 10 s, 20 s, 40 s, 80 s, then every 2 min. RunPod forgets after 30 min,
# so there are about fifteen tries before that.
STORE = Backoff(initial=10, factor=2, maximum=120, jitter=0.2)

# A picture that is safe in the spool: 10 s, 20 s … 5 min, then every 10 min; about 160 tries in the day that it has.
SPOOLED = Backoff(initial=10, factor=2, maximum=600, jitter=0.2)


def seconds_to_wait(policy: Backoff, failures: int, *, rng: Random, retry_after: float | None = None) -> float:
    """
    Seconds to wait after the given number of failures in a row (1 or more).

    A server's Retry-After wins over the schedule; up to a second is added, so that not all who wait come back at once.
    """
    if retry_after is not None:
        return retry_after + rng.random()
    # The exponent is capped because a float overflows after a thousand failures.
    wait = min(policy.maximum, policy.initial * policy.factor ** min(failures - 1, 64))
    return wait * (1 - policy.jitter * rng.random())


# Failures of a run that are RunPod's, not the worker's: another attempt may well go better.
PLATFORM_FAILURES = frozenset({"runpod_timed_out", "runpod_lost"})


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """How many GPU runs a job may have without its user; what a worker failed is repeated only where that is set."""

    maximum: int
    worker_failed: bool = False

    def allow(self, code: str, *, made: int) -> bool:
        """Whether another attempt may be made after this failure of the `made`-th."""
        retryable = code in PLATFORM_FAILURES or (self.worker_failed and code == "worker_failed")
        return retryable and made < self.maximum
