"""ONNX Runtime on a CPU: the embedded default. Weights are inputs bound over the mapped shards: nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from k25_plugins.errors import InputError, K25Error
from k25_plugins.signatures import ONNX_DTYPES
from k25_runtime.host_tensor import HostTensor

_ERROR_SEVERITY = 3


class OnnxRuntimeInstance:
    """An IOBinding with the weights bound once."""

    def __init__(self, session: ort.InferenceSession, weights: Mapping[str, ort.OrtValue], label: str) -> None:
        self._session = session
        self._label = label
        self._weights = weights
        self._binding = session.io_binding()
        for name, value in weights.items():
            self._binding.bind_ortvalue_input(name, value)

    def run(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> None:
        """Run on OrtValues; `K25Error` carries ONNX Runtime's message."""
        try:
            for name, value in inputs.items():
                self._binding.bind_ortvalue_input(name, value)
            for name, value in outputs.items():
                self._binding.bind_ortvalue_output(name, value)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise K25Error(f"{self._label}: ONNX Runtime failed: {error}") from error


class OnnxRuntimeComponent:
    """An InferenceSession over one component's file."""

    def __init__(self, session: ort.InferenceSession, label: str) -> None:
        self._session = session
        self._label = label

    def bind(self, weights: Mapping[str, HostTensor]) -> OnnxRuntimeInstance:
        """Bind weights without copying; the OrtValues keep the arrays alive."""
        values = {name: ort_value(tensor) for name, tensor in weights.items()}
        return OnnxRuntimeInstance(self._session, values, self._label)


class OnnxRuntimeCpu:
    """The CPU execution provider with the function bodies of the `k25` ops."""

    name = "onnxruntime-cpu"

    def __init__(self, *, threads: int = 0) -> None:
        """`threads` for each operator; 0 takes ONNX Runtime's default, one for each core."""
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.log_severity_level = _ERROR_SEVERITY
        # One session a component kind: idle pools must not spin against the one at work.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def load(self, data: bytes, *, label: str) -> OnnxRuntimeComponent:
        """Load a component; `InputError` where ONNX Runtime refuses the file."""
        try:
            session = ort.InferenceSession(data, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InputError(f"{label}: ONNX Runtime cannot load the file: {error}") from error
        return OnnxRuntimeComponent(session, label)

    def buffer(self, tensor: HostTensor) -> ort.OrtValue:
        """An OrtValue over the tensor's memory."""
        return ort_value(tensor)


def ort_value(tensor: HostTensor) -> Any:
    """An OrtValue over the array's memory, not a copy; it keeps the array alive."""
    if tensor.dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.array, ONNX_DTYPES["bfloat16"])
    return ort.OrtValue.ortvalue_from_numpy(tensor.array)
