"""ONNX Runtime on a CPU: the embedded default. Weights are inputs bound over the mapped shards: nothing is copied.

With the native library the `k25` ops run on its kernels, straight from the shard's bytes; without it on their function
bodies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from k25_plugins.errors import InputError, K25Error
from k25_plugins.native_library import Mode, native_library
from k25_plugins.signatures import ONNX_DTYPES
from k25_runtime.backend import HostBackend, Step
from k25_runtime.cores import usable_cores
from k25_runtime.host_tensor import HostTensor
from k25_runtime.repeated_step import RepeatedStep
from k25_runtime.step_buffers import StepBuffers

_ERROR_SEVERITY = 3
_ORT_VALUE = "_ort_value"


class OnnxRuntimeInstance:
    """An IOBinding with the weights bound once; what is bound already is not bound again."""

    def __init__(
        self, session: ort.InferenceSession, weights: Mapping[str, ort.OrtValue], label: str, step: RepeatedStep
    ) -> None:
        self._session = session
        self._label = label
        self._weights = weights
        self._step = step
        self._binding = session.io_binding()
        self._inputs: dict[str, ort.OrtValue] = {}
        self._outputs: dict[str, ort.OrtValue] = {}
        for name, value in weights.items():
            self._binding.bind_ortvalue_input(name, value)

    def run(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> None:
        """Run on OrtValues; `K25Error` carries ONNX Runtime's message."""
        bound_inputs, bound_outputs = self._inputs, self._outputs
        self._step.runs(self)
        try:
            for name, value in inputs.items():
                if bound_inputs.get(name) is not value:
                    bound_inputs.pop(name, None)
                    self._binding.bind_ortvalue_input(name, value)
                    bound_inputs[name] = value
            for name, value in outputs.items():
                if bound_outputs.get(name) is not value:
                    bound_outputs.pop(name, None)
                    self._binding.bind_ortvalue_output(name, value)
                    bound_outputs[name] = value
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise K25Error(f"{self._label}: ONNX Runtime cannot bind: {error}") from error
        self.run_again()

    def run_again(self) -> None:
        """Run on the OrtValues of the last run."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise K25Error(f"{self._label}: ONNX Runtime failed: {error}") from error


class OnnxRuntimeComponent:
    """An InferenceSession over one component's file."""

    def __init__(self, session: ort.InferenceSession, label: str, step: RepeatedStep) -> None:
        self._session = session
        self._label = label
        self._step = step

    def bind(self, weights: Mapping[str, HostTensor]) -> OnnxRuntimeInstance:
        """Bind weights without copying; the OrtValues keep the arrays alive."""
        values = {name: ort_value(tensor) for name, tensor in weights.items()}
        return OnnxRuntimeInstance(self._session, values, self._label, self._step)


class OnnxRuntimeCpu(HostBackend):
    """The CPU execution provider with the native kernels of the `k25` ops, or else their function bodies."""

    name = "onnxruntime-cpu"

    def __init__(self, *, threads: int = 0, mode: Mode = "fast") -> None:
        """`threads` for each operator; 0 takes one for each core.

        The native ops have threads of their own, one set for all components, that stay awake between operators; ONNX
        Runtime's, for the rest, do not.
        In mode `fast` the native ops may round activations (bf16, or 16 bits for experts of few tokens); `exact`
        computes in float32.
        """
        self._mode: Mode = mode
        self._threads = threads or usable_cores()
        self._buffers = StepBuffers()
        self._repeated = RepeatedStep()
        self._native = native_library()
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.log_severity_level = _ERROR_SEVERITY
        # Remembering each shape's memory keeps as much as its largest run used, and saves nothing in a decode step.
        self._options.enable_mem_pattern = False
        # One session a component kind: idle pools must not spin against the one at work.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._native is not None:
            try:
                self._options.register_custom_ops_library(str(self._native.path))
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                raise InputError(
                    f"native library {self._native.path}: ONNX Runtime {ort.__version__} refuses it: {error}. "
                    "Build it again: make setup; or do without it: K25_NATIVE=off"
                ) from error

    @property
    def details(self) -> dict[str, str]:
        """What a report should say of how the ops are computed."""
        if self._native is None:
            return {"native ops": "none: function bodies, float32"}
        return {"native ops": f"{self._native.version}, {self._native.isa}, {self._mode}"}

    def load(self, data: bytes, *, label: str) -> OnnxRuntimeComponent:
        """Load a component; `InputError` where ONNX Runtime refuses the file."""
        settings: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._native is not None:
            settings = self._native.settings_of_sessions(mode=self._mode, threads=self._threads)
        try:
            with settings:
                session = ort.InferenceSession(data, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InputError(f"{label}: ONNX Runtime cannot load the file: {error}") from error
        return OnnxRuntimeComponent(session, label, self._repeated)

    def buffer(self, tensor: HostTensor) -> ort.OrtValue:
        """An OrtValue over the tensor's memory, one for each tensor."""
        kept = tensor.__dict__
        value = kept.get(_ORT_VALUE)
        if value is None:
            value = kept[_ORT_VALUE] = ort_value(tensor)
        return value

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostTensor:
        """An array, inside a step one that lives until the next."""
        return self._buffers.empty(shape, dtype)

    def step(self, function: Step, inputs: Mapping[str, HostTensor]) -> HostTensor | None:
        """Call the function on arrays that the steps share; what the last step did with the same is done again."""
        shapes = tuple((name, tensor.array.shape, tensor.dtype) for name, tensor in inputs.items())
        result: HostTensor | None = None
        try:
            arrays = self._buffers.begin(inputs)
            runs = self._repeated.noted_runs(function, shapes)
            if runs is None:
                self._repeated.begin()
                result = function(arrays)
                if self._buffers.is_repeatable:
                    self._repeated.end(function, shapes, result)
                else:
                    self._repeated.forget()
            else:
                for instance in runs:
                    instance.run_again()
                result = self._repeated.result
        except BaseException:
            self._repeated.forget()
            raise
        finally:
            result = self._buffers.end(result)
        return result


def ort_value(tensor: HostTensor) -> Any:
    """An OrtValue over the array's memory, not a copy; it keeps the array alive."""
    if tensor.dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.array, ONNX_DTYPES["bfloat16"])
    return ort.OrtValue.ortvalue_from_numpy(tensor.array)
