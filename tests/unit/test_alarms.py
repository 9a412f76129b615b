"""Each alarm is silent while all is well, goes off at its fault, and is silent again; README and dashboard know it."""

import json
import re
from pathlib import Path

import pytest
from jsonschema_rs import ValidationError

from chalicelib import pipeline, store
from chalicelib.metrics import METRICS
from tests.alarms import ALARM, INSUFFICIENT, OK, evaluate, next_state, read
from tools import Problem, alarms

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STACK = "ob-ai-studio-prod"
BEGIN = 1_795_400_040  # a whole minute
TOLD = {"DEPLOY_ALARM_EMAIL": "ops@example.com", "DEPLOY_DAILY_USD": "10"}
OPERATIONS = README.split("\n## Operations\n")[1].split("\n## ")[0]
RUNBOOKS = {heading.casefold() for heading in re.findall(r"^### (.+)$", OPERATIONS, flags=re.MULTILINE)} - {"alarms"}
OF_AWS = {
    "AWS/Lambda": ({"FunctionName"}, {"Errors", "Throttles", "Duration"}),
    "AWS/ApiGateway": ({"ApiName", "Stage"}, {"5XXError", "Count", "Latency"}),
}


@pytest.fixture(scope="module")
def made():
    """The alarms and the dashboard of a stage that has all of them."""
    return {"Resources": alarms.resources(TOLD)}


def properties(made, kind="Alarm"):
    found = {name: one["Properties"] for name, one in made["Resources"].items() if one["Type"].endswith(f"::{kind}")}
    assert found
    return found


# What a minute writes. A round's first line of the minute has the gauges too.

NOTHING = dict.fromkeys(METRICS, 0)
GAUGES = {
    "Queued", "Running", "Storing", "OldestQueued", "OldestRunning", "OldestWithoutWorker", "OldestStoring",
    "DeadLetters", "SpooledFiles", "SpooledBytes", "PausedEndpoints",
}  # fmt: skip
IDLE = {**NOTHING, "Rounds": 1, "RoundSeconds": 0.2, "D1Calls": 1, "D1CallsLeft": 1190}
BUSY = {
    **NOTHING, "Rounds": 1, "RoundSeconds": 4.0, "D1Calls": 9, "D1CallsLeft": 640,
    "Submits": 11, "Done": 10, "Errors": 1, "Queued": 30, "Running": 40, "Storing": 3, "CostUSD": 0.001,
    "OldestQueued": 90, "OldestRunning": 1700, "OldestWithoutWorker": 240, "OldestStoring": 25, "StoresFailed": 1,
}  # fmt: skip
REQUESTS = {"Count": 60, "5XXError": 0}


def line(instant, figures, **more):
    metrics = [{"Name": name, "Unit": METRICS[name]} for name in figures]
    directive = {"Namespace": "OBAIStudio", "Dimensions": [["Service", *more]], "Metrics": metrics}
    emf = {"Timestamp": int(instant * 1000), "CloudWatchMetrics": [directive]}
    return json.dumps({"_aws": emf, "message": "metrics", "Service": STACK, **more, **figures})


def minute(number, figures, *, rounds=4, gauges=1, failing=0, left=None, requests=(), **_):
    """
    The lines of one minute of the schedule, in which so many rounds have gauges and so many fail, and of a request, if
    there are any.
    """
    begin = BEGIN + 60 * number
    for nth in range(rounds):
        given = {name: value for name, value in figures.items() if name not in GAUGES or nth < gauges}
        yield line(begin + 15 * (nth % 4), {**given, "RoundsFailed": int(nth < failing)})
        if figures["Errors"]:
            yield line(begin + 15 * (nth % 4), {"Errors": figures["Errors"]}, Code="worker_failed")
    if requests:
        yield line(begin + 30, {"D1Calls": 2, "D1CallsLeft": figures["D1CallsLeft"] if left is None else left})
    yield json.dumps({"message": "round", "level": "info"})


def of_aws(number, figures, *, rounds=4, functions=(), requests=(), **_):
    """What AWS tells of that minute: nothing of what was not called."""
    instant = BEGIN + 60 * number
    called = ["PollJobs"] * bool(rounds) + ["APIHandler"] * bool(requests)
    for function in called:
        for name in ("Errors", "Throttles"):
            value = dict(functions).get((function, name), 0)
            yield "AWS/Lambda", name, {"FunctionName": function}, instant, value
    for name, value in dict(requests).items():
        yield "AWS/ApiGateway", name, {"ApiName": STACK, "Stage": "v1"}, instant, value


