"""
Where a round's processor time goes: `.venv/bin/python -m bench.hot_spots [running|links|base64] [--service FOLDER]`.

The round runs in one thread, for a profile sees only its own, and against a local cloud that answers at once. What is
printed is the time inside each function, without what it calls, in milliseconds for each job; waiting is left out.
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import SystemRandom
from typing import Any

from bench import scene
from bench.scene import BASE64, LINKS, ROOT, RUNNING

COUNT = 200
SHOWN = 16
WAITS = ("recv_into", "select.poll", "'acquire' of '_thread.lock'")


class InTurn:
    """A crew of no threads."""

    def __init__(self, size: int) -> None:
        self.busy = 0
        self._finished: list[object] = []

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left to wait for."""

    def start(self, task: Callable[[], object], **_: Any) -> None:
        """Run it."""
        self.busy += 1
        self._finished.append(task())

    def wait(self, timeout: float) -> list[object]:
        """What came of them."""
        finished, self._finished = self._finished, []
        self.busy -= len(finished)
        return finished


def profiled(given: dict[str, str]) -> pstats.Stats:
    """One round over all that is due."""
    from chalicelib import bootstrap, log, settings
    from chalicelib.bootstrap import Machine
    from chalicelib.runtime import Clock, Deadline
    from chalicelib.wire import Wire

    clock, crew = Clock(), InTurn
    log.begin("bench")
    service = bootstrap.build_on(
        Machine(clock=clock, rng=SystemRandom(), new_crew=crew, new_wire=lambda resolve: Wire(clock, resolve=resolve)),
        settings.load(given, env_file=Path(os.devnull)),
    )
    service.bucket._s3()
    pipeline = service.pipeline
    profile = cProfile.Profile()
    profile.runcall(pipeline.run_round, Deadline(clock, 600.0))
    return pstats.Stats(profile)


def show(stats: pstats.Stats) -> None:
    """The functions that take most."""
    rows = [
        (own / COUNT * 1000, calls / COUNT, f"{Path(file).name}:{name}" if line else name)
        for (file, line, name), (_, calls, own, _, _) in stats.stats.items()
        if not any(wait in name for wait in WAITS)
    ]
    print("| function | calls a job | ms a job |\n|---|---|---|")
    for own, calls, name in sorted(rows, reverse=True)[:SHOWN]:
        print(f"| `{name.strip('{}<>')}` | {calls:.1f} | {own:.3f} |")
    print(f"| all | | {sum(own for own, _, _ in rows):.2f} |")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.hot_spots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=(RUNNING, LINKS, BASE64), default=RUNNING)
    parser.add_argument("--service", type=Path, default=ROOT, help="another checkout whose service is profiled")
    options = parser.parse_args()
    with scene.scene(options.kind, COUNT, latency=0.0) as settings:
        subprocess.run(
            [sys.executable, __file__, "--inside"],
            input=json.dumps(settings),
            env={**os.environ, "PYTHONPATH": f"{options.service}:{ROOT}"},
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        show(profiled(json.loads(sys.stdin.read())))
    else:
        main()
