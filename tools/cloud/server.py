"""Puts the local cloud behind one port of 127.0.0.1."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tools.cloud import LocalCloud, Request


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
        for name, value in {
            "Content-Length": str(len(answer.body)),
            "Access-Control-Allow-Origin": "*",
            **answer.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer


class CloudServer(ThreadingHTTPServer):
    """Serves a cloud, which is made once the port is known."""

    daemon_threads = True
    request_queue_size = 128
    cloud: LocalCloud

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}"
