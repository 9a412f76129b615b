"""What README claims is what the code does."""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

import app
from chalicelib import answers, breaker, d1, metrics, pipeline, settings, store
from chalicelib.auth import Right
from chalicelib.errors import REQUEST_STATUS
from chalicelib.jobs import STATUS_OF, TRANSITIONS, State
from tests.conftest import FIELDS, call
from tests.unit.test_keys import RIGHTS
from tools import template
from tools.cloud import Request
from tools.cloud.faults import PARTS

ROOT = Path(__file__).parents[2]
TEMPLATE = yaml.safe_load((ROOT / ".chalice" / "template.yaml").read_text(encoding="utf-8"))
COMMANDS = ["./run", "./test", "./run --help", "./deploy package --stage prod", "./deploy aws --stage prod"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


TICKED = re.compile(r"`(\w+)`").findall


def section(title):
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def test_every_route_is_in_the_table_in_the_order_of_the_code():
    rows = re.findall(r"^\| `(GET|POST|DELETE) (\S+)` \|", section("The API"), flags=re.MULTILINE)
    routes = [(method, path) for path, methods in app.app.routes.items() for method in methods]

    assert rows == routes


def test_every_route_is_in_the_table_with_its_right():
    rows = re.findall(r"^\| `(\w+) (\S+)` \| (\S+) \|", section("The API"), flags=re.MULTILINE)

    assert {(method, path): right for method, path, right in rows} == {
        route: right.word if right else "–" for route, right in RIGHTS.items()
    }


def test_the_example_of_a_line_of_the_log_has_its_fields(client, lines):
    example = re.search(r"^\{.+?\}$", section("The log"), flags=re.MULTILINE | re.DOTALL)

    call(client, "POST", "/api/queue/create", {"prompt": "a cat"})

    assert list(lines()[-1]) == list(json.loads(example[0]))


def test_every_field_of_the_log_is_in_the_table():
    rows = re.findall(r"^\| (`.+?`) \|", section("The log"), flags=re.MULTILINE)

    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(FIELDS)


def test_the_queries_of_the_log_use_its_fields():
    queries = re.search(r"```text\n(.+?)```", section("The first hour with an alarm"), flags=re.DOTALL)
    of_insights = {
        "filter", "stats", "sort", "display", "by", "as", "in", "desc", "ispresent", "count", "latest", "sum", "max",
        "@timestamp",
    }  # fmt: skip

    for query in queries[1].splitlines():
        words = re.findall(r"@?[A-Za-z]\w*", re.sub(r'"[^"]*"', "", query))
        named = set(re.findall(r"as (\w+)", query))
        assert set(words) - of_insights - named - {*FIELDS, *metrics.METRICS} == set(), query


def test_what_is_left_out_for_want_of_calls_is_as_the_code_has_it():
    rows = re.findall(r"^\| under (\d+) \|", section("What looks after itself"), flags=re.MULTILINE)
    kept = answers.KEPT_CALLS
    wanted = [store.CALLS_KEPT_FROM_WEBHOOKS, kept[Right.READ], pipeline.CALLS_KEPT_FOR_ROUNDS, kept[Right.WRITE]]

    assert [int(row) for row in rows] == [*wanted, store.CALLS_KEPT_FOR_SAVES, d1.LAST_CALLS]
    assert kept[Right.WRITE] == kept[Right.ADMIN]


def test_the_pauses_of_an_endpoint_are_those_of_the_code():
    *first, last = [seconds // 60 for seconds in breaker.PAUSES]

    assert f"After {', '.join(map(str, first))}, then every {last} minutes" in section("What looks after itself")
    assert breaker.MOST == {"call": 5, "run": 10}


def test_what_a_stuck_job_waits_for_is_one_of_its_reasons():
    codes = [
        {code for row in re.findall(r"^ *\| (`.+?) \|", section(title), flags=re.MULTILINE) for code in TICKED(row)}
        for title in ("Stuck endpoint", "Why a job waits")
    ]

    assert codes[0] - {"waiting"} <= codes[1]
    assert len(codes[0]) > 5


def test_every_link_within_readme_leads_to_a_heading():
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    assert set(re.findall(r"\]\(#(.+?)\)", README)) - anchors == set()


def test_every_metric_is_in_the_table_with_its_unit():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", section("Metrics"), flags=re.MULTILINE)

    assert rows == list(metrics.METRICS.items())


def test_every_setting_is_in_the_table_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", section("Settings"), flags=re.MULTILINE)
    wanted = []
    for entry in fields(settings.Settings):
        default = entry.metadata["default"]
        shown = "required" if entry.default is MISSING else f"`{default}`" if default else "empty"
        wanted.append((entry.name.upper(), shown, entry.metadata["about"]))

    assert rows == wanted


def test_every_fault_of_the_local_cloud_is_in_the_table_with_its_parts():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", section("What goes wrong, on demand"), flags=re.MULTILINE)
    shown = {(part, fault) for fault, parts in rows for part in re.findall(r"`(\w+)`", parts)}

    assert shown == {(part, fault) for part, faults in PARTS.items() for fault in faults}


def test_the_local_cloud_takes_the_examples_of_faults(cloud):
    bodies = re.findall(r"8001/simulate -d '(.+)'$", section("What goes wrong, on demand"), flags=re.MULTILINE)

    answers = [cloud.handle(Request("POST", "/simulate", body=body.encode())) for body in bodies]

    assert [json.loads(answer.body) for answer in answers] == [json.loads(body) for body in bodies]
    assert len(bodies) == 3


def test_the_chart_is_the_table_of_moves():
    arrows = set(re.findall(r"^    (\w+) --> (\w+): (\w+)$", section("The life of a job"), flags=re.MULTILINE))

    assert arrows == {
        (source.value, target.value, verb) for verb, (sources, target) in TRANSITIONS.items() for source in sources
    }


def test_the_drawing_in_jobs_names_every_move():
    drawing = (ROOT / "chalicelib" / "jobs.py").read_text(encoding="utf-8").split('"""')[1]

    for verb in TRANSITIONS:
        assert verb in drawing, verb


def test_the_steps_are_in_the_table_with_their_status():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section("The life of a job"), flags=re.MULTILINE)

    assert rows == [
        (STATUS_OF[state].value, state.value) for state in State if state not in ("done", "error", "cancelled")
    ]


def test_every_code_of_a_refused_request_is_in_the_table_with_its_status():
    rows = re.findall(r"^\| (4\d\d) \| (.+?) \|", section("Errors"), flags=re.MULTILINE)
    shown = {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}

    assert shown == REQUEST_STATUS


def test_every_code_that_can_end_a_job_is_in_the_table():
    table = re.findall(r"^\| (`[^|]+?) \|", section("Errors").split("A job that ends")[1], flags=re.MULTILINE)
    shown = {code for row in table for code in re.findall(r"`([\w…]+)`", row)}
    prefixes = tuple(code[:-1] for code in shown if code.endswith("…"))
    codes = set()
    for path in (ROOT / "chalicelib").glob("*.py"):
        if path.stem in (
            "advice",
            "answers",
            "api",
            "auth",
            "bootstrap",
            "d1",
            "errors",
            "filters",
            "health",
            "inputs",
            "orders",
            "parameters",
            "pipeline",
            "removal",
            "settings",
            "uploads",
            "verbs",
            "wire",
        ):
            continue  # what is refused there ends no job
        text = path.read_text(encoding="utf-8")
        codes |= set(re.findall(r'(?:PermanentError|TransientError|_said|_error|_refused|_trouble)\(\s*"(\w+)"', text))
        codes |= set(re.findall(r'return "(\w+)", "', text))

    codes.discard("cancelled")  # why a run is stopped; the job is cancelled then, which is no error

    assert {code for code in codes if code not in shown and not code.startswith(prefixes)} == set()


def test_every_code_of_the_gateway_is_in_its_table_with_its_status():
    rows = re.findall(r"^\| ([45].+?) \| `(\w+)` \|", section("Errors of the gateway"), flags=re.MULTILINE)
    shown = {(status, code) for statuses, code in rows for status in statuses.split(", ")}
    answers = TEMPLATE["Resources"]["RestAPI"]["Properties"]["GatewayResponses"]

    assert shown == {
        (
            answer.get("StatusCode") or kind.removeprefix("DEFAULT_").lower(),
            json.loads(answer["ResponseTemplates"]["application/json"])["code"],
        )
        for kind, answer in answers.items()
    }


def test_every_value_of_a_deployment_is_in_its_table():
    rows = re.findall(r"^\| `(DEPLOY_\w+)` \|", section("Deployment"), flags=re.MULTILINE)

    assert rows == list(template.DEPLOY_VALUES)


def test_the_example_of_a_stages_settings_is_accepted(tmp_path):
    example = re.search(r"```sh\n(RUNPOD_ENDPOINT_ID=.+?)```", section("Deployment"), flags=re.DOTALL)
    (tmp_path / ".env.prod").write_text(example[1])

    values = template.read_values(tmp_path / ".env.prod")

    secrets = {name for name, value in values.items() if value.startswith("ssm:")}
    loop = re.search(r"^for name in (.+); do$", section("Deployment"), flags=re.MULTILINE)
    assert secrets == set(loop[1].split()) == settings.SECRETS


def test_every_file_of_the_service_is_in_the_map():
    listed = section("The files, in reading order")

    for path in [*(ROOT / "chalicelib").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        if path.name != "__init__.py":
            assert re.search(rf"[`/]{path.name}`", listed), path.name


@pytest.mark.parametrize(
    "command",
    [
        "./run",
        "./test",
        "./deploy package --stage prod",
        "./deploy aws --stage prod",
        "./run --help",
        ".venv/bin/python -m tools.schema --check",
        ".venv/bin/python -m tools.doctor --draw",
        ".venv/bin/python -m tools.doctor --list",
        ".venv/bin/python -m tools.provision --env .env.prod --apply",
        ".venv/bin/python -m tools.backup export",
        ".venv/bin/python -m tools.backup restore",
    ],
)
def test_the_commands_are_there(command):
    assert command in README
    script = command.split()[0]
    assert script.startswith(".venv") or (ROOT / script).stat().st_mode & 0o111


def test_no_secret_is_in_config():
    config = (ROOT / ".chalice" / "config.json").read_text()

    assert "environment_variables" not in config
