"""How the real engines are started and left out: they end with their tests, and none is missing without a word."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.engines import processes

ENGINES = Path(processes.__file__).parent


class Reporter:
    """Takes down what would be printed after tests that were skipped for these reasons."""

    def __init__(self, *reasons):
        self.lines = []
        self.stats = {"skipped": [SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}")) for reason in reasons]}

    def write_line(self, line, **_):
        self.lines.append(line)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (None, "it is not installed, which ./test does"),
        ("npm warn old\nnpm error code E404\nnpm error 404 no such package\n", "npm error code E404"),
        ("killed\n", "killed"),
        ("", "nothing was said"),
    ],
)
@pytest.mark.parametrize("engine", processes.NAMES)
def test_an_engine_that_is_not_there_is_named_where_it_is_skipped_and_at_the_end(
    tmp_path, monkeypatch, engine, log, why
):
    (tmp_path / ".venv").mkdir()
    if log is not None:
        (tmp_path / ".venv" / f"{engine}.log").write_text(log)
    monkeypatch.setattr(processes, "ROOT", tmp_path)

    with pytest.raises(pytest.skip.Exception, match=processes.NAMES[engine]) as skipped:
        next(conftest._settings_of(engine, lambda: pytest.fail("was started")))
    reporter = Reporter(skipped.value, skipped.value, "for another reason")
    conftest.pytest_terminal_summary(reporter)

    (line,) = reporter.lines
    assert line.startswith(f"NOT RUN: {processes.NAMES[engine]}: ")
    assert why in line
    assert why in str(skipped.value)


def test_nothing_is_said_of_an_engine_that_ran():
    reporter = Reporter()

    conftest.pytest_terminal_summary(reporter)

    assert reporter.lines == []


def said(folder):
    """What the process has said first."""
    return processes._wait(lambda: processes._said(folder).splitlines(), folder)


def test_an_engine_ends_with_its_tests(tmp_path):
    with processes._running(["sh", "-c", "echo $$; exec sleep 60"], tmp_path, {}) as process:
        pid = int(said(tmp_path)[0])
        os.kill(pid, 0)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert process.returncode is not None


def test_an_engine_that_does_not_listen_is_ended_by_force(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    deaf = "trap '' TERM; echo ready; while :; do sleep 1; done"

    with processes._running(["sh", "-c", deaf], tmp_path, {}) as process:
        said(tmp_path)

    assert process.returncode == -signal.SIGKILL


def test_an_engine_sees_nothing_of_our_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "secret")

    with processes._running(["sh", "-c", "env; echo end"], tmp_path, {"GIVEN": "value"}):
        processes._wait(lambda: processes._said(tmp_path).endswith("end\n"), tmp_path)

    given = {line.partition("=")[0] for line in processes._said(tmp_path).splitlines()[:-1]}
    assert given - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "HOME", "TMPDIR", "GIVEN"}


def test_what_never_gets_ready_is_said_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "START_SECONDS", 0.1)
    (tmp_path / "engine.log").write_text("port in use")

    with pytest.raises(processes.NotStarted, match="port in use"):
        processes._wait(lambda: False, tmp_path)


def test_the_versions_are_exact_and_the_lock_file_names_no_registry():
    package = json.loads((ENGINES / "package.json").read_text())
    lock = json.loads((ENGINES / "package-lock.json").read_text())["packages"]

    assert package["devDependencies"] == {"miniflare": lock["node_modules/miniflare"]["version"]}
    assert not [name for name, entry in lock.items() if "resolved" in entry]
    assert all(entry["integrity"].startswith("sha512-") for name, entry in lock.items() if name)
    (wanted,) = [
        line for line in (processes.ROOT / "requirements-engines.txt").read_text().splitlines() if line[0] != "#"
    ]
    assert wanted.partition("==")[1] == "=="