class Story:
    """Minutes, one after the other, and what the alarms say at the end of each part."""

    def __init__(self, made):
        self.made = made
        self.number = 0
        self.lines = []
        self.points = []

    def go_on(self, minutes, figures, **how):
        for _ in range(minutes):
            self.lines += minute(self.number, figures, **how)
            self.points += of_aws(self.number, figures, **how)
            self.number += 1

    def alarms(self):
        """Those that are not OK."""
        states = evaluate(self.made, self.lines, BEGIN + 60 * self.number, self.points, stack=STACK)
        assert len(states) == len(properties(self.made))
        return {name: state for name, state in states.items() if state != OK}


@pytest.fixture
def story(made):
    return Story(made)


@pytest.mark.parametrize("rounds", [1, 4, 16])  # with SKIP_IDLE_ROUNDS, without, and with four pollers
@pytest.mark.parametrize("requests", [{}, REQUESTS])
def test_an_hour_of_an_idle_service_is_well(story, rounds, requests):
    story.go_on(60, IDLE, rounds=rounds, gauges=min(rounds, 4), requests=requests)

    assert story.alarms() == {}


def test_an_hour_of_a_busy_service_is_well(story):
    story.go_on(60, BUSY, requests=REQUESTS)

    assert story.alarms() == {}


def test_at_the_limits_all_is_still_well(made, story):
    limits = {
        "OldestQueued": properties(made)["QueueStuck"]["Threshold"],
        "OldestWithoutWorker": properties(made)["NoWorker"]["Threshold"],
        "OldestRunning": properties(made)["RunsTooLong"]["Threshold"],
        "OldestStoring": 300,
        "D1CallsLeft": 200,
        "Done": 5,
        "Errors": 5,
    }
    story.go_on(30, {**BUSY, **limits}, gauges=2, requests={"Count": 60, "5XXError": 3})

    assert story.alarms() == {}


FAULTS = {
    "no-rounds": {"rounds": 0, "requests": {}, "minutes": 60},
    "rounds-fail": {"failing": 1, "gauges": 0},
    "d1-calls-run-out": {"left": 199, "mended": 10},
    "queue-stuck": {"figures": {"OldestQueued": 1201}},
    "no-worker": {"figures": {"OldestWithoutWorker": 901}},
    "runs-too-long": {"figures": {"OldestRunning": 5401}},
    "endpoint-errors": {"figures": {"PausedEndpoints": 1}},
    "storing-fails": {"figures": {"OldestStoring": 301}},
    "dead-letters": {"figures": {"DeadLetters": 1}},
    "most-jobs-fail": {"figures": {"Errors": 6, "Done": 5}, "minutes": 15, "mended": 15},
    "schedule-fails": {"functions": {("PollJobs", "Errors"): 1}},
    "api-fails": {"functions": {("APIHandler", "Throttles"): 1}},
    "api-errors": {"requests": {"Count": 60, "5XXError": 4}},
    "over-budget": {"figures": {"CostUSD": 2.6}, "minutes": 1, "mended": 24 * 60},
}
OF_GAUGES = ["queue-stuck", "no-worker", "runs-too-long", "endpoint-errors", "storing-fails", "dead-letters"]


def go_wrong(story, name, minutes=0):
    fault = FAULTS[name]
    how = {"requests": REQUESTS, **{key: fault[key] for key in fault if key not in ("minutes", "figures")}}
    story.go_on(minutes or fault.get("minutes", 7), {**BUSY, **fault.get("figures", {})}, **how)


@pytest.mark.parametrize("name", FAULTS)
def test_an_alarm_goes_off_at_its_fault_alone_and_is_silent_when_that_is_mended(story, name):
    story.go_on(20, BUSY, requests=REQUESTS)
    assert story.alarms() == {}

    go_wrong(story, name)
    assert story.alarms() == {name: ALARM}

    minutes = FAULTS[name].get("mended", 6)
    story.go_on(minutes, {**BUSY, "CostUSD": 0.0}, rounds=1 if minutes > 60 else 4, requests=REQUESTS)
    assert story.alarms() == {}


def test_every_alarm_has_its_fault(made):
    names = [alarm["AlarmName"]["Fn::Sub"].removeprefix("${AWS::StackName}-") for alarm in properties(made).values()]

    assert sorted(names) == sorted(FAULTS)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "over-budget"])
def test_a_fault_of_one_minute_is_told_to_nobody(story, name):
    story.go_on(20, BUSY, requests=REQUESTS)
    go_wrong(story, name, minutes=1)
    assert story.alarms() == {}

    for _ in range(6):
        story.go_on(1, BUSY, requests=REQUESTS)
        assert story.alarms() == {}


