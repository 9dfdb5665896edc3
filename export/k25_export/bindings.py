"""Which tensors of the checkpoint feed which weight inputs of a component."""

from __future__ import annotations

from collections.abc import Iterable

from k25_export.component_specs import ComponentSpec
from k25_export.manifest import Binding
from k25_export.tensor_patterns import EXPERT_PREFIX, POSITION_TABLE, TensorPattern
from k25_plugins.signatures import EXPERT_TABLE_COLUMNS, REGION_ROW_BYTES

EXPERT_TENSORS = tuple(f"{EXPERT_PREFIX}{projection}.{part}" for projection, part in EXPERT_TABLE_COLUMNS)

_REGION = Binding(rule="region", tensors=EXPERT_TENSORS, row_bytes=REGION_ROW_BYTES)
_OFFSETS = Binding(rule="offsets", tensors=EXPERT_TENSORS, row_bytes=REGION_ROW_BYTES)
_EXPERT_BINDINGS = {"expert_words": _REGION, "expert_scales": _REGION, "expert_table": _OFFSETS}


def component_bindings(
    spec: ComponentSpec, input_names: Iterable[str], patterns: Iterable[TensorPattern]
) -> dict[str, Binding]:
    """A binding for every weight input of a component, in the graph's order.

    Guarantees that every input is an activation or bound, and that every tensor pattern of the component is used
    (the `weight_shape` tensors excepted: shapes come from the configuration; and the table of positions, which the
    runtime reads itself). The blocks of the vision tower are one graph, so each has inputs of its own.
    """
    activations = {port.name for port in spec.inputs}
    known = [name for pattern in patterns if pattern.component == spec.name for name in _binding_names(pattern)]
    bindings: dict[str, Binding] = {}
    for name in input_names:
        if name in _EXPERT_BINDINGS:
            bindings[name] = _EXPERT_BINDINGS[name]
        elif name not in activations:
            assert spec.prefix + name in known, f"{spec.name}: input {name} has no tensor in the checkpoint"
            bindings[name] = Binding(tensor=spec.prefix + name)
    used = {binding.tensor for binding in bindings.values()}
    used |= {tensor for binding in bindings.values() for tensor in binding.tensors or ()}
    unused = [name for name in known if name not in used and not name.endswith((".weight_shape", POSITION_TABLE))]
    assert not unused, f"{spec.name}: no input uses {unused}"
    return bindings


def _binding_names(pattern: TensorPattern) -> list[str]:
    """The names that bindings use: `{layer}` and `{expert}` stay, `{block}` is filled in."""
    return list(pattern.names()) if pattern.index_symbol == "block" else [pattern.name]
