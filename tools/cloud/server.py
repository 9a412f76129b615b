"""Puts the local cloud behind one port of 127.0.0.1, and sends its webhooks."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import requests

from tools.cloud import LocalCloud, Request

COURIERS = 16  # threads that send webhooks, so that slow receivers do not hold up the others
COURIER_PAUSE = 0.1  # seconds between two looks for webhooks that are due
WEBHOOK_TIMEOUT = 10.0  # seconds


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one piece; two would wait 40 ms for each other
    disable_nagle_algorithm = True
    server: "CloudServer"

    def handle_expect_100(self) -> bool:
        return True  # like R2, no 100 Continue

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.cloud.handle(Request(self.command, parts.path, parts.query, headers, body))
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = _answer


class CloudServer(ThreadingHTTPServer):
    """Serves a cloud, which is made once the port is known; while it serves, webhooks are sent."""

    daemon_threads = True
    request_queue_size = 128
    cloud: LocalCloud

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}"
        self._over = threading.Event()
        self._couriers = [threading.Thread(target=self._send_webhooks, daemon=True) for _ in range(COURIERS)]

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown()."""
        for courier in self._couriers:
            courier.start()
        super().serve_forever(poll_interval)

    def server_close(self) -> None:
        """Let go of the port; a webhook that is being sent is waited for."""
        self._over.set()
        for courier in self._couriers:
            if courier.ident is not None:
                courier.join()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of callers who did not wait for the answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _send_webhooks(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            pause = 0.0 if self.cloud.runpod.deliver_next(send) else COURIER_PAUSE


def send(url: str, headers: dict[str, str], body: bytes) -> int:
    """POST a webhook; the status of the answer, whose body is nobody's. Raises OSError where there is none."""
    with requests.Session() as session:
        session.trust_env = False  # no proxy from the environment: the receiver is on this machine
        with session.post(
            url, data=body, headers=headers, timeout=WEBHOOK_TIMEOUT, allow_redirects=False, stream=True
        ) as answer:
            return answer.status_code
