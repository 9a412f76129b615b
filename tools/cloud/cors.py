"""What a bucket tells pages of other origins, by the rules in r2-cors.json, which are those of the real bucket too."""

import json
from pathlib import Path
from typing import Any

from tools.cloud import Answer, Request

RULES = Path(__file__).parents[2] / "r2-cors.json"


class Cors:
    """The rules of one bucket."""

    def __init__(self, path: Path = RULES) -> None:
        self._rules: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))

    def preflight(self, request: Request) -> Answer | None:
        """The answer to a browser that asks what it may do; None where it may not."""
        asked = request.headers.get("access-control-request-headers", "").lower().split(",")
        names = {name.strip() for name in asked} - {""}
        rule = self._rule(request, request.headers.get("access-control-request-method", ""), names)
        if rule is None:
            return None
        allowed = {
            "Access-Control-Allow-Origin": _origin(rule, request),
            "Access-Control-Allow-Methods": ", ".join(rule["AllowedMethods"]),
            "Access-Control-Allow-Headers": ", ".join(rule.get("AllowedHeaders", [])),
            "Access-Control-Max-Age": str(rule.get("MaxAgeSeconds", 0)),
        }
        return Answer(204, b"", allowed)

    def headers(self, request: Request) -> dict[str, str]:
        """What goes with the answer to the request itself; nothing where no rule allows it, or no page asks."""
        rule = self._rule(request, request.method, set())
        if rule is None:
            return {}
        return {
            "Access-Control-Allow-Origin": _origin(rule, request),
            "Access-Control-Expose-Headers": ", ".join(rule.get("ExposeHeaders", [])),
        }

    def _rule(self, request: Request, method: str, names: set[str]) -> dict[str, Any] | None:
        origin = request.headers.get("origin")
        for rule in self._rules:
            allowed = {name.lower() for name in rule.get("AllowedHeaders", [])}
            known = origin and not {origin, "*"}.isdisjoint(rule["AllowedOrigins"])
            if known and method in rule["AllowedMethods"] and names <= allowed:
                return rule
        return None


def _origin(rule: dict[str, Any], request: Request) -> str:
    return "*" if "*" in rule["AllowedOrigins"] else request.headers["origin"]
