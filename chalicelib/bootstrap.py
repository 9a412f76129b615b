"""Builds the service from the settings, once a process; the only module that knows all the others."""

import threading
from collections.abc import Callable
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Generic, TypeVar

from chalicelib import catalogue, metrics, parameters, settings
from chalicelib.credentials import Credential, Fresh
from chalicelib.records import dataclass
from chalicelib.runtime import Clock, Crew
from chalicelib.settings import Settings

if TYPE_CHECKING:
    from chalicelib.connection import Resolve
    from chalicelib.courier import Courier
    from chalicelib.d1 import D1
    from chalicelib.fetch import Fetch, Guard
    from chalicelib.health import Health
    from chalicelib.outbox import Outbox
    from chalicelib.pipeline import Pipeline
    from chalicelib.r2 import R2
    from chalicelib.reads import Reads
    from chalicelib.reasons import Reasons
    from chalicelib.removal import Removal
    from chalicelib.results import Results
    from chalicelib.runpod import Runpod
    from chalicelib.saver import Saver
    from chalicelib.spool import Spool
    from chalicelib.stats import Stats
    from chalicelib.steps import Steps
    from chalicelib.store import Store
    from chalicelib.uploads import Uploads
    from chalicelib.verbs import Verbs
    from chalicelib.views import Views
    from chalicelib.waiting import Waiting
    from chalicelib.webhooks import Webhooks
    from chalicelib.wire import Wire

T = TypeVar("T")


class once(Generic[T]):
    """A function that is run on first use, by one thread alone; where it raises, it is run again the next time."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: T | None = None
        self._making = threading.Lock()

    def __call__(self) -> T:
        with self._making:
            if self._made is None:
                self._made = self._make()
            return self._made

    def cache_clear(self) -> None:
        """Forget what was made."""
        self._made = None


class part(Generic[T]):
    """
    A part of the service. Like functools.cached_property, but made by one thread alone: some of them keep what is not
    saved yet. Its module is imported then too, for each costs every cold start that it has a share in.
    """

    def __init__(self, make: "Callable[[Service], T]") -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, service: "Service", owner: type) -> T:
        with service.making:
            made: dict[str, T] = vars(service)  # where it is found from then on, without coming here
            if self._name not in made:
                made[self._name] = self._make(service)
            return made[self._name]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of the machine the service uses; a simulation puts its own in the place of each."""

    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew]
    new_wire: "Callable[[Resolve | None], Wire]"


def machine(clock: Clock) -> Machine:
    """The real one, but for the clock that is given."""

    def new_wire(resolve: "Resolve | None") -> "Wire":
        from chalicelib.wire import Wire

        return Wire(clock, resolve=resolve)

    return Machine(clock=clock, rng=SystemRandom(), new_crew=Crew, new_wire=new_wire)


