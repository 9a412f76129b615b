"""
What Cloudflare's API has besides D1's queries: accounts, databases, buckets, and a bucket's rules and domains.

It is kept in one file of the folder. A database that was made is one more D1, a bucket one more R2, each by its own
files there. The rules of a lifecycle are only kept: nothing here grows old.
"""

import json
import os
import re
import threading
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tools.cloud import Account, Answer, Request, json_answer
from tools.cloud.cors import Cors
from tools.cloud.d1 import D1
from tools.cloud.r2 import R2

FIRST_DATABASE = "ob-ai-studio-local"
PREFIX = "/client/v4/"
QUERY = re.compile(r"/client/v4/accounts/[^/]+/d1/database/([^/]+)/query")
DATABASE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]*")
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
# Every new bucket has it: https://developers.cloudflare.com/r2/buckets/object-lifecycles/
DEFAULT_RULE = {
    "id": "Default Multipart Abort Rule",
    "enabled": True,
    "conditions": {},
    "abortMultipartUploadsTransition": {"condition": {"type": "Age", "maxAge": 604_800}},
}
ACCOUNT_REFUSED = 403, 7403, "The given account is not valid or is not authorized to access this service"
NO_BUCKET = 404, 10006, "The specified bucket does not exist."
NO_CORS = 404, 10059, "The CORS configuration does not exist."
MALFORMED = 400, 10040, "The JSON you provided was not well formed."

Entry = dict[str, Any]


class Cloudflare:
    """The account's databases and buckets, those from the start among them."""

    def __init__(self, folder: Path, account: Account, d1: D1, r2: R2) -> None:
        self._file = folder / "cloudflare.json"
        self._account = account
        self._lock = threading.Lock()
        self._d1 = {account.database_id: d1}
        self._r2 = {account.bucket: r2}
        if self._file.exists():
            self._kept: dict[str, dict[str, Entry]] = json.loads(self._file.read_text(encoding="utf-8"))
        else:
            first = {"uuid": account.database_id, "name": FIRST_DATABASE, "created_at": _now(), "version": "production"}
            bucket = {**_new_bucket(account.bucket, "default"), "cors": r2.cors.rules}
            self._kept = {"databases": {account.database_id: first}, "buckets": {account.bucket: bucket}}
        for database_id in self._kept["databases"]:
            self._open_database(database_id)
        for key, kept in self._kept["buckets"].items():
            self._open_bucket(key, kept)

    def handle(self, request: Request) -> Answer:
        """Answer one API call; a query is the database's own."""
        if asked := QUERY.fullmatch(request.path):
            return self._d1.get(asked[1], self._d1[self._account.database_id]).handle(request)
        if request.headers.get("authorization") != f"Bearer {self._account.api_token}":
            return _fail(403, 10000, "Authentication error")
        with self._lock:
            return self._route(request, request.path.removeprefix(PREFIX).split("/"))

    def s3(self, request: Request) -> Answer:
        """Answer one S3 call, as the bucket that it names."""
        bucket = request.path.removeprefix("/r2/").partition("/")[0]
        return self._r2.get(bucket, self._r2[self._account.bucket]).handle(request)

    def close(self) -> None:
        """Let go of the files of what was made."""
        for database_id, d1 in self._d1.items():
            if database_id != self._account.database_id:
                d1.close()

    def change_bucket(self, name: str, **entries: Any) -> None:
        """For tests: its `domains`, or its `managed` one, which nobody connects through here; or other rules."""
        self._kept["buckets"][name].update(entries)
        self._save()

    def _route(self, request: Request, parts: list[str]) -> Answer:
        ours = self._account.account_id
        match (request.method, *parts):
            case ("GET", "accounts"):
                return _list([{"id": ours, "name": "the local cloud's account"}], request)
            case (_, "accounts", account, "d1", *_) if account != ours:
                return _fail(*ACCOUNT_REFUSED)
            case (_, "accounts", account, *_) if account != ours:
                return _fail(403, 10000, "Authentication error")
            case ("GET", "accounts", _, "d1", "database"):
                return self._list_databases(request)
            case ("POST", "accounts", _, "d1", "database"):
                return self._make_database(_body(request).get("name"))
            case ("GET", "accounts", _, "d1", "database", database_id):
                found = self._kept["databases"].get(database_id)
                return _done(found) if found else _fail(404, 7404, "The database could not be found")
            case (_, "accounts", _, "r2", "buckets", *rest):
                return self._route_bucket(request, rest)
        return _fail(404, 7003, f"Could not route to {request.path}, perhaps your object identifier is invalid?")

    def _route_bucket(self, request: Request, rest: list[str]) -> Answer:
        jurisdiction = request.headers.get("cf-r2-jurisdiction", "default")
        if request.method == "POST" and not rest:
            return self._make_bucket(_body(request).get("name"), jurisdiction)
        found = self._kept["buckets"].get(_key(rest[0], jurisdiction)) if rest else None
        if found is None:
            return _fail(*NO_BUCKET)
        match (request.method, *rest[1:]):
            case ("GET",):
                return _done({name: value for name, value in found.items() if name not in KEPT_BESIDE})
            case ("GET", "cors"):
                return _done({"rules": found["cors"]}) if found["cors"] else _fail(*NO_CORS)
            case ("PUT", "cors"):
                return self._put_rules(found, "cors", _body(request).get("rules"))
            case ("GET", "lifecycle"):
                return _done({"rules": found["lifecycle"]})
            case ("PUT", "lifecycle"):
                return self._put_rules(found, "lifecycle", _body(request).get("rules"))
            case ("GET", "domains", "custom"):
                return _done({"domains": found["domains"]})
            case ("GET", "domains", "managed"):
                return _done(found["managed"])
        return _fail(404, 7003, f"Could not route to {request.path}, perhaps your object identifier is invalid?")

    def _list_databases(self, request: Request) -> Answer:
        sought = parse_qs(request.query).get("name", [""])[0].lower()
        found = [entry for entry in self._kept["databases"].values() if sought in entry["name"].lower()]
        return _list(found, request)

    def _make_database(self, name: Any) -> Answer:
        if not isinstance(name, str) or not DATABASE_NAME.fullmatch(name):
            return _fail(400, 7400, "The request is malformed: name must match pattern")
        if any(entry["name"] == name for entry in self._kept["databases"].values()):
            return _fail(400, 7502, "A database with that name already exists")
        made = {"uuid": str(uuid.uuid4()), "name": name, "created_at": _now(), "version": "production"}
        self._kept["databases"][made["uuid"]] = made
        self._open_database(made["uuid"])
        self._save()
        return _done(made)

    def _make_bucket(self, name: Any, jurisdiction: str) -> Answer:
        if not isinstance(name, str) or not BUCKET_NAME.fullmatch(name):
            return _fail(400, 10005, "The specified bucket name is not valid.")
        key = _key(name, jurisdiction)
        if key in self._kept["buckets"]:
            return _fail(409, 10004, "The bucket you tried to create already exists, and you own it.")
        made = self._kept["buckets"][key] = _new_bucket(name, jurisdiction)
        self._open_bucket(key, made)
        self._save()
        return _done({name: value for name, value in made.items() if name not in KEPT_BESIDE})

    def _put_rules(self, bucket: Entry, kind: str, rules: Any) -> Answer:
        if not isinstance(rules, list) or not all(map({"cors": _is_cors, "lifecycle": _is_lifecycle}[kind], rules)):
            return _fail(*MALFORMED)
        ids = [rule["id"] for rule in rules if "id" in rule]
        if len(ids) != len(set(ids)):
            return _fail(*MALFORMED)
        bucket[kind] = rules
        self._open_bucket(_key(bucket["name"], bucket["jurisdiction"]), bucket)
        self._save()
        return _done({})

    def _open_database(self, database_id: str) -> None:
        if database_id not in self._d1:
            path = self._file.with_name(f"d1-{database_id}.sqlite")
            self._d1[database_id] = D1(path, replace(self._account, database_id=database_id))

    def _open_bucket(self, key: str, kept: Entry) -> None:
        if key not in self._r2:
            self._r2[key] = self._r2[self._account.bucket].beside(key)
        self._r2[key].cors = Cors(kept["cors"])

    def _save(self) -> None:
        temporary = self._file.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(self._kept, indent=1), encoding="utf-8")
        os.replace(temporary, self._file)


