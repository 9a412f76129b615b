"""
Looks at the clouds that the settings name, one by one, and says what is wrong and how it is mended.

Nothing is paid for. A test object is put into the bucket and removed again; the deployed service is called as RunPod
would call it; nothing else is changed. Exit status 1 if there is an error, 0 if there are only warnings.

With an API key in the environment variable API_KEY it also says whether the service accepts that key.
"""

import argparse
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from chalicelib import advice, auth, bootstrap, settings
from chalicelib.advice import Finding, Level, from_error
from chalicelib.bootstrap import Service
from chalicelib.errors import ServiceError
from chalicelib.jobs import FINAL, Job, State
from chalicelib.runtime import Clock, Deadline
from chalicelib.settings import Settings
from chalicelib.wire import Wire
from tools import env_file, schema

LOOK_SECONDS = 30.0
DRAW_SECONDS = 600.0
DRAW_EVERY = 5.0  # seconds between two looks at the job
PROMPT = "OB AI Studio: a test picture"
NAMES = tuple(entry.name.upper() for entry in fields(Settings))
# The checks that cannot be made without these settings, as regular expressions.
NEEDS = {
    "keys": "API_KEY_HASHES|ALLOW_ANONYMOUS",
    "spool": "SPOOL_BUCKET",
    "d1": "CLOUDFLARE_|D1_",
    "r2": "R2_|CLOUDFLARE_ACCOUNT_ID",
    "runpod": "RUNPOD_",
    "webhook": "PUBLIC_|WEBHOOK_",
}
DRIFT_IS_TOLD_WITH = ("ok", "d1_old_schema", "d1_schema")  # whatever else D1 says, it is not asked again
NO_FILE = Path(os.devnull)
MARKS = {Level.OK: "ok", Level.WARNING: "warning", Level.ERROR: "ERROR"}


def look(values: Mapping[str, str], *, key: str = "", clock: Clock | None = None) -> Iterator[Finding]:
    """What is found with these settings; `key` is an API key that the service shall accept."""
    config, wrong = settings.survey(values)
    yield from dict.fromkeys(from_error("settings", error) for error in wrong.values())  # the same once
    yield from _unknown_names(values)
    impossible = {
        check: [name for name in wrong if re.match(needed, name)]
        for check, needed in NEEDS.items()
        if any(re.match(needed, name) for name in wrong)
    }
    clock = clock or Clock()
    try:
        service = bootstrap.build(config, clock)
    except ServiceError as error:
        yield from_error("models", error)
        yield Finding("models", "Nothing else was looked at.", "left_out")
        return
    leave_out = frozenset(impossible) | (frozenset(["settings"]) if wrong else frozenset())
    found = service.health.look(Deadline(clock, LOOK_SECONDS), leave_out=leave_out)
    yield from (finding for finding in found if finding.check in ("settings", "keys"))
    yield from _key(config, key)
    yield from (finding for finding in found if finding.check not in ("settings", "keys"))
    if any(finding.check == "d1" and finding.code in DRIFT_IS_TOLD_WITH for finding in found):
        yield from _drift(config, clock)
    for check, names in impossible.items():
        yield Finding(check, f"Not looked at: first mend {' and '.join(names)}.", "left_out")


def _unknown_names(values: Mapping[str, str]) -> Iterator[Finding]:
    """Names that are nearly ours; the environment is full of others."""
    for name in values:
        ours = name in NAMES or name.startswith(("AWS_", "DEPLOY_"))  # the latter are ./deploy's
        if not ours and (near := difflib.get_close_matches(name, NAMES, n=1, cutoff=0.85)):
            yield Finding("settings", f"{name} is no setting; {near[0]} is one.", "setting_unknown")


def _key(config: Settings, key: str) -> Iterator[Finding]:
    if not key:
        return
    accepted = {one.hash: one for one in config.api_key_hashes}
    if known := accepted.get(auth.hash_of(key)):
        yield Finding("keys", f"The key in API_KEY is accepted; it is {known.name}, with the right {known.right.word}.")
    elif accepted.keys() & {auth.hash_of(f"{key}{ending}") for ending in ("\n", "\r\n")}:
        yield Finding("keys", "API_KEY_HASHES has the hash of this key with a line end.", "key_with_line_end")
    else:
        yield Finding("keys", "The key in API_KEY is not accepted.", "key_unknown")


