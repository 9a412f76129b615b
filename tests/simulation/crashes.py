"""
Exhaustive crash points: small stories in which a process is killed before or after each call, and at each pair of them.

A call is everything that leaves the process: to D1, RunPod (/run, /status, /cancel), a link's host, R2, the spool and a
caller's own address. A callback of RunPod's is a call of its own, whose handler makes some of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from chalicelib.jobs import Status
from tests.simulation.clouds import PICTURES, RECEIVERS
from tests.simulation.faults import Fate, Faults, Plan
from tests.simulation.scenario import ENVIRONMENT
from tests.simulation.windows import Stage
from tests.simulation.world import World

SIDES = ("before", "after")
PLAN = Plan(queue_seconds=1.0, run_seconds=4.0, shape="link", files=1, webhook=True)

Kills = dict[int, str]


def one_job_by_all_ways(stage: Stage) -> None:
    """A job whose callback comes, whose picture R2 does not take at first, so that it goes through the spool."""
    stage.next("r2 PUT", Fate(refused=True))
    stage.world.at(3.0, stage.every_minute)
    stage.create_with(PLAN)


def one_job_by_polling(stage: Stage) -> None:
    """A job that RunPod is too busy for at first, and of whose end only the rounds tell."""
    stage.next("/run", Fate(effect=False, instead=(429, {"Retry-After": "5"}, b"{}")))
    stage.world.at(3.0, stage.every_minute)
    stage.create_with(replace(PLAN, webhook=False, shape="base64", files=2))


def users_and_three_jobs(stage: Stage) -> None:
    """One that is drawn, one that its user cancels while it runs, one that fails and is retried."""
    stage.world.at(3.0, stage.every_minute)
    stage.create_with(PLAN)
    stage.create_with(replace(PLAN, run_seconds=300.0))
    stage.create_with(replace(PLAN, verdict="FAILED"))
    stage.world.at(25.0, lambda: stage.wish("cancel", 1))
    stage.world.at(30.0, lambda: stage.wish("retry", 2))


def one_job_with_a_picture_that_is_told_and_deleted(stage: Stage) -> None:
    """A job whose picture lies behind a link, whose end is told, and which is deleted, so that the picture goes too."""
    stage.world.at(3.0, stage.every_minute)
    stage.create_with(replace(PLAN, webhook=False), pictures=(f"{PICTURES}/1.png",), callback_url=RECEIVERS[0])
    stage.world.at(45.0, lambda: stage.wish("delete", 0))


# The statuses that each job of a story may end with, wherever its processes are killed.
DRAWN = {Status.DONE}
STORIES: dict[str, tuple[Callable[[Stage], None], list[set[Status]]]] = {
    "one_job_by_all_ways": (one_job_by_all_ways, [DRAWN]),
    "one_job_by_polling": (one_job_by_polling, [DRAWN]),
    "one_job_with_a_picture_that_is_told_and_deleted": (one_job_with_a_picture_that_is_told_and_deleted, [DRAWN]),
    "users_and_three_jobs": (users_and_three_jobs, [DRAWN, {Status.CANCELLED, Status.DONE}, {Status.ERROR}]),
}


def tell(story: str, kills: Kills) -> int:
    """Play a story with these kills to its end; how many calls it took. Raises Violation."""
    play, statuses = STORIES[story]
    environment = {**ENVIRONMENT, "SPOOL_BUCKET": "spool"}
    with World(0, environment=environment, faults=Faults()) as world:
        world.kill_at = dict(kills)
        stage = Stage(world)
        stage.settle = 61.0  # one more minute of rounds
        play(stage)
        world.run(40.0, until=stage.all_begun_are_final)
        world.faults.until = world.now
        stage.finish()
        for job_id, allowed in zip(stage.jobs, statuses, strict=True):
            if stage.exists(job_id):
                status = stage.row(job_id)["status"]
                stage.expect(status in allowed, f"{job_id} is {status} after {kills}: {stage.timeline(job_id)}")
        return stage.calls_to_end


def single_kills(story: str) -> Iterator[Kills]:
    """A kill before and after each call of the story."""
    for number in range(1, tell(story, {}) + 1):
        for side in SIDES:
            yield {number: side}


def second_kills(story: str, first: Kills) -> Iterator[Kills]:
    """
    After the first kill, one more after each call of what then happens.

    What is killed after one call and what is killed before the next leave the same world: memory dies with both.
    """
    (number,) = first
    for later in range(number + 1, tell(story, first) + 1):
        yield {**first, later: "after"}


def kill_twice(story: str, first: Kills) -> int:
    """Play the first kill with every second one; how many there were. Raises Violation."""
    count = 0
    for kills in second_kills(story, first):
        tell(story, kills)
        count += 1
    return count


__all__ = ["STORIES", "kill_twice", "second_kills", "single_kills", "tell"]
