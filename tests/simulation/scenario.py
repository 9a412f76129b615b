"""A random run of the world: jobs, users, callbacks and faults, all from one seed."""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

from chalicelib.api import CREATE_SECONDS
from chalicelib.bootstrap import Service
from chalicelib.errors import RequestError
from chalicelib.jobs import Job, from_text, to_text
from chalicelib.runtime import Deadline
from tests.simulation.clouds import BASE, PICTURES, RECEIVERS, Run
from tests.simulation.faults import Fate, Faults, Plan
from tests.simulation.invariants import Violation
from tests.simulation.world import REQUEST_SECONDS, RESERVE, START, World
from tools.cloud import Account, settings_for

ENVIRONMENT = {
    **settings_for(BASE, Account()),
    "R2_ENDPOINT_URL": "https://r2.sim.test",
    "PUBLIC_BASE_URL": "https://api.sim.test",
    "WEBHOOK_SECRET": "simulation-webhook-secret",
    "CALLBACK_SECRETS": "whsec_c2ltdWxhdGVkLXNlY3JldC1udW1iZXItb25l,whsec_c2ltdWxhdGVkLXNlY3JldC1udW1iZXItdHdv",
    "RESULT_ALLOWED_PRIVATE_HOSTS": "",
    "START_DEADLINE": "600",
    "RUN_DEADLINE": "500",
    "TOTAL_DEADLINE": "3600",
}
TICK = 60.0
LONGEST = 6 * 3600.0  # everything must be over long before
SETTLE = 180.0
REST = 30 * 3600.0  # in which all is told or given up, and what no job uses is swept
EDITS = "qwen-image-edit"  # the model of models.json that takes a picture

# For each class of random faults the highest rate for a call that a seed may draw.
RATES = {
    "crash_before_effect": 0.04,
    "crash_after_effect": 0.04,
    "run_answer_lost": 0.4,
    "run_request_lost": 0.3,
    "d1_5xx": 0.1,
    "d1_answer_lost": 0.1,
    "r2_answer_lost": 0.4,
    "truncated_download": 0.5,
    "bad_host": 0.5,
    "runpod_429": 0.15,
    "runpod_5xx": 0.2,
    "unknown_state": 0.2,
    "spool_down": 0.3,
    "lambda_time_limit": 0.02,
    "callback_down": 0.7,
    "callback_slow": 0.4,
    "callback_answer_lost": 0.4,
    "callback_500": 0.7,
    "callback_429": 0.5,
    "callback_redirect": 0.3,
    "callback_410": 0.3,
}
WINDOWS = {"d1_stall": 80.0, "d1_lockout": 300.0, "r2_down": 4020.0}
VERDICTS = {"timed_out": "TIMED_OUT", "worker_failed": "FAILED"}


@dataclass
class Outcome:
    """What one seed came to."""

    seed: int
    days: float
    jobs: int
    faults: Counter[str] = field(default_factory=Counter)
    violation: str = ""
    trace: list[str] = field(default_factory=list)


