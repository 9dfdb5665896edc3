"""One signature, many forms: the table, torch's and ONNX's schemas and the function body agree with the specification.

The specification is written out here once more, from the design's table of the `k25` operators, version 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from k25_plugins import signatures, torch_ops
from k25_plugins.errors import InputError
from k25_plugins.onnx_functions import OPSET, functions_for
from k25_plugins.onnx_translation import onnx_schema, translation_table
from k25_plugins.signatures import OPS, OpSignature


@dataclass(frozen=True)
class Specified:
    """An operator as the design fixes it: (name, dtype) of inputs and outputs, (name, kind) of attributes."""

    torch_schema: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    attributes: tuple[tuple[str, str], ...]
    overloads: int
    is_plugin: bool


SPECIFIED = {
    "MLA": Specified(
        torch_schema=(
            "k25::mla(Tensor q, Tensor latent, Tensor cache, Tensor kv_b, Tensor positions, Tensor query_start, "
            "Tensor block_table, int num_heads, int qk_nope_head_dim, int v_head_dim, float softmax_scale, "
            "float[] inv_freq) -> (Tensor, Tensor)"
        ),
        inputs=(
            ("q", "T"),
            ("latent", "T"),
            ("cache", "TC"),
            ("kv_b", "bfloat16"),
            ("positions", "int32"),
            ("query_start", "int32"),
            ("block_table", "int32"),
        ),
        outputs=(("out", "T"), ("cache_out", "TC")),
        attributes=(
            ("num_heads", "int"),
            ("qk_nope_head_dim", "int"),
            ("v_head_dim", "int"),
            ("softmax_scale", "float"),
            ("inv_freq", "floats"),
        ),
        overloads=4,
        is_plugin=True,
    ),
    "MoEDispatch": Specified(
        torch_schema=(
            "k25::moe_dispatch(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor words, Tensor scales, "
            "Tensor table, int intermediate_size, int group_size) -> Tensor"
        ),
        inputs=(
            ("x", "T"),
            ("expert_ids", "int32"),
            ("expert_weights", "float32"),
            ("words", "int32"),
            ("scales", "bfloat16"),
            ("table", "int64"),
        ),
        outputs=(("y", "T"),),
        attributes=(("intermediate_size", "int"), ("group_size", "int")),
        overloads=2,
        is_plugin=True,
    ),
    "Linear": Specified(
        torch_schema="k25::linear(Tensor x, Tensor weight) -> Tensor",
        inputs=(("x", "T"), ("weight", "bfloat16")),
        outputs=(("y", "T"),),
        attributes=(),
        overloads=2,
        is_plugin=False,
    ),
    "VisionAttention": Specified(
        torch_schema=(
            "k25::vision_attention(Tensor q, Tensor k, Tensor v, int num_heads, float softmax_scale) -> Tensor"
        ),
        inputs=(("q", "T"), ("k", "T"), ("v", "T")),
        outputs=(("out", "T"),),
        attributes=(("num_heads", "int"), ("softmax_scale", "float")),
        overloads=2,
        is_plugin=False,
    ),
    "RMSNorm": Specified(
        torch_schema="k25::rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
        inputs=(("x", "T"), ("weight", "bfloat16")),
        outputs=(("y", "T"),),
        attributes=(("eps", "float"),),
        overloads=2,
        is_plugin=False,
    ),
    "Router": Specified(
        torch_schema=(
            "k25::router(Tensor logits, Tensor bias, int top_k, int normalise, float scaling_factor) "
            "-> (Tensor, Tensor)"
        ),
        inputs=(("logits", "float32"), ("bias", "float32")),
        outputs=(("expert_ids", "int32"), ("expert_weights", "float32")),
        attributes=(("top_k", "int"), ("normalise", "int"), ("scaling_factor", "float")),
        overloads=1,
        is_plugin=False,
    ),
}
ONNX_TYPES = {
    "float32": "tensor(float)",
    "bfloat16": "tensor(bfloat16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}
ONNX_KINDS = {
    "int": onnx.defs.OpSchema.AttrType.INT,
    "float": onnx.defs.OpSchema.AttrType.FLOAT,
    "floats": onnx.defs.OpSchema.AttrType.FLOATS,
}
# What ONNX Runtime's CPU provider runs and TensorRT builds: no bitwise ops, no NonZero, no scatter that adds.
FORBIDDEN_OPS = {"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "NonZero", "ScatterElements"}

each_op = pytest.mark.parametrize("signature", OPS, ids=[signature.name for signature in OPS])


def function_of(name: str) -> onnx.FunctionProto:
    return next(function for function in functions_for([name]) if function.name == name)


def nodes_of(nodes: Sequence[onnx.NodeProto], depth: int = 0) -> Iterator[tuple[onnx.NodeProto, int]]:
    for node in nodes:
        yield node, depth
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g.node, depth + 1)


def test_the_table_holds_exactly_the_specified_operators() -> None:
    assert (signatures.DOMAIN, signatures.VERSION) == ("k25", 1)
    assert sorted(signature.name for signature in OPS) == sorted(SPECIFIED)


@each_op
def test_table_agrees_with_the_specification(signature: OpSignature) -> None:
    wanted = SPECIFIED[signature.name]
    assert tuple((spec.name, spec.dtype) for spec in signature.inputs) == wanted.inputs
    assert tuple((spec.name, spec.dtype) for spec in signature.outputs) == wanted.outputs
    assert tuple((spec.name, spec.kind) for spec in signature.attributes) == wanted.attributes
    assert signature.plugin is wanted.is_plugin


@each_op
def test_overloads_are_every_choice_of_the_type_parameters(signature: OpSignature) -> None:
    overloads = signature.overloads()
    assert len(overloads) == SPECIFIED[signature.name].overloads
    assert len({tuple(sorted(overload.items())) for overload in overloads}) == len(overloads)
    parameters = {dtype for _, dtype in SPECIFIED[signature.name].inputs if dtype.startswith("T")}
    for overload in overloads:
        assert set(overload) == parameters
        assert set(overload.values()) <= {"float32", "bfloat16"}


@each_op
def test_torch_has_the_specified_schema_and_changes_no_input(signature: OpSignature) -> None:
    schema = getattr(torch.ops.k25, signature.folder).default._schema
    assert str(schema) == SPECIFIED[signature.name].torch_schema
    assert f"k25::{signature.torch_schema()}" == SPECIFIED[signature.name].torch_schema
    assert not schema.is_mutable


@each_op
def test_onnx_schema_agrees_with_the_specification(signature: OpSignature) -> None:
    wanted, schema = SPECIFIED[signature.name], onnx_schema(signature)
    assert (schema.domain, schema.name, schema.since_version) == ("k25", signature.name, 1)
    assert [(item.name, item.type_str) for item in schema.inputs] == [
        (name, ONNX_TYPES.get(dtype, dtype)) for name, dtype in wanted.inputs
    ]
    assert [(item.name, item.type_str) for item in schema.outputs] == [
        (name, ONNX_TYPES.get(dtype, dtype)) for name, dtype in wanted.outputs
    ]
    assert {name: item.type for name, item in schema.attributes.items()} == {
        name: ONNX_KINDS[kind] for name, kind in wanted.attributes
    }
    floats = {"tensor(float)", "tensor(bfloat16)"}
    constraints = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    assert constraints == {dtype: floats for _, dtype in wanted.inputs if dtype.startswith("T")}


@each_op
def test_function_body_agrees_with_the_specification(signature: OpSignature) -> None:
    wanted, function = SPECIFIED[signature.name], function_of(signature.name)
    assert function.domain == "k25"
    assert list(function.input) == [name for name, _ in wanted.inputs]
    assert list(function.output) == [name for name, _ in wanted.outputs]
    assert list(function.attribute) == [name for name, _ in wanted.attributes]
    assert {item.domain: item.version for item in function.opset_import} == {"": OPSET, "k25": 1}
    assert OPSET == 21


@each_op
def test_function_body_reads_every_attribute_with_its_kind_at_the_top(signature: OpSignature) -> None:
    # An attribute reference inside a Loop body is not understood everywhere.
    found = {}
    for node, depth in nodes_of(function_of(signature.name).node):
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                assert depth == 0, f"{attribute.ref_attr_name} is referred to inside a subgraph"
                found[attribute.ref_attr_name] = attribute.type
    types = onnx.AttributeProto
    kinds = {"int": types.INT, "float": types.FLOAT, "floats": types.FLOATS}
    assert found == {name: kinds[kind] for name, kind in SPECIFIED[signature.name].attributes}


@each_op
def test_function_body_uses_only_ops_that_every_backend_builds(signature: OpSignature) -> None:
    carried = functions_for([signature.name])
    local = {function.name for function in carried}
    for function in carried:
        for node, _ in nodes_of(function.node):
            if node.domain == "k25":
                assert node.op_type in local, f"{function.name} calls {node.op_type}, which the file does not carry"
                continue
            assert node.domain == ""
            assert onnx.defs.has(node.op_type), node.op_type
            assert node.op_type not in FORBIDDEN_OPS
            if node.op_type == "ScatterND":
                reductions = [item.s for item in node.attribute if item.name == "reduction"]
                assert reductions in ([], [b"none"])
            if node.op_type == "Loop":
                assert node.input[1] == "", "a Loop with a condition gives TensorRT scan outputs of unknown shape"


def test_functions_come_with_what_they_call_callees_first() -> None:
    assert [function.name for function in functions_for(["Linear"])] == ["Linear"]
    names = [function.name for function in functions_for(["MoEDispatch", "MLA"])]
    assert set(names) == {"MoEDispatch", "MLA", "DequantizeInt4"}
    assert names.index("DequantizeInt4") < names.index("MoEDispatch")
    assert functions_for([]) == []


def test_translation_covers_every_operator() -> None:
    expected = {getattr(torch.ops.k25, signature.folder).default for signature in OPS}
    assert set(translation_table()) == expected
    assert set(torch_ops.REFERENCES) == set(SPECIFIED)


def test_columns_of_the_expert_table_are_as_specified() -> None:
    assert (
        tuple(
            (projection, part)
            for projection in ("gate_proj", "up_proj", "down_proj")
            for part in ("weight_packed", "weight_scale")
        )
        == signatures.EXPERT_TABLE_COLUMNS
    )
    assert signatures.REGION_ROW_BYTES == 8


def test_dtype_numbers_and_sizes_are_those_of_onnx() -> None:
    for name, number in signatures.ONNX_DTYPES.items():
        assert number == getattr(onnx.TensorProto, {"float32": "FLOAT"}.get(name, name.upper()))
        assert signatures.ITEM_SIZES[name] == torch.empty(1, dtype=getattr(torch, name)).element_size()


def test_the_table_imports_the_standard_library_only() -> None:
    tree = ast.parse(Path(signatures.__file__).read_text("utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"k25_plugins"}


def test_signatures_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        signatures.MLA.name = "Other"  # type: ignore[misc]


# Shapes and dtypes. One call that fits for each operator; a test changes one thing of it.

MLA_ATTRIBUTES = {
    "num_heads": 5,
    "qk_nope_head_dim": 12,
    "v_head_dim": 28,
    "softmax_scale": 0.2,
    "inv_freq": [1.0, 0.1, 0.01],
}
CALLS: Mapping[str, tuple[dict[str, tuple[list[int], str]], dict[str, Any]]] = {
    "MLA": (
        {
            "q": ([7, 5 * (12 + 6)], "float32"),
            "latent": ([7, 26], "float32"),
            "cache": ([11, 3, 26], "bfloat16"),
            "kv_b": ([5 * (12 + 28), 20], "bfloat16"),
            "positions": ([7], "int32"),
            "query_start": ([3], "int32"),
            "block_table": ([2, 4], "int32"),
        },
        MLA_ATTRIBUTES,
    ),
    "MoEDispatch": (
        {
            "x": ([7, 96], "float32"),
            "expert_ids": ([7, 3], "int32"),
            "expert_weights": ([7, 3], "float32"),
            "words": ([1000, 2], "int32"),
            "scales": ([1000, 4], "bfloat16"),
            "table": ([10, 6], "int64"),
        },
        {"intermediate_size": 64, "group_size": 32},
    ),
    "Linear": ({"x": ([7, 96], "float32"), "weight": ([50, 96], "bfloat16")}, {}),
    "VisionAttention": (
        {"q": ([7, 36], "float32"), "k": ([7, 36], "float32"), "v": ([7, 36], "float32")},
        {"num_heads": 3, "softmax_scale": 0.2},
    ),
    "RMSNorm": ({"x": ([7, 36], "float32"), "weight": ([36], "bfloat16")}, {"eps": 1e-6}),
    "Router": (
        {"logits": ([7, 10], "float32"), "bias": ([10], "float32")},
        {"top_k": 3, "normalise": 1, "scaling_factor": 2.5},
    ),
}
BY_NAME = {signature.name: signature for signature in OPS}


def inferred(name: str, **changes: tuple[list[int], str]) -> list[tuple[tuple[Any, ...], str]]:
    ports, attributes = CALLS[name]
    ports = {**ports, **changes}
    shapes, dtypes = [shape for shape, _ in ports.values()], [dtype for _, dtype in ports.values()]
    return BY_NAME[name].infer_outputs(shapes, dtypes, attributes)


def test_outputs_have_the_specified_shapes_and_dtypes() -> None:
    assert inferred("MLA") == [((7, 140), "float32"), ((11, 3, 26), "bfloat16")]
    assert inferred("MoEDispatch") == [((7, 96), "float32")]
    assert inferred("MoEDispatch", x=([7, 96], "bfloat16")) == [((7, 96), "bfloat16")]
    assert inferred("Linear") == [((7, 50), "float32")]
    assert inferred("Linear", x=([2, 3, 96], "bfloat16")) == [((2, 3, 50), "bfloat16")]
    assert inferred("Linear", x=([96], "float32")) == [((50,), "float32")]
    assert inferred("VisionAttention") == [((7, 36), "float32")]
    assert inferred("RMSNorm") == [((7, 36), "float32")]
    assert inferred("RMSNorm", x=([2, 3, 36], "bfloat16")) == [((2, 3, 36), "bfloat16")]
    assert inferred("RMSNorm", x=([36], "float32")) == [((36,), "float32")]
    assert inferred("Router") == [((7, 3), "int32"), ((7, 3), "float32")]


@pytest.mark.parametrize(("t", "tc"), [(t, tc) for t in ("float32", "bfloat16") for tc in ("float32", "bfloat16")])
def test_activation_and_cache_dtypes_are_independent(t: str, tc: str) -> None:
    found = inferred("MLA", q=([7, 90], t), latent=([7, 26], t), cache=([11, 3, 26], tc))
    assert [dtype for _, dtype in found] == [t, tc]


WRONG_DTYPES = [
    (name, port, "float16" if dtype in ("float32", "bfloat16") else "float32")
    for name, (ports, _) in CALLS.items()
    for port, (_, dtype) in ports.items()
] + [
    ("MLA", "latent", "bfloat16"),  # q is float32, and both are T
    ("MLA", "kv_b", "float32"),
    ("MLA", "positions", "int64"),
    ("MLA", "query_start", "int64"),
    ("MLA", "block_table", "int64"),
    ("MLA", "cache", "int32"),
    ("MoEDispatch", "expert_ids", "int64"),
    ("MoEDispatch", "expert_weights", "bfloat16"),
    ("MoEDispatch", "scales", "float32"),
    ("MoEDispatch", "table", "int32"),
    ("Linear", "weight", "float32"),
    ("RMSNorm", "weight", "float32"),
    ("Router", "logits", "bfloat16"),
    ("Router", "bias", "bfloat16"),
]


@pytest.mark.parametrize(("name", "port", "dtype"), WRONG_DTYPES)
def test_a_wrong_dtype_is_refused(name: str, port: str, dtype: str) -> None:
    shape, right = CALLS[name][0][port]
    with pytest.raises(InputError) as caught:
        inferred(name, **{port: (shape, dtype)})
    message = str(caught.value)
    for part in (f"k25.{name}", port, "expected", right, "found", dtype):
        assert part in message, (part, message)


@pytest.mark.parametrize(
    ("name", "port"), [(name, port) for name, (ports, _) in CALLS.items() for port in ports if port != "x"]
)
def test_a_wrong_rank_is_refused(name: str, port: str) -> None:
    shape, dtype = CALLS[name][0][port]
    for wrong in ([*shape, 1], shape[:-1]):
        with pytest.raises(InputError) as caught:
            inferred(name, **{port: (wrong, dtype)})
        message = str(caught.value)
        for part in (f"k25.{name}", port, "expected", "found", str(wrong)):
            assert part in message, (part, message)


@pytest.mark.parametrize(
    ("name", "wrong"), [("MoEDispatch", [7, 96, 1]), ("MoEDispatch", [7]), ("Linear", []), ("RMSNorm", [])]
)
def test_a_wrong_rank_of_x_is_refused(name: str, wrong: list[int]) -> None:
    with pytest.raises(InputError, match=rf"k25\.{name}.*\bx\b.*expected.*found"):
        inferred(name, x=(wrong, "float32"))


# (op, input whose size is changed, axis, input that must be named, expected, found)
WRONG_SIZES = [
    ("MLA", "q", 1, "q", 90, 91),
    ("MLA", "latent", 0, "latent", 7, 8),
    ("MLA", "kv_b", 0, "kv_b", 200, 201),
    ("MLA", "kv_b", 1, "kv_b", 20, 21),
    ("MLA", "positions", 0, "positions", 7, 8),
    ("MLA", "query_start", 0, "query_start", 3, 4),
    ("MoEDispatch", "expert_ids", 0, "expert_ids", 7, 8),
    ("MoEDispatch", "expert_weights", 0, "expert_weights", 7, 8),
    ("MoEDispatch", "expert_weights", 1, "expert_weights", 3, 4),
    ("MoEDispatch", "words", 1, "words", 2, 3),
    ("MoEDispatch", "scales", 0, "scales", 1000, 1001),
    ("MoEDispatch", "scales", 1, "scales", 4, 5),
    ("MoEDispatch", "table", 1, "table", 6, 7),
    ("Linear", "weight", 1, "weight", 96, 97),
    ("VisionAttention", "k", 0, "k", 7, 8),
    ("VisionAttention", "v", 0, "v", 7, 8),
    ("VisionAttention", "q", 1, "q", 36, 37),
    ("VisionAttention", "v", 1, "v", 36, 37),
    ("RMSNorm", "weight", 0, "weight", 36, 37),
    ("RMSNorm", "x", 1, "weight", 37, 36),
    ("Router", "bias", 0, "bias", 10, 11),
    ("Router", "logits", 1, "bias", 11, 10),
]


@pytest.mark.parametrize(("name", "port", "axis", "named", "expected", "found"), WRONG_SIZES)
def test_a_wrong_size_is_refused(name: str, port: str, axis: int, named: str, expected: int, found: int) -> None:
    shape, dtype = CALLS[name][0][port]
    wrong = [size + 1 if index == axis else size for index, size in enumerate(shape)]
    with pytest.raises(InputError) as caught:
        inferred(name, **{port: (wrong, dtype)})
    message = str(caught.value)
    for part in (f"k25.{name}", f"input {named}", f"expected {expected}", f"found {found}"):
        assert part in message, (part, message)


@pytest.mark.parametrize(
    "changes", [{"num_heads": 4}, {"qk_nope_head_dim": 13}, {"v_head_dim": 27}, {"inv_freq": [1.0]}]
)
def test_attributes_that_do_not_fit_the_sizes_are_refused(changes: dict[str, Any]) -> None:
    ports = CALLS["MLA"][0]
    with pytest.raises(InputError, match=r"k25\.MLA: input .* expected .* found"):
        BY_NAME["MLA"].infer_outputs(
            [shape for shape, _ in ports.values()],
            [dtype for _, dtype in ports.values()],
            {**MLA_ATTRIBUTES, **changes},
        )


@pytest.mark.parametrize("top_k", [-1, 0, 11])
def test_a_choice_of_no_or_too_many_experts_is_refused(top_k: int) -> None:
    ports, attributes = CALLS["Router"]
    shapes, dtypes = [shape for shape, _ in ports.values()], [dtype for _, dtype in ports.values()]
    with pytest.raises(InputError) as caught:
        BY_NAME["Router"].infer_outputs(shapes, dtypes, {**attributes, "top_k": top_k})
    message = str(caught.value)
    for part in ("k25.Router", "attribute top_k", "expected 1 to the 10 experts", f"found {top_k}"):
        assert part in message, (part, message)


@each_op
def test_a_missing_input_is_refused(signature: OpSignature) -> None:
    ports, attributes = CALLS[signature.name]
    shapes, dtypes = [shape for shape, _ in ports.values()][:-1], [dtype for _, dtype in ports.values()][:-1]
    with pytest.raises(InputError, match=f"expected {len(ports)} inputs, found {len(ports) - 1}"):
        signature.infer_outputs(shapes, dtypes, attributes)
