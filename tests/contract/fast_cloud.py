"""The local cloud as a process by the fast clock: `python -m tests.contract.fast_cloud FOLDER`; it says its URL."""

import random
import sys
import time
from pathlib import Path

from tests.contract.fast_clock import FastClock
from tools.cloud import LocalCloud
from tools.cloud.server import CloudServer
from tools.processes import end_with_parent

LATENCY = 0.02  # seconds at most, on the way there and on the way back


class DistantCloud(LocalCloud):
    """Answers as late as one behind a network, so that a kill can fall before the effect, after it, or on an answer."""

    def handle(self, request):
        time.sleep(random.uniform(0, LATENCY))
        answer = super().handle(request)
        time.sleep(random.uniform(0, LATENCY))
        return answer


if __name__ == "__main__":
    end_with_parent()
    clock, server = FastClock(), CloudServer(0)
    server.cloud = DistantCloud(Path(sys.argv[1]), base_url=server.base_url, clock=lambda: clock.now().timestamp())
    print(server.base_url, flush=True)
    server.serve_forever()
