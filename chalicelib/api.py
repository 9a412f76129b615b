"""The answers of every route, and what the schedule runs: requests in, JSON out."""

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from chalice.app import Request, Response

from chalicelib import advice, answers, inputs
from chalicelib.answers import Answer, Call, route
from chalicelib.auth import Right
from chalicelib.bootstrap import service
from chalicelib.errors import IndeterminateError, RequestError
from chalicelib.jobs import FINAL, Job, Status
from chalicelib.runtime import Deadline

# Bodies are JSON whatever they are called: a browser's fetch says text/plain and curl -d says form.
BODY_TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded"]

SERVICE = "ob-ai-studio"
REQUEST_SECONDS = 24.0  # every request is over in 25 s; API Gateway gives up after 29
READ_SECONDS = 10.0
DEV_ROUND_SECONDS = 20.0
HEALTH_SECONDS = 20.0
SCHEDULE_RESERVE = 0.5  # seconds of the Lambda's time kept for returning


def get_health(request: Request | None) -> Response:
    """Alive: open, without settings, without a call to anywhere."""
    return answers.respond(200, {"ok": True, "service": SERVICE})


@route(Right.READ)
def get_deep_health(call: Call) -> Answer:
    """Alive; with `deep=1` whether all that the service needs is so, too."""
    deep = inputs.read_flag("deep", inputs.query_of(call.request).get("deep"))
    if not deep:
        return {"service": SERVICE}
    found = call.service.health.look(Deadline(call.service.clock, HEALTH_SECONDS))
    return {"service": SERVICE, **advice.in_short(found)}


@route(Right.WRITE, anonymous=True)
def create_job(call: Call) -> Answer:
    """Queue a job, and send it to RunPod at once."""
    body = inputs.read_body(call.request)
    model = inputs.read_model(body)
    prompt, payload = inputs.read_prompt_and_input(body)
    job = call.service.pipeline.new_job(prompt=prompt, model=model, payload=payload)
    try:
        call.service.pipeline.create(job, Deadline(call.service.clock, REQUEST_SECONDS))
    except IndeterminateError as error:
        error.sentence += " The job may have been made all the same: ask for it by this id before you send it again."
        error.job_id = job.id
        raise
    return {"id": job.id, "status": Status.QUEUED}


@route(Right.READ, anonymous=True)
def get_status(call: Call, job_id: str | None = None) -> Answer:
    """One job, flat, as the earlier version's clients read it."""
    asked = unquote(job_id) if job_id is not None else inputs.query_of(call.request).get("id", "")
    if not asked.strip():
        raise RequestError("id_required", "id is required: /api/queue/status?id=…")
    return call.service.views.job(_found(call.service.store.get(inputs.read_id(asked), timeout=READ_SECONDS)))


@route(Right.READ)
def list_jobs(call: Call) -> Answer:
    """Jobs, newest first."""
    query = inputs.query_of(call.request)
    limit, status, after = (
        inputs.read_limit(query.get("limit")),
        inputs.read_status(query.get("status")),
        inputs.read_cursor(query.get("cursor")),
    )
    found = call.service.store.newest(limit=limit + 1, after=after, status=status, timeout=READ_SECONDS)
    page = found[:limit]
    more = len(found) > limit
    return {
        "jobs": [call.service.views.job(job) for job in page],
        "next_cursor": inputs.make_cursor(page[-1].created_at, page[-1].id) if more else None,
    }


@route(Right.READ)
def get_job(call: Call, job_id: str) -> Answer:
    """One job with its timeline."""
    job, timeline = call.service.store.get_with_timeline(inputs.read_id(unquote(job_id)), timeout=READ_SECONDS)
    lines = [{"at": line["at"], "event": line["event"], **json.loads(line["detail"])} for line in timeline]
    return {"job": {**call.service.views.job(_found(job)), "timeline": lines}}


@route(Right.WRITE)
def cancel_job(call: Call, job_id: str) -> Answer:
    """Cancel a job that waits, or stop its run."""
    return _do(call, call.service.verbs.cancel, job_id)


