"""The `small` preset (486 M parameters) as a user builds it: parity against both references, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GIB = 1 << 30


def _k25_export(*arguments: str) -> tuple[str, int]:
    """Standard output and peak resident bytes of a child that must succeed."""
    code = "import sys; from k25_cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    return text, usage.ru_maxrss * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    _k25_export("demo-checkpoint", str(folder), "--preset", "small", "--quiet")
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> tuple[Path, int, dict[str, object]]:
    folder = checkpoint.parent / "bundle"
    text, peak = _k25_export("build", str(checkpoint), "--output", str(folder), "--json", "--quiet")
    return folder, peak, json.loads(text)


def test_build_with_the_plain_reference_passes_within_4_gib(bundle: tuple[Path, int, dict[str, object]]) -> None:
    _, peak, values = bundle
    assert values["passed"] is True
    assert peak < 4 * GIB


def test_transformers_agrees(bundle: tuple[Path, int, dict[str, object]]) -> None:
    folder, _, _ = bundle
    text, _ = _k25_export("validate", str(folder), "--reference", "transformers", "--json", "--quiet")
    values = json.loads(text)
    errors = {
        (check["section"], check["name"], check["metric"]): check["value"]
        for check in values["checks"]
        if check["section"] != "components"
    }
    assert errors["end to end", "all prompts", "relative L2"] <= 2e-5
    assert errors["decode", "all prompts", "relative L2"] <= 2e-5
    assert errors["end to end", "all prompts", "top-1 disagreements"] == 0
