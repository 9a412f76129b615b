"""The file of settings that an operator's command works with: its option --env, what it comes to, what is added."""

import argparse
import contextlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from chalicelib import settings
from tools import Problem

NEW_FILE_MODE = 0o600


def add_option(parser: argparse.ArgumentParser, *, may_be_new: bool = False) -> None:
    """Add it; the file is .env.local where it is not given."""
    parser.add_argument(
        "--env",
        type=Path if may_be_new else _there,
        default=settings.ENV_FILE,
        metavar="FILE",
        help="the file of settings, such as .env.prod; the environment wins over it (default: .env.local)",
    )


def _there(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def complete(values: dict[str, str]) -> dict[str, str]:
    """The values as ./deploy gives them to the functions: an API with a domain of its own is reached there."""
    if domain := values.get("DEPLOY_DOMAIN", "").strip():
        return {"PUBLIC_BASE_URL": f"https://{domain}", **values}
    return values


def fill(text: str, values: Mapping[str, str]) -> str:
    """
    The text with those values that it does not have: in a line that names the setting and leaves it empty, or else in a
    new line at the end. Every other line stays byte for byte as it is. Raises Problem where a value is there already.
    """
    from dotenv.parser import parse_stream

    bindings = list(parse_stream(io.StringIO(text, newline="")))
    parts = [binding.original.string for binding in bindings]
    ending = "\r\n" if "\r\n" in text else "\n"
    last = {binding.key: place for place, binding in enumerate(bindings) if binding.key is not None}  # it wins
    for name, value in values.items():
        if name not in last:
            between = "" if not parts or parts[-1].endswith("\n") else ending
            parts.append(f"{between}{name}={value}{ending}")
        elif not (bindings[last[name]].value or "").strip():
            empty = rf"""({name}[^\S\r\n]*=)[^\S\r\n]*("\s*"|'\s*')?"""
            parts[last[name]] = re.sub(empty, rf"\g<1>{value}", parts[last[name]], count=1)
        else:
            raise Problem(f"{name} has got a value meanwhile. Run this again: it looks at that one.")
    return "".join(parts)


def replace(path: Path, text: str) -> None:
    """Put the text in the file's place, whole or not at all; its mode stays, and a new file is for its owner alone."""
    path = path.resolve()  # a link stays one
    mode = path.stat().st_mode & 0o777 if path.exists() else NEW_FILE_MODE
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
