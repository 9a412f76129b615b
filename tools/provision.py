"""
Makes, or finds, what the service needs at Cloudflare: the D1 database with its tables, and the R2 bucket with its rules
for pages and for leftovers; then writes what it made into the stage's file of settings.

    python -m tools.provision --env .env.prod          only says what is there and what it would do; changes nothing
    python -m tools.provision --env .env.prod --apply  does it

Both are safe to repeat: what is there is left as it is, nothing is ever removed or replaced, and a run that broke off
is finished by the next. The file need not be there yet; of one that is, every line stays as it is.

It wants CLOUDFLARE_API_TOKEN, in the environment or the file, with the rights Account · D1 · Edit and Account · Workers
R2 Storage · Edit; it is never written. CLOUDFLARE_ACCOUNT_ID may be missing where the token sees just one account.

Each line of what it says begins with = (is there), + (is to be done) or ! (look at this). Not yet run against the real
Cloudflare: it is tested against the local cloud's version of these calls.
"""

import argparse
import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import SystemRandom
from typing import Any
from urllib.parse import urlsplit

from chalicelib import advice, settings
from chalicelib.credentials import Credential
from chalicelib.d1 import D1
from chalicelib.errors import IndeterminateError, PermanentError, ServiceError, TransientError
from chalicelib.runtime import Clock
from chalicelib.settings import Settings
from chalicelib.wire import Wire
from tools import Problem, bucket_rules, cloudflare, env_file, schema, template
from tools.cloudflare import Cloudflare, Result

NO_FILE = Path(os.devnull)
NAME = "ob-ai-studio"
NEEDED = (
    "CLOUDFLARE_ACCOUNT_ID",
    "CLOUDFLARE_API_TOKEN",
    "CLOUDFLARE_API_BASE",
    "D1_DATABASE_ID",
    "R2_BUCKET",
    "R2_ENDPOINT_URL",
    "R2_PUBLIC_BASE_URL",
)
WRITTEN = ("CLOUDFLARE_ACCOUNT_ID", "D1_DATABASE_ID", "R2_BUCKET")
# https://developers.cloudflare.com/r2/buckets/create-buckets/
BUCKET_NAME = r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]"
# The pattern of D1's API: https://developers.cloudflare.com/api/resources/d1/subresources/database/methods/create/
DATABASE_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_-]*"
# https://developers.cloudflare.com/r2/reference/data-location/ and https://developers.cloudflare.com/d1/configuration/data-location/
LOCATIONS = ("wnam", "enam", "weur", "eeur", "apac", "oc")
OTHER_JURISDICTIONS = ("eu", "fedramp")
LOOKS = 5  # for what may have been made by a call whose answer was lost
PAUSE = 2.0  # seconds between them
CONNECT = (
    "To have pictures at lasting addresses, connect a domain of a zone in the same account: dashboard, R2, {bucket}, "
    "Settings, Custom domains; or npx wrangler r2 bucket domain add {bucket} --domain pictures.example.com --zone-id "
    "ZONE. Then run this again, which writes R2_PUBLIC_BASE_URL=https://pictures.example.com."
)


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the file of settings as it is now, what it and the environment say, and the names."""

    path: Path
    in_file: Mapping[str, str]
    config: Settings
    database: str
    named: bool  # whether --database says so
    bucket: str
    location: str


@dataclass(frozen=True)
class Found:
    """What is there; `report` is that of the database's schema, the rest of a bucket that is not there is empty."""

    account_id: str
    database: Result | None
    report: schema.Report | None
    bucket: Result | None
    cors: list[Result]
    lifecycle: list[Result]
    domains: list[Result]
    managed: Result


