"""What must hold of pictures that go into jobs: used ones stay, unused ones go, and none is without a row."""

import json
from typing import Any

PREFIX = "uploads/"

Row = dict[str, Any]


class Pictures:
    """Watches what lies under uploads/ in R2."""

    def __init__(self, world: Any, invariants: Any) -> None:
        self._world = world
        self._check = invariants.check
        self._seen: set[str] = set()

    def _there(self) -> set[str]:
        return {key for key in self._world.clouds.r2.objects if key.startswith(PREFIX)}

    def _offered(self) -> set[str]:
        return {row["key"] for row in self._world.clouds.execute("SELECT key FROM uploads")}

    def after_r2(self, method: str, key: str) -> None:
        """An object came or went."""
        if not key.startswith(PREFIX):
            return
        if method == "PUT":
            self._check(key in self._offered(), f"{key} was put, and is not written down")
        if method == "DELETE":
            users = self._world.clouds.execute("SELECT id FROM jobs WHERE instr(pictures, ?)", key)
            self._check(not users, f"{key} was removed, and {users} use it")

    def after_write(self, jobs: dict[str, Row]) -> None:
        """What a new job uses is there, and whatever is there has its row."""
        there = self._there()
        for job_id in jobs.keys() - self._seen:
            missing = _keys(jobs[job_id]) - there
            self._check(not missing, f"{job_id} was made, and {missing} is not there")
        self._seen |= jobs.keys()
        if there:
            unknown = there - self._offered()
            self._check(not unknown, f"{unknown} is left, and nobody knows of it")

    def at_run(self, job_id: str, given: str) -> None:
        """A worker is told where its pictures are."""
        for row in self._world.clouds.execute("SELECT pictures FROM jobs WHERE id = ?", job_id):
            for key in _keys(row):
                self._check(key in given and key in self._there(), f"{job_id} was sent without its picture {key}")

    def at_rest(self, jobs: dict[str, Row]) -> None:
        """A day later only what is used is there."""
        used = {key for job in jobs.values() for key in _keys(job)}
        self._check(self._there() == used, f"in R2 are {self._there() - used}, which no job uses")
        self._check(self._offered() == used, f"written down are {self._offered() ^ used} too many, or too few")


def _keys(job: Row) -> set[str]:
    return {picture["key"] for picture in json.loads(job["pictures"] or "[]")}
