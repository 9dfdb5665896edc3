"""The exported graphs: what `docs/bundle-format.md` says of them, read from the files, and what they compute.

Ports and numbers are derived from the checkpoint's own `config.json` and shards. The oracle is numpy in float64, from
the formulas of DeepSeek-V2 and V3 (attention in the expanded form).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from google.protobuf.message import Message
from onnx import inliner, numpy_helper

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.component_specs import component_specs

Array = npt.NDArray[Any]
Ports = list[tuple[str, str, list[int | str]]]
TYPES = {"float32": 1, "int32": 6, "int64": 7, "bfloat16": 16}
STORED_TYPES = {"BF16": 16, "F32": 1, "I32": 6}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
COMPONENTS = ["embed", "dense_layer", "moe_layer", "head"]
EXPERT_COLUMNS = [(projection, part) for projection in ("gate", "up", "down") for part in ("packed", "scale")]
LAYER = {"dense_layer": 0, "moe_layer": 3}  # an instance of each kind, in both checkpoints

each_precision = pytest.mark.parametrize("precision", list(PRECISIONS))
each_component = pytest.mark.parametrize("component", COMPONENTS)


class ExportedFiles(Protocol):
    """The shared fixture: a checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path


def text_config(files: ExportedFiles) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((files.checkpoint / "config.json").read_text("utf-8"))["text_config"]
    return values


def path_of(files: ExportedFiles, component: str, precision: str) -> Path:
    return files.bundle / "components" / f"{component}.{precision}.onnx"


def model_of(files: ExportedFiles, component: str, precision: str) -> onnx.ModelProto:
    return onnx.load(path_of(files, component, precision))


