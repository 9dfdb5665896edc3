#!/bin/sh
# Makes .venv with all that works on a CPU: the package (editable), its extras and the tools, pinned by requirements.lock.
#
#   sh scripts/setup.sh                      the first of python3.11, python3.12, python3.13, python3 that runs and fits
#   PYTHON=python3.12 sh scripts/setup.sh    this interpreter
#
# .venv/.setup-done holds the key of what was installed: when it still holds, this takes milliseconds.
# .venv/.setup-unfinished holds the temporary files of a set-up that runs: one left behind by an earlier set-up means that
# .venv is made anew.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
root=$(pwd -P)
venv=.venv
temporary=$root/$venv/.setup-unfinished

# No file outside the checkout, even when killed; and /tmp may be too small for PyTorch.
export TMPDIR="$temporary"
# The caller's Python and pip settings must not reach into .venv; mirrors, indexes and proxies stay theirs.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET="${PIP_QUIET:-2}"

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# version_of PYTHON: prints 3.11, 3.12 or 3.13; fails for any other, and for one that does not run (an idle pyenv shim).
version_of() {
  "$1" -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v); sys.exit(not ((3, 11) <= v <= (3, 13)))' 2>/dev/null
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    version_of "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs here."
    echo "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    if version_of "$candidate" >/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found. Install one (Debian, Ubuntu: sudo apt-get install python3) or give its path: make setup PYTHON=/path/to/python3.12"
}

has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

# Debian and Ubuntu ship Python without ensurepip, so pip may have to come from somewhere else.
make_venv() {
  if "$1" -c 'import venv; from ensurepip import version' 2>/dev/null; then
    "$1" -m venv "$venv"
    return
  fi
  if "$1" -m venv --without-pip "$venv" 2>/dev/null; then
    "$1" -m pip --python "$venv/bin/python" install pip 2>/dev/null || pip_from_debian || true
    if has_pip; then return; fi
  fi
  "$1" -m virtualenv "$venv" >/dev/null 2>&1 || virtualenv --python "$1" "$venv" >/dev/null 2>&1 || true
  has_pip || fail "$1 cannot make a virtual environment with pip. Once: sudo apt-get install python$(version_of "$1")-venv"
}

# pip out of Debian's package of it, unpacked inside .venv: no root needed.
pip_from_debian() (
  cd "$venv"
  apt-get download python3-pip-whl >/dev/null 2>&1 || return 1
  dpkg-deb -x python3-pip-whl_*.deb unpacked
  set -- unpacked/usr/share/python-wheels/pip-*.whl
  bin/python "$1/pip" install pip
  rm -rf unpacked python3-pip-whl_*.deb
)

# Of two set-ups at the same time in one checkout, the second waits (and finds its work done).
if command -v flock >/dev/null 2>&1; then
  exec 9<"$root"
  flock 9
fi

present=$(version_of "$venv/bin/python") || present=
wanted=$present
if [ -n "${PYTHON:-}" ]; then
  find_python >/dev/null
  wanted=$(version_of "$PYTHON")
fi
installed_from=$(cat "$venv/.setup-done" 2>/dev/null) || installed_from=
key() { printf '%s\n' "$root" "$1 $(cat pyproject.toml requirements.lock plugins/k25_plugins/version.py scripts/setup.sh | cksum)"; }

# The native ops are made again only when their sources change; without a compiler the function bodies run instead.
native_ops() {
  mkdir -p build/temporary
  TMPDIR=$root/build/temporary sh scripts/native.sh ||
    say 'the native ops could not be built (above); everything runs on the function bodies, slower'
}

if [ -n "$present" ] && [ "$wanted" = "$present" ] && [ "$installed_from" = "$(key "$present")" ]; then
  native_ops
  exit 0
fi

if [ -e "$venv" ] || [ -L "$venv" ]; then
  why=
  if [ -e "$temporary" ]; then
    why='an earlier set-up did not finish'
  elif [ -z "$present" ] || ! has_pip; then
    why='it has no Python 3.11 to 3.13 with pip that runs'
  elif [ "$wanted" != "$present" ]; then
    why="it has Python $present, and PYTHON=$PYTHON is $wanted"
  elif [ -n "$installed_from" ] && [ "$(echo "$installed_from" | head -n 1)" != "$root" ]; then
    why='the checkout was moved'
  fi
  if [ -n "$why" ]; then
    say "making .venv anew: $why"
    rm -rf "$venv"
  fi
fi

if [ ! -e "$venv" ]; then
  python=$(find_python)
  say "making .venv with $python ($(version_of "$python"))"
  mkdir -p "$temporary"
  make_venv "$python"
fi
mkdir -p "$temporary"
rm -f "$venv/.setup-done"

say 'installing the pinned dependencies (minutes the first time, most of it PyTorch)'
pinned() {
  "$venv/bin/python" -m pip install -c requirements.lock "$@" ||
    fail "pip could not install $*. To see all that it says: make setup PIP_QUIET=0"
}
pinned pip hatchling
pinned --no-build-isolation -e '.[dev]'

rm -rf "$temporary"
key "$(version_of "$venv/bin/python")" >"$venv/.setup-done"
native_ops
say 'done: .venv is ready'
