"""
The local cloud as a process: `python -m tools.cloud PORT FOLDER [ENDPOINT …] [--latency FACTOR] [--rate-limit]`; it
ends when its standard input does.

The endpoints are those that the account has besides its first. With a latency of 1 it answers as late as the real
clouds are expected to, with 0.1 ten times sooner; without it at once. With --rate-limit it counts the calls of
Cloudflare's API and refuses those over 1,200 in five minutes, as Cloudflare does.
"""

import argparse
import sqlite3
import sys
from pathlib import Path

from tools.cloud import Account, LocalCloud
from tools.cloud.server import CloudServer
from tools.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m tools.cloud", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("endpoints", nargs="*")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--rate-limit", action="store_true")
    options = parser.parse_args()
    try:
        server = CloudServer(options.port)
        server.cloud = LocalCloud(
            options.folder,
            base_url=server.base_url,
            account=Account(endpoints=tuple(options.endpoints)),
            latency=options.latency,
            rate_limited=options.rate_limit,
        )
    except (OSError, sqlite3.Error) as error:
        sys.exit(f"The local cloud cannot use {options.folder}: {error}")
    server.serve_forever()
