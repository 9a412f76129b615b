"""A whole ./run as a process, as its user has it."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import requests

ROOT = Path(__file__).parents[1]
START_SECONDS = 120


def free_ports(count):
    """Not of those that the system gives to outgoing connections: one of these could take it before its server does."""
    found = []
    with contextlib.ExitStack() as probes:
        while len(found) < count:
            probe, port = probes.enter_context(socket.socket()), 20_000 + secrets.randbelow(10_000)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port():
    return free_ports(1)[0]


class Running:
    """A ./run that says it is ready; what it and its children print is read line by line."""

    def __init__(self, folder, *options, env=None, ports=None):
        self.port, self.cloud_port = ports or (free_port(), free_port())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.run", "--port", str(self.port), "--cloud-port", str(self.cloud_port),
             "--data", str(folder), *options],
            cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._watchdog = threading.Timer(START_SECONDS, self.process.kill)
        self._watchdog.start()
        self._reader = threading.Thread(target=self._read_on)
        self.said = self.read_until("Ctrl-C stops")
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = re.search(r"API key +(\S+)", self.said)[1]

    def read_until(self, text):
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
        raise AssertionError("ended: " + "".join(lines))

    def leave_alone(self):
        """Let it run for as long as it likes; what it prints is read and forgotten, for it waits when nobody reads."""
        self._watchdog.cancel()
        self._reader.start()

    def _read_on(self):
        for _ in self.process.stdout:
            pass

    def call(self, method, path, *, headers=None, **options):
        headers = {"Authorization": f"Bearer {self.key}", **(headers or {})}
        return requests.request(method, f"{self.url}{path}", headers=headers, timeout=30, **options).json()

    def stop(self, with_signal=signal.SIGTERM):
        self.process.send_signal(with_signal)
        return self.wait()

    def wait(self):
        """Until it has ended, and the last child has let go of its output."""
        if self._reader.ident:
            self._reader.join()
        self.process.stdout.read()
        self.process.stdout.close()
        self._watchdog.cancel()
        return self.process.wait()

    def answers(self):
        reached = []
        for port in (self.port, self.cloud_port):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                reached.append(port)
        return reached
