import contextlib
import http.server
import socket
import ssl
import threading
import time

import pytest
import requests
import trustme
from urllib3.util import connection

from chalicelib import content, fetch
from chalicelib.errors import PermanentError, TransientError
from chalicelib.fetch import Fetch, Guard
from chalicelib.runtime import Clock
from chalicelib.wire import Wire
from tests.conftest import new_content

URL = "https://results.example/a.png"
PUBLIC = "93.184.216.34"


@pytest.fixture
def names(monkeypatch):
    """Names resolve to what the test says, in turn; an address resolves to itself, as the machine reads it."""
    names = {"results.example": [[PUBLIC]]}
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **options):
        if host not in names:
            return real(host, port, *args, **{**options, "flags": socket.AI_NUMERICHOST})
        answers = names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.fixture
def connected(monkeypatch, names):
    """The addresses that a connection was opened to; none of the world outside is reached."""
    addresses = []
    real = connection.create_connection

    def create_connection(address, *args, **options):
        addresses.append(address)
        if address[0].startswith("127."):
            return real(address, *args, **options)
        raise ConnectionRefusedError

    monkeypatch.setattr(connection, "create_connection", create_connection)
    return addresses


class Host:
    """A web server of the test's own: `answer` is what it does with a connection's handler."""

    def __init__(self):
        self.requests = []
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                host.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                self.close_connection = True
                host.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.place = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.place}/a.png"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def send(handler, body=b"", *, status=200, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture
def download(names):
    """Downloads a link with the private hosts that are allowed; the bytes that came."""

    def run(url, *, allowed=(), timeout=5.0):
        guard = Guard(frozenset(allowed))
        with new_content() as into:
            Fetch(wire=Wire(Clock(), resolve=guard.resolve), clock=Clock()).download(url, into, timeout=timeout)
            into.file.seek(0)
            return into.file.read()

    return run


def test_a_link_is_fetched_without_any_key_or_cookie(host):
    host.answer = lambda handler: send(handler, b"picture", Content_Length="7", Set_Cookie="a=b; Path=/")
    same = Fetch(wire=Wire(Clock(), resolve=Guard(frozenset([host.place])).resolve), clock=Clock())

    with new_content() as into:
        same.download(host.url, into, timeout=5.0)
        same.download(host.url, into, timeout=5.0)

    assert len(host.requests) == 2
    for _, headers in host.requests:
        assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}
        assert headers["accept-encoding"] == "identity"


