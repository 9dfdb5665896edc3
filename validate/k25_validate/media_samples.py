"""The pictures that parity is checked on: drawn, not photographed, so that every machine has them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_export.config import VisionConfig
from k25_runtime.image_files import require_pillow
from k25_runtime.image_processor import patches_from_frames
from k25_runtime.media_item import MediaItem
from k25_runtime.media_settings import MediaSettings

UInt8 = npt.NDArray[np.uint8]

#: Name and grid: frames, rows and columns in units of a media token. No sides are alike that could be exchanged.
_GRIDS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("one token", (1, 1, 1)),
    ("landscape", (1, 3, 5)),
    ("narrow column", (1, 9, 1)),
    ("larger than the table", (1, 17, 16)),
    ("two frames", (2, 2, 3)),
    ("three frames", (3, 4, 1)),
    ("four frames", (4, 3, 2)),
)
_PICTURE_PIXELS = 112


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaSample:
    """`item` is what both sides get; `frames` uint8 [rows, columns, 3] are the pixels it was made from."""

    name: str
    item: MediaItem
    frames: tuple[UInt8, ...]


def built_in_media(vision: VisionConfig) -> tuple[MediaSample, ...]:
    """Images and chunks of frames of several shapes, for the patch and merge sizes of a model."""
    return tuple(_sample(name, grid, vision) for name, grid in _GRIDS)


def _sample(name: str, grid: tuple[int, int, int], vision: VisionConfig) -> MediaSample:
    frames, rows, columns = grid
    height, width = (
        size * kernel * vision.patch_size
        for size, kernel in zip((rows, columns), vision.merge_kernel_size, strict=True)
    )
    pixels = tuple(drawn_frame(height, width, moment=frame / 4) for frame in range(frames))
    values, patch_grid = patches_from_frames(pixels, MediaSettings(patch_size=vision.patch_size))
    item = MediaItem(pixel_values=values, grid=patch_grid, kind="image" if frames == 1 else "video")
    return MediaSample(name=name, item=item, frames=pixels)


def drawn_frame(height: int, width: int, *, moment: float = 0.0) -> UInt8:
    """uint8 [height, width, 3]: colour gradients, a disc that wanders with `moment` (0 to 1), stripes in a corner.

    No symmetry: flipped, turned or with its channels exchanged it is another picture.
    """
    y, x = np.mgrid[0:height, 0:width]
    across, down = (x + 0.5) / width, (y + 0.5) / height
    image = np.stack([255 * across, 255 * down**2, 200 * (1 - across) * down], axis=-1)
    inside = (across - 0.3 - 0.4 * moment) ** 2 + (down - 0.4) ** 2 < 0.05
    image[inside] = (250, 220, 40)
    stripes = (across > 0.6) & (down > 0.55) & ((x + 2 * y) % 7 < 3)
    image[stripes] = (20, 30, 90)
    return image.astype(np.uint8)


def picture_from_frames(frames: Sequence[UInt8]) -> str:
    """The frames side by side as a small PNG in a `data:` address."""
    image = require_pillow().fromarray(np.concatenate(frames, axis=1))
    image.thumbnail((_PICTURE_PIXELS * len(frames), _PICTURE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
