"""The every-minute schedule, which `chalice local` does not run, through the Lambda's own handler."""

import time
import traceback
import uuid
from datetime import UTC, datetime

from chalice.local import LambdaContext

import app
from tools.processes import end_with_parent

EVERY_SECONDS = 60.0
TIMEOUT_MS = 58_000  # as in .chalice/config.json
MEMORY_MB = 512


def event() -> dict[str, object]:
    """What EventBridge sends to the function of a rule."""
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "Scheduled Event",
        "source": "aws.events",
        "account": "000000000000",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": "local",
        "resources": ["arn:aws:events:local:000000000000:rule/poll_jobs"],
        "detail": {},
    }


def main() -> None:
    """Call the function every minute, for good; what it raises ends that minute only, as in Lambda."""
    next_at = time.monotonic()
    while True:
        try:
            app.poll_jobs(event(), LambdaContext("poll_jobs", MEMORY_MB, max_runtime_ms=TIMEOUT_MS))
        except Exception:
            traceback.print_exc()
        next_at = max(next_at + EVERY_SECONDS, time.monotonic())
        time.sleep(next_at - time.monotonic())


if __name__ == "__main__":
    end_with_parent()
    main()
