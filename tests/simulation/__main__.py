"""
Run many seeds, or one again.

    python -m tests.simulation --seeds 100000     all seeds from 0 on; what was injected, and what was violated
    python -m tests.simulation --replay 4711      one seed, with every call that it made
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.faults import CLASSES
from tests.simulation.scenario import Outcome, run_seed


def run_seeds(first: int, count: int, *, workers: int) -> list[Outcome]:
    """Run them side by side; the traces are left out."""
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_run_one, range(first, first + count), chunksize=8))


def _run_one(seed: int) -> Outcome:
    outcome = run_seed(seed)
    outcome.trace = []
    return outcome


def report(outcomes: list[Outcome], seconds: float) -> str:
    """What was injected and what came of it."""
    faults: Counter[str] = sum((outcome.faults for outcome in outcomes), Counter())
    seeds = sum((Counter(set(outcome.faults)) for outcome in outcomes), Counter())
    lines = [f"{'class':>5}  {'fault':22} {'times':>9} {'seeds':>7}  what"]
    for name, (number, what) in sorted(CLASSES.items(), key=lambda entry: entry[1][0]):
        lines.append(f"{number:>5}  {name:22} {faults[name]:>9} {seeds[name]:>7}  {what}")
    violated = [outcome for outcome in outcomes if outcome.violation]
    lines += [f"violation: {outcome.violation}" for outcome in violated]
    lines.append(
        f"{len(outcomes)} seeds, {sum(outcome.jobs for outcome in outcomes)} jobs, "
        f"{sum(outcome.days for outcome in outcomes):.1f} simulated days, {sum(faults.values())} faults, "
        f"{len(violated)} violations; {seconds:.0f} s, {len(outcomes) / seconds * 60:.0f} seeds a minute"
    )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--replay", type=int, help="one seed, told in full")
    options = parser.parse_args()
    if options.replay is not None:
        outcome = run_seed(options.replay)
        print("\n".join(outcome.trace), outcome.violation or "no violation", sep="\n")
        sys.exit(bool(outcome.violation))
    begun = time.monotonic()
    outcomes = run_seeds(options.first, options.seeds, workers=os.cpu_count() or 1)
    print(report(outcomes, time.monotonic() - begun))
    sys.exit(any(outcome.violation for outcome in outcomes))


if __name__ == "__main__":
    main()
