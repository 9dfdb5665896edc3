"""All layers of the model as one ONNX graph, put together in memory from the graphs of their components.

A name that layers do not share gets the prefix `layers.<n>.`; `hidden_out` of a layer is the `hidden` of the next.
Constants and function bodies are kept once for each kind of component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx

from k25_engines.decoder_ports import CHAIN_INPUT, CHAIN_OUTPUT, layer_name
from k25_engines.manifest import DECODER
from k25_plugins.errors import mismatch

Rename = Callable[[str], str]


def decoder_from_graphs(graphs: Mapping[str, onnx.ModelProto], layers: Sequence[str]) -> onnx.ModelProto:
    """One model of `layers`: the component of each layer, in order.

    Raises `InputError` where opsets or function bodies differ.
    """
    _require_same_opsets(graphs)
    first = graphs[layers[0]]
    decoder = onnx.ModelProto(
        ir_version=first.ir_version, opset_import=first.opset_import, functions=_functions(graphs)
    )
    graph = decoder.graph
    graph.name = DECODER
    declared: set[str] = set()
    for kind in dict.fromkeys(layers):
        for tensor in graphs[kind].graph.initializer:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = f"{kind}.{tensor.name}"
    for number, kind in enumerate(layers):
        _append_layer(graph, graphs[kind].graph, kind, number, len(layers), declared)
    return decoder


def _append_layer(
    decoder: onnx.GraphProto, layer: onnx.GraphProto, kind: str, number: int, count: int, declared: set[str]
) -> None:
    constants = {tensor.name for tensor in layer.initializer}
    ports = {value.name for value in (*layer.input, *layer.output)}
    last = number == count - 1

    def rename(name: str) -> str:
        if not name:
            return name
        if name in constants:
            return f"{kind}.{name}"
        if name == CHAIN_INPUT:
            return CHAIN_INPUT if number == 0 else f"{layer_name(number - 1, CHAIN_OUTPUT)}.chain"
        if name == CHAIN_OUTPUT:
            return CHAIN_OUTPUT if last else f"{layer_name(number, CHAIN_OUTPUT)}.chain"
        return layer_name(number, name) if name in ports else f"layers.{number}.inner.{name}"

    for value in layer.input:
        name = rename(value.name)
        if name not in declared and (value.name != CHAIN_INPUT or number == 0):
            _add_value(decoder.input, value, name)
            declared.add(name)
    for value in layer.output:
        if value.name != CHAIN_OUTPUT or last:
            _add_value(decoder.output, value, rename(value.name))
    for node in layer.node:
        copy = decoder.node.add()
        copy.CopyFrom(node)
        _rename_node(copy, rename, f"layers.{number}.")


def _rename_node(node: onnx.NodeProto, rename: Rename, prefix: str) -> None:
    node.name = f"{prefix}{node.name}"
    for names in (node.input, node.output):
        names[:] = [rename(name) for name in names]
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                _rename_node(inner, rename, prefix)
            for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
                value.name = rename(value.name)


def _add_value(values: Sequence[onnx.ValueInfoProto], value: onnx.ValueInfoProto, name: str) -> None:
    copy = values.add()  # type: ignore[attr-defined]
    copy.CopyFrom(value)
    copy.name = name


def _functions(graphs: Mapping[str, onnx.ModelProto]) -> list[onnx.FunctionProto]:
    """The function bodies of all graphs, each once, callees first as they stand."""
    found: dict[tuple[str, str], onnx.FunctionProto] = {}
    for kind, model in graphs.items():
        for function in model.functions:
            known = found.setdefault((function.domain, function.name), function)
            if known.SerializeToString(deterministic=True) != function.SerializeToString(deterministic=True):
                where = f"component {kind}: function {function.domain}.{function.name}"
                raise mismatch(where, expected="the body that the other components have", found="another")
    return list(found.values())


def _require_same_opsets(graphs: Mapping[str, onnx.ModelProto]) -> None:
    opsets = {kind: {item.domain: item.version for item in model.opset_import} for kind, model in graphs.items()}
    if len({tuple(sorted(opset.items())) for opset in opsets.values()}) > 1:
        raise mismatch("decoder: opsets", expected="the same in all components", found=opsets)
