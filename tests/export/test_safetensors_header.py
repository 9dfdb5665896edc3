"""The header reader: what the safetensors library writes is read; anything else is an `InputError`, whatever it is.

Whatever bytes a file has, the reader returns a header that is consistent in itself, or raises `InputError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from k25_export.safetensors_header import ITEM_SIZES, SafetensorsHeader, header_from_file
from k25_plugins.errors import InputError

NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "F16": "f2", "U32": "u4", "I32": "i4", "F32": "f4",
    "U64": "u8", "I64": "i8", "F64": "f8",
}  # fmt: skip


def file_bytes(entries: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from a header object (or its text) and data; `length` lies about the header's length."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    path = tmp_path / "shard.safetensors"

    def reader(content: bytes) -> SafetensorsHeader:
        path.write_bytes(content)
        return header_from_file(path)

    return reader


def assert_consistent(header: SafetensorsHeader, content: bytes) -> None:
    """What the class promises, checked from the bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    assert header.file_bytes == len(content)
    assert header.data_start == 8 + length <= len(content)
    assert header.sha256 == hashlib.sha256(content[: 8 + length]).hexdigest()
    spans = []
    for name, item in header.entries.items():
        assert type(name) is str
        assert type(item.dtype) is str
        assert type(item.shape) is tuple
        assert all(type(size) is int and size >= 0 for size in item.shape), item
        start, stop = item.start, item.stop
        assert type(start) is type(stop) is int
        assert stop - start == math.prod(item.shape) * ITEM_SIZES[item.dtype]
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        assert start == end
        end = stop
    assert end == len(content) - header.data_start


def read_or_refuse(path: Path, content: bytes) -> SafetensorsHeader | None:
    path.write_bytes(content)
    try:
        header = header_from_file(path)
    except InputError:
        return None
    assert_consistent(header, content)
    return header


tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
    max_size=5,
)
notes_text = st.text(st.characters(codec="utf-8"), max_size=6)
# Without entries, the library writes `{},"__metadata__":{}}`, which is no JSON.
metadata = st.none() | st.dictionaries(notes_text, notes_text, min_size=1, max_size=2)


def library_file(
    wanted: dict[str, tuple[str, list[int]]], notes: dict[str, str] | None
) -> tuple[bytes, dict[str, bytes]]:
    """A file written by the safetensors library, and the bytes of every tensor in it."""
    generator = np.random.default_rng(len(wanted))
    arrays = {}
    for name, (dtype, shape) in wanted.items():
        raw = generator.integers(0, 2, (math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize,), np.uint8)
        arrays[name] = raw.view(NUMPY_DTYPES[dtype]).reshape(shape)
    return save(arrays, metadata=notes), {name: array.tobytes() for name, array in arrays.items()}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=tensors, notes=metadata)
def test_files_of_the_safetensors_library_are_read(
    wanted: dict[str, tuple[str, list[int]]], notes: dict[str, str] | None, tmp_path: Path
) -> None:
    content, data = library_file(wanted, notes)
    header = read_or_refuse(tmp_path / "shard.safetensors", content)
    assert header is not None
    assert {name: (item.dtype, list(item.shape)) for name, item in header.entries.items()} == wanted
    for name, item in header.entries.items():
        start, stop = item.start, item.stop
        assert content[header.data_start + start : header.data_start + stop] == data[name]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=tensors, cut=st.integers(0, 10_000), extra=st.binary(max_size=9))
def test_truncated_and_lengthened_files_are_refused(
    wanted: dict[str, tuple[str, list[int]]], cut: int, extra: bytes, tmp_path: Path
) -> None:
    content, _ = library_file(wanted, None)
    path = tmp_path / "shard.safetensors"
    assert read_or_refuse(path, content[: cut % len(content)]) is None
    assert read_or_refuse(path, content + b"\0" + extra) is None


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    read_or_refuse(tmp_path / "shard.safetensors", content)


ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    -(10**30),
    0.5,
    1e300,
    "",
    "F32",
    [],
    {},
    [[]],
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (owner, key) of a JSON value, from the outside in."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(owner: Any, key: Any, how: int) -> None:
    """Change one member: a value that looks alike, an odd value, one more, or none."""
    value = owner[key]
    is_number = type(value) is int
    alike = [float(value), value + 1, value - 1, -value, value == 1, str(value), [value]] if is_number else [[value]]
    choices = [*alike, *ODD_VALUES]
    if how % (len(choices) + 2) == 0:
        del owner[key]
    elif how % (len(choices) + 2) == 1 and isinstance(owner, list):
        owner.append(value)
    else:
        owner[key] = choices[how % len(choices)]


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=tensors, changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=2))
def test_any_change_of_the_header_is_read_or_refused(
    wanted: dict[str, tuple[str, list[int]]], changes: list[tuple[int, int]], tmp_path: Path
) -> None:
    content, _ = library_file(wanted, None)
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    for where, how in changes:
        found = places(entries)
        if found:
            mutated(*found[where % len(found)], how)
    read_or_refuse(tmp_path / "shard.safetensors", file_bytes(entries, content[8 + length :]))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wanted=tensors,
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_changed_bytes_are_read_or_refused(
    wanted: dict[str, tuple[str, list[int]]], flips: list[tuple[int, int]], tmp_path: Path
) -> None:
    content = bytearray(library_file(wanted, None)[0])
    for place, value in flips:
        content[place % len(content)] = value
    read_or_refuse(tmp_path / "shard.safetensors", bytes(content))


