"""The float64 references of the GPU tests and benchmark against the operators' own eager references, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import attention_case, expert_region, experts_case, linear_case

from k25_plugins.gpu_specialisations import ModelDims
from k25_plugins.mla.reference import mla
from k25_plugins.moe_dispatch.reference import moe_dispatch

CPU = torch.device("cpu")
DIMS = ModelDims(
    num_heads=3,
    qk_nope_head_dim=8,
    v_head_dim=12,
    latent_dim=20,
    rope_dim=6,
    block_size=4,
    hidden=96,
    intermediate_size=64,
    experts=5,
    experts_per_token=2,
    activation_dtype="float32",
    cache_dtype="float32",
)


def test_attention() -> None:
    torch.manual_seed(1)
    case = attention_case("", DIMS, CPU, sequences=3, context=11, new=4, check=100)
    values: list[Any] = list(case.attributes.values())
    case.outputs[0].copy_(mla(*case.inputs, *values)[0])
    assert case.error() < 1e-6
    case.outputs[0][-1, 0] += 1
    assert case.error() > 1e-3


def test_experts() -> None:
    torch.manual_seed(2)
    region = expert_region(DIMS, CPU)
    assert (region[2] % 16 == 0).all()
    case = experts_case("", DIMS, CPU, region, tokens=6, check=6)
    case.outputs[0].copy_(moe_dispatch(*case.inputs, *case.attributes.values()))
    assert case.error() < 1e-6
    case.poison()
    assert case.error() == float("inf")


def test_linear() -> None:
    torch.manual_seed(3)
    case = linear_case("", CPU, tokens=3, inputs=40, outputs=7, dtype="float32")
    case.outputs[0].copy_(case.inputs[0] @ case.inputs[1].float().T)
    assert case.error() < 1e-6


@pytest.mark.slow
def test_the_benchmark_without_a_gpu(tmp_path: Path) -> None:
    """Every case is launched, replayed in the interpreter and right; nothing has a time."""
    pytest.importorskip("triton", reason="triton is not installed")
    bench = Path(__file__).parents[2] / "bench" / "gpu.py"
    command = [sys.executable, str(bench), "--dry-run", "--rounds", "1", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert len(cases) == done.stdout.count("\n| ") - 1
    assert all(case["seconds"]["k25"] == 0 for case in cases)
