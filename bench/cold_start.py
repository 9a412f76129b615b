"""
How long a function takes to begin: `.venv/lambda/bin/python -m bench.cold_start [ZIP] [--runs N]`.

The zip is unpacked twice, with its compiled modules and without, into folders that nothing is written to, as Lambda's
is. Fresh processes of this Python begin from each in turn; the median of either, and their ratio, is said.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEYS = "from chalicelib.credentials import Credential; keys = Credential(('k', 's'))"
R2 = f"from chalicelib.r2 import R2; {KEYS}; R2(endpoint_url='http://127.0.0.1:9', bucket='b', keys=keys,"
CASES = {
    "import of app": "import app",
    "import of app, and R2's client": f"import app; {R2} public_base_url='')._connect()",
    "import of app, and SSM's client": "import app; from chalicelib import parameters; parameters._connect()",
}
TIMED = "import sys, time; sys.path[:0] = sys.argv[1:]; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def unpack(path: Path, folder: Path, *, compiled: bool) -> Path:
    """The zip's files in a folder of their own."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if compiled or not name.endswith(".pyc")])
    return folder


def milliseconds(code: str, folder: Path, packages: Path) -> float:
    """What one fresh process takes for the code; -B, because Lambda's folder cannot be written to."""
    command = [sys.executable, "-I", "-S", "-B", "-c", TIMED.format(code), str(folder), str(packages)]
    env = {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_LAMBDA_FUNCTION_NAME": "f"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout) * 1000


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cold_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zip", nargs="?", type=Path, default=ROOT / "dist" / "dev" / "deployment.zip")
    parser.add_argument("--runs", type=int, default=15, help="processes of each kind (default: %(default)s)")
    options = parser.parse_args()
    (packages,) = Path(sys.prefix, "lib").glob("python3.*/site-packages")  # for boto3, which Lambda's image brings
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            compiled: unpack(options.zip, Path(folder, str(compiled)), compiled=compiled) for compiled in (True, False)
        }
        print("| what | compiled, ms | not compiled, ms | ratio |\n|---|---|---|---|")
        for name, code in CASES.items():
            taken: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(options.runs):
                for compiled, there in kinds.items():
                    taken[compiled].append(milliseconds(code, there, packages))
            with_it, without = statistics.median(taken[True]), statistics.median(taken[False])
            print(f"| {name} | {with_it:.0f} | {without:.0f} | {without / with_it:.2f} |", flush=True)


if __name__ == "__main__":
    main()
