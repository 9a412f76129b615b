"""The stage's alarms and dashboard: .chalice/alarms.yaml, with what the stage's values decide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from chalicelib import catalogue, parameters
from chalicelib.errors import SettingError
from chalicelib.models import Model
from chalicelib.settings import Settings
from tools import Problem

FILE = Path(__file__).parent.parent / ".chalice" / "alarms.yaml"
LONGEST_WAIT = 900  # seconds for a worker, before somebody should look
DEADLINES = ("START_DEADLINE", "RUN_DEADLINE")

Resources = dict[str, Any]


def check(values: Mapping[str, str]) -> None:
    """Raise Problem where a threshold cannot be told from these values."""
    for name in DEADLINES:
        if values.get(name, "").startswith(parameters.PREFIX):
            raise Problem(f"{name} must stand here itself, not in SSM Parameter Store: alarms follow from it.")


def warning(values: Mapping[str, str]) -> str:
    """What of these values comes to nothing, if anything."""
    if "DEPLOY_DAILY_USD" in values and not any(model.price for model in _models()):
        return (
            "DEPLOY_DAILY_USD bounds nothing: no model in chalicelib/models.json has a price_per_second, so no cost is "
            "known, and the alarm never goes off."
        )
    return ""


def resources(values: Mapping[str, str]) -> Resources:
    """The alarms, who is told of them, and the dashboard. Raises Problem where models.json is malformed."""
    given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    alarms = given["Alarms"]
    _set_thresholds(alarms, values)
    made = {name: {"Type": "AWS::CloudWatch::Alarm", "Properties": alarm} for name, alarm in alarms.items()}
    if "DEPLOY_ALARM_EMAIL" in values:
        made |= _told(made, values["DEPLOY_ALARM_EMAIL"])
    return made | {"Dashboard": _dashboard(given["Dashboard"], list(alarms))}


def _set_thresholds(alarms: Resources, values: Mapping[str, str]) -> None:
    times = _times(values)
    alarms["NoWorker"]["Threshold"] = min(LONGEST_WAIT, min(start for start, _ in times) // 4)
    alarms["RunsTooLong"]["Threshold"] = max(start + run for start, run in times)
    if "DEPLOY_DAILY_USD" in values:
        alarms["OverBudget"]["Threshold"] = float(values["DEPLOY_DAILY_USD"])
    else:
        del alarms["OverBudget"]


def _times(values: Mapping[str, str]) -> list[tuple[int, int]]:
    """Seconds that a run may wait for a worker, and take, for each model, and where the model is not known."""
    start = int(values.get("START_DEADLINE", Settings.start_deadline))
    run = int(values.get("RUN_DEADLINE", Settings.run_deadline))
    return [(model.start or start, model.run or run) for model in [Model(name=""), *_models()]]


def _models() -> list[Model]:
    try:
        return list(catalogue.load().known.values())
    except SettingError as error:
        raise Problem(error.sentence) from error


def _told(alarms: Resources, email: str) -> Resources:
    """Have a mail sent when an alarm goes off, and when all is well again; the topic for that."""
    for alarm in alarms.values():
        alarm["Properties"] |= {"AlarmActions": [{"Ref": "AlarmTopic"}], "OKActions": [{"Ref": "AlarmTopic"}]}
    subscription = {"Protocol": "email", "Endpoint": email}
    return {"AlarmTopic": {"Type": "AWS::SNS::Topic", "Properties": {"Subscription": [subscription]}}}


def _dashboard(body: dict[str, Any], alarms: list[str]) -> Resources:
    (states,) = (widget for widget in body["widgets"] if widget["type"] == "alarm")
    states["properties"]["alarms"] = [f"${{{name}.Arn}}" for name in alarms]
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    name = {"Fn::Sub": "${AWS::StackName}-${AWS::Region}"}  # dashboards of all regions lie together
    return {
        "Type": "AWS::CloudWatch::Dashboard",
        "Properties": {"DashboardName": name, "DashboardBody": {"Fn::Sub": text}},
    }
