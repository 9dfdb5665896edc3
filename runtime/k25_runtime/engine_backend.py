"""The backend that runs TensorRT engines: weights and caches in device memory, a step on one stream.

A step uploads its few integers, runs every component without coming back to the host, and downloads the logits. All
activations come from one pool and all work goes to one stream, so memory may be reused as soon as it is let go of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from k25_engines.engine_options import EXPERT_ALIGNMENT
from k25_engines.manifest import EngineEntry, EngineManifest, read_engine_file
from k25_export.manifest import ComponentEntry, Precision
from k25_plugins.errors import BackendMissingError, mismatch
from k25_runtime.device import Bytes, Device, DeviceEngine, DeviceError, Shape
from k25_runtime.device_memory import DeviceTensor, tensor_bytes
from k25_runtime.engine_checks import check_engine, check_entry, check_weight, step_limits
from k25_runtime.engine_instance import EngineInstance
from k25_runtime.engine_session import DEFAULT_STAGING_BYTES, EngineSession, bytes_of, packed
from k25_runtime.engine_step import DEFAULT_GRAPHS, CapturedStep
from k25_runtime.engine_weights import DEFAULT_BUFFER_BYTES, DEFAULT_BUFFERS
from k25_runtime.even_rows import promise_even_rows
from k25_runtime.expert_layout import ScatteredTensor
from k25_runtime.host_tensor import HostTensor

#: The components of a text step; others (vision) set no limit to it.
_STEP_COMPONENTS = ("embed", "dense_layer", "moe_layer", "head")

_DECODE_INPUTS = frozenset(("token_ids", "positions", "query_start", "block_table", "rows"))

Weight = HostTensor | ScatteredTensor
Step = Callable[[Mapping[str, Any]], Any]


class EngineComponent:
    """A loaded engine that has been checked against the bundle."""

    def __init__(self, session: EngineSession, entry: EngineEntry, engine: DeviceEngine, label: str) -> None:
        self._session = session
        self._entry = entry
        self._engine = engine
        self._label = label

    def bind(self, weights: Mapping[str, Weight]) -> EngineInstance:
        """Copy the weights to the device; the caller may let go of them. The same bytes are copied once."""
        for name, tensor in weights.items():
            check_weight(self._entry, name, tensor.dtype, _shape(tensor), label=self._label)
        self._session.drain()
        blocks: dict[tuple[int, int], Any] = {}
        copies: list[tuple[int, Bytes]] = []
        bound = {}
        for name, tensor in weights.items():
            size, key = _identity(tensor)
            if key not in blocks:
                blocks[key] = self._session.block(size)
                copies += [(blocks[key].address + offset, piece) for offset, piece in _pieces(tensor)]
            bound[name] = DeviceTensor(blocks[key].address, _shape(tensor), tensor.dtype, blocks[key])
        self._session.load(copies)
        contexts = self._session.new_contexts()
        instance = EngineInstance(
            entry=self._entry,
            engine=self._engine,
            weights=bound,
            contexts=contexts,
            session=self._session,
            label=self._label,
        )
        weakref.finalize(instance, self._session.discard_contexts, contexts)
        return instance


class EngineBackend:
    """TensorRT engines of one target on one device. Not safe for use from several threads at once."""

    name = "tensorrt"
    default_precision: Precision
    expert_alignment: int | None = EXPERT_ALIGNMENT

    def __init__(
        self,
        device: Device,
        *,
        bundle: Path,
        engines: EngineManifest,
        target: str,
        graphs: int = DEFAULT_GRAPHS,
        buffers: int = DEFAULT_BUFFERS,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        """Takes over the device: `close` closes it. `graphs` captured steps are kept, 0 captures none."""
        promise_even_rows()  # `expert_alignment` is what makes them so
        self._bundle = bundle
        self._target = target
        self._engines = engines
        self._steps = 0
        entries = [engines.find(name, target) for name in _STEP_COMPONENTS]
        self.limits = step_limits(entry for entry in entries if entry is not None)
        self.default_precision = next((entry.precision for entry in entries if entry is not None), "bf16")
        self.session = EngineSession(
            device, graphs=graphs, buffers=buffers, buffer_bytes=buffer_bytes, staging_bytes=staging_bytes
        )

    # What `ModelRunner` calls.

    @property
    def details(self) -> dict[str, str]:
        """Nothing to say."""
        return {}

    def load(self, data: bytes, *, label: str) -> EngineComponent:
        """Refuse: an ONNX file would have to be compiled first."""
        raise BackendMissingError(f"{label}: TensorRT runs engines; this takes a backend that runs ONNX files")

    def component(self, bundle: Path, component: ComponentEntry, precision: Precision) -> EngineComponent:
        """Load the engine of a component; `InputError` where it does not fit bundle, manifest or precision."""
        self.session.require_open()
        entry = self._engines.engine(component.name, self._target)
        if entry.precision != precision:
            raise mismatch(f"engine {entry.name}: precision", expected=precision, found=entry.precision)
        check_entry(entry, component, bundle)
        label = f"engine {entry.name}"
        engine = self.session.device.load_engine(read_engine_file(bundle, entry), label=label)
        self.session.add_engine(engine)
        check_engine(entry, engine)
        self.session.require_scratch(max(engine.scratch_bytes(index) for index in range(engine.profiles)))
        return EngineComponent(self.session, entry, engine, label)

    def buffer(self, tensor: HostTensor | DeviceTensor) -> DeviceTensor:
        """A copy in device memory; a tensor that is there already as it is."""
        if isinstance(tensor, DeviceTensor):
            return tensor
        self.session.require_open()
        copy = self.session.pool.tensor(tensor.array.shape, tensor.dtype)
        self.session.upload(copy.address, bytes_of(tensor))
        return copy

    def empty(self, shape: Shape, dtype: str) -> DeviceTensor:
        """An activation with undefined content."""
        self.session.require_open()
        return self.session.pool.tensor(shape, dtype)

    def zeros(self, shape: Shape, dtype: str) -> DeviceTensor:
        """A cache."""
        self.session.require_open()
        self.session.drain()
        return self.session.cache(shape, dtype)

    def host(self, tensor: HostTensor | DeviceTensor) -> HostTensor:
        """The tensor in host memory."""
        return tensor if isinstance(tensor, HostTensor) else self.session.download(tensor)

    def step(self, function: Step, inputs: Mapping[str, HostTensor]) -> HostTensor | None:
        """Run a function of device tensors, which returns one or None; a decode step is captured and replayed."""
        self.session.require_open()
        self.session.drain()
        is_decode = _is_decode(inputs)
        if is_decode:
            inputs = self._with_wide_table(inputs)
        try:
            return self._decoded(function, inputs) if is_decode else self._result(function(self._uploaded(inputs)))
        except BaseException:
            with suppress(DeviceError):  # what is raised already says more
                self.session.synchronize()
            raise

    def close(self) -> None:
        """Free everything on the device. May be called again."""
        self.session.close()

    # Inside.

    def _decoded(self, function: Step, inputs: Mapping[str, HostTensor]) -> HostTensor | None:
        session = self.session
        # The model that runs is told apart by its identity: its graphs are gone before another can have it.
        shape = (id(getattr(function, "__self__", function)), *((name, item.shape) for name, item in inputs.items()))
        captured = session.graphs.find(shape)
        if captured is None:
            if not session.graphs.is_due(shape):
                return self._result(function(self._uploaded(inputs)))
            return self._captured(function, inputs, shape)
        session.upload(captured.address, packed(inputs)[0])
        session.device.launch(captured.graph, session.stream)
        for cache in captured.swapped:
            cache.swap()
        session.graphs.replays += 1
        return session.download(captured.output)

    def _captured(self, function: Step, inputs: Mapping[str, HostTensor], shape: Any) -> HostTensor | None:
        """Run the step on contexts of its own, which also flushes what they put off, then record the same again.

        Recording runs nothing: it starts with the caches where they were and leaves them where the run did.
        """
        session = self.session
        self._steps += 1
        session.contexts = self._steps
        try:
            given = self._uploaded(inputs)
            output = function(given)
            swapped = tuple(session.swapped)
            places = tuple(not cache.is_swapped for cache in swapped)
            result = self._result(output)
            del output
            try:
                for cache in swapped:
                    cache.swap()
                output, graph = self._recorded(function, given)
            except DeviceError as error:
                session.synchronize()
                session.graphs.refused[shape] = str(error)
                session.close_contexts_of([self._steps])
                return result
            finally:
                for cache in swapped[len(session.swapped) :]:
                    cache.swap()
                session.swapped.clear()
            step = CapturedStep(
                shape=shape,
                graph=graph,
                address=min(tensor.address for tensor in given.values()),
                inputs=given,
                output=output,
                swapped=swapped,
                places=places,
                contexts=self._steps,
            )
            session.close_contexts_of(session.graphs.add(step))
            return result
        finally:
            session.contexts = 0

    def _recorded(self, function: Step, given: Mapping[str, DeviceTensor]) -> tuple[DeviceTensor, Any]:
        session = self.session
        session.device.begin_capture(session.stream)
        session.is_capturing = True
        try:
            output = function(given)
        except BaseException:
            with suppress(DeviceError):
                session.device.destroy_graph(session.device.end_capture(session.stream))
            raise
        finally:
            session.is_capturing = False
        return output, session.device.end_capture(session.stream)

    def _uploaded(self, inputs: Mapping[str, HostTensor]) -> dict[str, DeviceTensor]:
        """All inputs of a step in one block, with one copy."""
        buffer, offsets = packed(inputs)
        block = self.session.pool.block(len(buffer))
        self.session.upload(block.address, buffer)
        return {
            name: DeviceTensor(block.address + offsets[name], tensor.array.shape, tensor.dtype, block)
            for name, tensor in inputs.items()
        }

    def _result(self, output: DeviceTensor | None) -> HostTensor | None:
        self.session.swapped.clear()
        if output is not None:
            return self.session.download(output)
        self.session.synchronize()
        return None

    def _with_wide_table(self, inputs: Mapping[str, HostTensor]) -> dict[str, HostTensor]:
        """The block table widened to a power of two with unused entries: few shapes, so few captured steps."""
        table = inputs["block_table"].array
        widest = self.limits.largest("blocks_per_sequence")
        width = max(min(1 << (table.shape[1] - 1).bit_length(), widest), table.shape[1])
        wide = np.zeros((table.shape[0], width), np.int32)
        wide[:, : table.shape[1]] = table
        return {**inputs, "block_table": HostTensor(wide, "int32")}


def _is_decode(inputs: Mapping[str, HostTensor]) -> bool:
    """One token a sequence, logits for each: the step that repeats."""
    if inputs.keys() != _DECODE_INPUTS:
        return False
    return len({len(inputs[name].array) for name in ("token_ids", "block_table", "rows")}) == 1


def _shape(tensor: Weight) -> Shape:
    return tensor.shape if isinstance(tensor, ScatteredTensor) else tensor.array.shape


def _identity(tensor: Weight) -> tuple[int, tuple[int, int]]:
    """Size, and what tells whether two weights are the same bytes."""
    if isinstance(tensor, ScatteredTensor):
        return tensor.source.size, (id(tensor.source), -1)
    return tensor.array.nbytes, (tensor.array.ctypes.data, tensor.array.nbytes)


def _pieces(tensor: Weight) -> tuple[tuple[int, Bytes], ...]:
    if isinstance(tensor, ScatteredTensor):
        return tensor.source.pieces
    assert tensor.array.nbytes == tensor_bytes(tensor.array.shape, tensor.dtype)
    return ((0, bytes_of(tensor)),)
