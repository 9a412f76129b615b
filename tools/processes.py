"""Child processes that never outlive their parent, however it ends."""

import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 5.0


def end_with_parent() -> None:
    """In a child: end at once when the parent is gone, which closes the pipe that is our standard input."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be held while the interpreter ends
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def spawn(module: str, *args: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m module` in a session of its own: Ctrl-C reaches only the parent, which stops the children."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *args], cwd=ROOT, env=env, stdin=subprocess.PIPE, start_new_session=True
    )


def stop(children: list[subprocess.Popen[bytes]]) -> None:
    """End them all, by force those that do not go."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
