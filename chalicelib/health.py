"""Looks at the clouds that the settings name, as the service uses them, and says in plain words what is wrong."""

import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

from chalicelib import advice
from chalicelib.advice import Finding, from_error
from chalicelib.content import Content
from chalicelib.errors import PermanentError, ServiceError
from chalicelib.models import Models
from chalicelib.r2 import R2
from chalicelib.records import dataclass
from chalicelib.runpod import Condition, Runpod, condition_of
from chalicelib.runtime import Clock, Crew, Deadline
from chalicelib.settings import Settings
from chalicelib.spool import Spool
from chalicelib.store import CALLS_KEPT_FROM_WEBHOOKS, SCHEMA_CHANGE, Store, Survey, new_nonce
from chalicelib.webhooks import Webhooks
from chalicelib.wire import Reply, Wire

ONE_CALL = 8.0  # seconds
MAX_ANSWER_BYTES = 100_000
OVERDUE = timedelta(minutes=3)  # in which a schedule of every minute has had four tries at least
FORGOTTEN = timedelta(hours=1)  # a round takes 200 waiting jobs, so that not even 40,000 wait for so long
RECENT = timedelta(days=1)
CLOCK_TOLERANCE = 30  # seconds, beyond what a slow answer makes of it
TESTED_KEY = "health/test"


