"""
What CloudWatch makes of a template's alarms, by its documented rules, from lines of the log and metrics of AWS.

Periods, statistics, M out of N: https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarm-evaluation.html
Missing data: https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html
Metric math: https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/using-metric-math.html
Not as it is there: metrics come without delay, and the range in which missing data is looked for, of which the page
says only that it is longer than the evaluation periods, is always two periods longer, as in its examples.
"""

import ast
import json
import operator
from collections import defaultdict
from pathlib import Path

from jsonschema_rs import Draft202012Validator

SCHEMA = Draft202012Validator(json.loads((Path(__file__).parent / "files/emf_schema.json").read_text()))
STACK = "ob-ai-studio-dev"
MORE = 2  # periods
OK, ALARM, INSUFFICIENT = "OK", "ALARM", "INSUFFICIENT_DATA"
STATISTICS = {"Sum": sum, "Maximum": max, "Minimum": min, "Average": lambda values: sum(values) / len(values)}
OPERATORS = {
    "GreaterThanThreshold": operator.gt,
    "GreaterThanOrEqualToThreshold": operator.ge,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}
MATH = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
}  # fmt: skip


def evaluate(template, lines, at, aws=(), *, stack=STACK):
    """
    The state of each alarm, by its name without the stack's, at this instant (seconds since 1970), as it came to be
    since the first line. `aws` is as in Watch.hear().
    """
    watch = Watch(template, stack=stack)
    watch.hear(lines, aws)
    for end in range(watch.first(default=int(at // 60)) + 1, int(at // 60) + 1):
        watch.look(end)
    return watch.states


class Watch:
    """The alarms of a template, and what they have been told so far."""

    def __init__(self, template, *, stack=STACK):
        resources = [one for one in template["Resources"].values() if one["Type"] == "AWS::CloudWatch::Alarm"]
        names = [one["Properties"]["AlarmName"]["Fn::Sub"].removeprefix("${AWS::StackName}-") for one in resources]
        self._alarms = dict(zip(names, [one["Properties"] for one in resources], strict=True))
        self._series = defaultdict(lambda: defaultdict(list))
        self._stack = stack
        self.states = dict.fromkeys(names, INSUFFICIENT)

    def hear(self, lines, aws=()):
        """
        Take in lines of the log, and points of AWS's own metrics: (namespace, name, dimensions, instant, value), where
        a dimension that the template refers to has its logical id for a value, such as FunctionName PollJobs.
        """
        for key, minutes in read(lines).items():
            for minute, values in minutes.items():
                self._series[key][minute] += values
        for namespace, name, dimensions, instant, value in aws:
            self._series[namespace, name, frozenset(dimensions.items())][int(instant // 60)].append(value)

    def first(self, *, default):
        """The first minute that there is anything of."""
        return min((minute for minutes in self._series.values() for minute in minutes), default=default)

    def look(self, end):
        """Look at what there is before this minute (since 1970), as is done once in each."""
        for name, alarm in self._alarms.items():
            self.states[name] = next_state(self.states[name], alarm, points(alarm, self._series, end, self._stack))


def read(lines):
    """The values of each metric, by minute; lines without metrics are passed over, others must be as specified."""
    series = defaultdict(lambda: defaultdict(list))
    for line in lines:
        record = json.loads(line) if line.startswith("{") else {}
        if "_aws" not in record:
            continue
        SCHEMA.validate(record)
        minute = record["_aws"]["Timestamp"] // 60_000
        for directive in record["_aws"]["CloudWatchMetrics"]:
            for names in directive["Dimensions"]:
                dimensions = frozenset((name, record[name]) for name in names)
                assert all(isinstance(value, str) for _, value in dimensions), line
                for metric in directive["Metrics"]:
                    given = record[metric["Name"]]
                    values = given if isinstance(given, list) else [given]
                    assert all(type(value) in (int, float) for value in values), line
                    series[directive["Namespace"], metric["Name"], dimensions][minute] += values
    return series


def points(alarm, series, end, stack):
    """What the alarm looks at in the minute before `end`: oldest first, None where data is missing."""

    def statistics(metric, statistic, period):
        values = series.get(_key(metric, stack), {})
        return [_statistic(values, statistic, period // 60, end - back * period // 60) for back in range(number)][::-1]

    number = alarm["EvaluationPeriods"] + MORE
    if "Metrics" not in alarm:
        return statistics(alarm, alarm["Statistic"], alarm["Period"])
    measured = {query["Id"]: query["MetricStat"] for query in alarm["Metrics"] if "MetricStat" in query}
    known = {name: statistics(one["Metric"], one["Stat"], one["Period"]) for name, one in measured.items()}
    (result,) = (query for query in alarm["Metrics"] if query.get("ReturnData", True))
    tree = ast.parse(result["Expression"], mode="eval").body
    known |= dict(_filled(tree, known))
    return [_calculated(tree, dict(zip(known, values, strict=True))) for values in zip(*known.values(), strict=True)]


def _filled(tree, known):
    """What FILL has made of a metric; one without any point stays so, of which the page says nothing."""
    for call in ast.walk(tree):
        match call:
            case ast.Call(func=ast.Name(id="FILL"), args=[ast.Name(id=name), ast.Constant(value=filler)]):
                values = known[name]
                if any(value is not None for value in values):
                    yield name, [filler if value is None else value for value in values]


def _key(metric, stack):
    refer = {"AWS::StackName": stack}
    values = {one["Name"]: one["Value"] for one in metric["Dimensions"]}
    named = {name: value["Ref"] if isinstance(value, dict) else value for name, value in values.items()}
    return metric["Namespace"], metric["MetricName"], frozenset((name, refer.get(v, v)) for name, v in named.items())


def _statistic(minutes, statistic, length, end):
    """Of the minutes before this one; the window moves on by a minute, however long it is."""
    values = [value for minute in range(end - length, end) if minute in minutes for value in minutes[minute]]
    return STATISTICS[statistic](values) if values else None


def _calculated(tree, values):
    """Of one instant. What one of the metrics lacks counts as 0; a division by 0 leaves no point."""
    if all(value is None for value in values.values()):
        return None
    try:
        return _value(tree, values)
    except ZeroDivisionError:
        return None


def _value(node, values):
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return values[node.id] or 0
        case ast.BinOp():
            return MATH[type(node.op)](_value(node.left, values), _value(node.right, values))
        case ast.Call(func=ast.Name(id="FILL"), args=[metric, _]):
            return _value(metric, values)
        case ast.Compare(ops=[compare], comparators=[right]):
            return MATH[type(compare)](_value(node.left, values), _value(right, values))
        case ast.Call(func=ast.Name(id="IF"), args=[condition, then, otherwise]):
            return _value(then if _value(condition, values) else otherwise, values)
    raise ValueError(f"not known here: {ast.unparse(node)}")


def next_state(state, alarm, found):
    """The state after this look at the points, oldest first."""
    periods = alarm["EvaluationPeriods"]
    wanted = alarm.get("DatapointsToAlarm", periods)
    treat = alarm.get("TreatMissingData", "missing")
    breaches = [None if p is None else OPERATORS[alarm["ComparisonOperator"]](p, alarm["Threshold"]) for p in found]
    real = [breach for breach in breaches if breach is not None][-periods:]
    to_fill = periods - len(real)
    if sum(real) + (to_fill if treat == "breaching" else 0) >= wanted:
        return ALARM
    if not to_fill or treat in ("breaching", "notBreaching"):
        return OK
    if not real:
        return INSUFFICIENT if treat == "missing" else state
    if not all(real):
        return OK
    is_old = any(breaches[: -wanted + 1 or None])  # of the premature transitions
    return ALARM if is_old and treat == "missing" else state
