"""
Makes an API key and says what to do with it.

    python -m tools.keys new NAME                  a key that may create jobs and act on them
    python -m tools.keys new NAME --rights admin   read, write or admin; each has those before it

The key is shown once and kept nowhere: the service knows only the hash in the entry.
"""

import argparse
import re
import secrets
import sys

from chalicelib.auth import NAME, ApiKey, Right, hash_of


def new(name: str, right: Right) -> tuple[str, ApiKey]:
    """A key that nobody has yet, and what the service is told of it."""
    key = f"ob_{secrets.token_hex(24)}"
    return key, ApiKey(name=name, hash=hash_of(key), right=right)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["new"])
    parser.add_argument("name", help="what the key is called in timelines and logs")
    parser.add_argument("--rights", choices=[right.word for right in Right], default=Right.WRITE.word)
    options = parser.parse_args()
    if not re.fullmatch(NAME, options.name):
        sys.exit("NAME must have 1 to 40 letters, digits, dots, dashes and underscores.")
    key, entry = new(options.name, Right[options.rights.upper()])
    print(f"key    {key}")
    print(f"entry  {entry.entry}")
    print("Give the key to its user. Put the entry into API_KEY_HASHES, after a comma if there are others, and deploy.")


if __name__ == "__main__":
    main()
