"""The command as it is run, against the served local cloud; and the service with what it made and wrote."""

import os
import subprocess
import sys

import boto3
import pytest

from chalicelib import bootstrap, settings
from chalicelib.advice import Level
from chalicelib.runtime import Clock, Deadline
from tests.conftest import KEY_HASH
from tests.engines import processes
from tools import doctor
from tools.processes import ROOT

NOTHING_TO_SEE = ("d1", "r2", "public", "schedule")


@pytest.fixture
def provision(cloud_server, tmp_path):
    """Run it for a new stage, with nothing but a token."""
    account = cloud_server.cloud.account
    plain = {name: value for name, value in os.environ.items() if name not in cloud_server.cloud.settings()}
    token = {"CLOUDFLARE_API_BASE": f"{cloud_server.base_url}/client/v4", "CLOUDFLARE_API_TOKEN": account.api_token}

    def run(*words, **environ):
        command = [sys.executable, "-m", "tools.provision", "--env", str(tmp_path / ".env.prod"), *words]
        return subprocess.run(
            command, env={**plain, **token, **environ}, cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    return run


def test_what_the_command_makes_the_service_works_with(provision, cloud_server, tmp_path, monkeypatch):
    session = processes.s3_session()
    monkeypatch.setattr(boto3.session, "Session", lambda: session)  # to make one takes longer than most tests
    file, names = tmp_path / ".env.prod", ["--bucket", "pictures-prod"]

    dry = provision(*names)
    assert (dry.returncode, dry.stderr, file.exists()) == (0, "", False)
    made, again = provision(*names, "--apply"), provision("--apply")

    assert (made.returncode, made.stdout.splitlines()[-1], made.stderr) == (0, "Done.", "")
    assert (again.returncode, again.stdout.splitlines()[-1].partition(";")[2]) == (0, " nothing was changed.")
    written = settings.read_env_file(file)
    assert set(written) == {"CLOUDFLARE_ACCOUNT_ID", "D1_DATABASE_ID", "R2_BUCKET"}
    values = {**cloud_server.cloud.settings(), **written, "R2_PUBLIC_BASE_URL": "", "API_KEY_HASHES": KEY_HASH}
    found = [finding for finding in doctor.look(values) if finding.check in NOTHING_TO_SEE]
    assert {finding.check for finding in found} >= {"d1", "r2", "public"}
    assert [finding for finding in found if finding.level is not Level.OK] == []
    service = bootstrap.build(settings.load(values, env_file=tmp_path / "none"), Clock())
    job = service.pipeline.new_job(prompt="a cat", model="qwen-image", payload=None)
    service.pipeline.create([job], Deadline(Clock(), 20.0), by="test")
    assert service.store.get(job.id, timeout=5.0).runpod_job_id
    assert not cloud_server.cloud.d1.execute("SELECT name FROM sqlite_master")  # the database from the start is not it


def test_a_refusal_is_one_sentence_and_an_exit_status(provision):
    refused = provision("--apply", CLOUDFLARE_API_TOKEN="wrong")

    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("Cloudflare refused the token (HTTP 403, Authentication error [10000])")
    unreachable = provision("--apply", CLOUDFLARE_API_BASE="http://127.0.0.1:9/client/v4")
    assert unreachable.stderr == (
        "Cloudflare's API could not be reached; nothing was sent. Run this again: it goes on where it stopped.\n"
    )
