"""What a cloud knows us by; read again when the cloud refuses it, since somebody may have changed it meanwhile."""

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from chalicelib.errors import ServiceError
from chalicelib.runtime import Clock

READ_AGAIN_AFTER = 60.0  # seconds; a key that is simply wrong must not cost a call to SSM for every job

T = TypeVar("T")


class Credential(Generic[T]):
    """A key, or two that belong together; without `read_again`, which may take `seconds`, it is what it is."""

    def __init__(self, value: T, read_again: Callable[[], T] | None = None, *, seconds: float = 0.0) -> None:
        self.value = value
        self.seconds = seconds
        self._read_again = read_again
        self._renewing = threading.Lock()

    def renew(self, refused: T) -> bool:
        """Whether there is another one now than that which was refused; the call that it refused is worth a repeat."""
        with self._renewing:
            if self.value == refused and self._read_again is not None:
                with contextlib.suppress(ServiceError):
                    self.value = self._read_again()
            return self.value != refused


class Fresh(Generic[T]):
    """Something that is read again at most once a minute, whoever asks for it."""

    def __init__(self, value: T, read: Callable[[], T], clock: Clock) -> None:
        self._value = value
        self._read = read
        self._clock = clock
        self._not_before = clock.monotonic()
        self._reading = threading.Lock()

    def get(self) -> T:
        """The value as it is now, or was a minute ago. Raises what reading it raises, and then only once a minute."""
        with self._reading:
            if self._clock.monotonic() >= self._not_before:
                self._not_before = self._clock.monotonic() + READ_AGAIN_AFTER
                self._value = self._read()
            return self._value