def test_a_header_is_read_exactly(read: Any) -> None:
    entries = {"__metadata__": {"format": "pt"}, "a": entry(offsets=(4, 12)), "b": entry("BF16", (2, 1), (0, 4))}
    content = file_bytes(entries, bytes(12))
    header = read(content)
    assert_consistent(header, content)
    assert header.entries == {
        "a": ("F32", (2,), 4, 12),
        "b": ("BF16", (2, 1), 0, 4),
    }


def test_padding_and_empty_tensors_are_fine(read: Any) -> None:
    text = json.dumps(
        {"a": entry("U8", (3,), (0, 3)), "none": entry("F32", (0, 7), (3, 3)), "one": entry("I64", (), (3, 11))}
    )
    header = read(file_bytes(text.encode() + b"   ", bytes(11)))
    assert set(header.entries) == {"a", "none", "one"}
    assert read(file_bytes(b"{}")).entries == {}


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "U64", "I16"])
def test_other_dtypes_are_read_too(read: Any, dtype: str) -> None:
    # A checkpoint with the wrong dtype is reported as that, not as a broken file.
    size = {"F64": 8, "U64": 8, "F32": 4, "F16": 2, "BF16": 2, "I16": 2}.get(dtype, 1)
    header = read(file_bytes({"a": entry(dtype, (3,), (0, 3 * size))}, bytes(3 * size)))
    assert header.entries["a"].dtype == dtype


