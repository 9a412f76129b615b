"""Very many jobs due at once: how many calls a round makes, how long the last one waits, and whether all end."""

from dataclasses import dataclass, replace
from random import Random

from chalicelib.jobs import to_text
from tests.simulation.faults import Faults, Plan
from tests.simulation.scenario import ENVIRONMENT
from tests.simulation.windows import Stage
from tests.simulation.world import START, World

WITH_PICTURE = (
    50  # one of so many has one; the others end at once, for a picture takes boto3 much longer than the test has
)


@dataclass
class Crowd:
    """What came of it."""

    most_calls: int  # to D1 in one round
    minutes: float
    finals: dict[str, int]


def run_crowd(count: int) -> Crowd:
    """Put that many waiting jobs into the table and run rounds until all have ended. Raises Violation."""
    faults = Faults()
    faults.run_plan = _plan
    with World(0, environment=ENVIRONMENT, faults=faults) as world:
        faults.counted["many_due"] += count
        world.invariants.watching = False
        stage = Stage(world)
        world.clouds.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO jobs (id, status, step, prompt, version, due_at, created_at, updated_at) "
            "SELECT printf('job-%05d', i), 'queued', 'submit', 'a cat', 1, ?, ?, ? FROM n",
            count, *[to_text(START)] * 3,
        )  # fmt: skip
        most = 0
        while not stage.all_final() and world.now < 4 * 3600.0:
            before = len(world.trace)
            stage.round()
            most = max(most, sum(" d1 POST" in line for line in world.trace[before:]))
            stage.pass_time(15.0)
        rows = world.clouds.execute("SELECT status, count(*) AS n FROM jobs GROUP BY status")
        return Crowd(most, world.now / 60, {row["status"]: row["n"] for row in rows})


def _plan(rng: Random, job_id: str, attempt: int) -> Plan:
    plan = Plan(queue_seconds=0.0, run_seconds=1.0, webhook=False)
    return plan if int(job_id.rpartition("-")[2]) % WITH_PICTURE == 0 else replace(plan, shape="none")
