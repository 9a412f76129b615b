"""
Draws the plots of bench/README.md from the figures in bench/figures: `.venv/bin/python -m bench.plots`.

It needs matplotlib: `.venv/bin/python -m pip install -r requirements-bench.txt`.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

FIGURES = Path(__file__).parent / "figures"
SIZE = (7.0, 4.0)  # inches
OURS, BARE, LOOP = "#2563eb", "#6b7280", "#dc2626"
LINES = {"loop": (LOOP, "one after the other"), "bare": (BARE, "bare calls"), "ours": (OURS, "round")}


def load(name: str) -> Any:
    """What a command has measured."""
    return json.loads((FIGURES / f"{name}.json").read_text())


def new(title: str, across: str, up: str) -> Axes:
    """An empty plot."""
    _, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    return axes


def save(axes: Axes, name: str) -> None:
    """Write it."""
    axes.legend(frameon=False)
    axes.figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close("all")


def rounds() -> None:
    """Seconds of a round by the number of running jobs, beside the bare calls and the loop."""
    found = [one for one in load("rounds") if one["kind"] == "running"]
    counts = [one["count"] for one in found]
    axes = new("A round that finds nothing finished", "running jobs", "seconds")
    for name, (colour, label) in LINES.items():
        axes.plot(counts, [one[name]["wall"] for one in found], "o-", color=colour, label=label)
    axes.set(xscale="log", yscale="log")
    save(axes, "rounds")


def threads() -> None:
    """Seconds and memory by the number of threads."""
    found = load("threads")
    numbers = [one["threads"] for one in found]
    axes = new("What more threads bring", "threads", "seconds")
    axes.plot(numbers, [one["running"]["wall"] for one in found], "o-", color=OURS, label="1,000 runs looked at")
    axes.plot(numbers, [one["base64"]["wall"] for one in found], "s-", color=LOOP, label="300 pictures stored")
    memory = axes.twinx()
    memory.plot(numbers, [one["base64"]["rss"] for one in found], ":", color=BARE)
    memory.set(ylabel="MB, dotted", ylim=(0, None))
    axes.set(ylim=(0, None))
    save(axes, "threads")


def capacity() -> None:
    """How long a run is not looked at, by the number of runs."""
    found = load("capacity")
    axes = new("Runs that one endpoint has, each due every 60 s", "running jobs", "longest time without a look, s")
    for case, colour, label in (((1, 1), OURS, "one poller, one endpoint"), ((2, 2), LOOP, "two of each")):
        some = [one for one in found if (one["pollers"], one["endpoints"]) == case and one["memory"] == 1024]
        axes.plot([one["runs"] for one in some], [one["gap_most"] for one in some], "o-", color=colour, label=label)
    axes.axhline(75, color=BARE, linestyle=":", label="due, and the grid of the rounds")
    axes.set(ylim=(0, None))
    save(axes, "capacity")


def bill() -> None:
    """US dollars a month by memory."""
    axes = new("A month without the GPUs", "MB of memory", "US dollars")
    for jobs, colour in ((0, BARE), (1_000, OURS), (100_000, LOOP)):
        for skip_idle, line in ((False, "-"), (True, ":")):
            some = [one for one in load("bill")["bills"] if (one["jobs"], one["skip_idle"]) == (jobs, skip_idle)]
            costs = [sum(one[name] for name in ("schedule", "api", "logs", "d1", "r2")) for one in some]
            label = f"{jobs:,} jobs a day{', idle rounds skipped' if skip_idle else ''}"
            axes.plot([one["memory"] for one in some], costs, f"o{line}", color=colour, label=label)
    axes.set(yscale="log")
    save(axes, "bill")


if __name__ == "__main__":
    for draw in (rounds, threads, capacity, bill):
        draw()
