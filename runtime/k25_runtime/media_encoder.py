"""Media items through the `vision` component: what it needs beside the pixels is computed, what was seen is kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from k25_export.config import VisionConfig
from k25_plugins.errors import mismatch
from k25_runtime.embedding_cache import EmbeddingCache
from k25_runtime.media_item import MediaItem
from k25_runtime.model_runner import ModelRunner
from k25_runtime.vision_inputs import vision_inputs

Float32 = npt.NDArray[np.float32]


class MediaEncoder:
    """Embeddings of media items, kept by their content."""

    def __init__(self, *, runner: ModelRunner, vision: VisionConfig, cache_bytes: int) -> None:
        self.cache = EmbeddingCache(cache_bytes)
        self._runner = runner
        self._vision = vision

    def embeddings(self, item: MediaItem) -> Float32:
        """float32 [tokens, hidden] of an item, read-only where it is kept."""
        found = self.cache.get(item.key)
        if found is None:
            found = self._encoded(item)
            self.cache.put(item.key, found)
        return found

    def _encoded(self, item: MediaItem) -> Float32:
        patch = item.pixel_values.shape[2]
        if patch != self._vision.patch_size:
            raise mismatch("media: pixel_values", expected=f"patches of {self._vision.patch_size} pixels", found=patch)
        inputs = vision_inputs(
            self._runner.position_table(),
            item.grid,
            head_dim=self._vision.vt_hidden_size // self._vision.vt_num_attention_heads,
            merge=self._vision.merge_kernel_size,
            max_frames=self._vision.init_pos_emb_time,
        )
        return self._runner.vision(item.pixel_values, inputs, tokens=item.tokens)
