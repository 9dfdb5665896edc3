"""A tensor in host memory. numpy has no bfloat16, so the dtype stands beside the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.int4 import bfloat16_to_float32, float32_to_bfloat16

#: The numpy dtype that holds the bits of each dtype.
STORAGE_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
}


@dataclass(frozen=True)
class HostTensor:
    """`array` holds the bits (uint16 for bfloat16), `dtype` says what they are."""

    array: npt.NDArray[Any]
    dtype: str

    def __post_init__(self) -> None:
        assert self.array.dtype == STORAGE_DTYPES[self.dtype], (self.array.dtype, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.array.shape

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as float32 (exact for bfloat16)."""
        return bfloat16_to_float32(self.array) if self.dtype == "bfloat16" else self.array.astype(np.float32)


def host_tensor_from_float32(values: npt.NDArray[np.float32], dtype: str) -> HostTensor:
    """float32 values as `float32` or, rounded to nearest even, `bfloat16`."""
    if dtype == "bfloat16":
        return HostTensor(float32_to_bfloat16(values), dtype)
    return HostTensor(np.ascontiguousarray(values, np.float32), dtype)
