"""Runs a graph, or a piece of one, on the backend that is judged, with the weights of one component instance bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx

from k25_plugins.errors import K25Error
from k25_plugins.signatures import ONNX_DTYPES
from k25_runtime.backend import Backend
from k25_runtime.host_tensor import HostTensor

Array = npt.NDArray[Any]
_DTYPE_NAMES = {number: name for name, number in ONNX_DTYPES.items()}


class ComponentProbe:
    """Counts its runs; `shapes` are those that outputs are expected to have."""

    def __init__(self, backend: Backend, weights: Mapping[str, HostTensor], *, label: str) -> None:
        self._backend = backend
        self._weights = weights
        self._label = label
        self.runs = 0

    def run(
        self,
        model: onnx.ModelProto,
        feeds: Mapping[str, HostTensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Array]:
        """Load the model, run it once and return its outputs, bfloat16 as float32.

        Raises `K25Error` where the backend refuses, for example because an output has another shape.
        """
        self.runs += 1
        wanted = [value.name for value in model.graph.input]
        missing = [name for name in wanted if name not in self._weights and name not in feeds]
        if missing:
            raise K25Error(f"{self._label}: the prefix reads {missing[0]}, which nobody feeds")
        component = self._backend.load(model.SerializeToString(), label=self._label)
        instance = component.bind({name: self._weights[name] for name in wanted if name in self._weights})
        outputs = {
            value.name: self._backend.empty(shapes[value.name], _dtype_of(value)) for value in model.graph.output
        }
        buffer = self._backend.buffer
        instance.run(
            {name: buffer(feeds[name]) for name in wanted if name not in self._weights},
            {name: buffer(tensor) for name, tensor in outputs.items()},
        )
        return {name: _values(self._backend.host(tensor)) for name, tensor in outputs.items()}


def _dtype_of(value: onnx.ValueInfoProto) -> str:
    return _DTYPE_NAMES.get(value.type.tensor_type.elem_type, "float32")


def _values(tensor: HostTensor) -> Array:
    return tensor.to_float32() if tensor.dtype == "bfloat16" else tensor.array
