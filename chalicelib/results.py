"""Brings the files of a worker's answer into the bucket, or while R2 fails into the spool, one after the other."""

import json
from collections.abc import Iterable
from dataclasses import field
from datetime import timedelta

from chalicelib import jobs, log, media, r2
from chalicelib.content import Content
from chalicelib.errors import PermanentError, ServiceError, TransientError
from chalicelib.fetch import Fetch
from chalicelib.inline import Inline
from chalicelib.jobs import File, Job
from chalicelib.outputs import Findings, Link
from chalicelib.r2 import R2
from chalicelib.records import dataclass
from chalicelib.runtime import Clock, Deadline
from chalicelib.spool import Spool

DOWNLOAD_TIMEOUT = 25.0  # seconds for a link
PUT_SECONDS = r2.CALL_SECONDS + 2.0  # seconds that must be left when a put begins: for it, and to have it confirmed
R2_RESTS = 30.0  # seconds after a failure for which files go to the spool without asking R2

# A link that is refused may be one whose file is not there yet; it is believed so long after the end of the run, if it
# was refused so often before.
LINK_PATIENCE = timedelta(minutes=3)
LINK_REFUSALS = 2
DOUBTED = frozenset({"link_forbidden", "link_not_found", "link_refused"})

LEAST_ID_CHARS = 16  # of an id that names its job alone

SETTLED = ""  # stands for the link of a file that need not be fetched again


@dataclass(frozen=True)
class Spooled:
    """A file that lies in the spool."""

    file: File


Source = Inline | Link | Spooled


@dataclass(frozen=True)
class Kept:
    """
    What is in the bucket or the spool by now, where the rest can be fetched again, what is wrong with files for good,
    and why it must be tried again, if so. `complete`: neither RunPod nor a link is needed for it.
    """

    files: list[File]
    links: list[str | None]
    problems: list[ServiceError]
    error: ServiceError | None
    complete: bool


