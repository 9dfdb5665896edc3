"""Frames of a video from a folder of images, an animation (GIF, WebP, PNG) or an iterator, and which are looked at.

There is no decoder of video files here: take frames with a tool of your own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from k25_plugins.errors import InputError, mismatch
from k25_runtime.image_files import ImageSource, decoding, opened_image, rgb_frame, rgb_image
from k25_runtime.media_settings import MediaSettings

if TYPE_CHECKING:
    from PIL.Image import Image

#: Files of a folder that are frames, by the end of their name.
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")

MAX_FRAMES = 2**20
#: An animation of more pixels in all its frames is refused: they have to be decoded one after the other.
MAX_ANIMATION_PIXELS = 2**33

#: What browsers show a frame for whose duration is missing, in milliseconds.
_DEFAULT_DURATION = 100


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video to look at: `source` is a folder of frames, an animation (path or bytes), or an iterable of images.

    `fps` is how many frames of the source make a second. It may be left out for an animation, which says so itself,
    and for frames that were sampled already: then every frame is taken, at the processor's own rate.
    `frame_count` lets an iterator be read as it comes; without it and without a length, it is read to its end first.
    """

    source: str | Path | bytes | Iterable[ImageSource]
    fps: float | None = None
    frame_count: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampledFrames:
    """RGB frames in order, and the second at which each is shown."""

    frames: Iterator[Image]
    seconds: Sequence[float]


def sampled_frames(video: Video, settings: MediaSettings, *, where: str = "video") -> SampledFrames:
    """The frames of a video that the model looks at. Raises `InputError` for a source without frames."""
    if video.fps is not None and not 0 < video.fps < 1e6:
        raise mismatch(f"{where}: fps", expected="a number above 0", found=video.fps)
    source = video.source
    if isinstance(source, str | Path) and Path(source).is_dir():
        files = folder_frames(Path(source), where=where)
        return _picked(files, len(files), video.fps, settings, where=where)
    if isinstance(source, str | Path | bytes):
        return _animation_frames(source, video.fps, settings, where=where)
    if not isinstance(source, Iterable):
        raise mismatch(where, expected="a folder, an animation or an iterable of frames", found=type(source).__name__)
    count = video.frame_count
    if count is None and not isinstance(source, Sized):
        source = list(islice(source, MAX_FRAMES + 1))
    found = len(source) if count is None and isinstance(source, Sized) else count or 0
    return _picked(source, found, video.fps, settings, where=where)


def folder_frames(folder: Path, *, where: str = "video") -> list[Path]:
    """The images of a folder, by name; numbers in names count as numbers (`frame9` before `frame10`)."""
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES and path.is_file()]
    except OSError as error:
        raise InputError(f"{where} {folder}: cannot be read: {error.strerror}") from error
    if not files:
        raise mismatch(f"{where} {folder}", expected=f"frames ({' '.join(FRAME_SUFFIXES)})", found="no such file")
    return sorted(files, key=lambda path: _natural_order(path.name))


def sampled_indices(frame_count: int, fps: float, settings: MediaSettings) -> list[int]:
    """Which of `frame_count` frames at `fps` are looked at: `sample_fps` a second, evenly from first to last."""
    rate = min(settings.sample_fps, fps)
    wanted = max(round(frame_count * rate / fps), 1)
    if settings.max_num_frames_each_video is not None:
        wanted = min(wanted, settings.max_num_frames_each_video)
    return [int(index) for index in np.linspace(0, frame_count - 1, wanted).round()]


def timestamp_text(seconds: float, mode: str) -> str:
    """The time as the prompt spells it, such as 00:01:02.500; milliseconds are cut, not rounded."""
    milliseconds = f".{int(seconds % 1 * 1000):03d}" if mode.endswith(".fff") else ""
    whole = int(seconds)
    minutes_seconds = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    hours = f"{whole // 3600 % 24:02d}:" if mode.startswith("hh") else ""
    return f"{hours}{minutes_seconds}{milliseconds}"


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _picked(
    source: Iterable[ImageSource], count: int, fps: float | None, settings: MediaSettings, *, where: str
) -> SampledFrames:
    _require_count(count, where)
    fps = settings.sample_fps if fps is None else fps
    indices = sampled_indices(count, fps, settings)

    def frames() -> Iterator[Image]:
        for index, image in zip(indices, _members(source, indices, where), strict=True):
            yield rgb_image(image, where=f"{where}: frame {index}")

    return SampledFrames(frames=frames(), seconds=[index / fps for index in indices])


def _members(source: Iterable[ImageSource], indices: Sequence[int], where: str) -> Iterator[ImageSource]:
    """The members at these indices, which do not fall, in one pass."""
    wanted = iter(indices)
    next_index = next(wanted, None)
    for index, member in enumerate(source):
        while index == next_index:
            yield member
            next_index = next(wanted, None)
        if next_index is None:
            return
    if next_index is not None:
        raise mismatch(where, expected=f"a frame {next_index}", found="the end of the frames")


def _animation_frames(
    source: str | Path | bytes, fps: float | None, settings: MediaSettings, *, where: str
) -> SampledFrames:
    """The frames of an animated image. Its rate is its own: frames over the sum of their durations."""
    with opened_image(source, where=where) as (image, name):
        with decoding(name):
            count = int(getattr(image, "n_frames", 1))
        _require_count(count, name)
        if count * image.size[0] * image.size[1] > MAX_ANIMATION_PIXELS:
            raise mismatch(
                name, expected=f"at most {MAX_ANIMATION_PIXELS} pixels in all", found=f"{count} frames of {image.size}"
            )
        rate = fps or _rate_of_animation(image, count, name)
    indices = sampled_indices(count, rate, settings)

    def frames() -> Iterator[Image]:
        with opened_image(source, where=where) as (image, name):
            for index in indices:
                with decoding(f"{name}: frame {index}"):
                    image.seek(index)
                    frame = rgb_frame(image, name)
                yield frame

    return SampledFrames(frames=frames(), seconds=[index / rate for index in indices])


def _rate_of_animation(image: Any, count: int, name: str) -> float:
    total = 0.0
    for index in range(count):
        with decoding(f"{name}: frame {index}"):
            image.seek(index)
            image.load()
        total += float(image.info.get("duration") or _DEFAULT_DURATION)
    return 1000 * count / total


def _require_count(count: int, where: str) -> None:
    if not 1 <= count <= MAX_FRAMES:
        raise mismatch(where, expected=f"1 to {MAX_FRAMES} frames", found=count)
