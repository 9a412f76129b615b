"""
OB AI Studio's backend: every route and the scheduled function, and nothing else.

    client ── POST /api/queue/create ──▶ D1 jobs (queued)
                                          │  submit: RunPod /run
                                          ▼
                                   D1 jobs (running) ◀── poll_jobs, four rounds a minute
                                          │  store: fetch the result, put it in R2
                                          ▼
                                   D1 jobs (done) ── result_url ──▶ client
"""

from typing import Any

from chalice.app import Chalice, CloudWatchEvent, CORSConfig, Rate, Request, Response

from chalicelib import answers, api

app = Chalice(app_name="ob-ai-studio", configure_logs=False)
app.api.cors = CORSConfig(
    allow_origin="*",
    allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Prefer"],
    expose_headers=["Date", "ETag", "Idempotent-Replayed", "Preference-Applied", "Retry-After", "X-Request-Id"],
    max_age=600,
)


@app.middleware("http")
def finish(event: Request, get_response: Any) -> Response:
    return answers.finish(event, get_response)


@app.route("/", methods=["GET"])
def get_page() -> Response:
    return api.get_page(app.current_request)


@app.route("/ui/{name}", methods=["GET"])
def get_page_file(name: str) -> Response:
    return api.get_page_file(app.current_request, name)


@app.route("/health", methods=["GET"])
def get_health() -> Response:
    return api.get_health(app.current_request)


@app.route("/openapi.json", methods=["GET"])
def get_openapi() -> Response:
    return api.get_openapi(app.current_request)


@app.route("/api/health", methods=["GET"])
def get_deep_health() -> Response:
    return api.get_deep_health(app.current_request)


@app.route("/api/models", methods=["GET"])
def list_models() -> Response:
    return api.list_models(app.current_request)


@app.route("/api/uploads", methods=["POST"], content_types=api.BODY_TYPES)
def offer_upload() -> Response:
    return api.offer_upload(app.current_request)


@app.route("/api/queue/create", methods=["POST"], content_types=api.BODY_TYPES)
def create_job() -> Response:
    return api.create_job(app.current_request)


@app.route("/api/queue/status", methods=["GET"])
def get_status() -> Response:
    return api.get_status(app.current_request)


@app.route("/api/queue/status/{job_id}", methods=["GET"])
def get_status_by_path(job_id: str) -> Response:
    return api.get_status(app.current_request, job_id)


@app.route("/api/jobs", methods=["GET"])
def list_jobs() -> Response:
    return api.list_jobs(app.current_request)


@app.route("/api/jobs/bulk", methods=["POST"], content_types=api.BODY_TYPES)
def do_to_many() -> Response:
    return api.do_to_many(app.current_request)


@app.route("/api/jobs/{job_id}", methods=["GET"])
def get_job(job_id: str) -> Response:
    return api.get_job(app.current_request, job_id)


@app.route("/api/jobs/{job_id}", methods=["DELETE"])
def delete_job(job_id: str) -> Response:
    return api.delete_job(app.current_request, job_id)


@app.route("/api/jobs/{job_id}/cancel", methods=["POST"], content_types=api.BODY_TYPES)
def cancel_job(job_id: str) -> Response:
    return api.cancel_job(app.current_request, job_id)


@app.route("/api/jobs/{job_id}/retry", methods=["POST"], content_types=api.BODY_TYPES)
def retry_job(job_id: str) -> Response:
    return api.retry_job(app.current_request, job_id)


@app.route("/api/jobs/{job_id}/redrive", methods=["POST"], content_types=api.BODY_TYPES)
def redrive_job(job_id: str) -> Response:
    return api.redrive_job(app.current_request, job_id)


@app.route("/api/jobs/{job_id}/deliveries", methods=["GET"])
def list_deliveries(job_id: str) -> Response:
    return api.list_deliveries(app.current_request, job_id)


@app.route("/api/jobs/{job_id}/deliveries/{n}/replay", methods=["POST"], content_types=api.BODY_TYPES)
def replay_delivery(job_id: str, n: str) -> Response:
    return api.replay_delivery(app.current_request, job_id, n)


@app.route("/api/stats", methods=["GET"])
def get_stats() -> Response:
    return api.get_stats(app.current_request)


@app.route("/api/dead-letters", methods=["GET"])
def list_dead_letters() -> Response:
    return api.list_dead_letters(app.current_request)


@app.route("/api/dead-letters/redrive", methods=["POST"], content_types=api.BODY_TYPES)
def redrive_dead_letters() -> Response:
    return api.redrive_dead_letters(app.current_request)


@app.route("/dev/runpod", methods=["POST"], content_types=api.BODY_TYPES)
def send_job() -> Response:
    return api.send_job(app.current_request)


@app.route("/dev/runpod-poll", methods=["POST"], content_types=api.BODY_TYPES)
def run_round() -> Response:
    return api.run_round(app.current_request)


@app.route("/webhooks/runpod/{job_id}/{attempt}/{token}", methods=["POST"], content_types=api.BODY_TYPES)
def hear_of_run(job_id: str, attempt: str, token: str) -> Response:
    return api.hear_of_run(app.current_request, job_id, attempt, token)


@app.schedule(Rate(1, unit=Rate.MINUTES))
def poll_jobs(event: CloudWatchEvent) -> dict[str, Any]:
    return api.run_minute(event.context)
