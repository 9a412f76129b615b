"""The file of settings that an operator's command works with: its option --env, and what its values come to."""

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


def complete(values: dict[str, str]) -> dict[str, str]:
    """The values as ./deploy gives them to the functions: an API with a domain of its own is reached there."""
    if domain := values.get("DEPLOY_DOMAIN", "").strip():
        return {"PUBLIC_BASE_URL": f"https://{domain}", **values}
    return values