def _drift(config: Settings, clock: Clock) -> Iterator[Finding]:
    """What the database lacks of schema.sql though the changes say that it has it."""
    try:
        report = schema.check(bootstrap.make_d1(config, Wire(clock), clock))
    except ServiceError as error:
        yield from_error("d1", error)
    else:
        if report.found.unfit:
            yield Finding(
                "d1", f"The table has rules that break the service: {'; '.join(report.found.unfit)}.", "d1_unfit"
            )
        if report.missing:
            yield Finding("d1", f"The database lacks {', '.join(report.missing)}.", "d1_drift")


def draw(values: Mapping[str, str], *, clock: Clock) -> Iterator[Finding]:
    """
    Have a picture drawn, for which RunPod is paid: it is sent from here, and goes on by the callbacks and the schedule
    of the deployed service, as any job does.
    """
    service = bootstrap.build(settings.load(values, env_file=NO_FILE), clock)
    job = service.pipeline.new_job(prompt=PROMPT, model="qwen-image", payload=None)
    try:
        service.pipeline.create([job], Deadline(clock, LOOK_SECONDS), by="doctor")
        ended = _wait_for(service, job.id, clock)
    except ServiceError as error:
        yield Finding("drawing", f"Job {job.id}: {error.sentence}", "drawing_failed")
    else:
        yield _drawn(job.id, ended)


def _wait_for(service: Service, job_id: str, clock: Clock) -> Job | None:
    """Ask for the job until it has ended, which the deployed service sees to; None where that takes too long."""
    end = Deadline(clock, DRAW_SECONDS)
    while end.left() > 0:
        job = service.store.get(job_id, timeout=LOOK_SECONDS)
        if job is not None and job.state in FINAL:
            return job
        clock.sleep(DRAW_EVERY)
    return None


def _drawn(job_id: str, job: Job | None) -> Finding:
    if job is None:
        sentence = f"Job {job_id} was not drawn in {DRAW_SECONDS / 60:.0f} minutes; the schedule goes on with it."
        return Finding("drawing", sentence, "drawing_late")
    if job.state is not State.DONE:
        return Finding("drawing", f"Job {job.id} ended as {job.status}: {job.error_message}", "drawing_failed")
    return Finding("drawing", f"A picture was drawn and stored: {job.result_url or job.result_r2_key}")


def lines(finding: Finding) -> str:
    """A finding for people."""
    text = f"{MARKS[finding.level]:<9}{finding.check:<10}"
    wrapped = [
        *_wrap(finding.sentence, indent=19),
        *_wrap(f"→ {finding.mend}" if finding.mend else "", indent=19),
    ]
    return text + "\n".join(wrapped).lstrip()


def _wrap(text: str, *, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text, 116, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )


def _list() -> None:
    for level, mends in ((Level.ERROR, advice.ERRORS), (Level.WARNING, advice.WARNINGS)):
        for code, mend in mends.items():
            print(f"{MARKS[level]:<9}{code:<26}{mend}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    env_file.add_option(parser)
    parser.add_argument("--draw", action="store_true", help="have a picture drawn as well, for which RunPod is paid")
    parser.add_argument("--list", action="store_true", help="only list whatever can be found, and the mends")
    options = parser.parse_args()
    if options.list:
        _list()
        return
    try:
        found = _print_findings(options)
    except ServiceError as error:
        sys.exit(error.sentence)
    errors, warnings = (sum(finding.level is level for finding in found) for level in (Level.ERROR, Level.WARNING))
    print(f"\n{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}.")
    sys.exit(1 if errors else 0)


def _print_findings(options: argparse.Namespace) -> list[Finding]:
    values, found = env_file.complete(settings.given(env_file=options.env)), []
    for finding in look(values, key=os.environ.get("API_KEY", "")):
        print(lines(finding), flush=True)
        found.append(finding)
    if options.draw and not any(finding.level is Level.ERROR for finding in found):
        for finding in draw(values, clock=Clock()):
            print(lines(finding), flush=True)
            found.append(finding)
    return found


if __name__ == "__main__":
    main()