# By https the metadata address is not one that moto, of other tests, answers for itself.
REFUSED_ADDRESSES = {
    "http://127.0.0.1/a.png": "link_loopback",
    "http://127.255.0.9/a.png": "link_loopback",
    "http://[::1]/a.png": "link_loopback",
    "http://10.0.0.1/a.png": "link_private",
    "http://172.16.0.1/a.png": "link_private",
    "http://192.168.1.1/a.png": "link_private",
    "http://100.64.0.1/a.png": "link_private",
    "http://0.0.0.0/a.png": "link_private",
    "http://198.18.0.1/a.png": "link_private",
    "http://224.0.0.1/a.png": "link_private",
    "http://255.255.255.255/a.png": "link_private",
    "http://[fd00::1]/a.png": "link_private",
    "http://[ff02::1]/a.png": "link_private",
    "http://[::]/a.png": "link_private",
    "http://169.254.1.1/a.png": "link_link_local",
    "http://[fe80::1]/a.png": "link_link_local",
    "https://169.254.169.254/latest/meta-data/": "link_metadata",
    "http://169.254.170.2/v2/credentials": "link_metadata",
    "http://168.63.129.16/": "link_metadata",
    "http://100.100.100.200/": "link_metadata",
    "http://[fd00:ec2::254]/": "link_metadata",
    "http://[::ffff:127.0.0.1]/a.png": "link_mapped",
    "http://[::ffff:93.184.216.34]/a.png": "link_mapped",
    "http://[::127.0.0.1]/a.png": "link_mapped",
    "http://[2002:7f00:1::]/a.png": "link_mapped",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/a.png": "link_mapped",
    "http://[64:ff9b::7f00:1]/a.png": "link_loopback",
    "http://[64:ff9b::a00:1]/a.png": "link_private",
    "http://[fec0::1]/a.png": "link_private",
    "http://[4000::1]/a.png": "link_private",
    "http://[5f00::1]/a.png": "link_private",
    "http://[3fff::1]/a.png": "link_private",
    "http://[64:ff9b:1::7f00:1]/a.png": "link_private",
    "http://[::ffff:0:7f00:1]/a.png": "link_private",
    "http://[fe80::1%25eth0]/a.png": "link_link_local",
    "http://2130706433/a.png": "link_odd_host",
    "http://0x7f000001/a.png": "link_odd_host",
    "http://017700000001/a.png": "link_odd_host",
    "http://0177.0.0.1/a.png": "link_odd_host",
    "http://127.1/a.png": "link_odd_host",
    "http://0x7f.0.0.1/a.png": "link_odd_host",
    "http://127.0.0.1./a.png": "link_loopback",
    "file:///etc/passwd": "link_scheme",
    "ftp://results.example/a.png": "link_scheme",
    "data:image/png;base64,iVBORw0KGgo=": "link_scheme",
    "gopher://127.0.0.1/": "link_scheme",
    "//results.example/a.png": "link_scheme",
    "": "link_scheme",
    "http://": "link_invalid",
    "http://[::1": "link_invalid",
    "http://results.example:99999/": "link_invalid",
    f"http://{'a' * 64}.example/": "link_invalid",
    "http://user:secret@results.example/a.png": "link_credentials",
    "http://user@results.example/a.png": "link_credentials",
    "http://@127.0.0.1/a.png": "link_credentials",
}


@pytest.mark.parametrize(("url", "code"), REFUSED_ADDRESSES.items())
def test_an_address_that_must_not_be_visited_is_refused_unvisited(download, connected, url, code):
    with pytest.raises(PermanentError) as caught:
        download(url)

    assert caught.value.code == code
    assert connected == []


@pytest.mark.parametrize(
    ("addresses", "code"),
    [
        (["127.0.0.1"], "link_loopback"),
        (["10.0.0.1"], "link_private"),
        (["169.254.169.254"], "link_metadata"),
        (["fe80::1%eth0"], "link_link_local"),
        (["::ffff:10.0.0.1"], "link_mapped"),
        ([PUBLIC, "10.0.0.1"], "link_private"),
    ],
)
def test_a_name_that_leads_there_is_refused_unvisited(download, names, connected, addresses, code):
    names["results.example"] = [addresses]

    with pytest.raises(PermanentError) as caught:
        download(URL)

    assert caught.value.code == code
    assert connected == []


def test_the_address_that_was_looked_at_is_the_one_connected_to(download, names, connected, host):
    names["results.example"] = [[PUBLIC], ["127.0.0.1"]]

    with pytest.raises(TransientError) as caught:
        download(f"http://results.example:{host.server.server_port}/a.png")

    assert caught.value.code == "result_unreachable"
    assert [address for address, _ in connected] == [PUBLIC]
    assert host.requests == []


def test_each_connection_looks_again(names, connected, host):
    names["results.example"] = [["127.0.0.1"], ["10.0.0.1"]]

    def answer(handler):
        send(handler, b"picture", Content_Length="7")
        handler.close_connection = False  # the server would go on, on this connection

    host.answer = answer
    place = f"results.example:{host.server.server_port}"
    same = Fetch(wire=Wire(Clock(), resolve=Guard(frozenset([place])).resolve), clock=Clock())

    with new_content() as into:
        same.download(f"http://{place}/a.png", into, timeout=5.0)
        with pytest.raises(TransientError):
            same.download(f"http://{place}/a.png", into, timeout=5.0)

    assert [address for address, _ in connected] == ["127.0.0.1", "10.0.0.1"]


