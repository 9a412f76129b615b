"""The document of the API, and whether an answer is one that stands in it."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jsonschema_rs import Draft202012Validator

import app

DOCUMENT = json.loads((Path(app.__file__).parent / "chalicelib" / "openapi.json").read_text(encoding="utf-8"))

# Headers by which an answer says something of itself; the date is the server's own.
TELLING = {*app.app.api.cors.get_access_control_headers()["Access-Control-Expose-Headers"].split(",")} - {"Date"}

Part = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one answer of an operation may be."""

    headers: Mapping[str, Part]
    required: frozenset[str]
    head: Draft202012Validator
    body: Draft202012Validator | None  # None: it has none, or one of the texts
    texts: frozenset[str]

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Raises AssertionError, or ValidationError."""
        given = {name.lower(): value for name, value in headers.items()}
        assert self.required <= given.keys(), f"lacks {sorted(self.required - given.keys())}"
        telling = {name.lower() for name in TELLING} & given.keys()
        assert telling <= self.headers.keys(), f"has {sorted(telling)}"
        self.head.validate({name: _typed(given[name], self.headers[name]) for name in self.headers if name in given})
        if self.texts:
            assert given["content-type"].partition(";")[0] in self.texts
            assert body.decode()
        elif self.body is None:
            assert body == b""
        else:
            self.body.validate(json.loads(body))


def operations() -> dict[tuple[str, str], Part]:
    """Every operation, by its method and path."""
    return {(method.upper(), path): part for path, item in DOCUMENT["paths"].items() for method, part in item.items()}


def resolve(part: Part) -> Part:
    """The part itself, where it only refers to another."""
    while "$ref" in part:
        names = part["$ref"].removeprefix("#/").split("/")
        part = DOCUMENT
        for name in names:
            part = part[name]
    return part


def parts(within: Any) -> Iterator[Part]:
    """Every object of the document that is there or further in."""
    if isinstance(within, dict):
        yield within
    for inner in within.values() if isinstance(within, dict) else within if isinstance(within, list) else ():
        yield from parts(inner)


def codes(response: Part) -> set[str]:
    """The codes that an answer may have, as far as they are named."""
    return {code for part in parts(resolve(response)) if "code" in part for code in part["code"].get("enum", ())}


def check(method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Hold an answer of the service against the document. Raises AssertionError, or ValidationError."""
    known = path_of(urlsplit(path).path)
    assert known is not None, f"the document has no path {path}"
    _shape(method, known, status).check(headers, body)


@cache
def path_of(path: str) -> str | None:
    """The path of the document that is meant; one without parameters goes first."""
    for known in sorted(DOCUMENT["paths"], key=lambda known: known.count("{")):
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(known)), path):
            return str(known)
    return None


@cache
def _shape(method: str, path: str, status: int) -> Shape:
    operation = operations().get((method, path))
    if operation is None:  # then Chalice has answered, as it does on every path
        responses: Part = {"405": DOCUMENT["components"]["responses"]["MethodNotAllowed"]}
    else:
        responses = operation["responses"]
    assert str(status) in responses, f"the document has no {status} of {method} {path}"
    response = resolve(responses[str(status)])
    headers = {name.lower(): resolve(header) for name, header in response["headers"].items()}
    required = {name for name, header in headers.items() if header.get("required")}
    content = response.get("content", {})
    return Shape(
        headers=headers,
        required=frozenset(required),
        head=validator({"properties": {name: header["schema"] for name, header in headers.items()}}),
        body=validator(content["application/json"]["schema"]) if "application/json" in content else None,
        texts=frozenset(name for name in content if name.startswith("text/")),
    )


def validator(schema: Part) -> Draft202012Validator:
    """Of one schema of the document."""
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def _typed(text: str, header: Part) -> str | int:
    return int(text) if header["schema"].get("type") == "integer" and text.isdigit() else text
