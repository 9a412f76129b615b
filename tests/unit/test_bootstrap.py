"""What is made and imported when: by each kind of entry what it needs, and everything that keeps something once."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from bench import cold_start
from chalicelib import bootstrap, saver, settings
from chalicelib.errors import SettingError
from chalicelib.runtime import Clock

ROOT = Path(__file__).parents[2]
THREADS = 8

SERVE = (
    "chalicelib", "answers", "api", "auth", "bootstrap", "catalogue", "credentials", "errors", "inputs", "jobs", "log",
    "metrics", "models", "page", "parameters", "records", "runtime", "settings",
)  # fmt: skip
SEND = (
    "breaker", "connection", "d1", "deadlines", "moves", "pace", "pipeline", "queries", "retry", "room", "rounds",
    "runpod", "saver", "steps", "store", "webhooks", "wire",
)  # fmt: skip
TELL = ("attempts", "content", "courier", "fetch", "outbox", "r2", "reasons", "views")
# Of each entry: the modules of the service that it needs, and the packages beside Chalice.
NEEDED = {
    "page": (SERVE, set()),
    "create": ((*SERVE, *SEND, "orders"), {"requests", "urllib3"}),
    "schedule": ((*SERVE, *SEND, *TELL), {"requests", "urllib3"}),
}
# No minute in which the schedule sweeps, too.
AT = """
from chalicelib import bootstrap

class At(bootstrap.Clock):
    def now(self):
        return super().now().replace(minute=1)

bootstrap.Clock = At
"""
PACKAGES = {
    "boto3", "botocore", "dotenv", "fastjsonschema", "filetype", "imagesize", "requests", "standardwebhooks", "urllib3",
}  # fmt: skip


@pytest.fixture
def clouds():
    """The address of something that answers as D1 and RunPod do."""
    with ThreadingHTTPServer(("127.0.0.1", 0), cold_start.Clouds) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("entry", NEEDED)
def test_the_first_request_imports_nothing_that_it_does_not_need(clouds, entry):
    function, event = cold_start.ENTRIES[entry]
    code = AT + cold_start.FIRST_REQUEST.replace("{}(", f"{function}(") + "\nprint(*sys.modules)"

    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"AWS_LAMBDA_FUNCTION_NAME": "f", **cold_start.settings(clouds)},
        input=json.dumps(event),
        capture_output=True,
        text=True,
        check=True,
    )

    imported = set(said.stdout.splitlines()[-1].split())
    modules, packages = NEEDED[entry]
    assert {name.removeprefix("chalicelib.") for name in imported if name.startswith("chalicelib")} == set(modules)
    assert imported & PACKAGES == packages


def test_of_many_threads_that_ask_for_a_part_at_once_one_makes_it(environment, monkeypatch):
    made = []

    class Slow(saver.Saver):
        def __init__(self, **parts):
            made.append(self)
            time.sleep(0.05)
            super().__init__(**parts)

    monkeypatch.setattr(saver, "Saver", Slow)
    service = bootstrap.build(settings.load(environment), Clock())

    assert len(made) == 0
    assert len(at_once(lambda: service.pipeline)) == len(at_once(lambda: service.courier)) == 1
    assert len(made) == 1
    assert service.pipeline.saver is made[0]


def test_of_many_threads_that_ask_for_the_service_at_once_one_builds_it(client, monkeypatch):
    build = bootstrap.build

    def slowly(*args, **options):
        time.sleep(0.05)
        return build(*args, **options)

    monkeypatch.setattr(bootstrap, "build", slowly)
    bootstrap.service.cache_clear()

    assert len(at_once(bootstrap.service)) == 1


def test_a_service_that_could_not_be_built_is_built_the_next_time(client, monkeypatch):
    bootstrap.service.cache_clear()
    monkeypatch.delenv("D1_DATABASE_ID")
    with pytest.raises(SettingError):
        bootstrap.service()

    monkeypatch.setenv("D1_DATABASE_ID", "database")

    assert bootstrap.service().settings.d1_database_id == "database"


def at_once(ask):
    """What as many threads are given that ask at the same moment, each thing once."""
    ready = threading.Barrier(THREADS)

    def wait_and_ask(_):
        ready.wait()
        return ask()

    with ThreadPoolExecutor(THREADS) as threads:
        return {id(given): given for given in threads.map(wait_and_ask, range(THREADS))}
