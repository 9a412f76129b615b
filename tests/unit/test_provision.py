"""What is there is left as it is, what is not is made once, and the file of settings gets what it lacks."""

import copy
import json
import os
import stat

import pytest
import requests

from chalicelib import parameters
from chalicelib.errors import ServiceError
from tests.conftest import KEY_HASH
from tools import Problem, bucket_rules, cloudflare, env_file, provision, schema, template
from tools.cloud import LocalCloud

TOKEN = "local-cloudflare-token"
ACCOUNT = "accounts/local-account"
BUCKET = "pictures-prod"
LOST = requests.exceptions.ConnectionError("the answer is lost")
OURS = [
    {
        "allowed": {"origins": ["*"], "methods": ["PUT", "GET", "HEAD"], "headers": ["content-type"]},
        "exposeHeaders": ["ETag"],
        "maxAgeSeconds": 3600,
    }
]
DEFAULT = {
    "id": "Default Multipart Abort Rule",
    "enabled": True,
    "conditions": {},
    "abortMultipartUploadsTransition": {"condition": {"type": "Age", "maxAge": 604800}},
}


def says(status, code, message="no"):
    return status, {"success": False, "result": None, "errors": [{"code": code, "message": message}], "messages": []}


def gives(result):
    return 200, {"success": True, "result": result, "errors": [], "messages": []}


class Stage:
    """A stage that begins with nothing but a token, and its file."""

    def __init__(self, cloud, wire, faults, clock, path):
        self.cloud, self.wire, self.faults, self.clock, self.path = cloud, wire, faults, clock, path
        self.environ = {"CLOUDFLARE_API_BASE": cloud.settings()["CLOUDFLARE_API_BASE"], "CLOUDFLARE_API_TOKEN": TOKEN}

    def run(self, *, do=False, **names):
        said = []
        wanted = provision.read(self.path, self.environ, **{"bucket": BUCKET, **names})
        provision.run(wanted, do=do, clock=self.clock, say=said.append)
        return "\n".join(said)

    def asked(self, method):
        """The calls by a method since the last time, without a database's queries."""
        calls = [call.request for call in self.wire.calls if not call.request.url.endswith("/query")]
        return [request.url.partition("/v4/")[2] for request in calls if request.method == method]

    @property
    def kept(self):
        return copy.deepcopy(self.cloud.cloudflare._kept)

    @property
    def databases(self):
        return [entry["name"] for entry in self.kept["databases"].values()]

    @property
    def bucket(self):
        return self.kept["buckets"][BUCKET]


@pytest.fixture
def stage(cloud, wire, faults, clock, tmp_path):
    return Stage(cloud, wire, faults, clock, tmp_path / ".env.prod")


def test_a_dry_run_says_all_and_changes_nothing(stage):
    before = stage.kept

    said = stage.run()

    assert [line.split()[:3] for line in said.splitlines() if line.startswith(("=", "+"))] == [
        ["=", "account", "local-account"],
        ["+", "database", "ob-ai-studio-prod"],
        *(["+", "schema", "pending:"] for _ in schema.changes()),
        ["+", "bucket", BUCKET],
        ["+", "cors", "*:"],
        ["+", "lifecycle", "ob-ai-studio-health:"],
        ["+", "lifecycle", "ob-ai-studio-unfinished-jobs:"],
        ["+", "lifecycle", "ob-ai-studio-unfinished-uploads:"],
        *(["+", "settings", ".env.prod,"] for _ in range(3)),
    ]
    assert said.endswith(" to do. Nothing was changed: --apply does it.")
    assert {call.request.method for call in stage.wire.calls} == {"GET"}
    assert stage.kept == before
    assert not stage.path.exists()


def test_it_makes_what_is_not_there(stage):
    stage.run(do=True)

    (made,) = (entry for entry in stage.kept["databases"].values() if entry["name"] == "ob-ai-studio-prod")
    assert stage.bucket["cors"] == OURS
    assert stage.bucket["lifecycle"] == [DEFAULT, *bucket_rules.LIFECYCLE]
    assert stage.cloud.cloudflare._d1[made["uuid"]].execute("SELECT count(*) AS n FROM schema_changes") == [
        {"n": len(schema.changes())}
    ]
    assert {
        "CLOUDFLARE_ACCOUNT_ID=local-account",
        f"D1_DATABASE_ID={made['uuid']}",
        f"R2_BUCKET={BUCKET}",
    } <= set(stage.path.read_text().splitlines())
    assert stage.asked("POST") == [f"{ACCOUNT}/d1/database", f"{ACCOUNT}/r2/buckets"]


