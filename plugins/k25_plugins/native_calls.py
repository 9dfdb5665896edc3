"""One call of a kernel of the native library on numpy arrays: for tests, benchmarks and embedders without a backend.

bfloat16 arrays are given and returned as uint16 bits. Shapes and dtypes are checked by the library itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import BackendMissingError, InputError, K25Error, mismatch
from k25_plugins.native_library import (
    ISAS,
    MODES,
    CpuOptions,
    Isa,
    Message,
    MlaAttributes,
    Mode,
    MoeDispatchAttributes,
    NativeLibrary,
    Parallel,
    RmsNormAttributes,
    RouterAttributes,
    Tensor,
    VisionAttentionAttributes,
)
from k25_plugins.signatures import OPS, OpSignature

Array = npt.NDArray[Any]

_CODES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 1,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.uint16): 16,
}
_DTYPES: dict[int, np.dtype[Any]] = {code: dtype for dtype, code in _CODES.items()}
_SIGNATURES = {op.name: op for op in OPS}
_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "MoEDispatch": MoeDispatchAttributes,
    "VisionAttention": VisionAttentionAttributes,
    "RMSNorm": RmsNormAttributes,
    "Router": RouterAttributes,
}
_FAILURES: dict[int, type[K25Error]] = {1: InputError, 2: BackendMissingError}
_MESSAGE_BYTES = 512


def call_native(
    library: NativeLibrary,
    op: str,
    inputs: Sequence[Array],
    attributes: Mapping[str, Any],
    *,
    outputs: Mapping[int, Array] | None = None,
    mode: Mode = "exact",
    isa: Isa = "best",
    parallel: Parallel | None = None,
) -> list[Array]:
    """Run op `op` (the name of its ONNX node) and return its outputs.

    `outputs` gives arrays to write to, by index; the cache of `k25.MLA` given as input and as output 1 is updated in
    place. Without `parallel` everything runs on the calling thread. Raises `InputError` where the library refuses the
    inputs, `BackendMissingError` where it has no such kernel, `K25Error` where it fails.
    """
    signature = _SIGNATURES[op]
    values, keep = attribute_arguments(signature, attributes)
    given = _tensors(inputs)
    results = (Tensor * len(signature.outputs))()
    text = ctypes.create_string_buffer(_MESSAGE_BYTES)
    message = Message(ctypes.cast(text, ctypes.c_char_p), _MESSAGE_BYTES)
    handle = library.handle
    check_status(getattr(handle, f"k25_{signature.folder}_outputs")(given, *values, results, message), text)
    found = [_output(signature, index, result, outputs or {}) for index, result in enumerate(results)]
    options = CpuOptions(MODES.index(mode), ISAS.index(isa), ctypes.pointer(parallel) if parallel is not None else None)
    kernel = getattr(handle, f"k25_{signature.folder}_cpu")
    check_status(kernel(given, *values, _tensors(found), ctypes.byref(options), message), text)
    del keep
    return found


def _output(signature: OpSignature, index: int, result: Tensor, given: Mapping[int, Array]) -> Array:
    shape, dtype = tuple(result.dims[: result.rank]), _DTYPES[result.dtype]
    if index not in given:
        return np.empty(shape, dtype)
    array = given[index]
    if array.shape != shape or array.dtype != dtype:
        name = signature.outputs[index].name
        raise mismatch(
            f"k25.{signature.name}: output {name}", expected=f"{dtype} {shape}", found=f"{array.dtype} {array.shape}"
        )
    return array


def check_status(status: int, text: ctypes.Array[ctypes.c_char]) -> None:
    """Raise the error of a `k25_status` with the library's message."""
    if status != 0:
        raise _FAILURES.get(status, K25Error)(text.value.decode(errors="replace"))


def _tensors(arrays: Sequence[Array]) -> ctypes.Array[Tensor]:
    tensors = (Tensor * len(arrays))()
    for tensor, array in zip(tensors, arrays, strict=True):
        if not array.flags.c_contiguous:
            raise InputError(f"native call: expected dense arrays, found strides {array.strides} of {array.shape}")
        if array.dtype not in _CODES:
            names = ", ".join(str(dtype) for dtype in _CODES)
            raise InputError(f"native call: expected {names} (uint16: bfloat16 bits), found {array.dtype}")
        tensor.data, tensor.dtype, tensor.rank = array.ctypes.data, _CODES[array.dtype], array.ndim
        tensor.dims[: array.ndim] = array.shape
    return tensors


def attribute_arguments(signature: OpSignature, attributes: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The argument of the C function, if the op has attributes, and what must outlive the call."""
    if signature.name == "MLA":
        frequencies = (ctypes.c_float * len(attributes["inv_freq"]))(*attributes["inv_freq"])
        values = MlaAttributes(
            attributes["num_heads"],
            attributes["qk_nope_head_dim"],
            attributes["v_head_dim"],
            attributes["softmax_scale"],
            frequencies,
            len(frequencies),
        )
        return (ctypes.byref(values),), (values, frequencies)
    if signature.name not in _STRUCTURES:
        return (), None
    others = _STRUCTURES[signature.name](*(attributes[spec.name] for spec in signature.attributes))
    return (ctypes.byref(others),), others
