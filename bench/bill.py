"""
What a month costs without the GPUs: `.venv/bin/python -m bench.bill [--seconds N] [--reads N] [--json FILE]`.

The life of a job is measured against a local cloud as slow as the real ones, its rows of D1 by D1's own engine (as
./test installs it). A function of less memory has less of a processor: what a call waits is the same in all, what it
computes takes as much longer. Prices are list prices of us-east-1, without any free tier but what D1 includes, as of
PRICED; jobs are spread evenly over the day, each picture has 1 MB and stays. Not in it: GPUs, cold starts, and what
goes out to the internet.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from bench import scene
from bench.scene import RUNNING
from chalicelib.pipeline import ROUND_EVERY, ROUNDS, THREADS
from tests.engines.processes import miniflare, why_missing
from tools.cloud import LATENCY

PRICED = "2026-11-27"
# https://aws.amazon.com/lambda/pricing/ (arm64), https://aws.amazon.com/api-gateway/pricing/ (REST),
# https://aws.amazon.com/cloudwatch/pricing/ ; US dollars
LAMBDA_GB_SECOND, LAMBDA_REQUEST, GATEWAY_REQUEST, LOG_GB = 0.0000133334, 0.20e-6, 3.50e-6, 0.50
# https://developers.cloudflare.com/d1/platform/pricing/ : Workers Paid, and what it includes each month
WORKERS_PAID, ROW_READ, ROW_WRITTEN, ROWS_READ_FREE, ROWS_WRITTEN_FREE = 5.00, 0.001e-6, 1.00e-6, 25e9, 50e6
# https://developers.cloudflare.com/r2/pricing/ : a put, a read, a GB for a month
R2_PUT, R2_READ, R2_GB = 4.50e-6, 0.36e-6, 0.015

API_CALLS = 345_600  # a day that Cloudflare allows: 1,200 in five minutes
MINUTES = 43_830  # of a month
MEMORY = (128, 256, 512, 1024, 1769)
# MB, which have one processor: https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
FULL_MEMORY = 1769
JOBS = (0, 1_000, 100_000)  # a day
Life = dict[str, dict[str, float]]


def measure() -> Life:
    """A job's life: seconds from the slow local cloud, rows from D1's own engine."""
    if missing := why_missing("miniflare"):
        sys.exit(f"D1's own engine is needed, for its rows: {missing}")
    with scene.scene(RUNNING, 0, latency=1.0) as slow:
        life: Life = scene.told("one_life.py", slow)
    with scene.scene(RUNNING, 0, latency=0.0) as quick, miniflare() as engine:
        rows: Life = scene.told("one_life.py", {**quick, **engine})
    for name, figures in life.items():
        figures |= {figure: rows[name][figure] for figure in ("rows_read", "rows_written")}
    return life


def seconds(figures: dict[str, float], memory: int) -> float:
    """How long that takes with so much memory."""
    return figures["wall"] - figures["cpu"] + figures["cpu"] * max(1.0, FULL_MEMORY / memory)


def schedule_seconds(life: Life, memory: int, jobs: float, run: float, *, skip_idle: bool) -> float:
    """Of one minute: the waits between the rounds and the last of them; with SKIP_IDLE_ROUNDS those of busy minutes."""
    running = jobs / 86_400 * run
    idle = seconds(life["idle"], memory)
    looks = running * (life["look"]["cpu"] - life["idle"]["cpu"]) * max(1.0, FULL_MEMORY / memory)
    last = idle + looks + math.ceil(running / THREADS) * LATENCY["runpod"]
    whole = (ROUNDS - 1) * ROUND_EVERY + last
    if not skip_idle:
        return whole
    nobody = math.exp(-running)  # the part of all instants at which no job is under way, where they come at random
    lengths = [number * ROUND_EVERY + idle for number in range(ROUNDS - 1)]
    return sum((1 - nobody) ** number * nobody * length for number, length in enumerate(lengths)) + (
        (1 - nobody) ** (ROUNDS - 1) * whole
    )


def month(life: Life, memory: int, jobs: float, options: argparse.Namespace, *, skip_idle: bool) -> dict[str, float]:
    """US dollars by what they are for, of so many jobs a day."""
    made = jobs * MINUTES / 1440
    looks = max(1.0, options.seconds / ROUND_EVERY)  # of one job: RunPod tells of its end, so none after that
    calls = {"create": 1, "webhook": 1, "read": options.reads}
    api = made * sum(number * seconds(life[name], memory) for name, number in calls.items())
    minute = schedule_seconds(life, memory, jobs, options.seconds, skip_idle=skip_idle)
    requests = made * sum(calls.values())
    rows = {
        kind: made * sum(number * life[name][kind] for name, number in calls.items())
        + made * looks * max(0.0, life["look"][kind] - life["idle"][kind])
        + MINUTES * ROUNDS * life["idle"][kind]
        for kind in ("rows_read", "rows_written")
    }
    logged = made * sum(number * life[name]["log_bytes"] for name, number in calls.items())
    return {
        "schedule": MINUTES * (minute * memory / 1024 * LAMBDA_GB_SECOND + LAMBDA_REQUEST),
        "api": api * memory / 1024 * LAMBDA_GB_SECOND + requests * (LAMBDA_REQUEST + GATEWAY_REQUEST),
        "logs": logged / 1e9 * LOG_GB,
        "d1": WORKERS_PAID
        + max(0.0, rows["rows_read"] - ROWS_READ_FREE) * ROW_READ
        + max(0.0, rows["rows_written"] - ROWS_WRITTEN_FREE) * ROW_WRITTEN,
        "r2": made * (R2_PUT + R2_READ) + made * scene.PICTURE_BYTES / 1e9 * R2_GB,
    }


def bills(life: Life, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, printed."""
    columns = ("jobs a day", "MB", "idle rounds", "schedule", "API", "logs", "D1", "R2", "USD a month", "create, s")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    found = []
    for jobs in JOBS:
        for memory in MEMORY:
            for skip_idle in (False, True):
                costs = month(life, memory, jobs, options, skip_idle=skip_idle)
                found.append({"jobs": jobs, "memory": memory, "skip_idle": skip_idle, **costs})
                cells = " | ".join(f"{cost:,.2f}" for cost in costs.values())
                rounds = "skipped" if skip_idle else "made"
                total, create = sum(costs.values()), seconds(life["create"], memory)
                print(f"| {jobs:,} | {memory} | {rounds} | {cells} | **{total:,.2f}** | {create:.2f} |", flush=True)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.bill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="from create to end (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=3, help="that a client makes of a job (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    life = measure()
    print("| of one | seconds | processor, ms | D1 calls | rows read | rows written | bytes logged |")
    print("|---|---|---|---|---|---|---|")
    for name, one in life.items():
        times = f"{one['wall']:.3f} | {1000 * one['cpu']:.1f} | {one['d1']:.2g}"
        print(f"| {name} | {times} | {one['rows_read']:.0f} | {one['rows_written']:.0f} | {one['log_bytes']:.0f} |")
    calls = life["create"]["d1"] + life["webhook"]["d1"] + options.reads * life["read"]["d1"]
    print(f"\nA job makes {calls:.1f} calls to D1; {API_CALLS:,} a day do for {API_CALLS / calls:,.0f} jobs.")
    print(flush=True)
    found = bills(life, options)
    if options.json:
        options.json.write_text(json.dumps({"life": life, "bills": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