def stored_tensors(checkpoint: Path) -> dict[str, tuple[Path, str, list[int], int, int]]:
    """Name -> (shard, dtype, shape, first and last byte in the file), from the shards themselves."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, item in header.items():
            start, stop = (8 + length + offset for offset in item["data_offsets"])
            found[name] = (path, item["dtype"], item["shape"], start, stop)
    return found


def prefix_of(component: str) -> str:
    if component in LAYER:
        return f"language_model.model.layers.{LAYER[component]}."
    return "language_model."


def activations(text: Mapping[str, Any], component: str, precision: str) -> tuple[Ports, Ports]:
    """Inputs that are no weights, and outputs, as section 5 of the format lists them."""
    activation = PRECISIONS[precision]
    hidden: list[int | str] = ["tokens", text["hidden_size"]]
    cache: list[int | str] = ["blocks", "block_size", text["kv_lora_rank"] + text["qk_rope_head_dim"]]
    if component == "embed":
        return [("token_ids", "int32", ["tokens"])], [("hidden", activation, hidden)]
    if component == "head":
        inputs: Ports = [("hidden", activation, hidden), ("rows", "int32", ["rows"])]
        return inputs, [("logits", "float32", ["rows", text["vocab_size"]])]
    inputs = [
        ("hidden", activation, hidden),
        ("cache", activation, cache),
        ("positions", "int32", ["tokens"]),
        ("query_start", "int32", ["sequences + 1"]),
        ("block_table", "int32", ["sequences", "blocks_per_sequence"]),
    ]
    outputs: Ports = [("hidden_out", activation, hidden), ("cache_out", activation, cache)]
    if component == "moe_layer":
        inputs += [
            ("expert_words", "int32", ["expert_rows", 2]),
            ("expert_scales", "bfloat16", ["expert_rows", 4]),
            ("expert_table", "int64", [text["n_routed_experts"], 6]),
            ("residual_share", "float32", [1]),
        ]
        chosen: list[int | str] = ["tokens", text["num_experts_per_tok"]]
        outputs += [("expert_ids", "int32", chosen), ("expert_weights", "float32", chosen)]
    return inputs, outputs


def ports_of(values: Sequence[onnx.ValueInfoProto]) -> list[tuple[str, int, list[int | str]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


@each_component
@each_precision
def test_ports_are_those_of_the_format(exported: ExportedFiles, component: str, precision: str) -> None:
    graph = model_of(exported, component, precision).graph
    inputs, outputs = activations(text_config(exported), component, precision)
    assert ports_of(graph.output) == [(name, TYPES[dtype], axes) for name, dtype, axes in outputs]
    assert ports_of(graph.input)[: len(inputs)] == [(name, TYPES[dtype], axes) for name, dtype, axes in inputs]


@each_component
@each_precision
def test_weights_are_inputs_named_and_typed_as_stored(exported: ExportedFiles, component: str, precision: str) -> None:
    graph = model_of(exported, component, precision).graph
    inputs, _ = activations(text_config(exported), component, precision)
    prefix = prefix_of(component)
    expected = {
        name.removeprefix(prefix): (STORED_TYPES[dtype], shape)
        for name, (_, dtype, shape, _, _) in stored_tensors(exported.checkpoint).items()
        if name.startswith(prefix)
        and ".experts." not in name
        and (component in LAYER or (".layers." not in name and ("embed_tokens" in name) == (component == "embed")))
    }
    found = {name: (elem_type, axes) for name, elem_type, axes in ports_of(graph.input)[len(inputs) :]}
    assert found == expected
    read = {name for node in graph.node for name in node.input}
    assert {value.name for value in graph.input} <= read


@each_component
@each_precision
def test_no_weight_is_baked_in(exported: ExportedFiles, component: str, precision: str) -> None:
    path = path_of(exported, component, precision)
    assert path.stat().st_size < 40_000
    model = onnx.load(path)
    assert {tensor.name for tensor in model.graph.initializer} & {value.name for value in model.graph.input} == set()
    for tensor in model.graph.initializer:
        assert math.prod(tensor.dims) <= 4, tensor.name
        assert tensor.data_location == onnx.TensorProto.DEFAULT
    assert list(model.graph.sparse_initializer) == []
    for node in model.graph.node:
        for attribute in node.attribute:
            assert attribute.type not in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.TENSORS), node.name


@each_component
@each_precision
def test_nodes_of_our_domain_are_counted_and_marked(exported: ExportedFiles, component: str, precision: str) -> None:
    model = model_of(exported, component, precision)
    ours = [node for node in model.graph.node if node.domain]
    assert {node.domain for node in ours} <= {"k25"}
    # Linear: q_a, q_b, kv_a, o, three of the (shared) MLP and the router's; kv_b is MLA's own.
    # RMSNorm: before attention and MLP, and those of the latents of q and kv.
    expected = {
        "embed": {},
        "dense_layer": {"MLA": 1, "Linear": 7, "RMSNorm": 4},
        "moe_layer": {"MLA": 1, "MoEDispatch": 1, "Linear": 8, "RMSNorm": 4, "Router": 1},
        "head": {"Linear": 1, "RMSNorm": 1},
    }[component]
    assert Counter(node.op_type for node in ours) == expected
    for node in ours:
        marks = [attribute.s for attribute in node.attribute if attribute.name == "plugin_namespace"]
        assert marks == ([b"k25"] if node.op_type in ("MLA", "MoEDispatch") else []), node.name


@each_component
@each_precision
def test_function_bodies_are_in_the_file(exported: ExportedFiles, component: str, precision: str) -> None:
    model = model_of(exported, component, precision)
    used = {node.op_type for node in model.graph.node if node.domain == "k25"}
    called = {"DequantizeInt4"} if "MoEDispatch" in used else set()
    assert sorted(function.name for function in model.functions) == sorted(used | called)
    assert {function.domain for function in model.functions} <= {"k25"}
    opsets = {item.domain: item.version for item in model.opset_import}
    assert opsets.pop("") == 21
    assert opsets in ([{"k25": 1}] if used else [{}, {"k25": 1}])
    for function in model.functions:
        assert {item.domain: item.version for item in function.opset_import} == {"": 21, "k25": 1}


def messages(message: Message) -> Iterator[Message]:
    """Every message inside a message."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


