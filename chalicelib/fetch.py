"""Downloads a result from the link that a worker gave, which is not to be trusted."""

import contextlib
import ipaddress
import re
import socket
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urljoin, urlsplit

from requests import PreparedRequest, RequestException

from chalicelib.content import MAX_BYTES, Content, too_large
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.runtime import Clock, Deadline
from chalicelib.wire import Stream, Wire

MAX_REDIRECTS = 5
MAX_ADDRESSES = 4  # tried of one host
# Neither compression nor a connection that is kept: the next link is to another host, or has to be looked at anew.
HEADERS = {"Accept-Encoding": "identity", "Connection": "close"}
COMPRESSIONS = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"}
EXPLANATION_BYTES = 4_000  # read of a refusal, to see if it says that the link has expired

# Where clouds tell a machine its secrets: AWS (with ECS and EKS), most others at the first address too, Azure, Alibaba.
METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "168.63.129.16",
        "100.100.100.200",
        "fd00:ec2::254",
        "fd00:ec2::23",
    )
)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # a public IPv4 address, as a network with IPv6 only sees it

# IPv6 has public addresses in one eighth only, of which the documentation's range is newer than Python's tables.
PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")

# What the resolver takes for an address, such as 2130706433 or 0177.1 for 127.0.0.1, though it looks like a name.
ODD_HOST = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*\.?", re.IGNORECASE)


class Refused(PermanentError):
    """Raised when an address must not be visited; nothing was sent to it."""


class Guard:
    """Says which addresses a link may lead to: public ones, and those that the operator has allowed as `host:port`."""

    def __init__(self, allowed_private_hosts: frozenset[str]) -> None:
        self._allowed = allowed_private_hosts

    def resolve(self, host: str, port: int) -> list[str]:
        """
        The addresses of the host, to connect to as they are: asked again, its name might lead elsewhere.

        Raises Refused if only one of them is none of the public internet, TransientError if there is none.
        """
        literal = _address(host)
        if literal is None and ODD_HOST.fullmatch(host):
            raise _refused("link_odd_host", "writes its host as a number", host)
        addresses = _look_up(host, port) if literal is None else [literal]
        for address in addresses if f"{host}:{port}" not in self._allowed else []:
            if objection := _objection(address):
                raise _refused(*objection, host)
        return [str(address) for address in addresses[:MAX_ADDRESSES]]

    def require_public_words(self, host: str, port: int) -> None:
        """Raises Refused where the host is by its own words none of the public internet; a name is not looked up."""
        if _address(host) is not None or ODD_HOST.fullmatch(host) or host.rpartition(".")[2] == "localhost":
            self.resolve(host, port)


class Fetch:
    """Fetches links over a wire of its own, which has a Guard and knows no key."""

    def __init__(self, *, wire: Wire, clock: Clock) -> None:
        self._wire = wire
        self._clock = clock

    def download(self, url: str, into: Content, *, timeout: float) -> str | None:
        """
        Write the file behind the link, over at most five redirects and within `timeout` seconds in all; its ETag.

        Raises PermanentError where the link can never be fetched, TransientError where it may be later.
        """
        deadline = Deadline(self._clock, timeout)
        for hop in range(MAX_REDIRECTS + 1):
            try:
                target, etag = self._visit(url, into, timeout=deadline.cap(timeout))
            except Refused as error:
                if not hop:
                    raise
                raise _redirected(error) from error
            if target is None:
                return etag
            url = target
        raise PermanentError("redirect_loop", "The link redirects too often.", service="result")

    def _visit(self, url: str, into: Content, *, timeout: float) -> tuple[str | None, str | None]:
        """The address that the answer redirects to, or else, with the file written, its ETag."""
        _check_url(url)
        try:
            with self._wire.open("result", "GET", url, headers=HEADERS, timeout=timeout) as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    return _join(url, answer.headers["Location"]), None
                if answer.status != 200:
                    raise _failure(answer, urlsplit(url).hostname)
                _read(answer, into)
                return None, answer.headers.get("ETag")
        except IndeterminateError as error:
            raise _broken_off(error, into) from error


def whole_url(url: str) -> str:
    """The address as it is asked for, with a path. Raises Refused where it is none that may be visited."""
    _check_url(url)
    request = PreparedRequest()
    request.prepare_url(url, None)
    return str(request.url)