class Scenario:
    """One world and what befalls it. Times are seconds from its beginning."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.scenario = self
        self.jobs: list[str] = []
        self.settle = SETTLE
        self.resting = False

    # What happens from outside

    def tick(self) -> None:
        """The schedule's event."""

        calm = self.world.now >= self.world.faults.until

        def minute(service: Service) -> object:
            deadline = Deadline(service.clock, 58.0 - RESERVE)
            # When nothing goes wrong any more one round a minute comes to the same, in less time.
            return self._calm_minute(service, deadline) if calm else service.pipeline.run_minute(deadline)

        self.world.invoke("schedule", minute)

    def _calm_minute(self, service: Service, deadline: Deadline) -> None:
        if not self.resting:  # then nothing is live
            service.pipeline.run_round(deadline)
        if self._due("deliveries"):
            service.courier.run(deadline)
        if self._due("uploads"):
            service.uploads.sweep(deadline)

    def every_minute(self) -> None:
        """Ticks for ever, some twice, some not; when nothing is due for long, none."""
        rng, faults = self.world.rng, self.world.faults
        if faults.within("no_schedule", self.world.now):
            faults.count("duplicate_tick")
        elif faults.hits(rng, "duplicate_tick", self.world.now):
            for _ in range(rng.choice([0, 2])):
                self.tick()
        else:
            self.tick()
        if faults.hits(rng, "overlapping_rounds", self.world.now):
            self.world.at(rng.uniform(0.0, 30.0), self.tick)
        self.world.at(max(TICK, self._until_due() - 30.0), self.every_minute)

    def _until_due(self) -> float:
        if self.world.now < self.world.faults.until:
            return 0.0
        rows = self.world.clouds.execute("SELECT due_at FROM jobs WHERE status IN ('queued', 'running')")
        due = [row["due_at"] for row in rows] + (self._to_come() if self.resting else [])
        return min(
            ((from_text(at) - START).total_seconds() - self.world.now if at else 0.0 for at in due), default=TICK
        )

    def _to_come(self) -> list[str]:
        """When something is to be told or swept."""
        rows = self.world.clouds.execute(
            "SELECT due_at FROM deliveries WHERE due_at IS NOT NULL "
            "UNION ALL SELECT due_at FROM uploads WHERE due_at IS NOT NULL"
        )
        return [row["due_at"] for row in rows]

    def _due(self, table: str) -> bool:
        at = to_text(START + timedelta(seconds=self.world.now + self.world.faults.max_skew))
        return bool(self.world.clouds.execute(f"SELECT 1 FROM {table} WHERE due_at <= ? LIMIT 1", at))

    def create(
        self,
        payload: dict[str, Any] | None = None,
        done: Any = None,
        *,
        pictures: tuple[str, ...] = (),
        callback_url: str | None = None,
    ) -> None:
        """A client creates a job."""

        def run(service: Service) -> object:
            return self.make(service, payload, pictures=pictures, callback_url=callback_url)

        self.world.invoke("api", run, done)

    def make(
        self,
        service: Service,
        payload: dict[str, Any] | None = None,
        *,
        pictures: tuple[str, ...] = (),
        callback_url: str | None = None,
        plan: Plan | None = None,
        number: int | None = None,
    ) -> Job:
        """
        What the route does: look at the pictures, create the job, send it. Its id gets the number's place, if there is
        one. Raises as the service does.
        """
        deadline = Deadline(service.clock, REQUEST_SECONDS)
        keys = service.uploads.take(pictures, deadline.less(CREATE_SECONDS)) if pictures else {}
        model = EDITS if pictures else "m"
        job = service.pipeline.new_job(
            prompt="a cat",
            model=model,
            payload=payload,
            slots=service.models.get(model).read("a cat", {}) if pictures else None,
            pictures=[keys[picture] for picture in pictures],
            callback_url=callback_url,
        )
        if number is None:
            self.jobs.append(job.id)
        else:
            self.jobs[number] = job.id
        if plan is not None:
            self.world.faults.plans[job.id, 0] = plan
        service.pipeline.create([job], deadline, by="test")
        return job

    def offer(self, done: Any) -> None:
        """A client asks where a picture may be put."""

        def run(service: Service) -> object:
            deadline = Deadline(service.clock, REQUEST_SECONDS)
            return service.uploads.offer(content_type="image/png", size=100, deadline=deadline)["key"]

        self.world.invoke("api", run, lambda result: done(result) if isinstance(result, str) else None)

    def replay(self, job_id: str) -> None:
        """A user has the first end of a job told once more."""
        self.world.invariants.asked[job_id]["replay"] += 1
        self.world.invoke(
            "api", lambda service: service.courier.replay(job_id, "1", Deadline(service.clock, REQUEST_SECONDS))
        )

    def verb(self, verb: str, job_id: str) -> None:
        """A user cancels, retries, redrives or deletes."""
        self.world.invariants.asked[job_id][verb] += 1

        def run(service: Service) -> object:
            return getattr(service.verbs, verb)(job_id, Deadline(service.clock, REQUEST_SECONDS), by="user")

        self.world.invoke("api", run)

    def old_row(self, job_id: str, status: str) -> None:
        """The earlier version writes a row of its own."""
        self.jobs.append(job_id)
        at = to_text(START + timedelta(seconds=self.world.now))
        self.world.clouds.execute(
            "INSERT INTO jobs (id, status, prompt, model, created_at, updated_at) VALUES (?, ?, 'old', 'm', ?, ?)",
            job_id, status, at, at,
        )  # fmt: skip

    def send_webhooks(self, run: Run) -> None:
        """RunPod tells of a run's end, as it does: up to three times, without a signature."""
        world, faults, rng = self.world, self.world.faults, self.world.rng
        wait = run.finish() - world.now + 0.2
        if faults.hits(rng, "webhook_lost", world.now):
            return
        if faults.hits(rng, "webhook_late", world.now):
            wait += rng.uniform(10.0, 900.0)
        copies = 2 if faults.hits(rng, "webhook_duplicate", world.now) else 1
        for _ in range(copies):
            world.at(wait + rng.uniform(0.0, 1.0), lambda: self.webhook(run, tries=3))
        if faults.hits(rng, "webhook_forged", world.now):
            world.at(wait, lambda: self.forged(run))

    def webhook(self, run: Run, *, tries: int) -> None:
        """One delivery of a callback, if the run has ended by itself."""
        assert run.webhook is not None
        if run.cancelled is not None or self.world.now > run.created + run.ttl:
            return
        body = json.dumps({**self.world.clouds.status(run), "input": {}, "webhook": run.webhook}).encode()

        def again(result: object) -> None:
            if isinstance(result, Exception) and not isinstance(result, RequestError) and tries > 1:
                self.world.at(5.0 if tries == 3 else 15.0, lambda: self.webhook(run, tries=tries - 1))

        self.post(run.webhook, body, again)

    def forged(self, run: Run) -> None:
        """Callbacks that RunPod never sent, and one that is no JSON: refused, and nothing is changed."""
        assert run.webhook is not None
        base, attempt, token = run.webhook.rsplit("/", 2)
        body = json.dumps({"id": run.id, "status": "COMPLETED"}).encode()
        urls = [f"{base}/{int(attempt) + 1}/{token}", f"{base}/{attempt}/{'0' * 64}", f"{base}x/{attempt}/{token}"]
        for url in urls:
            self.post(url, body, self._must_refuse)
        self.post(run.webhook, b"<html>", self._must_refuse)

    def _must_refuse(self, result: object) -> None:
        self.world.invariants.check(isinstance(result, RequestError), f"a forged callback was taken: {result!r}")

    def post(self, url: str, body: bytes, done: Any = None) -> None:
        """Deliver to the route."""
        job_id, attempt, token = url.rsplit("/", 3)[1:]

        def run(service: Service) -> object:
            deadline = Deadline(service.clock, REQUEST_SECONDS)
            return service.pipeline.webhook(job_id, attempt, token, body, deadline)

        self.world.invoke("api", run, done)

    # To the end

    def all_final(self) -> bool:
        """Whether nothing is live any more."""
        live = self.world.clouds.execute("SELECT count(*) AS n FROM jobs WHERE status IN ('queued', 'running')")
        return live[0]["n"] == 0

    def finish(self) -> None:
        """Let everything come to its end, a little longer, and look at it. Raises Violation."""
        world = self.world
        world.run(world.faults.until - world.now)
        end = world.now + LONGEST
        while not self.all_final() and world.now < end:
            world.run(TICK)
        self.calls_to_end = world.calls
        world.run(self.settle)
        while not self.all_final() and world.now < end:  # a callback or a late save may have moved something
            world.run(TICK)
        found = world.invariants.log_handler.found
        world.invariants.check(not found, found[0] if found else "")
        world.invariants.at_end()
        if self._to_come():
            self._rest()
        world.invariants.at_rest()

    def _rest(self) -> None:
        """Let all be told, and swept."""
        world, self.resting = self.world, True
        end = world.now + REST
        while self._to_come() and world.now < end:
            world.run(TICK)
        self.resting = False
        self.calls_to_end = world.calls


