"""A GPU that is not one: it checks every call, runs as late as it may, and computes with ONNX Runtime on the CPU.

Work is put off until something waits for it, which is the schedule that punishes a missing synchronisation most.
Memory is filled with NaN when it is allocated, and two streams may touch the same bytes only in an order that an event
or a wait has given them. An "engine" is a JSON text that names an ONNX file.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k25_plugins.errors import InputError
from k25_plugins.signatures import ITEM_SIZES
from k25_runtime.device import DeviceError, EnginePort
from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu, ort_value

GAP = 4096


class MisuseError(AssertionError):
    """A call that a real device would answer with wrong numbers or a crash."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise MisuseError(message)


@dataclass
class Operation:
    """Something on a stream: what it does, and the (address, size) that it reads and writes."""

    what: str
    run: Callable[[], None]
    reads: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)
    event: FakeEvent | None = None


class FakeStream:
    def __init__(self) -> None:
        self.queue: deque[Operation] = deque()
        self.recording: list[Operation] | None = None
        self.is_broken = False
        self.is_alive = True


@dataclass(eq=False)
class FakeEvent:
    stream: FakeStream | None = None
    operation: Operation | None = None
    is_alive: bool = True


@dataclass(eq=False)
class FakeGraph:
    operations: list[Operation]
    contexts: list[tuple[FakeContext, int]]
    is_alive: bool = True


