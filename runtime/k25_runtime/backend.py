"""What the runtime needs of a backend: buffers, components and bound instances of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from k25_runtime.host_tensor import HostTensor


class Instance(Protocol):
    """A component with the weights of one layer bound."""

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run on buffers of the backend; `outputs` are written. One buffer may be input and output (the cache)."""


class Component(Protocol):
    """A loaded graph."""

    def bind(self, weights: Mapping[str, HostTensor]) -> Instance:
        """Bind the weight inputs once; the tensors must stay alive as long as the instance."""


class Backend(Protocol):
    """Loads graphs and owns buffers."""

    name: str

    def load(self, data: bytes, *, label: str) -> Component:
        """A component from the bytes of its ONNX file. `label` names it in errors."""

    def buffer(self, tensor: HostTensor) -> Any:
        """A buffer over (on a CPU) or holding a copy of (elsewhere) the tensor."""
