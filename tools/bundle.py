"""The zip that Lambda gets: made by Chalice in a copy of the project, held against requirements.txt, and repacked."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path, PurePosixPath
from typing import Any

from tools import Problem

ROOT = Path(__file__).parent.parent
RUNTIME = (3, 13)
WHEELS = ROOT / ".venv" / "lambda" / "wheels"
SERVICE = ("app.py", "chalicelib")
SOURCES = (*SERVICE, ".chalice", "requirements.txt")
FRAMEWORK = {"chalice/__init__.py", "chalice/app.py"}
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*~", "deployments", "deployed")
COMPILE = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip can tell: the same files are the same bytes

Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What was made: the files of the zip, and the template that Chalice made beside it."""

    files: Files
    template: dict[str, Any]


def build(stage: str) -> Bundle:
    """Make it anew, from nothing that was made before. Raises Problem."""
    if sys.version_info[:2] != RUNTIME:
        raise Problem("The functions run Python 3.13, and so must what packages them: use ./deploy.")
    with tempfile.TemporaryDirectory(prefix="ob-ai-studio-") as folder:
        project, made = Path(folder, "project"), Path(folder, "made")
        copy_sources(project)
        _run_chalice(project, made, stage)
        with zipfile.ZipFile(made / "deployment.zip") as archive:
            files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        service = {name for name in _names_below(project) if name.split("/")[0] in SERVICE}
        check(files, (ROOT / "requirements.txt").read_text(encoding="utf-8"), service)
        return Bundle(files=with_bytecode(shipped(files)), template=_load_template(made))


def copy_sources(folder: Path) -> None:
    """Copy what Chalice needs, and nothing that may have been left beside it."""
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(source, folder / name)


def _run_chalice(project: Path, made: Path, stage: str) -> None:
    chalice = [sys.executable, "-c", "from chalice.cli import main; main()"]  # its script has the folder's path in it
    done = subprocess.run(
        [*chalice, "package", "--stage", stage, "--merge-template", ".chalice/template.yaml", made],
        cwd=project,
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(project),
            "AWS_DEFAULT_REGION": "us-east-1",  # Chalice wants one; the template fits every region
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": WHEELS.as_uri(),  # a path with a space would be two
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Problem(f"Chalice could not package the service: {said[-1] if said else 'it did not say why'}")


def _load_template(made: Path) -> dict[str, Any]:
    import yaml

    template: dict[str, Any] = yaml.safe_load((made / "sam.yaml").read_text(encoding="utf-8"))
    return template


def _names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check(files: Files, requirements: str, service: set[str]) -> None:
    """
    Raise Problem unless the files are those of every requirement, in its version, and of the service, and no others.

    Chalice leaves out what it finds no wheel for, and calls that a success.
    """
    wanted, there = pinned(requirements), _distributions(files)
    if lacking := [f"{name}=={version}" for name, version in wanted.items() if there.get(name) != version]:
        raise Problem(
            f"The zip lacks what requirements.txt names: {', '.join(lacking)}. Name a version that has a wheel for "
            "arm64 and Python 3.13."
        )
    if others := sorted(there.keys() - wanted.keys()):
        raise Problem(f"The zip has what requirements.txt does not name: {', '.join(others)}. Pin it there.")
    expected = _recorded(files) | service | FRAMEWORK
    if lost := sorted(expected - files.keys()):
        raise Problem(f"The zip lacks parts of what it should hold: {', '.join(lost[:5])}.")
    if strays := sorted(files.keys() - expected):
        raise Problem(f"The zip has files of nobody: {', '.join(strays[:5])}.")


def pinned(requirements: str) -> dict[str, str]:
    """The version of each requirement, by its name as it is compared. Raises Problem."""
    found = {}
    for line in requirements.splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line.strip())
            if match is None:
                raise Problem(f"requirements.txt does not pin {line.strip()!r}: write name==version.")
            found[_comparable(match[1])] = match[2]
    return found


def _comparable(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions(files: Files) -> dict[str, str]:
    found = {}
    for name, content in files.items():
        if name.endswith(".dist-info/METADATA"):
            head = message_from_bytes(content)
            found[_comparable(head["Name"])] = head["Version"]
    return found


def _recorded(files: Files) -> set[str]:
    """The files that the packages say they have, without the commands that they would install."""
    lines = [
        line
        for name, content in files.items()
        if name.endswith(".dist-info/RECORD")
        for line in content.decode().splitlines()
    ]
    names = {line.rsplit(",", 2)[0].strip('"') for line in lines}
    return {name for name in names if not name.startswith(("../", "/")) and not name.endswith(".pyc")}


def shipped(files: Files) -> Files:
    """Without what no function reads: of a package's description only the page that names its version."""
    return {name: content for name, content in files.items() if _ships(PurePosixPath(name))}


def _ships(path: PurePosixPath) -> bool:
    if path.parts[0].endswith(".dist-info"):
        return path.parts[1:] == ("METADATA",)
    return not {"bin", "tests"} & set(path.parts) and path.suffix not in (".pyi", ".pyc") and path.name != "py.typed"


def with_bytecode(files: Files) -> Files:
    """
    With what Python would compile anew at every cold start, because a function's folder cannot be written to.

    It is taken without a look at the source, whose date means nothing in a zip.
    """
    with tempfile.TemporaryDirectory(prefix="ob-ai-studio-") as folder:
        unpack(files, Path(folder))
        subprocess.run(
            [sys.executable, *COMPILE, "-s", folder, "-p", "/var/task", folder],
            env={"PYTHONHASHSEED": "0"},
            check=True,
        )
        return {name: Path(folder, name).read_bytes() for name in _names_below(Path(folder))}


def unpack(files: Files, folder: Path) -> None:
    """Write the files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write(files: Files, path: Path) -> None:
    """Write the zip: the same bytes for the same files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr, entry.compress_type = 3, 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name], compresslevel=9)


def weights(path: Path) -> list[tuple[str, int, int]]:
    """What the zip holds, heaviest first: a package's name, its bytes in the zip, and its bytes unpacked."""
    packed: Counter[str] = Counter()
    unpacked: Counter[str] = Counter()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            top = PurePosixPath(entry.filename).parts[0]
            name = "descriptions of packages" if top.endswith(".dist-info") else top
            packed[name] += entry.compress_size
            unpacked[name] += entry.file_size
    return [(name, size, unpacked[name]) for name, size in packed.most_common()]
