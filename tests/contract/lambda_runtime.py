"""A function as Lambda runs it: AWS's own runtime client in a process, and the Runtime API that gives it events."""

import base64
import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv" / "lambda" / "bin" / "python"
SECONDS = 30.0
# What Lambda's image brings beside Python; the function's own folder goes before it.
IN_THE_IMAGE = (
    "awslambdaric", "runtime_client*.so", "simplejson", "snapshot_restore_py.py", "boto3", "botocore", "s3transfer",
    "jmespath", "dateutil", "six.py", "urllib3",
)  # fmt: skip
BEGIN = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from awslambdaric.__main__ import main; main(sys.argv)"


class FunctionError(Exception):
    """Raised for an invocation, or a start, that the runtime client calls a failure; with what it told."""


class _Handler(BaseHTTPRequestHandler):
    """https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html"""

    protocol_version = "HTTP/1.1"
    server: "RuntimeApi"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        assert self.path == "/2018-06-01/runtime/invocation/next"
        invocation = self.server.events.get()
        if invocation is None:  # the test is over
            self.close_connection = True
            return
        event, headers = invocation
        self._answer(200, json.dumps(event).encode(), headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answers.put((self.path.rsplit("/", 1)[1], json.loads(body)))
        self._answer(202, b"{}", {})

    def _answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class RuntimeApi(ThreadingHTTPServer):
    """Hands events to one function, one after the other, and takes what it answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events = queue.Queue()
        self.answers = queue.Queue()

    def invoke(self, event, *, seconds=29.0):
        """The function's answer to the event, for which it has that much time."""
        headers = {
            "Lambda-Runtime-Aws-Request-Id": str(uuid.uuid4()),
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + seconds) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:us-east-1:123456789012:function:f",
            "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=0",
        }
        self.events.put((event, headers))
        kind, answer = self.answers.get(timeout=SECONDS)
        if kind != "response":
            raise FunctionError(answer)
        return answer


def image(folder):
    """A folder with what Lambda's image has, and nothing else of the environment that the packages came from."""
    (packages,) = (ROOT / ".venv" / "lambda" / "lib").glob("python3.13/site-packages")
    folder.mkdir()
    for pattern in IN_THE_IMAGE:
        (found,) = packages.glob(pattern)
        (folder / found.name).symlink_to(found)
    return folder


@contextlib.contextmanager
def running(function, *, task, runtime, environment, log):
    """A function of the template, unpacked in the folder `task`; yields the API through which it is invoked."""
    api = RuntimeApi()
    thread = threading.Thread(target=api.serve_forever, args=(0.01,))
    thread.start()
    handler = function["Handler"]
    given = {
        **function["Environment"]["Variables"],
        "SERVICE_NAME": "ob-ai-studio-dev",  # what CloudFormation makes of it
        "_HANDLER": handler,
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_port}",
        "AWS_LAMBDA_FUNCTION_NAME": "ob-ai-studio-dev-function",
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function["MemorySize"]),
        "AWS_LAMBDA_LOG_GROUP_NAME": "/aws/lambda/ob-ai-studio-dev",
        "AWS_LAMBDA_LOG_STREAM_NAME": "2026/11/22/[$LATEST]0",
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_EXECUTION_ENV": f"AWS_Lambda_{function['Runtime']}",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LAMBDA_TASK_ROOT": str(task),
        "LAMBDA_RUNTIME_DIR": str(runtime),
        "PATH": os.defpath,
        "LANG": "en_US.UTF-8",
        "TZ": ":UTC",
        **environment,
    }
    with log.open("ab") as said:
        process = subprocess.Popen(
            [PYTHON, "-I", "-S", "-c", BEGIN, f"{task}:{runtime}", handler],
            cwd=task,
            env=given,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield api
    finally:
        api.events.put(None)
        process.send_signal(signal.SIGKILL)
        process.wait()
        api.shutdown()
        thread.join()
        api.server_close()


def rest_event(method, path, resource, body=None, *, headers=None, params=None, query=None, encode=False):
    """An event of API Gateway's REST API: https://docs.aws.amazon.com/apigateway/latest/developerguide/"""
    headers = {
        "Accept": "*/*",
        "Host": "abc123.execute-api.us-east-1.amazonaws.com",
        "X-Amzn-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700",
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Port": "443",
        "X-Forwarded-Proto": "https",
        **({"Content-Type": "application/json"} if body is not None else {}),
        **(headers or {}),
    }
    text = json.dumps(body) if body is not None else None
    return {
        "resource": resource,
        "path": path,
        "httpMethod": method,
        "headers": headers,
        "multiValueHeaders": {name: [value] for name, value in headers.items()},
        "queryStringParameters": query,
        "multiValueQueryStringParameters": query and {name: [value] for name, value in query.items()},
        "pathParameters": params,
        "stageVariables": None,
        "requestContext": {
            "resourceId": "2gxmpl",
            "resourcePath": resource,
            "httpMethod": method,
            "extendedRequestId": "JJbxmplHYosFVYQ=",
            "requestTime": "22/Nov/2026:03:20:30 +0000",
            "path": f"/v1{path}",
            "accountId": "123456789012",
            "protocol": "HTTP/1.1",
            "stage": "v1",
            "domainPrefix": "abc123",
            "requestTimeEpoch": 1795317630000,
            "requestId": str(uuid.uuid4()),
            "identity": {"sourceIp": "203.0.113.7", "userAgent": "curl/8.5.0", "accountId": None, "caller": None},
            "domainName": headers["Host"],
            "apiId": "abc123",
        },
        "body": base64.b64encode(text.encode()).decode() if text is not None and encode else text,
        "isBase64Encoded": encode,
    }


def schedule_event():
    """An event of an EventBridge rule with a schedule."""
    return {
        "version": "0",
        "id": "53dc4d37-cffa-4f76-80c9-8b7d4a4d2eaa",
        "detail-type": "Scheduled Event",
        "source": "aws.events",
        "account": "123456789012",
        "time": "2026-11-22T03:21:00Z",
        "region": "us-east-1",
        "resources": ["arn:aws:events:us-east-1:123456789012:rule/ob-ai-studio-dev-PollJobsPollJobsEvent-1ABC"],
        "detail": {},
    }
