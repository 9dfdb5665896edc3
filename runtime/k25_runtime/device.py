"""What an engine session needs of a GPU: memory, copies, streams, events, graphs and engines.

`cuda_device` is the one that runs; tests give another that checks every call. Addresses are integers in device
memory, streams, events and graphs are opaque. Work on one stream runs in order; work on two streams is ordered by
events only. Nothing but `synchronize`, `synchronize_event` and freeing memory waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import K25Error

Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]
Stream = Any
Event = Any
Graph = Any

#: What allocations are aligned to, and what TensorRT asks of scratch memory.
ALIGNMENT = 256


class DeviceError(K25Error):
    """A call into the driver or into TensorRT failed."""


@dataclass(frozen=True, kw_only=True)
class EnginePort:
    """An input or output as the engine itself describes it; a dynamic axis is -1. `dtype` is a name of ours."""

    name: str
    dtype: str
    shape: Shape
    is_input: bool


class DeviceContext(Protocol):
    """One execution context with one optimisation profile. Its scratch memory is the caller's."""

    def set_address(self, name: str, address: int) -> None:
        """Bind an input or output to device memory."""

    def set_shape(self, name: str, shape: Shape) -> None:
        """The shape of an input for what is enqueued next."""

    def set_scratch(self, address: int, size: int) -> None:
        """Scratch memory, aligned to `ALIGNMENT`; contexts that never run at the same time may share it."""

    def is_capturable(self, stream: Stream) -> bool:
        """Whether `enqueue` can be captured now."""

    def enqueue(self, stream: Stream) -> None:
        """Run; returns before it is done. Raises `DeviceError`."""

    def close(self) -> None:
        """Release it. Graphs that captured it must be gone."""


class DeviceEngine(Protocol):
    """A loaded engine."""

    profiles: int

    @property
    def ports(self) -> Sequence[EnginePort]:
        """Its inputs and outputs."""

    def aliased_input(self, output: str) -> str | None:
        """The input whose memory an output must share, if it must."""

    def profile_shapes(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        """Smallest, usual and largest shape of an input."""

    def scratch_bytes(self, profile: int) -> int:
        """Scratch memory that a context of this profile needs at most."""

    def context(self, profile: int, stream: Stream) -> DeviceContext:
        """A new context; the change to the profile is put on the stream."""

    def close(self) -> None:
        """Release it. Its contexts must be closed."""


class Device(Protocol):
    """One GPU."""

    name: str
    compute_capability: str

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, aligned to `ALIGNMENT`; `InputError` where the memory does not suffice."""

    def free(self, address: int) -> None:
        """Free what `allocate` returned. Nothing that uses it may be pending."""

    def allocate_pinned(self, size: int) -> Bytes:
        """Page-locked host memory [size]."""

    def free_pinned(self, buffer: Bytes) -> None:
        """Free what `allocate_pinned` returned."""

    def create_stream(self) -> Stream:
        """A stream that does not wait for any other."""

    def destroy_stream(self, stream: Stream) -> None:
        """Destroy an idle stream."""

    def create_event(self) -> Event:
        """An event."""

    def destroy_event(self, event: Event) -> None:
        """Destroy it."""

    def record(self, event: Event, stream: Stream) -> None:
        """The event is reached when what is on the stream so far is done."""

    def synchronize_event(self, event: Event) -> None:
        """Wait until a recorded event is reached. Raises `DeviceError` where work before it failed."""

    def synchronize(self, stream: Stream) -> None:
        """Wait for everything on the stream. Raises `DeviceError` where it failed."""

    def copy_to_device(self, address: int, source: Bytes, stream: Stream) -> None:
        """Copy page-locked bytes; they must not change before the copy is done."""

    def copy_to_host(self, destination: Bytes, address: int, stream: Stream) -> None:
        """Copy into page-locked bytes; they are there when the stream is synchronised."""

    def fill_zero(self, address: int, size: int, stream: Stream) -> None:
        """Write zeros."""

    def begin_capture(self, stream: Stream) -> None:
        """What is put on the stream from here is recorded, not run."""

    def end_capture(self, stream: Stream) -> Graph:
        """The graph recorded; `DeviceError` where something in between cannot be captured. Ends it in any case."""

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Run a graph."""

    def destroy_graph(self, graph: Graph) -> None:
        """Destroy a graph that is not running."""

    def load_engine(self, data: bytes, *, label: str) -> DeviceEngine:
        """An engine from its file; `InputError` where TensorRT refuses it. `label` names it in errors."""

    def close(self) -> None:
        """Let go of the GPU."""