@dataclass(frozen=True, kw_only=True)
class Health:
    """The service's parts, to be looked at."""

    settings: Settings
    models: Models
    store: Store
    bucket: R2
    spool: Spool | None
    runpod: Runpod
    webhooks: Webhooks
    wire: Wire
    clock: Clock
    rng: Random
    new_crew: Callable[[int], Crew]

    def look(self, deadline: Deadline, *, leave_out: frozenset[str] = frozenset()) -> list[Finding]:
        """
        Everything that can be told without a paid run, in the order of the checks, but for those left out.

        A test object is put into the bucket and removed again; nothing else is changed. Raises nothing.
        """
        checks = {name: check for name, check in self._checks().items() if name not in leave_out}
        found: dict[str, list[Finding]] = {}
        with self.new_crew(len(checks)) as crew:
            for name, check in checks.items():
                crew.start(partial(self._guarded, name, check, deadline))
            while crew.busy:
                for result in crew.wait(1.0):
                    assert isinstance(result, tuple)
                    found[result[0]] = result[1]
        return [finding for name in checks for finding in found[name]]

    def _checks(self) -> dict[str, Callable[[Deadline], list[Finding]]]:
        return {
            "settings": lambda deadline: advice.of_settings(self.settings),
            "models": self._look_at_models,
            "keys": lambda deadline: advice.of_keys(self.settings),
            "d1": self._look_at_d1,
            "r2": self._look_at_r2,
            "spool": self._look_at_spool,
            "runpod": self._look_at_runpod,
            "webhook": self._look_at_webhook,
        }

    def _guarded(
        self, name: str, check: Callable[[Deadline], list[Finding]], deadline: Deadline
    ) -> tuple[str, list[Finding]]:
        try:
            return name, check(deadline)
        except ServiceError as error:
            return name, [from_error(name, error)]
        except Exception as error:  # a bug of the doctor must not hide what else it has found
            return name, [Finding(name, f"This could not be looked at: {error!r}", "internal_error")]

    def _look_at_models(self, deadline: Deadline) -> list[Finding]:
        self.models.check()
        named = f"{', '.join(self.models.known) or 'none'}; any other is {self.models.unknown}"
        return [Finding("models", f"models.json is right: {named}.")]

    def _look_at_d1(self, deadline: Deadline) -> list[Finding]:
        there = self.store.tables(timeout=deadline.cap(ONE_CALL))
        if "jobs" not in there:
            return [Finding("d1", "The database has no table `jobs`.", "d1_no_tables")]
        if not {"schema_changes", "job_events", "endpoint_faults"} <= there:
            return [Finding("d1", "The tables are those of an earlier version.", "d1_old_schema")]
        now = self.clock.now()
        said = self.store.survey(
            now=now, overdue=OVERDUE, forgotten=FORGOTTEN, recent=RECENT, timeout=deadline.cap(ONE_CALL)
        )
        off = said.now - self.clock.now().timestamp()
        return [*self._d1_itself(said), *_clock(off), *_schedule(said), *_paused(said), *_jobs(said)]

    def _d1_itself(self, said: Survey) -> list[Finding]:
        change, left = said.schema_change or 0, self.store.calls_left()
        if change < SCHEMA_CHANGE:
            sentence = f"The database has change {change} of its schema, the code needs {SCHEMA_CHANGE}."
            return [Finding("d1", sentence, "d1_old_schema")]
        if change > SCHEMA_CHANGE:
            sentence = f"The database has change {change} of its schema, the code knows only {SCHEMA_CHANGE}."
            return [Finding("d1", sentence, "d1_newer_schema")]
        if left is not None and left < CALLS_KEPT_FROM_WEBHOOKS:
            return [Finding("d1", f"Only {left} API calls are left in these five minutes.", "d1_few_calls")]
        return [Finding("d1", f"It reads and writes; its schema is at change {change}, as the code needs.")]

    def _look_at_r2(self, deadline: Deadline) -> list[Finding]:
        nonce = new_nonce(self.rng)
        key, text = f"{TESTED_KEY}-{nonce}", nonce.encode()
        try:
            self._put(key, text, deadline)
            found = self._read_back(key, text, deadline)
        except PermanentError as error:  # nothing was put
            return [from_error("r2", error)]
        except ServiceError as error:
            found = [from_error("r2", error)]
        try:
            self.bucket.delete(key, deadline=deadline)
        except ServiceError as error:
            if error.code not in [finding.code for finding in found]:
                sentence = f"The test object {key} could not be removed: {error.sentence}"
                found.append(Finding("r2", sentence, "r2_not_deleted"))
        return found

    def _put(self, key: str, text: bytes, deadline: Deadline) -> None:
        with Content(deadline) as content:
            content.write(text)
            self.bucket.put(key, content, content_type="text/plain", deadline=deadline)

    def _read_back(self, key: str, text: bytes, deadline: Deadline) -> list[Finding]:
        try:
            with self.bucket.read(key, deadline=deadline) as (_, pieces):
                same = b"".join(pieces) == text
        except ServiceError as error:
            return [from_error("r2", error)]
        if not same:
            return [Finding("r2", "The bucket gave back other bytes than were put.", "r2_mismatch")]
        found = Finding("r2", "It takes a file with its checksum, and gives it back.")
        return [found, self._look_at_cors(key, deadline), self._look_at_address(key, text, deadline)]

    def _look_at_cors(self, key: str, deadline: Deadline) -> Finding:
        """Whether a browser may put a picture there: what it asks before it does (a preflight)."""
        asked = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "PUT",
            "Access-Control-Request-Headers": "content-type",
        }
        url = f"{self.settings.r2_endpoint}/{self.settings.r2_bucket}/{key}"
        try:
            reply = self.wire.exchange(
                "r2", "OPTIONS", url, headers=asked, timeout=deadline.cap(ONE_CALL), max_bytes=MAX_ANSWER_BYTES
            )
        except ServiceError as error:
            return from_error("r2", error)
        if reply.status < 300 and reply.headers.get("Access-Control-Allow-Origin"):
            return Finding("r2", "Pages may put pictures there.")
        return Finding("r2", f"Pages may not put pictures there: a preflight is answered {reply.status}.", "r2_no_cors")

    def _look_at_address(self, key: str, text: bytes, deadline: Deadline) -> Finding:
        """Whether the address that a result would have serves what was put."""
        public = self.bucket.public_url(key)
        try:
            reply = self._get(public or self.bucket.presign(key, seconds=60), deadline)
        except ServiceError as error:
            return from_error("public", error)
        if reply.status == 200 and reply.body == text:
            kind = "The bucket's public address" if public else "An address made for a file of the private bucket"
            return Finding("public", f"{kind} serves what was put.")
        if not public:
            sentence = f"An address made for a file of the private bucket answers {reply.status}."
            return Finding("public", sentence, "presign_failed")
        return _wrong_address(reply)

    def _get(self, url: str, deadline: Deadline) -> Reply:
        return self.wire.exchange(
            "public", "GET", url, headers={}, timeout=deadline.cap(ONE_CALL), max_bytes=MAX_ANSWER_BYTES
        )

    def _look_at_spool(self, deadline: Deadline) -> list[Finding]:
        if self.spool is None:
            sentence = "None is set: while R2 fails, a finished picture waits at RunPod, for half an hour at most."
            return [Finding("spool", sentence)]
        # Always the same key, since the spool deletes nothing.
        with Content(deadline) as content:
            content.write(b"test")
            self.spool.put(TESTED_KEY, content, content_type="text/plain", deadline=deadline)
        self.spool.has(f"{TESTED_KEY}-{new_nonce(self.rng)}", deadline=deadline)  # 403 without the right to list
        if not self.spool.has(TESTED_KEY, deadline=deadline):
            return [Finding("spool", "The spool does not have what was just put there.", "spool_failed")]
        return [Finding("spool", "It takes a file, and has it then.")]

    def _look_at_runpod(self, deadline: Deadline) -> list[Finding]:
        found = [self._look_at_endpoint(self.settings.runpod_endpoint_id, "", deadline)]
        for model, endpoint in self.models.endpoints.items():
            found.append(self._look_at_endpoint(endpoint, f"{model}: ", deadline))
        return found

    def _look_at_endpoint(self, endpoint: str, before: str, deadline: Deadline) -> Finding:
        try:
            workers, jobs = self.runpod.health(endpoint, timeout=deadline.cap(ONE_CALL))
        except ServiceError as error:
            return Finding("runpod", f"{before}{error.sentence}", error.code)
        found = _workers(workers, jobs.get("inQueue", 0))
        return Finding("runpod", f"{before}{found.sentence}", found.code)

    def _look_at_webhook(self, deadline: Deadline) -> list[Finding]:
        """Call the deployed service as RunPod would, of a job that there is not."""
        url = self.webhooks.url(f"health-{new_nonce(self.rng)}", 1)
        if url is None:
            return [Finding("webhook", "None is set: the end of a run is found by polling, up to 15 s later.")]
        reply = self.wire.exchange(
            "webhook",
            "POST",
            url,
            headers={"Content-Type": "application/json"},
            body=b'{"id": "health"}',
            timeout=deadline.cap(ONE_CALL),
            max_bytes=MAX_ANSWER_BYTES,
        )
        return [_callback(reply)]


