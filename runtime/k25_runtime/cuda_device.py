"""A GPU through cuda-python's runtime bindings and TensorRT's Python bindings: each call checked, nothing else.

cuda-python is imported when a device is made; tests give a stand-in with the same functions as `runtime`.
"""

from __future__ import annotations

import ctypes
import importlib
from contextlib import suppress
from typing import Any

import numpy as np

from k25_plugins.errors import BackendMissingError, InputError
from k25_runtime.device import ALIGNMENT, Bytes, DeviceError, Event, Graph, Stream
from k25_runtime.tensorrt_engine import EngineLoader, TensorRTEngine

_DEVICE = 0


class CudaDevice:
    """The first GPU that the process sees (CUDA_VISIBLE_DEVICES chooses)."""

    def __init__(self, loader: EngineLoader, *, runtime: Any = None) -> None:
        """Takes over the loader. Raises `BackendMissingError` where there is no GPU that can be used."""
        self._cuda = importlib.import_module("cuda.bindings.runtime") if runtime is None else runtime
        self._pinned: dict[int, Any] = {}
        try:
            self._check("cudaSetDevice", self._cuda.cudaSetDevice(_DEVICE))
            properties = self._check("cudaGetDeviceProperties", self._cuda.cudaGetDeviceProperties(_DEVICE))
        except DeviceError as error:
            raise BackendMissingError(f"no GPU that can be used here: {error}") from error
        self.name = _text(properties.name)
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self._loader = loader

    # Memory.

    def allocate(self, size: int) -> int:
        """cudaMalloc, which aligns to 256 bytes or more."""
        error, address = _pair(self._cuda.cudaMalloc(size))
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # or the next call would report it again
            free, total = self._check("cudaMemGetInfo", self._cuda.cudaMemGetInfo())
            raise InputError(
                f"{self.name}: expected {size / 2**30:.2f} GiB of free memory, found {free / 2**30:.2f} of "
                f"{total / 2**30:.2f} GiB. Open with a smaller context or fewer sequences; `k25-export plan` tells "
                "what a model takes."
            )
        self._require(error, "cudaMalloc")
        assert int(address) % ALIGNMENT == 0
        return int(address)

    def free(self, address: int) -> None:
        """cudaFree."""
        self._check("cudaFree", self._cuda.cudaFree(address))

    def allocate_pinned(self, size: int) -> Bytes:
        """cudaHostAlloc, seen as an array."""
        address = int(self._check("cudaHostAlloc", self._cuda.cudaHostAlloc(size, self._cuda.cudaHostAllocDefault)))
        buffer = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._pinned[buffer.ctypes.data] = address
        return buffer

    def free_pinned(self, buffer: Bytes) -> None:
        """cudaFreeHost."""
        self._check("cudaFreeHost", self._cuda.cudaFreeHost(self._pinned.pop(buffer.ctypes.data)))

    # Streams and events.

    def create_stream(self) -> Stream:
        """A stream that does not wait for the default stream."""
        flags = self._cuda.cudaStreamNonBlocking
        return self._check("cudaStreamCreateWithFlags", self._cuda.cudaStreamCreateWithFlags(flags))

    def destroy_stream(self, stream: Stream) -> None:
        """cudaStreamDestroy."""
        self._check("cudaStreamDestroy", self._cuda.cudaStreamDestroy(stream))

    def create_event(self) -> Event:
        """An event without a time."""
        flags = self._cuda.cudaEventDisableTiming
        return self._check("cudaEventCreateWithFlags", self._cuda.cudaEventCreateWithFlags(flags))

    def destroy_event(self, event: Event) -> None:
        """cudaEventDestroy."""
        self._check("cudaEventDestroy", self._cuda.cudaEventDestroy(event))

    def record(self, event: Event, stream: Stream) -> None:
        """cudaEventRecord."""
        self._check("cudaEventRecord", self._cuda.cudaEventRecord(event, stream))

    def synchronize_event(self, event: Event) -> None:
        """cudaEventSynchronize."""
        self._check("cudaEventSynchronize", self._cuda.cudaEventSynchronize(event))

    def synchronize(self, stream: Stream) -> None:
        """cudaStreamSynchronize."""
        self._check("cudaStreamSynchronize", self._cuda.cudaStreamSynchronize(stream))

    # Copies.

    def copy_to_device(self, address: int, source: Bytes, stream: Stream) -> None:
        """cudaMemcpyAsync."""
        self._copy(address, source.ctypes.data, len(source), "cudaMemcpyHostToDevice", stream)

    def copy_to_host(self, destination: Bytes, address: int, stream: Stream) -> None:
        """cudaMemcpyAsync."""
        self._copy(destination.ctypes.data, address, len(destination), "cudaMemcpyDeviceToHost", stream)

    def fill_zero(self, address: int, size: int, stream: Stream) -> None:
        """cudaMemsetAsync."""
        self._check("cudaMemsetAsync", self._cuda.cudaMemsetAsync(address, 0, size, stream))

    # Graphs.

    def begin_capture(self, stream: Stream) -> None:
        """In the mode that lets other threads go on."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check("cudaStreamBeginCapture", self._cuda.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Stream) -> Graph:
        """The graph, instantiated."""
        graph = self._check("cudaStreamEndCapture", self._cuda.cudaStreamEndCapture(stream))
        try:
            return self._check("cudaGraphInstantiate", self._cuda.cudaGraphInstantiate(graph, 0))
        finally:
            with suppress(DeviceError):
                self._check("cudaGraphDestroy", self._cuda.cudaGraphDestroy(graph))

    def launch(self, graph: Graph, stream: Stream) -> None:
        """cudaGraphLaunch."""
        self._check("cudaGraphLaunch", self._cuda.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Graph) -> None:
        """cudaGraphExecDestroy."""
        self._check("cudaGraphExecDestroy", self._cuda.cudaGraphExecDestroy(graph))

    # Engines.

    def load_engine(self, data: bytes, *, label: str) -> TensorRTEngine:
        """Deserialise an engine."""
        return self._loader.load(data, label=label)

    def close(self) -> None:
        """Let go of TensorRT; the driver's context stays until the process ends."""
        self._loader.close()

    # Inside.

    def _copy(self, destination: int, source: int, size: int, kind: str, stream: Stream) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        self._check("cudaMemcpyAsync", self._cuda.cudaMemcpyAsync(destination, source, size, direction, stream))

    def _check(self, call: str, result: Any) -> Any:
        """The values of a call, which returns (error, values...)."""
        error, value = _pair(result)
        self._require(error, call)
        return value

    def _require(self, error: Any, call: str) -> None:
        if error == self._cuda.cudaError_t.cudaSuccess:
            return
        _, text = _pair(self._cuda.cudaGetErrorString(error))
        self._cuda.cudaGetLastError()  # a call that failed is reported once
        raise DeviceError(f"{call} failed: {_text(text)}")


def _pair(result: Any) -> tuple[Any, Any]:
    """(error, value): the value is a tuple where there are several, None where there is none."""
    if not isinstance(result, tuple):
        return result, None
    error, *values = result
    return error, values[0] if len(values) == 1 else tuple(values) or None


def _text(value: Any) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else str(value)
