"""Ways of breaking a build: edits of graphs and bindings."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.config import TextConfig
from k25_export.rope import yarn_inverse_frequencies

Manifest = dict[str, Any]
Edit = Callable[[onnx.ModelProto], None]


@dataclass(kw_only=True)
class Build:
    """A copy of a bundle to change; `checkpoint` is what the runtime maps, `reference` what the judge reads."""

    bundle: Path
    reference: Path
    checkpoint: Path
    patches: list[Any] = field(default_factory=list)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """With the changes of the runtime in force."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch)
            yield


def build_from(exported: Any, folder: Path) -> Build:
    """A build to break, in `folder`."""
    shutil.copytree(exported.bundle, folder / "bundle")
    return Build(bundle=folder / "bundle", reference=exported.checkpoint, checkpoint=exported.checkpoint)


# Manifest and graph.


def edit_manifest(build: Build, edit: Callable[[Manifest], None]) -> None:
    path = build.bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def component(manifest: Manifest, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in manifest["components"] if entry["name"] == name)
    return found


def edit_graph(build: Build, name: str, edit: Edit) -> None:
    """Change a component's fp32 graph, and its hash in the manifest, as a wrong exporter would."""
    path = build.bundle / "components" / f"{name}.fp32.onnx"
    model = onnx.load(path)
    before = model.SerializeToString()
    edit(model)
    data = model.SerializeToString()
    assert data != before
    path.write_bytes(data)

    def rehash(manifest: Manifest) -> None:
        file = next(file for file in component(manifest, name)["files"] if file["precision"] == "fp32")
        file["sha256"] = hashlib.sha256(data).hexdigest()

    edit_manifest(build, rehash)


def graph(name: str, edit: Edit) -> Callable[[Build], None]:
    return lambda build: edit_graph(build, name, edit)


def manifest(edit: Callable[[Manifest], None]) -> Callable[[Build], None]:
    return lambda build: edit_manifest(build, edit)


def node_of(model: onnx.ModelProto, kind: str, reads: str = "") -> onnx.NodeProto:
    """The first node of a kind, of those that read (or are behind a cast of) `reads`."""
    return next(node for node in model.graph.node if node.op_type == kind and (not reads or _reads(model, node, reads)))


def _reads(model: onnx.ModelProto, node: onnx.NodeProto, name: str) -> bool:
    casts = {cast.input[0]: cast.output[0] for cast in model.graph.node if cast.op_type in ("Cast", "Transpose")}
    names = {name, casts.get(name, name), casts.get(casts.get(name, name), name)}
    return bool(names & set(node.input))


def consumer(model: onnx.ModelProto, tensor: str, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind and tensor in node.input)


def function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    return next(found for found in model.functions if found.name == name)


def inner(nodes: Any, output: str) -> onnx.NodeProto:
    """The node that makes `output`, in a body or in the loops and branches inside it."""
    for node in nodes:
        if output in node.output and not (node.op_type in ("Loop", "If") and output == "new_total"):
            return node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                with contextlib.suppress(StopIteration):
                    return inner(attribute.g.node, output)
    raise StopIteration


def body(name: str, output: str, edit: Callable[[onnx.NodeProto], None]) -> Edit:
    """Change the node that makes `output` in the body of a function."""
    return lambda model: edit(inner(function(model, name).node, output))


def set_tensor(tensor: onnx.TensorProto, values: Any) -> None:
    old = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values, old.dtype).reshape(old.shape), tensor.name))


def config_of(build: Build) -> TextConfig:
    return checkpoint_from_folder(build.reference).config.text


def set_input(index: int, name: str) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        node.input[index] = name

    return edit


def set_op(kind: str) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        node.op_type = kind

    return edit


def set_attribute(kind: str, name: str, value: Any, reads: str = "") -> Edit:
    """Change an attribute of the first node of a kind, of those that read `reads`."""

    def edit(model: onnx.ModelProto) -> None:
        node = node_of(model, kind, reads)
        next(found for found in node.attribute if found.name == name).CopyFrom(onnx.helper.make_attribute(name, value))

    return edit


def make_otherwise(nodes: Any, output: str, made_as: str, *more: onnx.NodeProto) -> None:
    """The node that makes `output` makes `made_as`, and the nodes of `more`, right behind it, make `output` of that."""
    index = next(i for i, node in enumerate(nodes) if output in node.output)
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    rest[index].output[list(rest[index].output).index(output)] = made_as
    del nodes[:]
    nodes.extend([*rest[: index + 1], *more, *rest[index + 1 :]])


def round_to_bfloat16(nodes: Any, output: str) -> None:
    """What the node makes is rounded to bfloat16 before anybody reads it."""
    narrow = onnx.helper.make_node("Cast", [f"{output}_wide"], [f"{output}_narrow"], to=onnx.TensorProto.BFLOAT16)
    wide = onnx.helper.make_node("Cast", [f"{output}_narrow"], [output], to=onnx.TensorProto.FLOAT)
    make_otherwise(nodes, output, f"{output}_wide", narrow, wide)


