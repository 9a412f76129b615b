"""One HTTP exchange, bounded in time and bytes, over a pooled session; errors say if it can have had effect."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ClosedPoolError, ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError

from chalicelib.errors import IndeterminateError, TransientError
from chalicelib.runtime import Clock

CONNECT_TIMEOUT = 3.05  # seconds; just over TCP's first retransmission
POOL_SIZE = 32  # connections kept to one host; at least the number of threads that share the session
IDLE_LIMIT = 30  # seconds a kept connection is trusted for
CHUNK_BYTES = 65_536
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
        return float(value) if value.isdigit() else None


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
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=POOL_SIZE, max_retries=0))

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
        end = self._clock.monotonic() + timeout
        connect = min(CONNECT_TIMEOUT, timeout / 2)
        try:
            with self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                allow_redirects=False,
                stream=True,
                timeout=(connect, timeout - connect),
            ) as response:
                content = self._read(service, response, end, max_bytes)
                return Reply(response.status_code, response.headers, content)
        except requests.exceptions.InvalidURL as error:
            raise TransientError(
                f"{service}_unreachable", f"{NAMES[service]} has no valid address; check its base URL.", service=service
            ) from error
        except (requests.exceptions.RequestException, HTTPError) as error:
            raise _failure(service, error) from error

    def _drop_idle_connections(self) -> None:
        # A frozen Lambda wakes with connections whose far end is long gone; the first POST on one of them would fail in
        # a way that leaves open whether it arrived, and an unknown /run costs ten minutes of waiting. The wall clock is
        # asked because the other one may stand still meanwhile.
        with self._idle_check:
            now = self._clock.now()
            if abs((now - self._used_at).total_seconds()) > IDLE_LIMIT:
                self._session.close()
            self._used_at = now

    def _read(self, service: str, response: requests.Response, end: float, max_bytes: int) -> bytes:
        # read1 returns what has arrived; read would wait for a full chunk, for as long as a slow server likes.
        content = bytearray()
        _limit_waiting(response, end - self._clock.monotonic())
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
            content += chunk
            if len(content) > max_bytes:
                raise IndeterminateError(
                    f"{service}_answer_too_large",
                    f"{NAMES[service]} answered with more than {max_bytes} bytes.",
                    service=service,
                )
            if self._clock.monotonic() > end:
                raise IndeterminateError(
                    f"{service}_timeout", f"{NAMES[service]} did not finish its answer in time.", service=service
                )
            _limit_waiting(response, end - self._clock.monotonic())
        return bytes(content)


def _limit_waiting(response: requests.Response, seconds: float) -> None:
    # requests' timeout is for each wait on the socket, not for all of them together.
    connection = getattr(response.raw, "connection", None)
    if connection is not None and connection.sock is not None:
        connection.sock.settimeout(max(0.1, seconds))


def _failure(service: str, error: Exception) -> TransientError | IndeterminateError:
    cause = getattr(error.args[0], "reason", error.args[0]) if error.args else None
    if isinstance(cause, (NewConnectionError, ConnectTimeoutError, ClosedPoolError)) or isinstance(
        error, requests.exceptions.ConnectTimeout
    ):
        return TransientError(
            f"{service}_unreachable", f"{NAMES[service]} could not be reached; nothing was sent.", service=service
        )
    if isinstance(error, (requests.exceptions.Timeout, ReadTimeoutError)):
        return IndeterminateError(f"{service}_timeout", f"{NAMES[service]} did not answer in time.", service=service)
    return IndeterminateError(
        f"{service}_cut_off",
        f"{NAMES[service]} broke the connection off before its answer was complete.",
        service=service,
    )
