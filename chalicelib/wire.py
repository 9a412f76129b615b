"""One HTTP exchange, bounded in time and bytes, over a pooled session; errors say if it can have had effect."""

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ClosedPoolError, ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError

from chalicelib.errors import IndeterminateError, TransientError
from chalicelib.runtime import Clock

CONNECT_TIMEOUT = 3.05  # seconds; just over TCP's first retransmission
POOL_SIZE = 32  # connections kept to one host; at least the number of threads that share the session
IDLE_LIMIT = 30  # seconds a kept connection is trusted for
CHUNK_BYTES = 65_536
MAX_RETRY_AFTER = 900.0  # seconds; Cloudflare's lock-out is 300, and a nonsensical value must not stop a job for years
NAMES = {"d1": "D1", "runpod": "RunPod", "result": "The host of the worker's link"}  # in sentences


@dataclass(frozen=True)
class Reply:
    """What a server answered, whatever its status; the header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """Seconds from Retry-After; its other form, a date, is not used by the services we talk to."""
        value = self.headers.get("Retry-After", "").strip()
        return min(float(value), MAX_RETRY_AFTER) if value.isascii() and value.isdigit() else None


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
    watch: _Watch | None = None


_current = _Current()


class _WatchedHTTP(HTTPConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)
        _watch(self)


class _WatchedHTTPS(HTTPSConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)
        _watch(self)


def _watch(connection: HTTPConnection) -> None:
    if _current.watch is not None and connection.sock is not None:
        _current.watch.over(connection.sock)


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _WatchedHTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedHTTPS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}


class Wire:
    """A session that several threads and clients may share."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._used_at = clock.now()
        self._idle_check = threading.Lock()
        self._session = requests.Session()
        # Neither ~/.netrc, which would replace our Authorization header, nor proxies from the environment.
        self._session.trust_env = False
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
        self._drop_idle_connections()
        watch = _current.watch = _Watch(timeout)
        try:
            with self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                allow_redirects=False,
                stream=True,
                timeout=(min(CONNECT_TIMEOUT, timeout), timeout),
            ) as response:
                content = self._read(service, response, max_bytes)
                if watch.cut or not _has_an_end(response):
                    raise _too_slow(service) if watch.cut else _cut_off(service)
                return Reply(response.status_code, response.headers, content)
        except requests.exceptions.InvalidURL as error:
            raise TransientError(
                f"{service}_unreachable", f"{NAMES[service]} has no valid address; check its base URL.", service=service
            ) from error
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            raise (_too_slow(service) if watch.cut else _failure(service, error)) from error
        finally:
            watch.stop()
            _current.watch = None

    def _drop_idle_connections(self) -> None:
        # A frozen Lambda wakes with connections whose far end is long gone; the first POST on one of them would fail in
        # a way that leaves open whether it arrived, and an unknown /run costs ten minutes of waiting. The wall clock is
        # asked because the other one may stand still meanwhile.
        with self._idle_check:
            now = self._clock.now()
            if abs((now - self._used_at).total_seconds()) > IDLE_LIMIT:
                self._session.close()
            self._used_at = now

    def _read(self, service: str, response: requests.Response, max_bytes: int) -> bytes:
        content = bytearray()
        for chunk in response.raw.stream(CHUNK_BYTES, decode_content=True):
            content += chunk
            if len(content) > max_bytes:
                raise IndeterminateError(
                    f"{service}_answer_too_large",
                    f"{NAMES[service]} answered with more than {max_bytes} bytes.",
                    service=service,
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
    if isinstance(error, (requests.exceptions.Timeout, ReadTimeoutError)):
        return _too_slow(service)
    return _cut_off(service)