KEPT_BESIDE = ("cors", "lifecycle", "domains", "managed")


def _new_bucket(name: str, jurisdiction: str) -> Entry:
    return {
        "name": name,
        "creation_date": _now(),
        "location": "WEUR",
        "storage_class": "Standard",
        "jurisdiction": jurisdiction,
        "cors": [],
        "lifecycle": [DEFAULT_RULE],
        "domains": [],
        "managed": {"bucketId": name, "domain": f"pub-{name}.r2.dev", "enabled": False},
    }


def _key(name: str, jurisdiction: str) -> str:
    """Of the same name there may be a bucket in each jurisdiction; S3 here reaches only those of the default one."""
    return name if jurisdiction == "default" else f"{jurisdiction}_{name}"


def _is_cors(rule: Any) -> bool:
    """Whether it has the form of this API, which is not S3's."""
    if not isinstance(rule, dict) or not rule.keys() <= {"id", "allowed", "exposeHeaders", "maxAgeSeconds"}:
        return False
    allowed = rule.get("allowed")
    return isinstance(allowed, dict) and {"methods", "origins"} <= allowed.keys() <= {"methods", "origins", "headers"}


def _is_lifecycle(rule: Any) -> bool:
    return (
        isinstance(rule, dict)
        and isinstance(rule.get("id"), str)
        and isinstance(rule.get("enabled"), bool)
        and isinstance(rule.get("conditions"), dict)
    )


def _body(request: Request) -> Entry:
    try:
        body = json.loads(request.body)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _list(entries: list[Entry], request: Request) -> Answer:
    query = parse_qs(request.query)
    page, size = (int(query.get(name, [default])[0]) for name, default in (("page", "1"), ("per_page", "20")))
    shown = entries[(page - 1) * size : page * size]
    info = {"page": page, "per_page": size, "count": len(shown), "total_count": len(entries)}
    return _done(shown, result_info=info)


def _done(result: Any, **more: Any) -> Answer:
    return json_answer(200, {"result": result, "success": True, "errors": [], "messages": [], **more})


def _fail(status: int, code: int, message: str) -> Answer:
    return json_answer(
        status, {"result": None, "success": False, "errors": [{"code": code, "message": message}], "messages": []}
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
