"""The official rules for pixels: resize, pad, normalise, cut into patches.

Sizes are (width, height) as in Pillow; arrays are [rows, columns, channels].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from k25_runtime.image_files import require_pillow
from k25_runtime.media_settings import MediaSettings
from k25_runtime.vision_inputs import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Size = tuple[int, int]

CHANNELS = 3


def resized_size(width: int, height: int, settings: MediaSettings, *, patch_limit: int) -> Size:
    """The size an image is resized to: never larger than it is, and within `patch_limit` patches before padding."""
    patch, side = settings.patch_size, settings.patch_limit_on_one_side * settings.patch_size
    patches = max(1.0, width // patch) * max(1.0, height // patch)
    scale = min(1.0, math.sqrt(patch_limit / patches), side / width, side / height)
    return min(max(1, int(width * scale)), side), min(max(1, int(height * scale)), side)


def padded_size(size: Size, settings: MediaSettings) -> Size:
    """The size after padding: the next multiples of two patches."""
    step = settings.patch_size * settings.merge_kernel_size
    width, height = size
    return width + -width % step, height + -height % step


def image_grid(width: int, height: int, settings: MediaSettings) -> Grid:
    """(1, h, w) in patches of an image of this size, without making it."""
    padded = padded_size(resized_size(width, height, settings, patch_limit=settings.in_patch_limit), settings)
    return 1, padded[1] // settings.patch_size, padded[0] // settings.patch_size


def padded_pixels(image: Image, size: Size, settings: MediaSettings) -> UInt8:
    """uint8 [rows, columns, 3]: the RGB image resized to `size` (bicubic), zeros added on the right and below."""
    resized = np.asarray(image.resize(size, resample=require_pillow().Resampling.BICUBIC))
    width, height = padded_size(size, settings)
    pixels = np.zeros((height, width, CHANNELS), np.uint8)
    pixels[: size[1], : size[0]] = resized
    return pixels


def patches_from_frames(frames: Sequence[UInt8], settings: MediaSettings) -> tuple[Float32, Grid]:
    """(pixel_values float32 [t·h·w, 3, P, P], grid) of frames of one padded size.

    (x / 255 - mean) / std, patch by patch. Each of the 256 values is normalised once, in the official order of
    operations, and looked up.
    """
    patch = settings.patch_size
    t, h, w = len(frames), frames[0].shape[0] // patch, frames[0].shape[1] // patch
    values = np.empty((t, h, w, CHANNELS, patch, patch), np.float32)
    levels = (np.arange(256) / 255.0).astype(np.float32)
    for channel in range(CHANNELS):
        table = (levels - np.float32(settings.image_mean[channel])) / np.float32(settings.image_std[channel])
        for index, frame in enumerate(frames):
            normalised = table[frame[..., channel]].reshape(h, patch, w, patch)
            values[index, :, :, channel] = normalised.transpose(0, 2, 1, 3)
    return values.reshape(t * h * w, CHANNELS, patch, patch), (t, h, w)
