"""What can be wrong around the service: how bad each is and how it is mended, and what the settings alone give away."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from chalicelib.auth import ApiKey
from chalicelib.errors import ServiceError
from chalicelib.records import dataclass
from chalicelib.settings import Settings


class Level(StrEnum):
    """Whether anything has to be done: an error keeps jobs from being drawn or stored, a warning does not."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


TOKEN = "In Cloudflare's dashboard make an API token with the right Account · D1 · Edit, and set CLOUDFLARE_API_TOKEN."
R2_TOKEN = (
    "In Cloudflare's dashboard under R2, API tokens, make one with Object Read & Write on the bucket; set "
    "R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY, both of the same token."
)
PUBLIC = "In the bucket's settings connect a custom domain, and set R2_PUBLIC_BASE_URL to https:// and that domain."
LATER = "Look at the provider's status page, and try again."

# Whatever may be found, by its code; the mend is for the operator.
ERRORS = {
    "setting_missing": "Put it into .env.local, or into the stage's file and deploy again.",
    "setting_malformed": "Correct the value.",
    "models_malformed": "Correct chalicelib/models.json where the sentence says, and deploy.",
    "ssm_refused": "Let whoever runs this read it (ssm:GetParameters), in the account and the region of AWS_REGION.",
    "ssm_not_asked": "Set AWS_REGION, and AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; where a session "
    "is over, log in anew (`aws sso login`).",
    "ssm_unreachable": LATER,
    "account_id_shape": "The id has 32 hexadecimal digits; `npx wrangler whoami` shows it.",
    "database_id_shape": "The id is a UUID, not the database's name; `npx wrangler d1 list` shows both.",
    "runpod_other_api": "Leave RUNPOD_API_BASE out; jobs go to https://api.runpod.ai/v2.",
    "r2_endpoint_has_bucket": "Leave the bucket's name out of R2_ENDPOINT_URL.",
    "public_url_is_s3": PUBLIC,
    "webhook_local": "Set PUBLIC_BASE_URL to the https address of the deployed API, or leave it out.",
    "keys_not_configured": "Make a key with `python -m tools.keys new NAME`, and put its entry into API_KEY_HASHES.",
    "empty_key": 'Hash the key itself: printf %s "$key" | sha256sum',
    "key_with_line_end": 'Hash the key without a line end: printf %s "$key" | sha256sum, not echo.',
    "key_unknown": "Put its entry, or its SHA-256, into API_KEY_HASHES.",
    "d1_unreachable": "Leave CLOUDFLARE_API_BASE out, unless you mean another API; else look at the network.",
    "d1_timeout": LATER,
    "d1_bad_answer": LATER,
    "d1_unauthorized": TOKEN,
    "d1_account": "Set CLOUDFLARE_ACCOUNT_ID to the account of the token and the database (`npx wrangler whoami`).",
    "d1_not_found": "Set D1_DATABASE_ID to the id that `npx wrangler d1 list` shows for this account; or take the line "
    "out, and `python -m tools.provision` finds or makes one.",
    "d1_read_only": TOKEN,
    "d1_quota": "It begins anew at 00:00 UTC; the paid plan has no daily limit.",
    "d1_overloaded": LATER,
    "d1_internal": LATER,
    "d1_reset": LATER,
    "d1_rate_limited": "Wait five minutes. Something else that uses Cloudflare's API may be busy: 1,200 calls in five "
    "minutes are for all of the account's tools.",
    "d1_no_tables": "Run `python -m tools.schema` with the same --env; if it should have jobs, check D1_DATABASE_ID.",
    "d1_schema": "Run `python -m tools.schema` with the same --env.",
    "d1_other_table": "Set D1_DATABASE_ID to the database of this service.",
    "d1_unfit": "Export the rows, make another database, run tools.schema there, restore them; set D1_DATABASE_ID.",
    "d1_old_schema": "Run `python -m tools.schema` with the same --env.",
    "clock_wrong": "Let the machine set its clock by the network (NTP).",
    "no_rounds": "Look whether the function poll_jobs runs: its schedule, its log, its concurrency. Meanwhile "
    "POST /dev/runpod-poll runs a round.",
    "r2_unreachable": "Leave R2_ENDPOINT_URL out: it is made from the account id.",
    "r2_unauthorized": R2_TOKEN,
    "r2_signature": R2_TOKEN,
    "r2_denied": R2_TOKEN,
    "r2_refused": R2_TOKEN,
    "r2_no_bucket": "Set R2_BUCKET to the name of a bucket of this account, or make it: `python -m tools.provision`.",
    "r2_clock": "Let the machine set its clock by the network (NTP).",
    "r2_checksum": "Something on the way changes uploads, or boto3 is not the version of requirements-dev.txt.",
    "r2_failed": LATER,
    "r2_too_slow": LATER,
    "r2_mismatch": "Look whether something else writes to the bucket.",
    "public_unreachable": "Check the name in R2_PUBLIC_BASE_URL. " + PUBLIC,
    "public_bad_certificate": "Wait until Cloudflare has made the domain's certificate; check its name.",
    "public_timeout": LATER,
    "public_not_found": "It is another bucket's address, or has a path too many. " + PUBLIC,
    "public_forbidden": "Allow public access in the bucket's settings; a firewall rule or Access may stand before it.",
    "public_redirect": "Set R2_PUBLIC_BASE_URL to the address where the redirect ends.",
    "public_other": "It is another server, or a page stands before the bucket. " + PUBLIC,
    "presign_failed": R2_TOKEN,
    "spool_failed": "Check SPOOL_BUCKET, and that whoever runs this may s3:PutObject and s3:GetObject on its spool/*, "
    "and s3:ListBucket.",
    "runpod_unreachable": "Leave RUNPOD_API_BASE out, unless you mean another API; else look at the network.",
    "runpod_timeout": LATER,
    "runpod_bad_answer": "A load-balancing endpoint has no queue; make a queue-based one. Otherwise try again.",
    "runpod_unauthorized": "Make an API key in RunPod's settings that may use this endpoint, and set RUNPOD_API_KEY.",
    "runpod_no_endpoint": "Set RUNPOD_ENDPOINT_ID to the id of a serverless endpoint of this RunPod account.",
    "workers_none": "In RunPod raise the endpoint's max workers (RunPod itself sets it to 0 after a week without use), "
    "and look at the account's balance.",
    "workers_throttled": "RunPod has no free GPU of the kinds chosen: add kinds or regions in the endpoint's settings.",
    "workers_unhealthy": "Look at a worker's log in RunPod: its image does not start, or crashes.",
    "endpoint_errors": "Mend what the sentence names. Then one job tries it by itself; POST /dev/runpod does at once.",
    "webhook_unreachable": "Check PUBLIC_BASE_URL: it is the address that `./deploy aws` printed, or your own domain.",
    "webhook_bad_certificate": "Check the name in PUBLIC_BASE_URL, and the domain's certificate.",
    "webhook_timeout": LATER,
    "webhook_no_route": "PUBLIC_BASE_URL must end in the API's stage, such as /v1, unless it is a custom domain.",
    "webhook_other_secret": "Set that of the deployed service here. To change it there, put the new one under another "
    "name into SSM, name that in WEBHOOK_SECRET, and deploy.",
    "webhook_redirect": "Set PUBLIC_BASE_URL to the address where the redirect ends; RunPod does not follow it.",
    "webhook_other_service": "Check PUBLIC_BASE_URL: something else answers there.",
    "webhook_failing": "Run this with the deployed service's settings; its log says more.",
    "drawing_failed": "Mend what the sentence names; README's table of error codes says more.",
    "drawing_late": "Look at the endpoint's queue and workers in RunPod, and whether the schedule runs.",
}
WARNINGS = {
    "webhook_half": "Set both, or neither: ends are found by polling then, up to 15 s later.",
    "webhook_no_d1": "Mend D1 first; callbacks are taken again then.",
    "jobs_refused": "RunPod itself did not take the body; its words say why (it may have 10 MB). Where a worker does "
    "not like an input, it fails, and its words are in the job.",
    "setting_unknown": "Rename it, or take it out.",
    "public_url_r2_dev": "It is for development, and limited in rate. " + PUBLIC,
    "private_hosts": "Take RESULT_ALLOWED_PRIVATE_HOSTS out where the real RunPod draws.",
    "anonymous": "Set ALLOW_ANONYMOUS back to false when the old clients have moved.",
    "d1_few_calls": "Something uses up Cloudflare's 1,200 calls in five minutes; over them the account is locked out.",
    "d1_newer_schema": "Deploy the code that the database was made for; this code is older.",
    "d1_drift": "Run `python -m tools.schema --check` with the same --env, which says what differs.",
    "r2_no_cors": "`python -m tools.provision` sets the bucket's CORS policy, or paste r2-cors.json into its settings; "
    "until then only pages cannot upload.",
    "r2_not_deleted": "Remove it by hand; it does no harm.",
    "workers_scaled_to_zero": "Nothing, if the first job may wait for a worker to start; else set active workers to 1.",
    "workers_starting": "Wait; if it stays so, look at a worker's log in RunPod.",
    "left_out": "Mend those first, then look again.",
    "jobs_failed": "README's table of error codes says what each means.",
    "dead_letters": "Mend what failed. GET /api/dead-letters says what is left of each: redrive that before it is "
    "forgotten; the others are drawn again by a retry.",
}
ELSE = "Read the sentence, and try again."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; its code is `ok` where it is as it should be."""

    check: str
    sentence: str
    code: str = "ok"

    @property
    def level(self) -> Level:
        """How bad it is; what has no entry of its own is an error."""
        if self.code == "ok":
            return Level.OK
        return Level.WARNING if self.code in WARNINGS else Level.ERROR

    @property
    def mend(self) -> str:
        """What to do about it."""
        return "" if self.code == "ok" else WARNINGS.get(self.code) or ERRORS.get(self.code, ELSE)


def from_error(check: str, error: ServiceError) -> Finding:
    """What a client said, as a finding."""
    return Finding(check, error.sentence, error.code)


def in_short(found: list[Finding]) -> dict[str, Any]:
    """For a monitor: the level of each check, and what is wrong; with an error in one sentence where there is any."""
    problems = [finding for finding in found if finding.level is not Level.OK]
    errors = [finding for finding in problems if finding.level is Level.ERROR]
    bad = {"ok": False, "error": " ".join(finding.sentence for finding in errors), "code": "unhealthy"}
    return {
        **(bad if errors else {}),
        "checks": {finding.check: finding.level for finding in [*found, *problems, *errors]},  # the worst comes last
        "problems": [
            {
                "check": finding.check,
                "level": finding.level,
                "code": finding.code,
                "sentence": finding.sentence,
                "mend": finding.mend,
            }
            for finding in problems
        ],
    }


REAL_CLOUDFLARE = "api.cloudflare.com"
REAL_RUNPOD = "api.runpod.ai"
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
ACCOUNT_ID = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)
HASH_OF_NOTHING = {hashlib.sha256(nothing).hexdigest() for nothing in (b"", b"\n", b"\r\n")}


def of_settings(config: Settings) -> list[Finding]:
    """What is odd about the settings, each by itself right, without asking anybody."""
    odd = [*_of_cloudflare(config), *_of_runpod(config), *_of_webhooks(config)]
    return odd or [Finding("settings", "They are complete, and fit each other.")]


def _of_cloudflare(config: Settings) -> Iterator[Finding]:
    real = urlsplit(config.cloudflare_api_base).hostname == REAL_CLOUDFLARE
    account, database = config.cloudflare_account_id, config.d1_database_id
    if real and account and not ACCOUNT_ID.fullmatch(account):
        yield Finding("settings", "CLOUDFLARE_ACCOUNT_ID is no account id.", "account_id_shape")
    if real and database and not UUID.fullmatch(database):
        yield Finding("settings", "D1_DATABASE_ID is no database id.", "database_id_shape")
    if config.r2_endpoint_url.endswith(f"/{config.r2_bucket}"):
        yield Finding("settings", "R2_ENDPOINT_URL ends in the bucket's name.", "r2_endpoint_has_bucket")
    public = urlsplit(config.r2_public_base_url).hostname or ""
    if public.endswith(".r2.cloudflarestorage.com"):
        yield Finding(
            "settings", "R2_PUBLIC_BASE_URL is the S3 endpoint, where nobody may read without keys.", "public_url_is_s3"
        )
    if public.endswith(".r2.dev"):
        yield Finding("settings", "R2_PUBLIC_BASE_URL is the bucket's r2.dev address.", "public_url_r2_dev")


def _of_runpod(config: Settings) -> Iterator[Finding]:
    host = urlsplit(config.runpod_api_base).hostname or ""
    if re.fullmatch(r"(rest|api)\.runpod\.io|.+\.api\.runpod\.ai", host):
        yield Finding("settings", f"RUNPOD_API_BASE is {host}, which is not the queue API.", "runpod_other_api")
    if host == REAL_RUNPOD and config.result_allowed_private_hosts:
        yield Finding(
            "settings",
            "RESULT_ALLOWED_PRIVATE_HOSTS lets links of real workers lead into your own network.",
            "private_hosts",
        )


def _of_webhooks(config: Settings) -> Iterator[Finding]:
    url, real = urlsplit(config.public_base_url), urlsplit(config.runpod_api_base).hostname == REAL_RUNPOD
    if bool(config.public_base_url) != bool(config.webhook_secret):
        there, lacking = ("PUBLIC_BASE_URL", "WEBHOOK_SECRET")[:: 1 if config.public_base_url else -1]
        yield Finding("settings", f"{there} is set, but {lacking} is not, so RunPod calls nobody.", "webhook_half")
    local = url.scheme != "https" or re.fullmatch(r"localhost|127\..*|10\..*|192\.168\..*", url.hostname or "")
    if real and config.public_base_url and local:
        yield Finding(
            "settings", "PUBLIC_BASE_URL is no public https address; RunPod cannot reach it.", "webhook_local"
        )


def of_keys(config: Settings) -> list[Finding]:
    """Who may call."""
    if not config.api_key_hashes:
        return [Finding("keys", "No API key is configured; every request is refused.", "keys_not_configured")]
    found = []
    if {key.hash for key in config.api_key_hashes} & HASH_OF_NOTHING:
        found.append(Finding("keys", "API_KEY_HASHES has the hash of an empty key.", "empty_key"))
    if config.allow_anonymous:
        found.append(Finding("keys", "Anybody may create jobs and ask for them without a key.", "anonymous"))
    return found or [Finding("keys", f"API keys: {_in_words(config.api_key_hashes)}.")]


def _in_words(keys: Iterable[ApiKey]) -> str:
    counted = Counter(key.right for key in keys)
    return ", ".join(f"{number} with the right {right.word}" for right, number in sorted(counted.items()))
