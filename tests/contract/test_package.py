"""What ./deploy makes: packaged for real, run by Lambda's own runtime client, and its template read by others."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import pytest
import requests
from standardwebhooks import Webhook

import app
from chalicelib import settings
from tests.conftest import NOT_RUN
from tests.contract import lambda_runtime
from tests.contract.lambda_runtime import PYTHON, rest_event, schedule_event
from tests.engines import processes
from tests.engines.engine import D1Engine
from tools import schema, template
from tools.cloud import Account, LocalCloud
from tools.cloud.render import draw
from tools.cloud.server import CloudServer

ROOT = Path(__file__).parents[2]
SECRETS = {name: f"ssm:/ob-ai-studio/test/{name}" for name in sorted(settings.SECRETS)}
PLAIN = {
    "RUNPOD_ENDPOINT_ID": "endpoint",
    "CLOUDFLARE_ACCOUNT_ID": "account",
    "D1_DATABASE_ID": "database",
    "R2_ACCESS_KEY_ID": "key-id",
}
MINIMAL = {name: value for name, value in {**PLAIN, **SECRETS}.items() if name != "WEBHOOK_SECRET"}
DOMAIN = {
    "DEPLOY_DOMAIN": "api.example.com",
    "DEPLOY_CERTIFICATE_ARN": "arn:aws:acm:eu-west-1:123456789012:certificate/11111111-2222-3333-4444-555555555555",
}
SPOOL = {"SPOOL_BUCKET": "my-spool"}
RESERVED = {"DEPLOY_RESERVED_CONCURRENCY": "10", "DEPLOY_POLLERS": "2"}
EMAIL = {"DEPLOY_ALARM_EMAIL": "ops@example.com"}
BUDGET = {"DEPLOY_DAILY_USD": "12.50"}
MADE_HERE = {"MALLOC_ARENA_MAX": "2", "SERVICE_NAME": {"Ref": "AWS::StackName"}}
VARIANTS = {
    "bare": {},
    "domain": DOMAIN,
    "spool": SPOOL,
    "reserved": RESERVED,
    "email": EMAIL,
    "budget": BUDGET,
    "prod": {**DOMAIN, **SPOOL, **RESERVED, **EMAIL, **BUDGET, "WEBHOOK_SECRET": SECRETS["WEBHOOK_SECRET"]},
}
API_KEY = secrets.token_hex(16)


def deploy(*words, values, dist, check=True, **environment):
    """Run the command with these values, as ./deploy does once it has installed what it needs."""
    dist.mkdir(parents=True, exist_ok=True)
    file = dist / "values.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return subprocess.run(
        [PYTHON, "-m", "tools.deploy", *words, "--values", file, "--dist", dist],
        cwd=ROOT,
        env={"PATH": os.defpath, "HOME": str(dist), **environment},
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.fixture(scope="session")
def packaged(tmp_path_factory):
    """A folder with dev and prod, packaged once for all processes of the run."""
    if why := processes.why_missing("lambda"):
        pytest.skip(f"{NOT_RUN} {processes.NAMES['lambda']}: {why}")
    shared = tmp_path_factory.getbasetemp()
    dist = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "dist"
    dist.mkdir(exist_ok=True)
    with (dist / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (dist / "said").exists():
            dev = deploy("package", "--stage", "dev", values={**MINIMAL, **SECRETS}, dist=dist)
            deploy("package", "--stage", "prod", values={**MINIMAL, **VARIANTS["prod"]}, dist=dist)
            (dist / "said").write_text(dev.stdout)
    return dist


@pytest.fixture(scope="module")
def functions(packaged):
    """The functions of the template, by the name they have there."""
    resources = json.loads((packaged / "dev" / "template.json").read_text())["Resources"]
    return {
        name: resource["Properties"]
        for name, resource in resources.items()
        if resource["Type"] == "AWS::Serverless::Function"
    }


# The zip


def test_the_same_files_are_the_same_bytes_whatever_the_stage(packaged):
    dev, prod = ((packaged / stage / "deployment.zip").read_bytes() for stage in ("dev", "prod"))

    assert dev == prod


def test_the_zip_holds_the_service_and_its_requirements_and_nothing_else(packaged):
    with zipfile.ZipFile(packaged / "dev" / "deployment.zip") as archive:
        names = archive.namelist()

    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {
        "app.py", "__pycache__", "chalice", "chalicelib", "certifi", "charset_normalizer", "fastjsonschema", "filetype",
        "idna", "imagesize", "requests", "standardwebhooks", "urllib3",
    }  # fmt: skip
    shipped = {name for name in names if name.startswith("chalicelib/") and "__pycache__" not in name}
    tracked = subprocess.run(["git", "ls-files", "chalicelib"], cwd=ROOT, capture_output=True, text=True).stdout
    assert shipped >= set(tracked.split())
    assert {name.split("/")[1] for name in names if ".dist-info/" in name} == {"METADATA"}
    assert not [name for name in names if re.search(r"(^|/)(tests?|tools|bin|RECORD|\.env.*|vendor)(/|$)", name)]


def test_every_module_is_compiled_by_the_runtimes_python_and_for_no_other_machine(packaged):
    with zipfile.ZipFile(packaged / "dev" / "deployment.zip") as archive:
        names = set(archive.namelist())
        compiled = {name: archive.read(name) for name in names if name.endswith(".pyc")}

    for name in names:
        if name.endswith(".py"):
            folder, _, module = name.rpartition("/")
            assert f"{folder}/__pycache__/{module[:-3]}.cpython-313.pyc".lstrip("/") in compiled
    assert {content[4:8] for content in compiled.values()} == {b"\x01\0\0\0"}  # by hash, which nobody checks
    assert all(str(ROOT).encode() not in content for content in compiled.values())
    assert {name.split(".")[1] for name in names if name.endswith(".so")} == {"cpython-313-aarch64-linux-gnu"}


def test_what_was_made_is_said_by_weight(packaged):
    rows = re.findall(r"^ +([\d,.]+) kB +[\d,.]+ kB unpacked  (.+)$", (packaged / "said").read_text(), re.MULTILINE)

    assert {"chalicelib", "requests", "urllib3", "chalice"} <= {name for _, name in rows}
    assert [float(size.replace(",", "")) for size, _ in rows] == sorted(
        (float(size.replace(",", "")) for size, _ in rows), reverse=True
    )


# The functions


@contextlib.contextmanager
def serving(folder):
    """The local cloud with secrets of its own, and the schema."""
    account = Account(
        api_token=secrets.token_hex(20), secret_access_key=secrets.token_hex(20), runpod_api_key=secrets.token_hex(20)
    )
    server = CloudServer(0)
    server.cloud = LocalCloud(folder, base_url=server.base_url, account=account)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        schema.apply(D1Engine(server.cloud.settings(), server.cloud).connect())
        yield server.cloud
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.cloud.close()


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """Where AWS is, as moto has it: what the CLI and boto3 need to know of it."""
    process = subprocess.Popen(
        [ROOT / ".venv" / "bin" / "python", "-W", "ignore", "-m", "tests.contract.aws_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    config = tmp_path_factory.mktemp("aws") / "config"
    config.write_text("[default]\ns3 =\n    addressing_style = path\n")
    yield {
        # moto finds a template in its own S3 only under this name.
        "AWS_ENDPOINT_URL": f"http://localhost:{int(process.stdout.readline())}",
        "AWS_CONFIG_FILE": str(config),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


class Receiver(BaseHTTPRequestHandler):
    """What listens at a callback_url."""

    def do_POST(self):
        self.server.heard.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def listening():
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    server.heard = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Deployed:
    """The functions, unpacked and running, and the clouds that they work with."""

    def __init__(self, cloud, apis, logs, task, in_ssm, receiver):
        self.cloud = cloud
        self.receiver = receiver
        self.apis = apis
        self.logs = logs
        self.task = task
        self.secrets = {**in_ssm, "API_KEY": API_KEY}
        self.answers = []

    def call(self, method, path, body=None, *, resource=None, key=API_KEY, **more):
        """One request by way of API Gateway; the status, the body and the headers."""
        status, text, headers = self.fetch(method, path, body, resource=resource, key=key, **more)
        return status, json.loads(text or "null"), headers

    def fetch(self, method, path, body=None, *, resource=None, key=None, **more):
        """The same with the body as it was sent."""
        headers = {"Authorization": f"Bearer {key}", **more.pop("headers", {})} if key else more.pop("headers", {})
        event = rest_event(method, path, resource or path, body, headers=headers, **more)
        answer = self.apis["APIHandler"].invoke(event)
        self.answers.append(answer)
        assert not answer.get("isBase64Encoded")
        return answer["statusCode"], answer["body"], answer["headers"]

    def tick(self, seconds=20.0):
        """One run of the schedule, with time for its first round alone."""
        answer = self.apis["PollJobs"].invoke(schedule_event(), seconds=seconds)
        self.answers.append(answer)
        return answer

    def create(self, prompt="a cat", **body):
        simulate = {"simulate": {"queue_seconds": 0, "run_seconds": 0}}
        status, answer, _ = self.call("POST", "/api/queue/create", {"input": {"prompt": prompt, **simulate}, **body})
        assert (status, answer["status"]) == (200, "queued")
        return answer["id"]

    def until_done(self, job_id):
        for _ in range(5):
            # Behind the API, which keeps what it has read for a moment.
            if self.cloud.d1.execute("SELECT status FROM jobs WHERE id = ?1", job_id) == [{"status": "done"}]:
                break
            self.tick()
        status, job, _ = self.call("GET", "/api/queue/status", query={"id": job_id})
        assert (status, job["status"]) == (200, "done")
        return job

    def rows(self):
        tables = ("jobs", "job_events")
        return [row for table in tables for row in self.cloud.d1.execute(f"SELECT * FROM {table}")]


def tree(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def deployed(packaged, functions, aws, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lambda")
    task, logs = folder / "task", folder / "log"
    with zipfile.ZipFile(packaged / "dev" / "deployment.zip") as archive:
        archive.extractall(task)
    before = tree(task)
    for path in (task, *task.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    runtime = lambda_runtime.image(folder / "runtime")
    (folder / "tmp").mkdir()
    with serving(folder / "cloud") as cloud, contextlib.ExitStack() as running:
        receiver = running.enter_context(listening())
        secret = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
        there = {**cloud.settings(), "WEBHOOK_SECRET": secrets.token_hex(20), "CALLBACK_SECRETS": secret}
        there["RESULT_ALLOWED_PRIVATE_HOSTS"] += f",127.0.0.1:{receiver.server_port}"
        in_ssm = {name: there[name] for name in SECRETS}
        put_secrets(aws, in_ssm)
        # What the template has, but for where the clouds are and who may call.
        environment = {
            **{name: value for name, value in there.items() if name not in in_ssm},
            "API_KEY_HASHES": hashlib.sha256(API_KEY.encode()).hexdigest(),
            "PUBLIC_BASE_URL": "http://127.0.0.1:9",
            "TMPDIR": str(folder / "tmp"),
            "AWS_ENDPOINT_URL_SSM": aws["AWS_ENDPOINT_URL"],
            "AWS_ACCESS_KEY_ID": "role",
            "AWS_SECRET_ACCESS_KEY": "role",
            "AWS_SESSION_TOKEN": "role",
        }
        apis = {
            name: running.enter_context(
                lambda_runtime.running(function, task=task, runtime=runtime, environment=environment, log=logs)
            )
            for name, function in functions.items()
        }
        yield Deployed(cloud, apis, logs, task, in_ssm, receiver)
    assert tree(task) == before, "something was written into the function's folder"
    assert not list((folder / "tmp").iterdir())
    for path in (task, *task.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    shutil.rmtree(folder)


def ssm(aws):
    return boto3.session.Session().client(
        "ssm",
        endpoint_url=aws["AWS_ENDPOINT_URL"],
        region_name=aws["AWS_REGION"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def put_secrets(aws, values):
    client = ssm(aws)
    for name, value in values.items():
        client.put_parameter(Name=SECRETS[name].removeprefix("ssm:"), Value=value, Type="SecureString")


def test_the_functions_find_nothing_but_the_zip_and_what_lambda_brings(deployed):
    look = (
        "import importlib.util as u, sys; sys.path.append(sys.argv[1]); "
        "print(*(name for name in sys.argv[2:] if u.find_spec(name)))"
    )
    runtime = deployed.task.parent / "runtime"
    names = ["boto3", "awslambdaric", "requests", "certifi", "filetype", "chalice", "dotenv", "app", "yaml", "pip"]

    found = subprocess.run([PYTHON, "-I", "-S", "-c", look, runtime, *names], capture_output=True, text=True).stdout

    assert found.split() == ["boto3", "awslambdaric"]


def test_a_picture_goes_all_the_way_through_the_zip(deployed):
    job_id = deployed.create("แมวสีส้ม")

    assert deployed.tick()["rounds"] == 1
    job = deployed.until_done(job_id)

    picture = requests.get(job["result_url"], timeout=5).content
    (file,) = job["outputs"]
    assert picture.startswith(b"\x89PNG")
    assert (len(picture), hashlib.sha256(picture).hexdigest()) == (file["bytes"], file["sha256"])


def test_an_uploaded_picture_is_edited_by_a_workflow_and_its_end_is_told(deployed, monkeypatch):
    garden = draw("a garden")
    offer = {"content_type": "image/png", "bytes": len(garden)}
    _, offered, _ = deployed.call("POST", "/api/uploads", offer)
    put = requests.put(offered["url"], data=garden, headers=offered["headers"], timeout=5)
    hook = f"http://127.0.0.1:{deployed.receiver.server_port}/hook"
    order = {"model": "qwen-image-edit", "prompt": "snow", "image_key": offered["key"], "callback_url": hook}

    refused = deployed.call("POST", "/api/queue/create", {**order, "slots": {"steps": 99}})
    status, made, _ = deployed.call("POST", "/api/queue/create", order)
    monkeypatch.setattr(deployed.cloud.runpod, "_clock", lambda: time.time() + 10)
    job = deployed.until_done(made["id"])

    assert (put.status_code, status, refused[1]["code"]) == (200, 200, "slots_invalid")
    assert requests.get(job["result_url"], timeout=5).content not in (garden, draw("snow"))
    ((headers, body),) = deployed.receiver.heard
    event = Webhook(deployed.secrets["CALLBACK_SECRETS"]).verify(body, headers)
    assert (event["type"], event["data"]["result_url"]) == ("job.done", job["result_url"])


def test_the_same_event_of_the_schedule_twice_does_no_harm(deployed):
    job_id = deployed.create()

    answers = [deployed.tick() for _ in range(3)]

    job = deployed.until_done(job_id)
    events = [
        row["event"] for row in deployed.cloud.d1.execute("SELECT event FROM job_events WHERE job_id = ?1", job_id)
    ]
    assert (job["attempt"], events.count("submitted"), events.count("done")) == (1, 1, 1)
    assert answers[-1] == {"rounds": 1, "checked": 0, "submitted": 0, "updated": 0}


def test_every_route_is_reached_by_the_event_that_its_resource_makes(deployed, packaged):
    paths = json.loads((packaged / "dev" / "template.json").read_text())["Resources"]["RestAPI"]["Properties"]
    resources = {
        (method.upper(), resource)
        for resource, methods in paths["DefinitionBody"]["paths"].items()
        for method in methods
        if method != "options"
    }
    assert resources == {(method, path) for path, methods in app.app.routes.items() for method in methods}

    for method, resource in sorted(resources - {("GET", "/"), ("GET", "/ui/{name}")}):  # these answer no JSON
        params = {name: "11111111-2222-3333-4444-555555555555" for name in re.findall(r"{(\w+)}", resource)}
        path = resource.format(**params)
        body = {} if method == "POST" else None
        status, answer, headers = deployed.call(
            method, path, body, resource=resource, params=params or None, key="wrong"
        )

        open_to_all = resource in ("/health", "/openapi.json")
        assert status == (200 if open_to_all else 403 if resource.startswith("/webhooks") else 401), resource
        assert (answer.get("ok") is False) is not open_to_all
        assert headers["Access-Control-Allow-Origin"] == "*"
        assert f'"request_id": "{headers["X-Request-Id"]}"'.encode() in deployed.logs.read_bytes()


def test_the_page_is_in_the_package_and_finds_its_files_under_the_stage(deployed):
    status, text, headers = deployed.fetch("GET", "/")

    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    names = re.findall(r'(?:href|src)="ui/(.+?)"', text)
    assert "app.js" in names
    for name in [*names, "th.js"]:
        found = deployed.fetch("GET", f"/ui/{name}", resource="/ui/{name}", params={"name": name})
        assert (found[0], found[1]) == (200, (ROOT / "chalicelib" / "ui" / name).read_text(encoding="utf-8"))


def test_a_body_in_base64_is_read(deployed):
    status, answer, _ = deployed.call("POST", "/api/queue/create", {"prompt": "ภาพ"}, encode=True)

    assert (status, answer["status"]) == (200, "queued")
    assert deployed.cloud.d1.execute("SELECT prompt FROM jobs WHERE id = ?1", answer["id"]) == [{"prompt": "ภาพ"}]


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/health"), ("OPTIONS", "/health"), ("GET", "/nowhere")])
def test_what_the_gateway_should_not_let_through_is_an_error_in_our_shape(deployed, method, path):
    status, answer, headers = deployed.call(method, path)

    assert (status, answer["code"]) == (405, "method_not_allowed")
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert answer["ok"] is False


def test_a_preflight_is_answered_by_the_gateway_for_every_path(packaged):
    body = json.loads((packaged / "dev" / "template.json").read_text())["Resources"]["RestAPI"]["Properties"]
    for path, methods in body["DefinitionBody"]["paths"].items():
        said = methods["options"]["x-amazon-apigateway-integration"]
        (answer,) = said["responses"].values()
        headers = {name.rpartition(".")[2]: value for name, value in answer["responseParameters"].items()}
        assert said["type"] == "mock", path
        assert headers["Access-Control-Allow-Origin"] == "'*'"
        assert "Authorization" in headers["Access-Control-Allow-Headers"]


def test_runpods_callback_finds_its_job(deployed):
    job_id = deployed.create()
    (run,) = deployed.cloud.d1.execute("SELECT runpod_job_id FROM jobs WHERE id = ?1", job_id)
    (sent,) = [given for given in webhooks_of(deployed.cloud) if job_id in given]
    *_, attempt, token = sent.split("/")
    resource = "/webhooks/runpod/{job_id}/{attempt}/{token}"
    params = {"job_id": job_id, "attempt": attempt, "token": token}

    status, answer, _ = deployed.call(
        "POST",
        resource.format(**params),
        {"id": run["runpod_job_id"], "status": "COMPLETED"},
        resource=resource,
        params=params,
        key=None,
    )

    assert (status, answer["ok"]) == (200, True)
    assert deployed.until_done(job_id)["status"] == "done"


def webhooks_of(cloud):
    with contextlib.closing(cloud.runpod._connection.execute("SELECT * FROM runs")) as found:
        return [str(value) for row in found for value in tuple(row) if "/webhooks/runpod/" in str(value)]


def test_no_secret_is_anywhere_but_in_the_parameter_store(deployed, packaged):
    deployed.until_done(deployed.create())
    deployed.call("POST", "/api/queue/create", {"prompt": 7})

    with zipfile.ZipFile(packaged / "dev" / "deployment.zip") as archive:
        shipped = b"".join(archive.read(name) for name in archive.namelist())
    places = {
        "log": deployed.logs.read_bytes(),
        "table": json.dumps(deployed.rows()).encode(),
        "answers": json.dumps(deployed.answers).encode(),
        "template": (packaged / "dev" / "template.json").read_bytes(),
        "zip": shipped,
    }
    assert len(deployed.secrets) == 6
    for place, content in places.items():
        assert len(content) > 1000, place
        for name, secret in deployed.secrets.items():
            assert secret.encode() not in content, f"{name} stands in the {place}"


# The template


@pytest.fixture(scope="session")
def expanded(packaged, tmp_path_factory):
    """Every kind of template, as CloudFormation sees it once SAM has done its part; beside it as it was made."""
    folder = tmp_path_factory.mktemp("templates")
    base = json.loads((packaged / "dev" / "template.json").read_text())
    for function, role in template.FUNCTIONS.items():
        del base["Resources"][function]["Properties"]["Environment"]
        statements = base["Resources"][role]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
        del statements[1:]
    for name, more in VARIANTS.items():  # that of prod is then the one that was packaged
        (folder / f"sam-{name}.json").write_text(json.dumps(template.fill(base, {**MINIMAL, **more})))
    for stage in ("dev", "prod"):
        shutil.copy(packaged / stage / "template.json", folder / f"sam-{stage}.json")
    subprocess.run(
        [PYTHON, ROOT / "tests" / "contract" / "expand_sam.py", folder],
        env={"AWS_DEFAULT_REGION": "eu-west-1", "PATH": os.defpath},
        check=True,
    )
    return folder


def read(folder, name):
    return json.loads((folder / f"cfn-{name}.json").read_text())["Resources"]


def only(resources, kind):
    return {
        name: resource["Properties"]
        for name, resource in resources.items()
        if resource["Type"] == kind or resource["Type"].endswith(f"::{kind}")
    }


def test_cfn_lint_finds_nothing_in_any_template(expanded):
    as_made = [expanded / f"sam-{stage}.json" for stage in ("dev", "prod")]
    done = expanded / "cfn-prod.json"  # which has everything

    said = subprocess.run([PYTHON.parent / "cfn-lint", *as_made, done], capture_output=True, text=True)

    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_the_functions_are_what_they_should_be(expanded):
    functions = only(read(expanded, "dev"), "AWS::Lambda::Function")

    shapes = {
        name: (function["Runtime"], function["Architectures"], function["Timeout"], function["MemorySize"])
        for name, function in functions.items()
    }
    assert shapes == {
        "APIHandler": ("python3.13", ["arm64"], 29, 1024),
        "PollJobs": ("python3.13", ["arm64"], 58, 512),
    }
    for function in functions.values():
        assert function["Environment"]["Variables"] == {**MINIMAL, **SECRETS, **MADE_HERE}
        assert "ReservedConcurrentExecutions" not in function


def test_concurrency_is_reserved_only_where_it_is_asked_for(expanded):
    functions = only(read(expanded, "reserved"), "AWS::Lambda::Function")

    assert {name: function["ReservedConcurrentExecutions"] for name, function in functions.items()} == {
        "APIHandler": 10,
        "PollJobs": 4,
    }


def test_a_second_poller_is_a_second_rule_for_the_same_function(expanded):
    resources = read(expanded, "reserved")
    rules = only(resources, "AWS::Events::Rule").values()

    assert [rule["ScheduleExpression"] for rule in rules] == ["rate(1 minute)"] * 2
    targets = [target for rule in rules for target in rule["Targets"]]
    assert {json.dumps(target["Arn"]) for target in targets} == {json.dumps({"Fn::GetAtt": ["PollJobs", "Arn"]})}
    assert all(target["RetryPolicy"]["MaximumRetryAttempts"] == 0 for target in targets)
    permissions, before = (only(one, "AWS::Lambda::Permission") for one in (resources, read(expanded, "bare")))
    assert len(permissions) == len(before) + 1


def test_a_minute_that_failed_is_not_repeated(expanded):
    resources = read(expanded, "dev")

    (invoked,) = only(resources, "EventInvokeConfig").values()
    assert (invoked["FunctionName"], invoked["Qualifier"]) == ({"Ref": "PollJobs"}, "$LATEST")
    assert (invoked["MaximumRetryAttempts"], invoked["MaximumEventAgeInSeconds"]) == (0, 60)
    (rule,) = only(resources, "AWS::Events::Rule").values()
    (target,) = rule["Targets"]
    assert rule["ScheduleExpression"] == "rate(1 minute)"
    assert target["RetryPolicy"] == {"MaximumRetryAttempts": 0, "MaximumEventAgeInSeconds": 60}
    assert "Name" not in rule


def test_each_function_writes_into_a_group_that_is_there_first_and_may_write_nowhere_else(expanded):
    resources = read(expanded, "bare")
    groups, functions = only(resources, "LogGroup"), only(resources, "AWS::Lambda::Function")

    assert len({json.dumps(group["LogGroupName"]) for group in groups.values()}) == 2
    for function in functions.values():
        group = function["LoggingConfig"]["LogGroup"]["Ref"]
        assert groups[group]["RetentionInDays"] == 30
        assert "${AWS::StackName}" in groups[group]["LogGroupName"]["Fn::Sub"]
        logs, *_ = statements(resources, function)
        assert (logs["Action"], logs["Resource"]) == (
            ["logs:CreateLogStream", "logs:PutLogEvents"],
            {"Fn::GetAtt": [group, "Arn"]},
        )


def statements(resources, function):
    role = resources[function["Role"]["Fn::GetAtt"][0]]["Properties"]
    (policy,) = role["Policies"]
    assert "ManagedPolicyArns" not in role
    return policy["PolicyDocument"]["Statement"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_function_may_do_what_its_settings_need_and_no_more(expanded, variant):
    resources = read(expanded, variant)
    given = {**MINIMAL, **VARIANTS[variant]}
    arn = "arn:${AWS::Partition}:ssm:${AWS::Region}:${AWS::AccountId}:parameter"
    named = sorted(value.removeprefix("ssm:") for value in given.values() if value.startswith("ssm:"))
    wanted = [(["ssm:GetParameters"], [{"Fn::Sub": f"{arn}{name}"} for name in named])]
    if "SPOOL_BUCKET" in given:
        wanted += [
            (["s3:GetObject", "s3:PutObject"], {"Fn::Sub": "arn:${AWS::Partition}:s3:::my-spool/spool/*"}),
            (["s3:ListBucket"], {"Fn::Sub": "arn:${AWS::Partition}:s3:::my-spool"}),
        ]

    for function in only(resources, "AWS::Lambda::Function").values():
        _, *rights = statements(resources, function)
        assert [(right["Action"], right["Resource"]) for right in rights] == wanted
        assert {right["Effect"] for right in rights} == {"Allow"}


def test_without_a_parameter_there_is_no_right_to_read_one(packaged):
    assert template._rights({"RUNPOD_ENDPOINT_ID": "endpoint"}) == []


def test_the_api_has_one_short_stage_with_limits_and_is_regional(expanded):
    resources = read(expanded, "dev")

    (stage,) = only(resources, "Stage").values()
    limits, of_the_page = stage["MethodSettings"]
    (api,) = only(resources, "RestApi").values()
    (deployment,) = only(resources, "Deployment").values()
    assert stage["StageName"] == "v1"
    assert api["MinimumCompressionSize"] == 1000
    assert limits == {"ResourcePath": "/*", "HttpMethod": "*", "ThrottlingRateLimit": 10, "ThrottlingBurstLimit": 20}
    assert (of_the_page["ResourcePath"], of_the_page["ThrottlingBurstLimit"]) == ("/~1ui~1{name}", 200)
    assert api["EndpointConfiguration"] == {"Types": ["REGIONAL"]}
    assert api["Body"]["info"]["title"] == {"Ref": "AWS::StackName"}
    assert "StageName" not in deployment


def test_a_domain_leads_to_the_root_of_the_stage(expanded):
    resources = read(expanded, "domain")

    (domain,) = only(resources, "DomainName").values()
    (mapping,) = only(resources, "BasePathMapping").values()
    (stage,) = (name for name, resource in resources.items() if resource["Type"].endswith("::Stage"))
    assert domain["SecurityPolicy"] == "TLS_1_2"
    assert domain["RegionalCertificateArn"] == DOMAIN["DEPLOY_CERTIFICATE_ARN"]
    assert mapping["Stage"] == {"Ref": stage}
    assert "BasePath" not in mapping
    assert not only(read(expanded, "bare"), "DomainName")


def test_what_the_gateway_says_itself_has_our_shape_and_any_page_may_read_it(expanded):
    (api,) = only(read(expanded, "dev"), "RestApi").values()
    answers = api["Body"]["x-amazon-apigateway-gateway-responses"]

    assert {"DEFAULT_4XX", "DEFAULT_5XX"} <= set(answers)
    for kind, answer in answers.items():
        body = json.loads(answer["responseTemplates"]["application/json"])
        assert list(body) == ["ok", "error", "code"], kind
        assert body["ok"] is False
        assert body["error"].endswith(".")
        assert re.fullmatch("[a-z_]+", body["code"])
        assert "$" not in answer["responseTemplates"]["application/json"]  # nothing of the request is told back
        headers = {name.rpartition(".")[2]: value for name, value in answer["responseParameters"].items()}
        assert headers["Access-Control-Allow-Origin"] == "'*'"
        assert headers["X-Request-Id"] == "context.requestId"
        exposed = headers["Access-Control-Expose-Headers"].strip("'").split(",")
        assert set(exposed) == headers.keys() - {"Access-Control-Allow-Origin", "Access-Control-Expose-Headers"}


def test_two_stages_have_no_name_in_common(expanded):
    for resource in read(expanded, "dev").values():
        for name in ("FunctionName", "RoleName", "Name", "LogGroupName", "RuleName", "AlarmName", "DashboardName"):
            given = resource["Properties"].get(name, {"Ref": "something"})
            assert isinstance(given, dict), given


def test_alarms_watch_the_api_by_the_name_and_stage_that_it_has(expanded):
    resources = read(expanded, "bare")
    (api,), (stage,) = only(resources, "RestApi").values(), only(resources, "Stage").values()
    queries = only(resources, "Alarm")["ApiErrors"]["Metrics"]
    (named,) = {json.dumps(one["MetricStat"]["Metric"]["Dimensions"]) for one in queries if "MetricStat" in one}

    assert "Name" not in api  # it has its document's title then
    assert {one["Name"]: one["Value"] for one in json.loads(named)} == {
        "ApiName": api["Body"]["info"]["title"],
        "Stage": stage["StageName"],
    }


@pytest.mark.parametrize(
    ("variant", "told", "budget"), [("bare", 0, 0), ("email", 1, 0), ("budget", 0, 1), ("prod", 1, 1)]
)
def test_a_mail_and_a_budget_are_there_only_where_they_are_asked_for(expanded, variant, told, budget):
    resources = read(expanded, variant)

    assert len(only(resources, "Topic")) == told
    assert ("OverBudget" in only(resources, "Alarm")) == budget
    assert len(only(resources, "Dashboard")) == 1


# The deployment


def test_a_stack_is_made_and_may_be_deployed_again(packaged, aws, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tools import deploy, template; "
        "values, folder = template.read_values(Path(sys.argv[1])), Path(sys.argv[2]); "
        "deploy.deploy('dev', values, folder); "
        "deploy._apply(deploy.Aws(region='us-east-1'), 'dev', folder, sys.argv[3])"
    )
    bucket = "ob-ai-studio-deploy-123456789012-us-east-1"
    values = tmp_path / "values.env"
    values.write_text("".join(f"{name}={value}\n" for name, value in {**MINIMAL, **SECRETS}.items()))
    shutil.copytree(packaged / "dev", tmp_path / "dev")

    said = subprocess.run(
        [PYTHON, "-c", code, values, tmp_path / "dev", bucket],
        cwd=ROOT,
        env={"PATH": os.defpath, "HOME": str(tmp_path), **aws},
        capture_output=True,
        text=True,
    )

    assert (said.returncode, said.stderr) == (0, "")
    commands = [line.split()[2:4] for line in said.stdout.splitlines() if line.startswith("$ aws ")]
    assert [verb for _, verb in commands] == [
        "get-caller-identity", "head-bucket", "create-bucket", "put-public-access-block", "package", "deploy",
        "describe-stacks", "deploy",
    ]  # fmt: skip
    assert "The stack ob-ai-studio-dev is up to date." in said.stdout
    assert f"--bucket {bucket} " in said.stdout


def test_readmes_loop_puts_a_secret_into_the_parameter_store(packaged, aws):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^for name in .+?^done; unset value$", readme, flags=re.MULTILINE | re.DOTALL)
    one = re.sub(r"in .+; do", "in WEBHOOK_SECRET; do", loop, count=1)
    environment = {**aws, "PATH": os.defpath, "AWS_DEFAULT_REGION": aws["AWS_REGION"]}

    subprocess.run(
        ["sh", "-c", one], cwd=ROOT, env=environment, input="typed by hand\n", text=True, capture_output=True
    )

    found = ssm(aws).get_parameter(Name="/ob-ai-studio/prod/WEBHOOK_SECRET", WithDecryption=True)["Parameter"]
    assert (found["Type"], found["Value"]) == ("SecureString", "typed by hand")


def test_another_python_is_refused(tmp_path):
    values = tmp_path / "values.env"
    values.write_text("".join(f"{name}={value}\n" for name, value in MINIMAL.items()))
    # The tests' own Python, which calls itself another one where it is Lambda's.
    code = "import sys; sys.version_info = (3, 12, 1, 'final', 0); from tools import deploy; deploy.main()"
    said = subprocess.run(
        [sys.executable, "-c", code, "package", "--stage", "dev", "--values", values, "--dist", tmp_path],
        cwd=ROOT,
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
    )

    assert said.returncode == 1
    assert "must what packages them: use ./deploy." in said.stderr
