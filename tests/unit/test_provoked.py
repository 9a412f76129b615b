"""
Each alarm goes off at a fault around the real service or in it, and ends when that is mended; neither comes twice.

`pytest -s` on this file says how many minutes it takes from the fault to the alarm, and from the mending to OK.
"""

import contextlib
import json
import logging
import math
from dataclasses import replace

import pytest
from chalice.app import Response
from chalice.local import LambdaContext

import app
from chalicelib import answers, bootstrap, log, metrics
from chalicelib.auth import Right
from chalicelib.reads import Reads
from tests import openapi
from tests.alarms import ALARM, OK, STACK, Watch
from tests.conftest import AUTH
from tools import alarms as of_stack
from tools import schedule
from tools.cloud import Request

TEMPLATE = {"Resources": of_stack.resources({"DEPLOY_DAILY_USD": "0.20"})}
PRICE = 0.001  # US dollars for a second of a worker
JOB = {"prompt": "a cat"}
CREATE, LIST = ("POST", "/api/queue/create"), ("GET", "/api/jobs?limit=1")
AT_MOST = 120  # minutes that an alarm is waited for
LONGER = 10  # minutes for which it must not end
AROUND = 5  # minutes before and after it all, which are well


def simulated(**wish):
    return {"input": {**JOB, "simulate": wish}}


@pytest.fixture
def environment(environment):
    return {**environment, "SERVICE_NAME": STACK}


@pytest.fixture
def rate_limited():
    return True


@pytest.fixture(autouse=True)
def _metrics_end_here():
    yield
    metrics.name("")


