"""Images and video of a runtime: prepared, placed among token ids, encoded. Made when the first media come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import BackendMissingError, InputError, mismatch
from k25_runtime.bundle_files import BundleFiles
from k25_runtime.media_encoder import MediaEncoder
from k25_runtime.media_item import MediaItem, items_from_arrays
from k25_runtime.media_processor import Embeddings, MediaList, MediaProcessor, PreparedMedia
from k25_runtime.media_settings import media_settings_from_folder
from k25_runtime.media_tokens import PlacedMedia, Positions, expanded_token_ids
from k25_runtime.model_runner import ModelRunner

Float32 = npt.NDArray[np.float32]
Item = MediaItem | Embeddings


class Media:
    """What a runtime does with images and video. Embeddings are kept in a cache, by content."""

    def __init__(self, *, files: BundleFiles, runner: ModelRunner, cache_bytes: int) -> None:
        """`InputError` for a model that takes no media, `BackendMissingError` for a bundle without the component."""
        model = files.manifest.model
        if model.vision is None or model.media_placeholder_token_id is None:
            raise InputError("media: expected a model with a vision tower and a media placeholder, found text only")
        if not runner.has_vision:
            raise BackendMissingError(
                f"media: bundle {files.folder} has no vision component: export the checkpoint again"
            )
        self.placeholder = model.media_placeholder_token_id
        self.processor = MediaProcessor(media_settings_from_folder(files.tokenizer_folder))
        if self.processor.settings.patch_size != model.vision.patch_size:
            raise mismatch(
                f"{files.tokenizer_folder}: media_proc_cfg.patch_size",
                expected=f"the model's {model.vision.patch_size}",
                found=self.processor.settings.patch_size,
            )
        self._hidden = model.text.hidden_size
        self._encoder = MediaEncoder(runner=runner, vision=model.vision, cache_bytes=cache_bytes)

    def prepared(self, media: MediaList) -> list[PreparedMedia]:
        """Every source by the official rules, in order."""
        prepared = self.processor.prepared(media)
        for item in (item for source in prepared for item in source.items):
            if not isinstance(item, MediaItem) and (item.shape[1] != self._hidden or not len(item)):
                raise mismatch("media: embeddings", expected=f"float32 [tokens, {self._hidden}]", found=item.shape)
        return prepared

    def items(self, media: MediaList) -> list[Item]:
        """The items of all sources: one for an image, one for each chunk of a video."""
        return [item for source in self.prepared(media) for item in source.items]

    def expanded(self, token_ids: Sequence[int], items: Sequence[Item]) -> tuple[list[int], Positions]:
        """(token ids with room for the items, the positions of media among them)."""
        counts = [item.tokens if isinstance(item, MediaItem) else len(item) for item in items]
        return expanded_token_ids(token_ids, counts, self.placeholder)

    def placed(self, items: Sequence[Item], positions: Positions) -> PlacedMedia:
        """The items' embeddings at these positions."""
        found = [self._encoder.embeddings(item) if isinstance(item, MediaItem) else item for item in items]
        empty = np.empty((0, self._hidden), np.float32)
        return PlacedMedia(positions=positions, embeddings=np.concatenate([empty, *found]))

    def encode(self, pixel_values: npt.ArrayLike, grid_thw: npt.ArrayLike) -> list[Float32]:
        """Embeddings float32 [tokens, hidden] of each item of [N, 3, P, P] patches and [n, 3] grids."""
        return [self._encoder.embeddings(item).copy() for item in items_from_arrays(pixel_values, grid_thw)]
