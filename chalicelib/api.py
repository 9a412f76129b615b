"""
The answers of every route, and what the schedule runs: requests in, JSON out.

What one route alone needs is imported there: no cold start waits for what its request has no use for.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from chalice.app import Request, Response

from chalicelib import answers, inputs, jobs, log, page, settings
from chalicelib.answers import ANONYMOUS, Answer, Call, route
from chalicelib.auth import Right
from chalicelib.bootstrap import service
from chalicelib.errors import IndeterminateError, RequestError, ServiceError, no_such_job
from chalicelib.jobs import FINAL, Job, Status
from chalicelib.runtime import Deadline

if TYPE_CHECKING:
    from chalicelib.d1 import Row

# Bodies are JSON whatever they are called: a browser's fetch says text/plain and curl -d says form.
BODY_TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded"]

SERVICE = "ob-ai-studio"
OF_PICTURES = "R2_PUBLIC_BASE_URL|R2_ENDPOINT_URL|CLOUDFLARE_ACCOUNT_ID"  # the settings that tell where they are
REQUEST_SECONDS = 24.0  # every request is over in 25 s; API Gateway gives up after 29
READ_SECONDS = 10.0
PAGE_BYTES = 4_000_000  # of the jobs of a list; a Lambda may answer 6 MB
CREATE_SECONDS = 10.0  # of a request, kept for the create itself when pictures are taken before
DEV_ROUND_SECONDS = 20.0
HEALTH_SECONDS = 20.0
SCHEDULE_RESERVE = 0.5  # seconds of the Lambda's time kept for returning


def get_page(request: Request | None) -> Response:
    """The gallery page: open."""
    assert request is not None
    return _file(request, page.INDEX, page.index(request.context["path"]), {"Content-Security-Policy": _policy()})


def _policy() -> str:
    try:
        return page.policy(settings.load(only=OF_PICTURES).picture_urls)  # no secret, which SSM may have
    except ServiceError:  # the page comes all the same, and shows what the API says of it
        return page.policy([])


def get_page_file(request: Request | None, name: str) -> Response:
    """What the gallery page is made of beside itself: open, too."""
    assert request is not None
    known = unquote(name)
    text = page.text(known)
    if text is None:
        return answers.refuse(RequestError("file_not_found", "The page has no such file."))
    return _file(request, known, text, {})


def _file(request: Request, name: str, text: str, headers: dict[str, str]) -> Response:
    response = Response(body=text, headers={"Content-Type": page.content_type(name), **page.HEADERS, **headers})
    return answers.unless_known(request, response)


def get_health(request: Request | None) -> Response:
    """Alive: open, without settings, without a call to anywhere."""
    return answers.respond(200, {"ok": True, "service": SERVICE})


def get_openapi(request: Request | None) -> Response:
    """What every route takes and answers: open, without settings, without a call to anywhere."""
    assert request is not None
    return answers.unless_known(request, answers.respond(200, _document()))


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(__file__).with_name("openapi.json").read_bytes())
    return document


@route(Right.READ, calls_d1=False)
def get_deep_health(call: Call) -> Answer:
    """Alive; with `deep=1` whether all that the service needs is so, too."""
    from chalicelib import advice

    deep = inputs.read_flag("deep", inputs.query_of(call.request).get("deep"))
    if not deep:
        return {"service": SERVICE}
    found = call.service.health.look(Deadline(call.service.clock, HEALTH_SECONDS))
    return {"service": SERVICE, **advice.in_short(found)}


@route(Right.READ, etag=True, calls_d1=False)
def list_models(call: Call) -> Answer:
    """What can be drawn with, and what each model wants to be given."""
    return {
        "models": [call.service.views.model(model) for model in call.service.models.known.values()],
        "default_model": jobs.DEFAULT_MODEL,
        "unknown_models": "refuse" if call.service.models.refuse_unknown else "accept",
    }


@route(Right.WRITE)
def offer_upload(call: Call) -> Answer:
    """Where a picture may be put, and its key."""
    from chalicelib import orders

    content_type, size = orders.read_upload(inputs.read_body(call.request))
    deadline = Deadline(call.service.clock, REQUEST_SECONDS)
    return call.service.uploads.offer(content_type=content_type, size=size, deadline=deadline)


@route(Right.WRITE, anonymous=True)
def create_job(call: Call) -> Answer:
    """Queue a job, or several at once, and send them to RunPod."""
    from chalicelib import orders

    body = inputs.read_body(call.request)
    wanted, listed = orders.read_new_jobs(body, call.service.models)
    key, request_hash = orders.read_idempotency_key(call.request), orders.hash_of(body)
    deadline = Deadline(call.service.clock, REQUEST_SECONDS)
    _check_addresses(call, wanted)
    ids = _made_before(call, wanted, key, request_hash, deadline)
    replayed = bool(ids)
    if not ids:
        made = [call.service.pipeline.new_job(**job) for job in _with_pictures(call, wanted, deadline)]
        if key is not None:
            made = jobs.under_key(made, key, request_hash)
        ids = _create(call, made, deadline)
        replayed = ids != [job.id for job in made]
    if replayed:
        call.headers["Idempotent-Replayed"] = "true"
    queued = [{"id": job_id, "status": Status.QUEUED} for job_id in ids]
    return {"jobs": queued} if listed else queued[0]


def _check_addresses(call: Call, wanted: list[dict[str, Any]]) -> None:
    """Callbacks can be made, and nobody without a key asks for what is told or fetched elsewhere."""
    for job in wanted:
        if call.caller == ANONYMOUS and (job["callback_url"] or job["pictures"]):
            raise RequestError("unauthorized", "Pictures and callbacks want an API key: `Authorization: Bearer <key>`.")
        if job["callback_url"]:
            job["callback_url"] = call.service.courier.require_url(job["callback_url"])


def _made_before(
    call: Call, wanted: list[dict[str, Any]], key: str | None, request_hash: str, deadline: Deadline
) -> list[str]:
    """The jobs of the same request; they are looked for first only where pictures would be fetched once more."""
    if key is None or not any(job["pictures"] for job in wanted):
        return []
    return call.service.pipeline.made_before(key, request_hash, len(wanted), deadline)


def _with_pictures(call: Call, wanted: list[dict[str, Any]], deadline: Deadline) -> list[dict[str, Any]]:
    """The same with the keys of the pictures, which are all there."""
    pictures = [picture for job in wanted for picture in job["pictures"]]
    if not pictures:
        return wanted
    keys = call.service.uploads.take(pictures, deadline.less(CREATE_SECONDS))
    return [{**job, "pictures": [keys[picture] for picture in job["pictures"]]} for job in wanted]


def _create(call: Call, made: list[Job], deadline: Deadline) -> list[str]:
    try:
        return call.service.pipeline.create(made, deadline, by=call.caller)
    except IndeterminateError as error:
        if made[0].idempotency_key is not None:
            error.sentence += " Send the same again, with the same Idempotency-Key: nothing is made twice."
            raise
        what = "The job" if len(made) == 1 else "The jobs"
        error.sentence += f" {what} may have been made all the same: ask for this id before you send it again."
        error.job_id = made[0].id
        raise


@route(Right.READ, anonymous=True, etag=True)
def get_status(call: Call, job_id: str | None = None) -> Answer:
    """One job, flat, as the earlier version's clients read it."""
    asked = unquote(job_id) if job_id is not None else inputs.query_of(call.request).get("id", "")
    if not asked.strip():
        raise RequestError("id_required", "id is required: /api/queue/status?id=…")
    job = _found(call.service.reads.job(inputs.read_id(asked), timeout=READ_SECONDS))
    if call.caller == ANONYMOUS:  # whose addresses and pictures these are, nobody can tell
        job = replace(job, callback_url=None, pictures=None)
    return call.service.views.job(job)


