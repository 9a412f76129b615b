"""
A stand-in for the earlier version, a Cloudflare Worker with a cron: its routes and cron on the table of eleven columns.

It inserts what clients ask for, sends what is queued, asks for what runs, and puts the picture. It writes by id alone,
without a look at what the row has become, and knows no other column, no other status and no key.
"""

import base64
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

from chalicelib.jobs import to_text
from tests.engines.processes import s3_client

INSERT = (
    "INSERT INTO jobs (id, runpod_job_id, status, prompt, model, result_r2_key, result_url, finished_at, error_message,"
    " created_at, updated_at) VALUES (?, NULL, 'queued', ?, ?, NULL, NULL, NULL, NULL, ?, ?)"
)


class Earlier:
    """Its cron, and what its routes do."""

    def __init__(self, given, clock):
        self._given = given
        self._clock = clock
        self._http = requests.Session()
        self._r2 = s3_client(given)
        self._stop = threading.Event()
        self._cron = None

    def d1(self, sql, *params):
        """Run one statement over D1's REST API."""
        given = self._given
        answer = self._http.post(
            f"{given['CLOUDFLARE_API_BASE']}/accounts/{given['CLOUDFLARE_ACCOUNT_ID']}/d1/database/"
            f"{given['D1_DATABASE_ID']}/query",
            headers={"Authorization": f"Bearer {given['CLOUDFLARE_API_TOKEN']}"},
            json={"sql": sql, "params": list(params)},
            timeout=10,
        ).json()
        assert answer["success"], answer
        return answer["result"][0]["results"]

    def runpod(self, method, operation, body=None):
        """Call RunPod's queue API."""
        url = f"{self._given['RUNPOD_API_BASE']}/{self._given['RUNPOD_ENDPOINT_ID']}/{operation}"
        headers = {"Authorization": f"Bearer {self._given['RUNPOD_API_KEY']}"}
        return self._http.request(method, url, headers=headers, json=body, timeout=10).json()

    def now(self):
        return to_text(self._clock.now())

    def create(self, prompt, model="qwen-image"):
        """Insert a job; its id."""
        job_id, now = str(uuid.uuid4()), self.now()
        self.d1(INSERT, job_id, prompt, model, now, now)
        return job_id

    def send(self, row):
        """Have RunPod draw the job; the id of the run."""
        body = {"input": {"prompt": row["prompt"], "model": row["model"], "jobId": row["id"]}}
        return self.runpod("POST", "run", body)["id"]

    def send_queued(self):
        """Send what is queued."""
        for row in self.d1("SELECT * FROM jobs WHERE status = 'queued' ORDER BY created_at LIMIT 20"):
            self.d1(
                "UPDATE jobs SET status = 'running', runpod_job_id = ?, updated_at = ? WHERE id = ?",
                self.send(row), self.now(), row["id"],
            )  # fmt: skip

    def poll_running(self):
        """Ask for what runs, and end what has ended."""
        for row in self.d1("SELECT * FROM jobs WHERE status = 'running' AND runpod_job_id IS NOT NULL"):
            answer = self.runpod("GET", f"status/{row['runpod_job_id']}")
            if answer["status"] == "COMPLETED":
                self._store(row, base64.b64decode(answer["output"]["images"][0]["data"]))
            elif answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
                self.d1(
                    "UPDATE jobs SET status = 'error', error_message = ?, finished_at = ?, updated_at = ? WHERE id = ?",
                    answer["status"], self.now(), self.now(), row["id"],
                )  # fmt: skip

    def _store(self, row, picture):
        year, month = row["created_at"][:4], row["created_at"][5:7]
        key = f"jobs/{year}/{month}/{row['id']}/output.png"
        self._r2.put_object(Bucket=self._given["R2_BUCKET"], Key=key, Body=picture, ContentType="image/png")
        self.d1(
            "UPDATE jobs SET status = 'done', result_r2_key = ?, result_url = ?, finished_at = ?, updated_at = ? "
            "WHERE id = ?",
            key, f"{self._given['R2_PUBLIC_BASE_URL']}/{key}", self.now(), self.now(), row["id"],
        )  # fmt: skip

    def start_cron(self):
        """Begin to send and to ask, again and again."""
        self._stop.clear()
        self._cron = threading.Thread(target=self._run_cron)
        self._cron.start()

    def _run_cron(self):
        while not self._stop.wait(0.05):
            self.send_queued()
            self.poll_running()

    def stop_cron(self):
        """End the cron; its last run is waited for."""
        self._stop.set()
        if self._cron:
            self._cron.join()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, {"ok": True, "id": self.server.earlier.create(body["prompt"]), "status": "queued"})

    def do_GET(self):
        (row,) = self.server.earlier.d1("SELECT * FROM jobs WHERE id = ?", self.path.rpartition("=")[2])
        self._answer(200, {"ok": True, **row, "error": row["error_message"]})


class Routes(ThreadingHTTPServer):
    """`POST /api/queue/create` and `GET /api/queue/status?id=` as clients of the earlier version know them."""

    daemon_threads = True

    def __init__(self, earlier):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.earlier = earlier
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self):
        """Let go of the port."""
        self.shutdown()
        self._thread.join()
        self.server_close()
