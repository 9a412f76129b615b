"""The real engines as processes of their own: D1's under miniflare, and SeaweedFS as an S3 server."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.running import free_ports

ROOT = Path(__file__).parents[2]
NAMES = {
    "miniflare": "D1's own engine under miniflare",
    "seaweedfs": "the S3 server SeaweedFS",
    "browser": "the gallery page, in Debian's chromium driven by playwright",
    "lambda": "the package for Lambda, in AWS's own runtime client under Python 3.13",
}
BUCKET = "ob-ai-results"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
# The shell ends the engine when its own standard input ends, as it does however this process ends.
SUPERVISED = '"$@" & read -r _; kill $! 2>/dev/null; wait $!'


T = TypeVar("T")


class NotStarted(Exception):
    """The engine did not become ready."""


def why_missing(engine: str) -> str | None:
    """Say why the engine cannot be run here; None where it can."""
    if (ROOT / ".venv" / f"{engine}.installed").exists():
        return None
    try:
        said = (ROOT / ".venv" / f"{engine}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it is not installed, which ./test does"
    why = next((line for line in said if "error" in line.lower()), said[-1] if said else "nothing was said")
    return f"it could not be installed: {why.strip()[:200]} (.venv/{engine}.log has the rest)"


@contextlib.contextmanager
def _running(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command in a session of its own, with no more of our environment than it needs."""
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", SUPERVISED, "sh", *command],
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), **environment},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder with a short path: that of a socket may have a hundred characters."""
    path = Path(tempfile.mkdtemp(prefix="engine-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _said(folder: Path) -> str:
    return (folder / "engine.log").read_text(errors="replace")


def _wait(ready: Callable[[], T | None], folder: Path) -> T:
    """Return what `ready` returns, once that is something."""
    end = time.monotonic() + START_SECONDS
    while not (found := ready()):
        if time.monotonic() > end:
            raise NotStarted(_said(folder)[-2_000:])
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def miniflare() -> Iterator[dict[str, str]]:
    """Run D1's engine; yields the service's settings that lead to it."""
    account, database, token = "engine-account", "engine-database", secrets.token_hex(16)
    serve, modules = ROOT / "tests" / "engines" / "serve.mjs", ROOT / ".venv" / "miniflare"
    command = ["node", str(serve), str(modules), account, database, token]
    with _folder() as folder, _running(command, folder, {}):
        url = _wait(lambda: re.search(r"^ready (\S+)\n", _said(folder), flags=re.MULTILINE), folder)
        yield {
            "CLOUDFLARE_API_BASE": f"{url[1]}/client/v4",
            "CLOUDFLARE_ACCOUNT_ID": account,
            "CLOUDFLARE_API_TOKEN": token,
            "D1_DATABASE_ID": database,
        }


@lru_cache
def s3_session() -> Any:
    """Make one for all clients: what it has loaded is what makes them slow to make."""
    return boto3.session.Session()


def s3_client(given: dict[str, str]) -> Any:
    """Make a plain S3 client, to look at what the service's own has done."""
    client = s3_session().client(
        "s3",
        endpoint_url=given["R2_ENDPOINT_URL"],
        region_name="auto",
        aws_access_key_id=given["R2_ACCESS_KEY_ID"],
        aws_secret_access_key=given["R2_SECRET_ACCESS_KEY"],
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1},
            connect_timeout=2,
            read_timeout=5,
        ),
    )
    # As the service does: the local cloud and R2 send no 100 Continue, for which botocore would wait a second.
    client.meta.events.register("before-send.s3", lambda request, **_: request.headers.pop("Expect", None) and None)
    return client


PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
    "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip


@contextlib.contextmanager
def seaweedfs() -> Iterator[dict[str, str]]:
    """Run SeaweedFS with an empty bucket; yields the service's settings that lead to it."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    key_id, secret = "engine-key", secrets.token_hex(16)
    given = {
        "R2_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "R2_BUCKET": BUCKET,
        "R2_ACCESS_KEY_ID": key_id,
        "R2_SECRET_ACCESS_KEY": secret,
        "R2_PUBLIC_BASE_URL": "",
    }
    with _folder() as folder:
        command = [
            str(ROOT / ".venv" / "bin" / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in ports.items()), "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock", f"-bucket={BUCKET}",
            "-s3.autoCreateBucket=false", "-admin.ui=false", "-webdav=false", "-master.telemetry=false",
        ]  # fmt: skip
        try:
            with _running(command, folder, {"AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": secret}):
                client = s3_client(given)
                _wait(lambda: _takes_objects(client), folder)
                yield given
        finally:
            for port in ports.values():  # what it leaves behind when it is killed
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


def _takes_objects(client: Any) -> bool:
    try:
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
        client.delete_object(Bucket=BUCKET, Key="ready")
    except (BotoCoreError, ClientError):
        return False
    return True
