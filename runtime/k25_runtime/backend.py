"""What the runtime needs of a backend: buffers, components and bound instances of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from k25_export.manifest import ComponentEntry, Precision, read_bundle_file
from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor
from k25_runtime.step_limits import StepLimits

#: A function of tensors by name that returns one tensor, or None. It runs instances and does nothing else: a backend
#: may repeat what it ran on tensors of the same shapes (a captured graph, bindings as they are).
Step = Callable[[Mapping[str, Any]], Any]


class Instance(Protocol):
    """A component with the weights of one layer bound."""

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run on buffers of the backend; `outputs` are written. One buffer may be input and output (the cache)."""


class Component(Protocol):
    """A loaded graph."""

    def bind(self, weights: Mapping[str, Any]) -> Instance:
        """Bind the weight inputs once: host tensors, which a backend that does not copy them keeps alive.

        A backend with an `expert_alignment` is given `ScatteredTensor`s as well.
        """


class Backend(Protocol):
    """Loads graphs and owns buffers. A tensor is a `HostTensor`, or whatever else `empty` returns."""

    name: str

    limits: StepLimits

    @property
    def details(self) -> Mapping[str, str]:
        """What a report should say of how components are computed, by topic."""

    @property
    def default_precision(self) -> Precision:
        """The precision that is taken where none is asked for."""

    @property
    def expert_alignment(self) -> int | None:
        """Where a backend that copies weights wants each expert tensor to start; None where they are used in place."""

    def load(self, data: bytes, *, label: str) -> Component:
        """A component from the bytes of an ONNX file. `label` names it in errors."""

    def component(self, bundle: Path, entry: ComponentEntry, precision: Precision) -> Component:
        """Load a component of a bundle. Raises `InputError` where its file cannot be used."""

    def buffer(self, tensor: Any) -> Any:
        """What an instance takes for a tensor: memory of the host as it is, or a copy on the device."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor with undefined content."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer of zeros: a cache. Instances take it as it is."""

    def host(self, tensor: Any) -> HostTensor:
        """The tensor in host memory."""

    def step(self, function: Step, inputs: Mapping[str, HostTensor]) -> HostTensor | None:
        """Run a whole step: a function of tensors, made of instances that run one after the other."""

    def close(self) -> None:
        """Free what the backend holds; nothing of it can be used any more."""


class HostBackend(ABC):
    """What is the same for every backend on host memory: tensors are arrays, weights are used where they are."""

    default_precision: Precision = "fp32"
    expert_alignment: int | None = None
    limits = StepLimits()

    @property
    def details(self) -> dict[str, str]:
        """Nothing to say."""
        return {}

    @abstractmethod
    def load(self, data: bytes, *, label: str) -> Component:
        """A component from the bytes of its ONNX file. `label` names it in errors."""

    @abstractmethod
    def buffer(self, tensor: HostTensor) -> Any:
        """A buffer over the tensor's memory."""

    def component(self, bundle: Path, entry: ComponentEntry, precision: Precision) -> Component:
        """Load the ONNX file of this precision."""
        data = read_bundle_file(bundle, entry.file(precision))
        return self.load(data, label=f"component {entry.name}")

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostTensor:
        """An array."""
        return HostTensor(np.empty(shape, STORAGE_DTYPES[dtype]), dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer over an array whose pages are touched as they are used."""
        return self.buffer(HostTensor(np.zeros(shape, STORAGE_DTYPES[dtype]), dtype))

    def host(self, tensor: HostTensor) -> HostTensor:
        """The tensor itself."""
        return tensor

    def step(self, function: Step, inputs: Mapping[str, HostTensor]) -> HostTensor | None:
        """Call the function."""
        result: HostTensor | None = function(inputs)
        return result

    def close(self) -> None:  # noqa: B027
        """Nothing: sessions go with the objects."""
