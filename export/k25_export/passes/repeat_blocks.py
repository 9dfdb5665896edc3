"""A stack of equal blocks is traced with two of them, and the second is repeated.

Tracing costs time and memory for every node; the blocks of a stack differ in their weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

#: Blocks to trace: one could not show where it begins and ends, and that the next one is the same.
TRACED_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class BlockStack:
    """`count` blocks whose weights are named `<prefix><index>.<name>`."""

    prefix: str
    count: int

    @property
    def traced(self) -> int:
        """Blocks that the traced module has."""
        return min(self.count, TRACED_BLOCKS)

    def weight(self, index: int) -> str:
        """What the names of the weights of block `index` start with."""
        return f"{self.prefix}{index}."


def repeat_blocks(graph: onnx.GraphProto, stack: BlockStack) -> None:
    """Repeat the second block of the graph until there are `stack.count` blocks.

    Needs: nodes in the order of the blocks, each block reading one value of the one before; weights are graph inputs.
    Checks: both traced blocks are the same, node by node, but for weights and that one value.
    Guarantees: the graph that tracing all blocks gives, but for the names of values inside blocks.
    """
    if stack.count <= TRACED_BLOCKS:
        return
    first, second = (_first_reader(graph, stack.weight(index)) for index in range(TRACED_BLOCKS))
    length = second - first
    one, two = list(graph.node[first:second]), list(graph.node[second : second + length])
    entry, leaving = _carried_values(one, two, stack)
    inner = {name for node in two for name in node.output}
    copies, previous = [], leaving
    for index in range(TRACED_BLOCKS, stack.count):
        renamed = {name: f"{name}.{index}" for name in inner} | {entry: previous}
        copies += [_copied(node, renamed, stack, index) for node in two]
        graph.value_info.extend(
            _renamed_value(value, renamed[value.name]) for value in list(graph.value_info) if value.name in inner
        )
        previous = renamed[leaving]
    rest = [_copied(node, {leaving: previous}, stack, 1) for node in graph.node[second + length :]]
    kept = [*graph.node[: second + length], *copies, *rest]
    del graph.node[:]
    graph.node.extend(kept)
    _repeat_inputs(graph, stack)


def _first_reader(graph: onnx.GraphProto, weights: str) -> int:
    return next(index for index, node in enumerate(graph.node) if any(name.startswith(weights) for name in node.input))


def _carried_values(one: list[onnx.NodeProto], two: list[onnx.NodeProto], stack: BlockStack) -> tuple[str, str]:
    """The value that block 1 reads from block 0, and the one that it hands on; asserts that the blocks are the same."""
    same: dict[str, str] = {}
    outputs = {name for node in one for name in node.output}
    carried: set[tuple[str, str]] = set()
    for left, right in zip(one, two, strict=True):
        assert (left.domain, left.op_type) == (right.domain, right.op_type), f"{left.name} and {right.name} differ"
        assert list(left.attribute) == list(right.attribute), f"attributes of {left.name} and {right.name} differ"
        assert len(left.input) == len(right.input)
        for a, b in zip(left.input, right.input, strict=True):
            if a.startswith(stack.weight(0)):
                assert b == stack.weight(1) + a.removeprefix(stack.weight(0)), f"{right.name} reads {b}"
            elif a in same:
                assert b == same[a], f"{right.name} reads {b}"
            elif a != b:
                assert b in outputs, f"{right.name} reads {b}"
                carried.add((a, b))
        same |= dict(zip(left.output, right.output, strict=True))
    assert len(carried) == 1, f"a block reads {len(carried)} values of the one before"
    ((_, entry),) = carried
    return entry, same[entry]


def _copied(node: onnx.NodeProto, renamed: dict[str, str], stack: BlockStack, index: int) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    own, other = stack.weight(1), stack.weight(index)
    copy.input[:] = [
        other + name.removeprefix(own) if name.startswith(own) else renamed.get(name, name) for name in node.input
    ]
    copy.output[:] = [renamed.get(name, name) for name in node.output]
    if node.name and index != 1:
        copy.name = f"{node.name}.{index}"
    return copy


def _renamed_value(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _repeat_inputs(graph: onnx.GraphProto, stack: BlockStack) -> None:
    own = stack.weight(1)
    last = max(index for index, value in enumerate(graph.input) if value.name.startswith(own))
    added = [
        _renamed_value(value, stack.weight(index) + value.name.removeprefix(own))
        for index in range(TRACED_BLOCKS, stack.count)
        for value in graph.input
        if value.name.startswith(own)
    ]
    inputs = [*graph.input[: last + 1], *added, *graph.input[last + 1 :]]
    del graph.input[:]
    graph.input.extend(inputs)
