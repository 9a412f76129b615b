"""
The rules that the service's bucket needs, in the form of Cloudflare's API, and which of them a bucket lacks.

https://developers.cloudflare.com/r2/buckets/cors/ and https://developers.cloudflare.com/r2/buckets/object-lifecycles/
"""

import json
from pathlib import Path

from tools.cloudflare import Result

CORS_FILE = Path(__file__).parent.parent / "r2-cors.json"
DAY = 86_400  # seconds
PICTURES = ("jobs/", "uploads/")  # what no rule may delete: the service itself sweeps unused uploads
# Leftovers: of the doctor's tests, and of uploads in parts that were broken off, which R2 else keeps for a week. None
# touches an object under PICTURES.
LIFECYCLE: tuple[Result, ...] = (
    {
        "id": "ob-ai-studio-health",
        "enabled": True,
        "conditions": {"prefix": "health/"},
        "deleteObjectsTransition": {"condition": {"type": "Age", "maxAge": DAY}},
    },
    *(
        {
            "id": f"ob-ai-studio-unfinished-{prefix.rstrip('/')}",
            "enabled": True,
            "conditions": {"prefix": prefix},
            "abortMultipartUploadsTransition": {"condition": {"type": "Age", "maxAge": DAY}},
        }
        for prefix in PICTURES
    ),
)


def our_cors(path: Path = CORS_FILE) -> list[Result]:
    """The rules of r2-cors.json, which has S3's form, in that of Cloudflare's API."""
    return [
        {
            "allowed": {
                "origins": rule["AllowedOrigins"],
                "methods": rule["AllowedMethods"],
                "headers": rule["AllowedHeaders"],
            },
            "exposeHeaders": rule["ExposeHeaders"],
            "maxAgeSeconds": rule["MaxAgeSeconds"],
        }
        for rule in json.loads(path.read_text(encoding="utf-8"))
    ]


def lacking_cors(there: list[Result]) -> list[Result]:
    """Those of our rules that none of the bucket's includes; `*` for headers is reported to be none that R2 heeds."""
    return [ours for ours in our_cors() if not any(_includes(rule, ours) for rule in there)]


def _includes(rule: Result, ours: Result) -> bool:
    asked, given = ours["allowed"], rule.get("allowed") or {}
    return (
        _has_all(given.get("origins"), asked["origins"])
        and set(asked["methods"]) <= set(given.get("methods") or [])
        and _has_all(given.get("headers"), asked["headers"])
        and _has_all(rule.get("exposeHeaders"), ours["exposeHeaders"])
    )


def _has_all(given: list[str] | None, asked: list[str]) -> bool:
    return {name.lower() for name in asked} <= {name.lower() for name in given or []}


def lacking_lifecycle(there: list[Result]) -> list[Result]:
    """Those of our rules that are not there; one with the id of ours is there, however it was changed."""
    ids = {rule.get("id") for rule in there}
    return [ours for ours in LIFECYCLE if ours["id"] not in ids and not any(_same(rule, ours) for rule in there)]


def _same(rule: Result, ours: Result) -> bool:
    return {**rule, "id": ""} == {**ours, "id": ""}


def deletes_pictures(rule: Result) -> bool:
    """Whether it would remove what jobs made, or what goes into them."""
    prefix = _prefix(rule)
    near = any(pictures.startswith(prefix) or prefix.startswith(pictures) for pictures in PICTURES)
    return bool(rule.get("enabled") and rule.get("deleteObjectsTransition") and near)


def _prefix(rule: Result) -> str:
    prefix: str = (rule.get("conditions") or {}).get("prefix") or ""
    return prefix


def cors_in_words(rule: Result) -> str:
    """Who may do what."""
    allowed = rule.get("allowed") or {}
    origins, methods, headers = (", ".join(allowed.get(name) or []) for name in ("origins", "methods", "headers"))
    exposed = ", ".join(rule.get("exposeHeaders") or [])
    return f"{origins}: {methods}{headers and f' with {headers}'}{exposed and f', and read {exposed}'}"


def lifecycle_in_words(rule: Result) -> str:
    """What it does, and when."""
    what = f"under {_prefix(rule)}" if _prefix(rule) else "in the whole bucket"
    moves = []
    if transition := rule.get("deleteObjectsTransition"):
        moves.append(f"deletes objects {what} {_when(transition)}")
    if transition := rule.get("abortMultipartUploadsTransition"):
        moves.append(f"gives up unfinished uploads {what} {_when(transition)}")
    for transition in rule.get("storageClassTransitions") or []:
        moves.append(f"moves objects {what} to {transition.get('storageClass')} {_when(transition)}")
    return f"{rule.get('id')}: {', '.join(moves) or 'does nothing'}{'' if rule.get('enabled') else ' (off)'}"


def _when(transition: Result) -> str:
    condition = transition.get("condition") or {}
    if "maxAge" not in condition:
        return f"on {condition.get('date')}"
    days = condition["maxAge"] / DAY
    return f"after {days:g} day{'' if days == 1 else 's'}"
