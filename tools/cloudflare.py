"""
Cloudflare's API, as far as it is needed to make what the service works with: accounts, D1 databases, R2 buckets.

https://developers.cloudflare.com/api/ – the exact calls stand with each method.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote, urlencode

from chalicelib import retry
from chalicelib.credentials import Credential
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.runtime import Clock
from chalicelib.wire import Reply, Wire, exchange_as

ONE_TRY = 30.0  # seconds
MAX_ANSWER_BYTES = 16_000_000
PER_PAGE = 100
MOST_PAGES = 100

# Codes of its errors. Those of D1: https://github.com/cloudflare/workers-sdk, packages/wrangler/src/d1/create.ts;
# of R2: https://developers.cloudflare.com/r2/api/error-codes/
NO_ROUTE = 7003
NO_ACCOUNT = 7403
NO_DATABASE = 7404
TOO_MANY_DATABASES = 7406
DATABASE_EXISTS = 7502
BUCKET_EXISTS = 10004
NO_BUCKET = 10006
R2_IS_OFF = 10042
NO_CORS = 10059

RATE_LIMITED = "cloudflare_rate_limited"  # a repeat might prolong it
ACCOUNT_RIGHT = "Account Settings · Read"
D1_RIGHT = "D1 · Edit"
R2_RIGHT = "Workers R2 Storage · Edit"
TOKEN = (
    f"Make an API token with the rights Account · {D1_RIGHT} and Account · {R2_RIGHT} for this account (dashboard, "
    "Manage account, Account API tokens), and give it to this command as CLOUDFLARE_API_TOKEN in the environment, "
    "which wins over the file; the service itself needs only the first of them."
)

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cloudflare:
    """
    One account, and of its buckets those of one jurisdiction, where it is not the default one.

    What only asks, and what may be sent twice, is repeated after failures that may pass; what makes something is sent
    once. Every method raises TransientError (nothing happened), IndeterminateError or PermanentError.
    """

    wire: Wire
    clock: Clock
    rng: Random
    base_url: str
    token: Credential[str]
    account_id: str = ""
    jurisdiction: str = ""

    def accounts(self) -> list[Result]:
        """
        Those that the token sees, up to fifty.

        https://developers.cloudflare.com/api/resources/accounts/methods/list/
        """
        found: list[Result] = self._ask("accounts?per_page=50", ACCOUNT_RIGHT) or []
        return found

    def databases(self, name: str) -> list[Result]:
        """
        Those of exactly this name; what Cloudflare takes the query for is not documented, so all its pages are looked
        through.

        https://developers.cloudflare.com/api/resources/d1/subresources/database/methods/list/
        """
        found: dict[str, Result] = {}
        for page in range(1, MOST_PAGES + 1):
            query = urlencode({"name": name, "page": page, "per_page": PER_PAGE})
            known, entries = len(found), self._ask(f"{self._databases}?{query}", D1_RIGHT) or []
            found |= {entry["uuid"]: entry for entry in entries}
            if len(found) == known or len(entries) < PER_PAGE:
                break
        return [entry for entry in found.values() if entry["name"] == name]

    def database(self, database_id: str) -> Result | None:
        """
        The one with this id.

        https://developers.cloudflare.com/api/resources/d1/subresources/database/methods/get/
        """
        return self._find(f"{self._databases}/{quote(database_id, safe='')}", D1_RIGHT, absent=NO_DATABASE)

    def make_database(self, name: str, location: str) -> None:
        """
        Make it, in or near a location if one is given; of a name there is one. Raises PermanentError `d1_exists` too.

        https://developers.cloudflare.com/api/resources/d1/subresources/database/methods/create/
        """
        near = {"primary_location_hint": location} if location else {}
        self._send("POST", self._databases, D1_RIGHT, {"name": name, **near})

    def bucket(self, name: str) -> Result | None:
        """
        The bucket of this name.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/methods/get/
        """
        return self._find(self._bucket(name), R2_RIGHT, absent=NO_BUCKET)

    def make_bucket(self, name: str, location: str) -> None:
        """
        Make it, near a location if one is given. Raises PermanentError `r2_exists` too.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/methods/create/
        """
        near = {"locationHint": location} if location else {}
        self._send("POST", f"accounts/{self.account_id}/r2/buckets", R2_RIGHT, {"name": name, **near})

    def cors_rules(self, bucket: str) -> list[Result]:
        """
        The rules for pages; their form is not S3's.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/subresources/cors/methods/get/
        """
        found = self._find(f"{self._bucket(bucket)}/cors", R2_RIGHT, absent=NO_CORS) or {}
        return found.get("rules") or []

    def put_cors_rules(self, bucket: str, rules: list[Result]) -> None:
        """
        Have these rules and no others.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/subresources/cors/methods/update/
        """
        self._send("PUT", f"{self._bucket(bucket)}/cors", R2_RIGHT, {"rules": rules})

    def lifecycle_rules(self, bucket: str) -> list[Result]:
        """
        The rules by which objects and unfinished uploads are removed.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/subresources/lifecycle/methods/get/
        """
        return (self._ask(f"{self._bucket(bucket)}/lifecycle", R2_RIGHT) or {}).get("rules") or []

    def put_lifecycle_rules(self, bucket: str, rules: list[Result]) -> None:
        """
        Have these rules and no others.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/subresources/lifecycle/methods/update/
        """
        self._send("PUT", f"{self._bucket(bucket)}/lifecycle", R2_RIGHT, {"rules": rules})

    def custom_domains(self, bucket: str) -> list[Result]:
        """
        The domains at which the bucket is public, or is to be.

        https://developers.cloudflare.com/api/resources/r2/subresources/buckets/subresources/domains/
        """
        return (self._ask(f"{self._bucket(bucket)}/domains/custom", R2_RIGHT) or {}).get("domains") or []

    def managed_domain(self, bucket: str) -> Result:
        """Its address at r2.dev, and whether that is on; the source is that of custom_domains()."""
        return self._ask(f"{self._bucket(bucket)}/domains/managed", R2_RIGHT) or {}

    @property
    def _databases(self) -> str:
        return f"accounts/{self.account_id}/d1/database"

    def _bucket(self, name: str) -> str:
        return f"accounts/{self.account_id}/r2/buckets/{quote(name, safe='')}"

    def _find(self, path: str, right: str, *, absent: int) -> Result | None:
        """What is there; None where Cloudflare answers with the code for what is not."""
        try:
            return self._ask(path, right) or {}
        except PermanentError as error:
            if error.code == _code_of(absent):
                return None
            raise

    def _ask(self, path: str, right: str) -> Any:
        return self._send("GET", path, right, None)

    def _send(self, method: str, path: str, right: str, body: Result | None) -> Any:
        """The answer's `result`."""
        for failures in range(1, retry.CALL_ATTEMPTS + 1):
            try:
                return self._send_once(method, path, right, body)
            except (TransientError, IndeterminateError) as error:
                if method == "POST" or failures == retry.CALL_ATTEMPTS or error.code == RATE_LIMITED:
                    raise
                self.clock.sleep(retry.seconds_to_wait(retry.CALL, failures, rng=self.rng))
        raise AssertionError("the last try returns or raises")

    def _send_once(self, method: str, path: str, right: str, body: Result | None) -> Any:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.jurisdiction and "/r2/" in path:
            headers["cf-r2-jurisdiction"] = self.jurisdiction
        reply = exchange_as(
            self.token,
            self.wire,
            "cloudflare",
            method,
            f"{self.base_url}/{path}",
            headers=headers,
            body=json.dumps(body).encode() if body is not None else None,
            timeout=ONE_TRY,
            max_bytes=MAX_ANSWER_BYTES,
        )
        envelope = _envelope(reply)
        if reply.status < 300 and envelope.get("success") is True:
            return envelope.get("result")
        raise self._failure(reply, envelope, right)

    def _failure(self, reply: Reply, envelope: Result, right: str) -> ServiceError:
        errors = envelope.get("errors")
        first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
        code, said = first.get("code"), f"{str(first.get('message', 'no words'))[:500]} [{first.get('code')}]"
        if reply.status == 429:
            return TransientError(
                RATE_LIMITED,
                "Cloudflare is refusing API calls for a while: 1,200 in five minutes are for all of the account's "
                "tools. Wait five minutes, and run this again.",
                retry_after=reply.retry_after,
            )
        if not first or reply.status >= 500:
            return IndeterminateError(
                "cloudflare_bad_answer",
                f"Cloudflare's API gave no usable answer (HTTP {reply.status}). Run this again.",
            )
        if code in MENDS:
            return PermanentError(_code_of(code), f"{MENDS[code]} ({said})")
        if code == NO_ACCOUNT:
            return PermanentError(
                "cloudflare_account",
                f"Cloudflare does not let this token into account {self.account_id} ({said}): CLOUDFLARE_ACCOUNT_ID is "
                f"another account's, or the token lacks the right Account · {right}. {TOKEN}",
            )
        if reply.status in (401, 403):
            account = f" for account {self.account_id}" if self.account_id else ""
            return PermanentError(
                "cloudflare_unauthorized",
                f"Cloudflare refused the token (HTTP {reply.status}, {said}): it is not valid, or lacks the right "
                f"Account · {right}{account}. {TOKEN}",
            )
        return PermanentError(_code_of(code), f"Cloudflare refused this: {said}, HTTP {reply.status}.")


# What is said of some of its errors, the next step with it.
MENDS = {
    NO_ROUTE: "CLOUDFLARE_ACCOUNT_ID is no account's id, which has 32 hexadecimal digits, or D1_DATABASE_ID no UUID; "
    "`npx wrangler whoami` and `npx wrangler d1 list` show them.",
    R2_IS_OFF: "R2 is not switched on in this account: open R2 Object Storage in the dashboard, agree to it there, and "
    "run this again.",
    TOO_MANY_DATABASES: "The account has as many D1 databases as its plan allows: delete one, or take a larger plan; "
    "then run this again.",
}
CODES = {DATABASE_EXISTS: "d1_exists", BUCKET_EXISTS: "r2_exists"}


def _code_of(code: object) -> str:
    """Our word for Cloudflare's number."""
    return CODES.get(code, f"cloudflare_{code}") if isinstance(code, int) else "cloudflare_refused"


def _envelope(reply: Reply) -> Result:
    try:
        envelope = json.loads(reply.body)
    except ValueError:
        return {}
    return envelope if isinstance(envelope, dict) else {}