def _clock(off: float) -> list[Finding]:
    if abs(off) <= CLOCK_TOLERANCE:
        return [Finding("clock", "It agrees with D1's.")]
    where = "behind" if off > 0 else "ahead of"
    return [Finding("clock", f"This machine's clock is {abs(off):.0f} seconds {where} D1's.", "clock_wrong")]


def _schedule(said: Survey) -> list[Finding]:
    seen = said.rounds
    none_had = seen["others"] if not seen["had"] else 0
    if missed := max(seen["polls"], seen["forgotten"], seen["never_seen"], none_had):
        sentence = f"{_jobs_are(missed)} due for over three minutes, and no round has looked."
        return [Finding("schedule", sentence, "no_rounds")]
    if seen["others"]:
        return [Finding("schedule", f"The rounds go on; {_jobs_are(seen['others'])} waiting for their turn.")]
    return [Finding("schedule", "No job is overdue.")]


def _paused(said: Survey) -> list[Finding]:
    return [
        Finding(
            "endpoints",
            f"The endpoint {row['endpoint_id']} answers only errors ({row['failures']} {row['kind']}s in a row); "
            f"nothing is sent there until {row['paused_until']}. {row['sentence']}",
            "endpoint_errors",
        )
        for row in said.paused
    ] or [Finding("endpoints", "Jobs are sent to all of them.")]