@route(Right.READ, etag=True)
def list_jobs(call: Call) -> Answer:
    """Jobs, newest first."""
    from chalicelib import filters
    from chalicelib.reads import COUNTED

    query = inputs.query_of(call.request)
    wanted, counts = filters.from_query(query), inputs.read_include(query.get("include"), "counts")
    limit, after = inputs.read_limit(query.get("limit")), inputs.read_cursor(query.get("cursor"))
    found = call.service.reads.page(wanted, limit=limit + 1, after=after, counts=counts, timeout=READ_SECONDS)
    page = _fitting([call.service.views.job(job) for job in found.jobs[:limit]])
    more = len(found.jobs) > len(page)
    return {
        "jobs": page,
        "next_cursor": inputs.make_cursor(page[-1]["created_at"], page[-1]["id"]) if more else None,
        **({} if found.counts is None else {"counts": found.counts, "counts_limit": COUNTED}),
    }


def _fitting(jobs: list[Answer]) -> list[Answer]:
    """The first of these that one answer may hold, one at least; the next page has the others."""
    sizes = accumulate(len(json.dumps(job, ensure_ascii=False).encode()) for job in jobs)
    return [
        job for number, (job, size) in enumerate(zip(jobs, sizes, strict=True)) if number == 0 or size <= PAGE_BYTES
    ]


@route(Right.READ, etag=True)
def get_job(call: Call, job_id: str) -> Answer:
    """One job with its timeline and attempts; held back until it has ended where the caller prefers to wait."""
    from chalicelib.waiting import MOST_SECONDS

    wanted = inputs.read_id(unquote(job_id))
    with_input = inputs.read_include(inputs.query_of(call.request).get("include"), "input")
    wait = inputs.read_wait(call.request)
    if wait is None:
        job, timeline = call.service.reads.job_with_timeline(wanted, timeout=READ_SECONDS)
    else:
        wait = min(wait, MOST_SECONDS)
        job, timeline = call.service.waiting.until_final(wanted, wait)
        call.headers["Preference-Applied"] = f"wait={wait}"
    return {"job": call.service.views.whole(_found(job, timeline), timeline, with_input=with_input)}


