"""The document of the API is valid, and says what the code says; what is answered, call() holds against it."""

import inspect
import json

import pytest
from jsonschema_rs import ValidationError
from openapi_spec_validator import OpenAPIV31SpecValidator

import app
from chalicelib import api, filters, inputs, jobs, orders, reads, settings, verbs
from chalicelib.auth import Right
from chalicelib.errors import REQUEST_STATUS
from tests import openapi
from tests.conftest import call
from tests.openapi import DOCUMENT, codes, operations, parts, resolve

SCHEMAS = DOCUMENT["components"]["schemas"]
# What Chalice answers by itself, on any path or on none.
OF_CHALICE = {"method_not_allowed", "request_refused"}


def route_of(method, path):
    """What @route was given for the view behind it; nothing where it has none."""
    view = getattr(api, app.app.routes[path][method].view_function.__code__.co_names[1])
    return inspect.getclosurevars(view).nonlocals


def parameter(method, path, name):
    return next(
        found["schema"] for found in map(resolve, operations()[method, path]["parameters"]) if found["name"] == name
    )


def body(method, path):
    return operations()[method, path]["requestBody"]["content"]["application/json"]["schema"]


OPERATIONS = pytest.mark.parametrize(
    ("method", "path"), [pytest.param(*operation, id=" ".join(operation)) for operation in operations()]
)


def test_the_document_is_openapi_31():
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert DOCUMENT["openapi"].startswith("3.1.")


def test_the_operations_are_the_routes_in_their_order():
    routes = [
        (method, path, entry.view_name) for path, methods in app.app.routes.items() for method, entry in methods.items()
    ]

    assert [(*operation, part["operationId"]) for operation, part in operations().items()] == routes


def test_nothing_is_described_that_is_not_used():
    used = {part["$ref"] for part in parts(DOCUMENT) if "$ref" in part}
    kinds = DOCUMENT["components"].items()
    there = {f"#/components/{kind}/{name}" for kind, named in kinds for name in named if kind != "securitySchemes"}

    assert there - used == {"#/components/responses/MethodNotAllowed"}  # it is no operation's


def test_the_codes_of_refused_requests_are_those_of_the_code_with_their_status():
    named = {
        code: int(status)
        for part in operations().values()
        for status, response in part["responses"].items()
        for code in codes(response)
    }

    assert named == {code: status for code, status in REQUEST_STATUS.items() if code not in OF_CHALICE}


@OPERATIONS
def test_every_4xx_names_its_codes_and_no_5xx_does(method, path):
    for status, response in operations()[method, path]["responses"].items():
        if status != "503" or path != "/api/health":
            assert bool(codes(response)) == status.startswith("4"), status


@OPERATIONS
def test_who_may_call_is_what_the_route_says(method, path):
    part = operations()[method, path]
    given = route_of(method, path)
    right = given.get("right")

    assert part.get("x-right") == (right.name.lower() if right else None)
    assert part["security"] == ([{"key": []}] if right else [])
    assert part.get("x-anonymous", False) == given.get("anonymous", False)
    assert ("401" in part["responses"]) == bool(right)
    assert ("forbidden" in codes(part["responses"].get("403", {}))) == bool(right and right > Right.READ)


@OPERATIONS
def test_an_answer_that_may_be_known_says_so(method, path):
    part = operations()[method, path]
    given = route_of(method, path)

    etag = given.get("etag", path in ("/", "/ui/{name}", "/openapi.json"))
    names = {found["name"] for found in map(resolve, part.get("parameters", ()))}
    assert ("304" in part["responses"], "If-None-Match" in names) == (etag, etag)
    assert ("ETag" in part["responses"]["200"]["headers"]) == etag


@OPERATIONS
def test_every_answer_has_the_headers_of_every_answer(method, path):
    for response in map(resolve, operations()[method, path]["responses"].values()):
        assert {"X-Request-Id", "Access-Control-Allow-Origin"} <= response["headers"].keys()


@OPERATIONS
def test_what_telling_headers_there_are_pages_may_read(method, path):
    named = {
        name for response in operations()[method, path]["responses"].values() for name in resolve(response)["headers"]
    }

    assert named <= {*openapi.TELLING, "Access-Control-Allow-Origin", "WWW-Authenticate"}


def test_the_limits_are_those_of_the_code():
    wanted = SCHEMAS["WantedJob"]["properties"]
    metadata = SCHEMAS["Metadata"]
    deadline, model = wanted["deadline"], SCHEMAS["Model"]

    assert wanted.keys() == set(orders.JOB_FIELDS)
    assert (wanted["prompt"]["maxLength"], model["maxLength"]) == (orders.MAX_PROMPT_CHARS, inputs.MAX_MODEL_CHARS)
    assert wanted["model"]["default"] == jobs.DEFAULT_MODEL
    assert wanted["priority"]["enum"] == [jobs.NORMAL, jobs.LOW, None]
    assert (deadline["minimum"], deadline["maximum"]) == (orders.MIN_DEADLINE, settings.MAX_DEADLINE)
    assert metadata["maxProperties"] == inputs.MAX_METADATA
    assert metadata["additionalProperties"]["maxLength"] == inputs.MAX_METADATA_CHARS
    assert metadata["propertyNames"]["pattern"] == f"^{inputs.METADATA_KEY}$"
    assert SCHEMAS["NewJobs"]["properties"]["jobs"]["maxItems"] == orders.MAX_JOBS
    assert f"{inputs.MAX_BODY_BYTES // 1024} kB" in DOCUMENT["info"]["description"]


