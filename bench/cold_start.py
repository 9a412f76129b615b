"""
How long a function takes to begin: `.venv/lambda/bin/python -m bench.cold_start [ZIP] [--runs N]`.

The zip is unpacked into folders that nothing is written to, as Lambda's is; fresh processes of this Python begin from
each in turn. First by kind of entry: the import and the first request, beside an empty Chalice app that makes as many
bare calls with the zip's own `requests`. The clouds are a server of this process which answers at once, to both alike.
Then the import with the zip's compiled modules and without. All figures are medians of the processor's time, which
other work on the machine hardly lengthens.
"""

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.contract.lambda_runtime import rest_event, schedule_event
from tools import bundle

ROOT = Path(__file__).parent.parent
KEY = "a-key-of-the-bench"
SWEEP_EVERY = 10  # minutes, as chalicelib.pipeline has it

# Each entry by its function and its event. EMPTY answers them too, with as many calls as the service makes.
ENTRIES = {
    "create": (
        "app.app",
        rest_event(
            *("POST", "/api/queue/create", "/api/queue/create", {"prompt": "a cat in the rain"}),
            headers={"Authorization": f"Bearer {KEY}"},
        ),
    ),
    "page": ("app.app", rest_event("GET", "/", "/")),
    "schedule": ("app.poll_jobs", schedule_event()),
}
EMPTY = """
import os

import requests
from chalice.app import Chalice, Rate

app = Chalice(app_name="empty", configure_logs=False)
D1, RUNPOD = os.environ["CLOUDFLARE_API_BASE"] + "/query", os.environ["RUNPOD_API_BASE"] + "/run"


def call(*urls):
    with requests.Session() as session:
        for url in urls:
            session.post(url, json={"batch": []}, timeout=5).json()
    return {}


@app.route("/", methods=["GET"])
def page():
    return {}


@app.route("/api/queue/create", methods=["POST"])
def create():
    return call(D1, RUNPOD, D1)


@app.schedule(Rate(1, unit=Rate.MINUTES))
def poll_jobs(event):
    return call(D1, D1)
"""
# Time for one round alone, as a Lambda's context tells it.
FIRST_REQUEST = """
import json, sys, time

class Context:
    aws_request_id, function_name, function_version = "a-request", "f", "1"

    def get_remaining_time_in_millis(self):
        return 20_000

sys.path[:0], event = sys.argv[1:], json.load(sys.stdin)
begun = time.process_time()
import app
imported = time.process_time()
answer = {}(event, Context())
answered = time.process_time()
assert answer.get("statusCode", 200) == 200, answer
print(imported - begun, answered - begun)
"""
KEYS = "from chalicelib.credentials import Credential; keys = Credential(('k', 's'))"
R2 = f"from chalicelib.r2 import R2; {KEYS}; R2(endpoint_url='http://127.0.0.1:9', bucket='b', keys=keys,"
CASES = {
    "import of app": "import app",
    "import of app, and R2's client": f"import app; {R2} public_base_url='')._connect()",
    "import of app, and SSM's client": "import app; from chalicelib import parameters; parameters._connect()",
}
IMPORT = "import sys, time; sys.path[:0] = sys.argv[1:]; t = time.process_time(); {}; print(time.process_time() - t)"


