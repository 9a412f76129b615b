"""
What is counted and measured, as lines of the log that CloudWatch reads metrics from: its embedded metric format.

https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

import threading
from datetime import datetime
from typing import Any

NAMESPACE = "OBAIStudio"

# Every metric there is, with its unit.
METRICS = {
    # As they stand, once a minute. The ages are 0 where there is none.
    "Queued": "Count",
    "OldestQueued": "Seconds",
    "Running": "Count",
    "OldestRunning": "Seconds",
    "OldestWithoutWorker": "Seconds",
    "Storing": "Count",
    "OldestStoring": "Seconds",
    "DeadLetters": "Count",
    "SpooledFiles": "Count",
    "SpooledBytes": "Bytes",
    "PausedEndpoints": "Count",
    # Of each round.
    "Rounds": "Count",
    "RoundsFailed": "Count",
    "RoundSeconds": "Seconds",
    # Of rounds and requests alike.
    "D1Calls": "Count",
    "D1CallsLeft": "Count",
    "Submits": "Count",
    "Done": "Count",
    "Cancelled": "Count",
    "Errors": "Count",
    "StoresFailed": "Count",
    "CostUSD": "None",
    "WastedUSD": "None",
}
OF_ALL = ["Service"]
BY_CODE = ["Service", "Code"]

Record = dict[str, Any]

_service = ""
_values: dict[str, float] = {}
_lock = threading.Lock()


def name(service: str) -> None:
    """Which deployment this process is of, the dimension of its metrics; empty: none are kept."""
    global _service
    _service = service


def count(metric: str, number: float = 1) -> None:
    """Add to what was counted since the last record."""
    if _service:
        with _lock:
            _values[metric] = _values.get(metric, 0) + number


def tell(metric: str, value: float) -> None:
    """How it is now; what was told of it since the last record is forgotten."""
    if _service:
        with _lock:
            _values[metric] = value


def take(now: datetime) -> Record:
    """What was kept since the last time, as the fields of one line; no field where nothing was."""
    global _values
    with _lock:
        taken, _values = _values, {}
    return _record(now, [OF_ALL], {metric: round(value, 6) for metric, value in taken.items()}) if taken else {}


def of_error(code: str, now: datetime) -> Record:
    """One job that has ended with an error, of itself and among all those with this code."""
    return {**_record(now, [OF_ALL, BY_CODE], {"Errors": 1}), "Code": code} if _service else {}


def _record(now: datetime, dimensions: list[list[str]], values: dict[str, float]) -> Record:
    named = [{"Name": metric, "Unit": METRICS[metric]} for metric in values]
    return {
        "_aws": {
            "Timestamp": int(now.timestamp() * 1000),
            "CloudWatchMetrics": [{"Namespace": NAMESPACE, "Dimensions": dimensions, "Metrics": named}],
        },
        "Service": _service,
        **values,
    }
