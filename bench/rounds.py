"""
What a round takes, beside the same calls made bare and one after the other: `.venv/bin/python -m bench.rounds`.

Each measurement has a process of its own and a local cloud of its own, as slow to answer as the real clouds are
expected to be (--latency 1), or ten times faster (0.1). Both processes share this machine. What is compared is made in
turn.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import scene
from bench.scene import BASE64, LINKS, ROOT, RUNNING
from chalicelib import pipeline
from tools.template import MACHINE

LOOPED = 100  # jobs that are done one after the other at most; more take as much longer
REPEATED = 3
LARGE_BYTES = 10_000_000
Figures = dict[str, Any]


def measure(
    how: str,
    kind: str,
    count: int,
    *,
    latency: float,
    record: str,
    threads: int | None = None,
    picture_bytes: int = scene.PICTURE_BYTES,
    service: Path = ROOT,
    **more: Any,
) -> Figures:
    """One measurement in a process of its own, of this checkout or of another one."""
    with scene.scene(kind, count, latency=latency, picture_bytes=picture_bytes) as settings:
        number = threads or (pipeline.THREADS if how == "bare" else None)  # else as many as the service has
        order = {"how": how, "settings": settings, "kind": kind, "count": count, "threads": number, "record": record}
        figures: Figures = scene.told("one_round.py", {**order, **more}, service=service, **MACHINE)
        return figures


def median(found: list[Figures]) -> Figures:
    """The median of each figure."""
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def compare(kind: str, count: int, **options: Any) -> Figures:
    """A round and the same calls bare in turn, and the loop."""
    repeated = REPEATED if count <= LOOPED or (kind == RUNNING and count <= 1_000) else 1
    ours, bare = [], []
    with tempfile.NamedTemporaryFile() as record:
        for _ in range(repeated):
            ours.append(measure("ours", kind, count, record=record.name, **options))
            bare.append(measure("bare", kind, count, record=record.name, **options))
        looped = min(count, LOOPED)
        loop = measure("loop", kind, looped, record=record.name, **options)
    loop["wall"] *= count / looped
    return {"kind": kind, "count": count, "ours": median(ours), "bare": median(bare), "loop": loop}


CASES = [(RUNNING, 1), (RUNNING, 10), (RUNNING, 100), (RUNNING, 1_000), (RUNNING, 10_000)]
STORING = [(LINKS, 100), (LINKS, 1_000), (BASE64, 100), (BASE64, 1_000)]


def rounds(options: argparse.Namespace) -> Iterator[Figures]:
    """Every case, as it is measured; RunPod's limit is lifted for ten thousand, else only it would be measured."""
    columns = ("jobs", "pictures", "round, s", "bare, s", "wall", "CPU", "loop, s", "faster", "ms a job", "D1", "MB")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for kind, count in [case for case in (*CASES, *STORING) if case[0] in options.kinds and case[1] <= options.most]:
        found = compare(kind, count, latency=options.latency, service=options.service, unlimited=count > 1_000)
        ours, bare, loop = found["ours"], found["bare"], found["loop"]
        walls = f"{ours['wall']:.2f} | {bare['wall']:.2f} | {ours['wall'] / bare['wall']:.2f}"
        ratios = f"{ours['cpu'] / bare['cpu']:.2f} | {loop['wall']:.1f} | {loop['wall'] / ours['wall']:.0f}"
        sizes = f"{1000 * ours['wall'] / count:.1f} | {ours['d1']} | {ours['rss']:.0f}"
        print(f"| {count:,} | {kind} | {walls} | {ratios} | {sizes} |", flush=True)
        yield found


def threads(options: argparse.Namespace) -> Iterator[Figures]:
    """The same with other numbers of threads."""
    columns = ("threads", "1,000 running, s", "CPU, s", "MB", "300 to store, s", "CPU, s", "MB")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for number in (4, 8, 16, 24, 32, 48, 64):
        found = {
            kind: measure("ours", kind, count, latency=options.latency, threads=number, record=os.devnull)
            for kind, count in ((RUNNING, 1_000), (BASE64, 300))
        }
        cells = [f"{one['wall']:.2f} | {one['cpu']:.2f} | {one['rss']:.0f}" for one in found.values()]
        print(f"| {number} | {' | '.join(cells)} |", flush=True)
        yield {"threads": number, **found}


def memory(options: argparse.Namespace) -> Iterator[Figures]:
    """The peak of memory while large pictures are stored, and the same without any bound on what is in it at once."""
    columns = ("pictures of 10 MB", "answers", "round, s", "MB", "unbounded, s", "MB", "slower")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    given = {"latency": options.latency, "picture_bytes": LARGE_BYTES, "record": os.devnull, "service": options.service}
    for kind in [kind for kind in (LINKS, BASE64) if kind in options.kinds]:
        bounded = measure("ours", kind, 200, **given)
        free = measure("ours", kind, 200, unbounded=True, **given)
        walls = f"{bounded['wall']:.1f} | {bounded['rss']:.0f} | {free['wall']:.1f} | {free['rss']:.0f}"
        print(f"| 200 | {kind} | {walls} | {bounded['wall'] / free['wall']:.2f} |", flush=True)
        yield {"kind": kind, "bounded": bounded, "unbounded": free}


WHAT = {"rounds": rounds, "threads": threads, "memory": memory}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=WHAT, default="rounds", help="(default: %(default)s)")
    parser.add_argument("--latency", type=float, default=1.0, help="of the local cloud (default: %(default)s)")
    kinds = (RUNNING, LINKS, BASE64)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="only these")
    parser.add_argument("--most", type=int, default=10_000, help="jobs of a case (default: %(default)s)")
    parser.add_argument("--service", type=Path, default=ROOT, help="another checkout whose service is measured")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    found = list(WHAT[options.what](options))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
