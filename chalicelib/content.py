"""A file on its way from a worker to the bucket: counted and hashed as it comes, kept on disk unless it is small."""

import hashlib
import tempfile
import threading
from types import TracebackType
from typing import IO

from chalicelib.errors import PermanentError, TransientError
from chalicelib.runtime import Deadline

MAX_BYTES = 200_000_000  # of one file of a result
IN_MEMORY_BYTES = 1_000_000  # a file over this lies on disk
SMALL_BYTES = 16 * 1024 * 1024  # files over this wait for one another

# A Lambda function has 512 MB of disk: one large file at a time, beside fifteen small ones, fits in it.
_on_disk = threading.BoundedSemaphore(16)
_large = threading.BoundedSemaphore(1)


class Content:
    """The bytes of one file, at most 200 MB. Closing it gives the disk back."""

    def __init__(self, deadline: Deadline, *, most: int | None = None) -> None:
        """An empty one, which waits for its turn until the deadline if it grows large, of `most` bytes."""
        self._most = MAX_BYTES if most is None else most
        self.file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)
        self.size = 0
        self._deadline = deadline
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)  # what R2's ETag of an object is
        self._turns: list[threading.BoundedSemaphore] = []

    def __enter__(self) -> "Content":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.file.close()
        except OSError:  # what could not be written for want of room cannot be now either; the room is given back
            pass
        finally:
            for turn in self._turns:
                turn.release()

    @property
    def sha256(self) -> bytes:
        """The SHA-256 of what was written so far."""
        return self._sha256.digest()

    @property
    def md5(self) -> bytes:
        """The MD5 of what was written so far."""
        return self._md5.digest()

    def write(self, piece: bytes) -> None:
        """
        Append the next piece.

        Raises PermanentError `result_too_large` over the limit, TransientError where there is no room for it now.
        """
        self.size += len(piece)
        if self.size > self._most:
            raise too_large(self._most)
        if self.size > IN_MEMORY_BYTES:
            self._take_turn(_on_disk)
        if self.size > SMALL_BYTES:
            self._take_turn(_large)
        try:
            self.file.write(piece)
        except OSError as error:
            raise _no_room() from error
        self._sha256.update(piece)
        self._md5.update(piece)

    def rewind(self) -> IO[bytes]:
        """The file, to be read from its beginning. Raises TransientError where there is no room for the rest of it."""
        try:
            self.file.seek(0)
        except OSError as error:
            raise _no_room() from error
        return self.file

    def _take_turn(self, turn: threading.BoundedSemaphore) -> None:
        if turn in self._turns:
            return
        if not turn.acquire(timeout=max(0.0, self._deadline.left())):
            raise TransientError(
                "result_no_room",
                "Other large results had not been stored in time for this one.",
                service="result",
            )
        self._turns.append(turn)


def _no_room() -> TransientError:
    return TransientError("result_no_room", "There is no room on disk for the result.", service="result")


def too_large(most: int | None = None) -> PermanentError:
    """The error for a file over the limit."""
    megabytes = (most or MAX_BYTES) // 1_000_000
    return PermanentError("result_too_large", f"There is a file of more than {megabytes} MB.", service="result")
