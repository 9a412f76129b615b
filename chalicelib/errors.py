"""
Every way this service fails; the class says what the catcher may do next.

    ServiceError                a code for machines, a sentence with the next step for people
    ├── RequestError            the caller's fault: nothing was written, the answer is 4xx
    ├── SettingError            the operator's fault: a setting is missing or malformed
    ├── TransientError          nothing happened: repeat it later, after retry_after if that is given
    ├── IndeterminateError      it may have happened: repeat it only where a repeat does no harm
    ├── PermanentError          repeating it as it is cannot help
    └── IllegalTransition       a bug in this code: a job was asked to make a move it has not got
"""

# The HTTP status of every answer of ours that is no 2xx: by code where the caller is at fault, by class where not.
REQUEST_STATUS = {
    "body_not_json": 400,
    "body_not_object": 400,
    "body_too_large": 413,
    "bytes_invalid": 400,
    "callback_url_invalid": 400,
    "callbacks_not_configured": 400,
    "content_type_invalid": 400,
    "created_invalid": 400,
    "cursor_invalid": 400,
    "days_invalid": 400,
    "deadline_invalid": 400,
    "delivery_not_found": 404,
    "do_invalid": 400,
    "id_required": 400,
    "input_invalid": 400,
    "dry_run_invalid": 400,
    "error_code_invalid": 400,
    "file_not_found": 404,
    "filter_invalid": 400,
    "flag_invalid": 400,
    "forbidden": 403,
    "idempotency_conflict": 409,
    "idempotency_key_invalid": 400,
    "image_not_found": 400,
    "image_unusable": 400,
    "images_invalid": 400,
    "include_invalid": 400,
    "job_deleted": 410,
    "job_final": 400,
    "job_id_invalid": 400,
    "job_not_cancellable": 409,
    "job_not_deletable": 409,
    "job_not_found": 404,
    "job_not_retryable": 409,
    "jobs_invalid": 400,
    "keys_not_configured": 401,
    "limit_invalid": 400,
    "metadata_invalid": 400,
    "method_not_allowed": 405,
    "model_invalid": 400,
    "model_unknown": 400,
    "not_dead": 409,
    "priority_invalid": 400,
    "prompt_invalid": 400,
    "prompt_required": 400,
    "prompt_too_long": 400,
    "q_invalid": 400,
    "query_invalid": 400,
    "queue_full": 429,
    "request_refused": 400,
    "result_lost": 410,
    "run_id_invalid": 400,
    "slots_invalid": 400,
    "status_invalid": 400,
    "unauthorized": 401,
    "unsupported_media_type": 415,
    "webhook_forbidden": 403,
}


class ServiceError(Exception):
    """Raised when something this service does cannot be done; `service` names the cloud it came from, if any."""

    http_status = 500

    def __init__(self, code: str, sentence: str, *, service: str = "", retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence
        self.plain = sentence  # the same without what a cloud has said of an input, for the log and for other callers
        self.service = service
        self.retry_after = retry_after
        self.job_id: str | None = None  # the job that it is about, where the caller cannot know it yet


class RequestError(ServiceError):
    """Raised when the caller has to change the request; its code stands in REQUEST_STATUS."""

    def __init__(self, code: str, sentence: str, *, retry_after: float | None = None) -> None:
        super().__init__(code, sentence, retry_after=retry_after)
        self.http_status = REQUEST_STATUS[code]


class SettingError(ServiceError):
    """Raised when a setting is missing or malformed; the sentence names it and never holds its value."""


class TransientError(ServiceError):
    """Raised when a call certainly had no effect, or is one that has none; the same call may work later."""

    http_status = 503


class IndeterminateError(ServiceError):
    """Raised when a call may or may not have taken effect; only an idempotent one may be repeated."""

    http_status = 503


class PermanentError(ServiceError):
    """Raised when a service has refused a call for good; repeating it unchanged gives the same answer."""

    http_status = 502


class IllegalTransition(ServiceError):
    """Raised when a job is asked to make a move that TRANSITIONS does not have."""


def no_such_job() -> RequestError:
    """What is said of an id that no row has."""
    return RequestError("job_not_found", "There is no job with this id.")


def job_changed() -> TransientError:
    """What is said where somebody else was first."""
    return TransientError("job_changed", "The job has changed at the same moment; look at it and try again.")


def no_picture(key: str) -> RequestError:
    """What is said of a key behind which there is nothing that a job may use."""
    return RequestError(
        "image_not_found", f"There is no uploaded picture {key[:120]}; put it there first, it is kept for a day."
    )
