"""The device side of a backend: its memory, its one stream, transfers, and what is to be freed when it is safe."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from k25_plugins.errors import K25Error
from k25_runtime.device import ALIGNMENT, Bytes, Device, DeviceContext, DeviceEngine, DeviceError, Shape
from k25_runtime.device_memory import DeviceBlock, DeviceCache, DeviceTensor, MemoryPool, tensor_bytes
from k25_runtime.engine_instance import BoundContext, ContextKey
from k25_runtime.engine_step import StepGraphs
from k25_runtime.engine_weights import WeightLoader
from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor

DEFAULT_STAGING_BYTES = 4 << 20

Contexts = dict[ContextKey, BoundContext]


class EngineSession:
    """Owns everything on a device. What is dropped is freed at the start of the next call, never within one."""

    def __init__(
        self,
        device: Device,
        *,
        graphs: int,
        buffers: int,
        buffer_bytes: int,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        """Takes over the device: `close` closes it, also where this fails."""
        self.device = device
        self._pools = (MemoryPool(device), MemoryPool(device))
        self.graphs = StepGraphs(device, limit=graphs)
        self.scratch = (0, 0)
        self.contexts = 0
        self.swapped: list[DeviceCache] = []
        self.is_capturing = False
        self._engines: list[DeviceEngine] = []
        self._contexts: list[Contexts] = []
        self._discarded: deque[int | Contexts] = deque()
        self._allocated: set[int] = set()
        self._is_staged = False
        self.is_closed = False
        self.stream: Any = None
        self._event: Any = None
        self._staging: Bytes | None = None
        self._loader: WeightLoader | None = None
        try:
            self.stream = device.create_stream()
            self._event = device.create_event()
            self._staging = device.allocate_pinned(staging_bytes)
            self._loader = WeightLoader(device, buffers=buffers, buffer_bytes=buffer_bytes)
        except BaseException:
            self.close()
            raise

    # Memory.

    @property
    def pool(self) -> MemoryPool:
        """Where activations come from. Captured steps have a pool of their own: a replay writes what it wrote before,
        and that must be nobody's who holds a tensor from one step to another.
        """
        return self._pools[1 if self.contexts else 0]

    def require_open(self) -> None:
        """Raise `K25Error` after `close`."""
        if self.is_closed:
            raise K25Error("backend tensorrt: expected one that is open, found one that was closed")

    def block(self, size: int) -> DeviceBlock:
        """Memory of its own, undefined; freed some time after it is dropped."""
        self.require_open()
        address = self.device.allocate(max(size, ALIGNMENT))
        self._allocated.add(address)
        return DeviceBlock(address, size, lambda freed, _: self._discarded.append(freed))

    def cache(self, shape: Shape, dtype: str) -> DeviceCache:
        """A latent cache of zeros; so is its second one, if it gets one."""

        def zeroed(size: int) -> DeviceBlock:
            block = self.block(size)
            self.device.fill_zero(block.address, size, self.stream)
            return block

        return DeviceCache(shape, dtype, zeroed(tensor_bytes(shape, dtype)), zeroed)

    def require_scratch(self, size: int) -> None:
        """Scratch memory that all contexts share, since they run one after the other."""
        address, have = self.scratch
        if size <= have:
            return
        self._drop_contexts(self._contexts)
        if have:
            self._free(address)
        self.scratch = (0, 0)
        self.scratch = (self.device.allocate(size), size)
        self._allocated.add(self.scratch[0])

    def drain(self) -> None:
        """Free what was dropped since. Graphs go too: they may hold its addresses."""
        if not self._discarded or self.is_closed:
            return
        self.device.synchronize(self.stream)
        discarded = [self._discarded.popleft() for _ in range(len(self._discarded))]
        self._drop_contexts([item for item in discarded if isinstance(item, dict)])
        for item in discarded:
            if isinstance(item, dict):
                self._contexts = [contexts for contexts in self._contexts if contexts is not item]
            else:
                self._free(item)

    # Engines.

    def add_engine(self, engine: DeviceEngine) -> None:
        """Close it with the session."""
        self._engines.append(engine)

    def new_contexts(self) -> Contexts:
        """The place for an instance's contexts."""
        self._contexts.append({})
        return self._contexts[-1]

    def discard_contexts(self, contexts: Contexts) -> None:
        """Close an instance's contexts when it is safe."""
        self._discarded.append(contexts)

    def close_contexts_of(self, steps: Iterable[int]) -> None:
        """Close the contexts of captured steps that are gone."""
        gone = set(steps)
        for contexts in self._contexts:
            for key in [key for key in contexts if key[1] in gone]:
                contexts.pop(key).context.close()

    def enqueue(self, context: DeviceContext, label: str) -> None:
        """Run a context on the stream."""
        if self.is_capturing and not context.is_capturable(self.stream):
            raise DeviceError(f"{label}: TensorRT says that this execution cannot be captured")
        try:
            context.enqueue(self.stream)
        except DeviceError as error:
            raise DeviceError(f"{label}: {error}") from error

    # Transfers.

    def load(self, copies: Iterable[tuple[int, Bytes]]) -> None:
        """Copy weights into blocks; done when it returns."""
        assert self._loader is not None
        self._loader.load(copies)

    def upload(self, address: int, source: Bytes) -> None:
        """Copy a few bytes on the stream; the source may change at once."""
        assert self._staging is not None
        for start in range(0, len(source), len(self._staging)):
            part = source[start : start + len(self._staging)]
            if self._is_staged:
                self.device.synchronize_event(self._event)
            self._staging[: len(part)] = part
            self.device.copy_to_device(address + start, self._staging[: len(part)], self.stream)
            self.device.record(self._event, self.stream)
            self._is_staged = True

    def download(self, tensor: DeviceTensor) -> HostTensor:
        """The tensor in host memory, when everything before it on the stream is done."""
        assert self._staging is not None
        self.synchronize()
        array = np.empty(tensor.shape, STORAGE_DTYPES[tensor.dtype])
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), len(self._staging)):
            part = self._staging[: min(len(self._staging), len(flat) - start)]
            self.device.copy_to_host(part, tensor.address + start, self.stream)
            self.device.synchronize(self.stream)
            flat[start : start + len(part)] = part
        return HostTensor(array, tensor.dtype)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.device.synchronize(self.stream)
        self._is_staged = False

    def close(self) -> None:
        """Free everything and close the device; what was made of it is dead. May be called again."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.stream is not None:
            with suppress(K25Error):  # a failed device is closed like any other
                self.synchronize()
        try:
            if self._loader is not None:
                self._loader.close()
            self._drop_contexts(self._contexts)
            while self._engines:
                self._engines.pop().close()
            for address in tuple(self._allocated):
                self._free(address)
            for pool in self._pools:
                pool.close()
            if self._staging is not None:
                self.device.free_pinned(self._staging)
            if self._event is not None:
                self.device.destroy_event(self._event)
            if self.stream is not None:
                self.device.destroy_stream(self.stream)
        finally:
            self.device.close()

    def _drop_contexts(self, all_contexts: Iterable[Contexts]) -> None:
        """Graphs first: they hold what the contexts own."""
        self.close_contexts_of(self.graphs.clear())
        for contexts in all_contexts:
            while contexts:
                contexts.popitem()[1].context.close()

    def _free(self, address: int) -> None:
        self.device.free(address)
        self._allocated.discard(address)


def bytes_of(tensor: HostTensor) -> Bytes:
    """The tensor's memory as bytes."""
    return np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8)


def packed(tensors: Mapping[str, HostTensor]) -> tuple[Bytes, dict[str, int]]:
    """Small tensors in one buffer, each at a multiple of `ALIGNMENT`, and where each starts."""
    offsets: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        offsets[name] = size
        size += -(-max(tensor.array.nbytes, 1) // ALIGNMENT) * ALIGNMENT
    buffer = np.zeros(size, np.uint8)
    for name, tensor in tensors.items():
        buffer[offsets[name] : offsets[name] + tensor.array.nbytes] = bytes_of(tensor)
    return buffer, offsets
