"""A minimal reproducer of a divergence: one op as ONNX with the weights inside, its inputs and what it should make."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from k25_plugins.errors import InputError
from k25_plugins.signatures import ONNX_DTYPES
from k25_plugins.whole_file import write_whole
from k25_runtime.host_tensor import HostTensor

Array = npt.NDArray[Any]
LARGEST_BYTES = 1 << 30
_EMBEDDED = ("bfloat16",)


@dataclass(frozen=True, kw_only=True)
class Reproducer:
    """`model` reads `inputs` (weights among them) and should make `expected`, within `tolerance` (relative L2)."""

    model: onnx.ModelProto
    inputs: Mapping[str, HostTensor]
    expected: Mapping[str, Array]
    tolerance: float

    def write(self, folder: Path, sentence: str) -> Path:
        """Write repro.onnx, inputs.npz, expected.npz, the same for polygraphy, and a README; returns the folder."""
        size = sum(tensor.array.nbytes for tensor in self.inputs.values())
        if size > LARGEST_BYTES:
            raise InputError(f"reproducer: its inputs take {size} bytes, expected at most {LARGEST_BYTES}")
        model, feeds = self._with_weights()
        expected = {name: np.asarray(value, self._dtype(name)) for name, value in self.expected.items()}
        write_whole(folder / "repro.onnx", model.SerializeToString(deterministic=True))
        files: dict[str, dict[str, Any]] = {"inputs": feeds, "expected": expected}
        for stem, arrays in files.items():
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            write_whole(folder / f"{stem}.npz", buffer.getvalue())
        write_whole(folder / "inputs.json", json.dumps([_plain(feeds)]))
        write_whole(folder / "expected.json", json.dumps(_run_results(expected)))
        write_whole(folder / "README.txt", f"{sentence}\n\nIn this folder:\n\n    {self.command(expected)}\n")
        return folder

    def command(self, expected: Mapping[str, Array]) -> str:
        """The polygraphy line; it fails as long as the op is off. Bounds are absolute: the tolerance times the rms."""
        rms = max(float(np.sqrt(np.square(value, dtype=np.float64).mean())) for value in expected.values())
        bound = self.tolerance * rms if np.isfinite(rms) and rms else self.tolerance
        return (
            "polygraphy run repro.onnx --onnxrt --load-inputs inputs.json --load-outputs expected.json "
            f"--atol {bound:.3g} --rtol 0"
        )

    def _with_weights(self) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """bfloat16 inputs become initializers (numpy, and so the files of inputs, have no such dtype)."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        feeds: dict[str, Array] = {}
        for value in list(model.graph.input):
            tensor = self.inputs[value.name]
            if tensor.dtype in _EMBEDDED:
                model.graph.initializer.append(
                    onnx.helper.make_tensor(
                        value.name, ONNX_DTYPES[tensor.dtype], tensor.array.shape, tensor.array.tobytes(), raw=True
                    )
                )
                model.graph.input.remove(value)
            else:
                shape = tensor.array.shape
                value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, ONNX_DTYPES[tensor.dtype], shape))
                feeds[value.name] = tensor.array
        for value in list(model.graph.output):
            if value.name not in self.expected:
                model.graph.output.remove(value)
            else:
                dtype, shape = value.type.tensor_type.elem_type, self.expected[value.name].shape
                value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, dtype, shape))
        return model, feeds

    def _dtype(self, name: str) -> Any:
        found = {value.name: value.type.tensor_type.elem_type for value in self.model.graph.output}.get(name, 1)
        return {6: np.int32, 7: np.int64}.get(found, np.float32)


def _plain(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: _encoded(array) for name, array in arrays.items()}


def _encoded(array: Array) -> dict[str, str]:
    """An array as polygraphy's JSON holds it: the base64 of its .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"array": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "ndarray"}


def _run_results(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Outputs as `polygraphy run --load-outputs` takes them: one runner, one iteration."""
    outputs = {name: {"values": value, "polygraphy_class": "LazyArray"} for name, value in _plain(arrays).items()}
    iteration = {
        "outputs": outputs,
        "runtime": None,
        "runner_name": "reference",
        "polygraphy_class": "IterationResult",
    }
    return {"lst": [["reference", [iteration]]], "polygraphy_class": "RunResults"}
