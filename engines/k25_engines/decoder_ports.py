"""The names and ports of the fused decoder, from the manifest alone."""

from __future__ import annotations

from k25_engines.manifest import DECODER
from k25_export.manifest import ComponentEntry, Manifest, Port
from k25_plugins.errors import mismatch

CHAIN_INPUT = "hidden"
CHAIN_OUTPUT = "hidden_out"

#: Inputs that have one value for all layers and keep their name in the decoder.
SHARED_INPUTS = frozenset(("positions", "query_start", "block_table", "residual_share"))


def layer_name(layer: int, name: str) -> str:
    """The name in the decoder of an input or output of a layer; `hidden` and `hidden_out` are the ends of the chain."""
    return name if name in SHARED_INPUTS else f"layers.{layer}.{name}"


def decoder_components(manifest: Manifest) -> tuple[ComponentEntry, ...]:
    """For each layer, in order, the component it is an instance of."""
    by_layer = {layer: entry for entry in manifest.components for layer in entry.layers or ()}
    if sorted(by_layer) != list(range(len(by_layer))) or not by_layer:
        raise mismatch(f"bundle: {DECODER}", expected="layers 0, 1, 2, ...", found=sorted(by_layer))
    return tuple(by_layer[layer] for layer in range(len(by_layer)))


def decoder_ports(layers: tuple[ComponentEntry, ...], precision: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of the decoder, in its graph's order."""
    inputs: dict[str, Port] = {}
    outputs: dict[str, Port] = {}
    for number, component in enumerate(layers):
        file = component.file(precision)
        for port in file.inputs:
            if port.name == CHAIN_INPUT:
                if number == 0:
                    inputs[CHAIN_INPUT] = port
                continue
            name = layer_name(number, port.name)
            inputs.setdefault(name, Port(name=name, dtype=port.dtype, shape=port.shape))
        for port in file.outputs:
            if port.name == CHAIN_OUTPUT:
                if number == len(layers) - 1:
                    outputs[CHAIN_OUTPUT] = port
                continue
            name = layer_name(number, port.name)
            outputs[name] = Port(name=name, dtype=port.dtype, shape=port.shape)
    return tuple(inputs.values()), tuple(outputs.values())
