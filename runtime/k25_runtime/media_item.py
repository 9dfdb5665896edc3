"""One media item, ready for the `vision` component: an image, or a chunk of up to four frames of a video."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import mismatch
from k25_runtime.vision_inputs import Grid, require_grid

MediaKind = Literal["image", "video"]

#: Patches that make one media token: 2x2 of each frame.
PATCHES_A_TOKEN = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaItem:
    """`pixel_values` float32 [t·h·w, 3, P, P] in the order frame, row, column; `grid` is (t, h, w) in patches.

    `timestamp` is the text before a video chunk in a prompt: when it starts.
    """

    pixel_values: npt.NDArray[np.float32]
    grid: Grid
    kind: MediaKind = "image"
    timestamp: str = ""

    def __post_init__(self) -> None:
        require_grid(self.grid, where="media: grid")
        t, h, w = self.grid
        shape = self.pixel_values.shape
        if len(shape) != 4 or shape[:2] != (t * h * w, 3) or shape[2] != shape[3]:
            raise mismatch("media: pixel_values", expected=f"[{t * h * w}, 3, P, P] for grid {self.grid}", found=shape)
        if self.pixel_values.dtype != np.float32:
            raise mismatch("media: pixel_values", expected="float32", found=self.pixel_values.dtype)

    @property
    def tokens(self) -> int:
        """Positions that it takes in a prompt, whatever its number of frames."""
        return self.grid[1] * self.grid[2] // PATCHES_A_TOKEN

    @cached_property
    def key(self) -> bytes:
        """A hash of the content: equal pixels and grids have equal keys."""
        digest = hashlib.blake2b(np.array(self.grid, np.int64).tobytes(), digest_size=32)
        digest.update(np.ascontiguousarray(self.pixel_values).data)
        return digest.digest()


def items_from_arrays(pixel_values: npt.ArrayLike, grid_thw: npt.ArrayLike) -> Iterator[MediaItem]:
    """Items from the patches of all media [N, 3, P, P] and their grids, integers [n, 3]; `InputError` if unlike."""
    grids = np.asarray(grid_thw)
    if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer) or (grids < 1).any():
        raise mismatch(
            "media: grid_thw", expected="integers [n, 3] of at least 1", found=f"{grids.dtype} {grids.shape}"
        )
    pixels = np.asarray(pixel_values)
    counts = [int(t) * int(h) * int(w) for t, h, w in grids]
    if pixels.ndim != 4 or len(pixels) != sum(counts) or not np.issubdtype(pixels.dtype, np.floating):
        raise mismatch(
            "media: pixel_values",
            expected=f"floating-point [{sum(counts)}, 3, P, P], the patches of all grids",
            found=f"{pixels.dtype} {list(pixels.shape)}",
        )
    return _items(np.asarray(pixels, np.float32), grids, counts)


def _items(pixels: npt.NDArray[np.float32], grids: npt.NDArray[np.integer], counts: list[int]) -> Iterator[MediaItem]:
    start = 0
    for (t, h, w), count in zip(grids, counts, strict=True):
        yield MediaItem(pixel_values=pixels[start : start + count], grid=(int(t), int(h), int(w)))
        start += count
