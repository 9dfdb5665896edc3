"""Checkpoints and bundles that many tests read: made once, never changed. Copy before you change one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# Tensors are tiny here: threads that wait for each other cost more than they bring, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, so that a change is judged by what it changed; K25_FUZZ=1 looks for new ones.
hypothesis.settings.register_profile("same", derandomize=not os.environ.get("K25_FUZZ"))
hypothesis.settings.load_profile("same")

#: Sizes that have nothing in common with a preset: no powers of two, no multiples of 8, different head widths.
ODD_SIZES = {
    "num_hidden_layers": 5,
    "first_k_dense_replace": 2,
    "hidden_size": 96,
    "intermediate_size": 104,
    "moe_intermediate_size": 64,
    "n_routed_experts": 10,
    "num_experts_per_tok": 3,
    "num_attention_heads": 5,
    "q_lora_rank": 36,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 28,
}


@dataclass(frozen=True)
class Exported:
    """A demo checkpoint and the bundle exported from it."""

    checkpoint: Path
    bundle: Path


def _exported(folder: Path, overrides: dict[str, int]) -> Exported:
    from k25_export.bundle import bundle_from_checkpoint
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.demo.checkpoint import write_demo_checkpoint

    checkpoint = write_demo_checkpoint(folder / "checkpoint", preset="tiny", seed=1, overrides=overrides)
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), folder / "bundle")
    return Exported(checkpoint=checkpoint, bundle=folder / "bundle")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The `tiny` preset, exported."""
    return _exported(tmp_path_factory.mktemp("tiny"), {})


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Odd sizes, exported."""
    return _exported(tmp_path_factory.mktemp("odd"), ODD_SIZES)


@pytest.fixture(scope="session", params=["tiny", "odd"])
def exported(request: pytest.FixtureRequest) -> Exported:
    """Both, one after the other."""
    value: Exported = request.getfixturevalue(request.param)
    return value
