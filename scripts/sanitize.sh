#!/bin/sh
# Builds the native operators with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests over them: every code
# path, odd sizes, bad shapes and indices. Several minutes.
#
#   sh scripts/sanitize.sh [pytest arguments]
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
build=build/sanitize
compiler=${CXX:-c++}
log=$build/build.log
mkdir -p "$build"
fail() {
  printf 'sanitize: %s\n' "$*" >&2
  exit 1
}
command -v "$compiler" >/dev/null 2>&1 || fail "no C++ compiler $compiler"
cmake=$(command -v cmake || echo .venv/bin/cmake)
# Without the ONNX Runtime adapter: the tests call the C interface.
"$cmake" -S plugins -B "$build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER="$compiler" -DK25_SANITIZE=ON \
  >"$log" 2>&1 || fail "cmake failed, see $log"
"$cmake" --build "$build" --parallel 2 >>"$log" 2>&1 || fail "the compiler failed, see $log"
asan=$("$compiler" -print-file-name=libasan.so)
ubsan=$("$compiler" -print-file-name=libubsan.so)
stdcpp=$("$compiler" -print-file-name=libstdc++.so.6)
[ -f "$asan" ] || fail "$compiler has no libasan.so"
[ $# -gt 0 ] || set -- tests/plugins/test_native_linear.py tests/plugins/test_native_moe_dispatch.py \
  tests/plugins/test_native_mla.py tests/plugins/test_native_vision_attention.py tests/plugins/test_native_rms_norm.py \
  tests/plugins/test_native_router.py
# Python itself leaks by design and is not built for this.
LD_PRELOAD="$asan $ubsan $stdcpp" ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 K25_NATIVE="$PWD/$build/libk25_ops.so" OMP_NUM_THREADS=1 \
  .venv/bin/python -m pytest -p no:cacheprovider -x "$@"
