"""Weights become graph inputs."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir


def lift_weights(model: ir.Model, names: Collection[str]) -> None:
    """Turn the initializers `names` into graph inputs, in the order given, keeping their names.

    Needs: every name is an initializer. Guarantees: no initializer of these names is left, so no weight bytes are.
    """
    graph = model.graph
    for name in names:
        assert name in graph.initializers, f"{name} is no initializer of the traced graph"
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