class FakeDevice:
    """One device. `closed_clean` raises where anything is left."""

    def __init__(
        self, *, capability: str = "12.0", memory: int = 1 << 30, sessions: dict[str, Any] | None = None
    ) -> None:
        self.name = "NVIDIA Fake 6000"
        self.compute_capability = capability
        self.capacity = memory
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: list[FakeStream] = []
        self.events: list[FakeEvent] = []
        self.graphs: list[FakeGraph] = []
        self.engines: list[FakeEngine] = []
        self.contexts: list[FakeContext] = []
        self.sessions = sessions if sessions is not None else {}
        self.calls: list[str] = []
        self.fail: Callable[[str], None] = lambda call: None
        self.refuse_capture = False
        self.is_closed = False
        self.peak_pinned = 0
        self.copied = 0
        self._next = 1 << 40

    # Memory.

    def allocate(self, size: int) -> int:
        self._call("allocate")
        self._break_captures("allocating")
        require(size > 0, "allocate: expected at least a byte")
        if sum(len(block) for block in self.memory.values()) + size > self.capacity:
            raise InputError(f"GPU memory: {size} bytes more do not fit")
        address = self._next
        self._next += -(-(size + GAP) // GAP) * GAP
        self.memory[address] = np.full(size, 0xFF, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._call("free")
        self._break_captures("freeing")
        require(address in self.memory, f"free: {address:#x} is not allocated")
        size = len(self.memory[address])
        for stream in self.streams:
            for operation in stream.queue:
                for start, length in operation.reads + operation.writes:
                    require(
                        start + length <= address or address + size <= start,
                        f"free: {operation.what} is pending on {address:#x}",
                    )
        del self.memory[address]

    def allocate_pinned(self, size: int) -> np.ndarray:
        self._call("allocate_pinned")
        buffer = np.full(size, 0xEE, np.uint8)
        self.pinned[buffer.ctypes.data] = buffer
        self.peak_pinned = max(self.peak_pinned, sum(len(kept) for kept in self.pinned.values()))
        return buffer

    def free_pinned(self, buffer: np.ndarray) -> None:
        self._call("free_pinned")
        require(not any(stream.queue for stream in self.streams), "free_pinned: work is pending")
        require(buffer.ctypes.data in self.pinned, "free_pinned: not page-locked memory of this device")
        del self.pinned[buffer.ctypes.data]

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """A view of device memory; `MisuseError` outside of what is allocated."""
        for start, block in self.memory.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise MisuseError(f"{size} bytes at {address:#x}: not inside memory that is allocated")

    # Streams and events.

    def create_stream(self) -> FakeStream:
        self._call("create_stream")
        self.streams.append(FakeStream())
        return self.streams[-1]

    def destroy_stream(self, stream: FakeStream) -> None:
        self._call("destroy_stream")
        require(stream.is_alive and not stream.queue, "destroy_stream: dead, or work is pending")
        stream.is_alive = False
        self.streams.remove(stream)

    def create_event(self) -> FakeEvent:
        self._call("create_event")
        self.events.append(FakeEvent())
        return self.events[-1]

    def destroy_event(self, event: FakeEvent) -> None:
        self._call("destroy_event")
        require(event.is_alive, "destroy_event: destroyed before")
        event.is_alive = False
        self.events.remove(event)

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        self._call("record")
        require(event.is_alive, "record: a dead event")
        operation = Operation("event", lambda: None, event=event)
        event.stream, event.operation = stream, operation
        self._put(stream, operation)

    def synchronize_event(self, event: FakeEvent) -> None:
        self._call("synchronize_event")
        require(event.is_alive, "synchronize_event: a dead event")
        require(event.operation is not None, "synchronize_event: never recorded")
        assert event.stream is not None
        while event.operation in event.stream.queue:
            self._run_next(event.stream)

    def synchronize(self, stream: FakeStream) -> None:
        self._call("synchronize")
        require(stream.is_alive, "synchronize: a dead stream")
        if stream.recording is not None:
            stream.is_broken = True
            raise DeviceError("synchronizing a stream that is being captured")
        while stream.queue:
            self._run_next(stream)

    # Copies.

    def copy_to_device(self, address: int, source: np.ndarray, stream: FakeStream) -> None:
        self._call("copy_to_device")
        self._require_pinned(source)
        self.bytes_at(address, len(source))
        expected = hashlib.sha256(source).digest()

        def run() -> None:
            same = hashlib.sha256(source).digest() == expected
            require(same, "copy_to_device: the page-locked bytes changed before the copy was done")
            self.bytes_at(address, len(source))[:] = source
            self.copied += len(source)

        self._put(stream, Operation("copy to device", run, writes=[(address, len(source))]))

    def copy_to_host(self, destination: np.ndarray, address: int, stream: FakeStream) -> None:
        self._call("copy_to_host")
        self._require_pinned(destination)
        size = len(destination)
        self.bytes_at(address, size)
        destination[:] = 0xEE  # whoever reads before the copy is done reads this

        def run() -> None:
            destination[:] = self.bytes_at(address, size)

        self._put(stream, Operation("copy to host", run, reads=[(address, size)]))

    def fill_zero(self, address: int, size: int, stream: FakeStream) -> None:
        self._call("fill_zero")
        self.bytes_at(address, size)

        def run() -> None:
            self.bytes_at(address, size)[:] = 0

        self._put(stream, Operation("fill", run, writes=[(address, size)]))

    # Graphs.

    def begin_capture(self, stream: FakeStream) -> None:
        self._call("begin_capture")
        require(stream.recording is None, "begin_capture: capturing already")
        stream.recording, stream.is_broken = [], self.refuse_capture

    def end_capture(self, stream: FakeStream) -> FakeGraph:
        recorded, stream.recording = stream.recording, None
        require(recorded is not None, "end_capture: not capturing")
        self._call("end_capture")
        if stream.is_broken:
            stream.is_broken = False
            raise DeviceError("operation not permitted when stream is capturing")
        assert recorded is not None
        contexts = [operation.run.__self__ for operation in recorded if operation.what == "engine"]  # type: ignore[attr-defined]
        graph = FakeGraph(recorded, [(run.context, run.context.version) for run in contexts])
        self.graphs.append(graph)
        return graph

    def launch(self, graph: FakeGraph, stream: FakeStream) -> None:
        self._call("launch")
        require(graph.is_alive, "launch: a dead graph")
        for context, version in graph.contexts:
            require(context.is_alive, "launch: a context of the graph was closed")
            require(context.version == version, "launch: a context of the graph was changed since")
        for operation in graph.operations:
            self._put(stream, operation)

    def destroy_graph(self, graph: FakeGraph) -> None:
        self._call("destroy_graph")
        require(graph.is_alive, "destroy_graph: destroyed before")
        graph.is_alive = False
        self.graphs.remove(graph)

    # Engines.

    def load_engine(self, data: bytes, *, label: str) -> FakeEngine:
        self._call("load_engine")
        try:
            described = json.loads(data)
        except ValueError as error:
            raise InputError(f"{label}: TensorRT cannot load the engine") from error
        self.engines.append(FakeEngine(self, described))
        return self.engines[-1]

    def close(self) -> None:
        self._call("close")
        require(not self.is_closed, "close: closed before")
        self.is_closed = True

    def closed_clean(self) -> None:
        """Everything was given back, and the device closed."""
        kept = {
            name: getattr(self, name)
            for name in ("memory", "pinned", "streams", "events", "graphs", "engines", "contexts")
        }
        assert not {name: len(things) for name, things in kept.items() if things}
        assert self.is_closed

    def component(self, path: str) -> Any:
        if path not in self.sessions:
            backend = OnnxRuntimeCpu(threads=1, mode="exact")
            self.sessions[path] = backend.load(Path(path).read_bytes(), label=Path(path).name).bind({})
        return self.sessions[path]

    # Inside.

    def _call(self, name: str) -> None:
        require(not self.is_closed, f"{name}: the device is closed")
        self.calls.append(name)
        self.fail(name)

    def _break_captures(self, _: str) -> None:
        for stream in self.streams:
            if stream.recording is not None:
                stream.is_broken = True
                raise DeviceError("operation not permitted when stream is capturing")

    def _require_pinned(self, view: np.ndarray) -> None:
        start = view.ctypes.data
        inside = any(at <= start and start + len(view) <= at + len(block) for at, block in self.pinned.items())
        require(inside, "copy: expected page-locked memory")

    def _put(self, stream: FakeStream, operation: Operation) -> None:
        require(stream.is_alive, f"{operation.what}: a dead stream")
        (stream.queue if stream.recording is None else stream.recording).append(operation)

    def _run_next(self, stream: FakeStream) -> None:
        operation = stream.queue.popleft()
        for other in self.streams:
            if other is not stream:
                for pending in other.queue:
                    _require_apart(operation, pending)
        operation.run()


def _require_apart(one: Operation, other: Operation) -> None:
    pairs = [(one.writes, other.writes), (one.writes, other.reads), (one.reads, other.writes)]
    for left, right in pairs:
        for a, m in left:
            for b, n in right:
                require(a + m <= b or b + n <= a, f"race: {one.what} and {other.what} on two streams")


class FakeEngine:
    def __init__(self, device: FakeDevice, described: Mapping[str, Any]) -> None:
        self.device = device
        self.described = described
        self.ports = tuple(
            EnginePort(name=port["name"], dtype=port["dtype"], shape=tuple(port["shape"]), is_input=port["is_input"])
            for port in described["ports"]
        )
        self.profiles = max(len(described["profiles"]), 1)
        self.is_alive = True

    def aliased_input(self, output: str) -> str | None:
        return self.described.get("told_aliases", {}).get(output)

    def profile_shapes(self, name: str, profile: int) -> Any:
        return tuple(tuple(shape) for shape in self.described["profiles"][profile][name])

    def scratch_bytes(self, profile: int) -> int:
        return int(self.described["scratch"]) * (profile + 1)

    def context(self, profile: int, stream: FakeStream) -> FakeContext:
        self.device._call("context")
        require(self.is_alive, "context: a dead engine")
        require(stream.recording is None, "context: made during a capture")
        context = FakeContext(self, profile)
        self.device.contexts.append(context)
        return context

    def close(self) -> None:
        self.device._call("engine.close")
        require(self.is_alive, "engine: closed before")
        require(all(context.engine is not self for context in self.device.contexts), "engine: contexts are left")
        self.is_alive = False
        self.device.engines.remove(self)


class FakeContext:
    def __init__(self, engine: FakeEngine, profile: int) -> None:
        self.engine = engine
        self.profile = profile
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scratch: tuple[int, int] = (0, 0)
        self.version = 0
        self.is_alive = True
        self.needs_flush = True

    def set_address(self, name: str, address: int) -> None:
        self._changed("set_address")
        require(name in {port.name for port in self.engine.ports}, f"set_address: no tensor {name}")
        self.addresses[name] = address

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._changed("set_shape")
        port = next((port for port in self.engine.ports if port.name == name and port.is_input), None)
        require(port is not None, f"set_shape: no input {name}")
        assert port is not None
        fits = len(shape) == len(port.shape) and all(a in (-1, b) for a, b in zip(port.shape, shape, strict=True))
        require(fits, f"set_shape: {name} {shape} does not fit {port.shape}")
        if -1 in port.shape:
            low, _, high = self.engine.profile_shapes(name, self.profile)
            inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            require(inside, f"set_shape: {name} {shape} is outside the profile {low}..{high}")
        self.shapes[name] = tuple(shape)
        self.needs_flush = True

    def set_scratch(self, address: int, size: int) -> None:
        self._changed("set_scratch")
        require(address % 256 == 0, "set_scratch: not aligned")
        require(size >= self.engine.scratch_bytes(self.profile), "set_scratch: too small")
        self.scratch = (address, size)

    def is_capturable(self, stream: FakeStream) -> bool:
        return not self.engine.described.get("never_capturable", False)

    def enqueue(self, stream: FakeStream) -> None:
        device = self.engine.device
        device._call("enqueue")
        require(self.is_alive, "enqueue: a dead context")
        require(self.scratch[1] > 0, "enqueue: no scratch memory")
        for port in self.engine.ports:
            require(port.name in self.addresses, f"enqueue: {port.name} has no address")
            require(not port.is_input or port.name in self.shapes, f"enqueue: {port.name} has no shape")
            require(self.addresses[port.name] % 16 == 0, f"enqueue: {port.name} is not aligned")
        if stream.recording is not None and self.needs_flush:
            stream.is_broken = True
            raise DeviceError("capture: shapes were set and not yet run")
        self.needs_flush = False
        run = FakeRun(self)
        device._put(stream, Operation("engine", run.execute, reads=run.reads, writes=run.writes))

    def close(self) -> None:
        self.engine.device._call("context.close")
        require(self.is_alive, "context: closed before")
        held = [graph for graph in self.engine.device.graphs if any(self is context for context, _ in graph.contexts)]
        require(not held, "context: a graph still holds it")
        pending = any(
            getattr(operation.run, "__self__", None) is not None and operation.run.__self__.context is self  # type: ignore[attr-defined]
            for stream in self.engine.device.streams
            for operation in stream.queue
            if operation.what == "engine"
        )
        require(not pending, "context: it is still to run")
        self.is_alive = False
        self.engine.device.contexts.remove(self)

    def _changed(self, call: str) -> None:
        self.engine.device._call(call)
        require(self.is_alive, f"{call}: a dead context")
        self.version += 1


class FakeRun:
    """One execution, with addresses and shapes as they were when it was enqueued."""

    def __init__(self, context: FakeContext) -> None:
        self.context = context
        self.device = context.engine.device
        self.addresses = dict(context.addresses)
        self.shapes = dict(context.shapes)
        self.inputs = [port for port in context.engine.ports if port.is_input]
        self.outputs = [port for port in context.engine.ports if not port.is_input]
        self.out_shapes = {port.name: self._resolved(port) for port in self.outputs}
        sizes = {**self.shapes, **self.out_shapes}
        self.reads = [self._span(port, sizes) for port in self.inputs]
        self.writes = [self._span(port, sizes) for port in self.outputs] + [context.scratch]
        self._check_overlaps(sizes)

    def execute(self) -> None:
        described = self.context.engine.described
        self.device.bytes_at(*self.context.scratch)[:] = 0xFF
        given = {port.name: self._tensor(port, self.shapes[port.name]) for port in self.inputs}
        results = {
            port.name: HostTensor(np.empty(self.out_shapes[port.name], STORAGE_DTYPES[port.dtype]), port.dtype)
            for port in self.outputs
        }
        self.device.component(described["graph"]).run(
            {name: ort_value(tensor) for name, tensor in given.items()},
            {name: ort_value(tensor) for name, tensor in results.items()},
        )
        for port in self.outputs:
            result = results[port.name].array
            target = self.device.bytes_at(self.addresses[port.name], result.nbytes)
            target[:] = result.reshape(-1).view(np.uint8)

    def _resolved(self, port: EnginePort) -> tuple[int, ...]:
        axes = self.context.engine.described["axes"]
        known = {
            axis: size
            for name, shape in self.shapes.items()
            for axis, size in zip(axes[name], shape, strict=True)
            if isinstance(axis, str)
        }
        return tuple(known[axis] if isinstance(axis, str) else axis for axis in axes[port.name])

    def _span(self, port: EnginePort, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        size = int(np.prod(sizes[port.name])) * ITEM_SIZES[port.dtype]
        self.device.bytes_at(self.addresses[port.name], size)
        return self.addresses[port.name], size

    def _tensor(self, port: EnginePort, shape: tuple[int, ...]) -> HostTensor:
        size = int(np.prod(shape)) * ITEM_SIZES[port.dtype]
        content = self.device.bytes_at(self.addresses[port.name], size).copy()
        return HostTensor(content.view(STORAGE_DTYPES[port.dtype]).reshape(shape), port.dtype)

    def _check_overlaps(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        aliases = self.context.engine.described["aliases"]
        spans = {port.name: self._span(port, sizes) for port in self.inputs + self.outputs}
        for output in (port.name for port in self.outputs):
            for name, (start, size) in spans.items():
                a, n = spans[output]
                apart = a + n <= start or start + size <= a
                if aliases.get(output) == name:
                    require(a == start, f"enqueue: {output} must be the memory of {name}")
                elif name != output:
                    require(apart, f"enqueue: {output} and {name} share memory")
