"""The answers of every route, and what the schedule runs: requests in, JSON out, errors in one shape."""

import json
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec
from urllib.parse import unquote

from chalice.app import Request, Response

from chalicelib import advice, auth, inputs, log
from chalicelib.bootstrap import Service, service
from chalicelib.errors import IndeterminateError, RequestError, ServiceError
from chalicelib.jobs import FINAL, Job, State, Status, to_text
from chalicelib.runtime import Deadline

# Bodies are JSON whatever they are called: a browser's fetch says text/plain and curl -d says form.
BODY_TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded"]

SERVICE = "ob-ai-studio"
REQUEST_SECONDS = 24.0  # every request is over in 25 s; API Gateway gives up after 29
READ_SECONDS = 10.0
DEV_ROUND_SECONDS = 20.0
HEALTH_SECONDS = 20.0
PRESIGNED_SECONDS = 3600  # that a link to a file of a private bucket holds
SCHEDULE_RESERVE = 0.5  # seconds of the Lambda's time kept for returning

# Chalice's own refusals, by the code it gives them.
CHALICE_ERRORS = {
    "MethodNotAllowedError": ("method_not_allowed", "This path does not take that method; Allow names those it takes."),
    "UnsupportedMediaType": ("unsupported_media_type", "Send the body as JSON, with Content-Type: application/json."),
    "BadRequestError": ("request_refused", "The request could not be read."),
    "BadRequest": ("request_refused", "The request could not be read."),
}

Args = ParamSpec("Args")
Answer = dict[str, Any]
View = Callable[Concatenate[Service, Request, Args], Answer]


def _route(
    *, anonymous: bool = False, keyless: bool = False
) -> Callable[[View[Args]], Callable[Concatenate[Request | None, Args], Response]]:
    """
    Check the key, run the view, and turn what it returns or raises into an answer. Some are `anonymous` where the
    operator wants it; a `keyless` view checks by itself who calls.
    """

    def wrap(view: View[Args]) -> Callable[Concatenate[Request | None, Args], Response]:
        def answer(request: Request | None, /, *args: Args.args, **kwargs: Args.kwargs) -> Response:
            assert request is not None
            try:
                current = service()
                if not keyless and not (anonymous and current.settings.allow_anonymous):
                    auth.require_key(request.headers.get("authorization", ""), current.settings)
                answer = {"ok": True, **view(current, request, *args, **kwargs)}
                return _respond(200 if answer["ok"] else 503, answer)
            except ServiceError as error:
                return _refuse(error)
            except Exception:
                log.crashed("request_crashed")
                return _refuse(
                    ServiceError("internal_error", "Something failed inside the service; it is in the logs. Try again.")
                )

        return answer

    return wrap


