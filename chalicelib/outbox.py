"""The outbox of callbacks as a table: what is due is claimed, what came of it is written down. One D1 call each."""

import json
from datetime import datetime, timedelta
from typing import Any

from chalicelib.d1 import D1, Row
from chalicelib.jobs import Job, to_text
from chalicelib.queries import bind
from chalicelib.records import dataclass

AT_ONCE = 100  # deliveries that one claim takes
OF_HOST = 50  # of them to one host
WINDOW = 1_000  # of the due ones that a claim picks from, the oldest, and as many of the newest


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One end of a job that is to be told, with the job as it was then; `tries` with the one that it is claimed for."""

    job_id: str
    version: int
    type: str
    url: str
    data: dict[str, Any]
    created_at: str
    tries: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    What came of one try: how the delivery stands now, when it is tried again, and the line of its log; None where it
    was not made.
    """

    delivery: Delivery
    status: str
    due_at: str | None
    line: dict[str, Any] | None


class Outbox:
    """Every method raises what D1.query raises."""

    def __init__(self, *, d1: D1) -> None:
        self._d1 = d1

    def claim(
        self, *, nonce: str, now: datetime, lease: float, timeout: float, job_id: str | None = None
    ) -> list[Delivery]:
        """Take what is due for `lease` seconds, oldest first; of one job alone where its id is given."""
        values = {
            "nonce": nonce,
            "now": to_text(now),
            "lease_until": to_text(now + timedelta(seconds=lease)),
            "job_id": job_id,
            "limit": AT_ONCE,
            "of_host": OF_HOST,
            "window": WINDOW,
        }
        claim = "claim_deliveries" if job_id is None else "claim_deliveries_of"
        *_, rows = self._run([claim, "select_claimed_deliveries"], values, timeout)
        return [Delivery(**{**row, "data": json.loads(row["data"])}) for row in rows]

    def settle(self, outcomes: list[Outcome], *, nonce: str, timeout: float) -> None:
        """Write down what came of those that this nonce has taken; of another one's nothing is written."""
        rows = [
            {
                "job_id": outcome.delivery.job_id,
                "version": outcome.delivery.version,
                "status": outcome.status,
                "due_at": outcome.due_at,
                "line": outcome.line,
            }
            for outcome in outcomes
        ]
        self._run(["settle_deliveries"], {"rows": json.dumps(rows, ensure_ascii=False), "nonce": nonce}, timeout)

    def of(self, job_id: str, *, timeout: float) -> tuple[Job | None, list[Row]]:
        """The job in short, if there is one, and what was to be told of it, oldest first."""
        values = {"ids": json.dumps([job_id]), "job_id": job_id}
        jobs, rows = self._run(["select_runpod_ids", "select_deliveries"], values, timeout)
        return (Job.from_row(jobs[0]) if jobs else None), rows

    def replay(self, job_id: str, n: int, *, now: datetime, timeout: float) -> list[Row]:
        """Make one due again, with the whole schedule before it; what there is of the job then."""
        values = {"job_id": job_id, "n": n, "now": to_text(now)}
        return self._run(["replay_delivery", "select_deliveries"], values, timeout)[-1]

    def _run(self, names: list[str], values: dict[str, Any], timeout: float) -> list[list[Row]]:
        return self._d1.query([bind(name, values) for name in names], timeout=timeout)
