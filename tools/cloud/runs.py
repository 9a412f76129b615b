"""A run at RunPod: what was sent, and what has become of it at a given instant."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUEUE_SECONDS = 1.0
RUN_SECONDS = 3.0
KEPT_SECONDS = 1800.0

WEEK_MS = 7 * 24 * 3600 * 1000
EXECUTION_TIMEOUT_MS = 600_000.0
TTL_MS = 24 * 3600 * 1000.0
BOUNDS_MS = {"executionTimeout": (5_000, WEEK_MS), "ttl": (10_000, WEEK_MS)}
WORKER_STATES = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as it was sent."""

    id: str
    endpoint_id: str
    input: dict[str, Any]
    created_at: float
    cancelled_at: float | None = None
    webhook: str | None = None
    execution_timeout_ms: float | None = None
    ttl_ms: float | None = None
    tries: int = 0  # of the webhook
    error: str | None = None  # of its worker, once that is known
    not_before: float | None = None  # no worker takes it earlier; infinite while the endpoint's runs are held

    @property
    def wish(self) -> dict[str, Any]:
        """What the input asks to be simulated."""
        wish = self.input.get("simulate")
        return wish if isinstance(wish, dict) else {}

    @property
    def starts_at(self) -> float:
        """When a worker takes it."""
        due_at = self.created_at + float(self.wish.get("queue_seconds", QUEUE_SECONDS))
        return max(due_at, self.not_before or due_at)

    @property
    def ends_at(self) -> float:
        """When it is finished, or has worked for too long."""
        return self.starts_at + min(self._work_seconds, self._allowed_seconds)

    @property
    def outcome(self) -> tuple[str, str]:
        """The status it ends with by itself, and the error."""
        if self._work_seconds > self._allowed_seconds:
            return "FAILED", "executionTimeout exceeded"
        if self.error is not None:
            return "FAILED", self.error
        status = str(self.wish.get("status", "COMPLETED"))
        return status, "" if status == "COMPLETED" else self.wish.get("error", "simulated")

    @property
    def gone_at(self) -> float:
        """When RunPod forgets it: when its ttl ends before it does, else half an hour after its end."""
        over_at = self.ends_at if self.cancelled_at is None else self.cancelled_at
        expires_at = self.created_at + (self.ttl_ms or TTL_MS) / 1000
        return expires_at if expires_at <= over_at else over_at + KEPT_SECONDS

    @property
    def reports_at(self) -> float | None:
        """When its webhook is called. Nobody has seen one for a run that was cancelled, timed out or expired."""
        is_told = bool(self.webhook) and self.outcome[0] in ("COMPLETED", "FAILED") and self.ends_at < self.gone_at
        return self.ends_at if is_told else None

    def status(self, now: float) -> str:
        """What RunPod calls it at that instant."""
        if self.cancelled_at is not None:
            return "CANCELLED"
        if now < self.starts_at:
            return "IN_QUEUE"
        return "IN_PROGRESS" if now < self.ends_at else self.outcome[0]

    def progress(self, now: float) -> str | None:
        """How far a worker says that it is, None where it says nothing."""
        pieces = self.wish.get("progress")
        if pieces is None:
            return None
        return f"{int(pieces * min((now - self.starts_at) / self._work_seconds, 1))}/{pieces}"

    @property
    def _work_seconds(self) -> float:
        return float(self.wish.get("run_seconds", RUN_SECONDS))

    @property
    def _allowed_seconds(self) -> float:
        return (self.execution_timeout_ms or EXECUTION_TIMEOUT_MS) / 1000


def health(runs: list[Run], now: float, workers: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The counters of an endpoint with these runs; one worker idles while there is nothing to do, or as it is told."""
    statuses = [run.status(now) for run in runs]
    running = statuses.count("IN_PROGRESS")
    idle = 0 if running else 1
    counted = {"idle": idle, "ready": idle, "running": running} if workers is None else workers
    return {
        "jobs": {
            "completed": statuses.count("COMPLETED"),
            "failed": statuses.count("FAILED") + statuses.count("TIMED_OUT"),
            "inProgress": running,
            "inQueue": statuses.count("IN_QUEUE"),
            "retried": 0,
        },
        "workers": {state: counted.get(state, 0) for state in WORKER_STATES},
    }


def fault(order: Mapping[str, Any]) -> str | None:
    """What is wrong with the body of a /run."""
    policy = order.get("policy")
    if not isinstance(order.get("input"), dict):
        return "input is required and must be an object"
    if not isinstance(order.get("webhook"), (str, type(None))):
        return "webhook must be a string"
    if not isinstance(policy, (dict, type(None))):
        return "policy must be an object"
    for name, (least, most) in BOUNDS_MS.items():
        value = (policy or {}).get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and least <= value <= most):
            return f"policy.{name} must be from {least} to {most} milliseconds"
    return None


def health_fault(wish: Mapping[str, Any]) -> str | None:
    """What is wrong with the health that is to be simulated."""
    workers = wish.get("workers", ())
    if not isinstance(workers, (dict, type(None))):
        return "workers is required and must be an object, or null"
    if not set(workers or ()) <= set(WORKER_STATES):
        return f"workers are {', '.join(WORKER_STATES)}"
    if not all(type(count) is int and count >= 0 for count in (workers or {}).values()):
        return "workers are counted in whole numbers"
    return None if isinstance(wish.get("hold", False), bool) else "hold must be true or false"
