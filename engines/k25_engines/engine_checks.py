"""What can be checked of an engine without a GPU, beyond that it was built. Each check says what it found.

A function returns its finding in words, or raises `VerificationError` that names component, target and what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from k25_engines.engine_header import HEADER_BYTES, MAGIC, header_from_bytes, require_whole
from k25_engines.targets import TENSORRT_RTX, Target
from k25_export.manifest import Port
from k25_plugins.errors import VerificationError
from k25_plugins.signatures import DOMAIN
from k25_plugins.tensorrt_plugin_rules import PLUGIN_OPS

if TYPE_CHECKING:
    import onnx

    from k25_engines.tensorrt_module import TensorRT

#: An engine holds code, no weights; it grows with what it computes, for which the number of weights stands. The most
#: that was seen is 20 MB for one layer, 0.2 MB for each weight of many layers.
LARGEST_BYTES = 48 << 20
LARGEST_BYTES_OF_A_WEIGHT = 1 << 20
_MALFORMED = 32  # EngineInvalidityDiagnostics.MALFORMED_ENGINE


def plugin_nodes(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each op that is a plugin the graph has."""
    names = {signature.name for signature in PLUGIN_OPS}
    counts = dict.fromkeys(sorted(names), 0)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in names:
            counts[node.op_type] += 1
    return {name: count for name, count in counts.items() if count}


def plugin_fields(model: onnx.ModelProto) -> dict[str, bytes]:
    """What an engine must hold of each plugin node: `op.attribute` and value -> its numbers as in memory."""
    import onnx

    kinds = {(signature.name, spec.name): spec.kind for signature in PLUGIN_OPS for spec in signature.attributes}
    found = {}
    for node in model.graph.node:
        for attribute in node.attribute if node.domain == DOMAIN else ():
            kind = kinds.get((node.op_type, attribute.name))
            if kind is not None:
                value = onnx.helper.get_attribute_value(attribute)
                data = np.array(value, np.int32 if kind == "int" else np.float32).tobytes()
                found[f"{node.op_type}.{attribute.name} = {value}"] = data
    return found


def check_fields(data: bytes, fields: Mapping[str, bytes], *, where: str) -> str:
    """The engine holds the attributes that its plugins will be made from."""
    for label, value in fields.items():
        if value not in data:
            raise _failed(f"{where}: plugin field {label}", "its value in the engine", "other bytes")
    return f"{len(fields)} attributes of plugins are in the engine" if fields else "none, as wanted"


def check_ports(
    tensorrt: TensorRT, network: Any, inputs: Sequence[Port], outputs: Sequence[Port], *, where: str
) -> str:
    """The network has the inputs and outputs of the manifest: names, order, dtypes and shapes."""
    sides = (
        ("input", inputs, [network.get_input(index) for index in range(network.num_inputs)]),
        ("output", outputs, [network.get_output(index) for index in range(network.num_outputs)]),
    )
    for side, ports, tensors in sides:
        wanted = [port.name for port in ports]
        found = [tensor.name for tensor in tensors]
        if wanted != found:
            raise _failed(f"{where}: {side}s", wanted, found)
        for port, tensor in zip(ports, tensors, strict=True):
            shape = tuple(-1 if isinstance(axis, str) else axis for axis in port.shape)
            if tensor.shape is None or tuple(tensor.shape) != shape:
                raise _failed(f"{where}: {side} {port.name}: shape", list(shape), list(tensor.shape))
            if tensorrt.dtype_name(tensor.dtype) != port.dtype:
                raise _failed(f"{where}: {side} {port.name}: dtype", port.dtype, tensorrt.dtype_name(tensor.dtype))
    return f"{len(inputs)} inputs, {len(outputs)} outputs as in the manifest"


def check_weights(tensorrt: TensorRT, network: Any, weights: Mapping[str, str], *, where: str) -> str:
    """Every weight input has the dtype of its bytes in the checkpoint."""
    found = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        found[tensor.name] = tensorrt.dtype_name(tensor.dtype)
    for name, dtype in weights.items():
        if found.get(name) != dtype:
            raise _failed(f"{where}: weight {name}: dtype", dtype, found.get(name, "no such input"))
    return f"{len(weights)} weight inputs have the dtype of the checkpoint"


def check_plugins(trt: Any, network: Any, wanted: Mapping[str, int], *, where: str) -> str:
    """As many plugin layers as plugin nodes: a creator that is missing makes TensorRT take the body, silently."""
    found = sum(network.get_layer(index).type == trt.LayerType.PLUGIN_V3 for index in range(network.num_layers))
    count = sum(wanted.values())
    if found != count:
        raise _failed(f"{where}: plugin layers", f"{count} ({_counted(wanted)})", found)
    return f"{found} plugin layers ({_counted(wanted)})" if count else "none, as wanted"


def check_size(data: bytes, weights: int, *, where: str) -> str:
    """The engine of a graph with so many weight inputs holds none of them."""
    limit = LARGEST_BYTES + LARGEST_BYTES_OF_A_WEIGHT * weights
    if not 0 < len(data) <= limit:
        raise _failed(f"{where}: engine size", f"at most {limit} bytes (weights are inputs)", len(data))
    return f"{len(data)} bytes"


def check_header(tensorrt: TensorRT, runtime: Any, data: bytes, target: Target, *, where: str) -> str:
    """Magic, length, version and target mask of a TensorRT-RTX engine, and what TensorRT itself says of the header."""
    if tensorrt.flavour != TENSORRT_RTX or data[: len(MAGIC)] != MAGIC:
        return "not checked: the header of this flavour or version is not known"
    header = header_from_bytes(data, where=where)
    require_whole(header, data, where=where)
    version = ".".join(map(str, header.version))
    if version != tensorrt.version:
        raise _failed(f"{where}: header: version", tensorrt.version, version)
    if header.targets != (target.name,):
        raise _failed(f"{where}: header: targets", target.name, f"{list(header.targets)} (mask {header.mask})")
    if hasattr(runtime, "get_engine_validity"):
        _, diagnostics = runtime.get_engine_validity(data[:HEADER_BYTES])
        if int(diagnostics) & _MALFORMED:
            raise _failed(f"{where}: header", "one that TensorRT takes", "one that it calls malformed")
    return f"whole, version {version}, mask {header.mask} = {target.name}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{DOMAIN}.{name} x{count}" for name, count in counts.items())


def _failed(where: str, expected: object, found: object) -> VerificationError:
    return VerificationError(f"{where}: expected {expected}, found {found}")