def test_the_second_time_nothing_is_changed_also_after_a_restart_of_the_cloud(stage, tmp_path):
    stage.run(do=True)
    kept, file = stage.kept, stage.path.read_bytes()
    stage.wire.calls.reset()

    again = stage.run(do=True)
    writes = [call.request for call in stage.wire.calls if call.request.method != "GET"]
    reopened = LocalCloud(tmp_path / "cloud", base_url="http://cloud.test:8001")
    reopened.close()

    assert again.endswith("\nEverything is there, but look at what has a !; nothing was changed.")
    assert "\n+" not in again
    assert all(call.url.endswith("/query") and b"INSERT" not in call.body for call in writes)
    assert (stage.kept, stage.path.read_bytes()) == (kept, file)
    assert reopened.cloudflare._kept == kept
    assert set(reopened.cloudflare._r2) == {"ob-ai-results", BUCKET}


def test_the_default_bucket_is_found_and_not_written(stage):
    before = stage.kept["buckets"]["ob-ai-results"]

    stage.run(do=True, bucket="")

    found = stage.kept["buckets"]
    assert "R2_BUCKET" not in stage.path.read_text()
    assert list(found) == ["ob-ai-results"]
    assert found["ob-ai-results"]["cors"] == before["cors"] == OURS


THEIRS = {
    "allowed": {"origins": ["https://shop.example"], "methods": ["GET"]},
    "id": "shop",
    "exposeHeaders": None,
    "maxAgeSeconds": 5,
}
ARCHIVE = {
    "id": "archive",
    "enabled": True,
    "conditions": {"prefix": "old/"},
    "storageClassTransitions": [
        {"condition": {"type": "Date", "date": "2027-01-01T00:00:00Z"}, "storageClass": "InfrequentAccess"}
    ],
}


@pytest.fixture
def bucket(stage):
    """The bucket is there, with rules of somebody else."""
    stage.cloud.cloudflare._make_bucket(BUCKET, "default")
    stage.cloud.cloudflare.change_bucket(BUCKET, cors=[THEIRS], lifecycle=[DEFAULT, ARCHIVE])


def test_the_rules_of_others_are_kept(stage, bucket):
    said = stage.run(do=True)

    assert stage.bucket["cors"] == [THEIRS, *OURS]
    assert stage.bucket["lifecycle"] == [DEFAULT, ARCHIVE, *bucket_rules.LIFECYCLE]
    assert "=  cors      https://shop.example: GET" in said
    assert "archive: moves objects under old/ to InfrequentAccess on 2027-01-01T00:00:00Z" in said
    assert f"{ACCOUNT}/r2/buckets" not in stage.asked("POST")


@pytest.mark.parametrize(
    ("rule", "enough"),
    [
        (
            {"allowed": {"origins": ["*"], "methods": ["DELETE", "PUT", "HEAD", "GET"], "headers": ["content-type"]}},
            True,
        ),
        ({"allowed": {"origins": ["*"], "methods": ["PUT", "HEAD", "GET"], "headers": ["Content-Type", "x"]}}, True),
        (
            {"allowed": {"origins": ["https://a"], "methods": ["PUT", "HEAD", "GET"], "headers": ["content-type"]}},
            False,
        ),
        ({"allowed": {"origins": ["*"], "methods": ["HEAD", "GET"], "headers": ["content-type"]}}, False),
        ({"allowed": {"origins": ["*"], "methods": ["PUT", "HEAD", "GET"], "headers": ["*"]}}, False),
        ({"allowed": {"origins": ["*"], "methods": ["PUT", "HEAD", "GET"]}}, False),
        ({"exposeHeaders": [], "allowed": OURS[0]["allowed"]}, False),
        ({}, False),
    ],
)
def test_a_rule_that_allows_all_of_ours_is_enough(rule, enough):
    assert bucket_rules.lacking_cors([{"exposeHeaders": ["etag"], **rule}]) == ([] if enough else OURS)


