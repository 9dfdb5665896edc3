"""Builds that are wrong in ways that really happen: `validate` must fail each, at the right component."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.config import TextConfig
from k25_export.rope import yarn_inverse_frequencies
from k25_validate.parity_report import ParityReport
from k25_validate.validation import parity_report_from_bundle

Manifest = dict[str, Any]


def _copied(exported: Any, folder: Path) -> Path:
    shutil.copytree(exported.bundle, folder / "bundle")
    return folder / "bundle"


def _edit_manifest(bundle: Path, edit: Callable[[Manifest], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def _component(manifest: Manifest, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in manifest["components"] if entry["name"] == name)
    return found


def _edit_graph(bundle: Path, name: str, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Change a component's fp32 graph, and its hash in the manifest, as a wrong exporter would."""
    path = bundle / "components" / f"{name}.fp32.onnx"
    model = onnx.load(path)
    before = model.SerializeToString()
    edit(model)
    data = model.SerializeToString()
    assert data != before
    path.write_bytes(data)

    def rehash(manifest: Manifest) -> None:
        file = next(file for file in _component(manifest, name)["files"] if file["precision"] == "fp32")
        file["sha256"] = hashlib.sha256(data).hexdigest()

    _edit_manifest(bundle, rehash)


def _node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    return next(function for function in model.functions if function.name == name)


def _constant(function: onnx.FunctionProto, name: str) -> onnx.TensorProto:
    node = next(node for node in function.node if node.output[0] == name)
    return node.attribute[0].t


def _set(tensor: onnx.TensorProto, values: Any) -> None:
    old = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values, old.dtype).reshape(old.shape), tensor.name))


def _config(bundle: Path) -> TextConfig:
    return checkpoint_from_folder(json.loads((bundle / "checkpoint.json").read_text())["path"]).config.text


def _failed_components(report: ParityReport) -> set[str]:
    return {check.name.rpartition(" ")[0] or check.name for check in report.failures if check.section == "components"}


