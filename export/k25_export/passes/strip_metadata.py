"""Remove what differs from machine to machine: stack traces, paths, producer."""

from __future__ import annotations

import onnx_ir as ir


def strip_metadata(model: ir.Model) -> None:
    """Clear metadata and documentation of the model, graphs, nodes and values.

    Guarantees: the bytes depend on the graph alone (the exporter records absolute paths and class names).
    """
    model.metadata_props.clear()
    model.producer_name = "k25-export"
    model.producer_version = None
    model.doc_string = None
    graph = model.graph
    graph.metadata_props.clear()
    graph.doc_string = None
    graph.name = "component"
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
