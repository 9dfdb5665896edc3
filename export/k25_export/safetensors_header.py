"""The safetensors header: 8 bytes little-endian length N, N bytes of JSON, data. Read and checked; no data is touched.

Format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from k25_export.manifest import STORED_ITEM_SIZES
from k25_plugins.errors import InputError, mismatch

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8

#: Bytes of one element of every safetensors dtype with whole bytes. Wider than what the model uses, so that a wrong
#: dtype is reported as such and not as a broken file.
ITEM_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16"), 2),
    **dict.fromkeys(("U32",), 4),
    **dict.fromkeys(("U64", "F64", "C64"), 8),
    **STORED_ITEM_SIZES,
}


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """A checked header. `entries` maps a tensor name to its JSON object: `dtype`, `shape`, `data_offsets`.

    `data_offsets` count from `data_start`. `sha256` is over the first `data_start` bytes of the file.
    """

    file_bytes: int
    data_start: int
    sha256: str
    entries: dict[str, dict[str, Any]]


def header_from_file(path: Path) -> SafetensorsHeader:
    """Read and check the header; `InputError` says what is wrong with which file and tensor.

    Checked: the length fits the file, the JSON is an object, each entry has a dtype, a shape and offsets of the right
    length, and together they tile the data without gap or overlap (so a duplicate name is found as a gap).
    """
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if file_bytes < LENGTH_BYTES or length > min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise mismatch(
                    f"shard {path.name}",
                    expected=f"a header of at most {min(max(file_bytes - 8, 0), MAX_HEADER_BYTES)} bytes",
                    found=f"a header length of {length} in a file of {file_bytes} bytes",
                    hint="The file is truncated or no safetensors file; download it again.",
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"shard {path.name}: cannot be read: {error.strerror}") from error
    entries = _entries_from_json(text, path.name)
    data_start = LENGTH_BYTES + length
    _check_tiling(entries, file_bytes - data_start, path.name)
    digest = hashlib.sha256(prefix + text).hexdigest()
    return SafetensorsHeader(file_bytes=file_bytes, data_start=data_start, sha256=digest, entries=entries)


def _entries_from_json(text: bytes, name: str) -> dict[str, dict[str, Any]]:
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise mismatch(f"shard {name}: header", expected="JSON", found=str(error)) from error
    if not isinstance(entries, dict):
        raise mismatch(f"shard {name}: header", expected="a JSON object", found=type(entries).__name__)
    entries.pop("__metadata__", None)
    return entries


def _check_tiling(entries: dict[str, dict[str, Any]], data_bytes: int, name: str) -> None:
    spans: list[tuple[int, int]] = []
    for tensor, entry in entries.items():
        try:
            start, stop = entry["data_offsets"]
            length = math.prod(entry["shape"]) * ITEM_SIZES[entry["dtype"]]
            is_good = stop - start == length and start >= 0 and type(start) is type(stop) is int
            is_good = is_good and min(entry["shape"], default=0) >= 0
        except (TypeError, KeyError, ValueError, OverflowError):
            is_good = False
        if not is_good:
            raise mismatch(
                f"shard {name}: tensor {tensor}",
                expected="a dtype, a shape and data_offsets that agree",
                found=_shown(entry),
            )
        spans.append((start, stop))
    spans.sort()
    end = 0
    for start, stop in spans:
        if start != end:
            raise mismatch(
                f"shard {name}: tensor {_owner(entries, start)}",
                expected=f"data to go on at byte {end}",
                found=f"byte {start} ({'a gap' if start > end else 'an overlap'})",
            )
        end = stop
    if end != data_bytes:
        raise mismatch(
            f"shard {name}",
            expected=f"{end} bytes of data, as the header says",
            found=f"{data_bytes} bytes",
            hint="The file is truncated or has been changed; download it again.",
        )


def _owner(entries: dict[str, dict[str, Any]], start: int) -> str:
    return next(name for name, entry in entries.items() if entry["data_offsets"][0] == start)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