def _moe(edit: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    return lambda bundle: _edit_graph(bundle, "moe_layer", edit)


def _swap_gate_and_up(bundle: Path) -> None:
    def edit(manifest: Manifest) -> None:
        names = _component(manifest, "moe_layer")["bindings"]["expert_table"]["tensors"]
        names[0:4] = names[2:4] + names[0:2]

    _edit_manifest(bundle, edit)


def _bind_another_layer(bundle: Path) -> None:
    def edit(manifest: Manifest) -> None:
        component = _component(manifest, "moe_layer")
        binding = component["bindings"]["self_attn.o_proj.weight"]
        binding["tensor"] = binding["tensor"].replace("{layer}", str(component["layers"][0]))

    _edit_manifest(bundle, edit)


def _swap_two_experts(bundle: Path) -> None:
    def edit(manifest: Manifest) -> None:
        for group in manifest["tensors"]:
            if group["name"].endswith("down_proj.weight_packed"):
                group["offsets"][0], group["offsets"][1] = group["offsets"][1], group["offsets"][0]

    _edit_manifest(bundle, edit)


def _reverse_nibbles(model: onnx.ModelProto) -> None:
    powers = _constant(_function(model, "DequantizeInt4"), "powers")
    _set(powers, onnx.numpy_helper.to_array(powers)[::-1])


def _lose_the_offset(model: onnx.ModelProto) -> None:
    _set(_constant(_function(model, "DequantizeInt4"), "eight"), 7.0)


def _lose_mscale(model: onnx.ModelProto) -> None:
    attribute = _attribute(_node(model, "MLA"), "softmax_scale")
    attribute.f /= 2.0047397


def _ignore_the_bias(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if "mlp.gate.e_score_correction_bias" in node.input:
            node.input[1] = node.input[0]  # sigmoid + sigmoid: the order of the scores without the bias


def _lose_the_scaling_factor(model: onnx.ModelProto) -> None:
    weights = next(node for node in model.graph.node if "expert_weights" in node.output)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    factor = next(constants[name] for name in weights.input if name in constants)
    _set(factor, 1.0)


def _drop_the_shared_expert(model: onnx.ModelProto) -> None:
    down = next(node for node in model.graph.node if "mlp.shared_experts.down_proj.weight" in node.input)
    add = next(node for node in model.graph.node if node.op_type == "Add" and "moe_dispatch" in node.input[0])
    add.input[1] = add.input[0]
    assert down.op_type == "Linear"


def _see_one_position_too_many(model: onnx.ModelProto) -> None:
    """Causal off by one: hide what is greater or equal instead of greater."""
    loop = next(node for node in _function(model, "MLA").node if node.op_type == "Loop")
    next(node for node in loop.attribute[0].g.node if node.op_type == "Greater").op_type = "GreaterOrEqual"


def _eps_of_the_latent_norms(model: onnx.ModelProto) -> None:
    wrong = [tensor for tensor in model.graph.initializer if 5e-7 < _scalar(tensor) < 2e-6]
    assert wrong
    for tensor in wrong:
        _set(tensor, 1e-5)


def _scalar(tensor: onnx.TensorProto) -> float:
    values = onnx.numpy_helper.to_array(tensor)
    return float(values.reshape(-1)[0]) if values.size == 1 else 0.0


def _wrong_beta_fast(bundle: Path) -> None:
    config = _config(bundle)
    wrong = yarn_inverse_frequencies(replace(config, rope_scaling=replace(config.rope_scaling, beta_fast=1.0)))
    assert wrong != yarn_inverse_frequencies(config)

    def edit(model: onnx.ModelProto) -> None:
        _attribute(_node(model, "MLA"), "inv_freq").floats[:] = wrong

    _edit_graph(bundle, "dense_layer", edit)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "gate and up exchanged": (_swap_gate_and_up, "moe_layer"),
    "another layer's weights": (_bind_another_layer, "moe_layer"),
    "two experts swapped": (_swap_two_experts, "moe_layer"),
    "nibble order": (_moe(_reverse_nibbles), "moe_layer"),
    "offset of the nibbles": (_moe(_lose_the_offset), "moe_layer"),
    "mscale missing": (_moe(_lose_mscale), "moe_layer"),
    "router bias ignored": (_moe(_ignore_the_bias), "moe_layer"),
    "scaling factor lost": (_moe(_lose_the_scaling_factor), "moe_layer"),
    "shared expert dropped": (_moe(_drop_the_shared_expert), "moe_layer"),
    "causal off by one": (_moe(_see_one_position_too_many), "moe_layer"),
    "eps of the latent norms": (_moe(_eps_of_the_latent_norms), "moe_layer"),
    "beta_fast of K2": (_wrong_beta_fast, "dense_layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_at_its_component(fault: str, tiny: Any, tmp_path: Path) -> None:
    bundle = _copied(tiny, tmp_path)
    inject, component = FAULTS[fault]
    inject(bundle)
    report = parity_report_from_bundle(bundle)
    assert not report.passed
    assert _failed_components(report) == {component}


def _damaged_checkpoint(exported: Any, folder: Path, damage: Callable[[bytes], bytes]) -> tuple[Path, str]:
    """A copy of the checkpoint with one expert's scales changed; sizes and headers stay. Returns it and the layer."""
    shutil.copytree(exported.checkpoint, folder / "checkpoint")
    manifest = json.loads((exported.bundle / "manifest.json").read_text())
    group = next(group for group in manifest["tensors"] if group["name"].endswith("down_proj.weight_scale"))
    path = folder / "checkpoint" / manifest["shards"][group["shard"]]["file"]
    data = bytearray(path.read_bytes())
    for offset in group["offsets"]:
        span = slice(offset, offset + group["length"])
        data[span] = damage(bytes(data[span]))
    path.write_bytes(bytes(data))
    return folder / "checkpoint", group["name"].split(".")[3]


def test_one_bad_scale_in_the_mapped_shard_is_found_in_its_layer(odd: Any, tmp_path: Path) -> None:
    """The runtime sees the damaged shard, the reference the good one."""
    damaged, layer = _damaged_checkpoint(odd, tmp_path, lambda data: data[:1] + bytes([data[1] ^ 0x01]) + data[2:])
    report = parity_report_from_bundle(odd.bundle, checkpoint=damaged, reference_checkpoint=odd.checkpoint)
    assert not report.passed
    failed = {check.name for check in report.failures if check.section == "components"}
    assert failed == {f"moe_layer {layer}"}


def test_nan_in_a_scale_fails_even_where_both_sides_have_it(odd: Any, tmp_path: Path) -> None:
    damaged, layer = _damaged_checkpoint(odd, tmp_path, lambda data: b"\xc0\x7f" + data[2:])
    report = parity_report_from_bundle(odd.bundle, checkpoint=damaged)
    assert not report.passed
    assert f"moe_layer {layer}" in {check.name for check in report.failures}


@pytest.mark.parametrize("seed", [3, 17])
def test_an_unchanged_build_passes_whatever_the_seed(seed: int, odd: Any, tmp_path: Path) -> None:
    from k25_export.demo.checkpoint import write_demo_checkpoint

    overrides = json.loads((odd.checkpoint / "demo.json").read_text())["overrides"]
    other = write_demo_checkpoint(tmp_path / "checkpoint", preset="tiny", seed=seed, overrides=overrides)
    report = parity_report_from_bundle(odd.bundle, checkpoint=other)
    assert report.passed, report.summary()
