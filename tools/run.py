"""
Starts everything on this machine: a local cloud in place of Cloudflare and RunPod, the API, and the every-minute
schedule.

Nothing outside the machine is called unless --real asks for it. Jobs and pictures are kept in a folder outside the
checkout and are there again at the next start. Ctrl-C stops everything.
"""

import argparse
import base64
import fcntl
import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from tools import Problem, processes

READY_SECONDS = 30.0
CLOUDS = {"runpod": ("RUNPOD_",), "d1": ("CLOUDFLARE_", "D1_"), "r2": ("R2_",)}
FOR_CHALICE = (
    "RUNPOD_",
    "CLOUDFLARE_",
    "D1_",
    "R2_",
    "RESULT_",
    "PUBLIC_",
    "WEBHOOK_",
    "CALLBACK_",
)  # settings of the local cloud
EXAMPLE_PROMPT = "แมวสีส้มนั่งบนดวงจันทร์ - an orange cat on the moon"


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the API (default: %(default)s)")
    parser.add_argument(
        "--cloud-port",
        type=int,
        default=8001,
        help="port of the local cloud (default: %(default)s); result links name it, so keep it",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="where jobs, pictures and the API key are kept (default: a state folder in your home)",
    )
    parser.add_argument(
        "--real",
        type=_clouds,
        default=[],
        metavar="LIST",
        help="use the real ones of runpod,d1,r2, by the settings in .env.local",
    )
    parser.add_argument(
        "--latency",
        type=float,
        default=0.0,
        metavar="FACTOR",
        help="1 has the local cloud answer as late as the real ones are expected to, 0.1 ten times sooner (default: 0)",
    )
    parser.add_argument(
        "--no-rate-limit",
        action="store_false",
        dest="rate_limit",
        help="have the local D1 take more calls than Cloudflare's 1,200 in five minutes",
    )
    parser.add_argument(
        "--no-webhooks",
        action="store_false",
        dest="webhooks",
        help="give RunPod no address to call at the end of a run, so that the schedule alone finds it",
    )
    parser.add_argument(
        "--cloud-only", action="store_true", help="start only the local cloud, for `chalice local` beside it"
    )
    return parser.parse_args()


def _clouds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names or [text] if name not in CLOUDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CLOUDS)}")
    return names


def main() -> None:
    """The command."""
    options = read_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        start(options, children)
        _wait(children)
    except Problem as problem:
        print(f"./run: {problem}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopping.")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second one must not leave children behind
        processes.stop(list(children.values()))


def start(options: argparse.Namespace, children: dict[str, subprocess.Popen[bytes]]) -> None:
    """Start the processes one after the other, each when the one before answers; raises Problem."""
    from chalicelib.errors import ServiceError

    try:
        folder = _data_folder(options.data)
        env = _environment(options, folder)
        _check_port(options.cloud_port, "--cloud-port")
        if not options.cloud_only:
            _check_port(options.port, "--port")
        if options.port == options.cloud_port:
            raise Problem(
                f"--port and --cloud-port are both {options.port}; the API and the local cloud need one each."
            )
        how = ["--latency", str(options.latency), *(["--rate-limit"] if options.rate_limit else [])]
        children["local cloud"] = processes.spawn(
            "tools.cloud", str(options.cloud_port), str(folder / "cloud"), *_endpoints(), *how, env=env
        )
        _wait_for(f"http://127.0.0.1:{options.cloud_port}/", children)
        _apply_schema(env, real="d1" in options.real)
        if options.cloud_only:
            _say_how_to_go_on(folder, env, options)
            return
        children["API"] = processes.spawn("tools.local_api", str(options.port), env=env)
        _wait_for(f"http://127.0.0.1:{options.port}/health", children)
        children["schedule"] = processes.spawn("tools.schedule", env=env)
        _say_what_to_try(folder, env, options)
    except ServiceError as error:
        raise Problem(error.sentence) from error


def _endpoints() -> list[str]:
    """The endpoints that models.json names, which the local RunPod is to have, too."""
    from chalicelib import catalogue

    return sorted(set(catalogue.load().endpoints.values()))


