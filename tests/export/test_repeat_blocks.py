"""A stack of which two blocks were traced and repeated, against one that was traced whole."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from onnx import numpy_helper
from tests.conftest import Exported

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.component_specs import ComponentSpec, component_specs
from k25_export.config import VisionConfig
from k25_export.modules.vision import Vision
from k25_export.passes.repeat_blocks import BlockStack, repeat_blocks
from k25_export.trace import traced_component_from_spec


@pytest.fixture(scope="module")
def vision(odd: Exported) -> tuple[ComponentSpec, VisionConfig]:
    config = checkpoint_from_folder(odd.checkpoint).config
    assert config.vision is not None
    deep = replace(config.vision, vt_num_hidden_layers=5)
    specs = component_specs(replace(config, vision=deep))
    return next(spec for spec in specs if spec.name == "vision"), deep


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_the_graph_of_all_blocks(vision: tuple[ComponentSpec, VisionConfig], precision: str) -> None:
    spec, config = vision
    whole = replace(spec, stack=None, build=lambda activation: Vision(config))
    repeated = traced_component_from_spec(spec, precision)  # type: ignore[arg-type]
    expected = traced_component_from_spec(whole, precision)  # type: ignore[arg-type]
    assert repeated.inputs == expected.inputs
    assert repeated.outputs == expected.outputs
    left, right = (onnx.load_from_string(item.data).graph for item in (repeated, expected))
    assert [(n.domain, n.op_type, list(n.attribute)) for n in left.node] == [
        (n.domain, n.op_type, list(n.attribute)) for n in right.node
    ]
    values = [
        {item.name: numpy_helper.to_array(item).tolist() for item in graph.initializer} for graph in (left, right)
    ]
    same: dict[str, str] = {}
    for one, other in zip(left.node, right.node, strict=True):
        for name, wanted in zip(one.input, other.input, strict=True):
            if name in values[0]:
                assert values[0][name] == values[1][wanted]
            else:
                assert same.setdefault(name, name) == wanted
        same |= dict(zip(one.output, other.output, strict=True))


def _stack(second_scale: float, carried: str = "x1") -> onnx.GraphProto:
    def node(op: str, inputs: list[str], output: str, **attributes: float) -> onnx.NodeProto:
        return onnx.helper.make_node(op, inputs, [output], name=output, **attributes)

    nodes = [
        node("Gemm", ["x", "b.0.w"], "h0", alpha=1.0),
        node("Relu", ["h0"], "x1"),
        node("Gemm", [carried, "b.1.w"], "h1", alpha=second_scale),
        node("Relu", ["h1"], "x2"),
        node("Neg", ["x2"], "y"),
    ]
    value = onnx.helper.make_tensor_value_info
    ports = [value(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("x", "b.0.w", "b.1.w", "y")]
    return onnx.helper.make_graph(nodes, "g", ports[:3], ports[3:])


def test_the_chain_goes_through_every_copy() -> None:
    graph = _stack(1.0)
    repeat_blocks(graph, BlockStack(prefix="b.", count=4))
    assert [value.name for value in graph.input] == ["x", "b.0.w", "b.1.w", "b.2.w", "b.3.w"]
    reads = [tuple(node.input) for node in graph.node]
    outputs = [node.output[0] for node in graph.node]
    assert reads[4] == ("x2", "b.2.w")
    assert reads[6] == (outputs[5], "b.3.w")
    assert reads[8] == (outputs[7],)
    assert len(set(outputs)) == 9


@pytest.mark.parametrize("graph", [_stack(0.5), _stack(1.0, carried="x")], ids=["another attribute", "nothing carried"])
def test_blocks_that_differ_are_refused(graph: onnx.GraphProto) -> None:
    with pytest.raises(AssertionError):
        repeat_blocks(graph, BlockStack(prefix="b.", count=4))


def test_two_blocks_stay_as_they_are() -> None:
    graph, before = _stack(1.0), _stack(1.0)
    repeat_blocks(graph, BlockStack(prefix="b.", count=2))
    assert graph == before
