"""`chalice local` by the fast clock: `python -m tests.contract.fast_api PORT`."""

import runpy

from chalicelib import bootstrap
from tests.contract.fast_clock import FastClock

if __name__ == "__main__":
    bootstrap.Clock = FastClock
    runpy.run_module("tools.local_api", run_name="__main__")