# Bindings.


def swap_expert_columns(columns: list[int]) -> Callable[[Manifest], None]:
    def edit(values: Manifest) -> None:
        names = component(values, "moe_layer")["bindings"]["expert_table"]["tensors"]
        names[:] = [names[column] for column in columns]

    return edit


def bind(name: str, input_name: str, tensor: Callable[[str, Manifest], str]) -> Callable[[Manifest], None]:
    def edit(values: Manifest) -> None:
        binding = component(values, name)["bindings"][input_name]
        binding["tensor"] = tensor(binding["tensor"], component(values, name))

    return edit


def of_first_layer(tensor: str, entry: Manifest) -> str:
    return tensor.replace("{layer}", str(entry["layers"][0]))


def of_the_second_norm(tensor: str, entry: Manifest) -> str:
    return tensor.replace("input_layernorm", "post_attention_layernorm")


def swap_two_experts(values: Manifest) -> None:
    for group in values["tensors"]:
        if group["name"].endswith("down_proj.weight_packed"):
            group["offsets"][0], group["offsets"][1] = group["offsets"][1], group["offsets"][0]


def shift_scales(values: Manifest) -> None:
    for group in values["tensors"]:
        if group["name"].endswith("up_proj.weight_scale"):
            group["offsets"] = [offset - 8 for offset in group["offsets"]]


def shift_embedding(values: Manifest) -> None:
    group = next(group for group in values["tensors"] if group["name"].endswith("embed_tokens.weight"))
    group["offset"] -= 2 * group["shape"][1]
    assert group["offset"] > 0


def swap_dense_gate_and_up(values: Manifest) -> None:
    bindings = component(values, "dense_layer")["bindings"]
    gate, up = (bindings[f"mlp.{name}_proj.weight"] for name in ("gate", "up"))
    gate["tensor"], up["tensor"] = up["tensor"], gate["tensor"]


# Graphs.


def reverse_nibbles(model: onnx.ModelProto) -> None:
    powers = inner(function(model, "DequantizeInt4").node, "powers").attribute[0].t
    set_tensor(powers, onnx.numpy_helper.to_array(powers)[::-1])


def lose_the_offset(model: onnx.ModelProto) -> None:
    set_tensor(inner(function(model, "DequantizeInt4").node, "eight").attribute[0].t, 0.0)


def roll_scales(model: onnx.ModelProto) -> None:
    """Each group gets the scale of the group before it."""
    text = """
    Rolled (scale_stored) => (scale) {
      one_1 = Constant <value = int64[1] {1}> ()
      zero_1 = Constant <value = int64[1] {0}> ()
      last_1 = Constant <value = int64[1] {-1}> ()
      far_1 = Constant <value = int64[1] {9223372036854775807}> ()
      tail = Slice (scale_stored, last_1, far_1, one_1)
      front = Slice (scale_stored, zero_1, last_1, one_1)
      scale = Concat <axis = 1> (tail, front)
    }"""
    extra = onnx.parser.parse_function(f'<domain: "k25", opset_import: ["" : 21]>{text}').node
    make_otherwise(function(model, "DequantizeInt4").node, "scale", "scale_stored", *extra)


def scale_softmax(factor: Callable[[TextConfig], float]) -> Callable[[Build], None]:
    def inject(build: Build) -> None:
        config = config_of(build)

        def edit(model: onnx.ModelProto) -> None:
            attribute = next(a for a in node_of(model, "MLA").attribute if a.name == "softmax_scale")
            attribute.f *= factor(config)

        edit_graph(build, "moe_layer", edit)

    return inject


def mscale(config: TextConfig) -> float:
    return float(0.1 * config.rope_scaling.mscale_all_dim * np.log(config.rope_scaling.factor) + 1)


def wrong_frequencies(name: str, change: Callable[[TextConfig], TextConfig]) -> Callable[[Build], None]:
    def inject(build: Build) -> None:
        config = config_of(build)
        wrong = yarn_inverse_frequencies(change(config))
        assert wrong != yarn_inverse_frequencies(config)

        def edit(model: onnx.ModelProto) -> None:
            next(a for a in node_of(model, "MLA").attribute if a.name == "inv_freq").floats[:] = wrong

        edit_graph(build, name, edit)

    return inject


def beta_fast_of_one(config: TextConfig) -> TextConfig:
    return replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, beta_fast=1.0))


def no_yarn(config: TextConfig) -> TextConfig:
    return replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, factor=1.0))


def rotate_halves(model: onnx.ModelProto) -> None:
    """Pairs (i, i + half) in place of the adjacent (2i, 2i + 1)."""
    nodes = function(model, "MLA").node
    for name, axis in (("q", 2), ("k", 1)):
        shape = inner(nodes, f"{name}_pair_shape")
        shape.input[-2], shape.input[-1] = shape.input[-1], shape.input[-2]
        for part in ("first", "second"):
            inner(nodes, f"{name}_{part}").attribute[0].i = axis