@route(Right.READ, etag=True)
def list_deliveries(call: Call, job_id: str) -> Answer:
    """What was to be told of a job at its callback_url, and what came of it."""
    job, rows = call.service.outbox.of(inputs.read_id(unquote(job_id)), timeout=READ_SECONDS)
    _found(job)
    return {"deliveries": [call.service.views.delivery(row) for row in rows]}


@route(Right.WRITE)
def replay_delivery(call: Call, job_id: str, n: str) -> Answer:
    """Tell it once more, now."""
    wanted = inputs.read_id(unquote(job_id))
    row = call.service.courier.replay(wanted, n, Deadline(call.service.clock, REQUEST_SECONDS))
    return {"delivery": call.service.views.delivery(row)}


@route(Right.WRITE)
def delete_job(call: Call, job_id: str) -> Answer:
    """Remove a job that has ended, and its files."""
    wanted = inputs.read_id(unquote(job_id))
    call.service.verbs.delete(wanted, Deadline(call.service.clock, REQUEST_SECONDS), by=call.caller)
    return {"id": wanted, "deleted": True}


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


def _do(call: Call, verb: Callable[..., Job], job_id: str) -> Answer:
    job = verb(inputs.read_id(unquote(job_id)), Deadline(call.service.clock, REQUEST_SECONDS), by=call.caller)
    return {"job": call.service.views.job(job)}


@route(Right.ADMIN)
def do_to_many(call: Call) -> Answer:
    """Cancel, retry, redrive or delete the newest jobs that a filter finds."""
    from chalicelib import filters

    body = inputs.read_body(call.request)
    do, wanted = filters.read_bulk(body)
    limit, after, dry_run = inputs.read_many(body)
    deadline = Deadline(call.service.clock, REQUEST_SECONDS)
    found = call.service.verbs.find(do, wanted, deadline, limit=limit + 1, after=after)
    page = found[:limit]
    ids = [job_id for _, job_id in page]
    came = call.service.verbs.do_to_all(do, ids, wanted, deadline, dry_run=dry_run, by=call.caller)
    return {
        "do": do,
        "dry_run": dry_run,
        "done": came.done,
        "refused": [
            {"id": job_id, "code": error.code, "error": error.sentence} for job_id, error in came.refused.items()
        ],
        "next_cursor": inputs.make_cursor(*page[-1]) if len(found) > limit else None,
    }


@route(Right.READ, etag=True)
def get_stats(call: Call) -> Answer:
    """Figures of the last days."""
    days = inputs.read_days(inputs.query_of(call.request).get("days"))
    return {"days": days, **call.service.stats.of(days, timeout=READ_SECONDS)}


@route(Right.READ)
def list_dead_letters(call: Call) -> Answer:
    """Results that could not be stored, newest first."""
    query = inputs.query_of(call.request)
    limit, after, code = (
        inputs.read_limit(query.get("limit")),
        inputs.read_cursor(query.get("cursor")),
        inputs.read_error_code(query.get("error_code")),
    )
    found = call.service.reads.dead_letters(limit=limit + 1, after=after, error_code=code, timeout=READ_SECONDS)
    page = found[:limit]
    return {
        "dead_letters": [call.service.views.dead_letter(job) for job in page],
        "next_cursor": inputs.make_cursor(page[-1].dead_at, page[-1].id) if len(found) > limit else None,
    }


@route(Right.ADMIN)
def redrive_dead_letters(call: Call) -> Answer:
    """Store the results of many dead letters, as far as something is left of them."""
    limit, after, dry_run, code = inputs.read_redrive(inputs.read_body(call.request, empty_is={}))
    deadline = Deadline(call.service.clock, REQUEST_SECONDS)
    came, last = call.service.verbs.redrive_all(
        deadline, limit=limit, after=after, error_code=code, dry_run=dry_run, by=call.caller
    )
    lost = [job_id for job_id, error in came.refused.items() if error.code == "result_lost"]
    return {
        "dry_run": dry_run,
        "redriven": came.done,
        "lost": lost,
        "unknown": [job_id for job_id, error in came.refused.items() if not isinstance(error, RequestError)],
        "next_cursor": inputs.make_cursor(last.dead_at, last.id) if last else None,
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
    log.begin(context.aws_request_id)
    current = service()
    seconds = context.get_remaining_time_in_millis() / 1000 - SCHEDULE_RESERVE
    reports = current.pipeline.run_minute(Deadline(current.clock, seconds))
    return {
        "rounds": len(reports),
        "checked": sum(report.checked for report in reports),
        "submitted": sum(report.submitted for report in reports),
        "updated": sum(len(report.updated) for report in reports),
    }


def _found(job: Job | None, timeline: "list[Row] | None" = None) -> Job:
    if job is not None:
        return job
    if timeline:
        by = json.loads(timeline[-1]["detail"]).get("by")
        raise RequestError("job_deleted", f"This job was deleted at {timeline[-1]['at']} by {by}.")
    raise no_such_job()
