"""A buffer of a layer's experts of our own: where each tensor starts, and the table that says so.

Needed where the bytes of the shards cannot be used in place: a GPU, a layer over several shards, odd offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_export.manifest import Tensor
from k25_export.tensor_table import NOT_HELD, Table, TensorTable

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False, kw_only=True)
class ScatteredBytes:
    """`size` bytes, to be put together from (offset, bytes); gaps are never read."""

    size: int
    pieces: tuple[tuple[int, Bytes], ...]

    def gathered(self) -> Bytes:
        """The bytes in one buffer; gaps are zero."""
        buffer = np.zeros(self.size, np.uint8)
        for offset, piece in self.pieces:
            buffer[offset : offset + len(piece)] = piece
        return buffer


@dataclass(frozen=True, eq=False, kw_only=True)
class ScatteredTensor:
    """A tensor over scattered bytes. Tensors over the same `source` are the same memory."""

    source: ScatteredBytes
    dtype: str
    shape: tuple[int, ...]


def expert_layout(
    table: TensorTable,
    names: Sequence[str],
    *,
    row_bytes: int,
    alignment: int,
    bytes_of: Callable[[Tensor], Bytes],
) -> tuple[ScatteredBytes, Table]:
    """Each expert's tensors at multiples of `alignment`, in the order of the columns, and the table int64 [experts, 6].

    `alignment` is a multiple of `row_bytes`. The buffer ends at a multiple of `alignment`.
    """
    assert alignment % row_bytes == 0, (alignment, row_bytes)
    columns = [list(table.experts(name)) for name in names]
    rows: Any = np.full((1 + max(expert for column in columns for expert, _ in column), len(names)), NOT_HELD, np.int64)
    pieces = []
    offset = 0
    for index, column in enumerate(columns):
        for expert, tensor in column:
            pieces.append((offset, bytes_of(tensor)))
            rows[expert, index] = offset // row_bytes
            offset += -(-tensor.length // alignment) * alignment
    return ScatteredBytes(size=offset, pieces=tuple(pieces)), rows
