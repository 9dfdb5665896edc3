"""The safetensors header: 8 bytes little-endian length N, N bytes of JSON, data. Read and checked; no data is touched.

Format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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


class HeaderEntry(NamedTuple):
    """One tensor; `start` and `stop` count from the start of the data. Equal shapes are one object: names are many."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """A checked header: its tensors by name, and the SHA-256 of the first `data_start` bytes of the file."""

    file_bytes: int
    data_start: int
    sha256: str
    entries: dict[str, HeaderEntry]


def header_from_file(path: Path) -> SafetensorsHeader:
    """Read and check the header; `InputError` says what is wrong with which file and tensor.

    Checked: the length fits the file, the JSON is an object, each entry has a dtype, a shape and offsets of the right
    length, and together they tile the data without gap or overlap (a duplicate name with other data leaves a gap).
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
    entries = _checked_entries(_objects_from_json(text, path.name), path.name)
    data_start = LENGTH_BYTES + length
    _check_tiling(entries, file_bytes - data_start, path.name)
    digest = hashlib.sha256(prefix + text).hexdigest()
    return SafetensorsHeader(file_bytes=file_bytes, data_start=data_start, sha256=digest, entries=entries)


def _objects_from_json(text: bytes, name: str) -> dict[str, Any]:
    try:
        objects = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise mismatch(f"shard {name}: header", expected="JSON", found=str(error)) from error
    if not isinstance(objects, dict):
        raise mismatch(f"shard {name}: header", expected="a JSON object", found=type(objects).__name__)
    objects.pop("__metadata__", None)
    return objects


def _checked_entries(objects: dict[str, Any], name: str) -> dict[str, HeaderEntry]:
    """Each entry with a known dtype, a shape of sizes and offsets of that length."""
    kinds: dict[tuple[Any, ...], tuple[str, tuple[int, ...], int]] = {}
    entries = {}
    are_plain = _are_plain(objects)
    new_entry = partial(tuple.__new__, HeaderEntry)  # what HeaderEntry(...) does, without a Python frame for each
    for tensor, entry in objects.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            start, stop = entry["data_offsets"]
            key = (dtype, *shape)
            is_good = are_plain or _are_plain({tensor: entry})
            if is_good and key not in kinds and min(shape, default=0) >= 0:
                kinds[key] = (dtype, key[1:], math.prod(shape) * ITEM_SIZES[dtype])
            is_good = is_good and start >= 0 and stop - start == kinds[key][2]
        except (TypeError, KeyError, ValueError, OverflowError):
            is_good = False
        if not is_good:
            raise mismatch(
                f"shard {name}: tensor {tensor}",
                expected="a dtype, a shape and data_offsets that agree",
                found=_shown(entry),
            )
        dtype, sizes, _ = kinds[key]
        entries[tensor] = new_entry((dtype, sizes, start, stop))
    return entries


def _are_plain(objects: dict[str, Any]) -> bool:
    """Whether shapes and offsets are lists of integers (in JSON 64.0 and true equal integers, but are none)."""
    try:
        lists = [entry[key] for entry in objects.values() for key in ("shape", "data_offsets")]
    except (TypeError, KeyError):
        return False
    return set(map(type, lists)) <= {list} and set(map(type, chain.from_iterable(lists))) <= {int}


def _check_tiling(entries: dict[str, HeaderEntry], data_bytes: int, name: str) -> None:
    """Together the tensors cover the data without gap or overlap."""
    end = 0
    for start, stop in sorted((entry.start, entry.stop) for entry in entries.values()):
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


def _owner(entries: dict[str, HeaderEntry], start: int) -> str:
    return next(name for name, entry in entries.items() if entry.start == start)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "JSON nested too deep"
    return text if len(text) <= 120 else f"{text[:117]}..."
