"""Tell TensorRT which nodes are plugins."""

from __future__ import annotations

import onnx_ir as ir

from k25_plugins.signatures import DOMAIN, OPS

PLUGIN_OPS = frozenset(signature.name for signature in OPS if signature.plugin)


def mark_plugins(model: ir.Model) -> None:
    """Add `plugin_namespace` to the nodes that have a plugin; without it TensorRT prefers the function body.

    ONNX Runtime ignores the attribute.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == DOMAIN and node.op_type in PLUGIN_OPS:
            node.attributes.add(ir.AttrString("plugin_namespace", DOMAIN))
