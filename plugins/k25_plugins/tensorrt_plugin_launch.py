"""Where a TensorRT plugin's work goes at run time: the ops' GPU kernels, through the native library's C interface.

A library without GPU kernels still builds engines: the workspace is empty then, and `launch` says so by an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k25_plugins import gpu_launch
from k25_plugins.errors import BackendMissingError
from k25_plugins.gpu_launch import DeviceTensor
from k25_plugins.native_library import native_library
from k25_plugins.signatures import DOMAIN, OpSignature

__all__ = ["DeviceTensor", "launch", "workspace_bytes"]


def workspace_bytes(
    signature: OpSignature, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], attributes: Mapping[str, Any]
) -> int:
    """Bytes of scratch memory that a call with inputs of these largest shapes needs."""
    library = native_library()
    if library is None or gpu_launch.gpu_kernel_count(library) == 0:
        return 0
    tensors = [DeviceTensor(address=0, dtype=dtype, shape=shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
    return gpu_launch.workspace_bytes(library, signature.name, tensors, attributes)


def launch(
    signature: OpSignature,
    inputs: Sequence[DeviceTensor],
    outputs: Sequence[DeviceTensor],
    attributes: Mapping[str, Any],
    *,
    workspace: int,
    stream: int,
) -> None:
    """Run the op on a CUDA stream; `workspace` is the address of `workspace_bytes` bytes. Raises `K25Error`."""
    library = native_library()
    if library is None or gpu_launch.gpu_kernel_count(library) == 0:
        raise BackendMissingError(f"GPU kernels for {DOMAIN}.{signature.name} are not in this build")
    gpu_launch.launch(library, signature.name, inputs, outputs, attributes, workspace=workspace, stream=stream)
