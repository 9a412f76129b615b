"""What of a job an answer shows."""

from datetime import timedelta
from typing import Any

from chalicelib.jobs import Job, State, to_text
from chalicelib.r2 import R2
from chalicelib.runtime import Clock

PRESIGNED_SECONDS = 3600  # that a link to a file of a private bucket holds

View = dict[str, Any]


class Views:
    """Jobs as answers show them; what lies in a private bucket is linked for the answer alone."""

    def __init__(self, *, bucket: R2, clock: Clock) -> None:
        self._bucket = bucket
        self._clock = clock

    def job(self, job: Job) -> View:
        """A job as every list and answer has it."""
        # Before the links are made, and cut to whole seconds as they are, so that none ends earlier than is said.
        urls_expire_at = self._expiry(job)
        files = [{**file, "url": self._url(file["url"], file["key"])} for file in job.files]
        made = {file["key"]: file["url"] for file in files}
        return {
            "id": job.id,
            "status": job.status,
            "step": job.step,
            "prompt": job.prompt,
            "model": job.model,
            "result_url": job.result_url or made.get(job.result_r2_key) or self._url(None, job.result_r2_key),
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

    def dead_letter(self, job: Job) -> View:
        """A dead letter, with what is left of its result."""
        gone = job.left == "runpod" and (job.result_until or "") < to_text(self._clock.now())
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

    def update(self, job: Job) -> View:
        """A job that a round has ended, in short."""
        if job.state is State.DONE:
            url = self._url(job.result_url, job.result_r2_key)
            return {"id": job.id, "status": job.status, "result_url": url, "r2_key": job.result_r2_key}
        return {"id": job.id, "status": job.status, "error": job.error_message}

    def _url(self, url: str | None, key: str | None) -> str | None:
        """The file's URL: the one that was stored, or the bucket's public one, or one made for this answer alone."""
        if url or not key:
            return url
        return self._bucket.public_url(key) or self._bucket.presign(key, seconds=PRESIGNED_SECONDS)

    def _expiry(self, job: Job) -> str | None:
        """When the URLs in this answer end; None where they last."""
        urls = [(job.result_url, job.result_r2_key), *((file["url"], file["key"]) for file in job.files)]
        if all(url or not key or self._bucket.public_url(key) for url, key in urls):
            return None
        return to_text(self._clock.now().replace(microsecond=0) + timedelta(seconds=PRESIGNED_SECONDS))