@pytest.mark.parametrize(
    ("certified", "error"), [("results.example", None), ("other.example", "result_bad_certificate")]
)
def test_the_certificate_must_be_that_of_the_name(names, host, download, monkeypatch, tmp_path, certified, error):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(certified).configure_cert(context)
    host.server.socket = context.wrap_socket(host.server.socket, server_side=True)
    host.answer = lambda handler: send(handler, b"picture", Content_Length="7")
    names["results.example"] = [["127.0.0.1"]]
    place = f"results.example:{host.server.server_port}"

    if error is None:
        assert download(f"https://{place}/a.png", allowed=[place]) == b"picture"
        return
    with pytest.raises(TransientError) as caught:
        download(f"https://{place}/a.png", allowed=[place])
    assert caught.value.code == error
    assert host.requests == []


def test_a_handshake_that_never_ends_is_cut(download, request):
    server = socket.create_server(("127.0.0.1", 0))
    request.addfinalizer(server.close)

    def shake_hands_slowly():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"\x16\x03\x03\x40\x00")  # 16 kB of handshake will follow
            while not threading.Event().wait(0.02):
                connection.sendall(b"\x02")

    thread = threading.Thread(target=shake_hands_slowly)
    thread.start()
    place = f"127.0.0.1:{server.getsockname()[1]}"

    start = time.monotonic()
    with pytest.raises(TransientError) as caught:
        download(f"https://{place}/a.png", allowed=[place], timeout=0.5)
    thread.join()

    assert caught.value.code == "result_timeout"
    assert time.monotonic() - start < 2.0


def test_the_body_of_a_redirect_is_not_read(host, download, monkeypatch):
    monkeypatch.setattr(content, "MAX_BYTES", 5_000_000)

    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", "http://127.0.0.1/")
        handler.end_headers()
        endless_body(handler)

    host.answer = answer

    with pytest.raises(PermanentError) as caught:
        download(host.url, allowed=[host.place], timeout=2.0)

    assert caught.value.code == "redirect_refused"


def test_addresses_are_not_tried_beyond_the_time(names, monkeypatch, host):
    names["results.example"] = [[PUBLIC, "93.184.216.35", "93.184.216.36", "93.184.216.37"]]
    tried = []

    def silent(address, timeout=None, *args, **options):
        tried.append(address)
        threading.Event().wait(0.2)
        raise TimeoutError

    monkeypatch.setattr(connection, "create_connection", silent)
    same = Fetch(wire=Wire(Clock(), resolve=Guard(frozenset()).resolve), clock=Clock())

    with pytest.raises(TransientError), new_content() as into:
        same.download("http://results.example/a.png", into, timeout=0.3)

    assert len(tried) == 3  # the last one is always tried


def test_the_next_address_of_a_host_is_tried_when_the_first_is_dead(download, names, connected):
    names["results.example"] = [[PUBLIC, "93.184.216.35"]]

    with pytest.raises(TransientError):
        download(URL)

    assert [address for address, _ in connected] == [PUBLIC, "93.184.216.35"]


def test_a_public_address_seen_through_nat64_is_visited(download, names, connected):
    names["results.example"] = [["64:ff9b::5db8:d822"]]

    with pytest.raises(TransientError):
        download(URL)

    assert len(connected) == 1


def test_an_allowed_host_is_allowed_on_its_port_only(download, connected):
    with pytest.raises(PermanentError):
        download("http://127.0.0.1:8002/a.png", allowed=["127.0.0.1:8001"])

    assert connected == []


