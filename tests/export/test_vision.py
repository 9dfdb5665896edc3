"""The `vision` graph: what `docs/bundle-format.md` says of it, read from the file, and what it computes.

The oracle is numpy in float64 over the bytes of the shards. The graph gets positions, angles and merge indices that no
grid would have: it must not know of grids.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.component_specs import component_specs
from k25_export.manifest import read_manifest

Array = npt.NDArray[Any]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TABLE = "vision_tower.patch_embed.pos_emb.weight"
PATCHES, FRAMES, TOKENS = 37, 3, 5

each_precision = pytest.mark.parametrize("precision", list(DTYPES))


@pytest.fixture(scope="module")
def vision(tiny: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((tiny.checkpoint / "config.json").read_text("utf-8"))["vision_config"]
    return values


@pytest.fixture(scope="module")
def weights(tiny: Any) -> dict[str, tuple[Array, Array]]:
    """Name → (bits as stored, float64) of every tensor of the tower and the projector."""
    found = {}
    for path in tiny.checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if name.startswith(("vision_tower.", "mm_projector.")):
                    tensor = shard.get_tensor(name)
                    found[name] = (tensor.view(torch.uint16).numpy(), tensor.double().numpy())
    return found


def model_of(files: Any, precision: str) -> onnx.ModelProto:
    return onnx.load(files.bundle / "components" / f"vision.{precision}.onnx")


@each_precision
def test_ports_are_those_of_the_format(tiny: Any, vision: Mapping[str, Any], precision: str) -> None:
    width, size, activation = vision["vt_hidden_size"], vision["patch_size"], DTYPES[precision]
    angles = ["patches", width // vision["vt_num_attention_heads"] // 2]
    file = read_manifest(tiny.bundle).component("vision").file(precision)
    assert [(port.name, port.dtype, list(port.shape)) for port in file.inputs[:5]] == [
        ("pixel_values", activation, ["patches", 3, size, size]),
        ("position_embedding", activation, ["patches", width]),
        ("rope_cos", "float32", angles),
        ("rope_sin", "float32", angles),
        ("merge_index", "int32", ["media_tokens", "frames", math.prod(vision["merge_kernel_size"])]),
    ]
    outputs = [(port.name, port.dtype, list(port.shape)) for port in file.outputs]
    assert outputs == [("media_embeddings", activation, ["media_tokens", vision["text_hidden_size"]])]


@each_precision
def test_every_tensor_but_the_table_is_an_input_under_its_own_name(
    tiny: Any, weights: Mapping[str, Any], precision: str
) -> None:
    entry = read_manifest(tiny.bundle).component("vision")
    assert entry.layers is None
    file = entry.file(precision)
    assert {port.name: list(port.shape) for port in file.inputs[5:]} == {
        name: list(bits.shape) for name, (bits, _) in weights.items() if name != TABLE
    }
    assert {port.dtype for port in file.inputs[5:]} == {"bfloat16"}
    assert {name: binding.tensor for name, binding in entry.bindings.items()} == {
        port.name: port.name for port in file.inputs[5:]
    }
    read = {name for node in model_of(tiny, precision).graph.node for name in node.input}
    assert {port.name for port in file.inputs} <= read


@each_precision
def test_nodes_of_our_domain_are_counted_and_need_no_plugin(
    tiny: Any, vision: Mapping[str, Any], precision: str
) -> None:
    model = model_of(tiny, precision)
    onnx.checker.check_model(model, full_check=True)
    ours = [node for node in model.graph.node if node.domain]
    blocks = vision["vt_num_hidden_layers"]
    assert Counter(node.op_type for node in ours) == {"Linear": 4 * blocks + 3, "VisionAttention": blocks}
    assert {function.name for function in model.functions} == {"Linear", "VisionAttention"}
    for node in ours:
        found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "VisionAttention":
            head_dim = vision["vt_hidden_size"] // vision["vt_num_attention_heads"]
            scale = np.float32(head_dim**-0.5)
            assert found == {"num_heads": vision["vt_num_attention_heads"], "softmax_scale": scale}
        else:
            assert found == {}


@each_precision
def test_no_weight_and_nothing_of_the_machine_is_in_the_file(tiny: Any, precision: str) -> None:
    path = tiny.bundle / "components" / f"vision.{precision}.onnx"
    content = path.read_bytes()
    for tensor in onnx.load_from_string(content).graph.initializer:
        assert math.prod(tensor.dims) <= 4, tensor.name
    for text in (str(tiny.checkpoint), str(Path.cwd()), "/tmp", "site-packages", ".py", "torch.", "k25_export"):
        assert text.encode() not in content, text


@each_precision
def test_norms_and_gelus_have_their_own_settings(tiny: Any, vision: Mapping[str, Any], precision: str) -> None:
    nodes = model_of(tiny, precision).graph.node
    attributes = [
        (node.op_type, {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}) for node in nodes
    ]
    norms = [found for kind, found in attributes if kind == "LayerNormalization"]
    assert [found["epsilon"] for found in norms] == [np.float32(1e-5)] * (2 * vision["vt_num_hidden_layers"] + 2)
    gelus = [found.get("approximate", b"none") for kind, found in attributes if kind == "Gelu"]
    assert gelus == [b"tanh"] * vision["vt_num_hidden_layers"] + [b"none"]


def test_a_model_without_vision_has_the_other_components_as_they_are(tiny: Any) -> None:
    config = checkpoint_from_folder(tiny.checkpoint).config
    names = [spec.name for spec in component_specs(config)]
    assert names[-1] == "vision"
    assert [spec.name for spec in component_specs(replace(config, vision=None))] == names[:-1]


def test_a_text_only_checkpoint_exports_without_vision(tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    text = {name: shard for name, shard in index["weight_map"].items() if name.startswith("language_model.")}
    for shard in set(index["weight_map"].values()) - set(text.values()):
        (folder / shard).unlink()
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": None}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": text}))
    manifest, _ = bundle_from_checkpoint(checkpoint_from_folder(folder), tmp_path / "bundle", precisions=("fp32",))
    full = {entry.name: entry.file("fp32").sha256 for entry in read_manifest(tiny.bundle).components}
    del full["vision"]
    assert {entry.name: entry.file("fp32").sha256 for entry in manifest.components} == full


def activations(vision: Mapping[str, Any]) -> dict[str, Array]:
    random = np.random.default_rng(5)
    width, size = vision["vt_hidden_size"], vision["patch_size"]
    angles = random.uniform(0, 7, (PATCHES, width // vision["vt_num_attention_heads"] // 2))
    kernel = math.prod(vision["merge_kernel_size"])
    return {
        "pixel_values": random.uniform(-1, 1, (PATCHES, 3, size, size)).astype(np.float32),
        "position_embedding": random.normal(size=(PATCHES, width)).astype(np.float32),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "merge_index": random.integers(0, PATCHES, (TOKENS, FRAMES, kernel)).astype(np.int32),
    }


def computed(vision: Mapping[str, Any], weights: Mapping[str, tuple[Array, Array]], inputs: dict[str, Array]) -> Array:
    """The formulas, in float64: MoonViT's blocks, then the projector."""
    given = {name: values.astype(np.float64) for name, values in inputs.items() if name != "merge_index"}
    heads = vision["vt_num_attention_heads"]

    def linear(x: Array, name: str) -> Array:
        weight = weights[f"{name}.weight"][1]
        return np.asarray(x @ weight.reshape(len(weight), -1).T + weights[f"{name}.bias"][1])

    def norm(x: Array, name: str) -> Array:
        normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return np.asarray(normed * weights[f"{name}.weight"][1] + weights[f"{name}.bias"][1])

    def turned(x: Array) -> Array:  # [patches, heads, head_dim], pairs as complex numbers
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * (given["rope_cos"] + 1j * given["rope_sin"])[:, None]
        return np.concatenate([pairs.real, pairs.imag], -1)  # any order of channels, the same for q and k

    x = linear(given["pixel_values"].reshape(PATCHES, -1), "vision_tower.patch_embed.proj")
    x = x + given["position_embedding"]
    for block in range(vision["vt_num_hidden_layers"]):
        prefix = f"vision_tower.encoder.blocks.{block}."
        qkv = linear(norm(x, f"{prefix}norm0"), f"{prefix}wqkv").reshape(PATCHES, 3, heads, -1)
        q, k, v = turned(qkv[:, 0]), turned(qkv[:, 1]), qkv[:, 2]
        scores = np.einsum("qnd,knd->nqk", q, k) / math.sqrt(v.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + linear(np.einsum("nqk,knd->qnd", shares, v).reshape(PATCHES, -1), f"{prefix}wo")
        inner = linear(norm(x, f"{prefix}norm1"), f"{prefix}mlp.fc0")
        gelu = inner * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(gelu, f"{prefix}mlp.fc1")
    x = norm(x, "vision_tower.encoder.final_layernorm")
    pooled = norm(x[inputs["merge_index"]].mean(axis=1), "mm_projector.pre_norm").reshape(TOKENS, -1)
    inner = linear(pooled, "mm_projector.proj.0")
    erf = np.vectorize(math.erf)
    return linear(inner * 0.5 * (1 + erf(inner / math.sqrt(2))), "mm_projector.proj.2")


def test_the_graph_computes_the_formulas(
    tiny: Any, vision: Mapping[str, Any], weights: Mapping[str, tuple[Array, Array]]
) -> None:
    path = tiny.bundle / "components" / "vision.fp32.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = activations(vision)
    feeds = {name: ort.OrtValue.ortvalue_from_numpy(values) for name, values in inputs.items()}
    for name, (bits, _) in weights.items():
        if name != TABLE:
            feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    found = session.run_with_ort_values(["media_embeddings"], feeds)[0].numpy()
    expected = computed(vision, weights, inputs)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-6
