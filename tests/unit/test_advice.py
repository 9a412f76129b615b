"""What is odd about settings that are each right, and that everything has its mend."""

import hashlib
import re
from pathlib import Path

import pytest

from chalicelib import advice, settings
from chalicelib.advice import Finding, Level
from tests.conftest import KEY_HASH

REAL = {
    "CLOUDFLARE_API_BASE": "https://api.cloudflare.com/client/v4",
    "CLOUDFLARE_ACCOUNT_ID": "0123456789abcdef0123456789abcdef",
    "CLOUDFLARE_API_TOKEN": "token",
    "D1_DATABASE_ID": "11111111-2222-3333-4444-555555555555",
    "R2_ACCESS_KEY_ID": "key",
    "R2_SECRET_ACCESS_KEY": "secret",
    "R2_PUBLIC_BASE_URL": "https://pictures.example.com",
    "RUNPOD_API_KEY": "rpa_key",
    "RUNPOD_ENDPOINT_ID": "abc123",
    "API_KEY_HASHES": KEY_HASH,
    "PUBLIC_BASE_URL": "https://abc.execute-api.eu-west-1.amazonaws.com/v1",
    "WEBHOOK_SECRET": "sixteen characters",
}

ODD = {
    "account_id_shape": ({"CLOUDFLARE_ACCOUNT_ID": "my-account"}, "CLOUDFLARE_ACCOUNT_ID is no account id"),
    "database_id_shape": ({"D1_DATABASE_ID": "ob-ai-studio"}, "D1_DATABASE_ID is no database id"),
    "r2_endpoint_has_bucket": (
        {"R2_ENDPOINT_URL": "https://x.r2.cloudflarestorage.com/ob-ai-results"},
        "R2_ENDPOINT_URL ends in the bucket's name",
    ),
    "public_url_is_s3": (
        {"R2_PUBLIC_BASE_URL": "https://x.r2.cloudflarestorage.com/ob-ai-results"},
        "R2_PUBLIC_BASE_URL is the S3 endpoint",
    ),
    "public_url_r2_dev": ({"R2_PUBLIC_BASE_URL": "https://pub-0.r2.dev"}, "the bucket's r2.dev address"),
    "runpod_other_api": ({"RUNPOD_API_BASE": "https://rest.runpod.io/v1"}, "which is not the queue API"),
    "private_hosts": ({"RESULT_ALLOWED_PRIVATE_HOSTS": "127.0.0.1:8000"}, "lets links of real workers lead into"),
    "webhook_half": ({"WEBHOOK_SECRET": ""}, "PUBLIC_BASE_URL is set, but WEBHOOK_SECRET is not"),
    "webhook_local": ({"PUBLIC_BASE_URL": "http://127.0.0.1:8000"}, "PUBLIC_BASE_URL is no public https address"),
    "keys_not_configured": ({"API_KEY_HASHES": ""}, "No API key is configured"),
    "empty_key": ({"API_KEY_HASHES": hashlib.sha256(b"\n").hexdigest()}, "the hash of an empty key"),
    "anonymous": ({"ALLOW_ANONYMOUS": "true"}, "Anybody may create jobs"),
}


def findings(changed):
    config = settings.load({**REAL, **changed})
    return [*advice.of_settings(config), *advice.of_keys(config)]


def test_nothing_is_odd_about_a_usual_set():
    assert {finding.level for finding in findings({})} == {Level.OK}


@pytest.mark.parametrize(("code", "odd"), ODD.items(), ids=ODD)
def test_what_is_odd_is_told_by_its_own_sentence(code, odd):
    changed, sentence = odd

    found = [finding for finding in findings(changed) if finding.level is not Level.OK]

    assert [finding.code for finding in found] == [code]
    assert sentence in found[0].sentence
    assert found[0].mend


def test_the_keys_are_counted_by_their_right():
    entries = f"{KEY_HASH},a:{'a' * 64}:write,b:{'b' * 64}:read,a:{'c' * 64}:write"

    said = [finding.sentence for finding in findings({"API_KEY_HASHES": entries}) if finding.check == "keys"]

    assert said == ["API keys: 1 with the right read, 2 with the right write, 1 with the right admin."]


def test_the_other_half_of_the_callbacks_is_named_too():
    found = [finding for finding in findings({"PUBLIC_BASE_URL": ""}) if finding.level is not Level.OK]

    assert "WEBHOOK_SECRET is set, but PUBLIC_BASE_URL is not" in found[0].sentence


@pytest.mark.parametrize("host", ["abc.api.runpod.ai", "api.runpod.io", "rest.runpod.io"])
def test_runpods_other_apis_are_not_its_queue(host):
    found = findings({"RUNPOD_API_BASE": f"https://{host}/v2"})

    assert "runpod_other_api" in [finding.code for finding in found]


def test_a_code_is_either_an_error_or_a_warning_and_has_a_mend():
    assert not advice.ERRORS.keys() & advice.WARNINGS.keys()
    assert all(
        mend.endswith((".", "sha256sum", "echo", "create"))
        for mend in (*advice.ERRORS.values(), *advice.WARNINGS.values())
    )


def test_what_nobody_has_thought_of_is_an_error():
    finding = Finding("d1", "Something new.", "d1_something_new")

    assert finding.level is Level.ERROR
    assert finding.mend


def test_every_code_of_the_checks_has_its_mend(request):
    root = Path(request.config.rootpath)
    codes = set()
    for path in ("chalicelib/health.py", "chalicelib/advice.py", "tools/doctor.py"):
        text = (root / path).read_text(encoding="utf-8")
        codes |= set(re.findall(r'Finding\([^()]*?(?:\([^()]*\)[^()]*?)*?, "(\w+)"\)', text))
    known = advice.ERRORS.keys() | advice.WARNINGS.keys()

    assert len(codes) > 30
    assert codes - known - {"internal_error"} == set()