def test_our_rules_stay_as_somebody_changed_them(stage):
    stage.run(do=True)
    changed = {**bucket_rules.LIFECYCLE[0], "enabled": False}
    twin = {**bucket_rules.LIFECYCLE[1], "id": "another name"}
    stage.cloud.cloudflare.change_bucket(BUCKET, lifecycle=[changed, twin, bucket_rules.LIFECYCLE[2]])

    said = stage.run(do=True)

    assert said.endswith("nothing was changed.")
    assert "ob-ai-studio-health: deletes objects under health/ after 1 day (off)" in said
    assert stage.bucket["lifecycle"] == [changed, twin, bucket_rules.LIFECYCLE[2]]


def test_no_rule_of_ours_deletes_a_picture_and_one_of_others_is_pointed_out(stage, bucket):
    def deletes(prefix, **other):
        conditions = {"prefix": prefix} if prefix else {}
        transition = {"condition": {"type": "Age", "maxAge": 86400}}
        rule = {"id": f"<{prefix}>", "enabled": True, "conditions": conditions, "deleteObjectsTransition": transition}
        return {**rule, **other}

    assert [bucket_rules._prefix(rule) for rule in bucket_rules.LIFECYCLE if "deleteObjectsTransition" in rule] == [
        "health/"
    ]
    rules = [deletes(prefix) for prefix in ("", "jo", "jobs/2026/", "uploads/", "other/", "job-")]
    stage.cloud.cloudflare.change_bucket(BUCKET, lifecycle=[*rules, deletes("jobs/", id="off", enabled=False)])

    said = stage.run()

    warned = [line.split()[2] for line in said.splitlines() if "deletes pictures" in line]
    assert warned == ["<>", "<jo>", "<jobs/2026/>", "<uploads/>"]


CREATES = {"database": rf"POST .*/{ACCOUNT}/d1/database$", "bucket": rf"POST .*/{ACCOUNT}/r2/buckets$"}


@pytest.mark.parametrize("what", CREATES)
@pytest.mark.parametrize(
    "answer", [LOST, (502, "<html>"), says(500, 10001), says(400, 7502), says(409, 10004)], ids=str
)
def test_what_was_made_without_an_answer_is_found_by_its_name(stage, what, answer):
    stage.faults.add(CREATES[what], answer, after_effect=True)

    stage.run(do=True)

    assert stage.databases == ["ob-ai-studio-local", "ob-ai-studio-prod"]
    assert list(stage.kept["buckets"]) == ["ob-ai-results", BUCKET]
    assert len(stage.asked("POST")) == 2
    assert stage.run(do=True).endswith("nothing was changed.")


@pytest.mark.parametrize("what", CREATES)
def test_what_may_have_been_made_is_looked_for_and_not_made_again_by_the_same_run(stage, what):
    stage.faults.add(CREATES[what], LOST)

    with pytest.raises(Problem, match=rf"does not show the {what} .* \(.*broke .*\)\. Run this again in a minute"):
        stage.run(do=True)

    assert sum(f"POST .*/{url}$" in CREATES[what] for url in stage.asked("POST")) == 1
    assert stage.clock.slept == [provision.PAUSE] * (provision.LOOKS - 1)
    stage.run(do=True)
    assert stage.run(do=True).endswith("nothing was changed.")


@pytest.mark.parametrize(
    "where", [*CREATES.values(), r"PUT .*/cors$", r"PUT .*/lifecycle$", r"POST .*/query$", "the file"]
)
@pytest.mark.parametrize("after_effect", [True, False])
def test_a_run_that_broke_off_is_finished_by_the_next(stage, where, after_effect, monkeypatch):
    class Killed(Exception):
        pass

    def kill(source, target, move=os.replace):
        if target == stage.path:
            raise Killed
        move(source, target)

    with monkeypatch.context() as patch:
        if where == "the file":
            patch.setattr(os, "replace", kill)
        else:
            stage.faults.add(where, Killed(), times=1, after_effect=after_effect)
        with pytest.raises(Killed):
            stage.run(do=True)

    assert [path.name for path in stage.path.parent.iterdir() if path.is_file()] == []
    stage.run(do=True)

    assert stage.run(do=True).endswith("nothing was changed.")
    assert stage.databases == ["ob-ai-studio-local", "ob-ai-studio-prod"]
    assert (stage.bucket["cors"], len(stage.bucket["lifecycle"])) == (OURS, 4)