def random_faults(rng: Random) -> Faults:
    """What goes wrong in one seed: about a third of the classes, each with a rate of its own."""
    faults = Faults(until=rng.uniform(90.0, 450.0), recycled=rng.choice([0.0, 0.0, 0.3]))
    share = rng.choice([0.1, 0.3, 0.5])
    for name, highest in RATES.items():
        if rng.random() < share:
            faults.rates[name] = rng.uniform(0.0, highest)
    for name, seconds in WINDOWS.items():
        if rng.random() < share / 3:
            begin = rng.uniform(0.0, faults.until)
            faults.windows.append((name, begin, begin + seconds))
    for name in (
        "duplicate_tick",
        "overlapping_rounds",
        "webhook_duplicate",
        "webhook_late",
        "webhook_forged",
        "webhook_lost",
    ):
        if rng.random() < 0.4:
            faults.rates[name] = rng.choice([0.2, 0.8])
    if rng.random() < 0.15:
        faults.max_skew = rng.choice([2.0, 300.0])
    return faults


def random_plan(rng: Random, faults: Faults) -> Plan:
    """What becomes of one run."""
    plan = Plan(
        queue_seconds=rng.choice([0.0, 0.3, 2.0, 30.0, 200.0]),
        run_seconds=rng.choice([0.0, 0.5, 5.0, 60.0, 400.0]),
        shape=rng.choice(["base64", "base64", "link"]),
        files=rng.choice([1, 1, 1, 3]),
    )
    kind = rng.choice(
        ["fine"] * 12
        + ["runpod_404_early", "runpod_404_lost", "timed_out", "worker_failed", "cancelled_outside", "no_output"]
        + ["scaled_to_zero", "runs_for_ever", "runpod_404_expired"]
        + ["late_in_progress"]
    )
    if kind == "fine":
        return plan
    faults.count(kind)
    match kind:
        case "runpod_404_early":
            return replace(plan, hidden_seconds=rng.uniform(1.0, 140.0))
        case "runpod_404_lost":
            return replace(plan, lost_after=rng.uniform(0.0, 300.0))
        case "cancelled_outside":
            return replace(plan, cancelled_after=rng.uniform(0.0, 300.0))
        case "no_output":
            return replace(plan, shape=rng.choice(["none", "no_images"]))
        case "scaled_to_zero":
            return replace(plan, queue_seconds=1e9)
        case "runs_for_ever":
            return replace(plan, run_seconds=1e9)
        case "runpod_404_expired":
            return replace(plan, run_seconds=1.0, queue_seconds=0.0, webhook=False)
        case "late_in_progress":
            return plan
    return replace(plan, verdict=VERDICTS[kind])


