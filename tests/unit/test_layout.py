"""The structure: which module may know which, and what stands in app.py."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "chalicelib"

# From the ground up; a module may import only from those in lines above its own.
LAYERS = [
    {"errors", "records", "metrics"},
    {"retry", "runtime", "parameters", "connection", "boxes", "inline", "webhooks", "auth", "models", "page"},
    {"room", "pace"},
    {"settings", "credentials"},
    {"advice", "catalogue"},
    {"wire", "jobs", "content"},
    {"media", "deadlines", "moves", "breaker"},
    {"names"},
    {"d1", "runpod", "fetch", "r2", "outputs", "log"},
    {"queries", "attempts", "spool", "progress"},
    {"store", "results", "outbox", "reasons"},
    {"reads", "steps", "health", "removal", "uploads"},
    {"saver", "views", "waiting", "stats"},
    {"rounds", "courier"},
    {"pipeline"},
    {"verbs"},
    {"bootstrap", "inputs"},
    {"answers", "filters", "orders"},
    {"api"},
]
CLIENTS = {"wire", "d1", "runpod", "fetch", "r2", "spool", "parameters"}


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "chalicelib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chalicelib."):
            found.add(node.module.split(".")[1])
    return found


def modules():
    return {path.stem: path for path in SERVICE.glob("*.py") if path.stem != "__init__"}


def test_every_module_has_its_place():
    placed = [name for layer in LAYERS for name in layer]

    assert sorted(placed) == sorted(modules())


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_below(name):
    below = set()
    for layer in LAYERS:
        if name in layer:
            break
        below |= layer

    assert imports(modules()[name]) <= below


@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_a_client_knows_no_job(name):
    assert not imports(modules()[name]) & {"jobs", "store", "pipeline", "moves", "outputs", "media", "results"}


def test_only_bootstrap_knows_all_and_only_the_edge_knows_bootstrap():
    assert {name for name, path in modules().items() if "bootstrap" in imports(path)} == {"answers", "api"}


def test_the_service_knows_nothing_of_what_does_not_ship():
    for path in [ROOT / "app.py", *modules().values()]:
        roots = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert not roots & {"tools", "tests", "PIL", "moto"}


def test_only_the_edge_knows_chalice():
    assert {name for name, path in modules().items() if "chalice.app" in path.read_text()} == {
        "answers",
        "api",
        "filters",
        "inputs",
        "orders",
    }


def test_only_records_makes_classes_by_the_standard_dataclass():
    text = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}

    assert not [
        name for name in text if re.search(r"^from dataclasses import .*\bdataclass\b", text[name], re.MULTILINE)
    ]
    assert [name for name in text if "import dataclasses" in text[name]] == ["records"]


def test_app_is_a_table_of_contents():
    tree = ast.parse((ROOT / "app.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]

    assert len(functions) >= 10
    assert functions[-1].name == "poll_jobs"
    assert tree.body[-1] is functions[-1]
    for function in functions:
        assert len(function.body) == 1, function.name
        assert isinstance(function.body[0], ast.Return), function.name
        assert ast.unparse(function.body[0]).startswith(("return api.", "return answers.")), function.name
    assert {type(node) for node in tree.body} == {ast.Expr, ast.ImportFrom, ast.Assign, ast.FunctionDef}


def test_no_module_is_a_drawer():
    assert not {"utils", "helpers", "common", "constants", "types", "misc"} & set(modules())


def test_lambda_gets_only_what_it_needs():
    shipped = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]

    assert shipped == [
        "fastjsonschema", "filetype", "imagesize", "requests", "standardwebhooks",
        "certifi", "charset-normalizer", "idna", "urllib3",
    ]  # fmt: skip
    assert (ROOT / "requirements-dev.txt").read_text().startswith("-r requirements.txt\n")
    assert "requirements-dev.txt" in (ROOT / "requirements.txt").read_text().splitlines()[0]


IGNORED = re.compile(r"#\s*(noqa|type: ignore|mypy:|ruff:)")
WITH_REASON = re.compile(r"# (noqa: [A-Z]+[0-9]+|type: ignore\[[a-z-]+\])  # \w+")


def test_whatever_a_linter_passes_over_has_its_reason_beside_it():
    folders = ("chalicelib", "tools", "tests", "bench")
    paths = [ROOT / "app.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    lines = [
        (path.name, line)
        for path in paths
        if path != Path(__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if IGNORED.search(line)
    ]

    assert [line for line in lines if not WITH_REASON.search(line[1])] == []


def test_whatever_the_linters_are_told_to_pass_over_has_its_reason_too():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    passed_over = re.findall(r'^(?:  "[A-Z]+[0-9]+",.*|ignore_.* = true.*|.* = false.*)$', settings, flags=re.MULTILINE)

    assert len(passed_over) == 6
    assert [line for line in passed_over if not re.search(r"# \w+", line)] == []