def test_a_name_without_address_may_have_one_later(download):
    with pytest.raises(TransientError) as caught:
        download("https://nowhere.example/a.png")

    assert caught.value.code == "result_unreachable"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(host, download, status):
    def answer(handler):
        if handler.path == "/b.png":
            return send(handler, b"picture", Content_Length="7")
        return send(handler, status=status, Location="/b.png", Content_Length="0")

    host.answer = answer

    assert download(host.url, allowed=[host.place]) == b"picture"


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1:1/a.png", "https://169.254.169.254/latest/", "http://2130706433/", "http://[::1]/",
     "file:///etc/passwd", "data:image/png;base64,iVBORw0KGgo=", "ftp://results.example/",
     "http://u:p@results.example/", "http://[", "//10.0.0.1/"],
)  # fmt: skip
def test_a_redirect_to_where_no_link_may_lead_is_refused(host, download, target):
    host.answer = lambda handler: send(handler, status=302, Location=target, Content_Length="0")

    with pytest.raises(PermanentError) as caught:
        download(host.url, allowed=[host.place])

    assert caught.value.code == "redirect_refused"
    assert len(host.requests) == 1


def test_a_redirect_without_end_is_refused(host, download):
    host.answer = lambda handler: send(handler, status=302, Location=host.url, Content_Length="0")

    with pytest.raises(PermanentError) as caught:
        download(host.url, allowed=[host.place])

    assert caught.value.code == "redirect_loop"
    assert len(host.requests) == fetch.MAX_REDIRECTS + 1


EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (400, b"<Error><Code>ExpiredRequest</Code></Error>", PermanentError, "link_expired"),
        (403, EXPIRED, PermanentError, "link_expired"),
        (401, b"ExpiredToken", PermanentError, "link_expired"),
        (401, b"", TransientError, "link_forbidden"),
        (403, b"<Error><Code>AccessDenied</Code></Error>", TransientError, "link_forbidden"),
        (404, b"", TransientError, "link_not_found"),
        (410, b"", TransientError, "link_not_found"),
        (200, b"", TransientError, "link_not_found"),
        (400, b"no", TransientError, "link_refused"),
        (302, b"", TransientError, "link_refused"),
        (206, b"pic", TransientError, "link_refused"),
        (103, b"", TransientError, "result_unavailable"),
        (408, b"", TransientError, "result_unavailable"),
        (429, b"", TransientError, "result_unavailable"),
        (500, EXPIRED, TransientError, "result_unavailable"),
        (503, b"", TransientError, "result_unavailable"),
    ],
)
def test_each_refusal_of_a_link_has_its_code_and_class(host, download, status, body, error, code):
    host.answer = lambda handler: send(handler, body, status=status, Content_Length=str(len(body)))

    with pytest.raises(error) as caught:
        download(host.url, allowed=[host.place])

    assert caught.value.code == code
    assert status == 200 or str(status) in caught.value.sentence


def test_a_refusal_whose_explanation_breaks_off_is_a_refusal(host, download):
    host.answer = lambda handler: send(handler, b"<Error>", status=403, Content_Length="400")

    with pytest.raises(TransientError) as caught:
        download(host.url, allowed=[host.place])

    assert caught.value.code == "link_forbidden"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Encoding": "aws-chunked", "Content_Length": "7"},
        {"Content_Encoding": "", "Content_Length": "7"},
        {"Content_Encoding": "utf-8", "Content_Length": "7"},
        {"Content_Type": "text/html", "Content_Length": "7"},
    ],
)
def test_headers_that_say_nothing_of_the_bytes_are_nothing(host, download, headers):
    host.answer = lambda handler: send(handler, b"picture", **headers)

    assert download(host.url, allowed=[host.place]) == b"picture"


def test_a_length_that_is_said_twice_is_a_length(host, download):
    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 7\r\n\r\npicture")

    host.answer = answer

    assert download(host.url, allowed=[host.place]) == b"picture"


