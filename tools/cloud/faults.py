"""
What is to go wrong in the local cloud, for whoever rehearses it.

`POST /simulate` says all that goes wrong from now on, a fault for each part: {"r2": "down", "d1": {"fault": "locked",
"seconds": 60}}; {} has all be well again. It stays until the next such call, or until the process ends. `GET /simulate`
tells what is on. The faults, and what beside `fault` may be said of them:

    down     nothing is done, the answer is 503
    slow     the answer comes `seconds` (5) late
    lost     it is done, but the answer is 502
    denied   the key was revoked: what the part says to a stranger
    locked   d1: 429, with `seconds` (300) in Retry-After
    errors   runpod: 500
    failing  runpod: a run that is sent meanwhile ends with FAILED and `error`

For runpod `endpoint` names the only one that is concerned, and `only`: "run" leaves all calls but /run alone.

Beside the parts `calls_left` has Cloudflare's present window begin anew, with so many calls, where they are counted.
"""

import json
import re
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from tools.cloud import Answer, Request, json_answer
from tools.cloud.rate_limit import CALLS, RateLimit, refusal

PARTS = {
    "d1": ("down", "slow", "lost", "denied", "locked"),
    "r2": ("down", "slow", "lost", "denied"),
    "runpod": ("down", "slow", "lost", "denied", "errors", "failing"),
    "cdn": ("down", "slow"),
    "results": ("down", "slow"),
}
SECONDS = {"slow": 5.0, "locked": 300.0}  # where none are said
MOST_SECONDS = 3600
ERROR = "CUDA out of memory"  # where none is said


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one part."""

    fault: str
    seconds: float | None = None
    error: str | None = None
    only: str | None = None
    endpoint: str | None = None


class Faults:
    """What goes wrong now."""

    def __init__(self, rate_limit: RateLimit | None, endpoints: Collection[str]) -> None:
        self._rate_limit = rate_limit
        self._endpoints = endpoints
        self._faults: dict[str, Fault] = {}

    def handle(self, request: Request) -> Answer:
        """Answer a call that asks for faults, or for which there are."""
        if request.method not in ("GET", "POST"):
            return json_answer(405, {"error": "GET tells what is on, POST says what is to be."})
        if request.method == "POST":
            try:
                self._set(_read_json(request.body))
            except ValueError as error:
                return json_answer(400, {"error": f"Nothing was changed: {error}."})
        shown = {part: _shown(fault) for part, fault in self._faults.items()}
        left = {"calls_left": self._rate_limit.calls_left()} if self._rate_limit else {}
        return json_answer(200, shown | left)

    def answer(self, part: str, request: Request, handle: Callable[[Request], Answer]) -> Answer:
        """What the part answers with its fault, if it has one."""
        fault = self._faults.get(part)
        if fault is None or (part == "runpod" and not _concerns(fault, request)):
            return handle(request)
        match fault.fault:
            case "down":
                return _gateway(503, "Service Unavailable", request)
            case "slow":
                time.sleep(fault.seconds or SECONDS["slow"])
            case "lost":
                handle(request)
                return _gateway(502, "Bad Gateway", request)
            case "denied":
                return handle(_with_another_key(request))
            case "locked":
                return refusal(fault.seconds or SECONDS["locked"])
            case "errors":
                return json_answer(500, {"status": 500, "title": "Internal Server Error", "detail": "simulated"})
            case "failing":
                return handle(_failing(request, fault.error or ERROR))
        return handle(request)

    def _set(self, wish: Any) -> None:
        """Raises ValueError, and changes nothing, where the wish is none."""
        if not isinstance(wish, (dict, type(None))):
            raise ValueError('the body must be an object, as {} or {"r2": "down"}')
        given = dict(wish or {})
        calls_left = given.pop("calls_left", None)
        faults = {part: self._read(part, fault) for part, fault in given.items() if fault not in (None, {})}
        if calls_left is not None:
            self._leave(calls_left)
        self._faults = faults

    def _leave(self, calls: Any) -> None:
        if self._rate_limit is None:
            raise ValueError("calls are not counted here, so there is no calls_left")
        if type(calls) is not int or not 0 <= calls <= CALLS:
            raise ValueError(f"calls_left must be a whole number from 0 to {CALLS}")
        self._rate_limit.leave(calls)

    def _read(self, part: str, given: Any) -> Fault:
        wish = {"fault": given} if isinstance(given, str) else given
        if part not in PARTS:
            raise ValueError(f"there is no {part!r}, but {', '.join(PARTS)} and calls_left")
        if not isinstance(wish, dict) or wish.get("fault") not in PARTS[part]:
            raise ValueError(f"the fault of {part} must be one of {', '.join(PARTS[part])}")
        if unknown := sorted(set(wish) - {"fault", *_options(part, wish["fault"])}):
            raise ValueError(f"{part} {wish['fault']} takes no {unknown[0]!r}")
        fault = Fault(**wish)
        if wrong := self._wrong(fault):
            raise ValueError(wrong)
        return fault

    def _wrong(self, fault: Fault) -> str | None:
        is_number = isinstance(fault.seconds, (int, float)) and not isinstance(fault.seconds, bool)
        if fault.seconds is not None and not (is_number and 0 < fault.seconds <= MOST_SECONDS):
            return f"seconds must be a number over 0, at most {MOST_SECONDS}"
        if not isinstance(fault.error, (str, type(None))):
            return "error must be a text"
        if fault.only not in (None, "run"):
            return 'only must be "run"'
        if fault.endpoint not in (None, *self._endpoints):
            return f"the endpoints are {', '.join(self._endpoints)}"
        return None


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise ValueError("the body is no JSON") from error


def _options(part: str, fault: str) -> list[str]:
    """What may be said beside the fault."""
    own = ["seconds"] if fault in SECONDS else ["error"] if fault == "failing" else []
    if part != "runpod":
        return own
    return [*own, "endpoint"] if fault == "failing" else [*own, "only", "endpoint"]


def _shown(fault: Fault) -> Any:
    said = {name: value for name, value in asdict(fault).items() if value is not None}
    return fault.fault if len(said) == 1 else said


def _concerns(fault: Fault, request: Request) -> bool:
    endpoint, _, operation = request.path.removeprefix("/v2/").partition("/")
    is_meant = fault.endpoint in (None, endpoint) and fault.only in (None, operation)
    return is_meant and not operation.startswith("simulate/")  # which is no call of RunPod's


def _with_another_key(request: Request) -> Request:
    """The request with a key that is nobody's, be it a bearer's, or one that signs the head or the link."""
    given = request.headers.get("authorization", "")
    other = {"authorization": re.sub(r"(^Bearer |Credential=)[^/,]+", r"\1revoked", given)} if given else {}
    query = re.sub(r"(X-Amz-Credential=)[^%/&]+", r"\1revoked", request.query)
    return replace(request, headers=request.headers | other, query=query)


def _failing(request: Request, error: str) -> Request:
    """The request, where it is a /run, with the wish to fail in its input."""
    try:
        order = json.loads(request.body)
    except ValueError:
        return request
    if not request.path.endswith("/run") or not isinstance(order, dict) or not isinstance(order.get("input"), dict):
        return request
    asked = order["input"].get("simulate")
    wish = {**(asked if isinstance(asked, dict) else {}), "status": "FAILED", "error": error}
    return replace(request, body=json.dumps({**order, "input": {**order["input"], "simulate": wish}}).encode())


def _gateway(status: int, title: str, request: Request) -> Answer:
    """What a gateway answers in the place of what is behind it; to a HEAD without a body."""
    page = f"<html><head><title>{status} {title}</title></head><body><h1>{status} {title}</h1></body></html>"
    return Answer(status, b"" if request.method == "HEAD" else page.encode(), {"Content-Type": "text/html"})
