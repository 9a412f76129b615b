"""One HTTP exchange, bounded in time and bytes, over a pooled session; errors say if it can have had effect."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ClosedPoolError,
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from chalicelib.errors import IndeterminateError, TransientError
from chalicelib.runtime import Clock

CONNECT_TIMEOUT = 3.05  # seconds; just over TCP's first retransmission
POOL_SIZE = 32  # connections kept to one host; at least the number of threads that share the session
IDLE_LIMIT = 30  # seconds a kept connection is trusted for
CHUNK_BYTES = 65_536
MAX_RETRY_AFTER = 900.0  # seconds; Cloudflare's lock-out is 300, and a nonsensical value must not stop a job for years
NAMES = {"d1": "D1", "runpod": "RunPod", "result": "The host of the worker's link"}  # in sentences


# The addresses of a host and port that may be connected to; raises ServiceError where none may.
Resolve = Callable[[str, int], list[str]]


@dataclass(frozen=True)
class Head:
    """How an answer begins, whatever its status; the header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]

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
    _watch: "_Watch"

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


class _Watch:
    """Cuts a connection when its exchange has lasted too long; a socket's own timeout is for each wait anew."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds  # of the machine: it is the machine's sockets that hang
        self._timer: threading.Timer | None = None
        self.cut = False

    def over(self, sock: socket.socket) -> None:
        """From now on watch this socket."""
        self.stop()
        self._timer = threading.Timer(max(0.0, self._end - time.monotonic()), self._shut, (sock,))
        self._timer.daemon = True
        self._timer.start()

    def _shut(self, sock: socket.socket) -> None:
        self.cut = True
        with contextlib.suppress(OSError):
            # Not SSLSocket's own shutdown, which takes the TLS state from under the thread that reads.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def stop(self) -> None:
        """The exchange is over."""
        if self._timer is not None:
            self._timer.cancel()


class _Current(threading.local):
    """What the connections of this thread's exchange must do, which requests would not pass on to them."""

    watch: _Watch | None = None
    resolve: Resolve | None = None


_current = _Current()


class _HTTP(HTTPConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)
        if _current.watch is not None and self.sock is not None:
            _current.watch.over(self.sock)

    @property
    def is_connected(self) -> bool:
        # Where addresses are looked at, a kept connection would be one that was not looked at for this exchange.
        return super().is_connected and _current.resolve is None

    def _new_conn(self) -> socket.socket:
        """Connect to an address that was looked at, not to a name, which may mean another one a moment later."""
        if _current.resolve is None:
            return super()._new_conn()
        name = self._dns_host
        addresses = _current.resolve(self.host, self.port)
        try:
            return self._connect_to_one(addresses)
        finally:
            self._dns_host = name  # TLS asks for its certificate

    def _connect_to_one(self, addresses: list[str]) -> socket.socket:
        for address in addresses[:-1]:
            self._dns_host = address
            with contextlib.suppress(HTTPError):
                return super()._new_conn()
        self._dns_host = addresses[-1]
        return super()._new_conn()


class _HTTPS(_HTTP, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None  # else requests reads the body of a redirect, however long, even if it is not to follow it


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}


class Wire:
    """A session that several threads and clients may share; with `resolve` it connects only to what that returns."""

    def __init__(self, clock: Clock, *, resolve: Resolve | None = None) -> None:
        self._clock = clock
        self._resolve = resolve
        self._used_at = clock.now()
        self._idle_check = threading.Lock()
        self._session = _Session()
        # Neither ~/.netrc, which would replace our Authorization header, nor proxies from the environment.
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, _Adapter(pool_maxsize=POOL_SIZE, max_retries=0))

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
    ) -> Reply:
        """
        Send one request and read the whole answer; redirects are not followed.

        Raises TransientError where nothing was sent (no address, refused, no connection in time) and IndeterminateError
        for all else: over `timeout` seconds in all, cut off, or an answer over `max_bytes`.
        """
        with self.open(service, method, url, headers=headers, body=body, timeout=timeout) as answer:
            return Reply(answer.status, answer.headers, _whole(answer, max_bytes))

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
        watch = _current.watch = _Watch(timeout)
        _current.resolve = self._resolve
        try:
            with self._send(service, method, url, headers, body, timeout, watch) as response:
                yield Stream(response.status_code, response.headers, service, response, watch)
        finally:
            watch.stop()
            _current.watch = _current.resolve = None

    def _send(
        self,
        service: str,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout: float,
        watch: _Watch,
    ) -> requests.Response:
        try:
            return self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                allow_redirects=False,
                stream=True,
                timeout=(min(CONNECT_TIMEOUT, timeout), timeout),
            )
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


def _whole(answer: Stream, max_bytes: int) -> bytes:
    content = bytearray()
    for piece in answer.pieces():
        content += piece
        if len(content) > max_bytes:
            raise IndeterminateError(
                f"{answer.service}_answer_too_large",
                f"{NAMES[answer.service]} answered with more than {max_bytes} bytes.",
                service=answer.service,
            )
    return bytes(content)


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