class Service:
    """What routes and the schedule work with; one of each for a process, made when it is first asked for."""

    def __init__(self, given: Machine, config: Settings, load: Callable[[], Settings]) -> None:
        self.making = threading.RLock()
        self.settings = config
        metrics.name(config.service_name)
        self.models = catalogue.load()
        self.clock = given.clock
        self._rng = given.rng
        self._machine = given
        self._fresh = Fresh(config, load, given.clock)
        # No parts: imported far down a chain of imports, requests has CPython map and unmap its stack a thousand times.
        self._wire = given.new_wire(None)
        self._d1 = make_d1(config, self._wire, given.clock, rng=given.rng, fresh=self._fresh)

    @part
    def _outside(self) -> "Wire":
        return self._machine.new_wire(self._guard.resolve)

    @part
    def _guard(self) -> "Guard":
        from chalicelib.fetch import Guard

        return Guard(self.settings.result_allowed_private_hosts)

    @part
    def _fetch(self) -> "Fetch":
        from chalicelib.fetch import Fetch

        return Fetch(wire=self._outside, clock=self.clock)

    @part
    def _runpod(self) -> "Runpod":
        from chalicelib.runpod import Runpod

        return Runpod(
            wire=self._wire,
            clock=self.clock,
            base_url=self.settings.runpod_api_base,
            api_key=_credential(lambda given: given.runpod_api_key, self.settings, self._fresh),
        )

    @part
    def bucket(self) -> "R2":
        """The bucket that clients read."""
        from chalicelib.r2 import R2

        config = self.settings
        return R2(
            endpoint_url=config.r2_endpoint,
            bucket=config.r2_bucket,
            keys=_credential(lambda given: (given.r2_access_key_id, given.r2_secret_access_key), config, self._fresh),
            public_base_url=config.r2_public_base_url,
        )

    @part
    def spool(self) -> "Spool | None":
        """Where results wait while R2 fails."""
        if not self.settings.spool_bucket:
            return None
        from chalicelib.spool import Spool

        return Spool(self.settings.spool_bucket)

    @property
    def _max_running(self) -> int | None:
        """None where it is no fewer than may be unfinished: then nothing is bounded, and nobody counts."""
        config = self.settings
        return config.max_running if config.max_running < config.max_queued else None

    @part
    def store(self) -> "Store":
        """The jobs table, to be changed."""
        from chalicelib.store import Store

        return Store(
            d1=self._d1,
            models=self.models,
            default_endpoint_id=self.settings.runpod_endpoint_id,
            submit_unknown_wait=self.settings.submit_unknown_wait,
            total_deadline=self.settings.total_deadline,
            max_queued=self.settings.max_queued,
            max_running=self._max_running,
            has_webhooks=self._webhooks.are_on,
        )

    @part
    def reads(self) -> "Reads":
        """The jobs table, to be looked at."""
        from chalicelib.reads import Reads

        return Reads(d1=self._d1, clock=self.clock, max_running=self._max_running)

    def require_calls(self, number: int) -> None:
        """Raise TransientError where fewer calls to D1 than that are left."""
        self._d1.require_calls(number)

    def forget_reads(self) -> None:
        """Read anew from now on: this process has written."""
        if "reads" in vars(self):
            self.reads.forget()

    @part
    def waiting(self) -> "Waiting":
        """Holds a request back until its job has ended."""
        from chalicelib.waiting import Waiting

        return Waiting(reads=self.reads, store=self.store, clock=self.clock)

    @part
    def _webhooks(self) -> "Webhooks":
        from chalicelib.webhooks import Webhooks

        return Webhooks(self.settings.public_base_url, self.settings.webhook_secret)

    @part
    def results(self) -> "Results":
        """Takes files into the bucket."""
        from chalicelib.results import Results

        return Results(fetch=self._fetch, bucket=self.bucket, spool=self.spool, clock=self.clock)

    @part
    def _steps(self) -> "Steps":
        from chalicelib.deadlines import Deadlines
        from chalicelib.retry import Attempts
        from chalicelib.steps import Steps

        config = self.settings
        return Steps(
            runpod=self._runpod,
            results=lambda: self.results,
            clock=self.clock,
            rng=self._rng,
            default_endpoint_id=config.runpod_endpoint_id,
            attempts=Attempts(maximum=config.max_attempts, worker_failed=config.retry_worker_failed),
            deadlines=Deadlines(start=config.start_deadline, run=config.run_deadline, models=self.models),
            models=self.models,
            webhooks=self._webhooks,
        )

    @part
    def uploads(self) -> "Uploads":
        """Pictures that go into jobs."""
        from chalicelib.uploads import Uploads

        return Uploads(
            d1=self._d1,
            bucket=self.bucket,
            fetch=self._fetch,
            clock=self.clock,
            rng=self._rng,
            new_crew=self._machine.new_crew,
        )

    @part
    def outbox(self) -> "Outbox":
        """What is to be told at callback_urls."""
        from chalicelib.outbox import Outbox

        return Outbox(d1=self._d1)

    @part
    def courier(self) -> "Courier":
        """Tells it."""
        from chalicelib.courier import Courier

        return Courier(
            outbox=self.outbox,
            wire=self._outside,
            guard=self._guard,
            secrets=self.settings.callback_secrets,
            views=self.views,
            clock=self.clock,
            rng=self._rng,
            new_crew=self._machine.new_crew,
        )

    @part
    def _reasons(self) -> "Reasons":
        from chalicelib.reasons import Reasons

        return Reasons(
            runpod=self._runpod,
            default_endpoint_id=self.settings.runpod_endpoint_id,
            submit_unknown_wait=self.settings.submit_unknown_wait,
            clock=self.clock,
        )

    @part
    def views(self) -> "Views":
        """What is said of a job."""
        from chalicelib.views import Views

        return Views(bucket=self.bucket, reasons=self._reasons, clock=self.clock)

    @part
    def _saver(self) -> "Saver":
        from chalicelib.saver import Saver

        return Saver(store=self.store, runpod=self._runpod, clock=self.clock, rng=self._rng)

    @part
    def pipeline(self) -> "Pipeline":
        """Moves jobs."""
        from chalicelib.pipeline import Pipeline

        return Pipeline(
            store=self.store,
            steps=self._steps,
            saver=self._saver,
            clock=self.clock,
            rng=self._rng,
            webhooks=self._webhooks,
            models=self.models,
            courier=lambda: self.courier,
            uploads=lambda: self.uploads,
            reasons=lambda: self._reasons,
            removal=lambda: self._removal,
            retention_days=self.settings.retention_days,
            skip_idle_rounds=self.settings.skip_idle_rounds,
            new_crew=self._machine.new_crew,
        )

    @part
    def _removal(self) -> "Removal":
        from chalicelib.removal import Removal

        return Removal(
            store=self.store, bucket=self.bucket, clock=self.clock, rng=self._rng, new_crew=self._machine.new_crew
        )

    @part
    def verbs(self) -> "Verbs":
        """What users do to jobs."""
        from chalicelib.verbs import Verbs

        return Verbs(
            store=self.store,
            reads=self.reads,
            steps=self._steps,
            removal=self._removal,
            pipeline=self.pipeline,
            clock=self.clock,
            rng=self._rng,
            new_crew=self._machine.new_crew,
        )

    @part
    def stats(self) -> "Stats":
        """Figures of the last days."""
        from chalicelib.stats import Stats

        return Stats(d1=self._d1, clock=self.clock)

    @part
    def health(self) -> "Health":
        """Looks at the clouds."""
        from chalicelib.health import Health

        return Health(
            settings=self.settings,
            models=self.models,
            store=self.store,
            bucket=self.bucket,
            spool=self.spool,
            runpod=self._runpod,
            webhooks=self._webhooks,
            wire=self._wire,
            clock=self.clock,
            rng=self._rng,
            new_crew=self._machine.new_crew,
        )