def _check_url(url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise _refused("link_scheme", "is not http(s)")
    try:
        PreparedRequest().prepare_url(url, None)
        parts = urlsplit(url)
    except (RequestException, ValueError) as error:
        raise _refused("link_invalid", "is no address") from error
    if parts.username is not None or parts.password is not None:
        raise _refused("link_credentials", "carries a user name or password")


def _join(url: str, location: str) -> str:
    try:
        # http.client reads headers as Latin-1, and servers write them in UTF-8.
        return urljoin(url, location.encode("latin-1").decode())
    except ValueError as error:
        raise _refused("redirect_refused", "redirects to what is no address") from error


def _look_up(host: str, port: int) -> list[IPv4Address | IPv6Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise _refused("link_invalid", "is no address", host) from error
    except OSError as error:
        raise TransientError(
            "result_unreachable", f"The host of the link, {host}, has no address.", service="result"
        ) from error
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0])) for entry in found))


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _objection(address: IPv4Address | IPv6Address) -> tuple[str, str] | None:
    """Why the address must not be connected to, as a code and in words; None where it may."""
    if isinstance(address, IPv6Address):
        if address in NAT64:
            return _objection(IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped or address.sixtofour or address.teredo or 1 < int(address) < 1 << 32:
            return "link_mapped", "leads to an IPv4 address inside an IPv6 one"
    if address in METADATA:
        return "link_metadata", "leads to a cloud's metadata service"
    if address.is_loopback:
        return "link_loopback", "leads back to this machine"
    if address.is_link_local:
        return "link_link_local", "leads to a link-local address"
    if not _is_public(address):
        return "link_private", "leads into a private network"
    return None


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and (address not in PUBLIC_IPV6 or address in DOCUMENTATION):
        return False
    return address.is_global and not address.is_multicast


def _refused(code: str, words: str, host: str = "") -> Refused:
    return Refused(code, f"The link{f' to {host}' if host else ''} {words}; it is not followed.", service="result")


def _redirected(error: Refused) -> PermanentError:
    return PermanentError("redirect_refused", f"After a redirect: {error.sentence}", service="result")


def _failure(answer: Stream, host: str | None) -> ServiceError:
    """What an answer means that is neither the file nor a redirect."""
    status, said = answer.status, f"The link to {host} answered HTTP {answer.status}"
    if status < 200 or status in (408, 425, 429) or status >= 500:
        return TransientError("result_unavailable", f"{said}.", service="result", retry_after=answer.retry_after)
    if status in (400, 401, 403) and b"expired" in _explanation(answer).lower():
        return PermanentError("link_expired", f"{said}: it has expired.", service="result")
    if status in (401, 403):
        return TransientError("link_forbidden", f"{said}: it needs a permission that it has not got.", service="result")
    if status in (404, 410):
        return TransientError("link_not_found", f"{said}: there is no file.", service="result")
    return TransientError("link_refused", f"{said}.", service="result")


def _explanation(answer: Stream) -> bytes:
    read = b""
    with contextlib.suppress(IndeterminateError):
        for piece in answer.pieces(decode=False):
            read += piece
            if len(read) >= EXPLANATION_BYTES:
                break
    return read[:EXPLANATION_BYTES]


def _read(answer: Stream, into: Content) -> None:
    length = answer.headers.get("Content-Length")
    # Compression that was not asked for is how a few bytes become many; a picture does not get smaller by it.
    if COMPRESSIONS & set(re.split(r"[\s,]+", answer.headers.get("Content-Encoding", "").lower())):
        raise PermanentError("result_compressed", "The link answers compressed.", service="result")
    lengths = set(re.split(r",\s*", length)) if length is not None else set()
    if not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
        raise PermanentError("result_bad_length", "The link announces no valid length.", service="result")
    if any(int(length) > MAX_BYTES for length in lengths):
        raise too_large()
    for piece in answer.pieces(decode=False):
        into.write(piece)
    if not into.size:
        raise TransientError("link_not_found", "The link leads to an empty file.", service="result")


def _broken_off(error: IndeterminateError, into: Content) -> TransientError:
    if error.code == "result_timeout" and into.size:
        return TransientError(
            "result_too_slow", f"Only {into.size} bytes of the result had come in time.", service="result"
        )
    return TransientError(error.code, error.sentence, service="result")
