"""
The local cloud as a process: `python -m tools.cloud PORT FOLDER [ENDPOINT …]`; it ends when its standard input does.

The endpoints are those that the account has besides its first.
"""

import sqlite3
import sys
from pathlib import Path

from tools.cloud import Account, LocalCloud
from tools.cloud.server import CloudServer
from tools.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    try:
        server = CloudServer(int(sys.argv[1]))
        account = Account(endpoints=tuple(sys.argv[3:]))
        server.cloud = LocalCloud(Path(sys.argv[2]), base_url=server.base_url, account=account)
    except (OSError, sqlite3.Error) as error:
        sys.exit(f"The local cloud cannot use {sys.argv[2]}: {error}")
    server.serve_forever()