class RandomScenario(Scenario):
    """What a seed makes of it."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        rng, faults = world.rng, world.faults
        faults.run_plan = self._plan
        self._plans: dict[tuple[str, int], Plan] = {}
        world.at(rng.uniform(0.0, TICK), self.every_minute)
        for _ in range(rng.randint(2, 7)):
            world.at(rng.uniform(0.0, faults.until), self._create)
        for verb in ("cancel", "retry", "redrive", "delete", "replay"):
            for _ in range(rng.choice([0, 0, 1, 3])):
                world.at(rng.uniform(0.0, faults.until), lambda verb=verb: self._user(verb))
        if rng.random() < 0.1:
            faults.count("old_row")
            status = rng.choice(["queued", "running"])
            world.at(rng.uniform(0.0, faults.until), lambda: self.old_row("old-row-1", status))
        if rng.random() < 0.1:
            world.at(rng.uniform(0.0, faults.until), self._change_endpoint)
        if rng.random() < 0.1:
            faults.count("callback_never")
            faults.always.append((f"callback POST {RECEIVERS[0]}", Fate(refused=True)))
        if rng.random() < 0.1:  # nobody comes by until RunPod has forgotten what it had
            begin = rng.uniform(0.0, faults.until)
            faults.windows.append(("no_schedule", begin, begin + 2000.0))

    def _create(self) -> None:
        rng = self.world.rng
        poisonous = rng.random() < 0.05

        def done(result: Any) -> None:
            if poisonous and hasattr(result, "id"):
                self.world.clouds.poison.add(result.id)

        callback_url = rng.choice([None, None, *RECEIVERS])
        if rng.random() < 0.15:
            self._create_with_picture(callback_url)
        else:
            self.create(done=done, callback_url=callback_url)

    def _create_with_picture(self, callback_url: str | None) -> None:
        rng, faults = self.world.rng, self.world.faults

        def use(picture: str) -> None:
            self.create(pictures=(picture,), callback_url=callback_url)

        def offered(key: str) -> None:
            if rng.random() < 0.1:
                faults.count("picture_never_put")
                return
            self.world.at(rng.uniform(0.1, 5.0), lambda: self.world.clouds.put_picture(key))
            if rng.random() < 0.1:
                faults.count("picture_unused")
                return
            self.world.at(rng.uniform(5.0, 20.0), lambda: use(key))
            if rng.random() < 0.5:
                faults.count("picture_shared")
                self.world.at(rng.uniform(5.0, 400.0), lambda: use(key))

        if rng.random() < 0.3:
            use(f"{PICTURES}/{rng.randrange(3)}.png")
        else:
            self.offer(offered)

    def _plan(self, rng: Random, job_id: str, attempt: int) -> Plan:
        before = self.world.faults.counted["late_in_progress"]
        plan = random_plan(rng, self.world.faults)
        if self.world.faults.counted["late_in_progress"] > before:
            self.world.faults.in_progress_for_ever.add((job_id, attempt))
        if START + timedelta(seconds=self.world.now) < datetime(2026, 2, 1, tzinfo=START.tzinfo):
            if self.world.now + plan.queue_seconds + plan.run_seconds > 300.0:
                self.world.faults.count("month_boundary")
        return plan

    def _user(self, verb: str) -> None:
        if self.jobs:
            self.world.faults.count(f"user_{verb}")
            job_id = self.world.rng.choice(self.jobs)
            self.replay(job_id) if verb == "replay" else self.verb(verb, job_id)

    def _change_endpoint(self) -> None:
        self.world.faults.count("endpoint_changed")
        self.world.config = replace(self.world.config, runpod_endpoint_id="another-endpoint")


def run_seed(seed: int) -> Outcome:
    """Run one seed to its end; what it came to, with the violation if there was one."""
    rng = Random(seed)
    environment = {
        **ENVIRONMENT,
        **({"SPOOL_BUCKET": "spool"} if rng.random() < 0.5 else {}),
        **({"RETRY_WORKER_FAILED": "true"} if rng.random() < 0.1 else {}),
    }
    with World(seed, environment=environment, faults=random_faults(rng)) as world:
        scenario = RandomScenario(world)
        outcome = Outcome(seed, 0.0, 0)
        try:
            scenario.finish()
        except Violation as violation:
            outcome.violation = str(violation)
        outcome.days, outcome.jobs, outcome.faults = world.now / 86_400, len(scenario.jobs), world.faults.counted
        outcome.trace = world.trace
        return outcome