class Clouds(BaseHTTPRequestHandler):
    """D1 and RunPod as far as they are asked: what was sent is taken, and nothing else is due."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer a batch of D1 or a /run of RunPod."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps(_of_d1(body) if self.path.endswith("/query") else {"id": "run", "status": "IN_QUEUE"})
        self.send_response_only(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def _of_d1(body: bytes) -> dict[str, Any]:
    """The last statement of a batch asks for the rows that were written: the job's that the batch names, if any."""
    ids = re.findall(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", body)
    rows = [{"id": ids[0].decode(), "version": 3}] if ids else []
    empty: list[dict[str, Any]] = [{"results": []} for _ in json.loads(body)["batch"]]
    return {"success": True, "result": [*empty[:-1], {"results": rows}]}


def unpack(path: Path, folder: Path, *, compiled: bool) -> Path:
    """The zip's files in a folder of their own."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if compiled or not name.endswith(".pyc")])
    return folder


def unpack_empty(path: Path, folder: Path) -> Path:
    """The empty app with the packages of the zip, compiled as they are."""
    unpack(path, folder, compiled=True)
    shutil.rmtree(folder / "chalicelib")
    (folder / "app.py").write_text(EMPTY, encoding="utf-8")
    subprocess.run([sys.executable, *bundle.COMPILE, "-f", folder / "app.py"], check=True)
    return folder


def settings(clouds: str) -> dict[str, str]:
    """Every setting that a deployed service has, with the clouds at that address."""
    return {
        "RUNPOD_API_KEY": "a-key",
        "RUNPOD_ENDPOINT_ID": "endpoint",
        "RUNPOD_API_BASE": f"{clouds}/v2",
        "CLOUDFLARE_ACCOUNT_ID": "account",
        "CLOUDFLARE_API_TOKEN": "a-token",
        "CLOUDFLARE_API_BASE": f"{clouds}/client/v4",
        "D1_DATABASE_ID": "database",
        "R2_ACCESS_KEY_ID": "a-key-id",
        "R2_SECRET_ACCESS_KEY": "a-secret",
        "R2_PUBLIC_BASE_URL": "https://pictures.example.com",
        "API_KEY_HASHES": f"bench:{hashlib.sha256(KEY.encode()).hexdigest()}:write",
        "PUBLIC_BASE_URL": "https://api.example.com/v1",
        "WEBHOOK_SECRET": "a secret of the bench",
        "CALLBACK_SECRETS": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    }


def milliseconds(code: str, paths: Iterable[Path], given: dict[str, str], event: Any = None) -> list[float]:
    """What one fresh process says of the code; -B, because Lambda's folder cannot be written to."""
    command = [sys.executable, "-I", "-S", "-B", "-c", code, *map(str, paths)]
    env = {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_LAMBDA_FUNCTION_NAME": "f", **given}
    done = subprocess.run(command, env=env, input=json.dumps(event), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return [float(seconds) * 1000 for seconds in done.stdout.split()]


def measure_entries(ours: list[Path], empty: list[Path], given: dict[str, str], runs: int) -> None:
    """Print the table of the entries: import, and import with the first request, of either app, and their ratios."""
    print("| entry | import, ms | empty app | ratio | with first request, ms | empty app | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (function, event) in ENTRIES.items():
        code = FIRST_REQUEST.replace("{}(", f"{function}(")
        taken = []
        for _ in range(runs):
            while time.gmtime().tm_min % SWEEP_EVERY == 0:  # which is more than a round
                time.sleep(1)
            taken.append([*milliseconds(code, ours, given, event), *milliseconds(code, empty, given, event)])
        begun, whole, empty_begun, empty_whole = (statistics.median(column) for column in zip(*taken, strict=True))
        # Of either two that ran one after the other, when the machine was as busy.
        ratio, whole_ratio = (statistics.median(pair[n] / pair[n + 2] for pair in taken) for n in (0, 1))
        print(
            f"| {name} | {begun:.0f} | {empty_begun:.0f} | {ratio:.2f} "
            f"| {whole:.0f} | {empty_whole:.0f} | {whole_ratio:.2f} |",
            flush=True,
        )


def measure_imports(compiled: list[Path], not_compiled: list[Path], runs: int) -> None:
    """Print the table of the imports, with compiled modules and without."""
    print("\n| what | compiled, ms | not compiled, ms | ratio |\n|---|---|---|---|")
    for name, code in CASES.items():
        taken = [
            [milliseconds(IMPORT.format(code), paths, {})[0] for paths in (compiled, not_compiled)] for _ in range(runs)
        ]
        with_it, without = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"| {name} | {with_it:.0f} | {without:.0f} | {without / with_it:.2f} |", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cold_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zip", nargs="?", type=Path, default=ROOT / "dist" / "dev" / "deployment.zip")
    parser.add_argument("--runs", type=int, default=15, help="processes of each kind (default: %(default)s)")
    options = parser.parse_args()
    (packages,) = Path(sys.prefix, "lib").glob("python3.*/site-packages")  # for boto3, which Lambda's image brings
    server = ThreadingHTTPServer(("127.0.0.1", 0), Clouds)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        compiled, not_compiled = (
            [unpack(options.zip, Path(folder, str(kind)), compiled=kind), packages] for kind in (True, False)
        )
        empty = [unpack_empty(options.zip, Path(folder, "empty")), packages]
        print(f"The zip has {options.zip.stat().st_size / 1e6:.1f} MB.\n", flush=True)
        measure_entries(compiled, empty, settings(f"http://127.0.0.1:{server.server_port}"), options.runs)
        measure_imports(compiled, not_compiled, options.runs)


if __name__ == "__main__":
    main()