def exchange_kv_b(model: onnx.ModelProto) -> None:
    nodes = function(model, "MLA").node
    inner(nodes, "uk").input[1:3] = ["v_dim", "far"]
    inner(nodes, "uv").input[1:3] = ["zero", "v_dim"]


def see_the_future(model: onnx.ModelProto) -> None:
    """Hide what is greater than the position plus one."""
    loop = inner(function(model, "MLA").node, "z").attribute[0].g.node
    hidden = inner(loop, "is_hidden")
    index = list(loop).index(hidden)
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in loop]
    rest[index].input[1] = "one_later"
    later = onnx.helper.make_node("Add", ["position_token", "one_scalar"], ["one_later"])
    del loop[:]
    loop.extend([*rest[:index], later, *rest[index:]])


def set_eps(value: float, wrong: float) -> Edit:
    """Every norm with the one epsilon gets the other."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute if node.op_type == "RMSNorm" else ():
                if attribute.name == "eps" and np.isclose(attribute.f, value, rtol=1e-4, atol=0):
                    attribute.f = wrong

    return edit


def eps_outside_the_root(model: onnx.ModelProto) -> None:
    """1 / (sqrt(mean) + eps)."""
    nodes = function(model, "RMSNorm").node
    inner(nodes, "root").input[0] = "mean"
    make_otherwise(nodes, "root", "bare", onnx.helper.make_node("Add", ["bare", "eps_scalar"], ["root"]))


def centre_the_norm(model: onnx.ModelProto) -> None:
    """LayerNorm without a bias: the mean is taken off first."""
    mean = onnx.helper.make_node("ReduceMean", ["plain", "last_axis"], ["centre"], keepdims=1)
    centred = onnx.helper.make_node("Sub", ["plain", "centre"], ["wide"])
    make_otherwise(function(model, "RMSNorm").node, "wide", "plain", mean, centred)


def norm_weight_plus_one(model: onnx.ModelProto) -> None:
    """What a norm with `1 + weight` computes."""
    text = "Raised (stored) => (weight_x) { one = Constant <value = float {1.0}> () weight_x = Add (stored, one) }"
    extra = onnx.parser.parse_function(f'<domain: "k25", opset_import: ["" : 21]>{text}').node
    make_otherwise(function(model, "RMSNorm").node, "weight_x", "stored", *extra)


def skip_the_latent_norm(model: onnx.ModelProto) -> None:
    norm = node_of(model, "RMSNorm", "self_attn.kv_a_layernorm.weight")
    consumer(model, norm.output[0], "Concat").input[0] = norm.input[0]


ignore_the_bias = body("Router", "biased", set_input(1, "scores"))  # the order of the scores without the bias
weigh_with_the_bias = body("Router", "chosen", set_input(0, "biased"))
lose_the_scaling_factor = set_attribute("Router", "scaling_factor", 1.0)
lose_the_normalisation = set_attribute("Router", "normalise", 0)
softmax_router = body("Router", "scores", set_op("Softmax"))
smallest_experts = body("Router", "ids", lambda node: node.attribute.append(onnx.helper.make_attribute("largest", 0)))


def drop_the_shared_expert(model: onnx.ModelProto) -> None:
    routed = node_of(model, "MoEDispatch").output[0]
    add = consumer(model, routed, "Add")
    add.input[1] = add.input[0]


def residual_after_norm(model: onnx.ModelProto) -> None:
    attended = node_of(model, "Linear", "self_attn.o_proj.weight").output[0]
    consumer(model, attended, "Add").input[0] = node_of(model, "RMSNorm", "input_layernorm.weight").output[0]


def sigmoid_for_silu(model: onnx.ModelProto) -> None:
    gate = node_of(model, "Linear", "mlp.shared_experts.gate_proj.weight").output[0]
    silu = consumer(model, gate, "Mul")
    silu.input[0] = silu.input[1]


def skip_the_final_norm(model: onnx.ModelProto) -> None:
    node_of(model, "Linear").input[0] = node_of(model, "Gather").output[0]


def bfloat16(name: str, output: str) -> Edit:
    """A stage of a body is rounded to bfloat16."""
    return lambda model: round_to_bfloat16(function(model, name).node, output)


def bfloat16_sum_of_experts(model: onnx.ModelProto) -> None:
    loop = inner(function(model, "MoEDispatch").node, "sum").attribute[0].g.node
    branch = next(node for node in loop if node.op_type == "If")
    then = next(a.g for a in branch.attribute if a.name == "then_branch")
    round_to_bfloat16(then.node, "weighted")


def bfloat16_router(model: onnx.ModelProto) -> None:
    round_to_bfloat16(model.graph.node, node_of(model, "Linear", "mlp.gate.weight").output[0])


def exact_gelu(model: onnx.ModelProto) -> None:
    next(a for a in node_of(model, "Gelu").attribute if a.name == "approximate").s = b"none"
