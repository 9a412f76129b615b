"""Figures of the last days, from the newest jobs of them; each answer stands for half a minute."""

from dataclasses import field
from datetime import timedelta
from typing import Any

from chalicelib.d1 import D1
from chalicelib.jobs import Status, to_text
from chalicelib.queries import bind
from chalicelib.reads import Recent
from chalicelib.records import dataclass
from chalicelib.runtime import Clock

LOOKED_AT = 10_000  # jobs at most, the newest
KEPT_SECONDS = 30.0
SPANS = ("queue", "run", "store", "total")
MARKS = ("p50", "p95", "p99")

Figures = dict[str, Any]


@dataclass(kw_only=True)
class Stats:
    """One for each process."""

    d1: D1
    clock: Clock
    _recent: Recent = field(init=False)

    def __post_init__(self) -> None:
        self._recent = Recent(self.clock, seconds=KEPT_SECONDS)

    def of(self, days: int, *, timeout: float) -> Figures:
        """
        Counts, success rate, times in milliseconds and cost in US dollars of the jobs made in so many days; one D1
        call.
        """
        return self._recent.get(days, lambda: self._read(days, timeout))

    def _read(self, days: int, timeout: float) -> Figures:
        since = self.clock.now().replace(second=0, microsecond=0) - timedelta(days=days)
        values = {"since": to_text(since), "limit": LOOKED_AT}
        names = ["count_by_status", "measure_spans", "sum_costs"]
        counted, spans, costs = self.d1.query([bind(name, values) for name in names], timeout=timeout)
        jobs = {status.value: 0 for status in Status} | {row["status"]: row["jobs"] for row in counted}
        looked_at = sum(row["jobs"] for row in counted)
        whole = looked_at < LOOKED_AT
        return {
            "since": to_text(since) if whole else min(row["first"] for row in counted),
            "complete": whole,
            "jobs": jobs,
            "success_rate": _rate(jobs["done"], jobs["error"]),
            "milliseconds": _spans({row["span"]: row for row in spans}),
            "costs": [_cost(row) for row in costs],
            "cost": _sum(counted),
        }


def _rate(done: int, failed: int) -> float | None:
    """Of the jobs that ended by themselves; a cancelled one says nothing."""
    return round(done / (done + failed), 4) if done + failed else None


def _spans(rows: dict[str, Any]) -> Figures:
    return {
        span: {mark: round(rows[span][mark]) if span in rows else None for mark in MARKS}
        | {"jobs": rows[span]["jobs"] if span in rows else 0}
        for span in SPANS
    }


def _cost(row: Any) -> Figures:
    return {
        "day": row["day"],
        "model": row["model"],
        "jobs": row["jobs"],
        "usd": row["cost"],
        "wasted_usd": row["wasted"],
        "unknown_attempts": row["uncosted"],
    }


def _sum(rows: list[Any]) -> Figures:
    return {
        "usd": _added([row["cost"] for row in rows]),
        "wasted_usd": _added([row["wasted"] for row in rows]),
        "unknown_attempts": sum(row["uncosted"] for row in rows),
    }


def _added(amounts: list[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return round(sum(known), 6) if known else None
