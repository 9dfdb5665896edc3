"""Embeddings of media that were seen before, so that an image in every turn of a conversation is encoded once."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class EmbeddingCache:
    """Least recently used out first; holds at most `limit_bytes` of embeddings (0 keeps nothing)."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._values: OrderedDict[bytes, Float32] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> Float32 | None:
        """The embeddings of this key, read-only, or None. They count as used now."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: bytes, embeddings: Float32) -> None:
        """Keep embeddings, and let go of the oldest ones beyond the limit; larger ones than that are not kept.

        The array must not be changed afterwards, and is made read-only.
        """
        if embeddings.nbytes > self.limit_bytes:
            return
        replaced = self._values.pop(key, None)
        self.bytes += embeddings.nbytes - (0 if replaced is None else replaced.nbytes)
        embeddings.flags.writeable = False
        self._values[key] = embeddings
        while self.bytes > self.limit_bytes:
            _, oldest = self._values.popitem(last=False)
            self.bytes -= oldest.nbytes
