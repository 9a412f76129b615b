"""The edge: who calls, and every answer in one shape, with the request's id that the logs have too."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any, Concatenate, ParamSpec

from chalice.app import Request, Response

from chalicelib import auth, log
from chalicelib.auth import Right
from chalicelib.bootstrap import Service, service
from chalicelib.errors import RequestError, ServiceError
from chalicelib.records import dataclass

# Chalice's own refusals, by the code it gives them.
CHALICE_ERRORS = {
    "MethodNotAllowedError": ("method_not_allowed", "This path does not take that method; Allow names those it takes."),
    "UnsupportedMediaType": ("unsupported_media_type", "Send the body as JSON, with Content-Type: application/json."),
    "BadRequestError": ("request_refused", "The request could not be read."),
    "BadRequest": ("request_refused", "The request could not be read."),
}
CRASHED = ("internal_error", "Something failed inside the service; it is in the logs. Try again.")

# Of Cloudflare's API calls, that a request leaves for others: who asks for the rounds and for who creates, all for the
# rounds. A round makes some twenty in five minutes, and more only where jobs end.
KEPT_CALLS = {Right.READ: 150, Right.WRITE: 50, Right.ADMIN: 50}

ANONYMOUS = "anonymous"  # who calls without a key, where that is allowed

Args = ParamSpec("Args")
Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, by whom, and what its answer says in headers."""

    service: Service
    request: Request
    caller: str
    headers: dict[str, str] = field(default_factory=dict)


View = Callable[Concatenate[Call, Args], Answer]


def route(
    right: Right | None, *, anonymous: bool = False, etag: bool = False, calls_d1: bool = True
) -> Callable[[View[Args]], Callable[Concatenate[Request | None, Args], Response]]:
    """
    Check that the key has the right, run the view, and turn what it returns or raises into an answer.

    Some are `anonymous` where the operator wants it; a view without a right checks by itself who calls, and how many
    calls to D1 are left. With `etag` the answer has one, and is 304 where the caller has it already.
    """

    def wrap(view: View[Args]) -> Callable[Concatenate[Request | None, Args], Response]:
        def answer(request: Request | None, /, *args: Args.args, **kwargs: Args.kwargs) -> Response:
            assert request is not None
            try:
                current = service()
                call = Call(service=current, request=request, caller=_caller(current, request, right, anonymous))
                log.add(caller=call.caller)
                if right is not None and calls_d1:
                    current.require_calls(KEPT_CALLS[right])
                with _forgetting(call):
                    answer = {"ok": True, **view(call, *args, **kwargs)}
                response = respond(200 if answer["ok"] else 503, answer, call.headers)
                return unless_known(request, response) if etag else response
            except ServiceError as error:
                return refuse(error)
            except Exception:
                log.crashed("request_crashed")
                return refuse(ServiceError(*CRASHED))

        return answer

    return wrap


@contextmanager
def _forgetting(call: Call) -> Iterator[None]:
    """Whoever has written something, or may have, reads it at once."""
    try:
        yield
    finally:
        if call.request.method != "GET":
            call.service.forget_reads()


def _caller(current: Service, request: Request, right: Right | None, anonymous: bool) -> str:
    if right is None:
        return "runpod"
    header, keys = request.headers.get("authorization", ""), current.settings.api_key_hashes
    if anonymous and current.settings.allow_anonymous:
        key = auth.identify(header, keys)
        return key.name if key else ANONYMOUS
    key = auth.require_key(header, keys)
    log.add(caller=key.name)
    auth.require_right(key, right)
    return key.name


def respond(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    # Serialised here because what Chalice cannot serialise fails outside its own error handling.
    text = json.dumps(body, ensure_ascii=False)
    return Response(
        body=text,
        status_code=status,
        headers={"Content-Type": "application/json", "Cache-Control": "no-store", **(headers or {})},
    )


def unless_known(request: Request, response: Response) -> Response:
    """The answer with its ETag; without a body where the caller names that ETag."""
    # Weak, for what lies between may compress it.
    etag = f'W/"{hashlib.sha256(response.body.encode()).hexdigest()[:32]}"'
    response.headers.update({"ETag": etag, "Cache-Control": "private, no-cache"})
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag.removeprefix("W/") in known or known == ["*"]:
        response.status_code, response.body = 304, ""
    return response


def refuse(error: ServiceError) -> Response:
    """The answer to what cannot be done, which the log has too where that is not the caller's fault."""
    if not isinstance(error, RequestError):
        log.failed("request_failed", error)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    about = {"id": error.job_id} if error.job_id else {}
    return respond(error.http_status, {"ok": False, "error": error.sentence, "code": error.code, **about}, headers)


def finish(request: Request, get_response: Callable[[Request], Response]) -> Response:
    """Around every request: an id for its answer and log lines, and for Chalice's own refusals the shape of ours."""
    begun = time.monotonic()
    request_id = request.lambda_context.aws_request_id if request.lambda_context else ""
    log.begin(request_id)
    response = get_response(request)
    _shape(response)
    response.headers["X-Request-Id"] = request_id
    log.answered(request.method, request.path, response.status_code, time.monotonic() - begun)
    return response


def _shape(response: Response) -> None:
    body = response.body
    if isinstance(body, dict) and "Code" in body:
        code, sentence = CHALICE_ERRORS.get(body["Code"], CRASHED)
        shaped = respond(response.status_code, {"ok": False, "error": sentence, "code": code})
        response.body = shaped.body
        response.headers = {**response.headers, **shaped.headers}
    response.headers.setdefault("Access-Control-Allow-Origin", "*")
