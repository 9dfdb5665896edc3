"""The kernels' tests once more, over a library that is built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sanitizers_find_nothing() -> None:
    if shutil.which("c++") is None or (shutil.which("cmake") is None and not (ROOT / ".venv/bin/cmake").exists()):
        pytest.skip("no C++ compiler or no cmake here")
    done = subprocess.run(["sh", "scripts/sanitize.sh"], cwd=ROOT, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-5000:]
    assert "Sanitizer" not in text
    assert " passed" in text
    assert "skipped" not in text.splitlines()[-1], "the sanitized library was not found"