@pytest.mark.parametrize(
    "where", [r"GET .*/d1/database\?", rf"GET .*/{BUCKET}$", r"PUT .*/cors$", r"PUT .*/lifecycle$"]
)
def test_what_may_be_sent_twice_is_repeated(stage, where):
    stage.faults.add(where, LOST, times=2)

    stage.run(do=True)

    assert stage.run(do=True).endswith("nothing was changed.")


@pytest.mark.parametrize(
    ("where", "answer", "sentence"),
    [
        ("GET .*/d1/", says(403, 10000, "Authentication error"), "lacks the right Account · D1 · Edit for account"),
        ("GET .*/r2/", says(403, 10000, "Authentication error"), "lacks the right Account · Workers R2 Storage · Edit"),
        (CREATES["database"], says(403, 10000), "lacks the right Account · D1 · Edit"),
        ("GET .*/d1/", says(401, 10000), r"not valid, or lacks .* Make an API token with the rights"),
        ("GET .*/d1/", says(403, 7403), "another account's, or the token lacks the right Account · D1 · Edit"),
        ("GET .*/d1/", says(400, 7003), "CLOUDFLARE_ACCOUNT_ID is no account's id"),
        ("GET .*/r2/", says(403, 10042), r"R2 is not switched on in this account: open R2"),
        (CREATES["database"], says(400, 7406), "as many D1 databases as its plan allows"),
        ("GET .*/d1/", (*says(429, 971), {"Retry-After": "250"}), "Wait five minutes, and run this again"),
        ("GET .*/d1/", (504, "<html>"), r"no usable answer \(HTTP 504\)"),
        ("GET .*/d1/", (200, "<html>"), r"no usable answer \(HTTP 200\)"),
        (CREATES["database"], says(400, 1, "a strange thing"), r"refused this: a strange thing \[1\], HTTP 400"),
    ],
    ids=str,
)
def test_a_refusal_says_what_to_do_and_nothing_was_made(stage, where, answer, sentence):
    before = stage.kept
    stage.faults.add(where, answer, times=3)

    with pytest.raises((ServiceError, Problem), match=sentence):
        stage.run(do=True)

    assert stage.kept == before
    assert not stage.path.exists()
    assert bool(stage.clock.slept) == (answer[1] == "<html>")  # what may pass is repeated, a refusal is believed


def test_the_account_of_another_is_refused(stage):
    stage.environ["CLOUDFLARE_ACCOUNT_ID"] = "other"

    with pytest.raises(ServiceError, match=r"does not let this token into account other .* CLOUDFLARE_ACCOUNT_ID is"):
        stage.run(do=True)


@pytest.mark.parametrize("seen", [[], [{"id": "a", "name": "A"}, {"id": "b", "name": "B"}]])
def test_where_the_token_sees_not_one_account_it_must_be_named(stage, seen):
    stage.faults.add("GET .*/accounts", gives(seen))

    with pytest.raises(Problem, match=r"a \(A\); b \(B\)\. Set it" if seen else "one account, but none. Set it"):
        stage.run(do=True)


def test_the_database_of_the_settings_is_taken_and_brought_to_the_schema(stage, table):
    stage.path.write_text("D1_DATABASE_ID=local-database\n")

    said = stage.run(do=True)

    assert stage.databases == ["ob-ai-studio-local"]
    assert "=  database  ob-ai-studio-local (local-database)" in said
    assert table("SELECT number FROM schema_changes")
    assert stage.path.read_text().splitlines()[0] == "D1_DATABASE_ID=local-database"
    with pytest.raises(Problem, match="that of the database ob-ai-studio-local, not of another: leave --database out"):
        stage.run(do=True, database="another")


def test_a_database_of_the_settings_that_is_not_there_is_not_replaced(stage):
    stage.path.write_text("D1_DATABASE_ID=gone\n")

    with pytest.raises(Problem, match="D1_DATABASE_ID is gone, but account local-account has no such database"):
        stage.run(do=True)

    assert stage.databases == ["ob-ai-studio-local"]