GOOD_DATA = bytes(8)
MALFORMED = {
    "empty file": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "length only": struct.pack("<Q", 0),
    "no header": struct.pack("<Q", 0) + GOOD_DATA,
    "length beyond the file": file_bytes({"a": entry()}, GOOD_DATA, length=10_000),
    "length by one too long": file_bytes({"a": entry()}, b"", length=len(json.dumps({"a": entry()})) + 1),
    "length by one too short": file_bytes({"a": entry()}, GOOD_DATA, length=len(json.dumps({"a": entry()})) - 1),
    "length of 2^63": file_bytes({"a": entry()}, GOOD_DATA, length=2**63),
    "length of 2^64 - 1": file_bytes({"a": entry()}, GOOD_DATA, length=2**64 - 1),
    "not JSON": file_bytes(b"hello", GOOD_DATA),
    "JSON cut off": file_bytes(b'{"a": ', GOOD_DATA),
    "two objects": file_bytes(b"{}{}", b""),
    "not UTF-8": file_bytes(b'{"\xff\xfe": {}}', b""),
    "lone surrogate": file_bytes(b'{"\\ud800": {}}', b""),
    "byte order mark": file_bytes(b"\xef\xbb\xbf{}", b""),
    "a list": file_bytes([]),
    "a number": file_bytes(7),
    "null": file_bytes(None),
    "entry is null": file_bytes({"a": None}),
    "entry is a list": file_bytes({"a": [1, 2]}),
    "entry is a string": file_bytes({"a": "F32"}),
    "no dtype": file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, GOOD_DATA),
    "no shape": file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, GOOD_DATA),
    "no offsets": file_bytes({"a": {"dtype": "F32", "shape": [2]}}, GOOD_DATA),
    "unknown dtype": file_bytes({"a": entry("F33")}, GOOD_DATA),
    "dtype in small letters": file_bytes({"a": entry("f32")}, GOOD_DATA),
    "dtype is a number": file_bytes({"a": entry(32)}, GOOD_DATA),
    "dtype is a list": file_bytes({"a": entry(["F32"])}, GOOD_DATA),
    "dtype is null": file_bytes({"a": entry(None)}, GOOD_DATA),
    "shape is a number": file_bytes({"a": entry(shape=2)}, GOOD_DATA),
    "shape is null": file_bytes({"a": entry(shape=None)}, GOOD_DATA),
    "shape is a string": file_bytes({"a": entry("U8", "", (0, 1))}, b"\0"),
    "shape is an object": file_bytes({"a": entry("U8", {}, (0, 1))}, b"\0"),
    "shape of floats": file_bytes({"a": entry(shape=(2.0,))}, GOOD_DATA),
    "shape of flags": file_bytes({"a": entry("F64", (True,))}, GOOD_DATA),
    "shape of strings": file_bytes({"a": entry(shape=("2",))}, GOOD_DATA),
    "shape of lists": file_bytes({"a": entry(shape=([2],))}, GOOD_DATA),
    "negative shape": file_bytes({"a": entry(shape=(-2,), offsets=(8, 0))}, GOOD_DATA),
    "two negative sizes": file_bytes({"a": entry(shape=(-1, -2))}, GOOD_DATA),
    "huge shape": file_bytes({"a": entry(shape=(2**62, 2**62))}, GOOD_DATA),
    "shape of 2^64": file_bytes({"a": entry("U8", (2**64,), (0, 2**64))}, GOOD_DATA),
    "shape of 10^400": file_bytes({"a": entry("U8", (10**400,), (0, 8))}, GOOD_DATA),
    "shape too small": file_bytes({"a": entry(shape=(1,))}, GOOD_DATA),
    "shape too large": file_bytes({"a": entry(shape=(3,))}, GOOD_DATA),
    "offsets null": file_bytes({"a": entry(offsets=None)}, GOOD_DATA),
    "offsets of one": file_bytes({"a": entry(offsets=(0,))}, GOOD_DATA),
    "offsets of three": file_bytes({"a": entry(offsets=(0, 8, 8))}, GOOD_DATA),
    "offsets of strings": file_bytes({"a": entry(offsets=("0", "8"))}, GOOD_DATA),
    "offsets are a string": file_bytes({"a": entry(offsets="08")}, GOOD_DATA),
    "offsets of floats": file_bytes({"a": entry(offsets=(0.0, 8.0))}, GOOD_DATA),
    "offsets of flags": file_bytes({"a": entry("U8", (1,), (False, True))}, b"\0"),
    "offsets an object": file_bytes({"a": entry(offsets={"0": 0, "8": 8})}, GOOD_DATA),
    "offsets backwards": file_bytes({"a": entry(offsets=(8, 0))}, GOOD_DATA),
    "offsets negative": file_bytes({"a": entry(offsets=(-8, 0))}, GOOD_DATA),
    "offsets past the file": file_bytes({"a": entry(offsets=(8, 16))}, GOOD_DATA),
    "gap at the start": file_bytes({"a": entry(offsets=(4, 12))}, bytes(12)),
    "gap between": file_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "overlap": file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "same place twice": file_bytes({"a": entry(), "b": entry()}, GOOD_DATA),
    "data after the last tensor": file_bytes({"a": entry()}, bytes(9)),
    "data too short": file_bytes({"a": entry()}, bytes(7)),
    "data without tensors": file_bytes({}, b"\0"),
    "duplicate name": file_bytes(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "deep nesting": file_bytes(b"[" * 100_000 + b"]" * 100_000),
    "deep nesting in an entry": file_bytes(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "deep nesting in a shape": file_bytes(
        b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":' + b"[" * 1000 + b"]" * 1000 + b"}}", GOOD_DATA
    ),
    "not a number": file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', GOOD_DATA),
    "infinite number": file_bytes(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', GOOD_DATA),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_the_name_of_the_shard(read: Any, name: str) -> None:
    with pytest.raises(InputError, match=r"shard shard\.safetensors") as caught:
        read(MALFORMED[name])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["shape too small", "offsets negative", "unknown dtype", "gap at the start"])
def test_the_tensor_is_named(read: Any, name: str) -> None:
    with pytest.raises(InputError, match=r"tensor a\b.*expected.*found"):
        read(MALFORMED[name])


def test_gap_and_overlap_are_told_apart(read: Any) -> None:
    with pytest.raises(InputError, match=r"tensor b: expected .*byte 8.*byte 12.*gap"):
        read(MALFORMED["gap between"])
    with pytest.raises(InputError, match=r"tensor b: expected .*byte 8.*byte 4.*overlap"):
        read(MALFORMED["overlap"])


def test_truncation_says_how_many_bytes_and_what_to_do(read: Any) -> None:
    with pytest.raises(InputError, match=r"expected 8 bytes.*found 7 bytes.*download it again"):
        read(MALFORMED["data too short"])
    with pytest.raises(InputError, match=r"10000.*download it again"):
        read(MALFORMED["length beyond the file"])


def test_a_header_of_more_than_100_megabytes_is_refused(tmp_path: Path) -> None:
    # The limit of the safetensors library. The file is sparse: nothing of it may be read.
    path = tmp_path / "shard.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(InputError, match="100000000"):
        header_from_file(path)


def test_no_data_is_read(tmp_path: Path) -> None:
    # A sparse file of 1 TiB: reading its data would take many minutes.
    path = tmp_path / "shard.safetensors"
    size = 1 << 40
    content = file_bytes({"a": entry("U8", (size,), (0, size))})
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + size)
    header = header_from_file(path)
    assert header.file_bytes == len(content) + size
    assert header.entries["a"][2:] == (0, size)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shard none\.safetensors: cannot be read"):
        header_from_file(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match=r"shard folder\.safetensors: cannot be read"):
        header_from_file(tmp_path / "folder.safetensors")