@dataclass(frozen=True)
class Line:
    """One thing that is there, is to be done, or should be looked at."""

    mark: str
    part: str
    text: str

    def __str__(self) -> str:
        indent = " " * 13
        wrapped = textwrap.wrap(
            self.text, 116, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        return f"{self.mark}  {self.part:<10}" + "\n".join(wrapped).lstrip()


def read(path: Path, environ: Mapping[str, str], *, database: str = "", bucket: str = "", location: str = "") -> Wanted:
    """What is asked for. Raises Problem and SettingError, and as parameters.read() does."""
    if not path.parent.is_dir():
        raise Problem(f"There is no folder {path.parent} for the file of settings; correct --env.")
    in_file = settings.read_env_file(path)
    values = _together(path, in_file, environ)
    if not values["CLOUDFLARE_API_TOKEN"]:
        raise Problem(f"CLOUDFLARE_API_TOKEN is missing. {cloudflare.TOKEN}")
    given = "|".join(name for name in NEEDED if values[name])
    config = settings.load(values, env_file=NO_FILE, only=f"({given})$")
    bucket = _name("--bucket or R2_BUCKET", BUCKET_NAME, _bucket(config, values["R2_BUCKET"], bucket))
    name = _name("--database", DATABASE_NAME, database or "-".join(filter(None, (NAME, _stage(path)))))
    return Wanted(path, in_file, config, name, bool(database), bucket, location)


def _together(path: Path, in_file: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for name in NEEDED:
        here, there = environ.get(name, "").strip(), in_file.get(name, "").strip()
        if name in WRITTEN and here and there and here != there:
            raise Problem(
                f"{name} is {here} in the environment and {there} in {path.name}: take out the one that is not meant."
            )
        values[name] = here or there
    return values


def _bucket(config: Settings, given: str, asked: str) -> str:
    if given and asked and given != asked:
        raise Problem(f"R2_BUCKET is {given} already: leave --bucket out, or change the setting first.")
    return asked or config.r2_bucket


def _name(what: str, pattern: str, name: str) -> str:
    if not re.fullmatch(pattern, name):
        raise Problem(f"{what}: {name!r} is no name that Cloudflare takes; it must match {pattern}.")
    return name


def _stage(path: Path) -> str:
    found = re.fullmatch(r"\.env\.([A-Za-z0-9_-]+)", path.name)
    return found[1] if found else ""


def connect(config: Settings, wire: Wire, clock: Clock) -> Cloudflare:
    """Cloudflare's API as the settings say; without an account id the one account that the token sees."""
    hosted = re.fullmatch(r".+\.(eu|fedramp)\.r2\.cloudflarestorage\.com", urlsplit(config.r2_endpoint).hostname or "")
    api = Cloudflare(
        wire=wire,
        clock=clock,
        rng=SystemRandom(),
        base_url=config.cloudflare_api_base,
        token=Credential(config.cloudflare_api_token),
        account_id=config.cloudflare_account_id,
        jurisdiction=hosted[1] if hosted else "",
    )
    return api if api.account_id else replace(api, account_id=_only_account(api))


def _only_account(api: Cloudflare) -> str:
    seen = api.accounts()
    if len(seen) != 1:
        named = "; ".join(f"{account['id']} ({account.get('name', '')})" for account in seen) or "none"
        raise Problem(
            f"CLOUDFLARE_ACCOUNT_ID is missing, and the token sees not just one account, but {named}. Set it in the "
            "environment; the dashboard's address has it, and `npx wrangler whoami` shows it."
        )
    account_id: str = seen[0]["id"]
    return account_id


def look(api: Cloudflare, wanted: Wanted) -> Found:
    """What is there; nothing is changed. Raises Problem, and as the calls do."""
    database = _database(api, wanted)
    report = schema.check(_d1(api, database["uuid"])) if database else None
    bucket = api.bucket(wanted.bucket)
    if bucket is None:
        _not_elsewhere(api, wanted.bucket)
        return Found(api.account_id, database, report, None, [], [], [], {})
    return Found(
        api.account_id,
        database,
        report,
        bucket,
        api.cors_rules(wanted.bucket),
        api.lifecycle_rules(wanted.bucket),
        api.custom_domains(wanted.bucket),
        api.managed_domain(wanted.bucket),
    )


def _database(api: Cloudflare, wanted: Wanted) -> Result | None:
    """That of D1_DATABASE_ID, or else the one of the name."""
    named = wanted.config.d1_database_id
    if not named:
        return _database_of_name(api, wanted.database)
    found = api.database(named)
    if found is None:
        raise Problem(
            f"D1_DATABASE_ID is {named}, but account {api.account_id} has no such database. Correct it; or take the "
            "line out, and a database is found by its name or made."
        )
    if wanted.named and found.get("name") != wanted.database:
        raise Problem(
            f"D1_DATABASE_ID is that of the database {found.get('name')}, not of {wanted.database}: leave --database "
            "out, or take the line out of the file."
        )
    return found


def _database_of_name(api: Cloudflare, name: str) -> Result | None:
    found = api.databases(name)
    if len(found) > 1:
        ids = ", ".join(sorted(entry["uuid"] for entry in found))
        raise Problem(f"There are {len(found)} databases {name}: {ids}. Write the right one as D1_DATABASE_ID.")
    return found[0] if found else None


def _not_elsewhere(api: Cloudflare, name: str) -> None:
    """A bucket of the same name in another jurisdiction is most likely the one that is meant."""
    for jurisdiction in OTHER_JURISDICTIONS:
        if jurisdiction == api.jurisdiction:
            continue
        found = None
        with contextlib.suppress(PermanentError):  # most accounts may not even ask for some of them
            found = replace(api, jurisdiction=jurisdiction).bucket(name)
        if found:
            raise Problem(
                f"There is a bucket {name} in the jurisdiction {jurisdiction}. If it is meant, set R2_ENDPOINT_URL="
                f"https://{api.account_id}.{jurisdiction}.r2.cloudflarestorage.com; else choose another --bucket."
            )


def _d1(api: Cloudflare, database_id: str) -> D1:
    return D1(
        wire=api.wire,
        clock=api.clock,
        rng=api.rng,
        base_url=api.base_url,
        account_id=api.account_id,
        database_id=database_id,
        token=api.token,
    )


def plan(wanted: Wanted, found: Found) -> list[Line]:
    """What is there, and what is to be done."""
    return [
        Line("=", "account", found.account_id),
        *_plan_database(wanted, found),
        *_plan_bucket(wanted, found),
        *_plan_public(wanted, found),
        *_plan_settings(wanted, found),
    ]


def _plan_database(wanted: Wanted, found: Found) -> Iterator[Line]:
    near = f", near {wanted.location}" if wanted.location else ""
    if found.database is None or found.report is None:
        yield Line("+", "database", f"{wanted.database}{near}")
        yield from (Line("+", "schema", f"pending: {change.name}") for change in schema.changes())
        return
    yield Line("=", "database", f"{found.database.get('name')} ({found.database['uuid']})")
    yield from _plan_schema(found.report)


def _plan_schema(report: schema.Report) -> Iterator[Line]:
    stays = report.unknown or report.found.unfit
    yield from (Line("!" if stays else "+", "schema", line) for line in report.lines())
    if not report.lines():
        yield Line("=", "schema", "It has everything the code needs.")


def _plan_bucket(wanted: Wanted, found: Found) -> Iterator[Line]:
    near = f", near {wanted.location}" if wanted.location else ""
    yield Line("=", "bucket", wanted.bucket) if found.bucket else Line("+", "bucket", f"{wanted.bucket}{near}")
    yield from (Line("=", "cors", bucket_rules.cors_in_words(rule)) for rule in found.cors)
    yield from (Line("+", "cors", bucket_rules.cors_in_words(rule)) for rule in bucket_rules.lacking_cors(found.cors))
    for rule in found.lifecycle:
        yield Line("=", "lifecycle", bucket_rules.lifecycle_in_words(rule))
        if bucket_rules.deletes_pictures(rule):
            yield Line("!", "lifecycle", f"{rule.get('id')} deletes pictures of jobs: change it, or take it out.")
    yield from (
        Line("+", "lifecycle", bucket_rules.lifecycle_in_words(rule))
        for rule in bucket_rules.lacking_lifecycle(found.lifecycle)
    )


def _plan_public(wanted: Wanted, found: Found) -> Iterator[Line]:
    """The note on where the bucket is public."""
    for entry in found.domains:
        yield Line("=" if _is_active(entry) else "!", "public", _domain_in_words(entry))
    if found.managed.get("enabled"):
        yield Line("!", "public", f"https://{found.managed['domain']} is on: it is for development, limited in rate.")
    active = [entry["domain"] for entry in found.domains if _is_active(entry)]
    set_to = wanted.config.r2_public_base_url
    if set_to and urlsplit(set_to).hostname not in active:
        yield Line("!", "public", f"R2_PUBLIC_BASE_URL is {set_to}, which is no active domain of the bucket.")
    elif not set_to and "R2_PUBLIC_BASE_URL" in wanted.in_file and active:
        yield Line(
            "!", "public", "R2_PUBLIC_BASE_URL stands empty in the file and stays so: answers have links that expire."
        )
    elif not set_to and len(active) > 1:
        yield Line("!", "public", f"Choose one, and write R2_PUBLIC_BASE_URL=https://{active[0]} or another of them.")
    elif not found.domains:
        yield Line(
            "!",
            "public",
            "No domain is connected: answers have links that expire. " + CONNECT.format(bucket=wanted.bucket),
        )


def _plan_settings(wanted: Wanted, found: Found) -> Iterator[Line]:
    values = to_write(wanted, found, found.database["uuid"] if found.database else "the id of the new database")
    new = "" if wanted.path.exists() else ", a new file"
    yield from (Line("+", "settings", f"{wanted.path.name}{new}: {name}={value}") for name, value in values.items())
    if not values:
        yield Line("=", "settings", f"{wanted.path.name} has them.")
    there = {name for name, value in wanted.in_file.items() if value.strip()} | values.keys()
    if missing := [name for name in template.REQUIRED if name not in there]:
        how = advice.R2_TOKEN if "R2_ACCESS_KEY_ID" in missing else ""
        yield Line("!", "settings", f"It still lacks {', '.join(missing)}. {how}".rstrip())


def to_write(wanted: Wanted, found: Found, database_id: str) -> dict[str, str]:
    """The settings that the file lacks."""
    lacking = {name for name in WRITTEN if not wanted.in_file.get(name, "").strip()}
    values = {"CLOUDFLARE_ACCOUNT_ID": found.account_id, "D1_DATABASE_ID": database_id, "R2_BUCKET": wanted.bucket}
    if wanted.bucket == _default("r2_bucket"):
        lacking.discard("R2_BUCKET")
    active = [entry["domain"] for entry in found.domains if _is_active(entry)]
    if len(active) == 1 and not wanted.config.r2_public_base_url and "R2_PUBLIC_BASE_URL" not in wanted.in_file:
        values["R2_PUBLIC_BASE_URL"] = f"https://{active[0]}"
        lacking.add("R2_PUBLIC_BASE_URL")
    return {name: value for name, value in values.items() if name in lacking}


def _default(name: str) -> Any:
    return next(entry.default for entry in fields(Settings) if entry.name == name)


def _is_active(entry: Result) -> bool:
    status = entry.get("status") or {}
    return bool(entry.get("enabled")) and status.get("ownership") == "active" and status.get("ssl") == "active"


def _domain_in_words(entry: Result) -> str:
    status = entry.get("status") or {}
    if _is_active(entry):
        return f"https://{entry['domain']} is connected."
    return (
        f"{entry['domain']} is connected, but not active ({'on' if entry.get('enabled') else 'off'}, ownership "
        f"{status.get('ownership')}, certificate {status.get('ssl')}): see to it in the bucket's settings, and run "
        "this again."
    )


def apply(api: Cloudflare, wanted: Wanted, found: Found, say: Callable[[str], None]) -> None:
    """Do what is to be done, and say each thing that was done. Raises Problem, and as the calls do."""
    database_id = found.database["uuid"] if found.database else _make_database(api, wanted, say)
    for line in schema.apply(_d1(api, database_id)):
        say(line)
    if found.bucket is None:
        _make_bucket(api, wanted, say)
    _add_rules(api, wanted.bucket, say)
    _write(wanted, to_write(wanted, found, database_id), say)


def _make_database(api: Cloudflare, wanted: Wanted, say: Callable[[str], None]) -> str:
    made = _make(
        f"the database {wanted.database}",
        lambda: api.make_database(wanted.database, wanted.location),
        lambda: _database_of_name(api, wanted.database),
        api.clock,
    )
    database_id: str = made["uuid"]
    say(f"made the database {wanted.database}: {database_id}")
    return database_id


def _make_bucket(api: Cloudflare, wanted: Wanted, say: Callable[[str], None]) -> None:
    _make(
        f"the bucket {wanted.bucket}",
        lambda: api.make_bucket(wanted.bucket, wanted.location),
        lambda: api.bucket(wanted.bucket),
        api.clock,
    )
    say(f"made the bucket {wanted.bucket}")


def _make(what: str, make: Callable[[], None], find: Callable[[], Result | None], clock: Clock) -> Result:
    """
    Ask for it once, and then look for it: the answer may have been lost, or somebody else may have been first.

    A second call could make a second one, were the first still under way.
    """
    lost: ServiceError | None = None
    try:
        make()
    except (IndeterminateError, PermanentError) as error:
        if isinstance(error, PermanentError) and error.code not in ("d1_exists", "r2_exists"):
            raise
        lost = error
    for looks in range(LOOKS):
        if looks:
            clock.sleep(PAUSE)
        if found := find():
            return found
    raise Problem(
        f"Cloudflare does not show {what}, though it was asked to make it{f' ({lost.sentence})' if lost else ''}. Run "
        "this again in a minute: it looks for it first."
    ) from lost


def _add_rules(api: Cloudflare, bucket: str, say: Callable[[str], None]) -> None:
    # A call replaces all of the rules, and has no condition: so they are read right before.
    there = api.cors_rules(bucket)
    if lacking := bucket_rules.lacking_cors(there):
        api.put_cors_rules(bucket, [*there, *lacking])
        say(f"added to the bucket's CORS rules: {'; '.join(map(bucket_rules.cors_in_words, lacking))}")
    there = api.lifecycle_rules(bucket)
    if lacking := bucket_rules.lacking_lifecycle(there):
        api.put_lifecycle_rules(bucket, [*there, *lacking])
        say(f"added to the bucket's lifecycle rules: {', '.join(rule['id'] for rule in lacking)}")


def _write(wanted: Wanted, values: Mapping[str, str], say: Callable[[str], None]) -> None:
    if not values:
        return
    path = wanted.path  # read anew: it may have been edited meanwhile
    text = env_file.fill(path.read_bytes().decode(), values) if path.exists() else _new_text(path, values)
    env_file.replace(path, text)
    say(f"wrote into {wanted.path.name}: {', '.join(values)}")


def _new_text(path: Path, values: Mapping[str, str]) -> str:
    """A new file: what is known, and as comments what else it must have."""
    stage = _stage(path)
    lines = ["# Begun by `python -m tools.provision`; README has the table of all settings."]
    lines += [f"{name}={value}" for name, value in values.items()]
    lines += ["", "# It must have these too: fill them in, and take the # away."]
    for entry in fields(Settings):
        name = entry.name.upper()
        if name in template.REQUIRED and name not in values:
            lines.append(f"# {entry.metadata['about']}{'; see below' if name.startswith('R2_') else ''}:")
            lines.append(f"# {name}={_placeholder(stage, name)}")
    lines += ["", *textwrap.wrap(advice.R2_TOKEN, 110, initial_indent="# ", subsequent_indent="# ")]
    return "\n".join(lines) + "\n"


def _placeholder(stage: str, name: str) -> str:
    """A stage's secrets stand in SSM Parameter Store; those of .env.local may stand there themselves."""
    return f"ssm:/{NAME}/{stage}/{name}" if name in settings.SECRETS and stage not in ("", "local") else ""


def run(wanted: Wanted, *, do: bool, clock: Clock, say: Callable[[str], None] = print) -> None:
    """Look, say what is there and what is to be done, and `do` it or not. Raises Problem, and as the calls do."""
    api = connect(wanted.config, Wire(clock), clock)
    found = look(api, wanted)
    lines = plan(wanted, found)
    for line in lines:
        say(str(line))
    todo = sum(line.mark == "+" for line in lines)
    if not todo:
        odd = ", but look at what has a !" if any(line.mark == "!" for line in lines) else ""
        say(f"\nEverything is there{odd}; nothing was changed.")
    elif not do:
        say(f"\n{todo} to do. Nothing was changed: --apply does it.")
    else:
        say("")
        apply(api, wanted, found, say)
        say("\nDone.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.provision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    env_file.add_option(parser, may_be_new=True)
    parser.add_argument("--apply", action="store_true", help="do it, not only say it")
    parser.add_argument(
        "--database", default="", metavar="NAME", help=f"of the database (default: {NAME}-STAGE for .env.STAGE)"
    )
    parser.add_argument("--bucket", default="", metavar="NAME", help="of the bucket (default: R2_BUCKET)")
    parser.add_argument(
        "--location", default="", choices=LOCATIONS, help="where new ones are made, for good (default: near you)"
    )
    options = parser.parse_args()
    try:
        names = {"database": options.database, "bucket": options.bucket, "location": options.location}
        run(read(options.env, os.environ, **names), do=options.apply, clock=Clock())
    except (TransientError, IndeterminateError) as error:
        again = "" if "again" in error.sentence else " Run this again: it goes on where it stopped."
        sys.exit(error.sentence + again)
    except (ServiceError, OSError, Problem) as error:
        sys.exit(error.sentence if isinstance(error, ServiceError) else str(error))


if __name__ == "__main__":
    main()