@route(Right.WRITE)
def retry_job(call: Call, job_id: str) -> Answer:
    """Draw a job once more that has ended without a picture."""
    return _do(call, call.service.verbs.retry, job_id)


@route(Right.WRITE)
def redrive_job(call: Call, job_id: str) -> Answer:
    """Store the result of a dead letter."""
    return _do(call, call.service.verbs.redrive, job_id)


def _do(call: Call, verb: Callable[[str, Deadline], Job], job_id: str) -> Answer:
    job = verb(inputs.read_id(unquote(job_id)), Deadline(call.service.clock, REQUEST_SECONDS))
    return {"job": call.service.views.job(job)}


@route(Right.READ)
def list_dead_letters(call: Call) -> Answer:
    """Results that could not be stored, newest first."""
    query = inputs.query_of(call.request)
    limit, after, code = (
        inputs.read_limit(query.get("limit")),
        inputs.read_cursor(query.get("cursor")),
        inputs.read_error_code(query.get("error_code")),
    )
    found = call.service.store.dead_letters(limit=limit + 1, after=after, error_code=code, timeout=READ_SECONDS)
    page = found[:limit]
    return {
        "dead_letters": [call.service.views.dead_letter(job) for job in page],
        "next_cursor": inputs.make_cursor(page[-1].dead_at, page[-1].id) if len(found) > limit else None,
    }


@route(Right.ADMIN)
def redrive_dead_letters(call: Call) -> Answer:
    """Store the results of many dead letters, as far as something is left of them."""
    limit, after, code, dry_run = inputs.read_redrive(inputs.read_body(call.request, empty_is={}))
    deadline = Deadline(call.service.clock, REQUEST_SECONDS)
    came = call.service.verbs.redrive_many(deadline, limit=limit, after=after, error_code=code, dry_run=dry_run)
    return {
        "dry_run": dry_run,
        "redriven": [job.id for job in came.redriven],
        "lost": [job.id for job in came.lost],
        "unknown": [job.id for job in came.unknown],
        "next_cursor": inputs.make_cursor(came.last.dead_at, came.last.id) if came.last else None,
    }


@route(None)
def hear_of_run(call: Call, job_id: str, attempt: str, token: str) -> Answer:
    """RunPod says that a run has ended."""
    body = call.request.raw_body
    said = call.service.pipeline.webhook(
        inputs.read_id(unquote(job_id)),
        attempt,
        token,
        body.encode("utf-8", "replace") if isinstance(body, str) else body,
        Deadline(call.service.clock, REQUEST_SECONDS),
    )
    return {"message": said}


@route(Right.ADMIN)
def send_job(call: Call) -> Answer:
    """Send one waiting job to RunPod now."""
    body = inputs.read_body(call.request, empty_is={})
    job_id = body.get("jobId")
    if (body and job_id is None) or (job_id is not None and (not isinstance(job_id, str) or not job_id.strip())):
        raise RequestError(
            "job_id_invalid", "jobId must be the id of a job; send no body at all for the oldest one that waits."
        )
    job, error = call.service.pipeline.send_one(
        None if job_id is None else inputs.read_id(job_id), Deadline(call.service.clock, REQUEST_SECONDS)
    )
    if error:
        raise error
    if job is None and job_id is None:
        return {"message": "no queued job"}
    job = _found(job)
    if job.status in FINAL:
        raise RequestError("job_final", f"This job is {job.status} already; it is not sent again.")
    return {"job_id": job.id, "runpod": {"id": job.runpod_job_id or None, "status": job.runpod_status}}


@route(Right.ADMIN)
def run_round(call: Call) -> Answer:
    """Run one whole round now, due or not."""
    report = call.service.pipeline.run_round(Deadline(call.service.clock, DEV_ROUND_SECONDS), ignore_due=True)
    return {"checked": report.checked, "updated": [call.service.views.update(job) for job in report.updated]}


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