def test_of_few_jobs_and_requests_that_fail_nobody_is_told(story):
    story.go_on(20, IDLE)
    story.go_on(1, {**IDLE, "Errors": 1}, requests={"Count": 4, "5XXError": 4})
    story.go_on(1, IDLE)

    assert story.alarms() == {}


@pytest.mark.parametrize("name", OF_GAUGES)
def test_while_nothing_is_known_of_it_what_was_wrong_is_not_called_mended(story, name):
    go_wrong(story, name)
    story.go_on(20, BUSY, gauges=0, failing=4)

    assert story.alarms() == {name: ALARM, "rounds-fail": ALARM}


# The rows of the tables in https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html
@pytest.mark.parametrize(
    ("wanted", "found", "states"),
    [
        (3, "0-X-X", (OK, OK, OK, OK)),
        (3, "0----", (OK, OK, OK, OK)),
        (3, "-----", (INSUFFICIENT, "as it was", ALARM, OK)),
        (3, "0XX-X", (ALARM, ALARM, ALARM, ALARM)),
        (3, "--X--", (ALARM, "as it was", ALARM, OK)),
        (2, "0-X-X", (ALARM, ALARM, ALARM, ALARM)),
        (2, "00X0X", (ALARM, ALARM, ALARM, ALARM)),
        (2, "0-X--", (OK, OK, ALARM, OK)),
        (2, "----0", (OK, OK, ALARM, OK)),
        (2, "---X-", (ALARM, "as it was", ALARM, OK)),
    ],
)
def test_missing_data_is_treated_as_documented(wanted, found, states):
    alarm = {"EvaluationPeriods": 3, "DatapointsToAlarm": wanted, "Threshold": 0}
    points = [{"0": 0, "X": 1, "-": None}[sign] for sign in found]

    for treatment, state in zip(("missing", "ignore", "breaching", "notBreaching"), states, strict=True):
        rules = {**alarm, "TreatMissingData": treatment, "ComparisonOperator": "GreaterThanThreshold"}
        assert next_state("as it was", rules, points) == state, treatment


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("Timestamp", "2026-11-22T14:22:54Z"),
        ("CloudWatchMetrics", {}),
        ("CloudWatchMetrics", [{"Namespace": "OBAIStudio"}]),
    ],
)
def test_a_line_that_is_not_as_specified_is_refused(path, value):
    record = json.loads(line(BEGIN, {"Done": 1}))
    record["_aws"][path] = value

    with pytest.raises(ValidationError):
        read([json.dumps(record)])


def test_a_metric_that_is_announced_and_not_there_is_refused():
    record = json.loads(line(BEGIN, {"Done": 1}))
    del record["Done"]

    with pytest.raises(KeyError, match="Done"):
        read([json.dumps(record)])


# What a stage's values decide


@pytest.mark.parametrize(
    ("values", "worker", "too_long"),
    [
        ({}, 900, 5400),
        ({"START_DEADLINE": "600"}, 150, 5400 - 900),  # a model with deadlines of its own has 3600 and 900
        ({"START_DEADLINE": "7200", "RUN_DEADLINE": "3600"}, 900, 10800),
    ],
)
def test_thresholds_follow_the_deadlines(values, worker, too_long):
    found = properties({"Resources": alarms.resources(values)})

    assert found["NoWorker"]["Threshold"] == worker
    assert found["RunsTooLong"]["Threshold"] == too_long


def test_of_calls_to_d1_somebody_is_told_when_saving_did_not_help(made):
    threshold = properties(made)["D1CallsRunOut"]["Threshold"]

    assert pipeline.CALLS_KEPT_FOR_ROUNDS < threshold < store.CALLS_KEPT_FROM_WEBHOOKS


def test_a_job_of_low_priority_may_wait_as_long_as_it_must(made):
    assert properties(made)["QueueStuck"]["Threshold"] == 2 * store.LOW_WAIT.total_seconds()


def test_models_that_cannot_be_read_are_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr("chalicelib.catalogue.FILE", tmp_path / "none.json")

    with pytest.raises(Problem, match=r"models\.json is malformed"):
        alarms.resources({})


def test_only_who_is_named_is_told_and_only_a_budget_is_watched(made):
    bare = {"Resources": alarms.resources({})}
    (topic,) = properties(made, "Topic").values()

    assert topic["Subscription"] == [{"Protocol": "email", "Endpoint": "ops@example.com"}]
    for alarm in properties(made).values():
        assert alarm["AlarmActions"] == alarm["OKActions"] == [{"Ref": "AlarmTopic"}]
    assert properties(made)["OverBudget"]["Threshold"] == 10
    assert "AlarmTopic" not in bare["Resources"]
    assert set(properties(made)) - set(properties(bare)) == {"OverBudget"}
    assert not any("AlarmActions" in alarm for alarm in properties(bare).values())


