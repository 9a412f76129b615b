"""`chalice local` as a child process: `python -m tools.local_api PORT`."""

import sys

from chalice.cli import main
from chalice.local import ChaliceRequestHandler, ThreadedHTTPServer

from tools.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    # Autoreload would restart the service at every change of a file in the folder, and leave a child behind at SIGTERM.
    ThreadedHTTPServer.request_queue_size = 128  # the usual 5 resets connections when fifty clients come at once
    ChaliceRequestHandler.wbufsize = -1  # head and body leave in one piece; two would wait 40 ms for each other
    ChaliceRequestHandler.disable_nagle_algorithm = True
    sys.argv[1:] = ["local", "--no-autoreload", "--host", "127.0.0.1", "--port", sys.argv[1]]
    main()
