"""Prefixes of a graph: everything up to one node, with only the tensors that are still needed there as outputs.

A cut is a node index; the *frontier* of a cut is what the nodes up to it compute and later nodes (or the graph's
outputs) read. Whatever goes wrong before a cut leaves through its frontier, so a prefix whose frontier is right is
right, and the first diverging op is found with a number of runs that is logarithmic in the number of ops.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place in the graph: after node `node`; `outputs` are the frontier's tensors that have a known value."""

    node: int
    outputs: tuple[str, ...]


def node_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor that a node reads, those captured by its subgraphs included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            inner = {value.name for value in graph.input}
            for child in graph.node:
                yield from (name for name in node_reads(child) if name not in inner)
                inner.update(child.output)
            yield from (value.name for value in graph.output if value.name not in inner)


class StraightGraph:
    """A model's main graph, read as a list of nodes in topological order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.producers = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.constants = {tensor.name for tensor in model.graph.initializer}

    @cached_property
    def element_types(self) -> Mapping[str, int]:
        """ONNX element type of every tensor that shape inference knows."""
        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        return types | {tensor.name: tensor.data_type for tensor in self.model.graph.initializer}

    def variable_tensors(self, weights: Collection[str]) -> set[str]:
        """The tensors that depend on an input which is no weight."""
        found = {value.name for value in self.model.graph.input} - set(weights) - self.constants
        for node in self.nodes:
            if any(name in found for name in node_reads(node)):
                found.update(name for name in node.output if name)
        return found

    def cuts(self, known: Collection[str], *, weights: Collection[str]) -> list[Cut]:
        """Every place whose frontier holds no float of unknown value, in order; the last is the whole graph."""
        variable = self.variable_tensors(weights)
        last_read = {name: index for index, node in enumerate(self.nodes) for name in node_reads(node)}
        outputs = {value.name for value in self.model.graph.output}
        found = []
        for index in range(len(self.nodes)):
            frontier = [
                name
                for name, made in self.producers.items()
                if made <= index and name in variable and (last_read.get(name, -1) > index or name in outputs)
            ]
            unknown = [name for name in frontier if name not in known and self.element_types.get(name, 1) in _FLOATS]
            shown = tuple(name for name in frontier if name in known)
            if shown and not unknown:
                found.append(Cut(node=index, outputs=shown))
        return found

    def needed_nodes(self, outputs: Iterable[str], given: Collection[str] = ()) -> list[int]:
        """The nodes that these tensors depend on, in order; what makes a tensor of `given` is left out."""
        wanted, needed = set(outputs), []
        for index in range(len(self.nodes) - 1, -1, -1):
            if any(name in wanted for name in self.nodes[index].output):
                needed.append(index)
                wanted.update(name for name in node_reads(self.nodes[index]) if name not in given)
        return needed[::-1]

    def prefix(self, outputs: Iterable[str]) -> onnx.ModelProto:
        """The smallest model that computes these tensors."""
        return self.segment(outputs, ())

    def segment(self, outputs: Iterable[str], given: Collection[str]) -> onnx.ModelProto:
        """The smallest model that computes these tensors from the graph's inputs and the tensors of `given`."""
        names = list(dict.fromkeys(outputs))
        return self._model([self.nodes[index] for index in self.needed_nodes(names, given)], names)

    def _model(self, nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.ClearField("graph")
        model.graph.name = self.model.graph.name or "prefix"
        model.graph.node.extend(nodes)
        made = {name for node in nodes for name in node.output}
        reads = dict.fromkeys(name for node in nodes for name in node_reads(node) if name not in made)
        inputs = {value.name: value for value in self.model.graph.input}
        for name in reads:
            if name in self.constants:
                tensor = next(tensor for tensor in self.model.graph.initializer if tensor.name == name)
                model.graph.initializer.append(tensor)
            elif name in inputs:
                model.graph.input.append(inputs[name])
            else:
                model.graph.input.append(self._value(name))
        model.graph.output.extend(self._value(name) for name in outputs)
        return with_needed_functions(model)

    def _value(self, name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, self.element_types.get(name, 1), None)


def with_needed_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the functions that nothing calls."""
    functions = {(function.domain, function.name): function for function in model.functions}
    wanted: set[tuple[str, str]] = set()
    pending = list(model.graph.node)
    while pending:
        node = pending.pop()
        for attribute in node.attribute:
            if attribute.type in (5, 10):
                pending.extend(child for graph in (attribute.g, *attribute.graphs) for child in graph.node)
        key = (node.domain, node.op_type)
        if key in functions and key not in wanted:
            wanted.add(key)
            pending.extend(functions[key].node)
    for index in range(len(model.functions) - 1, -1, -1):
        if (model.functions[index].domain, model.functions[index].name) not in wanted:
            del model.functions[index]
    return model


def function_of(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.FunctionProto | None:
    """The body of a node's op in this file, if it has one."""
    return next(
        (found for found in model.functions if (found.domain, found.name) == (node.domain, node.op_type)),
        None,
    )


def body_model(
    model: onnx.ModelProto, node: onnx.NodeProto, types: Mapping[str, int], attributes: Mapping[str, object]
) -> onnx.ModelProto:
    """The body of a node's op as a main graph; inputs are named as the function names them.

    `types` gives the element type of each formal input, `attributes` what the body's references stand for.
    """
    function = function_of(model, node)
    assert function is not None
    body = onnx.ModelProto(ir_version=model.ir_version)
    body.opset_import.extend(model.opset_import)
    body.functions.extend(model.functions)
    body.graph.name = node.op_type
    for inner in function.node:
        copied = body.graph.node.add()
        copied.CopyFrom(inner)
        for attribute in copied.attribute:
            if attribute.ref_attr_name:
                attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, attributes[attribute.ref_attr_name]))
    for name in function.input:
        body.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    inferred = StraightGraph(body).element_types
    for name in function.output:
        element_type = inferred.get(name, onnx.TensorProto.FLOAT)
        body.graph.output.append(onnx.helper.make_tensor_value_info(name, element_type, None))
    return with_needed_functions(body)


def iteration_model(graph: StraightGraph, loop: int) -> onnx.ModelProto:
    """One turn of a Loop as a straight graph: its number is the input `index`, carried values are inputs too."""
    node = graph.nodes[loop]
    inner = next(attribute.g for attribute in node.attribute if attribute.name == "body")
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.node[loop:]
    model.graph.node.extend(inner.node)
    number, _, *carried = (value.name for value in inner.input)
    model.graph.input.append(onnx.helper.make_tensor_value_info(number, onnx.TensorProto.INT64, ()))
    for name in carried:
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    _set_outputs(model, [value.name for value in inner.output[1:]])
    return with_needed_functions(model)


def branch_model(graph: StraightGraph, condition: int) -> onnx.ModelProto:
    """A graph that ends in an If, with the nodes of its then-branch in its place."""
    inner = next(attribute.g for attribute in graph.nodes[condition].attribute if attribute.name == "then_branch")
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.node[condition:]
    model.graph.node.extend(inner.node)
    _set_outputs(model, [value.name for value in inner.output])
    return with_needed_functions(model)


def _set_outputs(model: onnx.ModelProto, names: Iterable[str]) -> None:
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