# What they name is there


def watched(alarm):
    """The metrics of an alarm: namespace, name and dimensions of each."""
    for metric in [one["MetricStat"]["Metric"] for one in alarm.get("Metrics", []) if "MetricStat" in one] or [alarm]:
        yield metric["Namespace"], metric["MetricName"], {one["Name"] for one in metric["Dimensions"]}


def shown(dashboard):
    """The metrics of each graph of the dashboard, as its JSON has them once it is filled in."""
    for widget in dashboard["widgets"]:
        for namespace, *rest in widget["properties"].get("metrics", []):
            if isinstance(namespace, str):
                name, *dimensions = [word for word in rest if isinstance(word, str)]
                yield namespace, name, set(dimensions[::2])


def filled(made):
    text = properties(made, "Dashboard")["Dashboard"]["DashboardBody"]["Fn::Sub"]
    assert len(set(re.findall(r"\$\{(.+?)\}", text)) - set(made["Resources"])) > 3
    return json.loads(re.sub(r"\$\{(.+?)\}", r"<\1>", text))


def test_every_metric_that_is_watched_or_shown_is_there(made):
    of_alarms = [metric for alarm in properties(made).values() for metric in watched(alarm)]
    for namespace, name, dimensions in [*of_alarms, *shown(filled(made))]:
        keys, names = OF_AWS.get(namespace, ({"Service"}, METRICS))
        assert namespace in {*OF_AWS, "OBAIStudio"}
        assert name in names, name
        assert dimensions == keys, name


def test_every_metric_of_the_service_is_shown(made):
    assert {name for namespace, name, _ in shown(filled(made)) if namespace == "OBAIStudio"} == METRICS.keys()
    (search,) = re.findall(r"SEARCH\('\{(.+?)\}(.+?)'", json.dumps(filled(made)).replace('\\"', '"'))
    assert search == ("OBAIStudio,Code,Service", ' MetricName="Errors" Service="<AWS::StackName>"')


def test_the_dashboard_is_laid_out_without_gaps_and_shows_every_alarm(made):
    widgets = filled(made)["widgets"]
    cells = [
        (widget["x"] + right, widget["y"] + down)
        for widget in widgets
        for right in range(widget["width"])
        for down in range(widget["height"])
    ]
    (states,) = (widget["properties"]["alarms"] for widget in widgets if widget["type"] == "alarm")

    assert sorted(cells) == [(x, y) for x in range(24) for y in range(len(cells) // 24)]
    assert states == [f"<{name}.Arn>" for name in properties(made)]
    for widget in widgets:
        if widget["type"] == "metric":
            assert widget["properties"]["region"] == "<AWS::Region>"


def test_readmes_table_is_what_the_alarms_say(made):
    table = README.split("### Alarms")[1].split("\n##")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (.+?) \|$", table, flags=re.MULTILINE)

    assert rows
    assert {name: f"{when}. {first}. README, Operations: {runbook}." for name, when, first, runbook in rows} == {
        alarm["AlarmName"]["Fn::Sub"].removeprefix("${AWS::StackName}-"): alarm["AlarmDescription"]
        for alarm in properties(made).values()
    }


def test_every_alarm_leads_to_a_runbook_that_readme_has(made):
    descriptions = [alarm["AlarmDescription"] for alarm in properties(made).values()]
    named = {re.search(r"README, Operations: (.+)\.$", text)[1].casefold() for text in descriptions}

    assert named - RUNBOOKS == set()


def test_readme_says_what_they_cost(made):
    # https://aws.amazon.com/cloudwatch/pricing/ (us-east-1): a month, and how many of an account are free
    of_alarm, of_metric, free = 0.10, 0.30, 10
    per_alarm = {name: len(list(watched(alarm))) for name, alarm in properties(made).items()}
    budget = per_alarm.pop("OverBudget")
    number = sum(per_alarm.values())
    usd = (number - free) * of_alarm + (len(METRICS) - free) * of_metric
    said = (
        f"The alarms watch {number} metrics ({number + budget} with a budget), and the service writes {len(METRICS)}: "
        f"{usd:.2f} dollars a month"
    )
    print(said)

    assert said in " ".join(README.split())


def test_a_budget_without_any_price_is_warned_of(monkeypatch):
    class Priced:
        price = 0.001

    assert "price_per_second" in alarms.warning(TOLD)
    assert alarms.warning({}) == ""
    monkeypatch.setattr(alarms, "_models", lambda: [Priced])
    assert alarms.warning(TOLD) == ""