def _data_folder(given: Path | None) -> Path:
    """The folder for the data, ours alone until we end."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = Path(os.environ.get("CALLED_FROM", ""), (given or state / "ob-ai-studio").expanduser()).resolve()
    if folder.is_relative_to(processes.ROOT):
        raise Problem(f"{folder} lies inside the checkout, where plain `chalice local` would restart at every change.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)  # held until the process ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Problem(f"{folder} is used by another ./run; stop that one or choose another --data.") from error
    except OSError as error:
        raise Problem(f"The data folder cannot be used: {error}") from error
    return folder


def _check_port(port: int, option: str) -> None:
    if not 0 < port < 65536:
        raise Problem(f"{option} {port} is no port; choose one from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Problem(
                f"Port {port} cannot be used ({error.strerror}). Stop what uses it, or choose another with {option}."
            ) from error


def _environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The children's environment: the local cloud's settings but for the real clouds, whose settings must be there."""
    from chalicelib import settings
    from chalicelib.auth import ApiKey, Right, hash_of
    from tools.cloud import Account, settings_for

    base_url = f"http://127.0.0.1:{options.cloud_port}"
    real = tuple(prefix for name in options.real for prefix in CLOUDS[name])
    local = {
        name: value for name, value in settings_for(base_url, Account()).items() if not (real and name.startswith(real))
    }
    given = {**settings.read_env_file(settings.ENV_FILE), **os.environ}
    if "r2" in options.real and "d1" not in options.real and not given.get("R2_ENDPOINT_URL"):
        # Otherwise it would be made from the account id, which is the local D1's here.
        raise Problem("--real r2 without d1 needs R2_ENDPOINT_URL: https://<account id>.r2.cloudflarestorage.com")
    if not options.webhooks:
        local["PUBLIC_BASE_URL"] = local["WEBHOOK_SECRET"] = ""
    elif "runpod" not in options.real:
        local["PUBLIC_BASE_URL"] = f"http://127.0.0.1:{options.port}"
        local["WEBHOOK_SECRET"] = hashlib.sha256(f"webhook {_api_key(folder)}".encode()).hexdigest()
    local.setdefault("RESULT_ALLOWED_PRIVATE_HOSTS", "")
    hosts = [local["RESULT_ALLOWED_PRIVATE_HOSTS"], given.get("RESULT_ALLOWED_PRIVATE_HOSTS", "")]
    local["RESULT_ALLOWED_PRIVATE_HOSTS"] = ",".join(filter(None, hosts))
    local["CALLBACK_SECRETS"] = given.get("CALLBACK_SECRETS") or _callback_secret(folder)
    hashes = given.get("API_KEY_HASHES", "")
    own = ApiKey(name="local", hash=hash_of(_api_key(folder)), right=Right.ADMIN)
    env = {
        **os.environ,
        **local,
        "API_KEY_HASHES": ",".join(filter(None, [hashes, own.entry])),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    settings.load(env)  # one sentence now rather than an error at the first request
    return env


def _callback_secret(folder: Path) -> str:
    """What callbacks are signed with, the same for as long as the folder has its key."""
    return f"whsec_{base64.b64encode(hashlib.sha256(f'callback {_api_key(folder)}'.encode()).digest()).decode()}"


def _api_key(folder: Path) -> str:
    """The key of this folder, made once."""
    path = folder / "api-key"
    try:
        key = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if not key:
            key = f"ob_{secrets.token_urlsafe(24)}"
            path.touch(mode=0o600)
            path.write_text(f"{key}\n", encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"The API key cannot be kept in {path}: {error}") from error
    return key


def _apply_schema(env: dict[str, str], *, real: bool) -> None:
    from chalicelib import bootstrap, settings
    from chalicelib.runtime import Clock
    from chalicelib.wire import Wire
    from tools import schema

    clock = Clock()
    d1 = bootstrap.make_d1(settings.load(env), Wire(clock), clock)
    if not real:
        schema.apply(d1)
        return
    report = schema.check(d1)
    if report.pending or report.missing:
        raise Problem(
            "The real D1 database is not what the code needs. `.venv/bin/python -m tools.schema --check` says what is "
            "missing, without --check it applies what is pending."
        )


def _wait_for(url: str, children: dict[str, subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, which is all that is asked
        except OSError:
            _check_children(children)
            time.sleep(0.1)
    raise Problem(f"{url} did not answer within {READY_SECONDS:.0f} seconds.")


def _wait(children: dict[str, subprocess.Popen[bytes]]) -> None:
    while True:
        time.sleep(0.5)
        _check_children(children)


def _check_children(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, child in children.items():
        status = child.poll()
        if status is not None and status < 0:
            raise Problem(f"The {name} was ended by signal {-status}.")
        if status is not None:
            raise Problem(f"The {name} has ended by itself (exit status {status}); what it said stands above.")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say_what_to_try(folder: Path, env: dict[str, str], options: argparse.Namespace) -> None:
    api, key, secret = f"http://127.0.0.1:{options.port}", _api_key(folder), env["CALLBACK_SECRETS"]
    real = (
        f"real {', '.join(options.real)}; the rest local" if options.real else "nothing outside this machine is called"
    )
    print(
        f"""
OB AI Studio is running ({real}).

  URL       {api}  (open it: the gallery, which asks for the key once)
  API key   {key}
  Secret    {secret}  (signs callbacks)
  Data      {folder}

Try it there, or by hand; the picture is done in a few seconds, without any further command:

  curl -s {api}/api/queue/create -H 'Authorization: Bearer {key}' -d '{{"prompt":"{EXAMPLE_PROMPT}"}}'

Then the address of the picture, to open in a browser:

  curl -s '{api}/api/jobs?limit=1' -H 'Authorization: Bearer {key}' | grep -o '"result_url": "[^"]*"'

Ctrl-C stops everything.
""",
        flush=True,
    )


def _say_how_to_go_on(folder: Path, env: dict[str, str], options: argparse.Namespace) -> None:
    names = sorted(name for name in env if name == "API_KEY_HASHES" or name.startswith(FOR_CHALICE))
    path = folder / "local.env"
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}='{env[name]}'\n" for name in names))
    print(
        f"""
The local cloud is running on http://127.0.0.1:{options.cloud_port}. Start the API beside it, in another terminal:

  set -a; . '{path}'; set +a; .venv/bin/chalice local --port {options.port}

  API key   {_api_key(folder)}

There is no schedule then; a round is run by hand:

  curl -s -X POST http://127.0.0.1:{options.port}/dev/runpod-poll -H 'Authorization: Bearer {_api_key(folder)}'

Ctrl-C stops the local cloud.
""",
        flush=True,
    )


if __name__ == "__main__":
    main()
