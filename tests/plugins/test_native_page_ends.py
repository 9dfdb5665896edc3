"""Weights may end where a mapped file does: kernels read nothing behind them, not even of the same cache line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k25_plugins.native_library import native_library


def test_nothing_behind_the_last_weight_is_read() -> None:
    if native_library() is None:
        pytest.skip("the native library is not built: sh scripts/native.sh")
    script = Path(__file__).with_name("page_end_calls.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, (run.returncode, run.stderr)
    assert run.stdout == "read nothing behind\n"