@pytest.mark.parametrize(
    ("table_there", "sentence"),
    [
        ("CREATE TABLE jobs (number INTEGER)", "it is another program's"),
        ("CREATE TABLE jobs (id TEXT PRIMARY KEY, user_id INT NOT NULL)", "rules that the service's rows would break"),
    ],
)
def test_a_database_that_cannot_be_used_stops_it_before_anything_is_made(stage, table, table_there, sentence):
    stage.path.write_text("D1_DATABASE_ID=local-database\n")
    table(table_there)

    with pytest.raises(ServiceError, match=sentence):
        stage.run(do=True)

    assert BUCKET not in stage.kept["buckets"]


def test_a_database_ahead_of_this_code_is_left_alone(stage, table):
    stage.run(do=True, database="ob-ai-studio-local")
    table("INSERT INTO schema_changes VALUES (999, 'x', '')")
    table("DROP INDEX jobs_dead")

    assert stage.run(do=True, database="ob-ai-studio-local").endswith("nothing was changed.")


def test_of_two_databases_with_the_name_none_is_chosen(stage):
    twins = [{"uuid": number, "name": "ob-ai-studio-prod"} for number in "21"]
    stage.faults.add(r"GET .*/d1/database\?", gives(twins))

    with pytest.raises(Problem, match=r"2 databases ob-ai-studio-prod: 1, 2\. Write the right one as D1_DATABASE_ID"):
        stage.run(do=True)


def test_a_database_on_a_later_page_is_found_and_one_with_a_similar_name_is_not(stage):
    similar = [{"uuid": str(number), "name": f"ob-ai-studio-prod-{number}"} for number in range(cloudflare.PER_PAGE)]
    stage.faults.add(r"GET .*/d1/database\?.*page=1&", gives(similar))
    stage.faults.add(r"GET .*/d1/database\?.*page=2&", gives([{"uuid": "local-database", "name": "ob-ai-studio-prod"}]))

    assert "=  database  ob-ai-studio-prod (local-database)" in stage.run()


def test_a_cloud_that_gives_the_same_page_again_and_again_is_not_asked_for_ever(stage):
    similar = [{"uuid": str(number), "name": f"x{number}"} for number in range(cloudflare.PER_PAGE)]
    stage.faults.add(r"GET .*/d1/database\?", gives(similar), times=99)

    assert "+  database" in stage.run()
    assert len([url for url in stage.asked("GET") if "/d1/database?" in url]) == 2


def test_a_bucket_in_another_jurisdiction_is_named_and_used_where_the_settings_say_so(stage):
    stage.cloud.cloudflare._make_bucket(BUCKET, "eu")

    with pytest.raises(Problem, match=r"in the jurisdiction eu\. .* R2_ENDPOINT_URL=https://local-account\.eu\.r2\."):
        stage.run(do=True)
    stage.environ["R2_ENDPOINT_URL"] = "https://local-account.eu.r2.cloudflarestorage.com"
    stage.run(do=True)

    assert stage.kept["buckets"][f"eu_{BUCKET}"]["cors"] == OURS
    assert BUCKET not in stage.kept["buckets"]


def test_jurisdictions_that_the_account_may_not_ask_for_do_not_matter(stage):
    stage.faults.add(rf"GET .*/{BUCKET}$", says(404, 10006))
    stage.faults.add(rf"GET .*/{BUCKET}$", says(403, 10000), times=2)

    assert f"+  bucket    {BUCKET}" in stage.run()


def test_new_ones_are_made_where_they_are_asked_for(stage):
    said = stage.run(do=True, location="weur")

    bodies = [json.loads(call.request.body) for call in stage.wire.calls if call.request.method == "POST"]
    assert [body for body in bodies if "name" in body] == [
        {"name": "ob-ai-studio-prod", "primary_location_hint": "weur"},
        {"name": BUCKET, "locationHint": "weur"},
    ]
    assert "+  database  ob-ai-studio-prod, near weur" in said


OLD_FILE = (
    "# what I know\r\n\r\nRUNPOD_ENDPOINT_ID=abc   # mine\r\nexport D1_DATABASE_ID=\r\n"
    "R2_ACCESS_KEY_ID='a # b'\r\n#CLOUDFLARE_ACCOUNT_ID=example\r\nAPI_KEY_HASHES=\"" + KEY_HASH + '"'
)