@once
def service() -> Service:
    """The service of this process, made on first use. Raises SettingError, and tries again the next time."""
    return build(settings.load(), Clock(), load=settings.load)


def build(config: Settings, clock: Clock, *, load: Callable[[], Settings] | None = None) -> Service:
    """A service with these settings and this clock; keys that a cloud refuses are read again with `load`."""
    return build_on(machine(clock), config, load=load)


def build_on(given: Machine, config: Settings, *, load: Callable[[], Settings] | None = None) -> Service:
    """A service with these settings on this machine."""
    return Service(given, config, load or (lambda: config))


def _credential(read: Callable[[Settings], T], config: Settings, fresh: Fresh[Settings] | None) -> Credential[T]:
    if fresh is None:
        return Credential(read(config))
    return Credential(read(config), lambda: read(fresh.get()), seconds=parameters.CALL_SECONDS)


def make_d1(
    config: Settings, wire: "Wire", clock: Clock, *, rng: Random | None = None, fresh: Fresh[Settings] | None = None
) -> "D1":
    """The D1 database that the settings name."""
    from chalicelib.d1 import D1

    return D1(
        wire=wire,
        clock=clock,
        rng=rng or SystemRandom(),
        base_url=config.cloudflare_api_base,
        account_id=config.cloudflare_account_id,
        database_id=config.d1_database_id,
        token=_credential(lambda given: given.cloudflare_api_token, config, fresh),
    )
