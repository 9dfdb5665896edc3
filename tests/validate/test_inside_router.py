"""The formula of `k25.Router` follows either choice of a tie, and no other."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest

from k25_runtime.host_tensor import HostTensor
from k25_validate.agreement import compare_routing
from k25_validate.bisect import bisect_bundle
from k25_validate.inside_router import router_formula
from k25_validate.plain_taps import PlainTaps
from k25_validate.prompts import Prompt

PROMPTS = (Prompt(name="many tokens", prompt_ids=tuple(range(3, 500, 9)), next_ids=(7, 300)),)


def _module(name: str) -> ModuleType:
    """A module beside this file: modules of tests belong to no package."""
    with mock.patch.object(sys, "path", [str(Path(__file__).parent), *sys.path]):
        return importlib.import_module(name)


edits, runtime = _module("fault_edits"), _module("fault_runtime")


@pytest.fixture(autouse=True)
def _function_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of function bodies show only where no native kernel stands in for them."""
    monkeypatch.setenv("K25_NATIVE", "off")


def _formula(tiny: Any, logits: Any) -> Callable[[Any], Any]:
    """Of logits [T, E], without a bias; `tiny` takes 3 experts."""
    values = np.array(logits, np.float32)
    feeds = {
        "logits": HostTensor(values, "float32"),
        "bias": HostTensor(np.zeros(values.shape[1], np.float32), "float32"),
    }
    formula = router_formula(PlainTaps(tiny.checkpoint, latent_norm_eps=1e-6), feeds)
    return lambda ids: formula({"expert_ids": np.array(ids, np.int32)})


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 0, 1]],  # as it is
        [[3, 0, 2]],  # 1 and 2 tie
        [[2, 3, 0]],  # in another order
    ],
)
def test_any_choice_of_a_tie_is_followed(ids: list[list[int]], tiny: Any) -> None:
    logits = [[1.0, 0.5, 0.5, 2.0, -1.0, 0.0]]
    stages = _formula(tiny, logits)(ids)
    np.testing.assert_array_equal(stages["expert_ids"], ids)
    scores = 1 / (1 + np.exp(-np.array(logits)))
    chosen = scores[0][np.array(ids)]
    np.testing.assert_allclose(stages["chosen"], chosen, rtol=1e-7)
    np.testing.assert_allclose(stages["expert_weights"], 2.827 * chosen / chosen.sum(), rtol=1e-7)


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 0, 5]],  # an expert that is no tie
        [[3, 0, 0]],  # one expert twice
        [[3, 0, -4]],  # no experts
        [[3, 0, 6]],
        [[3, 0]],
    ],
)
def test_no_other_choice_is_followed(ids: list[list[int]], tiny: Any) -> None:
    stages = _formula(tiny, [[1.0, 0.5, 0.5, 2.0, -1.0, 0.0]])(ids)
    assert set(stages["expert_ids"][0].tolist()) in ({3, 0, 1}, {3, 0, 2})


def _with_twins(exported: Any, folder: Path) -> Path:
    """A copy of the checkpoint in which the router tells expert 0 from expert 1 by nothing."""
    copy = folder / "twins"
    shutil.copytree(exported.checkpoint, copy)
    manifest = json.loads((exported.bundle / "manifest.json").read_text())
    for group in manifest["tensors"]:
        if ".mlp.gate." in group["name"]:
            path = copy / manifest["shards"][group["shard"]]["file"]
            data = bytearray(path.read_bytes())
            row, start = group["length"] // group["shape"][0], group["offset"]
            data[start + row : start + 2 * row] = data[start : start + row]
            path.write_bytes(bytes(data))
    return copy


def _prefer_the_last(model: onnx.ModelProto) -> None:
    """Ties go to the expert with the higher number."""
    text = """
    Tilted (untilted) => (biased) {
      none = Constant <value = int64 {0}> ()
      next = Constant <value = int64 {1}> ()
      little = Constant <value = float {1e-6}> ()
      experts = Shape <start = 1> (untilted)
      all = Squeeze (experts)
      numbers = Range (none, all, next)
      wide = Cast <to = 1> (numbers)
      tilt = Mul (wide, little)
      biased = Add (untilted, tilt)
    }"""
    extra = onnx.parser.parse_function(f'<domain: "k25", opset_import: ["" : 21]>{text}').node
    edits.make_otherwise(edits.function(model, "Router").node, "biased", "untilted", *extra)


def _bisected(
    exported: Any,
    folder: Path,
    *inject: Callable[[Any], None],
    kernel: Callable[[onnx.ModelProto], None] = _prefer_the_last,
) -> Any:
    """With a backend that decides the twins' ties otherwise than the body does."""
    checkpoint = _with_twins(exported, folder)
    build = edits.build_from(exported, folder)
    for change in (*inject, runtime.other_kernel(kernel)):
        change(build)
    with build.patched():
        return bisect_bundle(build.bundle, checkpoint=checkpoint, prompts=PROMPTS, samples=(), threads=1)


def test_a_tie_that_the_kernel_decides_otherwise_is_no_finding(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ties: list[int] = []

    def counted(**arguments: Any) -> Any:
        found = compare_routing(**arguments)
        ties.append(int(found.ties.sum()))
        return found

    monkeypatch.setattr("k25_validate.bisect_walk.compare_routing", counted)
    assert _bisected(tiny, tmp_path).passed
    assert sum(ties) > 0


@pytest.mark.parametrize(
    ("name", "kind", "stage"),
    [("lose_the_scaling_factor", "attribute", "expert_weights"), ("weigh_with_the_bias", "graph", "chosen")],
)
def test_beside_ties_the_fault_of_the_body_is_named(
    name: str, kind: str, stage: str, tiny: Any, tmp_path: Path
) -> None:
    found = _bisected(tiny, tmp_path, edits.graph("moe_layer", getattr(edits, name))).divergence
    assert (found.op, found.tap, found.kind) == ("k25.Router", "mlp.gate.weights", kind)
    assert found.stages == (stage,)


def test_beside_ties_the_fault_of_the_kernel_is_named(tiny: Any, tmp_path: Path) -> None:
    def kernel(model: onnx.ModelProto) -> None:
        _prefer_the_last(model)
        edits.weigh_with_the_bias(model)

    found = _bisected(tiny, tmp_path, kernel=kernel).divergence
    assert (found.op, found.tap, found.kind) == ("k25.Router", "mlp.gate.weights", "kernel")
