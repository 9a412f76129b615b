"""Brings the files of a worker's answer into the bucket, each under its own key, one after the other."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from chalicelib import jobs, media, r2
from chalicelib.content import Content
from chalicelib.errors import PermanentError, ServiceError, TransientError
from chalicelib.fetch import Fetch
from chalicelib.inline import Inline
from chalicelib.jobs import Job
from chalicelib.outputs import Findings, Link
from chalicelib.r2 import R2
from chalicelib.runtime import Deadline

DOWNLOAD_TIMEOUT = 25.0  # seconds for a link
PUT_RESERVE = r2.CALL_SECONDS + 2.0  # seconds that must be left when a put begins: for it, and to have it confirmed

# A link that is refused may be one whose file is not there yet; this long after the end of the run it is believed.
LINK_PATIENCE = timedelta(minutes=3)
DOUBTED = frozenset({"link_forbidden", "link_not_found", "link_refused"})

File = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """What is in the bucket, what is wrong with the other files for good, and why it must be tried again, if so."""

    files: list[File]
    problems: list[ServiceError]
    error: ServiceError | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """Takes files to the bucket from wherever the worker left them."""

    fetch: Fetch
    bucket: R2

    def keep(self, job: Job, found: Findings, deadline: Deadline, *, age: timedelta) -> Kept:
        """
        Store every file of an answer that is not stored yet; `age` is how long ago the run ended.

        Raises PermanentError, that of the first file, where not one of them can ever be stored.
        """
        stored = {file["key"].rpartition(".")[0]: file for file in job.files}
        stems = [jobs.result_stem(job, number) for number in range(1, len(found.files) + 1)]
        problems: list[ServiceError] = list(found.problems)
        unfinished = None
        for stem, source in zip(stems, found.files, strict=True):
            if stem in stored:
                continue
            try:
                self._store(stem, source, stored, deadline)
            except ServiceError as error:
                if _is_final(error, age):
                    problems.append(error)
                    continue
                unfinished = unfinished or error
                if error.service != "result":  # it is R2, or the time: no file will fare better now
                    break
        if not stored and not unfinished:
            raise PermanentError(problems[0].code, problems[0].sentence, service="result")
        return Kept([stored[stem] for stem in stems if stem in stored], problems, unfinished)

    def _store(self, stem: str, source: Inline | Link, stored: dict[str, File], deadline: Deadline) -> None:
        """Store one file, unless it is the same as one that is stored already."""
        seconds = deadline.left() - PUT_RESERVE
        if seconds <= 0:
            raise TransientError("store_unfinished", "The time was over before every file was stored.")
        with Content(patience=seconds) as content:
            own = self._fill(content, source, deadline)
            found = media.identify(content)
            sha256 = content.sha256.hex()
            if any(file["sha256"] == sha256 for file in stored.values()):
                return
            key, content_type = f"{stem}.{found.kind.ending}", found.kind.content_type
            if own:
                self.bucket.copy(own, key, content, content_type=content_type, deadline=deadline)
            else:
                self.bucket.put(key, content, content_type=content_type, deadline=deadline)
        stored[stem] = {
            "key": key,
            "url": self.bucket.public_url(key),
            "content_type": content_type,
            "bytes": content.size,
            "sha256": sha256,
            "width": found.width,
            "height": found.height,
        }

    def _fill(self, content: Content, source: Inline | Link, deadline: Deadline) -> r2.Source | None:
        """Get the file; where it lies in the bucket already, say where."""
        if isinstance(source, Inline):
            for piece in source.pieces():
                content.write(piece)
            return None
        key = self.bucket.key_of(source.url)
        if key is None:
            timeout = deadline.cap(DOWNLOAD_TIMEOUT, reserve=PUT_RESERVE)
            self.fetch.download(source.url, content, timeout=timeout)
            return None
        # It is read even so, for what is recorded of it; only the way back is spared.
        with self.bucket.read(key, deadline=deadline) as (own, pieces):
            for piece in pieces:
                content.write(piece)
                if deadline.left() < PUT_RESERVE:
                    raise TransientError("store_unfinished", "The time was over before the file was read.")
        return own


def _is_final(error: ServiceError, age: timedelta) -> bool:
    """Whether the file will never be had, so that the others are the result."""
    if error.service == "r2":
        return False
    return isinstance(error, PermanentError) or (error.code in DOUBTED and age > LINK_PATIENCE)
