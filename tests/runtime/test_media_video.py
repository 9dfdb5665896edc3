"""Frames of a video: which are looked at, how they are grouped, timed and sized, and where they may come from."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from k25_plugins.errors import InputError
from k25_runtime import video_frames
from k25_runtime.media_processor import MediaProcessor
from k25_runtime.media_settings import MediaSettings, media_settings_from_dict, media_settings_from_folder
from k25_runtime.video_frames import Video, folder_frames, sampled_indices, timestamp_text

DEFAULT = MediaSettings()


def frame(value: int, width: int = 28, height: int = 28) -> Any:
    return np.full((height, width, 3), value, np.uint8)


def levels(items: list[Any]) -> list[list[int]]:
    """The grey level of each frame of each item."""
    found = []
    for item in items:
        first_of_frame = item.pixel_values.reshape(item.grid[0], -1)[:, 0]
        found.append([round((value * 0.5 + 0.5) * 255) for value in first_of_frame])
    return found


def gif(values: list[int], duration: int | list[int], width: int = 28, height: int = 28) -> bytes:
    frames = [Image.fromarray(frame(value, width, height)) for value in values]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return buffer.getvalue()


# Sampling.


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [
        (1, 30, [0]),
        (10, 30, [0]),
        (30, 30, [0, 29]),
        (60, 30, [0, 20, 39, 59]),
        (5, 2, [0, 1, 2, 3, 4]),
        (5, 1, [0, 1, 2, 3, 4]),
        (7, 4, [0, 2, 4, 6]),  # round(3.5) is 4, to even
        (9, 4, [0, 3, 5, 8]),  # round(4.5) is 4; 2.67 and 5.33 between
    ],
)
def test_two_frames_a_second_from_the_first_to_the_last(count: int, fps: float, expected: list[int]) -> None:
    assert sampled_indices(count, fps, DEFAULT) == expected


@given(count=st.integers(1, 5000), fps=st.floats(0.1, 240))
def test_samples_rise_and_stay_in_the_video(count: int, fps: float) -> None:
    indices = sampled_indices(count, fps, DEFAULT)
    assert len(indices) == max(round(count * min(2.0, fps) / fps), 1)
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < count


def test_a_limit_on_frames_is_kept() -> None:
    assert sampled_indices(1000, 2, MediaSettings(max_num_frames_each_video=3)) == [0, 500, 999]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00.000"), (1.9999, "00:00:01.999"), (62.5, "00:01:02.500"), (3661.25, "01:01:01.250")],
)
def test_timestamps(seconds: float, text: str) -> None:
    assert timestamp_text(seconds, "hh:mm:ss.fff") == text
    assert timestamp_text(seconds, "mm:ss.fff") == text[3:]
    assert timestamp_text(seconds, "mm:ss") == text[3:8]


# Chunks.


def test_four_frames_make_a_chunk_and_the_last_may_be_shorter() -> None:
    items = MediaProcessor().video(Video(source=[frame(10 * index) for index in range(10)]))
    assert [item.grid for item in items] == [(4, 2, 2), (4, 2, 2), (2, 2, 2)]
    assert levels(items) == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90]]
    assert [item.timestamp for item in items] == ["00:00:00.000", "00:00:02.000", "00:00:04.000"]
    assert {item.kind for item in items} == {"video"}
    assert [item.tokens for item in items] == [1, 1, 1]  # whatever the number of frames


def test_a_chunk_is_timed_by_its_first_frame() -> None:
    items = MediaProcessor().video(Video(source=[frame(index) for index in range(60)], fps=10))
    assert [len(found) for found in levels(items)] == [4, 4, 4]
    assert levels(items)[1][0] == 21  # 12 of 60 frames: every 5.36th
    # Frame 43 is shown at 4.3 s, of which int(seconds % 1 * 1000) leaves 299: the official arithmetic.
    assert [item.timestamp for item in items] == ["00:00:00.000", "00:00:02.100", "00:00:04.299"]


def test_a_chunk_has_the_size_of_its_first_frame() -> None:
    frames = [frame(1, 60, 30), *[frame(2, 28, 28)] * 3, frame(3, 28, 28), frame(4, 90, 90)]
    assert [item.grid for item in MediaProcessor().video(Video(source=frames))] == [(4, 4, 6), (2, 2, 2)]


def test_the_worked_case_of_a_frame() -> None:
    item = MediaProcessor().video(Video(source=[frame(0, 1920, 1080)]))[0]
    assert (item.grid, item.tokens) == ((1, 48, 86), 1032)


def test_a_limit_for_the_whole_chunk() -> None:
    chosen = MediaSettings(in_patch_limit_video=64)
    grids = [item.grid for item in MediaProcessor(chosen).video(Video(source=[frame(0, 140, 140)] * 5))]
    side = math.ceil(int(140 * math.sqrt(16 / 100)) / 28) * 2
    assert grids == [(4, side, side), (1, 8, 8)]


# Where frames come from.


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for index in (10, 2, 1, 33):
        Image.fromarray(frame(index)).save(tmp_path / f"frame_{index}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "sub.png").mkdir()
    assert [path.stem for path in folder_frames(tmp_path)] == ["frame_1", "frame_2", "frame_10", "frame_33"]
    assert levels(MediaProcessor().video(Video(source=tmp_path))) == [[1, 2, 10, 33]]
    assert levels(MediaProcessor().video(Video(source=str(tmp_path), fps=4))) == [[1, 33]]


def test_only_frames_that_are_looked_at_are_read(tmp_path: Path) -> None:
    for index in range(8):
        Image.fromarray(frame(index)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"damaged")
    assert levels(MediaProcessor().video(Video(source=tmp_path, fps=8))) == [[0, 7]]
    with pytest.raises(InputError, match=r"frame 3 .*3\.png"):
        MediaProcessor().video(Video(source=tmp_path))


@pytest.mark.parametrize("as_file", [True, False])
def test_an_animation_knows_its_own_rate(tmp_path: Path, as_file: bool) -> None:
    data = gif(list(range(0, 240, 24)), duration=100)  # ten frames, one second
    (tmp_path / "movie.gif").write_bytes(data)
    source = tmp_path / "movie.gif" if as_file else data
    items = MediaProcessor().video(Video(source=source))
    assert levels(items) == [[0, 216]]
    assert levels(MediaProcessor().video(Video(source=source, fps=2))) == [
        [0, 24, 48, 72],
        [96, 120, 144, 168],
        [192, 216],
    ]


def test_durations_may_differ() -> None:
    data = gif([0, 60, 120, 180], duration=[1000, 500, 250, 250])  # two frames a second on average
    items = MediaProcessor().video(Video(source=data))
    assert levels(items) == [[0, 60, 120, 180]]


def test_a_duration_that_is_missing_is_a_tenth_of_a_second() -> None:
    assert levels(MediaProcessor().video(Video(source=gif([0, 50, 100, 150, 200] * 2, duration=0)))) == [[0, 200]]


def test_a_still_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(frame(7)).save(tmp_path / "still.png")
    assert levels(MediaProcessor().video(Video(source=tmp_path / "still.png"))) == [[7]]


def test_an_iterator_is_read_as_it_comes() -> None:
    alive = []

    def frames() -> Iterator[Any]:
        for index in range(100):
            alive.append(index)
            yield frame(index)

    items = MediaProcessor().video(Video(source=frames(), fps=50, frame_count=100))
    assert levels(items) == [[0, 33, 66, 99]]
    assert levels(MediaProcessor().video(Video(source=frames(), fps=50))) == [[0, 33, 66, 99]]
    endless = MediaProcessor().video(Video(source=iter([frame(1)] * 5), fps=2, frame_count=3))
    assert levels(endless) == [[1, 1, 1]]


def test_an_array_of_frames() -> None:
    items = MediaProcessor().video(Video(source=np.stack([frame(index) for index in range(5)])))
    assert levels(items) == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (Video(source=[]), "1 to .* frames, found 0"),
        (Video(source=iter([])), "1 to .* frames, found 0"),
        (Video(source=iter([frame(0)]), frame_count=3), "the end of the frames"),
        (Video(source=[frame(0)], fps=0), "fps"),
        (Video(source=[frame(0)], fps=-1), "fps"),
        (Video(source=[frame(0)], fps=math.nan), "fps"),
        (Video(source=["missing.png"]), "frame 0 missing.png: cannot be read"),
        (Video(source="missing"), "missing: cannot be read"),
        (Video(source=b"GIF89a"), "video"),
        (Video(source=gif([0, 9], 100)[:-20]), "video"),
        (Video(source=17), "found int"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_video(video: Video, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MediaProcessor().video(video)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected frames \(\.png"):
        MediaProcessor().video(Video(source=tmp_path))


def test_an_animation_that_would_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_frames, "MAX_ANIMATION_PIXELS", 28 * 28 * 9)
    with pytest.raises(InputError, match="10 frames of"):
        MediaProcessor().video(Video(source=gif(list(range(0, 200, 20)), 100)))


# Settings.


def test_settings_come_from_the_checkpoint(tiny: Any, tmp_path: Path) -> None:
    assert media_settings_from_folder(tiny.bundle / "tokenizer") == DEFAULT
    assert media_settings_from_folder(tmp_path) == DEFAULT
    (tmp_path / "preprocessor_config.json").write_text('{"media_proc_cfg": {"in_patch_limit": 64, "sample_fps": 1}}')
    assert media_settings_from_folder(tmp_path) == MediaSettings(in_patch_limit=64, sample_fps=1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"media_proc_cfg": 3}', '{"media_proc_cfg": {"patch_size": "14"}}'])
def test_a_settings_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        media_settings_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_patch_limit", 0),
        ("in_patch_limit", None),
        ("in_patch_limit", True),
        ("in_patch_limit_video", -1),
        ("patch_limit_on_one_side", 513),
        ("patch_limit_on_one_side", 1024),
        ("merge_kernel_size", 3),
        ("image_mean", [0.5]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0, 0.5]),
        ("image_std", [0.5, float("nan"), 0.5]),
        ("sample_fps", 0),
        ("temporal_merge_kernel_size", 5),
        ("timestamp_mode", "h"),
        ("fixed_output_tokens", 256),
        ("resample", "lanczos"),
    ],
)
def test_a_setting_that_we_do_not_compute_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=key):
        media_settings_from_dict({key: value})
