"""The option --env of the operator's commands: which file of settings they work with."""

import argparse
from pathlib import Path

from chalicelib import settings


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add it; the file is .env.local where it is not given."""
    parser.add_argument(
        "--env",
        type=_there,
        default=settings.ENV_FILE,
        metavar="FILE",
        help="the file of settings, such as .env.prod; the environment wins over it (default: .env.local)",
    )


def _there(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)
