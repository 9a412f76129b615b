import pytest

from chalicelib import settings
from chalicelib.errors import SettingError


def test_the_local_cloud_is_a_complete_set(environment):
    loaded = settings.load(environment)

    assert loaded.r2_bucket == "ob-ai-results"
    assert loaded.submit_unknown_wait == 600
    assert loaded.max_attempts == 2
    assert loaded.allow_anonymous is False


@pytest.mark.parametrize("name", ["RUNPOD_API_KEY", "CLOUDFLARE_API_TOKEN", "D1_DATABASE_ID", "R2_ACCESS_KEY_ID"])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_setting_is_named(environment, name, value):
    environment.pop(name)
    if value is not None:
        environment[name] = value

    with pytest.raises(SettingError, match=rf"Setting {name} \(.+\) is missing") as caught:
        settings.load(environment)

    assert caught.value.code == "setting_missing"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RUNPOD_API_BASE", "api.runpod.ai/v2"),
        ("R2_PUBLIC_BASE_URL", "https://x.example/?a=1"),
        ("ALLOW_ANONYMOUS", "yes"),
        ("MAX_ATTEMPTS", "0"),
        ("MAX_ATTEMPTS", "two"),
        ("SUBMIT_UNKNOWN_WAIT", "-5"),
        ("API_KEY_HASHES", "secret-key-itself"),
        ("RESULT_ALLOWED_PRIVATE_HOSTS", "localhost"),
        ("RUNPOD_ENDPOINT_ID", "../other"),
    ],
)
def test_a_malformed_setting_is_named_without_its_value(environment, name, value):
    with pytest.raises(SettingError, match=f"Setting {name} is malformed") as caught:
        settings.load({**environment, name: value})

    assert caught.value.code == "setting_malformed"
    assert value not in caught.value.sentence


def test_the_r2_endpoint_is_made_from_the_account(environment):
    environment.pop("R2_ENDPOINT_URL")

    assert settings.load(environment).r2_endpoint == "https://local-account.r2.cloudflarestorage.com"


def test_a_base_url_loses_its_last_slash(environment):
    loaded = settings.load({**environment, "R2_PUBLIC_BASE_URL": "https://cdn.example/"})

    assert loaded.r2_public_base_url == "https://cdn.example"


def test_the_environment_wins_over_the_file(environment, tmp_path):
    file = tmp_path / ".env.local"
    file.write_text("RUNPOD_API_KEY=from-file\nMAX_ATTEMPTS='5'\n# a comment\n\nexport R2_BUCKET=\"from-file\"\n")
    environment.pop("R2_BUCKET")

    loaded = settings.load(environment, env_file=file)

    assert (loaded.runpod_api_key, loaded.max_attempts, loaded.r2_bucket) == ("local-runpod-key", 5, "from-file")


def test_all_that_is_missing_is_named_at_once(environment):
    del environment["RUNPOD_API_KEY"], environment["R2_ACCESS_KEY_ID"]

    with pytest.raises(SettingError, match=r"Settings RUNPOD_API_KEY .* and R2_ACCESS_KEY_ID .* are missing"):
        settings.load(environment)


def test_lambda_does_not_read_the_file(environment, tmp_path):
    file = tmp_path / ".env.local"
    file.write_text("MAX_ATTEMPTS=5\n")

    loaded = settings.load({**environment, "AWS_LAMBDA_FUNCTION_NAME": "api"}, env_file=file)

    assert loaded.max_attempts == 2


@pytest.mark.parametrize(
    ("text", "line"), [("MAX_ATTEMPTS=2\nthis is broken\n", 2), ("A='never closed\n", 1), ("JUST_A_NAME\n", 1)]
)
def test_a_broken_file_is_one_sentence_with_the_line(environment, tmp_path, text, line):
    file = tmp_path / ".env.local"
    file.write_text(text)

    with pytest.raises(SettingError, match=rf"\.env\.local, line {line}, is no NAME=value line"):
        settings.load(environment, env_file=file)


def test_a_file_that_is_no_text_is_one_sentence(environment, tmp_path):
    file = tmp_path / ".env.local"
    file.write_bytes(b"A=\xff\xfe\n")

    with pytest.raises(SettingError, match="cannot be read"):
        settings.load(environment, env_file=file)


def test_only_the_needed_settings_must_be_there():
    loaded = settings.load(
        {"CLOUDFLARE_ACCOUNT_ID": "a", "CLOUDFLARE_API_TOKEN": "t", "D1_DATABASE_ID": "d"}, only="CLOUDFLARE_|D1_"
    )

    assert loaded.d1_database_id == "d"
    with pytest.raises(SettingError, match="D1_DATABASE_ID"):
        settings.load({"CLOUDFLARE_ACCOUNT_ID": "a", "CLOUDFLARE_API_TOKEN": "t"}, only="CLOUDFLARE_|D1_")


def test_no_secret_shows_when_the_settings_are_printed(environment):
    assert "local-runpod-key" not in repr(settings.load(environment))
