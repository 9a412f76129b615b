"""Downloads a result from the link that a worker gave, which is not to be trusted."""

import ipaddress
import socket
from urllib.parse import urlsplit

from chalicelib.errors import IndeterminateError, PermanentError, TransientError
from chalicelib.wire import Wire

MAX_BYTES = 50_000_000


class Fetch:
    """Fetches links; hosts that resolve to a private address only if `host:port` is allowed by name."""

    def __init__(self, *, wire: Wire, allowed_private_hosts: frozenset[str]) -> None:
        self._wire = wire
        self._allowed = allowed_private_hosts

    def download(self, url: str, *, timeout: float) -> bytes:
        """
        The file behind the link, at most 50 MB; redirects are not followed and no key is sent along.

        Raises PermanentError where the link can never be fetched, TransientError where it may be later.
        """
        self._check(url)
        try:
            reply = self._wire.exchange(
                "result", "GET", url, headers={"Accept-Encoding": "identity"}, timeout=timeout, max_bytes=MAX_BYTES
            )
        except IndeterminateError as error:
            raise TransientError(error.code, error.sentence, service="result") from error
        if reply.status != 200:
            raise TransientError(
                "result_unavailable", f"The worker's link to the result answered HTTP {reply.status}.", service="result"
            )
        return reply.body

    def _check(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or parts.username or parts.password:
            raise PermanentError(
                "link_invalid", "The worker's link to the result is no plain http(s) address.", service="result"
            )
        if f"{host}:{port}" in self._allowed:
            return
        if not all(address.is_global for address in _resolve(host, port)):
            raise PermanentError(
                "link_private", "The worker's link to the result points into a private network.", service="result"
            )


def _resolve(host: str, port: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransientError(
            "result_unreachable", "The host of the worker's link has no address.", service="result"
        ) from error
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
