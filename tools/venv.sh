# Sourced by ./run and ./test: finds a Python, makes .venv and installs what the requirements files name, if that is not done yet.

say() { echo "$(basename "$0"): $*" >&2; }

find_python() {
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
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

# For ./test: the real engines that check the local cloud. One that cannot be had here stops nothing; the tests say so.
install_engines() {
  engine miniflare tests/engines/package-lock.json
  engine seaweedfs requirements-engines.txt
}

engine() {
  wanted=$(cksum < "$2")
  [ "$(cat ".venv/$1.installed" 2>/dev/null)" = "$wanted" ] && return
  say "installing $1, with which the tests check the local cloud (once)"
  rm -f ".venv/$1.installed"
  if "install_$1" > ".venv/$1.log" 2>&1; then
    echo "$wanted" > ".venv/$1.installed"
  else
    say "$1 could not be installed; what it checks is left out. All that was said is in .venv/$1.log."
  fi
}

install_miniflare() {
  command -v node && command -v npm || { echo "error: Node.js 18 or newer and npm were not found"; return 1; }
  mkdir -p .venv/miniflare && cp tests/engines/package.json tests/engines/package-lock.json .venv/miniflare || return 1
  # The install scripts would only fetch again what the packages for this platform bring.
  npm ci --prefix .venv/miniflare --ignore-scripts --engine-strict --no-audit --no-fund --fetch-retries 1 &&
    .venv/miniflare/node_modules/.bin/workerd --version
}

install_seaweedfs() {
  .venv/bin/python -m pip install --quiet --retries 1 --timeout 30 --disable-pip-version-check --only-binary :all: \
    -r requirements-engines.txt && .venv/bin/weed version
}
