"""
Processes to be killed: one that builds the service and forks, and those that it forks, one for each line it reads.

    rounds                          rounds one after the other, as the schedule runs them, but without pauses
    create LOG PREFIX COUNT PAUSE   jobs, so many seconds apart; the file LOG is told of each before (try) and after
                                    (made), then of the end (over)
    reap PID                        none, but says when that one is gone; until then its id is not given anew

It says the process id of each. They end when it does.
"""

import os
import random
import sys
import traceback
from pathlib import Path

from chalicelib import bootstrap, settings
from chalicelib.bootstrap import Service
from chalicelib.errors import ServiceError
from chalicelib.runtime import Deadline
from tests.contract.fast_clock import FastClock
from tools.processes import end_with_parent

SHAPES = ("base64", "data_url", "link")


def rounds(service: Service) -> None:
    """Run rounds until the end."""
    while True:
        try:
            service.pipeline.run_round(Deadline(service.clock, 57.0))
        except ServiceError:
            traceback.print_exc()


def create(service: Service, log: str, prefix: str, count: str, pause: str) -> None:
    """Create jobs of all shapes; every second one is only queued, for the rounds to send."""
    may_send = service.store.calls_left
    with Path(log).open("a", buffering=1) as file:
        for number in range(int(count)):
            prompt = f"{prefix} {number}"
            wish = {"shape": random.choice(SHAPES), "queue_seconds": random.random(), "run_seconds": random.random()}
            job = service.pipeline.new_job(prompt=prompt, model="m", payload={"prompt": prompt, "simulate": wish})
            service.store.calls_left = (lambda: 0) if number % 2 else may_send
            file.write(f"try {job.id} {prompt}\n")
            try:
                service.pipeline.create([job], Deadline(service.clock, 24.0), by="test")
                file.write(f"made {job.id} {prompt}\n")
            except ServiceError:
                traceback.print_exc()
            service.clock.sleep(float(pause))
        file.write(f"over - {prefix}\n")


def fork(service: Service, life: tuple[int, int], task: str, arguments: list[str]) -> int:
    """Begin a process, which ends when nobody holds the other end of its standard input; its id."""
    reader, writer = life
    if pid := os.fork():
        return pid
    os.close(writer)
    os.dup2(reader, 0)
    end_with_parent()
    try:
        {"rounds": rounds, "create": create}[task](service, *arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def main() -> None:
    service = bootstrap.build(settings.load(), FastClock())
    # Importing what they work with, and making boto3's client, takes longer than most of them live.
    for part in ("pipeline", "results", "courier"):
        getattr(service, part)
    service.bucket.presign("warm", seconds=1)
    life = os.pipe()
    for line in sys.stdin:
        task, *arguments = line.split()
        if task == "reap":
            os.waitpid(int(arguments[0]), 0)
            print(arguments[0], flush=True)
        else:
            print(fork(service, life, task, arguments), flush=True)


if __name__ == "__main__":
    main()
