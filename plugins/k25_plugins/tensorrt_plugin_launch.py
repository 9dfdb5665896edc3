"""Where a TensorRT plugin's work goes at run time: the GPU kernels of the ops, through a C interface.

The kernels are not in this build. `launch` says so by an error, and this module is the one place that changes when
they come: addresses, shapes, dtypes and the stream arrive here ready to hand on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k25_plugins.errors import BackendMissingError
from k25_plugins.signatures import DOMAIN, OpSignature


@dataclass(frozen=True, kw_only=True)
class DeviceTensor:
    """A tensor in GPU memory, row-major."""

    address: int
    dtype: str
    shape: tuple[int, ...]


def workspace_bytes(
    signature: OpSignature, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], attributes: Mapping[str, Any]
) -> int:
    """Bytes of scratch memory that a call with inputs of these largest shapes needs."""
    return 0


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
    raise BackendMissingError(f"GPU kernels for {DOMAIN}.{signature.name} are not in this build")