def test_a_redirect_in_raw_utf8_leads_to_the_same_place_as_in_a_browser(host, download):
    def answer(handler):
        if handler.path == "/b.png":
            return send(handler, b"picture", Content_Length="7")
        if handler.path == "/%E0%B9%81%E0%B8%A1%E0%B8%A7.png":
            return send(handler, status=302, Location="/b.png", Content_Length="0")
        return handler.wfile.write("HTTP/1.1 302 Found\r\nLocation: /แมว.png\r\nContent-Length: 0\r\n\r\n".encode())

    host.answer = answer

    assert download(host.url, allowed=[host.place]) == b"picture"


def test_cookies_made_to_take_long_to_read_are_not_read(host, download):
    cookie = "a=" + "\\" * 30_000

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Set-Cookie", "a=b")
        for _ in range(90):
            handler.send_header("Set-Cookie2", cookie)
        handler.send_header("Content-Length", "7")
        handler.end_headers()
        handler.wfile.write(b"picture")

    host.answer = answer
    start = time.process_time()

    assert download(host.url, allowed=[host.place]) == b"picture"
    assert time.process_time() - start < 3.0


def test_a_server_that_is_busy_says_when_to_come_back(host, download):
    host.answer = lambda handler: send(handler, status=429, Content_Length="0", Retry_After="30")

    with pytest.raises(TransientError) as caught:
        download(host.url, allowed=[host.place])

    assert caught.value.retry_after == 30


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    endless_body(handler)


def endless_body(handler):
    with contextlib.suppress(OSError):  # until the other end has had enough
        while True:
            handler.wfile.write(b"x" * 65_536)


def trickle(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while not threading.Event().wait(0.02):
            handler.wfile.write(b"x")


BODIES = {
    "endless": (endless, PermanentError, "result_too_large"),
    "announced too large": (
        lambda handler: send(handler, Content_Length=str(content.MAX_BYTES + 1)),
        PermanentError,
        "result_too_large",
    ),
    "shorter than announced": (
        lambda handler: send(handler, b"pic", Content_Length="7"),
        TransientError,
        "result_cut_off",
    ),
    "no number for a length": (
        lambda handler: send(handler, b"pic", Content_Length="many"),
        PermanentError,
        "result_bad_length",
    ),
    "a length under zero": (
        lambda handler: send(handler, b"pic", Content_Length="-3"),
        PermanentError,
        "result_bad_length",
    ),
    "two lengths": (
        lambda handler: handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\npict"
        ),
        TransientError,
        "result_cut_off",
    ),
    "chunks that end early": (
        lambda handler: send(handler, b"7\r\npic", Transfer_Encoding="chunked"),
        TransientError,
        "result_cut_off",
    ),
    "compressed": (
        lambda handler: send(handler, b"\x1f\x8b", Content_Encoding="gzip", Content_Length="2"),
        PermanentError,
        "result_compressed",
    ),
    "slow trickle": (trickle, TransientError, "result_too_slow"),
    "silence": (lambda handler: threading.Event().wait(0.6), TransientError, "result_timeout"),
    "no HTTP": (lambda handler: handler.wfile.write(b"hello\r\n\r\n"), TransientError, "result_cut_off"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "error", "code"), BODIES.values(), ids=BODIES)
def test_a_body_that_is_not_right_is_refused(host, download, monkeypatch, answer, error, code):
    monkeypatch.setattr(content, "MAX_BYTES", 5_000_000)
    monkeypatch.setattr(fetch, "MAX_BYTES", 5_000_000)
    host.answer = answer

    start = time.monotonic()
    with pytest.raises(error) as caught:
        download(host.url, allowed=[host.place], timeout=0.5)

    assert caught.value.code == code
    assert time.monotonic() - start < 2.0


def test_what_comes_after_the_announced_length_is_not_the_file(host, download):
    host.answer = lambda handler: send(handler, b"picture and more", Content_Length="7")

    assert download(host.url, allowed=[host.place]) == b"picture"


def test_a_cut_download_is_tried_again(answers, download):
    answers.add("GET", URL, body=requests.ConnectionError("reset"))

    with pytest.raises(TransientError) as caught:
        download(URL)

    assert caught.value.code == "result_cut_off"