@dataclass(kw_only=True)
class Results:
    """Takes files to the bucket from wherever the worker left them; one for each process."""

    fetch: Fetch
    bucket: R2
    spool: Spool | None
    clock: Clock
    _r2_failed_at: float | None = field(default=None, init=False)

    @property
    def put_reserve(self) -> float:
        """Seconds that must be left when a file is begun; with more there is time for the spool where R2 fails."""
        return PUT_SECONDS

    def keep(self, job: Job, found: Findings, deadline: Deadline, *, age: timedelta) -> Kept:
        """
        Store every file of an answer that is not stored yet; `age` is how long ago the run ended.

        Raises PermanentError where not one of them can ever be stored.
        """
        kept = {jobs.stem_of(file["key"]): file for file in job.kept}
        stems = [jobs.result_stem(job, number) for number in range(1, len(found.files) + 1)]
        problems: list[ServiceError] = list(found.problems)
        settled = {stem for stem, source in zip(stems, found.files, strict=True) if source is None}
        failed: set[str] = set()
        unfinished = None
        for stem, source in _in_order(_waiting(kept, stems, found), job.failures):
            error = self._try(job, stem, source, kept, deadline)
            if error is None:
                settled.add(stem)
            elif _is_final(error, job, age):
                problems.append(error)
                failed.add(stem)
            else:
                unfinished = unfinished or error
                # If it is R2, or the time, no file will fare better now, unless the spool takes it.
                if error.service != "result" and not _is_spooled(kept.get(stem)):
                    break
        if not kept and not unfinished:
            raise PermanentError(problems[0].code, problems[0].sentence, service="result")
        complete = all(stem in settled | failed or stem in kept for stem in stems)
        if complete:  # else what is wrong with a file has to be found again, for it is not yet written down
            settled |= failed
        links = [_link(stem, source, settled) for stem, source in zip(stems, found.files, strict=True)]
        return Kept(
            [kept[stem] for stem in stems if stem in kept],
            links,
            problems,
            unfinished,
            complete,
        )

    def has_spooled(self, job: Job, deadline: Deadline) -> bool:
        """Whether the spool still has every file of the job that waits there. Raises TransientError."""
        return self.spool is not None and all(self.spool.has(file["key"], deadline=deadline) for file in job.spooled)

    def _try(
        self, job: Job, stem: str, source: Source, kept: dict[str, File], deadline: Deadline
    ) -> ServiceError | None:
        """Store one file; whatever goes wrong concerns this file alone."""
        try:
            return self._store(job, stem, source, kept, deadline)
        except ServiceError as error:
            return error
        except Exception:
            log.crashed("file_crashed", job_id=job.id)
            return TransientError("internal_error", "Storing the file failed inside the service.", service="result")

    def _store(
        self, job: Job, stem: str, source: Source, kept: dict[str, File], deadline: Deadline
    ) -> ServiceError | None:
        """Store one file, unless it is the same as one that is kept already; why it is only in the spool, if it is."""
        if deadline.left() <= self.put_reserve:
            raise TransientError("store_unfinished", "The time was over before every file was stored.")
        until_here = deadline.less(max(self.put_reserve, deadline.left() - DOWNLOAD_TIMEOUT))
        with Content(until_here) as content:
            own = self._fill(content, source, job, until_here)
            found = media.identify(content)
            sha256 = content.sha256.hex()
            if any(file["sha256"] == sha256 for other, file in kept.items() if other != stem):
                return None
            key, content_type = f"{stem}.{found.kind.ending}", found.kind.content_type
            file = {
                "key": key,
                "url": self.bucket.public_url(key),
                "content_type": content_type,
                "bytes": content.size,
                "sha256": sha256,
                "width": found.width,
                "height": found.height,
            }
            if not (own and self._copied(own, key, content, content_type, deadline)):
                error = self._put(file, content, deadline, may_spool=not isinstance(source, Spooled))
                if error:
                    kept[stem] = {**file, "spooled": True}
                    return error
        kept[stem] = file
        return None

    def _put(self, file: File, content: Content, deadline: Deadline, *, may_spool: bool) -> ServiceError | None:
        """Put the file into R2, or where that fails into the spool: then the answer is why."""
        spool = self.spool if may_spool else None
        key, content_type = file["key"], file["content_type"]
        try:
            if spool and self._r2_rests():
                raise TransientError("r2_failing", "R2 has just failed; it is not asked again at once.", service="r2")
            is_time_for_both = deadline.left() >= PUT_SECONDS + r2.CALL_SECONDS
            until = deadline.less(r2.CALL_SECONDS) if spool and is_time_for_both else deadline
            self.bucket.put(key, content, content_type=content_type, deadline=until)
        except ServiceError as error:
            if error.code not in ("r2_failing", "r2_too_slow"):
                self._r2_failed_at = self.clock.monotonic()
            if not spool or not self._spooled(spool, file, content, deadline):
                raise
            return error
        return None

    def _r2_rests(self) -> bool:
        return self._r2_failed_at is not None and self.clock.monotonic() - self._r2_failed_at < R2_RESTS

    def _spooled(self, spool: Spool, file: File, content: Content, deadline: Deadline) -> bool:
        try:
            spool.put(file["key"], content, content_type=file["content_type"], deadline=deadline)
        except ServiceError as error:
            log.failed("spool_failed", error)
            return False
        return True

    def _fill(self, content: Content, source: Source, job: Job, deadline: Deadline) -> r2.Source | None:
        """Get the file; where it lies in the bucket already, say where."""
        match source:
            case Inline():
                for piece in source.pieces():
                    content.write(piece)
                return None
            case Spooled():
                self._read_spooled(content, source.file, deadline)
                return None
        key = self.bucket.key_of(source.url)
        if key and _is_named_after(key, job):
            return self._read_own(content, key, deadline)
        etag = self.fetch.download(source.url, content, timeout=deadline.cap(DOWNLOAD_TIMEOUT))
        return r2.Source(key, etag) if key and etag else None

    def _read_spooled(self, content: Content, file: File, deadline: Deadline) -> None:
        if self.spool is None:
            raise TransientError(
                "spool_missing", "The file lies in the spool, but SPOOL_BUCKET is not set.", service="spool"
            )
        with self.spool.read(file["key"], deadline=deadline) as pieces:
            _copy(pieces, content, deadline)
        if content.sha256.hex() != file["sha256"]:
            raise TransientError("spool_damaged", "The spool gave another file than it was given.", service="spool")

    def _read_own(self, content: Content, key: str, deadline: Deadline) -> r2.Source:
        # With our own right to read, which a link without a signature has not: only for what names this job, else a
        # worker's answer could ask for any object of a private bucket.
        with self.bucket.read(key, deadline=deadline) as (own, pieces):
            _copy(pieces, content, deadline)
        return own

    def _copied(self, own: r2.Source, key: str, content: Content, content_type: str, deadline: Deadline) -> bool:
        """Whether R2 has copied the object; if not, for whatever reason, its bytes are here to be sent."""
        try:
            self.bucket.copy(own, key, content, content_type=content_type, deadline=deadline)
        except ServiceError as error:
            log.failed("copy_failed", error)
            return False
        return True


