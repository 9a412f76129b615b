"""The local cloud's limit of Cloudflare's calls, as ./run has it."""

import pytest

from chalicelib.d1 import Statement
from chalicelib.errors import TransientError
from tools.cloud import LocalCloud, Request


@pytest.fixture
def rate_limited():
    return True


def ask(cloud, path="/client/v4/accounts/local-account/d1/database/local-database/query"):
    answer = cloud.handle(Request("POST", path, headers={"authorization": "Bearer local-cloudflare-token"}, body=b"{}"))
    return answer.status, answer.headers


def test_the_1201st_call_of_five_minutes_locks_for_five_minutes_which_further_calls_do_not_prolong(cloud, clock):
    assert ask(cloud)[1]["ratelimit"] == '"default";r=1199;t=300'
    clock.advance(100.5)
    for _ in range(1198):
        ask(cloud, "/client/v4/accounts/local-account/anything")
    status, headers = ask(cloud)
    assert (status, headers["ratelimit"]) == (400, '"default";r=0;t=200')
    assert headers["ratelimit-policy"] == '"default";q=1200;w=300'
    assert "retry-after" not in headers

    clock.advance(100)
    for after, left in ((0, 300), (199.5, 101), (100, 1)):
        clock.advance(after)
        status, headers = ask(cloud)
        assert (status, headers["retry-after"], headers["ratelimit"]) == (429, str(left), f'"default";r=0;t={left}')
    clock.advance(0.5)
    status, headers = ask(cloud)
    assert (status, headers["ratelimit"]) == (400, '"default";r=1199;t=300')


def test_who_stays_within_the_limit_has_as_many_calls_in_the_next_window(cloud, clock):
    for _ in range(1200):
        assert ask(cloud)[0] == 400
    clock.advance(300)

    assert ask(cloud)[1]["ratelimit"] == '"default";r=1199;t=300'


def test_the_client_reads_the_calls_left_and_heeds_the_lock_out(cloud, empty_d1, clock):
    def query():
        return empty_d1.query([Statement("SELECT 1 AS n")], timeout=20.0, to_the_last=True)

    for _ in range(1198):
        ask(cloud)
    query()
    assert empty_d1.calls_left() == 1
    query()
    assert empty_d1.calls_left() == 0

    for calls in (1201, 1201):  # the second is not even sent
        with pytest.raises(TransientError) as caught:
            query()
        assert (caught.value.code, caught.value.retry_after) == ("d1_rate_limited", 300)
        assert cloud.calls["d1"] == calls
    clock.advance(301)
    assert empty_d1.calls_left() is None
    assert query() == [[{"n": 1}]]
    assert empty_d1.calls_left() == 1199


def test_calls_are_counted_where_that_is_asked_for_alone(tmp_path):
    cloud = LocalCloud(tmp_path / "uncounted", base_url="http://cloud.test:8001")

    assert {ask(cloud)[1]["ratelimit"] for _ in range(1300)} == {'"default";r=1199;t=1'}
    cloud.close()
