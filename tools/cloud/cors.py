"""What a bucket tells pages of other origins, by its rules; those of the first bucket are in r2-cors.json."""

import json
from pathlib import Path
from typing import Any

from tools.cloud import Answer, Request

RULES = Path(__file__).parents[2] / "r2-cors.json"


class Cors:
    """The rules of one bucket, as Cloudflare's API has them."""

    def __init__(self, rules: list[dict[str, Any]]) -> None:
        self.rules = rules

    def preflight(self, request: Request) -> Answer | None:
        """The answer to a browser that asks what it may do; None where it may not."""
        asked = request.headers.get("access-control-request-headers", "").lower().split(",")
        names = {name.strip() for name in asked} - {""}
        rule = self._rule(request, request.headers.get("access-control-request-method", ""), names)
        if rule is None:
            return None
        allowed = {
            "Access-Control-Allow-Origin": _origin(rule, request),
            "Access-Control-Allow-Methods": ", ".join(rule["allowed"]["methods"]),
            "Access-Control-Allow-Headers": ", ".join(rule["allowed"].get("headers", [])),
            "Access-Control-Max-Age": str(rule.get("maxAgeSeconds", 0)),
        }
        return Answer(204, b"", allowed)

    def headers(self, request: Request) -> dict[str, str]:
        """What goes with the answer to the request itself; nothing where no rule allows it, or no page asks."""
        rule = self._rule(request, request.method, set())
        if rule is None:
            return {}
        return {
            "Access-Control-Allow-Origin": _origin(rule, request),
            "Access-Control-Expose-Headers": ", ".join(rule.get("exposeHeaders", [])),
        }

    def _rule(self, request: Request, method: str, names: set[str]) -> dict[str, Any] | None:
        origin = request.headers.get("origin")
        for rule in self.rules:
            allowed = {name.lower() for name in rule["allowed"].get("headers", [])}
            known = origin and not {origin, "*"}.isdisjoint(rule["allowed"]["origins"])
            if known and method in rule["allowed"]["methods"] and names <= allowed:
                return rule
        return None


def _origin(rule: dict[str, Any], request: Request) -> str:
    return "*" if "*" in rule["allowed"]["origins"] else request.headers["origin"]


def of_file(path: Path = RULES) -> Cors:
    """The rules of a file, which has S3's form."""
    return Cors(
        [
            {
                "allowed": {
                    "origins": rule["AllowedOrigins"],
                    "methods": rule["AllowedMethods"],
                    "headers": rule.get("AllowedHeaders", []),
                },
                "exposeHeaders": rule.get("ExposeHeaders", []),
                "maxAgeSeconds": rule.get("MaxAgeSeconds", 0),
            }
            for rule in json.loads(path.read_text(encoding="utf-8"))
        ]
    )
