"""One launch of an op's GPU kernels through the native library's C interface, on tensors in GPU memory.

No Triton, no PyTorch and no CUDA package is needed: tensors are addresses, a stream is a number (0: the default one).
A CUDA context must be current on the thread; PyTorch's and CUDA's runtime make one current. Nothing is allocated and
nothing waits, so that launches may be captured in a CUDA graph after `prepare`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k25_plugins.errors import BackendMissingError, mismatch
from k25_plugins.native_calls import attribute_arguments, check_status
from k25_plugins.native_library import Message, NativeLibrary, Tensor
from k25_plugins.signatures import DOMAIN, LINEAR, ONNX_DTYPES, OPS, OpSignature

_MESSAGE_BYTES = 1024
_OPS = ("MLA", "MoEDispatch", "Linear")


@dataclass(frozen=True, kw_only=True)
class DeviceTensor:
    """A tensor in GPU memory, row-major."""

    address: int
    dtype: str
    shape: tuple[int, ...]


def device_tensor(tensor: Any) -> DeviceTensor:
    """A PyTorch tensor (anything with `data_ptr`, `dtype`, `shape`, `is_contiguous`) as it is. Raises `InputError`."""
    if not tensor.is_contiguous():
        raise mismatch("GPU launch", expected="a contiguous tensor", found=f"strides {tensor.stride()}")
    return DeviceTensor(
        address=tensor.data_ptr(), dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
    )


def gpu_kernel_count(library: NativeLibrary | None) -> int:
    """GPU kernels in a library; 0 where it was built without."""
    if library is None or not hasattr(library.handle, "k25_gpu_kernel_count"):
        return 0
    return int(library.handle.k25_gpu_kernel_count())


def prepare(library: NativeLibrary) -> None:
    """Load all kernels for the device of the current context: before a stream is captured. Raises `K25Error`."""
    _require_kernels(library)
    text, message = _message()
    check_status(library.handle.k25_gpu_prepare(message), text)


def set_even_rows(library: NativeLibrary, *, is_even: bool) -> None:
    """Promise that every row in every expert table is even (see `k25_gpu_set_even_rows`): faster kernels run."""
    _require_kernels(library)
    library.handle.k25_gpu_set_even_rows(int(is_even))


def workspace_bytes(
    library: NativeLibrary, op: str, inputs: Sequence[DeviceTensor], attributes: Mapping[str, Any]
) -> int:
    """Bytes of scratch memory for a call, and for any call with smaller inputs; addresses are not read.

    Raises `InputError` where shapes or dtypes do not fit, `BackendMissingError` where the library has no GPU kernels.
    """
    _require_kernels(library)
    signature = _signature(op)
    if signature == LINEAR:
        return 0
    values, keep = attribute_arguments(signature, attributes)
    text, message = _message()
    bytes_ = ctypes.c_size_t()
    function = getattr(library.handle, f"k25_{signature.folder}_gpu_workspace")
    check_status(function(_tensors(inputs), *values, ctypes.byref(bytes_), message), text)
    del keep
    return bytes_.value


def launch(
    library: NativeLibrary,
    op: str,
    inputs: Sequence[DeviceTensor],
    outputs: Sequence[DeviceTensor],
    attributes: Mapping[str, Any],
    *,
    workspace: int = 0,
    stream: int = 0,
) -> None:
    """Put op `op` (the name of its ONNX node) on a stream; `workspace` is the address of `workspace_bytes` bytes.

    Addresses are multiples of 16. Output 1 of `k25.MLA` may be its cache: then that is updated in place. Raises
    `InputError`, `BackendMissingError` where there is no kernel, driver or device for it, `K25Error` where it fails.
    """
    _require_kernels(library)
    signature = _signature(op)
    values, keep = attribute_arguments(signature, attributes)
    text, message = _message()
    arguments: list[Any] = [_tensors(inputs), *values, _tensors(outputs)]
    if signature != LINEAR:
        arguments.append(ctypes.c_void_p(workspace))
    function = getattr(library.handle, f"k25_{signature.folder}_gpu")
    check_status(function(*arguments, ctypes.c_void_p(stream), message), text)
    del keep


def _require_kernels(library: NativeLibrary) -> None:
    if gpu_kernel_count(library) == 0:
        raise BackendMissingError(
            f"native library {library.path}: it has no GPU kernels. To get them: python -m k25_plugins.gpu_kernels "
            "--output DIR, then build it with -DK25_GPU_KERNELS=DIR"
        )


def _signature(op: str) -> OpSignature:
    for signature in OPS:
        if signature.name == op and op in _OPS:
            return signature
    raise BackendMissingError(f"{DOMAIN}.{op}: there are GPU kernels for {', '.join(_OPS)} only")


def _message() -> tuple[ctypes.Array[ctypes.c_char], Message]:
    text = ctypes.create_string_buffer(_MESSAGE_BYTES)
    return text, Message(ctypes.cast(text, ctypes.c_char_p), _MESSAGE_BYTES)


def _tensors(tensors: Sequence[DeviceTensor]) -> ctypes.Array[Tensor]:
    found = (Tensor * len(tensors))()
    for to, tensor in zip(found, tensors, strict=True):
        if tensor.dtype not in ONNX_DTYPES:
            raise mismatch("GPU launch: dtype", expected=", ".join(ONNX_DTYPES), found=tensor.dtype)
        to.data, to.dtype, to.rank = tensor.address, ONNX_DTYPES[tensor.dtype], len(tensor.shape)
        to.dims[: len(tensor.shape)] = tensor.shape
    return found
