"""
The table as callers read it: one job, lists by a filter, counts. Answers are kept for a moment, so that the calls to D1
do not grow with the number of those who ask.
"""

import json
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import field, replace
from typing import Any, TypeVar

from chalicelib.d1 import D1, Row
from chalicelib.jobs import DEFAULT_MODEL, NEWEST, Job, Status
from chalicelib.queries import bind
from chalicelib.records import dataclass
from chalicelib.runtime import Clock

KEPT_SECONDS = 1.5  # for which an answer stands
KEPT_ANSWERS = 500  # at most
ASKED_SECONDS = 15.0  # for which a job that was asked for is read together with others
READ_TOGETHER = 50  # jobs at most
SEARCHED = 5_000  # jobs that are looked at where no index answers the whole filter
COUNTED = 1_000  # jobs of a status, from which on they are not counted further

Cursor = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which jobs are meant: of one of these statuses, and all else that is given."""

    statuses: tuple[str, ...] = tuple(Status)
    model: str | None = None
    created_after: str = ""
    created_before: str = NEWEST[0]
    metadata: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    dead_only: bool = False

    @property
    def lookup(self) -> str:
        """What finds the jobs; the rest of the filter picks from them."""
        if self.metadata:
            return "metadata"
        if self.model is not None:
            return "model"
        return "time" if set(self.statuses) == set(Status) else "status"

    @property
    def picks(self) -> bool:
        """Whether jobs that were found may be left out again."""
        beside = self.model is not None or set(self.statuses) != set(Status) or len(self.metadata) > 1
        return self.text is not None or self.dead_only or (self.lookup == "metadata" and beside)


@dataclass(frozen=True, kw_only=True)
class Page:
    """Jobs of a list, newest first, and how many there are of each status where that was asked."""

    jobs: list[Job]
    counts: dict[str, int] | None


@dataclass()
class _Kept:
    answer: Future[Any] = field(default_factory=Future)
    until: float = float("inf")  # while it is being read


class Recent:
    """Answers of a moment ago, failures too. Of several who ask the same at once one reads, the others wait for it."""

    def __init__(self, clock: Clock, *, seconds: float = KEPT_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._kept: dict[Hashable, _Kept] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """What is kept under the key, or else what is read now. Raises what reading raised."""
        with self._lock:
            kept = self._kept.get(key)
            mine = kept is None or kept.until <= self._clock.monotonic()
            if mine or kept is None:
                self._make_room()
                kept = self._kept[key] = _Kept()
        if mine:
            self._read(kept, read)
        answer: T = kept.answer.result()
        return answer

    def _make_room(self) -> None:
        if len(self._kept) >= KEPT_ANSWERS:
            self._kept.clear()

    def _read(self, kept: _Kept, read: Callable[[], object]) -> None:
        try:
            kept.answer.set_result(read())
        except BaseException as error:  # those who wait for it must not wait in vain
            kept.answer.set_exception(error)
        kept.until = self._clock.monotonic() + self._seconds

    def put(self, key: Hashable, answer: object) -> None:
        """Keep what was read for another."""
        kept = _Kept(until=self._clock.monotonic() + self._seconds)
        kept.answer.set_result(answer)
        with self._lock:
            self._make_room()
            self._kept[key] = kept

    def clear(self) -> None:
        """Forget all, for something has changed; what is being read just now is not kept either."""
        with self._lock:
            self._kept.clear()


class Reads:
    """Each answer is one D1 call of at most `timeout` seconds, and raises what D1.query raises."""

    def __init__(self, *, d1: D1, clock: Clock, max_running: int | None) -> None:
        self._d1 = d1
        self._clock = clock
        self._max_running = max_running
        self._recent = Recent(clock)
        self._asked: dict[str, float] = {}
        self._together = threading.Lock()

    def forget(self) -> None:
        """Read anew from now on: this process has written."""
        self._recent.clear()

    def job(self, job_id: str, *, timeout: float) -> Job | None:
        """One job, together with those that others have asked for lately: twelve who poll cost as much as one."""
        with self._together:
            self._asked[job_id] = self._clock.monotonic()
            return self._recent.get(("job", job_id), lambda: self._read_together(job_id, timeout))

    def _read_together(self, job_id: str, timeout: float) -> Job | None:
        since = self._clock.monotonic() - ASKED_SECONDS
        self._asked = {asked: at for asked, at in self._asked.items() if at > since}
        ids = [job_id, *(asked for asked in reversed(self._asked) if asked != job_id)][:READ_TOGETHER]
        found = {job.id: job for job in self.several(ids, timeout=timeout)}
        for other in ids[1:]:
            self._recent.put(("job", other), found.get(other))
        return found.get(job_id)

    def several(self, ids: list[str], *, timeout: float) -> list[Job]:
        """These jobs but for their inputs, in no order; those that are not there are missing."""
        return [Job.from_row(row) for row in self._run("select_jobs", {"ids": json.dumps(ids)}, timeout)]

    def job_with_timeline(self, job_id: str, *, timeout: float) -> tuple[Job | None, list[Row]]:
        """One job, whole, and what happened to it, oldest first; of very much the last 500 lines."""
        return self._recent.get(("timeline", job_id), lambda: self.job_with_timeline_now(job_id, timeout=timeout))

    def job_with_timeline_now(self, job_id: str, *, timeout: float) -> tuple[Job | None, list[Row]]:
        """The same, though it was read a moment ago."""
        names = ["select_seen_job", "select_timeline"]
        rows, timeline = self._query([(name, {"id": job_id}) for name in names], timeout)
        return (Job.from_row(rows[0]) if rows else None), timeline[::-1]

    def page(self, wanted: Filter, *, limit: int, after: Cursor, counts: bool, timeout: float) -> Page:
        """Jobs newest first, those after the given (created_at, id)."""
        key = (wanted, limit, after, counts)
        return self._recent.get(key, lambda: self._read_page(wanted, limit, after, counts, timeout))

    def _read_page(self, wanted: Filter, limit: int, after: Cursor, counts: bool, timeout: float) -> Page:
        asked = [("list_jobs", _values(wanted, limit=limit, after=after))]
        if counts:
            asked.append(("count_jobs", _values_to_count(wanted)))
        rows, *counted = self._query(asked, timeout)
        return Page(jobs=[Job.from_row(row) for row in rows], counts=_counts(counted[0]) if counted else None)

    def find(self, wanted: Filter, *, limit: int, after: Cursor, timeout: float) -> list[Cursor]:
        """The (created_at, id) of jobs as page() has them, as they are now."""
        rows = self._run("find_jobs", _values(wanted, limit=limit, after=after), timeout)
        return [(row["created_at"], row["id"]) for row in rows]

    def dead_letters(
        self, *, limit: int, after: Cursor = NEWEST, error_code: str | None = None, timeout: float
    ) -> list[Job]:
        """Results that could not be stored, newest first, those after the given (dead_at, id)."""
        values = {"limit": limit, "dead_at": after[0], "id": after[1], "error_code": error_code}
        return [Job.from_row(row) for row in self._run("list_dead_letters", values, timeout)]

    def _run(self, name: str, values: dict[str, Any], timeout: float) -> list[Row]:
        return self._query([(name, values)], timeout)[0]

    def _query(self, asked: list[tuple[str, dict[str, Any]]], timeout: float) -> list[list[Row]]:
        statements = [bind(name, {**values, "max_running": self._max_running}) for name, values in asked]
        return self._d1.query(statements, timeout=timeout)


def _values(wanted: Filter, *, limit: int, after: Cursor) -> dict[str, Any]:
    """
    What the queries ask for. Where jobs are picked from those that an index finds, these are the newest ones for every
    page, else the page's own.
    """
    newest = (wanted.created_before, "")
    begin = newest if wanted.picks else min(newest, after)
    window = SEARCHED if wanted.picks else limit
    return {
        "lookup": wanted.lookup,
        "from_at": begin[0],
        "from_id": begin[1],
        "after": wanted.created_after,
        "each": window,
        "window": window,
        "created_at": after[0],
        "id": after[1],
        "statuses": json.dumps(wanted.statuses),
        "models": None if wanted.model is None else json.dumps(_models(wanted.model)),
        "key": wanted.metadata[0][0] if wanted.metadata else None,
        "value": wanted.metadata[0][1] if wanted.metadata else None,
        "words": json.dumps(dict(wanted.metadata), ensure_ascii=False),
        "text": wanted.text,
        "dead_only": 1 if wanted.dead_only else None,
        "limit": limit,
    }


def _models(model: str) -> list[str | None]:
    # Rows of the earlier version may have none, which is the default one.
    return [model, None] if model == DEFAULT_MODEL else [model]


def _values_to_count(wanted: Filter) -> dict[str, Any]:
    """The same for all statuses, each counted as far as it is worth it."""
    every = replace(wanted, statuses=tuple(Status))
    values = _values(every, limit=SEARCHED * len(Status), after=NEWEST)
    if every.lookup == "time":
        values["lookup"] = "status"
    if not every.picks:
        values |= {"each": SEARCHED if wanted.metadata else COUNTED, "window": SEARCHED * len(Status)}
    return values


def _counts(rows: list[Row]) -> dict[str, int]:
    found = {row["status"]: min(row["jobs"], COUNTED) for row in rows}
    return {status.value: found.get(status, 0) for status in Status}
