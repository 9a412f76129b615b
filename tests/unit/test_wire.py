import select
import socket
import threading
import time

import pytest
import requests
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError

from chalicelib.errors import IndeterminateError, TransientError
from chalicelib.runtime import Clock
from chalicelib.wire import IDLE_LIMIT, Wire

URL = "http://service.test/x"


def exchange(wire, **options):
    return wire.exchange("d1", "POST", URL, headers={}, body=b"{}", **{"timeout": 5.0, "max_bytes": 1000, **options})


@pytest.mark.parametrize(
    ("failure", "error", "code"),
    [
        (requests.ConnectTimeout(), TransientError, "d1_unreachable"),
        (requests.ConnectionError(MaxRetryError(None, URL, NewConnectionError(None, "refused"))), TransientError, None),
        (requests.ConnectionError(MaxRetryError(None, URL, ConnectTimeoutError(None, "late"))), TransientError, None),
        (requests.ConnectionError("reset by peer"), IndeterminateError, "d1_cut_off"),
        (requests.ReadTimeout(), IndeterminateError, "d1_timeout"),
        (requests.exceptions.SSLError("eof"), IndeterminateError, "d1_cut_off"),
        (requests.exceptions.ChunkedEncodingError(), IndeterminateError, "d1_cut_off"),
        (requests.ConnectionError(), IndeterminateError, "d1_cut_off"),
    ],
)
def test_only_a_failure_to_connect_certainly_had_no_effect(answers, clock, failure, error, code):
    answers.add("POST", URL, body=failure)

    with pytest.raises(error) as caught:
        exchange(Wire(clock))

    assert code is None or caught.value.code == code
    assert caught.value.service == "d1"


def test_a_real_refused_connection_had_no_effect(clock):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(TransientError):
            Wire(clock).exchange("d1", "GET", url, headers={}, timeout=5.0, max_bytes=10)


def test_a_name_without_an_address_had_no_effect(clock):
    with pytest.raises(TransientError):
        Wire(clock).exchange("d1", "GET", "http://no-such-host.invalid/", headers={}, timeout=5.0, max_bytes=10)


def test_an_address_that_is_none_had_no_effect(clock):
    with pytest.raises(TransientError, match="base URL"):
        Wire(clock).exchange("d1", "GET", "http:///nowhere", headers={}, timeout=5.0, max_bytes=10)


def test_an_answer_over_the_limit_is_cut(answers, clock):
    answers.add("POST", URL, body=b"x" * 1001)

    with pytest.raises(IndeterminateError) as caught:
        exchange(Wire(clock))

    assert caught.value.code == "d1_answer_too_large"


@pytest.fixture
def ask():
    """Ask a server that answers as the test says, over a real socket."""
    threads = []

    def run(answer, *, timeout):
        server = socket.create_server(("127.0.0.1", 0))

        def serve():
            with server, server.accept()[0] as connection:
                connection.recv(65_536)
                answer(connection)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        return Wire(Clock()).exchange("d1", "GET", url, headers={}, timeout=timeout, max_bytes=200_000)

    yield run
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", b""),
        (b"HTTP/1.1 200 OK\r\nX-A", b"a"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_does_not_end_is_given_up_in_time(ask, sent, more):
    def answer(connection):
        connection.sendall(sent)
        # Goes on until the client has given up.
        while not select.select([connection], [], [], 0.05 if more else 30)[0]:
            connection.sendall(more)

    start = time.perf_counter()
    with pytest.raises(IndeterminateError) as caught:
        ask(answer, timeout=0.4)

    assert caught.value.code == "d1_timeout"
    assert time.perf_counter() - start < 3


def test_a_connection_that_is_used_again_is_watched_again():
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server, server.accept()[0] as connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100):  # five seconds, if the client does not give up before
                if select.select([connection], [], [], 0.05)[0]:
                    return
                connection.sendall(b"x")

    thread = threading.Thread(target=serve)
    thread.start()
    wire, url = Wire(Clock()), f"http://127.0.0.1:{server.getsockname()[1]}/"
    assert wire.exchange("d1", "GET", url, headers={}, timeout=5.0, max_bytes=10).body == b"ok"

    start = time.perf_counter()
    with pytest.raises(IndeterminateError) as caught:
        wire.exchange("d1", "GET", url, headers={}, timeout=0.4, max_bytes=200_000)
    thread.join()

    assert caught.value.code == "d1_timeout"
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"",
    ],
)
def test_an_answer_that_is_cut_off_is_not_taken_for_a_whole_one(ask, sent):
    with pytest.raises(IndeterminateError) as caught:
        ask(lambda connection: connection.sendall(sent), timeout=5.0)

    assert caught.value.code == "d1_cut_off"


def test_redirects_are_not_followed(answers, clock):
    answers.add("POST", URL, status=302, headers={"Location": "http://elsewhere.test/"})

    assert exchange(Wire(clock)).status == 302


def test_netrc_cannot_replace_our_authorization(answers, clock, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine service.test login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    answers.add("POST", URL)

    Wire(clock).exchange("d1", "POST", URL, headers={"Authorization": "Bearer ours"}, timeout=5.0, max_bytes=10)

    assert answers.calls[0].request.headers["Authorization"] == "Bearer ours"


def test_connections_that_idled_are_not_used_again(cloud_server, clock, monkeypatch):
    opened = []
    connect = HTTPConnection.connect
    monkeypatch.setattr(HTTPConnection, "connect", lambda self: (opened.append(1), connect(self))[1])
    wire = Wire(clock)

    def get():
        wire.exchange("result", "GET", f"{cloud_server.base_url}/cdn/x", headers={}, timeout=5.0, max_bytes=1000)

    get()
    get()
    assert len(opened) == 1
    clock.advance(IDLE_LIMIT + 1)
    get()
    assert len(opened) == 2


@pytest.mark.parametrize(("header", "seconds"), [("30", 30), (" 5 ", 5), ("", None), ("soon", None), ("-1", None)])
def test_retry_after_is_seconds_or_nothing(answers, clock, header, seconds):
    answers.add("POST", URL, headers={"Retry-After": header})

    assert exchange(Wire(clock)).retry_after == seconds
