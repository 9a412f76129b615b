"""The gallery page as it is served: its files, what a browser is told of them, and that the files fit the service."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import app
from chalicelib import bootstrap, page, reads
from chalicelib.errors import REQUEST_STATUS
from chalicelib.jobs import Status
from tests import openapi
from tests.conftest import call

FOLDER = Path(page.__file__).with_name("ui")
FILES = sorted(path.name for path in FOLDER.iterdir())
ASSETS = [name for name in FILES if name != page.INDEX]
MAX_BYTES = 60_000  # that all of it takes on the way, in both languages


def fetch(client, path, headers=None):
    response = client.http.get(path, headers=headers or {})
    openapi.check("GET", path, response.status_code, response.headers, response.body)
    return response


def policy(response):
    parts = [part.split() for part in response.headers["Content-Security-Policy"].split(";")]
    return {name: sources for name, *sources in parts}


def asked_at(path, client):
    """The page as API Gateway hands the request on: `path` has the stage, the route has not."""
    answer = app.app(
        {
            "resource": "/",
            "path": "/",
            "httpMethod": "GET",
            "headers": {"accept": "text/html"},
            "multiValueHeaders": {"accept": ["text/html"]},
            "queryStringParameters": None,
            "multiValueQueryStringParameters": None,
            "pathParameters": None,
            "stageVariables": None,
            "requestContext": {"resourcePath": "/", "httpMethod": "GET", "path": path},
            "body": None,
            "isBase64Encoded": False,
        },
        SimpleNamespace(aws_request_id="a"),
    )
    assert answer["statusCode"] == 200
    return answer["body"]


def test_the_page_is_open_and_calls_nobody(client, cloud):
    calls = dict(cloud.calls)

    response = fetch(client, "/")

    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert cloud.calls == calls


@pytest.mark.parametrize("name", ASSETS)
def test_each_of_its_files_is_served_with_its_type(client, name):
    response = fetch(client, f"/ui/{name}")

    assert response.body.decode() == (FOLDER / name).read_text(encoding="utf-8")
    assert response.headers["Content-Type"] == f"text/{'css' if name.endswith('css') else 'javascript'}; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/ui/app.js"])
def test_what_a_browser_has_already_is_not_sent_again(client, path):
    first = fetch(client, path)

    again = fetch(client, path, {"If-None-Match": first.headers["ETag"]})

    assert (again.status_code, again.body) == (304, b"")
    assert "no-cache" in first.headers["Cache-Control"]


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2Fapi.py", "%2e%2e%2fqueries.sql", "app.js%00"])
def test_what_is_no_file_of_it_is_not_found(client, name):
    status, body, _ = call(client, "GET", f"/ui/{name}", auth={})

    assert (status, body["code"]) == (404, "file_not_found")


def test_only_its_own_scripts_run_and_only_r2_gives_pictures(client, environment):
    allowed = policy(fetch(client, "/"))

    r2 = {re.match(r"\w+://[^/]+", environment[name])[0] for name in ("R2_ENDPOINT_URL", "R2_PUBLIC_BASE_URL")}
    assert allowed["default-src"] == ["'none'"]
    assert allowed["script-src"] == allowed["style-src"] == ["'self'"]
    assert set(allowed["img-src"]) == {"'self'", "data:", "blob:", *r2}
    assert set(allowed["connect-src"]) == {"'self'", *r2}
    assert set(allowed["media-src"]) == r2
    assert allowed["frame-ancestors"] == allowed["base-uri"] == allowed["form-action"] == ["'none'"]
    assert allowed["require-trusted-types-for"] == ["'script'"]


def test_a_private_bucket_is_admitted_by_its_endpoint_alone(client, monkeypatch):
    monkeypatch.setenv("R2_PUBLIC_BASE_URL", "")
    monkeypatch.setenv("R2_ENDPOINT_URL", "")
    bootstrap.service.cache_clear()

    assert policy(fetch(client, "/"))["media-src"] == ["https://local-account.r2.cloudflarestorage.com"]


def test_without_settings_the_page_comes_all_the_same(client, monkeypatch):
    monkeypatch.delenv("CLOUDFLARE_ACCOUNT_ID")
    bootstrap.service.cache_clear()

    response = fetch(client, "/")

    assert response.status_code == 200
    assert policy(response)["connect-src"] == ["'self'"]


@pytest.mark.parametrize(
    ("path", "assets", "api"),
    [
        ("/", "ui/", "./"),
        ("/v1/", "ui/", "./"),
        ("/v1", "/v1/ui/", "/v1/"),
        ("/shop/art", "/shop/art/ui/", "/shop/art/"),
    ],
)
def test_its_addresses_hold_under_the_stage_with_and_without_a_slash(client, path, assets, api):
    text = asked_at(path, client)

    named = re.findall(r'(?:href|src)="([^"]+\.(?:js|css))"', text)
    assert {f"{found.rpartition('/')[0]}/" for found in named} == {assets}
    assert re.findall(r'data-api="([^"]*)"', text) == [api]


def test_as_files_it_works_from_any_host():
    text = (FOLDER / page.INDEX).read_text(encoding="utf-8")

    named = re.findall(r'(?:href|src)="\./([^"]+)"', text)
    assert set(named) <= set(ASSETS)
    assert text.count(page.BESIDE) == len(named)
    assert text.count(page.API) == 1


@pytest.mark.parametrize("name", FILES)
def test_it_loads_nothing_from_elsewhere_and_reads_no_text_as_markup(name):
    text = (FOLDER / name).read_text(encoding="utf-8")

    links = set(re.findall(r"https?://[\w.-]+", text))
    assert links <= {"http://www.w3.org", "https://api.example.com"}  # a namespace, an example
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|<script>|\son\w+=", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_a_module_imports_only_what_is_there(name):
    text = (FOLDER / name).read_text(encoding="utf-8")

    assert set(re.findall(r'(?:from|import\() ?"\./([^"]+)"', text)) <= set(ASSETS)


def test_what_the_first_look_needs_is_asked_for_at_once():
    """A module that is found only in another one costs one more way there and back."""
    text = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    needed, found = set(), {"app.js"}
    while found:
        needed |= found
        found = {other for name in found for other in re.findall(r' from "\./([^"]+)"', text[name])} - needed

    assert set(re.findall(r'href="\./([^"]+\.js)"', text[page.INDEX])) | {"app.js"} == needed


def test_all_of_it_is_small():
    sizes = {name: len(gzip.compress((FOLDER / name).read_bytes())) for name in FILES}
    print(f"{sum((FOLDER / name).stat().st_size for name in FILES):,} bytes, {sum(sizes.values()):,} compressed")

    assert sum(sizes.values()) < MAX_BYTES


def test_the_gateway_compresses_it():
    config = json.loads((Path(app.__file__).parent / ".chalice" / "config.json").read_text())

    assert config["minimum_compression_size"] <= 1_000


# What the page knows of the service by itself


HEADERS = {"Content-Type", "Date", "Idempotency-Key", "Idempotent-Replayed", "If-None-Match", "Retry-After"}
NO_WORDS = HEADERS | {"English", "Enter", "Files"}
README = (Path(app.__file__).parent / "README.md").read_text(encoding="utf-8")


def script(name):
    """The file without its comments."""
    return re.sub(r"^\s*(//|/\*\*).*$", "", (FOLDER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def thai():
    return set(re.findall(r'^  "(.+?)": "[^"]*[ก-๙]', script("th.js"), flags=re.MULTILINE))


def said():
    """What the page may say: all that t() is given, and whatever begins like a sentence."""
    scripts = [script(name) for name in FILES if name.endswith(".js") and name != "th.js"]
    given = {text for each in scripts for text in re.findall(r'\bt\("([^"]+)"', each)}
    begun = {text for each in scripts for text in re.findall(r'"([A-Z][a-z][^"]*)"', each)}
    stages = re.search(r"STAGES = \{(.+?)\}", script("show.js"))[1]
    return given | (begun - NO_WORDS) | set(re.findall(r'"(.+?)"', stages))


def table(begin, end):
    part = README.split(begin)[1].split(end)[0]
    return re.findall(r"^\| (`[^|]+?) \| (.+) \|$", part, flags=re.MULTILINE)


def test_all_that_it_says_it_says_in_thai_too():
    assert len(said()) > 100
    assert said() <= thai()


def test_why_a_job_waits_it_says_in_thai_too():
    codes = {code for row, _ in table("### Why a job waits", "###") for code in re.findall(r"`(\w+)`", row)}

    assert {f"waiting:{code}" for code in codes} == {key for key in thai() if key.startswith("waiting:")}


def test_the_codes_of_errors_that_it_has_words_for_are_there():
    named = {key.removeprefix("error:") for key in thai() if key.startswith("error:")}

    assert named <= {*REQUEST_STATUS, "too_many_requests"}


def test_what_to_do_is_known_for_every_way_in_which_a_job_fails():
    advice = re.findall(r'^  \["(\w+)", "', script("show.js"), flags=re.MULTILINE)
    rows = table("A job that ends in `error`", "### Errors of the gateway")
    codes = [code for row, why in rows[1:] for code in re.findall(r"`(\w+)…?`", row) if "dead letter" not in why]

    assert len(codes) > 25
    assert [code for code in codes if not code.startswith(tuple(advice)) and code != "too_many_files"] == []


def test_it_knows_every_status():
    (listed,) = re.findall(r"STATUSES = \{(.+?)\}", script("show.js"))

    assert re.findall(r"(\w+): ", listed) == list(Status)


def test_it_knows_in_how_many_jobs_a_text_is_looked_for():
    (said_there,) = re.findall(r"const SEARCHED = (\d+);", script("gallery.js"))

    assert int(said_there) == reads.SEARCHED
