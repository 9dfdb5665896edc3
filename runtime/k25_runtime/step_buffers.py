"""Memory that the steps of a runtime use again: a decode step touches the same arrays as the one before it.

What a backend made of an array (an OrtValue, a binding) then stays good, and a step spends its time in the components.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor

#: Larger tensors are made anew: their work outweighs making them, and all layers' would add up (61 layers of a MB are
#: 61 MB; the logits of a real vocabulary, 655 kB, should be kept).
LARGEST_BYTES = 2**20


class StepBuffers:
    """Hands out tensors in the order in which a step asks for them, the same ones in each step of the same shapes.

    They are valid until the next step begins; `begin` and `end` enclose one. Outside of a step every tensor is new.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, HostTensor] = {}
        self._tensors: list[HostTensor] = []
        self._kept: set[int] = set()  # their ids
        self._next: int | None = None
        self._all_are_kept = True

    @property
    def is_repeatable(self) -> bool:
        """Whether every tensor of the step was one that the next of the same shapes gets, too."""
        return self._all_are_kept

    def begin(self, inputs: Mapping[str, HostTensor]) -> dict[str, HostTensor]:
        """The step's inputs, copied into the arrays of the last step's where they fit."""
        self._next = 0
        self._all_are_kept = True
        return {name: self._input(name, tensor) for name, tensor in inputs.items()}

    def end(self, result: HostTensor | None) -> HostTensor | None:
        """The step's result, as the caller's own."""
        self._next = None
        if id(result) in self._kept and result is not None:
            return HostTensor(result.array.copy(), result.dtype)
        return result

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostTensor:
        """A tensor with undefined content."""
        storage = STORAGE_DTYPES[dtype]
        if self._next is None:
            return HostTensor(np.empty(shape, storage), dtype)
        index = self._next
        if index < len(self._tensors):
            tensor = self._tensors[index]
            if tensor.array.shape == shape and tensor.dtype == dtype:
                self._next = index + 1
                return tensor
        tensor = HostTensor(np.empty(shape, storage), dtype)
        if tensor.array.nbytes <= LARGEST_BYTES:
            self._tensors[index : index + 1] = [tensor]
            self._kept = {id(kept) for kept in self._tensors}
            self._next = index + 1
        else:
            self._all_are_kept = False
        return tensor

    def _input(self, name: str, tensor: HostTensor) -> HostTensor:
        kept = self._inputs.get(name)
        if kept is not None and kept.array.shape == tensor.array.shape and kept.dtype == tensor.dtype:
            kept.array[...] = tensor.array
            return kept
        if tensor.array.nbytes > LARGEST_BYTES:
            self._all_are_kept = False
            return tensor
        kept = HostTensor(tensor.array.copy(), tensor.dtype)
        self._inputs[name] = kept
        return kept
