"""Engines and execution contexts of TensorRT's Python bindings (`tensorrt_rtx` or `tensorrt` 11.x)."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import k25_plugins
from k25_engines.plugin_creators import register_plugins
from k25_plugins.errors import InputError
from k25_runtime.device import DeviceError, EnginePort, Shape, Stream
from k25_runtime.even_rows import promise_even_rows_to

if TYPE_CHECKING:
    from k25_engines.tensorrt_module import TensorRT

#: Names the shared library of the plugin creators, where it is not the one beside `k25_plugins`.
LIBRARY_VARIABLE = "K25_TENSORRT_LIBRARY"
_LIBRARY = "native/libk25_tensorrt.so"

_KEPT_MESSAGES = 8


def plugin_library() -> Path | None:
    """The shared library of the plugin creators, or None: then those in Python are taken."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    assert k25_plugins.__file__ is not None
    built = Path(k25_plugins.__file__).parent / _LIBRARY
    return built if built.is_file() else None


class EngineLoader:
    """TensorRT's runtime with a logger that remembers what went wrong, and the creators of the plugins."""

    def __init__(self, tensorrt: TensorRT) -> None:
        self._tensorrt = tensorrt
        self._messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._logger = _logger(tensorrt.module, self._messages)
        library = plugin_library()
        self._creators = register_plugins(tensorrt, library, report=self._messages.append)
        if library is not None:
            promise_even_rows_to(library)
        self._runtime = tensorrt.module.Runtime(self._logger)
        if self._runtime is None:
            raise DeviceError(f"{tensorrt.flavour} {tensorrt.version}: no runtime: {self._last_messages()}")

    def load(self, data: bytes, *, label: str) -> TensorRTEngine:
        """Deserialise; `InputError` with TensorRT's own words where it refuses."""
        self._messages.clear()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise InputError(
                f"{label}: {self._tensorrt.flavour} {self._tensorrt.version} cannot load the engine: "
                f"{self._last_messages()}. Compile it again, with this version and for this GPU."
            )
        return TensorRTEngine(self._tensorrt, engine, self._messages, label=label)

    def close(self) -> None:
        """Let go of the runtime."""
        self._runtime = None

    def _last_messages(self) -> str:
        return "; ".join(self._messages) or "it gave no reason"


class TensorRTEngine:
    """An `ICudaEngine`."""

    def __init__(self, tensorrt: TensorRT, engine: Any, messages: deque[str], *, label: str) -> None:
        self._module = tensorrt.module
        self._engine = engine
        self._messages = messages
        self._label = label
        self.profiles = int(engine.num_optimization_profiles)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.ports = tuple(
            EnginePort(
                name=name,
                dtype=tensorrt.dtype_name(engine.get_tensor_dtype(name)),
                shape=tuple(engine.get_tensor_shape(name)),
                is_input=engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT,
            )
            for name in names
        )

    def aliased_input(self, output: str) -> str | None:
        """What TensorRT says; None also where this version does not tell."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return None
        name: str | None = self._engine.get_aliased_input_tensor(output)
        return name or None

    def profile_shapes(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        """Smallest, usual and largest shape."""
        low, usual, high = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, profile))
        return low, usual, high

    def scratch_bytes(self, profile: int) -> int:
        """The largest that any shape of the profile needs."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def context(self, profile: int, stream: Stream) -> TensorRTContext:
        """A context whose scratch memory we give."""
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(f"{self._label}: no execution context: {'; '.join(self._messages)}")
        made = TensorRTContext(context, self._messages, label=self._label)
        made.set_profile(profile, stream)
        return made

    def close(self) -> None:
        """Let go of the engine."""
        self._engine = None


class TensorRTContext:
    """An `IExecutionContext`. Every call that says no is an error with what TensorRT logged."""

    def __init__(self, context: Any, messages: deque[str], *, label: str) -> None:
        self._context = context
        self._messages = messages
        self._label = label

    def set_profile(self, profile: int, stream: Stream) -> None:
        """Choose the optimisation profile."""
        done = self._context.set_optimization_profile_async(profile, int(stream))
        self._require(done, f"optimisation profile {profile}")

    def set_address(self, name: str, address: int) -> None:
        """Bind memory."""
        self._require(self._context.set_tensor_address(name, address), f"address of {name}")

    def set_shape(self, name: str, shape: Shape) -> None:
        """Set the shape of an input."""
        self._require(self._context.set_input_shape(name, shape), f"shape {list(shape)} of {name}")

    def set_scratch(self, address: int, size: int) -> None:
        """Give scratch memory."""
        self._context.set_device_memory(address, size)

    def is_capturable(self, stream: Stream) -> bool:
        """What TensorRT-RTX says (it may still have kernels to compile); enterprise TensorRT always allows it."""
        check = getattr(self._context, "is_stream_capturable", None)
        return check is None or bool(check(int(stream)))

    def enqueue(self, stream: Stream) -> None:
        """Put the execution on the stream."""
        self._messages.clear()
        self._require(self._context.execute_async_v3(int(stream)), "execution")

    def close(self) -> None:
        """Let go of the context."""
        self._context = None

    def _require(self, done: object, what: str) -> None:
        if not done:
            reason = "; ".join(self._messages) or "it gave no reason"
            raise DeviceError(f"{self._label}: TensorRT refused the {what}: {reason}")


def _logger(trt: Any, messages: deque[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors; TensorRT's severity is smaller the graver."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                messages.append(message.strip())

    return Logger()
