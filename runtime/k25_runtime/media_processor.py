"""Media as a caller has them become items for the `vision` component, by the official processor's rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import InputError
from k25_runtime.image_files import ImageSource, rgb_image
from k25_runtime.image_processor import padded_pixels, patches_from_frames, resized_size
from k25_runtime.media_item import MediaItem, MediaKind, items_from_arrays
from k25_runtime.media_settings import MediaSettings
from k25_runtime.video_frames import SampledFrames, Video, sampled_frames, timestamp_text

if TYPE_CHECKING:
    from PIL.Image import Image

Float32 = npt.NDArray[np.float32]

#: Embeddings as `Runtime.encode_media` returns them: float32 [tokens, hidden].
Embeddings: TypeAlias = Float32
#: What a method takes as one of its `media`.
MediaSource: TypeAlias = "ImageSource | Video | MediaItem | Embeddings"
#: The media of one sequence in the order of their placeholders, or (pixel_values, grid_thw) as `encode_media` has them.
MediaList: TypeAlias = "Iterable[MediaSource] | tuple[npt.NDArray[Any], npt.ArrayLike]"


@dataclass(frozen=True, kw_only=True)
class PreparedMedia:
    """One source, prepared: an image is one item, a video one for each chunk of frames."""

    kind: MediaKind
    items: tuple[MediaItem | Embeddings, ...]


class MediaProcessor:
    """Prepares images and videos with the settings of a checkpoint."""

    def __init__(self, settings: MediaSettings | None = None) -> None:
        self.settings = settings or MediaSettings()

    def prepared(self, media: MediaList) -> list[PreparedMedia]:
        """Every source, in order. Items and embeddings are taken as they are."""
        if isinstance(media, str | bytes | np.ndarray | Video | MediaItem) or not isinstance(media, Iterable):
            raise InputError(f"media: expected a list of images and videos, found one {type(media).__name__}")
        if isinstance(media, tuple) and len(media) == 2 and getattr(media[0], "ndim", 0) == 4:
            return [PreparedMedia(kind="image", items=(item,)) for item in items_from_arrays(*media)]
        sources = cast("Iterable[MediaSource]", media)
        return [self._prepared(source, f"media {number}") for number, source in enumerate(sources, start=1)]

    def image(self, source: ImageSource, *, where: str = "image") -> MediaItem:
        """An image as one item; what it may be, and what is refused, says `image_files`."""
        return self._item([rgb_image(source, where=where)], limit=self.settings.in_patch_limit, kind="image")

    def video(self, video: Video, *, where: str = "video") -> list[MediaItem]:
        """A video as one item for each chunk of up to four of the frames that are looked at."""
        return list(self._chunks(sampled_frames(video, self.settings, where=where)))

    def _prepared(self, source: MediaSource, where: str) -> PreparedMedia:
        if isinstance(source, MediaItem):
            return PreparedMedia(kind=source.kind, items=(source,))
        if isinstance(source, Video):
            return PreparedMedia(kind="video", items=tuple(self.video(source, where=where)))
        if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype == np.float32:
            return PreparedMedia(kind="image", items=(source,))
        return PreparedMedia(kind="image", items=(self.image(source, where=where),))

    def _chunks(self, sampled: SampledFrames) -> Iterator[MediaItem]:
        width = self.settings.temporal_merge_kernel_size
        for start in sampled.seconds[::width]:
            frames = list(islice(sampled.frames, width))
            limit = self.settings.in_patch_limit_each_frame
            if self.settings.in_patch_limit_video is not None:
                limit = min(limit, round(self.settings.in_patch_limit_video / len(frames)))
            timestamp = timestamp_text(start, self.settings.timestamp_mode)
            yield self._item(frames, limit=max(1, limit), kind="video", timestamp=timestamp)

    def _item(self, frames: list[Image], *, limit: int, kind: MediaKind, timestamp: str = "") -> MediaItem:
        """Frames of one item; all get the size that the first one is to have."""
        size = resized_size(*frames[0].size, self.settings, patch_limit=limit)
        pixels = [padded_pixels(frame, size, self.settings) for frame in frames]
        pixel_values, grid = patches_from_frames(pixels, self.settings)
        return MediaItem(pixel_values=pixel_values, grid=grid, kind=kind, timestamp=timestamp)