def test_the_limits_of_pages_are_those_of_the_code():
    limits = [
        parameter("GET", "/api/jobs", "limit"),
        parameter("GET", "/api/dead-letters", "limit"),
        body("POST", "/api/jobs/bulk")["properties"]["limit"],
        body("POST", "/api/dead-letters/redrive")["properties"]["limit"],
    ]

    assert {(limit["minimum"], limit["maximum"], limit["default"]) for limit in limits} == {
        (1, inputs.MAX_LIMIT, inputs.DEFAULT_LIMIT)
    }
    assert SCHEMAS["JobList"]["properties"]["counts_limit"]["const"] == reads.COUNTED


def test_the_filter_is_that_of_the_code():
    query = {found["name"] for found in map(resolve, operations()["GET", "/api/jobs"]["parameters"])}
    metadata = parameter("GET", "/api/jobs", "metadata")

    assert SCHEMAS["Filter"]["properties"].keys() == set(filters.FIELDS)
    assert query == {*filters.PARAMETERS, "metadata", "If-None-Match"}
    assert metadata["propertyNames"]["pattern"] == rf"^metadata\.{inputs.METADATA_KEY}$"
    assert metadata["maxProperties"] == inputs.MAX_METADATA
    assert SCHEMAS["Words"]["maxLength"] == filters.MAX_TEXT_CHARS
    assert body("POST", "/api/jobs/bulk")["properties"].keys() == set(filters.OF_BULK)
    assert SCHEMAS["Verb"]["enum"] == list(verbs.MEANT_FOR)


def test_the_words_of_a_job_are_those_of_the_code():
    fields = SCHEMAS["JobFields"]["properties"]

    assert SCHEMAS["Status"]["enum"] == list(jobs.Status)
    assert fields["step"]["enum"] == [*(state for state in jobs.State if state not in jobs.FINAL), None]
    assert SCHEMAS["JobFields"]["required"] == list(fields)


def test_the_examples_are_what_they_are_examples_of():
    checked = 0
    for part in parts(DOCUMENT):
        for example in examples(part):
            openapi.validator(part.get("schema", part)).validate(example)
            checked += 1

    assert checked > 20


def examples(part):
    """Those of a parameter or body, which has a schema, or of a schema."""
    if "example" in part:
        yield part["example"]
    several = part.get("examples", ())
    yield from (entry["value"] for entry in several.values()) if "schema" in part and several else several


# The route


def test_the_document_is_open_and_needs_no_settings(client, cloud, monkeypatch):
    monkeypatch.delenv("D1_DATABASE_ID")
    calls = cloud.calls["d1"]

    status, given, _ = call(client, "GET", "/openapi.json", auth={})

    assert (status, given) == (200, DOCUMENT)
    assert cloud.calls["d1"] == calls


def test_the_document_is_not_sent_twice(client):
    _, _, headers = call(client, "GET", "/openapi.json")

    status, body, again = call(client, "GET", "/openapi.json", headers={"If-None-Match": headers["ETag"]})

    assert (status, body, again["ETag"]) == (304, None, headers["ETag"])


# What call() refuses


ANSWER = {"ok": True, "id": "x", "deleted": True}
PLAIN = {"Access-Control-Allow-Origin": "*", "X-Request-Id": "x"}


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("GET", "/nowhere", 200, PLAIN, ANSWER),
        ("PUT", "/api/jobs/x", 200, PLAIN, ANSWER),
        ("DELETE", "/api/jobs/x", 201, PLAIN, ANSWER),
        ("DELETE", "/api/jobs/x", 200, {}, ANSWER),
        ("DELETE", "/api/jobs/x", 200, {**PLAIN, "ETag": 'W/"00000000000000000000000000000000"'}, ANSWER),
        ("DELETE", "/api/jobs/x", 200, PLAIN, {**ANSWER, "more": 1}),
        ("DELETE", "/api/jobs/x", 200, PLAIN, {"ok": True, "id": "x"}),
        ("DELETE", "/api/jobs/x", 404, PLAIN, {"ok": False, "error": "No.", "code": "job_deleted"}),
        ("DELETE", "/api/jobs/x", 503, {**PLAIN, "Retry-After": "1.5"}, {"ok": False, "error": "No.", "code": "x"}),
        ("GET", "/openapi.json", 304, {**PLAIN, "ETag": 'W/"00000000000000000000000000000000"'}, ANSWER),
        ("GET", "/api/jobs", 200, {**PLAIN, "ETag": "x"}, {"ok": True, "jobs": [], "next_cursor": None}),
    ],
    ids=[
        "path", "method", "status", "no header", "another header", "more", "less", "code", "header", "no body", "etag",
    ],
)  # fmt: skip
def test_an_answer_that_the_document_has_not_fails_the_test_that_saw_it(method, path, status, headers, body):
    with pytest.raises((AssertionError, ValidationError)):
        openapi.check(method, path, status, headers, json.dumps(body).encode())


def test_an_answer_that_the_document_has_passes():
    openapi.check("DELETE", "/api/jobs/x%2Fy?z=1", 200, PLAIN, json.dumps(ANSWER).encode())