def _respond(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    # Serialised here because what Chalice cannot serialise fails outside its own error handling.
    text = json.dumps(body, ensure_ascii=False)
    return Response(
        body=text,
        status_code=status,
        headers={"Content-Type": "application/json", "Cache-Control": "no-store", **(headers or {})},
    )


def _refuse(error: ServiceError) -> Response:
    if not isinstance(error, RequestError):
        log.failed("request_failed", error)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    about = {"id": error.job_id} if error.job_id else {}
    return _respond(error.http_status, {"ok": False, "error": error.sentence, "code": error.code, **about}, headers)


def shape_chalice_errors(response: Response) -> Response:
    """Give Chalice's own refusals the shape of ours, and let pages of any origin read every one of them."""
    body = response.body
    if isinstance(body, dict) and "Code" in body:
        code, sentence = CHALICE_ERRORS.get(
            body["Code"], ("internal_error", "Something failed inside the service; it is in the logs. Try again.")
        )
        shaped = _respond(response.status_code, {"ok": False, "error": sentence, "code": code})
        response.body = shaped.body
        response.headers = {**response.headers, **shaped.headers}
    response.headers.setdefault("Access-Control-Allow-Origin", "*")
    return response


def get_health(request: Request | None) -> Response:
    """Alive: open, without settings, without a call to anywhere."""
    return _respond(200, {"ok": True, "service": SERVICE})


@_route()
def get_deep_health(current: Service, request: Request) -> Answer:
    """Alive; with `deep=1` whether all that the service needs is so, too."""
    deep = inputs.read_flag("deep", inputs.query_of(request).get("deep"))
    if not deep:
        return {"service": SERVICE}
    found = current.health.look(Deadline(current.clock, HEALTH_SECONDS))
    return {"service": SERVICE, **advice.in_short(found)}


@_route(anonymous=True)
def create_job(current: Service, request: Request) -> Answer:
    """Queue a job, and send it to RunPod at once."""
    body = inputs.read_body(request)
    model = inputs.read_model(body)
    prompt, payload = inputs.read_prompt_and_input(body)
    job = current.pipeline.new_job(prompt=prompt, model=model, payload=payload)
    try:
        current.pipeline.create(job, Deadline(current.clock, REQUEST_SECONDS))
    except IndeterminateError as error:
        error.sentence += " The job may have been made all the same: ask for it by this id before you send it again."
        error.job_id = job.id
        raise
    return {"id": job.id, "status": Status.QUEUED}


@_route(anonymous=True)
def get_status(current: Service, request: Request, job_id: str | None = None) -> Answer:
    """One job, flat, as the earlier version's clients read it."""
    asked = unquote(job_id) if job_id is not None else inputs.query_of(request).get("id", "")
    if not asked.strip():
        raise RequestError("id_required", "id is required: /api/queue/status?id=…")
    return _view(current, _found(current.store.get(inputs.read_id(asked), timeout=READ_SECONDS)))


@_route()
def list_jobs(current: Service, request: Request) -> Answer:
    """Jobs, newest first."""
    query = inputs.query_of(request)
    limit, status, after = (
        inputs.read_limit(query.get("limit")),
        inputs.read_status(query.get("status")),
        inputs.read_cursor(query.get("cursor")),
    )
    found = current.store.newest(limit=limit + 1, after=after, status=status, timeout=READ_SECONDS)
    page = found[:limit]
    more = len(found) > limit
    return {
        "jobs": [_view(current, job) for job in page],
        "next_cursor": inputs.make_cursor(page[-1].created_at, page[-1].id) if more else None,
    }


@_route()
def get_job(current: Service, request: Request, job_id: str) -> Answer:
    """One job with its timeline."""
    job, timeline = current.store.get_with_timeline(inputs.read_id(unquote(job_id)), timeout=READ_SECONDS)
    lines = [{"at": line["at"], "event": line["event"], **json.loads(line["detail"])} for line in timeline]
    return {"job": {**_view(current, _found(job)), "timeline": lines}}


@_route()
def cancel_job(current: Service, request: Request, job_id: str) -> Answer:
    """Cancel a job that waits, or stop its run."""
    return _do(current, current.pipeline.cancel, job_id)


@_route()
def retry_job(current: Service, request: Request, job_id: str) -> Answer:
    """Draw a job once more that has ended without a picture."""
    return _do(current, current.pipeline.retry, job_id)


@_route()
def redrive_job(current: Service, request: Request, job_id: str) -> Answer:
    """Store the result of a dead letter."""
    return _do(current, current.pipeline.redrive, job_id)


def _do(current: Service, verb: Callable[[str, Deadline], Job], job_id: str) -> Answer:
    job = verb(inputs.read_id(unquote(job_id)), Deadline(current.clock, REQUEST_SECONDS))
    return {"job": _view(current, job)}


@_route()
def list_dead_letters(current: Service, request: Request) -> Answer:
    """Results that could not be stored, newest first."""
    query = inputs.query_of(request)
    limit, after, code = (
        inputs.read_limit(query.get("limit")),
        inputs.read_cursor(query.get("cursor")),
        inputs.read_error_code(query.get("error_code")),
    )
    found = current.store.dead_letters(limit=limit + 1, after=after, error_code=code, timeout=READ_SECONDS)
    page = found[:limit]
    return {
        "dead_letters": [_view_dead(current, job) for job in page],
        "next_cursor": inputs.make_cursor(page[-1].dead_at, page[-1].id) if len(found) > limit else None,
    }


@_route()
def redrive_dead_letters(current: Service, request: Request) -> Answer:
    """Store the results of many dead letters, as far as something is left of them."""
    limit, after, code, dry_run = inputs.read_redrive(inputs.read_body(request, empty_is={}))
    deadline = Deadline(current.clock, REQUEST_SECONDS)
    came = current.pipeline.redrive_many(deadline, limit=limit, after=after, error_code=code, dry_run=dry_run)
    return {
        "dry_run": dry_run,
        "redriven": [job.id for job in came.redriven],
        "lost": [job.id for job in came.lost],
        "unknown": [job.id for job in came.unknown],
        "next_cursor": inputs.make_cursor(came.last.dead_at, came.last.id) if came.last else None,
    }


@_route(keyless=True)
def hear_of_run(current: Service, request: Request, job_id: str, attempt: str, token: str) -> Answer:
    """RunPod says that a run has ended."""
    body = request.raw_body
    said = current.pipeline.webhook(
        inputs.read_id(unquote(job_id)),
        attempt,
        token,
        body.encode("utf-8", "replace") if isinstance(body, str) else body,
        Deadline(current.clock, REQUEST_SECONDS),
    )
    return {"message": said}


@_route()
def send_job(current: Service, request: Request) -> Answer:
    """Send one waiting job to RunPod now."""
    body = inputs.read_body(request, empty_is={})
    job_id = body.get("jobId")
    if (body and job_id is None) or (job_id is not None and (not isinstance(job_id, str) or not job_id.strip())):
        raise RequestError(
            "job_id_invalid", "jobId must be the id of a job; send no body at all for the oldest one that waits."
        )
    job, error = current.pipeline.send_one(
        None if job_id is None else inputs.read_id(job_id), Deadline(current.clock, REQUEST_SECONDS)
    )
    if error:
        raise error
    if job is None and job_id is None:
        return {"message": "no queued job"}
    job = _found(job)
    if job.status in FINAL:
        raise RequestError("job_final", f"This job is {job.status} already; it is not sent again.")
    return {"job_id": job.id, "runpod": {"id": job.runpod_job_id or None, "status": job.runpod_status}}


@_route()
def run_round(current: Service, request: Request) -> Answer:
    """Run one whole round now, due or not."""
    report = current.pipeline.run_round(Deadline(current.clock, DEV_ROUND_SECONDS), ignore_due=True)
    return {"checked": report.checked, "updated": [_view_update(current, job) for job in report.updated]}


def run_minute(context: Any) -> Answer:
    """What the schedule calls every minute: four rounds, as far as the Lambda's time lasts."""
    current = service()
    seconds = context.get_remaining_time_in_millis() / 1000 - SCHEDULE_RESERVE
    reports = current.pipeline.run_minute(Deadline(current.clock, seconds))
    return {
        "rounds": len(reports),
        "checked": sum(report.checked for report in reports),
        "submitted": sum(report.submitted for report in reports),
        "updated": sum(len(report.updated) for report in reports),
    }


def _found(job: Job | None) -> Job:
    if job is None:
        raise RequestError("job_not_found", "There is no job with this id.")
    return job


def _view(current: Service, job: Job) -> Answer:
    # Before the links are made, and cut to whole seconds as they are, so that none ends earlier than is said.
    urls_expire_at = _expiry(current, job)
    files = [{**file, "url": _url(current, file["url"], file["key"])} for file in job.files]
    made = {file["key"]: file["url"] for file in files}
    return {
        "id": job.id,
        "status": job.status,
        "step": job.step,
        "prompt": job.prompt,
        "model": job.model,
        "result_url": job.result_url or made.get(job.result_r2_key) or _url(current, None, job.result_r2_key),
        "result_r2_key": job.result_r2_key,
        "outputs": files,
        "urls_expire_at": urls_expire_at,
        "error": job.error_message,
        "error_code": job.error_code,
        "attempt": job.attempt,
        "runpod_job_id": job.runpod_job_id,
        "runpod_status": job.runpod_status,
        "queue_ms": job.queue_ms,
        "execution_ms": job.execution_ms,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "submitted_at": job.submitted_at,
        "completed_at": job.completed_at,
        "finished_at": job.finished_at,
        "deadline_at": job.deadline_at if job.step else None,
        "cancel_at": job.cancel_at,
        "result_until": job.result_until,
        "dead_at": job.dead_at,
        "next_at": job.due_at or None if job.step else None,
    }


def _view_dead(current: Service, job: Job) -> Answer:
    gone = job.left == "runpod" and (job.result_until or "") < to_text(current.clock.now())
    left = ("part" if job.kept else "nothing") if gone else job.left
    return {
        "id": job.id,
        "prompt": job.prompt,
        "model": job.model,
        "error": job.error_message,
        "error_code": job.error_code,
        "dead_at": job.dead_at,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "tries": job.failures,
        "stored": len(job.files),
        "left": left,
        "left_until": job.result_until if job.left == "runpod" and not gone else None,
    }


def _url(current: Service, url: str | None, key: str | None) -> str | None:
    """The file's URL: the one that was stored, or the bucket's public one, or one made for this answer alone."""
    if url or not key:
        return url
    return current.bucket.public_url(key) or current.bucket.presign(key, seconds=PRESIGNED_SECONDS)


def _expiry(current: Service, job: Job) -> str | None:
    """When the URLs in this answer end; None where they last."""
    urls = [(job.result_url, job.result_r2_key), *((file["url"], file["key"]) for file in job.files)]
    if all(url or not key or current.bucket.public_url(key) for url, key in urls):
        return None
    return to_text(current.clock.now().replace(microsecond=0) + timedelta(seconds=PRESIGNED_SECONDS))


def _view_update(current: Service, job: Job) -> Answer:
    if job.state is State.DONE:
        url = _url(current, job.result_url, job.result_r2_key)
        return {"id": job.id, "status": job.status, "result_url": url, "r2_key": job.result_r2_key}
    return {"id": job.id, "status": job.status, "error": job.error_message}