def test_a_file_keeps_every_line_and_its_mode(stage, tmp_path):
    real = tmp_path / "elsewhere"
    real.write_bytes(OLD_FILE.encode())
    real.chmod(0o640)
    stage.path.symlink_to(real)

    stage.run(do=True)

    (database_id,) = stage.kept["databases"].keys() - {"local-database"}
    ours = f"export D1_DATABASE_ID={database_id}\r\n"
    assert real.read_bytes().decode() == (
        OLD_FILE.replace("export D1_DATABASE_ID=\r\n", ours)
        + f"\r\nCLOUDFLARE_ACCOUNT_ID=local-account\r\nR2_BUCKET={BUCKET}\r\n"
    )
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert stage.path.is_symlink()
    assert stage.run(do=True).endswith("nothing was changed.")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "NAME=v\n"),
        ("A=1", "A=1\nNAME=v\n"),
        ("NAME=", "NAME=v"),
        ("NAME=\nA=1\n", "NAME=v\nA=1\n"),
        ('NAME="" # why\n', "NAME=v # why\n"),
        ("  NAME = ' '\n", "  NAME =v\n"),
        ("NAME=old\nNAME=\n", "NAME=old\nNAME=v\n"),
        ("MY_NAME=\n#NAME=\n", "MY_NAME=\n#NAME=\nNAME=v\n"),
        ("A='NAME=\n'\n", "A='NAME=\n'\nNAME=v\n"),
    ],
)
def test_a_value_goes_where_its_name_is_or_to_the_end(before, after, tmp_path):
    filled = env_file.fill(before, {"NAME": "v"})

    (tmp_path / "f").write_text(filled)
    assert filled == after
    assert provision.settings.read_env_file(tmp_path / "f")["NAME"] == "v"


def test_a_value_that_came_meanwhile_is_not_written_over(stage, monkeypatch):
    write = provision._write

    def edited(*args):
        stage.path.write_text("D1_DATABASE_ID=theirs\n")
        write(*args)

    monkeypatch.setattr(provision, "_write", edited)
    with pytest.raises(Problem, match="D1_DATABASE_ID has got a value meanwhile"):
        stage.run(do=True)
    assert stage.path.read_text() == "D1_DATABASE_ID=theirs\n"


def test_a_new_file_is_for_its_owner_alone_and_lacks_only_what_it_says(stage):
    said = stage.run(do=True)

    text = stage.path.read_text()
    assert stat.S_IMODE(stage.path.stat().st_mode) == 0o600
    missing = "RUNPOD_API_KEY, RUNPOD_ENDPOINT_ID, CLOUDFLARE_API_TOKEN, R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY"
    with pytest.raises(Problem, match=rf"It lacks {missing};"):
        template.read_values(stage.path)
    assert f"It still lacks {missing}" in " ".join(said.split())
    filled = text.replace("# RUNPOD_ENDPOINT_ID=", "RUNPOD_ENDPOINT_ID=e").replace(
        "# R2_ACCESS_KEY_ID=", "R2_ACCESS_KEY_ID=k"
    )
    for name in template.REQUIRED:
        filled = filled.replace(f"# {name}=ssm:", f"{name}=ssm:")
    stage.path.write_text(filled)
    assert template.read_values(stage.path)["R2_SECRET_ACCESS_KEY"] == "ssm:/ob-ai-studio/prod/R2_SECRET_ACCESS_KEY"
    stage.cloud.cloudflare.change_bucket(BUCKET, domains=[domain("a.example")])
    stage.run(do=True)
    assert stage.run().endswith("\n=  settings  .env.prod has them.\n\nEverything is there; nothing was changed.")


def test_no_secret_is_said_or_written(stage):
    said = stage.run(do=True)

    assert TOKEN not in said + stage.path.read_text()


def test_the_token_may_stand_in_parameter_store(stage, monkeypatch):
    monkeypatch.setattr(parameters, "read", lambda names: dict.fromkeys(names, TOKEN))
    stage.environ.pop("CLOUDFLARE_API_TOKEN")
    stage.path.write_text("CLOUDFLARE_API_TOKEN=ssm:/ob/token\nRUNPOD_API_KEY=ssm:/ob/not-asked-for\n")

    stage.run(do=True)

    assert stage.path.read_text().startswith("CLOUDFLARE_API_TOKEN=ssm:/ob/token\n")


