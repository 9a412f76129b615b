"""What of a job an answer shows."""

import json
from datetime import datetime, timedelta
from typing import Any

from chalicelib import attempts
from chalicelib.d1 import Row
from chalicelib.jobs import Job, State, to_text
from chalicelib.models import Model
from chalicelib.r2 import R2
from chalicelib.reasons import Reasons
from chalicelib.runtime import Clock

PRESIGNED_FOR = timedelta(hours=1)  # that a link to a file of a private bucket holds when it is made
SAME_FOR = timedelta(minutes=20)  # that it is given again
MAX_SIGNED = 1_000  # of them that are remembered

View = dict[str, Any]


class Views:
    """Jobs as answers show them; what lies in a private bucket is linked for a while."""

    def __init__(self, *, bucket: R2, reasons: Reasons, clock: Clock) -> None:
        self._bucket = bucket
        self._reasons = reasons
        self._clock = clock
        self._signed: dict[str, tuple[str, datetime]] = {}

    def job(self, job: Job) -> View:
        """A job as every list and answer has it."""
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
            "urls_expire_at": self._expiry(job),
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
            "metadata": json.loads(job.metadata) if job.metadata else {},
            "priority": job.priority,
            "deadline": job.deadline,
            "deleted_at": job.deleted_at,
            "waiting": self._reasons.of(job),
            "progress": json.loads(job.progress) if job.progress else None,
            "cost": _cost(job),
            "pictures": [self._picture(picture["key"]) for picture in job.own_pictures],
            "callback_url": job.callback_url,
        }

    def model(self, model: Model) -> View:
        """A model with what a request must give for it."""
        return {
            "model": model.name,
            "about": model.about,
            "usual_seconds": model.usual_seconds,
            "price_per_second": model.price,
            "deadlines": {"start": model.start, "run": model.run, "total": model.total},
            "pictures": len(model.pictures),
            "slots": model.schema,
        }

    def delivery(self, row: Row) -> View:
        """One end of a job that was to be told, with its last tries."""
        return {
            "n": row["n"],
            "type": row["type"],
            "url": row["url"],
            "status": row["status"],
            "tries": row["tries"],
            "created_at": row["created_at"],
            "next_at": row["due_at"],
            "log": json.loads(row["log"]),
        }

    def _picture(self, key: str) -> View:
        return {"key": key, "url": self._url(None, key)}

    def told(self, data: View) -> View:
        """A job as a callback tells of it, from what its outbox has."""
        job = Job.from_row({**data, "outputs": json.dumps(data["outputs"])})
        files = [{**file, "url": self._url(file["url"], file["key"])} for file in job.files]
        url = self._url(data["result_url"], data["result_r2_key"])
        rest = {name: value for name, value in data.items() if name not in ("cost", "wasted", "uncosted")}
        return {**rest, "outputs": files, "result_url": url, "cost": _cost(job)}

    def whole(self, job: Job, timeline: list[Row], *, with_input: bool = False) -> View:
        """
        A job with what happened to it and the runs that were begun for it, and what RunPod is given where that is
        wanted; pictures stand in there by their keys.
        """
        lines = [{"at": line["at"], "event": line["event"], **json.loads(line["detail"])} for line in timeline]
        given = {"input": job.payload(lambda key: key)} if with_input else {}
        return {**self.job(job), "timeline": lines, "attempts": attempts.of(job, timeline), **given}

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
        """The file's URL: the one that was stored, or the bucket's public one, or one that is made here."""
        if url or not key:
            return url
        return self._bucket.public_url(key) or self._sign(key)[0]

    def _sign(self, key: str) -> tuple[str, datetime]:
        """A URL for a while and its end; for some minutes the same one, so that an answer stays the same."""
        now = self._clock.now().replace(microsecond=0)  # as what is signed has it
        signed = self._signed.get(key)
        if signed is None or signed[1] - now < PRESIGNED_FOR - SAME_FOR:
            if len(self._signed) >= MAX_SIGNED:
                self._signed.clear()
            url = self._bucket.presign(key, seconds=int(PRESIGNED_FOR.total_seconds()))
            signed = self._signed[key] = (url, now + PRESIGNED_FOR)
        return signed

    def _expiry(self, job: Job) -> str | None:
        """When the first of the URLs in this answer ends; None where they last."""
        urls = [(job.result_url, job.result_r2_key), *((file["url"], file["key"]) for file in job.files)]
        urls += [(None, picture["key"]) for picture in job.own_pictures]
        ends = [self._sign(key)[1] for url, key in urls if not url and key and not self._bucket.public_url(key)]
        return to_text(min(ends)) if ends else None


def _cost(job: Job) -> View:
    """US dollars, null where nothing is known; attempts of which it is not known are counted beside."""
    return {"usd": job.cost, "wasted_usd": job.wasted, "unknown_attempts": job.uncosted}
