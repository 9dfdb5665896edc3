#!/bin/sh
# Builds the native operators: plugins/k25_plugins/native/libk25_ops.so. Where that cannot be, it says why in one line and
# succeeds: everything runs on the function bodies too, only slower.
#
#   sh scripts/native.sh             build, unless the library is of these sources already (milliseconds)
#   sh scripts/native.sh --require   fail where it cannot be built
#
# ONNX Runtime's C headers: ONNXRUNTIME_INCLUDE_DIR, those of the system (libonnxruntime-dev), those kept in .cache/ from an
# earlier run, or Debian's package, fetched with the machine's own apt configuration and unpacked in .cache/ (no root).
# CXX, CMAKE, K25_NATIVE_FLAGS (more arguments for cmake) are taken from the environment. K25_NATIVE=off skips the build.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
root=$(pwd -P)
build=build/native
library=plugins/k25_plugins/native/libk25_ops.so
stamp=$build/built-from
cache=.cache/onnxruntime-headers
required=${1:-}

say() { printf 'native: %s\n' "$*"; }
skip() {
  say "not built: $*. The operators run from their function bodies instead, which is slower."
  [ "$required" != --require ] || exit 1
  exit 0
}

[ "${K25_NATIVE:-}" != off ] || skip 'K25_NATIVE=off'

# Of two builds at the same time in one checkout, the second waits (and finds its work done).
mkdir -p "$build" .cache
if command -v flock >/dev/null 2>&1; then
  exec 8<"$build"
  flock 8
fi

venv_program() { [ -x ".venv/bin/$1" ] && echo "$root/.venv/bin/$1"; }
find_program() { command -v "$1" 2>/dev/null || venv_program "$1"; }

