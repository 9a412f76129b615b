"""
Tells a caller's own address of a job's end, signed as the Standard Webhooks specification has it, until it is heard.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any
from urllib.parse import urlsplit

from chalicelib import log
from chalicelib.d1 import Row
from chalicelib.errors import RequestError, ServiceError
from chalicelib.fetch import Guard, Refused, whole_url
from chalicelib.jobs import to_text
from chalicelib.outbox import OF_HOST, Delivery, Outbox, Outcome
from chalicelib.records import dataclass
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.store import new_nonce
from chalicelib.views import Views
from chalicelib.wire import Stream, Wire

# From a failed try to the next, in seconds: eight tries in 27 and a half hours.
# https://docs.svix.com/retries and the specification's own example have this schedule.
DELAYS = (5, 300, 1_800, 7_200, 18_000, 36_000, 36_000)
TRY_TIMEOUT = 10.0  # seconds for one receiver
D1_TIMEOUT = 8.0  # seconds
RESERVE = D1_TIMEOUT + 1.0  # seconds that must be left when a try is begun: to write down what came of it
LEASE_MARGIN = 5.5  # seconds that a claim outlives its deadline, which is half a second before the Lambda must be dead
THREADS = 8
CLAIMS = 10  # that one run makes, of which each is two D1 calls
LEAST_TRY = 1.0  # seconds in which a try may come to something
SILENCE = 60.0  # seconds in which a receiver is left alone that has just not answered
MAX_BODY_BYTES = 19_500  # the specification asks for less than 20 kB
LEFT_OUT_FIRST = ("outputs", "metadata", "prompt", "error")  # of a body that is larger
GONE = 410  # says that nothing is wanted there any more


@dataclass(frozen=True, kw_only=True)
class Courier:
    """Sends what the outbox has; two at once, here or in another process, do no harm."""

    outbox: Outbox
    wire: Wire
    guard: Guard
    secrets: tuple[str, ...]
    views: Views
    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew] = Crew

    def require_url(self, url: str) -> str:
        """
        A callback_url as it is kept. Raises RequestError where it is none, leads by its own words into a private
        network, or no callbacks can be signed here.
        """
        if not self.secrets:
            raise RequestError(
                "callbacks_not_configured", "This service signs no callbacks: its operator has to set CALLBACK_SECRETS."
            )
        try:
            whole = whole_url(url)
            parts = urlsplit(whole)
            self.guard.require_public_words(
                parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            )
        except (ServiceError, ValueError) as error:
            sentence = error.sentence if isinstance(error, ServiceError) else "It is no address."
            raise RequestError("callback_url_invalid", f"callback_url cannot be used: {sentence}") from error
        return whole

    def run(self, deadline: Deadline, *, job_id: str | None = None) -> int:
        """
        Send what is due, of one job alone where its id is given; those that fail for the first time once more while
        there is time. How many tries were made. Raises nothing: what is not sent stays due.
        """
        tried = 0
        try:
            for _ in range(CLAIMS if self.secrets else 0):
                if deadline.left() <= RESERVE:
                    break
                claimed, made = self._send_due(deadline, job_id)
                tried += len(made)
                if job_id is not None or not self._goes_on(claimed, made, deadline):
                    break
        except ServiceError as error:
            log.failed("callbacks_not_sent", error)
        except Exception:
            log.crashed("callbacks_crashed")
        return tried

    def _goes_on(self, claimed: int, made: list[Outcome], deadline: Deadline) -> bool:
        """Whether more is due now, or will be in a moment, which is waited for."""
        if not claimed:
            return False
        soon = any(outcome.delivery.tries == 1 and outcome.due_at for outcome in made)
        if claimed >= OF_HOST or not soon:
            return claimed >= OF_HOST
        if deadline.left() < DELAYS[0] + TRY_TIMEOUT + RESERVE:
            return False
        self.clock.sleep(DELAYS[0] + 0.1)
        return True

    def replay(self, job_id: str, number: str, deadline: Deadline) -> Row:
        """
        Tell it once more and at once, with the whole schedule anew; how it stands then. Raises RequestError where there
        is no such delivery, and what D1 raises.
        """
        n = int(number) if number.isascii() and number.isdigit() and len(number) < 6 else 0
        if n < 1:
            raise no_such_delivery()
        rows = self.outbox.replay(job_id, n, now=self.clock.now(), timeout=deadline.cap(D1_TIMEOUT))
        if n not in [row["n"] for row in rows]:
            raise no_such_delivery()
        self.run(deadline, job_id=job_id)
        _, rows = self.outbox.of(job_id, timeout=deadline.cap(D1_TIMEOUT))
        row = next((row for row in rows if row["n"] == n), None)
        if row is None:  # the job was deleted meanwhile
            raise no_such_delivery()
        return row

    def _send_due(self, deadline: Deadline, job_id: str | None) -> tuple[int, list[Outcome]]:
        """How many were claimed, and the tries that were made."""
        nonce = new_nonce(self.rng)
        claimed = self.outbox.claim(
            nonce=nonce,
            now=self.clock.now(),
            lease=max(0.0, deadline.left()) + LEASE_MARGIN,
            timeout=deadline.cap(D1_TIMEOUT),
            job_id=job_id,
        )
        if not claimed:
            return 0, []
        outcomes: list[Outcome] = []
        silent: set[str] = set()
        with self.new_crew(THREADS) as crew:
            for delivery in claimed:
                crew.start(partial(self._try, delivery, silent, deadline))
            while crew.busy:
                outcomes += [outcome for outcome in crew.wait(1.0) if isinstance(outcome, Outcome)]
        self.outbox.settle(outcomes, nonce=nonce, timeout=deadline.cap(D1_TIMEOUT))
        made = [outcome for outcome in outcomes if outcome.line]
        for outcome in made:
            log.told(outcome.delivery.job_id, outcome.delivery.type, outcome.status, outcome.line or {})
        return len(claimed), made

    def _try(self, delivery: Delivery, silent: set[str], deadline: Deadline) -> Outcome:
        """One try, which is not made where its receiver has just not answered, or there is no time for it."""
        timeout = min(TRY_TIMEOUT, deadline.left() - RESERVE)
        host = urlsplit(delivery.url).netloc
        if timeout < LEAST_TRY or host in silent:
            later = to_text(self.clock.now() + timedelta(seconds=SILENCE if host in silent else 0))
            return Outcome(delivery=delivery, status="pending", due_at=later, line=None)
        begun = self.clock.monotonic()
        status, error, retry_after, final = self._post(delivery, silent, timeout)
        now = self.clock.now()
        line = {
            "at": to_text(now),
            "status": status,
            "ms": round((self.clock.monotonic() - begun) * 1000),
            "error": error,
        }
        if error is None:
            return Outcome(delivery=delivery, status="delivered", due_at=None, line=line)
        if final or delivery.tries > len(DELAYS):
            return Outcome(delivery=delivery, status="failed", due_at=None, line=line)
        wait = max(DELAYS[delivery.tries - 1], retry_after or 0.0)
        return Outcome(delivery=delivery, status="pending", due_at=to_text(now + timedelta(seconds=wait)), line=line)

    def _post(
        self, delivery: Delivery, silent: set[str], timeout: float
    ) -> tuple[int | None, str | None, float | None, bool]:
        """The HTTP status if there was one, what was wrong if anything, when it may be tried, and whether at all."""
        headers = {"Content-Type": "application/json", "User-Agent": "ob-ai-studio", "Connection": "close"}
        try:
            body = self._body(delivery)
            signed = {**headers, **self._signature(delivery, body)}
            with self.wire.open(
                "callback", "POST", delivery.url, headers=signed, body=body.encode(), timeout=timeout
            ) as answer:
                return (answer.status, *_verdict(answer))
        except Refused as error:
            return None, error.sentence, None, True
        except ServiceError as error:
            silent.add(urlsplit(delivery.url).netloc)
            return None, error.sentence, None, False
        except Exception as error:  # one delivery must not keep the others of its claim from being written down
            log.crashed("callback_crashed", job_id=delivery.job_id)
            return None, f"It could not be sent: {type(error).__name__}.", None, False

    def _body(self, delivery: Delivery) -> str:
        data = self.views.told(delivery.data)
        left_out: list[str] = []
        while len(body := _json(delivery, data, left_out)) > MAX_BODY_BYTES and len(left_out) < len(LEFT_OUT_FIRST):
            left_out.append(LEFT_OUT_FIRST[len(left_out)])
        return body.decode()

    def _signature(self, delivery: Delivery, body: str) -> dict[str, str]:
        """The three headers; one signature for each secret, so that a secret can be changed without a gap."""
        from standardwebhooks import Webhook  # here, because few invocations send anything

        message, now = f"msg_{delivery.job_id}_{delivery.version}", self.clock.now().replace(microsecond=0)
        return {
            "webhook-id": message,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(Webhook(secret).sign(message, now, body) for secret in self.secrets),
        }


def no_such_delivery() -> RequestError:
    """What is said of a number that no delivery of the job has."""
    return RequestError("delivery_not_found", "There is no such delivery of this job.")


def _json(delivery: Delivery, data: dict[str, Any], left_out: list[str]) -> bytes:
    told = {name: value for name, value in data.items() if name not in left_out}
    event = {
        "type": delivery.type,
        "timestamp": delivery.created_at,
        "data": {**told, "left_out": left_out},
    }
    return json.dumps(event, ensure_ascii=False).encode("utf-8", "replace")


def _verdict(answer: Stream) -> tuple[str | None, float | None, bool]:
    """What is wrong with an answer, if anything, when to try again, and whether it is of no use to."""
    if 200 <= answer.status < 300:
        return None, None, False
    if answer.status == GONE:
        return "It wants to hear nothing more (410).", None, True
    if 300 <= answer.status < 400:
        return f"It redirects ({answer.status}), which is not followed.", None, False
    return f"It answered {answer.status}.", answer.retry_after, False
