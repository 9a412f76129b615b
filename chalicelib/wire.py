"""One HTTP exchange, bounded in time and bytes, over a pooled session; errors say if it can have had effect."""

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import requests
from urllib3.exceptions import (
    ClosedPoolError,
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from chalicelib.connection import Resolve, Session, Watch, watched
from chalicelib.credentials import Credential
from chalicelib.errors import IndeterminateError, TransientError
from chalicelib.records import dataclass
from chalicelib.runtime import Clock

CONNECT_TIMEOUT = 3.05  # seconds; just over TCP's first retransmission
IDLE_LIMIT = 30  # seconds a kept connection is trusted for
LEAST_SEND = 1.0  # seconds in which a repeat may come to something
CHUNK_BYTES = 262_144
LARGE_BYTES = 1_000_000  # a body over this is a large one
MOST_LIKELY_BYTES = 20_000_000  # of a large one that does not tell its size; RunPod takes no larger result
MAX_RETRY_AFTER = 900.0  # seconds; Cloudflare's lock-out is 300, and a nonsensical value must not stop a job for years
# In sentences.
NAMES = {
    "d1": "D1",
    "r2": "R2",
    "runpod": "RunPod",
    "result": "The host of the link",
    "public": "The bucket's public address",
    "webhook": "The address for RunPod's callbacks",
    "callback": "The callback's receiver",
    "cloudflare": "Cloudflare's API",
}


@dataclass(frozen=True)
class Head:
    """How an answer begins, whatever its status; the header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]

    @property
    def size(self) -> int | None:
        """Bytes of the body, None where they are not told; that of a compressed one says little."""
        value = self.headers.get("Content-Length", "").strip()
        return int(value) if re.fullmatch("[0-9]{1,18}", value) and "Content-Encoding" not in self.headers else None

    @property
    def retry_after(self) -> float | None:
        """Seconds from Retry-After; its other form, a date, is not used by the services we talk to."""
        value = self.headers.get("Retry-After", "").strip()
        return min(float(value), MAX_RETRY_AFTER) if value.isascii() and value.isdigit() else None


@dataclass(frozen=True)
class Reply(Head):
    """A whole answer."""

    body: bytes


@dataclass(frozen=True)
class Stream(Head):
    """An answer whose body is still to be read."""

    service: str
    _response: requests.Response
    _watch: Watch

    def pieces(self, *, decode: bool = True) -> Iterator[bytes]:
        """
        The body as it comes; a Content-Encoding is undone only where `decode` says so.

        Raises IndeterminateError: over the time of the exchange, or cut off.
        """
        try:
            yield from self._response.raw.stream(CHUNK_BYTES, decode_content=decode)
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            raise (_too_slow(self.service) if self._watch.cut else _failure(self.service, error)) from error
        if self._watch.cut or not _has_an_end(self._response):
            raise _too_slow(self.service) if self._watch.cut else _cut_off(self.service)


class Wire:
    """A session that several threads and clients may share; with `resolve` it connects only to what that returns."""

    def __init__(self, clock: Clock, *, resolve: Resolve | None = None) -> None:
        self._clock = clock
        self._resolve = resolve
        self._used_at = clock.now()
        self._idle_check = threading.Lock()
        self._session = Session()

    def exchange(
        self,
        service: str,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        timeout: float,
        max_bytes: int,
        on_large: Callable[[int], None] | None = None,
    ) -> Reply:
        """
        Send one request and read the whole answer; redirects are not followed.

        Before more than LARGE_BYTES of the body are read `on_large` is called, with its size or, where that is not
        told, with MOST_LIKELY_BYTES.

        Raises TransientError where nothing was sent (no address, refused, no connection in time) and IndeterminateError
        for all else: over `timeout` seconds in all, cut off, or an answer over `max_bytes`.
        """
        with self.open(service, method, url, headers=headers, body=body, timeout=timeout) as answer:
            return Reply(answer.status, answer.headers, _whole(answer, max_bytes, on_large or _ignore))

    @contextlib.contextmanager
    def open(
        self,
        service: str,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        timeout: float,
    ) -> Iterator[Stream]:
        """As exchange(), but the body is read by the caller, within the same `timeout`."""
        self._drop_idle_connections()
        request = {"method": method, "url": url, "headers": headers, "data": body}
        with watched(timeout, self._resolve) as watch, self._send(service, request, timeout, watch) as response:
            yield Stream(response.status_code, response.headers, service, response, watch)

    def _send(self, service: str, request: dict[str, Any], timeout: float, watch: Watch) -> requests.Response:
        timeouts = (min(CONNECT_TIMEOUT, timeout), timeout)
        try:
            return self._session.request(**request, allow_redirects=False, stream=True, timeout=timeouts)
        except requests.exceptions.InvalidURL as error:
            raise TransientError(
                f"{service}_unreachable", f"{NAMES[service]} has no valid address; check its base URL.", service=service
            ) from error
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            raise (_too_slow(service) if watch.cut else _failure(service, error)) from error

    def _drop_idle_connections(self) -> None:
        # A frozen Lambda wakes with connections whose far end is long gone; the first POST on one of them would fail in
        # a way that leaves open whether it arrived, and an unknown /run costs ten minutes of waiting. The wall clock is
        # asked because the other one may stand still meanwhile.
        with self._idle_check:
            now = self._clock.now()
            if abs((now - self._used_at).total_seconds()) > IDLE_LIMIT:
                self._session.close()
            self._used_at = now


def exchange_as(
    credential: Credential[str],
    wire: Wire,
    service: str,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    timeout: float,
    within: float | None = None,
    **how: Any,
) -> Reply:
    """
    Like wire.exchange(), with the key as bearer; a request that is refused is repeated if there is a new key.

    All of it `within` so many seconds, or else the `timeout`; where they are too few, the key is not read again.
    """
    end = time.monotonic() + (timeout if within is None else within)

    def send(key: str, seconds: float) -> Reply:
        bearer = {**headers, "Authorization": f"Bearer {key}"}
        return wire.exchange(service, method, url, headers=bearer, timeout=seconds, **how)

    key = credential.value
    reply = send(key, timeout)
    if reply.status not in (401, 403) or end - time.monotonic() < credential.seconds + LEAST_SEND:
        return reply
    renewed = credential.renew(key)
    left = end - time.monotonic()
    return send(credential.value, left) if renewed and left >= LEAST_SEND else reply


def _ignore(size: int) -> None:
    """What a large answer is to who does not care."""


def _whole(answer: Stream, max_bytes: int, on_large: Callable[[int], None]) -> bytes:
    pieces, size, told = [], 0, False
    if answer.size is not None and answer.size > LARGE_BYTES:
        on_large(answer.size)
        told = True
    for piece in answer.pieces():
        pieces.append(piece)
        size += len(piece)
        if size > LARGE_BYTES and not told:
            on_large(MOST_LIKELY_BYTES)
            told = True
        if size > max_bytes:
            raise IndeterminateError(
                f"{answer.service}_answer_too_large",
                f"{NAMES[answer.service]} answered with more than {max_bytes} bytes.",
                service=answer.service,
            )
    return b"".join(pieces)


def _too_slow(service: str) -> IndeterminateError:
    return IndeterminateError(f"{service}_timeout", f"{NAMES[service]} did not answer in time.", service=service)


def _has_an_end(response: requests.Response) -> bool:
    """Whether the head says where the body ends; http.client takes a head that was cut off for a whole one."""
    if getattr(getattr(response.raw, "_original_response", None), "version", None) != 11:
        return True
    headers = response.headers
    closes = headers.get("Connection", "").lower() == "close"
    return response.status_code == 204 or closes or "Content-Length" in headers or "Transfer-Encoding" in headers


def _cut_off(service: str) -> IndeterminateError:
    return IndeterminateError(
        f"{service}_cut_off",
        f"{NAMES[service]} broke the connection off before its answer was complete.",
        service=service,
    )


def _failure(service: str, error: Exception) -> TransientError | IndeterminateError:
    cause = getattr(error.args[0], "reason", error.args[0]) if error.args else None
    if isinstance(cause, (NewConnectionError, ConnectTimeoutError, ClosedPoolError)) or isinstance(
        error, requests.exceptions.ConnectTimeout
    ):
        return TransientError(
            f"{service}_unreachable", f"{NAMES[service]} could not be reached; nothing was sent.", service=service
        )
    if isinstance(cause, SSLError) and isinstance(cause.args[0], ssl.SSLCertVerificationError):
        return TransientError(
            f"{service}_bad_certificate",
            f"{NAMES[service]} has no valid certificate for its name; nothing was sent.",
            service=service,
        )
    if isinstance(error, (requests.exceptions.Timeout, ReadTimeoutError)):
        return _too_slow(service)
    return _cut_off(service)
