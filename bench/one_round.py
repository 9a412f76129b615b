"""
One measurement in a process of its own: `python bench/one_round.py`, told what to do as JSON on its standard input.

`ours` is the service's own round. `bare` makes the same HTTP calls from as many threads and does nothing else: no
checks, no states, no logs; of D1 it calls what `ours` has written down. `loop` is one job after the other, with a write
each.
"""

import base64
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import SystemRandom
from typing import Any

import requests

from bench import scene
from chalicelib import bootstrap, log, pipeline, rounds, runpod, settings
from chalicelib.bootstrap import Machine
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.wire import Wire

SECONDS = 600.0  # that a round has
MOST_ROUNDS = 100


class CountingWire(Wire):
    """Counts the calls, and keeps what D1 was sent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: Counter[str] = Counter()
        self.sent: list[bytes] = []

    def open(self, service: str, *args: Any, **kwargs: Any) -> Any:
        self.calls[service] += 1
        if service == "d1":
            self.sent.append(kwargs["body"])
        return super().open(service, *args, **kwargs)


def ours(given: dict[str, Any]) -> dict[str, Any]:
    """Rounds until every job was looked at and every picture is stored."""
    clock, wires = Clock(), []

    def new_wire(resolve: Any) -> Wire:
        wires.append(CountingWire(clock, resolve=resolve))
        return wires[-1]

    config = settings.load(given["settings"], env_file=Path("/dev/null"))
    machine = Machine(clock=clock, rng=SystemRandom(), new_crew=Crew, new_wire=new_wire)
    service = bootstrap.build_on(machine, config)
    log.begin("bench")
    pipeline.THREADS = given["threads"] or pipeline.THREADS
    if given.get("unlimited"):  # RunPod's limit of calls
        runpod.CALLS = dict.fromkeys(runpod.CALLS, 1_000_000)
        rounds.POLLS_PER_SECOND = 1_000
    if given.get("unbounded"):  # the memory that answers may take
        rounds.ROOM_BYTES = 1_000_000_000_000
    service.bucket._s3()
    pipelined = service.pipeline
    service.store.tables(timeout=5.0)  # warm, as a round before leaves it
    wires[0].calls.clear()
    wires[0].sent.clear()

    def work() -> None:
        checked = done = number = 0
        wanted = given["count"]
        while (checked if given["kind"] == scene.RUNNING else done) < wanted and number < MOST_ROUNDS:
            report = pipelined.run_round(Deadline(clock, SECONDS))
            number += 1
            checked += report.checked
            done += len(report.updated)
        if (checked if given["kind"] == scene.RUNNING else done) < wanted:
            raise AssertionError(f"{checked} checked, {done} done")

    figures = measured(work)
    Path(given["record"]).write_text(json.dumps([body.decode() for body in wires[0].sent]))
    return {**figures, "d1": wires[0].calls["d1"], "runpod": wires[0].calls["runpod"]}


class Bare:
    """The calls, each as short as `requests` and boto3 let one write it."""

    def __init__(self, given: dict[str, Any], threads: int) -> None:
        self.config = settings.load(given["settings"], env_file=Path("/dev/null"))
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=threads))
        self.s3 = self._s3(threads)
        self.kind = given["kind"]
        self.d1('{"sql": "SELECT 1"}')  # warm, too

    def _s3(self, threads: int) -> Any:
        import boto3
        from botocore.config import Config

        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.config.r2_endpoint,
            region_name="auto",
            aws_access_key_id=self.config.r2_access_key_id,
            aws_secret_access_key=self.config.r2_secret_access_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=threads,
            ),
        )
        # boto3 would wait a second for the 100 Continue that R2 does not send.
        client.meta.events.register("before-send.s3", lambda request, **_: request.headers.pop("Expect", None) and None)
        return client

    def d1(self, body: str) -> None:
        url = (
            f"{self.config.cloudflare_api_base}/accounts/{self.config.cloudflare_account_id}"
            f"/d1/database/{self.config.d1_database_id}/query"
        )
        head = {"Authorization": f"Bearer {self.config.cloudflare_api_token}", "Content-Type": "application/json"}
        answer = self.session.post(url, data=body.encode(), headers=head, timeout=60)
        assert answer.status_code == 200, answer.text
        answer.json()

    def job(self, number: int) -> None:
        url = f"{self.config.runpod_api_base}/{self.config.runpod_endpoint_id}/status/{scene.run_id(number)}"
        head = {"Authorization": f"Bearer {self.config.runpod_api_key}"}
        answer = self.session.get(url, headers=head, timeout=60).json()
        if answer["status"] != "COMPLETED":
            return
        if self.kind == scene.LINKS:
            picture = self.session.get(answer["output"]["image_url"], timeout=60).content
        else:
            picture = base64.b64decode(answer["output"]["images"][0]["data"])
        key = f"jobs/2026/01/job-{number:05d}/output.png"
        self.s3.put_object(Bucket=self.config.r2_bucket, Key=key, Body=io.BytesIO(picture), ContentType="image/png")
        self.s3.head_object(Bucket=self.config.r2_bucket, Key=key)


def bare(given: dict[str, Any]) -> dict[str, Any]:
    """The claim, all jobs side by side, and the other calls to D1 beside them; the last one when all are over."""
    calls = Bare(given, given["threads"])
    first, *others = json.loads(Path(given["record"]).read_text())

    def work() -> None:
        calls.d1(first)
        with ThreadPoolExecutor(given["threads"]) as pool:
            jobs = [pool.submit(calls.job, number) for number in range(given["count"])]
            for body in others[:-1]:
                calls.d1(body)
            for job in jobs:
                job.result()
        if others:
            calls.d1(others[-1])

    return measured(work)


def loop(given: dict[str, Any]) -> dict[str, Any]:
    """One job after the other, and a write for each."""
    calls = Bare(given, 1)
    write = json.dumps({"sql": "UPDATE jobs SET updated_at = ?1 WHERE id = ?2", "params": ["", "job-00000"]})

    def work() -> None:
        for number in range(given["count"]):
            calls.job(number)
            calls.d1(write)

    return measured(work)


def measured(work: Callable[[], None]) -> dict[str, Any]:
    """Seconds of the clock and of the processor, and the peak of memory in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use now
    cpu, begun = time.process_time(), time.perf_counter()
    work()
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000
    return {"wall": wall, "cpu": cpu, "rss": peak}


if __name__ == "__main__":
    order = json.loads(sys.stdin.read())
    print(json.dumps({"ours": ours, "bare": bare, "loop": loop}[order["how"]](order)))
