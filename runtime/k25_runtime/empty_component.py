"""Graphs with a component's inputs and outputs that do hardly anything: a step of them is the runtime's own time.

Written as ONNX by hand (field numbers of onnx.proto3), since the runtime has no onnx.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

from k25_export.manifest import ComponentEntry, ComponentFile, Port, Precision
from k25_plugins.signatures import ITEM_SIZES, ONNX_DTYPES
from k25_runtime.onnxruntime_cpu import OnnxRuntimeComponent, OnnxRuntimeCpu

_OPSET, _IR_VERSION = 21, 10


class EmptyComponents(OnnxRuntimeCpu):
    """The CPU backend with every component emptied; weights are bound as ever."""

    def component(self, bundle: Path, entry: ComponentEntry, precision: Precision) -> OnnxRuntimeComponent:
        """The emptied graph of a component."""
        return self.load(empty_component(entry.file(precision)), label=f"empty component {entry.name}")


def empty_component(file: ComponentFile) -> bytes:
    """The same inputs and outputs; `hidden` is passed on, the cache is not written, the rest is one row of zeros."""
    nodes: list[bytes] = []
    constants: list[bytes] = []
    for port in file.outputs:
        if port.name == "cache_out":  # a scatter of nothing, in place
            constants.append(_tensor("no_rows", "int64", (0, 2)))
            constants.append(_tensor("nothing", port.dtype, (0, _size(port, -1))))
            nodes.append(_node("ScatterND", ("cache", "no_rows", "nothing"), port.name))
        elif port.name == "hidden_out":
            nodes.append(_node("Identity", ("hidden",), port.name))
        else:
            constants.append(_tensor(f"zero_{port.name}", port.dtype, (1, _size(port, -1))))
            nodes.append(_node("Identity", (f"zero_{port.name}",), port.name))
    graph = b"".join(
        (
            *(_bytes(1, node) for node in nodes),
            _bytes(2, b"empty"),
            *(_bytes(5, constant) for constant in constants),
            *(_bytes(11, _value_info(port)) for port in file.inputs),
            *(_bytes(12, _value_info(port)) for port in file.outputs),
        )
    )
    opset = _bytes(1, b"") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, opset)


def _size(port: Port, axis: int) -> int:
    size = port.shape[axis]
    assert isinstance(size, int), port
    return size


def _node(op: str, inputs: Sequence[str], output: str) -> bytes:
    return b"".join(_bytes(1, name.encode()) for name in inputs) + _bytes(2, output.encode()) + _bytes(4, op.encode())


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Zeros."""
    dims = b"".join(_number(1, size) for size in shape)
    return (
        dims
        + _number(2, ONNX_DTYPES[dtype])
        + _bytes(8, name.encode())
        + _bytes(9, bytes(math.prod(shape) * ITEM_SIZES[dtype]))
    )


def _value_info(port: Port) -> bytes:
    dims = (_number(1, size) if isinstance(size, int) else _bytes(2, size.encode()) for size in port.shape)
    shape = b"".join(_bytes(1, dim) for dim in dims)
    tensor_type = _number(1, ONNX_DTYPES[port.dtype]) + _bytes(2, shape)
    return _bytes(1, port.name.encode()) + _bytes(2, _bytes(1, tensor_type))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = []
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return struct.pack(f"{len(found) + 1}B", *found, value)
