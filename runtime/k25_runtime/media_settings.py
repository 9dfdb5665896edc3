"""How images and frames are prepared: `media_proc_cfg` of `preprocessor_config.json`, or the official defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from k25_plugins.errors import InputError, mismatch

SETTINGS_FILE = "preprocessor_config.json"

#: `timestamp_mode` → the part before the milliseconds; seconds are cut, not rounded.
TIMESTAMP_MODES = ("hh:mm:ss.fff", "mm:ss.fff", "mm:ss")


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """Settings by their official names. Limits count patches, before padding; None means no limit."""

    in_patch_limit: int = 16384
    in_patch_limit_each_frame: int = 4096
    in_patch_limit_video: int | None = None
    patch_limit_on_one_side: int = 512
    patch_size: int = 14
    merge_kernel_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    sample_fps: float = 2.0
    max_num_frames_each_video: int | None = None
    temporal_merge_kernel_size: int = 4
    timestamp_mode: str = "hh:mm:ss.fff"
    fixed_output_tokens: None = None


def media_settings_from_folder(folder: Path) -> MediaSettings:
    """The settings of a tokenizer or checkpoint folder; the official ones where it has no such file.

    `InputError` names the key that this project does not know or that does not fit.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return MediaSettings()
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON, found {error}") from error
    block = values.get("media_proc_cfg") if isinstance(values, dict) else None
    if not isinstance(block, dict):
        raise mismatch(f"{path}: media_proc_cfg", expected="an object", found=type(block).__name__)
    return media_settings_from_dict(block, where=f"{path}: media_proc_cfg")


def media_settings_from_dict(values: Mapping[str, Any], *, where: str = "media_proc_cfg") -> MediaSettings:
    """The settings from the parsed block. Keys that are missing have the official value."""
    unknown = sorted(set(values) - {field.name for field in fields(MediaSettings)})
    if unknown:
        raise mismatch(f"{where}.{unknown[0]}", expected="a setting of Kimi K2.5's processor", found="an unknown one")
    checked: dict[str, Any] = {}
    for key, value in values.items():
        expected, is_good = _RULES[key]
        if not is_good(value):
            raise mismatch(f"{where}.{key}", expected=expected, found=repr(value)[:60])
        checked[key] = tuple(float(item) for item in value) if isinstance(value, list) else value
    return MediaSettings(**checked)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**31


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(item) for item in value)


_COUNT = ("an integer of at least 1", _is_count)
_COUNT_OR_NONE = ("null or an integer of at least 1", _is_count_or_none)
_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "in_patch_limit": _COUNT,
    "in_patch_limit_each_frame": _COUNT,
    "in_patch_limit_video": _COUNT_OR_NONE,
    "patch_limit_on_one_side": (
        "an even number in 2..512",
        lambda value: _is_count(value) and value in range(2, 513, 2),
    ),
    "patch_size": _COUNT,
    "merge_kernel_size": ("2", lambda value: value == 2),
    "image_mean": ("three numbers", _are_numbers),
    "image_std": ("three numbers above 0", lambda value: _are_numbers(value) and min(value) > 0),
    "sample_fps": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "max_num_frames_each_video": _COUNT_OR_NONE,
    "temporal_merge_kernel_size": ("an integer in 1..4", lambda value: _is_count(value) and value <= 4),
    "timestamp_mode": (" or ".join(TIMESTAMP_MODES), lambda value: value in TIMESTAMP_MODES),
    "fixed_output_tokens": ("null (a fixed number of tokens is not supported)", lambda value: value is None),
}
