import socket

import pytest
import requests

from chalicelib.errors import PermanentError, TransientError
from chalicelib.fetch import Fetch
from chalicelib.wire import Wire

URL = "https://results.example/a.png"


@pytest.fixture
def resolve(monkeypatch):
    """Names resolve to what the test says."""
    names = {"results.example": ["93.184.216.34"]}

    def getaddrinfo(host, port, **_):
        addresses = names.get(host, [host])
        if addresses == ["nowhere.example"]:
            raise socket.gaierror("no such name")
        family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.fixture
def fetch(clock, resolve):
    return Fetch(wire=Wire(clock), allowed_private_hosts=frozenset({"127.0.0.1:8001"}))


def test_a_link_is_fetched_without_any_key(answers, fetch):
    answers.add("GET", URL, body=b"picture")

    assert fetch.download(URL, timeout=5.0) == b"picture"
    assert "Authorization" not in answers.calls[0].request.headers


def test_a_private_host_is_fetched_if_it_is_allowed_by_name(answers, fetch):
    answers.add("GET", "http://127.0.0.1:8001/a.png", body=b"picture")

    assert fetch.download("http://127.0.0.1:8001/a.png", timeout=5.0) == b"picture"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/a", "http://", "http://u:p@results.example/", "//x", "http://[::1"]
)
def test_what_is_no_plain_address_is_refused(fetch, url):
    with pytest.raises(PermanentError) as caught:
        fetch.download(url, timeout=5.0)

    assert caught.value.code == "link_invalid"


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.0.0.1"], ["192.168.1.1"], ["169.254.169.254"], ["::1"], ["fe80::1%eth0"], ["fd00::1"],
     ["::ffff:127.0.0.1"], ["0.0.0.0"], ["100.64.0.1"], ["93.184.216.34", "10.0.0.1"]],
)  # fmt: skip
def test_a_name_that_leads_into_a_private_network_is_refused(fetch, resolve, addresses):
    resolve["results.example"] = addresses

    with pytest.raises(PermanentError) as caught:
        fetch.download(URL, timeout=5.0)

    assert caught.value.code == "link_private"


def test_an_allowed_host_is_allowed_on_its_port_only(fetch):
    with pytest.raises(PermanentError):
        fetch.download("http://127.0.0.1:8002/a.png", timeout=5.0)


def test_a_name_without_address_may_have_one_later(fetch):
    with pytest.raises(TransientError):
        fetch.download("https://nowhere.example/a.png", timeout=5.0)


@pytest.mark.parametrize("status", [301, 403, 404, 500])
def test_another_answer_than_the_file_is_tried_again(answers, fetch, status):
    answers.add("GET", URL, status=status, headers={"Location": "http://127.0.0.1/"})

    with pytest.raises(TransientError):
        fetch.download(URL, timeout=5.0)

    assert len(answers.calls) == 1


def test_a_cut_download_is_tried_again(answers, fetch):
    answers.add("GET", URL, body=requests.ConnectionError("reset"))

    with pytest.raises(TransientError):
        fetch.download(URL, timeout=5.0)