def _jobs(said: Survey) -> list[Finding]:
    found = []
    for line in said.failures:
        refused = line["error_code"] == "runpod_refused"
        code = line["error_code"] or "no code"  # as those of the earlier version
        sentence = f"{_jobs_have(line['jobs'])} failed of those made within a day, with {code}: {line['example']}"
        found.append(Finding("jobs", sentence, "jobs_refused" if refused else "jobs_failed"))
    if said.dead_letters:
        sentence = f"{_jobs_have(said.dead_letters)} a result that could not be stored."
        found.append(Finding("jobs", sentence, "dead_letters"))
    return found or [Finding("jobs", "None that was made within a day has failed, and there is no dead letter.")]


def _jobs_are(number: int) -> str:
    return "1 job is" if number == 1 else f"{number} jobs are"


def _jobs_have(number: int) -> str:
    return "1 job has" if number == 1 else f"{number} jobs have"


def _wrong_address(reply: Reply) -> Finding:
    what = "The bucket's public address"
    if reply.status == 404:
        return Finding("public", f"{what} does not know a file that was just put (404).", "public_not_found")
    if reply.status in (401, 403):
        return Finding("public", f"{what} lets nobody read ({reply.status}).", "public_forbidden")
    if 300 <= reply.status < 400:
        return Finding("public", f"{what} leads on to {reply.headers.get('Location')}.", "public_redirect")
    return Finding("public", f"{what} answers {reply.status} with something else than the file.", "public_other")


def _workers(workers: dict[str, int], queued: int) -> Finding:
    """What RunPod's counts mean for the next job."""
    wait = f"{_jobs_are(queued)} waiting there" if queued else "nothing waits there"
    match condition_of(workers):
        case Condition.WORKING:
            # One that idles is counted as ready, too.
            there = max(workers.get("ready", 0), workers.get("idle", 0)) + workers.get("running", 0)
            return Finding("runpod", f"The endpoint has {there} worker{'s' if there > 1 else ''}; {wait}.")
        case Condition.STARTING:
            return Finding("runpod", f"The endpoint's workers are only just starting; {wait}.", "workers_starting")
        case Condition.THROTTLED:
            sentence = f"The endpoint's workers are throttled: no GPU is free; {wait}."
            return Finding("runpod", sentence, "workers_throttled")
        case Condition.UNHEALTHY:
            return Finding("runpod", f"The endpoint's workers are unhealthy; {wait}.", "workers_unhealthy")
    if queued:
        return Finding("runpod", f"The endpoint has no worker, and gets none; {wait}.", "workers_none")
    return Finding("runpod", "The endpoint has no worker now, and no job.", "workers_scaled_to_zero")


def _callback(reply: Reply) -> Finding:
    said = _body(reply)
    code = said.get("code")
    if (reply.status, code) == (404, "job_not_found"):
        return Finding("webhook", "A callback reaches the deployed service, which knows it for genuine.")
    if code == "webhook_later":
        return Finding("webhook", "Callbacks are put off: there are too few calls to D1 for them.", "d1_few_calls")
    if code == "webhook_forbidden":
        sentence = "The deployed service does not know the callback for genuine: its WEBHOOK_SECRET is another one."
        return Finding("webhook", sentence, "webhook_other_secret")
    if code == "route_not_found" or said.get("message") in ("Missing Authentication Token", "Forbidden", "Not Found"):
        return Finding("webhook", f"PUBLIC_BASE_URL has no such route ({reply.status}).", "webhook_no_route")
    if str(code).startswith("d1_"):
        sentence = f"A callback reaches the deployed service, which has no D1: {said['error']}"
        return Finding("webhook", sentence, "webhook_no_d1")
    if 300 <= reply.status < 400:
        return Finding("webhook", f"PUBLIC_BASE_URL leads on to {reply.headers.get('Location')}.", "webhook_redirect")
    if "code" in said and "error" in said:
        sentence = f"The deployed service cannot take callbacks ({reply.status} {code}): {said['error']}"
        return Finding("webhook", sentence, "webhook_failing")
    sentence = f"What answers at PUBLIC_BASE_URL ({reply.status}) is not this service."
    return Finding("webhook", sentence, "webhook_other_service")


def _body(reply: Reply) -> dict[str, Any]:
    try:
        body = json.loads(reply.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
