"""Reading the experts that a layer's tokens go to into the page cache, in parallel, while others already compute."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.manifest import Manifest
from k25_export.tensor_table import TensorTable, for_layer

THREADS = 4
CHUNK_BYTES = 4 << 20


class ExpertReadAhead:
    """Call `read` when the router has decided; it returns at once. Errors are left to the real reader."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self._table = TensorTable(manifest)
        self._paths = [file_in_checkpoint(folder, shard.file) for shard in manifest.shards]
        self._patterns = next(
            (
                binding.tensors or ()
                for component in manifest.components
                for binding in component.bindings.values()
                if binding.rule == "offsets"
            ),
            (),
        )
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, layer: int, expert_ids: npt.NDArray[np.integer]) -> None:
        """Start reading the tensors of these experts."""
        wanted = set(np.unique(expert_ids).tolist())
        for pattern in self._patterns:
            for expert, tensor in self._table.experts(for_layer(pattern, layer)):
                if expert in wanted:
                    self._pool.submit(_read, self._paths[tensor.shard], tensor.offset, tensor.length)


def _read(path: Path, offset: int, length: int) -> None:
    buffer = bytearray(min(CHUNK_BYTES, length))
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        done = 0
        while done < length:
            count = os.preadv(descriptor, [memoryview(buffer)[: min(len(buffer), length - done)]], offset + done)
            if count <= 0:
                return
            done += count
    except OSError:
        return
    finally:
        os.close(descriptor)
