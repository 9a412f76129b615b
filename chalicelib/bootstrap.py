"""Builds the service from the settings, once a process; the only module that knows all the others."""

from collections.abc import Callable
from functools import lru_cache
from random import Random, SystemRandom
from typing import TypeVar

from chalicelib import catalogue, parameters, settings
from chalicelib.connection import Resolve
from chalicelib.courier import Courier
from chalicelib.credentials import Credential, Fresh
from chalicelib.d1 import D1
from chalicelib.deadlines import Deadlines
from chalicelib.fetch import Fetch, Guard
from chalicelib.health import Health
from chalicelib.models import Models
from chalicelib.outbox import Outbox
from chalicelib.pipeline import Pipeline
from chalicelib.r2 import R2
from chalicelib.reads import Reads
from chalicelib.reasons import Reasons
from chalicelib.records import dataclass
from chalicelib.removal import Removal
from chalicelib.results import Results
from chalicelib.retry import Attempts
from chalicelib.runpod import Runpod
from chalicelib.runtime import Clock, Crew
from chalicelib.saver import Saver
from chalicelib.settings import Settings
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


@dataclass(frozen=True, kw_only=True)
class Service:
    """What routes and the schedule work with."""

    settings: Settings
    models: Models
    store: Store
    reads: Reads
    waiting: Waiting
    pipeline: Pipeline
    verbs: Verbs
    views: Views
    bucket: R2
    uploads: Uploads
    outbox: Outbox
    courier: Courier
    stats: Stats
    health: Health
    clock: Clock


@lru_cache(maxsize=1)
def service() -> Service:
    """The service of this process, made on first use. Raises SettingError, and tries again the next time."""
    return build(settings.load(), Clock(), load=settings.load)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of the machine the service uses; a simulation puts its own in the place of each."""

    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew]
    new_wire: Callable[[Resolve | None], Wire]


def machine(clock: Clock) -> Machine:
    """The real one, but for the clock that is given."""
    return Machine(
        clock=clock, rng=SystemRandom(), new_crew=Crew, new_wire=lambda resolve: Wire(clock, resolve=resolve)
    )


def build(config: Settings, clock: Clock, *, load: Callable[[], Settings] | None = None) -> Service:
    """A service with these settings and this clock; keys that a cloud refuses are read again with `load`."""
    return build_on(machine(clock), config, load=load)


def build_on(given: Machine, config: Settings, *, load: Callable[[], Settings] | None = None) -> Service:
    """A service with these settings on this machine."""
    models = catalogue.load()
    clock, rng, wire = given.clock, given.rng, given.new_wire(None)
    fresh = Fresh(config, load or (lambda: config), clock)
    d1 = make_d1(config, wire, clock, rng=rng, fresh=fresh)
    runpod = Runpod(
        wire=wire,
        clock=clock,
        base_url=config.runpod_api_base,
        api_key=_credential(lambda given: given.runpod_api_key, config, fresh),
    )
    webhooks = Webhooks(config.public_base_url, config.webhook_secret)
    store = Store(
        d1=d1,
        models=models,
        default_endpoint_id=config.runpod_endpoint_id,
        submit_unknown_wait=config.submit_unknown_wait,
        total_deadline=config.total_deadline,
        max_queued=config.max_queued,
        has_webhooks=webhooks.are_on,
    )
    reads = Reads(d1=d1, clock=clock)
    guard = Guard(config.result_allowed_private_hosts)
    outside = given.new_wire(guard.resolve)
    fetch = Fetch(wire=outside, clock=clock)
    bucket = R2(
        endpoint_url=config.r2_endpoint,
        bucket=config.r2_bucket,
        keys=_credential(lambda given: (given.r2_access_key_id, given.r2_secret_access_key), config, fresh),
        public_base_url=config.r2_public_base_url,
    )
    spool = Spool(config.spool_bucket) if config.spool_bucket else None
    steps = Steps(
        runpod=runpod,
        results=Results(fetch=fetch, bucket=bucket, spool=spool, clock=clock),
        clock=clock,
        rng=rng,
        default_endpoint_id=config.runpod_endpoint_id,
        attempts=Attempts(maximum=config.max_attempts, worker_failed=config.retry_worker_failed),
        deadlines=Deadlines(start=config.start_deadline, run=config.run_deadline, models=models),
        models=models,
        webhooks=webhooks,
    )
    uploads = Uploads(d1=d1, bucket=bucket, fetch=fetch, clock=clock, rng=rng, new_crew=given.new_crew)
    outbox = Outbox(d1=d1)
    reasons = Reasons(
        runpod=runpod,
        default_endpoint_id=config.runpod_endpoint_id,
        submit_unknown_wait=config.submit_unknown_wait,
        clock=clock,
    )
    views = Views(bucket=bucket, reasons=reasons, clock=clock)
    courier = Courier(
        outbox=outbox,
        wire=outside,
        guard=guard,
        secrets=config.callback_secrets,
        views=views,
        clock=clock,
        rng=rng,
        new_crew=given.new_crew,
    )
    saver = Saver(store=store, runpod=runpod, clock=clock, rng=rng)
    pipeline = Pipeline(
        store=store,
        steps=steps,
        saver=saver,
        clock=clock,
        rng=rng,
        webhooks=webhooks,
        models=models,
        courier=courier,
        uploads=uploads,
        skip_idle_rounds=config.skip_idle_rounds,
        new_crew=given.new_crew,
    )
    return Service(
        settings=config,
        models=models,
        store=store,
        reads=reads,
        waiting=Waiting(reads=reads, store=store, clock=clock),
        pipeline=pipeline,
        verbs=Verbs(
            store=store,
            reads=reads,
            steps=steps,
            removal=Removal(store=store, bucket=bucket, clock=clock, rng=rng, new_crew=given.new_crew),
            pipeline=pipeline,
            clock=clock,
            rng=rng,
            new_crew=given.new_crew,
        ),
        views=views,
        bucket=bucket,
        uploads=uploads,
        outbox=outbox,
        courier=courier,
        stats=Stats(d1=d1, clock=clock),
        health=Health(
            settings=config,
            models=models,
            store=store,
            bucket=bucket,
            spool=spool,
            runpod=runpod,
            webhooks=webhooks,
            wire=wire,
            clock=clock,
            rng=rng,
            new_crew=given.new_crew,
        ),
        clock=clock,
    )


def _credential(read: Callable[[Settings], T], config: Settings, fresh: Fresh[Settings] | None) -> Credential[T]:
    if fresh is None:
        return Credential(read(config))
    return Credential(read(config), lambda: read(fresh.get()), seconds=parameters.CALL_SECONDS)


def make_d1(
    config: Settings, wire: Wire, clock: Clock, *, rng: Random | None = None, fresh: Fresh[Settings] | None = None
) -> D1:
    """The D1 database that the settings name."""
    return D1(
        wire=wire,
        clock=clock,
        rng=rng or SystemRandom(),
        base_url=config.cloudflare_api_base,
        account_id=config.cloudflare_account_id,
        database_id=config.d1_database_id,
        token=_credential(lambda given: given.cloudflare_api_token, config, fresh),
    )