@each_component
@each_precision
def test_nothing_of_the_machine_is_in_the_file(exported: ExportedFiles, component: str, precision: str) -> None:
    content = path_of(exported, component, precision).read_bytes()
    places = [exported.checkpoint, exported.bundle, Path.cwd(), Path.home(), Path(__file__).parents[2]]
    for text in [str(place) for place in places if len(str(place)) > 3] + [
        *("/tmp", "site-packages", ".py", "pkg.torch", "torch.", "k25_export", "k25_plugins", "stack_trace"),
    ]:
        assert text.encode() not in content, text
    model = onnx.load_from_string(content)
    assert (model.producer_version, model.doc_string, model.domain, model.model_version) == ("", "", "", 0)
    for message in messages(model):
        for field in ("doc_string", "metadata_props", "quantization_annotation"):
            if field in message.DESCRIPTOR.fields_by_name:
                assert not getattr(message, field), (type(message).__name__, field)


@each_component
@each_precision
def test_checker_and_shape_inference_pass(exported: ExportedFiles, component: str, precision: str) -> None:
    path = path_of(exported, component, precision)
    onnx.checker.check_model(str(path), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    _, outputs = activations(text_config(exported), component, precision)
    assert [value.name for value in inferred.graph.output] == [name for name, _, _ in outputs]


def inlined(model: onnx.ModelProto, op: str) -> onnx.ModelProto:
    """With the body of this op, from the file, in place of its nodes."""
    made: onnx.ModelProto = inliner.inline_selected_functions(model, [("k25", op)])
    assert op in {node.op_type for node in model.graph.node} - {node.op_type for node in made.graph.node}
    return made


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    """Values of initializers and of `Constant` nodes."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            (value,) = (onnx.helper.get_attribute_value(item) for item in node.attribute)
            is_tensor = isinstance(value, onnx.TensorProto)
            found[node.output[0]] = numpy_helper.to_array(value) if is_tensor else np.array(value)
    return found


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


@each_precision
def test_the_guard_of_the_router_survives(exported: ExportedFiles, precision: str) -> None:
    # weights = s / (sum of s + 1e-20): without it, scores that all underflow divide zero by zero.
    graph = inlined(model_of(exported, "moe_layer", precision), "Router").graph
    made, values = producers(graph), constants(graph)
    quotients = [node for node in graph.node if node.op_type == "Div"]
    assert len(quotients) == 1
    choice = made[quotients[0].input[1]]  # the sum where weights are normalised, else 1
    assert choice.op_type == "Where"
    assert made[choice.input[0]].op_type == "Cast"
    assert values[made[choice.input[0]].input[0]] == 1  # and they are
    assert values[choice.input[2]] == 1
    add = made[choice.input[1]]
    assert add.op_type == "Add"
    summed = [name for name in add.input if name in made and made[name].op_type == "ReduceSum"]
    guard = [values[name] for name in add.input if name in values]
    assert len(summed) == len(guard) == 1
    assert guard[0].dtype == np.float32
    assert guard[0] == np.float32(1e-20)


@each_precision
@pytest.mark.parametrize("component", ["dense_layer", "moe_layer", "head"])
def test_norms_have_their_own_epsilons_and_are_float32(exported: ExportedFiles, component: str, precision: str) -> None:
    model = model_of(exported, component, precision)
    # Layer norms 1e-5 (rms_norm_eps); q_a_layernorm and kv_a_layernorm 1e-6.
    stems = ["input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "post_attention_layernorm"]
    wanted = dict(zip(stems, [1e-5, 1e-6, 1e-6, 1e-5], strict=True))
    wanted = {"model.norm": 1e-5} if component == "head" else wanted
    norms = [node for node in model.graph.node if node.op_type == "RMSNorm"]
    found = {
        node.input[1]: {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in norms
    }
    assert found == {f"{stem}.weight": {"eps": np.float32(epsilon)} for stem, epsilon in wanted.items()}
    # And in what the file's body makes of them.
    graph = onnx.shape_inference.infer_shapes(inlined(model, "RMSNorm")).graph
    values, types = constants(graph), {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    epsilons = []
    for node in graph.node:
        if node.op_type == "ReduceMean":
            assert types[node.input[0]] == types[node.output[0]] == onnx.TensorProto.FLOAT
            users = [user for user in graph.node if node.output[0] in user.input]
            assert [user.op_type for user in users] == ["Add"]
            epsilons += [float(values[name]) for name in users[0].input if name in values]
    np.testing.assert_allclose(epsilons, list(wanted.values()), rtol=1e-6)


@each_precision
def test_the_router_is_float32(exported: ExportedFiles, precision: str) -> None:
    graph = onnx.shape_inference.infer_shapes(inlined(model_of(exported, "moe_layer", precision), "Router")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    made = producers(graph)
    top_k = [node for node in graph.node if node.op_type == "TopK"]
    assert len(top_k) == 1
    biased = made[top_k[0].input[0]]
    assert biased.op_type == "Add"
    assert "mlp.gate.e_score_correction_bias" in biased.input
    scores = next(made[name] for name in biased.input if name in made)
    assert scores.op_type == "Sigmoid"
    product = made[scores.input[0]]
    assert product.op_type == "Linear"
    assert product.input[1] == "mlp.gate.weight"
    x = product.input[0]
    assert {types[name] for name in (x, *scores.output, *biased.output)} == {onnx.TensorProto.FLOAT}


def frequencies(text: Mapping[str, Any]) -> Array:
    """YaRN, by the formula: base frequencies, divided by the factor above a linear ramp."""
    rope, dim = text["rope_scaling"], text["qk_rope_head_dim"]

    def corner(turns: float) -> float:
        original = rope["original_max_position_embeddings"]
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(text["rope_theta"]))

    low, high = max(math.floor(corner(rope["beta_fast"])), 0), min(math.ceil(corner(rope["beta_slow"])), dim - 1)
    index = np.arange(dim // 2)
    base = text["rope_theta"] ** (-2.0 * index / dim)
    ramp = np.clip((index - low) / max(high - low, 1e-3), 0, 1)
    return np.asarray(base * (1 - ramp) + base / rope["factor"] * ramp)


def scale_of(text: Mapping[str, Any]) -> float:
    m = 0.1 * text["rope_scaling"]["mscale_all_dim"] * math.log(text["rope_scaling"]["factor"]) + 1
    return float(m * m / math.sqrt(text["qk_nope_head_dim"] + text["qk_rope_head_dim"]))


@each_precision
@pytest.mark.parametrize("component", ["dense_layer", "moe_layer"])
def test_attributes_are_those_of_the_configuration(exported: ExportedFiles, component: str, precision: str) -> None:
    text = text_config(exported)
    nodes = {node.op_type: node for node in model_of(exported, component, precision).graph.node if node.domain}
    found = {item.name: onnx.helper.get_attribute_value(item) for item in nodes["MLA"].attribute}
    assert found["num_heads"] == text["num_attention_heads"]
    assert found["qk_nope_head_dim"] == text["qk_nope_head_dim"]
    assert found["v_head_dim"] == text["v_head_dim"]
    assert found["softmax_scale"] == np.float32(scale_of(text))
    np.testing.assert_allclose(found["inv_freq"], frequencies(text), rtol=1e-6)
    if component == "moe_layer":
        found = {item.name: onnx.helper.get_attribute_value(item) for item in nodes["MoEDispatch"].attribute}
        assert found["intermediate_size"] == text["moe_intermediate_size"]
        assert found["group_size"] == 32
        found = {item.name: onnx.helper.get_attribute_value(item) for item in nodes["Router"].attribute}
        assert found == {
            "top_k": text["num_experts_per_tok"],
            "normalise": int(text["norm_topk_prob"]),
            "scaling_factor": np.float32(text["routed_scaling_factor"]),
        }


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (0, [("embed", None), ("moe_layer", (0, 1, 2, 3)), ("head", None), ("vision", None)]),
        (1, [("embed", None), ("dense_layer", (0,)), ("moe_layer", (1, 2, 3)), ("head", None), ("vision", None)]),
        (4, [("embed", None), ("dense_layer", (0, 1, 2, 3)), ("head", None), ("vision", None)]),
    ],
)
def test_each_kind_is_one_component(tiny: ExportedFiles, first: int, expected: list[tuple[str, Any]]) -> None:
    config = checkpoint_from_folder(tiny.checkpoint).config
    config = replace(config, text=replace(config.text, first_k_dense_replace=first))
    assert [(spec.name, spec.layers) for spec in component_specs(config)] == expected


# What the graphs compute.


class Weights:
    """Tensors of a checkpoint in float64, by name."""

    def __init__(self, checkpoint: Path) -> None:
        self.tensors = stored_tensors(checkpoint)

    def octets(self, name: str) -> bytes:
        path, _, _, start, stop = self.tensors[name]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def bits(self, name: str) -> Array:
        """As the graph takes it: uint16 for bfloat16."""
        kinds = {"BF16": "<u2", "F32": "<f4", "I32": "<i4"}
        _, dtype, shape, _, _ = self.tensors[name]
        return np.frombuffer(self.octets(name), kinds[dtype]).reshape(shape)

    def __getitem__(self, name: str) -> Array:
        bits = self.bits(name)
        if self.tensors[name][1] == "BF16":
            bits = (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.astype(np.float64)

    def expert(self, name: str) -> Array:
        """A quantised matrix by its definition: (nibble - 8) * scale."""
        words, scales = self.bits(f"{name}.weight_packed").astype(np.int64) & 0xFFFFFFFF, self[f"{name}.weight_scale"]
        nibbles = np.stack([(words >> (4 * place)) & 15 for place in range(8)], -1).reshape(words.shape[0], -1)
        return (nibbles - 8) * np.repeat(scales, 32, axis=1)


def rms(x: Array, weight: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    g = x @ gate.T
    return np.asarray((g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T)


def attention(x: Array, text: Mapping[str, Any], weights: Weights, prefix: str) -> Array:
    """Tokens 0, 1, 2, ... of one sequence, in the expanded form."""
    tokens, heads = x.shape[0], text["num_attention_heads"]
    nope, v, rank = text["qk_nope_head_dim"], text["v_head_dim"], text["kv_lora_rank"]
    phases = np.exp(1j * np.arange(tokens)[:, None] * frequencies(text))

    def rotated(vectors: Array) -> Array:  # [tokens, ..., rope]
        pairs = vectors[..., 0::2] + 1j * vectors[..., 1::2]
        turned = pairs * phases.reshape(tokens, *[1] * (vectors.ndim - 2), -1)
        return np.concatenate([turned.real, turned.imag], -1)  # any order of channels, the same for q and k

    q = rms(x @ weights[f"{prefix}q_a_proj.weight"].T, weights[f"{prefix}q_a_layernorm.weight"], 1e-6)
    q = (q @ weights[f"{prefix}q_b_proj.weight"].T).reshape(tokens, heads, -1)
    compressed = x @ weights[f"{prefix}kv_a_proj_with_mqa.weight"].T
    latent = rms(compressed[:, :rank], weights[f"{prefix}kv_a_layernorm.weight"], 1e-6)
    kv = (latent @ weights[f"{prefix}kv_b_proj.weight"].T).reshape(tokens, heads, nope + v)
    q_rope, k_rope = rotated(q[..., nope:]), rotated(compressed[:, rank:])
    scores = np.einsum("tnd,snd->nts", q[..., :nope], kv[..., :nope]) + np.einsum("tnd,sd->nts", q_rope, k_rope)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores * scale_of(text), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("nts,snd->tnd", shares, kv[..., nope:]).reshape(tokens, -1)
    return np.asarray(mixed @ weights[f"{prefix}o_proj.weight"].T)


def layer_inputs(files: ExportedFiles, component: str, tokens: int) -> tuple[Array, dict[str, ort.OrtValue]]:
    """Random hidden states and everything that a layer needs to run one sequence from its start."""
    text, weights, prefix = text_config(files), Weights(files.checkpoint), prefix_of(component)
    hidden = np.random.default_rng(tokens).normal(size=(tokens, text["hidden_size"])).astype(np.float32)
    blocks = -(-tokens // 3)
    cache = np.zeros((blocks + 1, 3, text["kv_lora_rank"] + text["qk_rope_head_dim"]), np.float32)
    value, typed = ort.OrtValue.ortvalue_from_numpy, ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    feeds = {
        "hidden": value(hidden),
        "cache": value(cache),
        "positions": value(np.arange(tokens, dtype=np.int32)),
        "query_start": value(np.array([0, tokens], np.int32)),
        "block_table": value(np.arange(blocks, 0, -1, dtype=np.int32)[None]),
    }
    for name in weights.tensors:
        if name.startswith(prefix) and ".experts." not in name:
            bits = weights.bits(name)
            tensor = typed(bits, TYPES["bfloat16"]) if bits.dtype == np.uint16 else value(bits)
            feeds[name.removeprefix(prefix)] = tensor
    if component == "moe_layer":
        names = [
            [f"{prefix}mlp.experts.{expert}.{projection}_proj.weight_{part}" for projection, part in EXPERT_COLUMNS]
            for expert in range(text["n_routed_experts"])
        ]
        shards = {weights.tensors[name][0] for row in names for name in row}
        assert len(shards) == 1
        octets = np.fromfile(shards.pop(), np.uint8)
        octets = octets[: len(octets) // 8 * 8]
        table = np.array([[weights.tensors[name][3] for name in row] for row in names], np.int64)
        assert not (table % 8).any()
        feeds["expert_words"] = value(octets.view(np.int32).reshape(-1, 2))
        feeds["expert_scales"] = typed(octets.view(np.uint16).reshape(-1, 4), TYPES["bfloat16"])
        feeds["expert_table"] = value(table // 8)
        feeds["residual_share"] = value(np.ones(1, np.float32))
    return hidden, feeds


def run(files: ExportedFiles, component: str, feeds: dict[str, ort.OrtValue]) -> dict[str, Array]:
    path = path_of(files, component, "fp32")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name: found.numpy() for name, found in zip(names, session.run_with_ort_values(names, feeds), strict=True)}


def relative_l2(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def layer_start(files: ExportedFiles, component: str, hidden: Array) -> tuple[Array, Array]:
    """Hidden states after attention, and the input of the feed-forward block."""
    text, weights, prefix = text_config(files), Weights(files.checkpoint), prefix_of(component)
    x = hidden.astype(np.float64)
    normed = rms(x, weights[f"{prefix}input_layernorm.weight"], 1e-5)
    h = x + attention(normed, text, weights, f"{prefix}self_attn.")
    return h, rms(h, weights[f"{prefix}post_attention_layernorm.weight"], 1e-5)


def test_embed_takes_rows_of_the_table(exported: ExportedFiles) -> None:
    weights = Weights(exported.checkpoint)
    table = "model.embed_tokens.weight"
    ids = np.array([5, 0, 1023, 5], np.int32)
    bits = weights.bits(f"language_model.{table}")
    feeds = {
        "token_ids": ort.OrtValue.ortvalue_from_numpy(ids),
        table: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TYPES["bfloat16"]),
    }
    found = run(exported, "embed", feeds)["hidden"]
    np.testing.assert_array_equal(found, weights[f"language_model.{table}"][ids])


def test_head_norms_and_projects_the_rows_asked_for(exported: ExportedFiles) -> None:
    weights = Weights(exported.checkpoint)
    hidden = np.random.default_rng(0).normal(size=(5, text_config(exported)["hidden_size"])).astype(np.float32)
    rows = np.array([4, 0, 4], np.int32)
    typed = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    feeds = {
        "hidden": ort.OrtValue.ortvalue_from_numpy(hidden),
        "rows": ort.OrtValue.ortvalue_from_numpy(rows),
        **{
            name: typed(weights.bits(f"language_model.{name}"), TYPES["bfloat16"])
            for name in ("model.norm.weight", "lm_head.weight")
        },
    }
    normed = rms(hidden.astype(np.float64)[rows], weights["language_model.model.norm.weight"], 1e-5)
    expected = normed @ weights["language_model.lm_head.weight"].T
    assert relative_l2(run(exported, "head", feeds)["logits"], expected) < 1e-6


@pytest.mark.parametrize("tokens", [1, 7])
def test_dense_layer_computes_the_formulas(exported: ExportedFiles, tokens: int) -> None:
    weights, prefix = Weights(exported.checkpoint), prefix_of("dense_layer")
    hidden, feeds = layer_inputs(exported, "dense_layer", tokens)
    h, normed = layer_start(exported, "dense_layer", hidden)
    mlp = [weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
    found = run(exported, "dense_layer", feeds)
    assert relative_l2(found["hidden_out"], h + swiglu(normed, *mlp)) < 3e-6


@pytest.mark.parametrize("tokens", [1, 7])
def test_moe_layer_computes_the_formulas(exported: ExportedFiles, tokens: int) -> None:
    text, weights, prefix = text_config(exported), Weights(exported.checkpoint), prefix_of("moe_layer")
    hidden, feeds = layer_inputs(exported, "moe_layer", tokens)
    h, normed = layer_start(exported, "moe_layer", hidden)
    scores = 1 / (1 + np.exp(-(normed @ weights[f"{prefix}mlp.gate.weight"].T)))
    biased = scores + weights[f"{prefix}mlp.gate.e_score_correction_bias"]
    ids = np.argsort(-biased, axis=-1)[:, : text["num_experts_per_tok"]]
    chosen = np.take_along_axis(scores, ids, -1)
    shares = chosen / chosen.sum(-1, keepdims=True) * 2.827
    routed = np.zeros_like(h)
    for token in range(tokens):
        for expert, share in zip(ids[token], shares[token], strict=True):
            stem = f"{prefix}mlp.experts.{expert}."
            matrices = [weights.expert(f"{stem}{name}_proj") for name in ("gate", "up", "down")]
            routed[token] += share * swiglu(normed[token], *matrices)
    names = [f"{prefix}mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
    shared = swiglu(normed, *(weights[name] for name in names))
    found = run(exported, "moe_layer", feeds)
    assert found["expert_ids"].tolist() == ids.tolist()
    np.testing.assert_allclose(found["expert_weights"], shares, rtol=1e-5)
    assert relative_l2(found["hidden_out"], h + routed + shared) < 3e-6
    # Another rank: it adds its routed experts only.
    feeds["residual_share"] = ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
    assert relative_l2(run(exported, "moe_layer", feeds)["hidden_out"], routed) < 3e-6
    held = np.where(np.arange(text["n_routed_experts"]) % 2, feeds["expert_table"].numpy().T, -1).T
    partial = np.zeros_like(h)
    for rank, table in enumerate((held, np.where(held < 0, feeds["expert_table"].numpy(), -1))):
        rank_feeds = {
            **feeds,
            "expert_table": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(table)),
            "residual_share": ort.OrtValue.ortvalue_from_numpy(np.array([1 - rank], np.float32)),
        }
        partial += run(exported, "moe_layer", rank_feeds)["hidden_out"]
    assert relative_l2(partial, h + routed + shared) < 3e-6


@pytest.mark.parametrize("component", ["dense_layer", "moe_layer"])
def test_layers_write_the_latent_cache(exported: ExportedFiles, component: str) -> None:
    text, weights, prefix = text_config(exported), Weights(exported.checkpoint), prefix_of(component)
    hidden, feeds = layer_inputs(exported, component, 4)
    normed = rms(hidden.astype(np.float64), weights[f"{prefix}input_layernorm.weight"], 1e-5)
    compressed = normed @ weights[f"{prefix}self_attn.kv_a_proj_with_mqa.weight"].T
    rank = text["kv_lora_rank"]
    latent = rms(compressed[:, :rank], weights[f"{prefix}self_attn.kv_a_layernorm.weight"], 1e-6)
    pairs = compressed[:, rank::2] + 1j * compressed[:, rank + 1 :: 2]
    turned = pairs * np.exp(1j * np.arange(4)[:, None] * frequencies(text))
    keys = np.stack([turned.real, turned.imag], -1).reshape(4, -1)  # pairs stay interleaved
    cache = run(exported, component, feeds)["cache_out"]
    rows = np.concatenate([cache[2], cache[1, :1]])  # the block table is [2, 1]
    np.testing.assert_allclose(rows, np.concatenate([latent, keys], 1), rtol=0, atol=2e-5)
    assert not cache[0].any()
    assert not cache[1, 1:].any()
