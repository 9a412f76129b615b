"""`./run` as its user has it: processes on ports, a job that ends by itself, Ctrl-C, a second start."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from tests.running import Running, free_port
from tools.cloud.render import draw

ROOT = Path(__file__).parents[2]


def simulated(running):
    return requests.get(f"http://127.0.0.1:{running.cloud_port}/simulate", timeout=10).json()


def test_a_job_ends_by_itself_and_is_still_there_after_a_second_start(tmp_path):
    first = Running(tmp_path / "data")
    assert re.search(r"URL +http://127\.0\.0\.1:\d+ ", first.said)
    assert first.said.count("/api/queue/create") == 1
    prompt = "แมวสีส้มนั่งบนดวงจันทร์"
    created = first.call("POST", "/api/queue/create", json={"prompt": prompt})
    assert created == {"ok": True, "id": created["id"], "status": "queued"}

    first.read_until('"message": "done"')  # by the schedule alone
    job = first.call("GET", f"/api/queue/status/{created['id']}")
    assert requests.get(job["result_url"], timeout=10).content == draw(prompt)
    assert (first.stop(signal.SIGINT), first.answers()) == (0, [])

    second = Running(tmp_path / "data")
    assert second.key == first.key
    again = second.call("GET", f"/api/queue/status/{created['id']}")
    assert (again["status"], again["result_r2_key"]) == ("done", job["result_r2_key"])
    picture = requests.get(f"http://127.0.0.1:{second.cloud_port}/cdn/{again['result_r2_key']}", timeout=10)
    assert picture.content == draw(prompt)
    preflight = requests.options(
        f"{second.url}/api/queue/create",
        headers={"Origin": "https://page.example", "Access-Control-Request-Method": "POST"},
        timeout=10,
    )
    assert preflight.headers["Access-Control-Allow-Origin"] == "*"
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    assert (second.stop(signal.SIGTERM), second.answers()) == (0, [])


def test_a_kill_leaves_no_process_behind(tmp_path):
    running = Running(tmp_path / "data")
    assert len(running.answers()) == 2
    assert 1100 < simulated(running)["calls_left"] < 1200

    running.process.kill()
    running.wait()

    assert running.answers() == []


def test_chalice_local_works_beside_the_cloud_alone(tmp_path):
    running = Running(tmp_path / "data", "--cloud-only")
    assert running.answers() == [running.cloud_port]
    env_file = tmp_path / "data" / "local.env"
    assert str(env_file) in running.said
    port = free_port()
    chalice = Path(sys.executable).parent / "chalice"
    script = f"set -a; . '{env_file}'; set +a; exec {chalice} local --no-autoreload --port {port}"
    plain = subprocess.Popen(
        ["sh", "-c", script], cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert next(line for line in plain.stdout if "Serving on" in line)
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {running.key}"}
        body = {"prompt": "a cat", "input": {"simulate": {"queue_seconds": 0, "run_seconds": 0}}}
        job_id = requests.post(f"{url}/api/queue/create", json=body, headers=headers, timeout=30).json()["id"]
        report = requests.post(f"{url}/dev/runpod-poll", headers=headers, timeout=30).json()
    finally:
        plain.kill()
        plain.communicate()
        running.stop()

    assert [job["status"] for job in report["updated"] if job["id"] == job_id] == ["done"]


def test_without_webhooks_the_schedule_alone_ends_a_job_and_with_a_latency_a_create_takes_its_time(tmp_path):
    running = Running(tmp_path, "--no-webhooks", "--latency", "0.5", "--no-rate-limit")
    assert simulated(running) == {}
    wish = {"simulate": {"queue_seconds": 0, "run_seconds": 0}}
    begun = time.monotonic()
    running.call("POST", "/api/queue/create", json={"prompt": "a cat", "input": wish})
    assert time.monotonic() - begun > 0.5 * 0.39  # two calls to D1, and one to RunPod

    running.read_until('"message": "done"')
    running.stop()

    runs = sqlite3.connect(tmp_path / "cloud" / "runpod.sqlite")
    assert runs.execute("SELECT webhook FROM runs").fetchall() == [(None,)]
    runs.close()


def refused(*options, env=None, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "tools.run", *options],
        cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = refused("--port", str(port), "--cloud-port", str(free_port()), "--data", str(tmp_path))

    assert answer.returncode == 1
    assert answer.stderr.splitlines() == [
        f"./run: Port {port} cannot be used (Address already in use). Stop what uses it, or choose another with --port."
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "0"], "--port 0 is no port"),
        (["--data", str(ROOT / "data")], "lies inside the checkout"),
        (["--data", "/proc/nothing"], "The data folder cannot be used"),
        (["--real", "r2"], "--real r2 without d1 needs R2_ENDPOINT_URL"),
        (["--real", "runpod"], "Settings RUNPOD_API_KEY (RunPod API key) and RUNPOD_ENDPOINT_ID"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(tmp_path, options, sentence):
    ports = ["--cloud-port", str(free_port()), "--port", str(free_port())]

    answer = refused("--data", str(tmp_path), *ports, *options)

    assert (answer.returncode, len(answer.stderr.splitlines())) == (1, 1)
    assert sentence in answer.stderr


def test_a_real_database_that_is_behind_is_told_and_left_alone(tmp_path, cloud_server):
    real = {name: value for name, value in cloud_server.cloud.settings().items() if name.startswith(("CLOUD", "D1_"))}
    ports = ["--cloud-port", str(free_port()), "--port", str(free_port())]

    answer = refused("--real", "d1", "--data", str(tmp_path / "data"), *ports, env=real)

    assert (answer.returncode, "tools.schema --check" in answer.stderr) == (1, True)
    assert cloud_server.cloud.d1.execute("SELECT name FROM sqlite_master") == []


def test_one_port_for_both_is_told(tmp_path):
    port = str(free_port())

    answer = refused("--port", port, "--cloud-port", port, "--data", str(tmp_path))

    assert (
        answer.stderr == f"./run: --port and --cloud-port are both {port}; the API and the local cloud need one each.\n"
    )


def test_a_folder_in_use_is_told(tmp_path):
    running = Running(tmp_path, "--cloud-only")

    answer = refused("--port", str(free_port()), "--cloud-port", str(free_port()), "--data", str(tmp_path))
    running.stop()

    assert answer.stderr == f"./run: {tmp_path} is used by another ./run; stop that one or choose another --data.\n"


def test_a_damaged_data_folder_is_told(tmp_path):
    (tmp_path / "cloud").mkdir()
    (tmp_path / "cloud" / "d1.sqlite").write_bytes(b"garbage" * 1000)

    answer = refused("--port", str(free_port()), "--cloud-port", str(free_port()), "--data", str(tmp_path))

    assert answer.stderr.splitlines() == [
        f"The local cloud cannot use {tmp_path}/cloud: file is not a database",
        "./run: The local cloud has ended by itself (exit status 1); what it said stands above.",
    ]


def test_an_empty_key_is_made_anew(tmp_path):
    (tmp_path / "api-key").write_text("")

    running = Running(tmp_path, "--cloud-only")
    running.stop()

    assert running.key.startswith("ob_")


def test_fifty_clients_at_once_are_all_answered(tmp_path):
    running = Running(tmp_path)
    answers = []

    def create(n):
        answers.append(running.call("POST", "/api/queue/create", json={"prompt": f"cat {n}"})["ok"])

    threads = [threading.Thread(target=create, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.stop()

    assert answers == [True] * 50


def test_an_unknown_cloud_is_told(tmp_path):
    answer = refused("--real", "azure")

    assert answer.returncode == 2
    assert "'azure' is none of runpod, d1, r2" in answer.stderr


def test_a_broken_env_file_is_one_sentence(tmp_path):
    (tmp_path / "copy").mkdir()
    for name in ("app.py", "chalicelib", "tools", ".chalice", "schema.sql"):
        (tmp_path / "copy" / name).symlink_to(ROOT / name)
    # Resolved through the links the file would be looked for in the checkout, so the package is copied.
    import shutil

    (tmp_path / "copy" / "chalicelib").unlink()
    shutil.copytree(ROOT / "chalicelib", tmp_path / "copy" / "chalicelib")
    (tmp_path / "copy" / ".env.local").write_text("this is broken\n")

    answer = refused("--data", str(tmp_path / "data"), cwd=tmp_path / "copy")

    assert (answer.returncode, answer.stderr) == (
        1,
        "./run: .env.local, line 1, is no NAME=value line. Mend or remove it.\n",
    )


def test_help_tells_what_it_does_without_installing_anything(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("run", "tools/venv.sh", "tools/run.py", "tools/__init__.py", "tools/processes.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    answer = subprocess.run(
        ["sh", str(tmp_path / "run"), "--help"], capture_output=True, text=True, timeout=60, check=True
    )

    assert "Starts everything on this machine" in answer.stdout
    assert not (tmp_path / ".venv").exists()


def test_without_a_network_the_reason_is_one_sentence(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("run", "tools/venv.sh", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}

    answer = subprocess.run(
        ["sh", str(tmp_path / "run")], capture_output=True, text=True, timeout=120, check=False, env=env
    )

    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1] == (
        "run: The Python packages could not be installed; is there a network? "
        "All that pip said is in .venv/install.log."
    )


def test_the_state_of_a_job_survives_a_kill_in_the_middle(tmp_path):
    first = Running(tmp_path / "data")
    body = {"prompt": "a cat", "input": {"simulate": {"queue_seconds": 0, "run_seconds": 0}}}
    job_id = first.call("POST", "/api/queue/create", json=body)["id"]
    first.process.kill()
    first.wait()

    second = Running(tmp_path / "data")
    report = json.dumps(second.call("POST", "/dev/runpod-poll"))
    job = second.call("GET", f"/api/jobs/{job_id}")["job"]
    second.stop()

    assert job["status"] == "done", report
    assert [line["event"] for line in job["timeline"]].count("submitted") == 1
