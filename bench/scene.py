"""A local cloud with jobs at RunPod, as slow to answer as the real ones are, in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from chalicelib.jobs import to_text
from tests.running import free_port
from tools.cloud import LocalCloud
from tools.cloud.runs import Run
from tools.schema import statements

ROOT = Path(__file__).parents[1]
PICTURE_BYTES = 1_000_000
MOST_WAIT = 30.0  # seconds for the cloud to begin

# What RunPod has made of the jobs: nothing yet, or a picture in its answer or behind a link.
RUNNING, BASE64, LINKS = "running", "base64", "links"

FILL = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
INSERT INTO jobs (
  id, status, step, prompt, model, version, attempt, endpoint_id, runpod_job_id, runpod_status, due_at, deadline_at,
  created_at, updated_at, submitted_at, started_at
)
SELECT
  printf('job-%05d', i), 'running', 'poll', 'a cat', 'qwen-image', 3, 1, ?2, printf('run-%05d-u1', i), 'IN_PROGRESS',
  ?3, '2099-01-01T00:00:00.000Z', ?3, ?3, ?3, ?3
FROM n
WHERE i < ?1
"""


@contextlib.contextmanager
def scene(kind: str, count: int, *, latency: float, picture_bytes: int = PICTURE_BYTES) -> Iterator[dict[str, str]]:
    """So many jobs that RunPod has, due now: the settings that lead to them. The cloud ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        settings = _fill(Path(folder), f"http://127.0.0.1:{port}", kind, count, picture_bytes)
        command = [sys.executable, "-m", "tools.cloud", str(port), folder, "--latency", str(latency)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
        try:
            _wait_for(f"http://127.0.0.1:{port}/")
            yield settings
        finally:
            process.kill()
            process.wait()


def told(script: str, order: Any, *, service: Path = ROOT, **environment: str) -> Any:
    """What a script of the bench says in a process of its own, which has the service of this checkout or another."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script)],
        input=json.dumps(order),
        env={**os.environ, **environment, "PYTHONPATH": f"{service}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def run_id(number: int) -> str:
    """RunPod's id of the job with that number."""
    return f"run-{number:05d}-u1"


def _fill(folder: Path, base_url: str, kind: str, count: int, picture_bytes: int) -> dict[str, str]:
    cloud = LocalCloud(folder, base_url=base_url)
    try:
        for statement in statements():
            cloud.d1.execute(statement)
        cloud.d1.execute(FILL, count, cloud.account.endpoint_id, to_text(datetime.now(UTC)))
        seconds = 1e6 if kind == RUNNING else 1.0
        wish = {"queue_seconds": 0, "run_seconds": seconds, "bytes": picture_bytes}
        shape = "link" if kind == LINKS else "base64"
        with cloud.runpod.all_at_once():
            for number in range(count):
                cloud.runpod.insert(
                    Run(
                        id=run_id(number),
                        endpoint_id=cloud.account.endpoint_id,
                        input={"prompt": "a cat", "simulate": {**wish, "shape": shape}},
                        created_at=time.time() - 2.0,
                        execution_timeout_ms=2e9,
                    )
                )
        return cloud.settings()
    finally:
        cloud.close()


def _wait_for(url: str) -> None:
    end = time.monotonic() + MOST_WAIT
    while time.monotonic() < end:
        with contextlib.suppress(requests.ConnectionError):
            requests.get(url, timeout=5)
            return
        time.sleep(0.05)
    raise TimeoutError(f"{url} does not answer")
