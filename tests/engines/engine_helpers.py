"""What several test files of this stage need: TensorRT, copies of bundles, jobs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from k25_engines.build_job import BuildJob, GraphFile
from k25_export.manifest import Port

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)


def copy_of(exported: Any, folder: Path) -> Path:
    """A copy of a bundle that a test may change."""
    return Path(shutil.copytree(exported.bundle, folder / "bundle", ignore=shutil.ignore_patterns("engines")))


def some_job(output: Path, **changes: Any) -> BuildJob:
    """A job that no test builds: for children that do something else."""
    output.mkdir()
    values: dict[str, Any] = {
        "component": "moe_layer",
        "graphs": (GraphFile(component="moe_layer", path="nowhere", sha256="0" * 64),),
        "targets": ("sm80", "sm120"),
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "portable": False,
        "inputs": (Port(name="hidden", dtype="bfloat16", shape=("tokens", 64)),),
        "outputs": (),
        "aliases": {},
        "weights": {},
        "profiles": (),
        "output": str(output),
    }
    return BuildJob(**(values | changes))
