"""The lines that the documentation gives for Polygraphy, as they stand there, with our plugins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import needs_tensorrt

from k25_engines.engine_header import header_from_bytes
from k25_engines.polygraphy_network import loader_from_environment
from k25_engines.tensorrt_module import installed_tensorrt, parser_environment
from k25_plugins.errors import InputError

pytestmark = needs_tensorrt
ROOT = Path(__file__).resolve().parents[2]


def documented_lines() -> str:
    """The shell block of docs/engines.md that begins with POLYGRAPHY_USE_TENSORRT_RTX."""
    text = (ROOT / "docs" / "engines.md").read_text("utf-8")
    (block,) = re.findall(r"(?m)^    export POLYGRAPHY.*\n(?:    .*\n)+", text)
    return re.sub(r"(?m)^    ", "", block)


def test_the_documented_lines_run(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    links = tmp_path / "links"
    links.mkdir()
    environment = {**os.environ, **parser_environment(installed_tensorrt(), links)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script = "set -e\n" + documented_lines().replace("BUNDLE/", f"{tiny.bundle}/").replace("=BUNDLE", f"={tiny.bundle}")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "expert_words" in done.stdout
    header = header_from_bytes((tmp_path / "moe_layer.engine").read_bytes(), where="polygraphy")
    assert header.targets == ("sm120",)


def test_what_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K25_BUNDLE", raising=False)
    monkeypatch.setenv("K25_COMPONENT", "head")
    with pytest.raises(InputError, match="K25_BUNDLE: not set"):
        loader_from_environment()
    monkeypatch.setenv("K25_BUNDLE", "bundle")
    monkeypatch.setenv("K25_PRECISION", "fp8")
    with pytest.raises(InputError, match="K25_PRECISION: expected"):
        loader_from_environment()
    monkeypatch.setenv("K25_PRECISION", "fp32")
    loader = loader_from_environment()
    assert (loader.component, loader.precision, loader.target, loader.portable) == ("head", "fp32", "sm120", False)
