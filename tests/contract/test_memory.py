"""
A result of 200 MB takes a bounded amount of memory; measured in a process of its own, over real sockets.

The figures are printed: pytest -s tests/contract/test_memory.py. They are Linux's, as Lambda's are.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chalicelib.content import MAX_BYTES
from tests.shapes import PNG

ROOT = Path(__file__).parents[2]
BLOCK = os.urandom(1_000_000)
ALLOWED_MB = 40  # one part of 8 MiB, as it is read, hashed and sent, and what is around it

STORE = """
import base64, json, sys
from datetime import timedelta
from pathlib import Path
from chalicelib import bootstrap, settings
from chalicelib.jobs import Job
from chalicelib.inline import Inline
from chalicelib.outputs import Findings, Link
from chalicelib.runtime import Clock, Deadline

def peak():  # MB since the last reset; not ru_maxrss, in which a larger parent is left over
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1_000

def grown(action):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use now
    before = peak()
    return action(), peak() - before

service = bootstrap.build(settings.load(), Clock())
results = service.results

def store(name, *sources):
    job = Job(id=name, created_at="2026-01-31T00:00:00.000Z", attempt=1)
    for _ in range(3):  # as the rounds do, where a busy machine's bucket is silent for too long
        kept = results.keep(job, Findings(sources), Deadline(Clock(), 120.0), age=timedelta(0))
        if kept.error is None:
            break
    return kept.files

given = json.loads(sys.argv[1])
store("warm", Link(given["small"]))
sources = [Link(link) for link in given["large"]]
if given["inline"]:
    sources = [Inline(base64.b64encode(Path(given["inline"]).read_bytes()).decode())]
files, memory = grown(lambda: store("large", *sources))
print(json.dumps({"memory": memory, "files": files}))
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves /{bytes}/{n}: a PNG's beginning and then noise, as many bytes as that, different for each n."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        length, number = map(int, self.path.strip("/").split("/"))
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        head = PNG + str(number).encode()
        self.wfile.write(head)
        for at in range(len(head), length, len(BLOCK)):
            self.wfile.write(BLOCK[: length - at])

    def log_message(self, *_):
        pass


@pytest.fixture
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(host, cloud_server):
    """Stores files in a process of its own: what it recorded, and by how many MB its memory grew."""

    def run(*large, inline=""):
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **cloud_server.cloud.settings(),
            "RESULT_ALLOWED_PRIVATE_HOSTS": host,
            "PYTHONPATH": str(ROOT),
        }
        links = [f"http://{host}/{length}/{number}" for number, length in enumerate(large)]
        given = json.dumps({"small": f"http://{host}/1000/9", "large": links, "inline": inline})
        done = subprocess.run(
            [sys.executable, "-c", STORE, given], env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        return answer["files"], answer["memory"]

    return run


def test_a_file_of_200_mb_takes_a_bounded_amount_of_memory(store, cloud_server):
    ((file,), grown) = store(MAX_BYTES)

    print(f"one file of 200 MB: {grown:.1f} MB of memory")
    assert file["bytes"] == MAX_BYTES
    assert cloud_server.cloud.r2.read(file["key"], head=True).headers["Content-Length"] == str(MAX_BYTES)
    assert grown < ALLOWED_MB


def test_ten_files_of_20_mb_take_no_more(store):
    files, grown = store(*[20_000_000] * 10)

    print(f"ten files of 20 MB: {grown:.1f} MB of memory")
    assert [file["bytes"] for file in files] == [20_000_000] * 10
    assert grown < ALLOWED_MB


def test_base64_takes_little_more_than_its_text(store, tmp_path):
    (tmp_path / "inline.png").write_bytes(PNG + BLOCK * 16)

    (file,), grown = store(inline=str(tmp_path / "inline.png"))

    print(f"16 MB as base64: {grown:.1f} MB of memory beside the text")
    assert file["bytes"] == len(PNG) + 16_000_000
    assert grown < 12
