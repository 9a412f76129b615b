"""Builds the service from the settings, once a process; the only module that knows all the others."""

from dataclasses import dataclass
from functools import lru_cache
from random import SystemRandom

from chalicelib import log, settings
from chalicelib.d1 import D1
from chalicelib.fetch import Fetch, Guard
from chalicelib.pipeline import Pipeline
from chalicelib.r2 import R2
from chalicelib.results import Results
from chalicelib.runpod import Runpod
from chalicelib.runtime import Clock
from chalicelib.saver import Saver
from chalicelib.settings import Settings
from chalicelib.steps import Steps
from chalicelib.store import Store
from chalicelib.wire import Wire


@dataclass(frozen=True, kw_only=True)
class Service:
    """What routes and the schedule work with."""

    settings: Settings
    store: Store
    pipeline: Pipeline
    bucket: R2
    clock: Clock


@lru_cache(maxsize=1)
def service() -> Service:
    """The service of this process, made on first use. Raises SettingError, and tries again the next time."""
    log.set_up()
    return build(settings.load(), Clock())


def build(config: Settings, clock: Clock) -> Service:
    """A service with these settings and this clock."""
    rng = SystemRandom()
    wire = Wire(clock)
    d1 = make_d1(config, wire, clock)
    runpod = Runpod(wire=wire, base_url=config.runpod_api_base, api_key=config.runpod_api_key)
    store = Store(d1=d1, default_endpoint_id=config.runpod_endpoint_id, submit_unknown_wait=config.submit_unknown_wait)
    guard = Guard(config.result_allowed_private_hosts)
    fetch = Fetch(wire=Wire(clock, resolve=guard.resolve), clock=clock)
    bucket = R2(
        endpoint_url=config.r2_endpoint,
        bucket=config.r2_bucket,
        access_key_id=config.r2_access_key_id,
        secret_access_key=config.r2_secret_access_key,
        public_base_url=config.r2_public_base_url,
    )
    steps = Steps(
        runpod=runpod,
        results=Results(fetch=fetch, bucket=bucket),
        clock=clock,
        rng=rng,
        default_endpoint_id=config.runpod_endpoint_id,
        max_attempts=config.max_attempts,
    )
    saver = Saver(store=store, runpod=runpod, clock=clock, rng=rng)
    return Service(
        settings=config,
        store=store,
        pipeline=Pipeline(store=store, steps=steps, saver=saver, clock=clock, rng=rng),
        bucket=bucket,
        clock=clock,
    )


def make_d1(config: Settings, wire: Wire, clock: Clock) -> D1:
    """The D1 database that the settings name."""
    return D1(
        wire=wire,
        clock=clock,
        rng=SystemRandom(),
        base_url=config.cloudflare_api_base,
        account_id=config.cloudflare_account_id,
        database_id=config.d1_database_id,
        token=config.cloudflare_api_token,
    )