class Story:
    """Minutes of the service, one after the other, with what is asked of it, and what its alarms say after each."""

    def __init__(self, *, client, clock, cloud, faults, table, monkeypatch, fixture):
        self.clock, self.cloud, self.faults, self.table = clock, cloud, faults, table
        self.monkeypatch, self.fixture = monkeypatch, fixture
        self.service = bootstrap.service()
        self.minutes = 0
        self.is_scheduled = True
        self.orders = [JOB]  # what is created in each minute
        self.others = lambda: None  # what others do in it
        self.told = []  # changes of alarms, as mails tell them
        self._client = client
        self._stream = logging.getLogger("ob-ai-studio").handlers[0].stream
        self._watch = Watch(TEMPLATE)
        self._points = []  # of AWS's own metrics

    @property
    def alarms(self):
        """Those that are not OK."""
        return {name for name, state in self._watch.states.items() if state != OK}

    def go_on(self, minutes):
        for _ in range(minutes):
            self._minute()

    def until(self, done):
        begun = self.minutes
        while not done():
            assert self.minutes - begun < AT_MOST, self.told
            self._minute()

    def only(self, *orders):
        """These jobs now, and no other while the fault lasts; a long one is seen through sooner so."""
        for order in orders:
            self.ask(*CREATE, order)
        self.orders = []

    def leave_out(self, *, hours):
        """Hours that nothing is worth to be seen of."""
        self.clock.advance(3600 * hours)
        self.minutes += 60 * hours

    def ask(self, method, path, body=None):
        """The answer to one request; where the function fails, API Gateway's is 502."""
        headers, sent = {"Content-Type": "application/json", **AUTH}, json.dumps(body).encode() if body else b""
        answer = self._invoke("APIHandler", lambda: self._client.http.request(method, path, headers=headers, body=sent))
        if answer:
            openapi.check(method, path, answer.status_code, answer.headers, answer.body)
        status = answer.status_code if answer else 502
        for name, value in {"Count": 1, "5XXError": int(status >= 500)}.items():
            self._add_point("AWS/ApiGateway", name, {"ApiName": STACK, "Stage": "v1"}, value)
        return answer and json.loads(answer.body)

    def _minute(self):
        self.others()
        for order in self.orders:
            self.ask(*CREATE, order)
        if self.orders:
            self.ask(*LIST)
        if self.is_scheduled:
            context = LambdaContext("poll_jobs", 512, max_runtime_ms=schedule.TIMEOUT_MS)
            self._invoke("PollJobs", lambda: app.poll_jobs(schedule.event(), context))
        self.clock.advance(60 - self.clock.at.timestamp() % 60)
        self.minutes += 1
        self._look()

    def _invoke(self, function, call):
        """What a function returns; None where it raises, which Lambda counts."""
        answer = None
        with contextlib.suppress(Exception):
            answer = call()
        self._add_point("AWS/Lambda", "Errors", {"FunctionName": function}, int(answer is None))
        return answer

    def _add_point(self, namespace, name, dimensions, value):
        self._points.append((namespace, name, dimensions, self.clock.at.timestamp(), value))

    def _look(self):
        self._watch.hear(self._stream.getvalue().splitlines(), self._points)
        self._stream.seek(0)
        self._stream.truncate()
        self._points.clear()
        before = dict(self._watch.states)
        self._watch.look(int(self.clock.at.timestamp() // 60))
        self.told += [(name, state) for name, state in self._watch.states.items() if state != before[name]]


@pytest.fixture
def story(client, clock, cloud, faults, table, lines, monkeypatch, request):
    monkeypatch.setattr(log, "Clock", lambda: clock)
    return Story(
        client=client, clock=clock, cloud=cloud, faults=faults, table=table, monkeypatch=monkeypatch,
        fixture=request.getfixturevalue,
    )  # fmt: skip


# The faults: what follows `yield` mends them.


def schedule_is_not_run(story):
    story.is_scheduled = False
    yield
    story.is_scheduled = True


def d1_fails(story):
    story.faults.add("/query$", (500, "no"), times=math.inf)
    yield
    story.faults.clear()


def cloudflare_locks_us_out(story):
    """Another of the account's tools calls on and on."""
    story.others = lambda: story.cloud._rate_limit.leave(0)
    yield
    story.cloud._rate_limit.leave(1200)
    story.others = lambda: None


def callers_use_up_the_calls(story):
    """They ask other containers of the service 280 times a minute, and these leave what is kept for the rounds."""

    def ask():
        for _ in range(280):
            if story.cloud._rate_limit.calls_left() > answers.KEPT_CALLS[Right.READ]:
                story.cloud._rate_limit._take()

    story.others = ask
    yield
    story.others = lambda: None


def runpod_takes_nothing_for_long(story):
    story.faults.add("/run$", (429, "", {"Retry-After": "1500"}), times=math.inf)
    story.only(JOB)
    yield
    story.faults.clear()


def endpoint_has_no_worker(story):
    simulate_health(story, {"workers": {"idle": 0}, "hold": True})
    story.only(JOB)
    yield
    simulate_health(story, {"workers": None})


def simulate_health(story, wish):
    headers = {"authorization": "Bearer local-runpod-key"}
    body = json.dumps(wish).encode()
    story.cloud.handle(Request("POST", "/v2/local-endpoint/simulate/health", "", headers, body))


def runpod_tells_no_status(story):
    """So that nobody knows whether a worker has the run."""
    story.faults.add("/status/", (500, "no"), times=math.inf)
    story.only(JOB)
    yield
    story.faults.clear()


def runpod_is_silent_about_a_run(story):
    """It tells nothing more of it, and does not cancel it."""
    job_id = story.ask(*CREATE, simulated(run_seconds=1000))["id"]
    story.go_on(1)
    (job,) = story.table("SELECT runpod_job_id, runpod_status FROM jobs WHERE id = ?", job_id)
    assert job["runpod_status"] == "IN_PROGRESS"
    story.faults.add(f"/(status|cancel)/{job['runpod_job_id']}$", (500, "no"), times=math.inf)
    story.only()
    yield
    story.faults.clear()


def runpod_refuses_the_key(story):
    story.faults.add("/run$", (401, {"error": "Unauthorized"}), times=math.inf)
    yield
    story.faults.clear()


def r2_fails(story):
    mend = story.fixture("no_r2")
    yield
    mend()


def r2_fails_until_results_are_lost(story):
    mend = story.fixture("no_r2")
    yield
    mend()
    for dead in story.table("SELECT id FROM jobs WHERE dead_at IS NOT NULL"):
        story.ask("POST", f"/api/jobs/{dead['id']}/retry")


def workers_fail_two_of_three(story):
    """Ten in a row would pause the endpoint."""
    story.orders = [simulated(status="FAILED"), JOB, simulated(status="FAILED")]
    yield


def a_setting_is_lost(story):
    story.monkeypatch.setenv("D1_DATABASE_ID", "")
    bootstrap.service.cache_clear()
    yield
    story.monkeypatch.setenv("D1_DATABASE_ID", story.service.settings.d1_database_id)


def answers_cannot_be_serialised(story):
    """And nobody asks any more when they can."""
    respond = answers.respond
    story.monkeypatch.setattr(answers, "respond", lambda *_: Response(body=story))
    yield
    story.monkeypatch.setattr(answers, "respond", respond)
    story.orders = []


def a_route_crashes(story):
    """And nobody asks any more when it does not."""
    page = Reads.page
    story.monkeypatch.setattr(Reads, "page", lambda *_, **__: None)
    yield
    story.monkeypatch.setattr(Reads, "page", page)
    story.orders = []


def jobs_take_long(story):
    """Each costs six cents; afterwards none comes."""
    known = story.service.models.known
    story.monkeypatch.setitem(known, "qwen-image", replace(known["qwen-image"], price=PRICE))
    story.orders = [simulated(run_seconds=60)]
    yield
    story.orders = []
    story.go_on(2)  # until those under way are done
    story.leave_out(hours=23)


# Each fault, the alarm that it is for, and all that go off, in their order.
SCENARIOS = [
    (schedule_is_not_run, "no-rounds", ["no-rounds"]),
    (d1_fails, "rounds-fail", ["rounds-fail", "api-errors"]),
    (cloudflare_locks_us_out, "rounds-fail", ["d1-calls-run-out", "rounds-fail", "api-errors"]),
    (callers_use_up_the_calls, "d1-calls-run-out", ["d1-calls-run-out"]),
    (runpod_takes_nothing_for_long, "queue-stuck", ["queue-stuck"]),
    (endpoint_has_no_worker, "no-worker", ["no-worker"]),
    (runpod_tells_no_status, "no-worker", ["no-worker"]),
    (runpod_is_silent_about_a_run, "runs-too-long", ["runs-too-long"]),
    (runpod_refuses_the_key, "endpoint-errors", ["endpoint-errors"]),
    (r2_fails, "storing-fails", ["storing-fails"]),
    (r2_fails_until_results_are_lost, "dead-letters", ["storing-fails", "dead-letters", "most-jobs-fail"]),
    (workers_fail_two_of_three, "most-jobs-fail", ["most-jobs-fail"]),
    (a_setting_is_lost, "schedule-fails", ["schedule-fails", "api-errors", "no-rounds"]),
    (answers_cannot_be_serialised, "api-fails", ["api-fails", "api-errors"]),
    (a_route_crashes, "api-errors", ["api-errors"]),
    (jobs_take_long, "over-budget", ["over-budget"]),
]


@pytest.mark.parametrize(("fault", "alarm", "alarms"), SCENARIOS, ids=[fault.__name__ for fault, *_ in SCENARIOS])
def test_an_alarm_goes_off_once_at_its_fault_and_ends_when_that_is_mended(story, fault, alarm, alarms):
    story.go_on(AROUND)
    assert story.alarms == set()
    story.told.clear()
    trouble = fault(story)
    next(trouble)

    begun = story.minutes
    story.until(lambda: alarm in story.alarms)
    off = story.minutes - begun
    story.go_on(LONGER)
    assert story.told == [(name, ALARM) for name in alarms]

    begun = story.minutes
    story.orders = [JOB]
    next(trouble, None)
    story.until(lambda: not story.alarms)
    well = story.minutes - begun
    story.go_on(AROUND)
    assert sorted(story.told[len(alarms) :]) == sorted((name, OK) for name in alarms)
    beside = [name for name in alarms if name != alarm]
    words = fault.__name__.replace("_", " ")
    print(f"\n{alarm:16} {off:4} min to the alarm, {well:4} to OK: {words}", *beside, sep=" + ", end="")


def test_every_alarm_is_provoked():
    assert {alarm for _, alarm, _ in SCENARIOS} == Watch(TEMPLATE).states.keys()
