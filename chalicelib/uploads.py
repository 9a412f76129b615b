"""Pictures that go into jobs: offered to callers to be put, fetched from their links, looked at, and swept."""

import json
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

from chalicelib import log, media
from chalicelib.content import Content
from chalicelib.d1 import D1
from chalicelib.errors import RequestError, ServiceError, TransientError, no_picture
from chalicelib.fetch import Fetch
from chalicelib.jobs import new_id, to_text
from chalicelib.queries import bind
from chalicelib.r2 import R2
from chalicelib.records import dataclass
from chalicelib.results import DOUBTED
from chalicelib.runtime import Clock, Crew, Deadline

MAX_BYTES = 20_000_000  # of one picture
PUT_WITHIN = timedelta(minutes=10)
UNUSED_FOR = timedelta(days=1)  # that one is kept which no job uses
FETCH_TIMEOUT = 8.0  # seconds for a picture behind a link
D1_TIMEOUT = 8.0  # seconds
THREADS = 8  # that look at pictures, or remove them, side by side
SWEPT_AT_ONCE = 100
PREFIX = "uploads/"
SECRET_PARTS = re.compile(r"(?is)(?<=://)[^/?#]*@|[?#].*")
TYPES = tuple(sorted({kind for _, kind in media.KINDS.values() if kind.startswith("image/")}))


@dataclass(kw_only=True)
class Uploads:
    """The pictures of one bucket; what is offered has a row from the first moment, so that nothing is left there."""

    d1: D1
    bucket: R2
    fetch: Fetch
    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew] = Crew

    def offer(self, *, content_type: str, size: int, deadline: Deadline) -> dict[str, Any]:
        """A key, and the address at which its caller may put a picture of that type and size. Raises what D1 raises."""
        key = self._new_key()
        self._write_down([key], deadline)
        seconds = int(PUT_WITHIN.total_seconds())
        url = self.bucket.presign_put(key, content_type=content_type, size=size, seconds=seconds)
        expires_at = to_text(self.clock.now().replace(microsecond=0) + PUT_WITHIN)
        headers = {"Content-Type": content_type}
        return {"key": key, "method": "PUT", "url": url, "headers": headers, "expires_at": expires_at}

    def take(self, wanted: Iterable[str], deadline: Deadline) -> dict[str, str]:
        """
        The key of each picture: of one that was uploaded its own, of a link that of the copy which is made here. Every
        one of them is there, and a picture.

        Raises RequestError, whose sentence names the one that cannot be used, and what D1 and R2 raise.
        """
        keys = {one: one if one.startswith(PREFIX) else self._new_key() for one in dict.fromkeys(wanted)}
        if fetched := [key for one, key in keys.items() if one != key]:
            self._write_down(fetched, deadline)
        with self.new_crew(THREADS) as crew:
            for one, key in keys.items():
                crew.start(
                    partial(self._look_at, key, deadline) if one == key else partial(self._copy, one, key, deadline)
                )
            while crew.busy:
                for error in crew.wait(1.0):
                    if isinstance(error, BaseException):
                        raise error
        return keys

    def sweep(self, deadline: Deadline) -> int:
        """Remove the pictures that no job has used in time, at most a hundred; how many. Raises what D1 raises."""
        values = {"now": to_text(self.clock.now()), "limit": SWEPT_AT_ONCE}
        names = ["mark_unused", "select_marked"]
        *_, rows = self.d1.query([bind(name, values) for name in names], timeout=deadline.cap(D1_TIMEOUT))
        removed: list[str] = []
        with self.new_crew(THREADS) as crew:
            for row in rows:
                crew.start(partial(self._remove, row["key"], deadline))
            while crew.busy:
                removed += [key for key in crew.wait(1.0) if isinstance(key, str)]
        if removed:
            swept = bind("forget_swept", {"uploads": json.dumps(removed)})
            self.d1.query([swept], timeout=deadline.cap(D1_TIMEOUT))
        return len(removed)

    def _new_key(self) -> str:
        return f"{PREFIX}{self.clock.now():%Y/%m/%d}/{new_id(self.rng)}"

    def _write_down(self, keys: list[str], deadline: Deadline) -> None:
        now = self.clock.now()
        values = {"now": to_text(now), "due_at": to_text(now + UNUSED_FOR), "uploads": json.dumps(keys)}
        self.d1.query([bind("offer_uploads", values)], timeout=deadline.cap(D1_TIMEOUT))

    def _look_at(self, key: str, deadline: Deadline) -> None:
        try:
            beginning, size = self.bucket.beginning(key, media.HEAD_BYTES, deadline=deadline)
        except ServiceError as error:
            if error.code in ("link_not_found", "r2_missing"):
                raise no_picture(key) from error
            if error.code == "r2_empty":
                raise _not_usable(key, "is empty") from error
            raise
        if size > MAX_BYTES:
            raise _not_usable(key, f"has more than {MAX_BYTES // 1_000_000} MB")
        if media.sort_of(beginning) != "image":
            raise _not_usable(key, "is no picture")

    def _copy(self, url: str, key: str, deadline: Deadline) -> None:
        with Content(deadline, most=MAX_BYTES) as content:
            try:
                self.fetch.download(url, content, timeout=deadline.cap(FETCH_TIMEOUT))
                kind = media.identify(content).kind
            except ServiceError as error:
                raise _why_not(url, error) from error
            if not kind.content_type.startswith("image/"):
                raise _not_usable(url, "is no picture")
            self.bucket.put(key, content, content_type=kind.content_type, deadline=deadline)

    def _remove(self, key: str, deadline: Deadline) -> str | None:
        try:
            self.bucket.delete(key, deadline=deadline)
        except ServiceError as error:
            log.failed("upload_not_removed", error)
            return None
        return key


def _why_not(url: str, error: ServiceError) -> ServiceError:
    if error.code == "unknown_type":
        return _not_usable(url, "is no picture")
    if isinstance(error, TransientError) and error.code not in DOUBTED:
        later = TransientError("image_unavailable", f"The picture {_named(url)} cannot be had now: {error.sentence}")
        later.plain = f"A picture cannot be had now: {error.plain}"  # its path may be a key, too
        return later
    return _not_usable(url, f"cannot be used: {error.sentence}")


def _not_usable(one: str, why: str) -> RequestError:
    return RequestError("image_unusable", f"The picture {_named(one)} {why.rstrip('.')}.")


def _named(one: str) -> str:
    """A key, or of a link what is no secret."""
    return (one if one.startswith(PREFIX) else SECRET_PARTS.sub("", one))[:120]
