"""HTTP connections that are cut when their exchange lasts too long, and that lead only where they are told to."""

import contextlib
import heapq
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.response import HTTPResponse

POOL_SIZE = 32  # connections kept to one host; at least the number of threads that share the session

# The addresses of a host and port that may be connected to; raises ServiceError where none may.
Resolve = Callable[[str, int], list[str]]


class Watch:
    """Cuts a connection when its exchange has lasted too long; a socket's own timeout is for each wait anew."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds  # of the machine: it is the machine's sockets that hang
        self.is_over = False
        self.cut = False
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()

    def over(self, sock: socket.socket) -> None:
        """From now on watch this socket."""
        with self._lock:
            is_first = self._sock is None
            self._close()
            # A second handle on the same connection: TLS takes the first one away while it shakes hands.
            self._sock = socket.fromfd(sock.fileno(), sock.family, sock.type)
            if self.cut:
                self._shut()
        if is_first:
            _scissors.watch(self)

    def cut_off(self) -> None:
        """The time is over; nothing is done where the exchange was over before."""
        with self._lock:
            if not self.is_over:
                self.cut = True
                self._shut()

    @property
    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self.end - time.monotonic()

    def stop(self) -> None:
        """The exchange is over."""
        with self._lock:
            self.is_over = True
            self._close()

    def _shut(self) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()


class _Scissors:
    """Cuts off what is watched, in one thread for all: a thread for each exchange would cost more than the exchange."""

    def __init__(self) -> None:
        self._watches: list[tuple[float, int, Watch]] = []  # a heap; the number is for those that end at one instant
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, watch: Watch) -> None:
        """Cut it off at its end, unless it is over by then."""
        with self._changed:
            self._forget_those_over()
            is_next = not self._watches or watch.end < self._watches[0][0]
            heapq.heappush(self._watches, (watch.end, next(self._numbers), watch))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="scissors", daemon=True)
                self._thread.start()
            elif is_next:
                self._changed.notify()

    def _forget_those_over(self) -> None:
        while self._watches and self._watches[0][2].is_over:
            heapq.heappop(self._watches)

    def _run(self) -> None:
        while True:
            self._next().cut_off()

    def _next(self) -> Watch:
        """The one whose end is next, when it is there."""
        with self._changed:
            while True:
                wait = self._watches[0][0] - time.monotonic() if self._watches else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._watches)[2]
                self._changed.wait(wait)


_scissors = _Scissors()


class _Current(threading.local):
    """What the connections of this thread's exchange must do, which requests would not pass on to them."""

    watch: Watch | None = None
    resolve: Resolve | None = None


_current = _Current()


@contextlib.contextmanager
def watched(seconds: float, resolve: Resolve | None) -> Iterator[Watch]:
    """Have the connections that this thread uses cut after that time, and lead only to what `resolve` returns."""
    watch = _current.watch = Watch(seconds)
    _current.resolve = resolve
    try:
        yield watch
    finally:
        watch.stop()
        _current.watch = _current.resolve = None


class _HTTP(HTTPConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            _watch(self.sock)
        super().request(*args, **kwargs)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3 itself does
        # requests would parse cookies, though none is ever sent, and a header made for it keeps it busy for a minute.
        response = super().getresponse()
        message = getattr(response, "_original_response").msg  # noqa: B009  # mypy does not know of it
        del message["Set-Cookie"], message["Set-Cookie2"]
        return response

    @property
    def is_connected(self) -> bool:
        # Where addresses are looked at, a kept connection would be one that was not looked at for this exchange.
        return super().is_connected and _current.resolve is None

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn() if _current.resolve is None else self._connect_to_one_of(_current.resolve)
        _watch(sock)
        return sock

    def _connect_to_one_of(self, resolve: Resolve) -> socket.socket:
        """Connect to an address that was looked at, not to a name, which may mean another one a moment later."""
        name = self._dns_host
        *others, last = resolve(self.host, self.port)
        try:
            for address in others:
                if _current.watch is not None and _current.watch.left <= 0:
                    break
                self._dns_host = address
                with contextlib.suppress(HTTPError):
                    return super()._new_conn()
            self._dns_host = last
            return super()._new_conn()
        finally:
            self._dns_host = name  # TLS asks for its certificate


def _watch(sock: socket.socket) -> None:
    if _current.watch is not None:
        _current.watch.over(sock)


class _HTTPS(_HTTP, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}


class Session(requests.Session):
    """A session of such connections, which sends nothing but what it is given."""

    def __init__(self) -> None:
        super().__init__()
        # Neither ~/.netrc, which would replace our Authorization header, nor proxies from the environment.
        self.trust_env = False
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Adapter(pool_maxsize=POOL_SIZE, max_retries=0))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: else requests would read the body of a redirect, however long, even if it is not to follow it."""
        return None