def from_row(job: Job) -> Findings:
    """The files of an answer that is not needed or not had any more: what is missing is behind links, or lost."""
    links: list[str | None] = json.loads(job.links or "[]")
    kept = {jobs.stem_of(file["key"]) for file in job.kept}
    lost = [n for n, link in enumerate(links, start=1) if link is None and jobs.result_stem(job, n) not in kept]
    problems = [PermanentError(warning["code"], warning["reason"]) for warning in json.loads(job.warnings or "[]")]
    problems += [PermanentError("result_lost", f"RunPod has forgotten file {n} before it was stored.") for n in lost]
    return Findings(tuple(Link(link) if link else None for link in links), tuple(problems))


def _waiting(kept: dict[str, File], stems: list[str], found: Findings) -> list[tuple[str, Source]]:
    """What is not yet in the bucket, each with where it can be had: the spool, where it is there already."""
    waiting: list[tuple[str, Source]] = []
    for stem, source in zip(stems, found.files, strict=True):
        file = kept.get(stem)
        if file and _is_spooled(file):
            waiting.append((stem, Spooled(file)))
        elif file is None and source is not None:
            waiting.append((stem, source))
    return waiting


def _is_spooled(file: File | None) -> bool:
    return file is not None and file.get("spooled", False)


def _link(stem: str, source: Inline | Link | None, settled: set[str]) -> str | None:
    if stem in settled:
        return SETTLED
    return source.url if isinstance(source, Link) else None


def _copy(pieces: Iterable[bytes], content: Content, deadline: Deadline) -> None:
    for piece in pieces:
        content.write(piece)
        if deadline.left() <= 0:
            raise TransientError("result_too_slow", "The bucket gave the file too slowly.", service="result")


def _in_order(files: list[tuple[str, Source]], turn: int) -> list[tuple[str, Source]]:
    """
    Inline files first, which need nobody; then links, another one first at each turn, so that none keeps others; last
    those in the spool, which are safe.
    """
    inline, links, spooled = ([file for file in files if isinstance(file[1], kind)] for kind in (Inline, Link, Spooled))
    first = turn % len(links) if links else 0
    return [*inline, *links[first:], *links[:first], *spooled]


def _is_final(error: ServiceError, job: Job, age: timedelta) -> bool:
    """Whether the file will never be had, so that the others are the result."""
    if error.service == "r2":
        return False
    believed = age > LINK_PATIENCE and job.failures >= LINK_REFUSALS
    return isinstance(error, PermanentError) or (error.code in DOUBTED and believed)


def _is_named_after(key: str, job: Job) -> bool:
    return any(len(name) >= LEAST_ID_CHARS and name in key for name in (job.id, job.runpod_job_id or ""))
