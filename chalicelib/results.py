"""Brings the files of a worker's answer into the bucket, each under its own key, one after the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from chalicelib import jobs, log, media, r2
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

# A link that is refused may be one whose file is not there yet; it is believed so long after the end of the run, if it
# was refused so often before.
LINK_PATIENCE = timedelta(minutes=3)
LINK_REFUSALS = 2
DOUBTED = frozenset({"link_forbidden", "link_not_found", "link_refused"})

LEAST_ID_CHARS = 16  # of an id that names its job alone

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

        Raises PermanentError where not one of them can ever be stored.
        """
        stored = {file["key"].rpartition(".")[0]: file for file in job.files}
        stems = [jobs.result_stem(job, number) for number in range(1, len(found.files) + 1)]
        problems: list[ServiceError] = list(found.problems)
        unfinished = None
        for stem, source in _in_order(zip(stems, found.files, strict=True), job.failures):
            error = None if stem in stored else self._try(job, stem, source, stored, deadline)
            if error is None:
                continue
            if _is_final(error, job, age):
                problems.append(error)
                continue
            unfinished = unfinished or error
            if error.service != "result":  # it is R2, or the time: no file will fare better now
                break
        if not stored and not unfinished:
            raise PermanentError(problems[0].code, problems[0].sentence, service="result")
        return Kept([stored[stem] for stem in stems if stem in stored], problems, unfinished)

    def _try(
        self, job: Job, stem: str, source: Inline | Link, stored: dict[str, File], deadline: Deadline
    ) -> ServiceError | None:
        """Store one file; whatever goes wrong concerns this file alone."""
        try:
            self._store(job, stem, source, stored, deadline)
        except ServiceError as error:
            return error
        except Exception:
            log.crashed("file_crashed", job_id=job.id)
            return TransientError("internal_error", "Storing the file failed inside the service.", service="result")
        return None

    def _store(self, job: Job, stem: str, source: Inline | Link, stored: dict[str, File], deadline: Deadline) -> None:
        """Store one file, unless it is the same as one that is stored already."""
        if deadline.left() <= PUT_RESERVE:
            raise TransientError("store_unfinished", "The time was over before every file was stored.")
        until_here = deadline.less(max(PUT_RESERVE, deadline.left() - DOWNLOAD_TIMEOUT))
        with Content(until_here) as content:
            own = self._fill(content, source, job, until_here)
            found = media.identify(content)
            sha256 = content.sha256.hex()
            if any(file["sha256"] == sha256 for file in stored.values()):
                return
            key, content_type = f"{stem}.{found.kind.ending}", found.kind.content_type
            if not (own and self._copied(own, key, content, content_type, deadline)):
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

    def _fill(self, content: Content, source: Inline | Link, job: Job, deadline: Deadline) -> r2.Source | None:
        """Get the file; where it lies in the bucket already, say where."""
        if isinstance(source, Inline):
            for piece in source.pieces():
                content.write(piece)
            return None
        key = self.bucket.key_of(source.url)
        if key and _is_named_after(key, job):
            return self._read_own(content, key, deadline)
        etag = self.fetch.download(source.url, content, timeout=deadline.cap(DOWNLOAD_TIMEOUT))
        return r2.Source(key, etag) if key and etag else None

    def _read_own(self, content: Content, key: str, deadline: Deadline) -> r2.Source:
        # With our own right to read, which a link without a signature has not: only for what names this job, else a
        # worker's answer could ask for any object of a private bucket.
        with self.bucket.read(key, deadline=deadline) as (own, pieces):
            for piece in pieces:
                content.write(piece)
                if deadline.left() <= 0:
                    raise TransientError("result_too_slow", "R2 gave the file too slowly.", service="result")
        return own

    def _copied(self, own: r2.Source, key: str, content: Content, content_type: str, deadline: Deadline) -> bool:
        """Whether R2 has copied the object; if not, for whatever reason, its bytes are here to be sent."""
        try:
            self.bucket.copy(own, key, content, content_type=content_type, deadline=deadline)
        except ServiceError as error:
            log.failed("copy_failed", error)
            return False
        return True


def _in_order(files: Iterable[tuple[str, Inline | Link]], turn: int) -> list[tuple[str, Inline | Link]]:
    """Inline files first, which need nobody; then links, another one first at each turn, so that none keeps others."""
    files = list(files)
    inline = [file for file in files if isinstance(file[1], Inline)]
    links = [file for file in files if isinstance(file[1], Link)]
    first = turn % len(links) if links else 0
    return [*inline, *links[first:], *links[:first]]


def _is_final(error: ServiceError, job: Job, age: timedelta) -> bool:
    """Whether the file will never be had, so that the others are the result."""
    if error.service == "r2":
        return False
    believed = age > LINK_PATIENCE and job.failures >= LINK_REFUSALS
    return isinstance(error, PermanentError) or (error.code in DOUBTED and believed)


def _is_named_after(key: str, job: Job) -> bool:
    return any(len(name) >= LEAST_ID_CHARS and name in key for name in (job.id, job.runpod_job_id or ""))