def domain(name, *, enabled=True, ownership="active", ssl="active"):
    return {"domain": name, "enabled": enabled, "status": {"ownership": ownership, "ssl": ssl}}


@pytest.mark.parametrize(
    ("domains", "line", "note", "written"),
    [
        ([domain("a.example")], "", "=  public    https://a.example is connected", "https://a.example"),
        ([], "", f"connect a domain of a zone in the same account: dashboard, R2, {BUCKET}, Settings", None),
        (
            [domain("a.example", ssl="pending")],
            "",
            "a.example is connected, but not active (on, ownership active, c",
            None,
        ),
        ([domain("a.example", enabled=False)], "", "a.example is connected, but not active (off", None),
        ([domain("a.example"), domain("b.example")], "", "Choose one, and write R2_PUBLIC_BASE_URL=https://a.e", None),
        ([domain("a.example"), domain("b.example", ssl="error")], "", "b.example is conn", "https://a.example"),
        ([domain("a.example")], "R2_PUBLIC_BASE_URL=\n", "stands empty in the file and stays so", ""),
        ([domain("a.example")], "R2_PUBLIC_BASE_URL=https://a.example\n", "https://a.example is", "https://a.example"),
        (
            [domain("a.example")],
            "R2_PUBLIC_BASE_URL=https://b.example\n",
            "no active domain of the",
            "https://b.example",
        ),
    ],
)
def test_the_note_on_the_public_domain(stage, bucket, domains, line, note, written):
    stage.path.write_text(line)
    stage.cloud.cloudflare.change_bucket(BUCKET, domains=domains)

    said = stage.run(do=True)

    assert note in " ".join(said.split()).replace("= public", "=  public   ")
    assert provision.settings.read_env_file(stage.path).get("R2_PUBLIC_BASE_URL") == written
    assert stage.run(do=True).endswith("nothing was changed.")


def test_an_address_at_r2_dev_is_told(stage, bucket):
    stage.cloud.cloudflare.change_bucket(BUCKET, managed={"domain": "pub-0.r2.dev", "enabled": True})

    assert "!  public    https://pub-0.r2.dev is on: it is for development" in stage.run()


@pytest.mark.parametrize(
    ("file", "environ", "names", "sentence"),
    [
        ("", {"CLOUDFLARE_API_TOKEN": ""}, {}, "CLOUDFLARE_API_TOKEN is missing. Make an API token with the rights"),
        ("D1_DATABASE_ID=a\n", {"D1_DATABASE_ID": "b"}, {}, "is b in the environment and a in .env.prod: take out"),
        ("R2_BUCKET=pictures\n", {}, {"bucket": "other-ones"}, "R2_BUCKET is pictures already: leave --bucket out"),
        ("", {}, {"bucket": "No_Bucket"}, "'No_Bucket' is no name that Cloudflare takes"),
        ("", {}, {"database": "no database"}, "'no database' is no name that Cloudflare takes"),
        ("CLOUDFLARE_API_BASE=x\n", {"CLOUDFLARE_API_BASE": ""}, {}, "CLOUDFLARE_API_BASE is malformed"),
    ],
)
def test_what_is_asked_for_must_make_sense(stage, file, environ, names, sentence):
    stage.path.write_text(file)
    stage.environ |= environ

    with pytest.raises((Problem, ServiceError), match=sentence):
        stage.run(do=True, **names)

    assert not stage.wire.calls


def test_a_file_in_no_folder_is_refused_before_anything_is_made(stage):
    stage.path = stage.path.parent / "no" / ".env.prod"

    with pytest.raises(Problem, match="There is no folder"):
        stage.run(do=True)

    assert not stage.wire.calls


@pytest.mark.parametrize(
    ("file", "database"),
    [(".env.prod", "ob-ai-studio-prod"), (".env.local", "ob-ai-studio-local"), ("settings", "ob-ai-studio")],
)
def test_the_databases_name_has_the_stages(stage, file, database):
    wanted = provision.read(stage.path.with_name(file), stage.environ)

    assert (wanted.database, wanted.bucket) == (database, "ob-ai-results")