find_compiler() {
  for candidate in ${CXX:-c++ g++ clang++}; do
    if command -v "$candidate" >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

sources() {
  find plugins/CMakeLists.txt plugins/core plugins/adapters/onnxruntime.cc plugins/k25_plugins -type f \
    \( -name '*.cc' -o -name '*.h' -o -name '*.inc' -o -name CMakeLists.txt \) 2>/dev/null | LC_ALL=C sort
}

# The kernels.json of -DK25_GPU_KERNELS=DIR among K25_NATIVE_FLAGS (cmake takes a relative DIR from here): a new build of the
# kernels changes it.
kernels_manifest() {
  found=
  for flag in ${K25_NATIVE_FLAGS:-}; do
    case $flag in
      -DK25_GPU_KERNELS=* | -DK25_GPU_KERNELS:*=*) found=${flag#*=}/kernels.json ;;
    esac
  done
  printf '%s\n' "$found"
}

compiler=$(find_compiler) || skip 'no C++ compiler found (Debian, Ubuntu: sudo apt-get install g++)'
key=$(
  {
    printf '%s\n' "$root" "$compiler" "${K25_NATIVE_FLAGS:-}" "${ONNXRUNTIME_INCLUDE_DIR:-}"
    "$compiler" --version 2>/dev/null | head -n 1
    cat plugins/k25_plugins/version.py
    kernels=$(kernels_manifest)
    [ ! -f "$kernels" ] || cksum <"$kernels"
    sources | while read -r file; do
      printf '%s ' "$file"
      cksum <"$file"
    done
  } | cksum
)
if [ -f "$library" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
  exit 0
fi

cmake=${CMAKE:-$(find_program cmake)} || skip 'no cmake found (Debian, Ubuntu: sudo apt-get install cmake; or pip install cmake)'
generator='Unix Makefiles'
make=$(find_program make) || make=
if [ -z "$make" ]; then
  make=$(find_program ninja) || skip 'neither make nor ninja found'
  generator=Ninja
fi

has_headers() { [ -f "$1/onnxruntime_c_api.h" ]; }

# The folder with onnxruntime_c_api.h under $1.
headers_under() {
  found=$(find -L "$1" -name onnxruntime_c_api.h 2>/dev/null | LC_ALL=C sort | head -n 1)
  [ -n "$found" ] && dirname "$found"
}

# Lines "deb [options] URI" of the main archive that apt uses here, without suite: from its own list of index files.
apt_archives() {
  apt-get indextargets --format '$(CREATED_BY) $(SITE) $(SIGNED_BY)' 2>/dev/null |
    awk '$1 == "Packages" && $2 ~ /\/debian\/?$/ && !seen[$2]++ { print $2 }'
}

apt_keyring() {
  for keyring in /usr/share/keyrings/debian-archive-keyring.gpg /usr/share/keyrings/debian-archive-keyring.pgp; do
    if [ -f "$keyring" ]; then
      echo "$keyring"
      return
    fi
  done
  return 1
}

# Debian's libonnxruntime-dev out of the first release that has it, unpacked in the cache. Nothing is installed.
fetch_headers() (
  command -v apt-get >/dev/null 2>&1 && command -v dpkg-deb >/dev/null 2>&1 || return 1
  work=$root/$cache.part
  rm -rf "$work"
  mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/x"
  cd "$work"
  unpack() {
    set -- libonnxruntime-dev_*.deb
    [ -f "$1" ] && dpkg-deb -x "$1" x && headers_under x >/dev/null
  }
  if apt-get download libonnxruntime-dev >/dev/null 2>&1 && unpack; then exit 0; fi
  keyring=$(apt_keyring) || exit 1
  for archive in $(apt_archives); do
    for suite in trixie stable; do
      echo "deb [signed-by=$keyring] $archive $suite main" >sources.list
      set -- -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work" -o Acquire::Languages=none -o Acquire::Retries=1 \
        -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o APT::Sandbox::User=root
      if apt-get "$@" update >log 2>&1 && apt-get "$@" download libonnxruntime-dev >>log 2>&1 && unpack; then exit 0; fi
    done
  done
  exit 1
)

find_headers() {
  if [ -n "${ONNXRUNTIME_INCLUDE_DIR:-}" ]; then
    has_headers "$ONNXRUNTIME_INCLUDE_DIR" || return 1
    echo "$ONNXRUNTIME_INCLUDE_DIR"
    return
  fi
  for folder in /usr/include/onnxruntime /usr/local/include/onnxruntime /usr/include /usr/local/include; do
    if found=$(headers_under "$folder"); then
      echo "$found"
      return
    fi
  done
  if ! headers_under "$cache" >/dev/null; then
    fetch_headers || {
      rm -rf "$cache.part"
      return 1
    }
    mv "$cache.part/x" "$cache.part/headers"
    rm -rf "$cache"
    mv "$cache.part/headers" "$cache"
    rm -rf "$cache.part"
  fi
  headers_under "$root/$cache"
}

headers=$(find_headers) || {
  if [ -n "${ONNXRUNTIME_INCLUDE_DIR:-}" ]; then
    skip "ONNXRUNTIME_INCLUDE_DIR=$ONNXRUNTIME_INCLUDE_DIR has no onnxruntime_c_api.h"
  fi
  skip 'no C headers of ONNX Runtime (Debian package libonnxruntime-dev; or set ONNXRUNTIME_INCLUDE_DIR)'
}

say 'building the native operators (a minute)'
rm -f "$stamp"
log=$build/build.log
# A build folder of another generator or compiler is no use.
configure() {
  # shellcheck disable=SC2086 # several arguments
  "$cmake" -S plugins -B "$build/cmake" -G "$generator" -DCMAKE_MAKE_PROGRAM="$make" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_COMPILER="$compiler" -DONNXRUNTIME_INCLUDE_DIR="$headers" ${K25_NATIVE_FLAGS:-} >"$log" 2>&1
}
configure || {
  rm -rf "$build/cmake"
  configure || skip "cmake failed, see $log"
}
"$cmake" --build "$build/cmake" --parallel 2 >>"$log" 2>&1 || skip "the compiler failed, see $log"
"$cmake" --install "$build/cmake" >>"$log" 2>&1 || skip "the library could not be installed, see $log"
printf '%s\n' "$key" >"$stamp"
say "done: $library"
