"""Weights on their way to the device: the right bytes, bounded buffers, readers that end whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_export.manifest import read_manifest
from k25_runtime.device import DeviceError
from k25_runtime.device_memory import MemoryPool
from k25_runtime.engine_weights import WeightLoader
from k25_runtime.expert_layout import ScatteredTensor
from k25_runtime.host_tensor import HostTensor
from k25_runtime.mapped_checkpoint import MappedCheckpoint


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "k25-weights"]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 700), max_size=12),
    buffer_bytes=st.integers(1, 300),
    buffers=st.integers(1, 4),
    readers=st.integers(1, 3),
    gap=st.sampled_from([0, 5]),
)
def test_every_byte_arrives_where_it_belongs(
    sizes: list[int], buffer_bytes: int, buffers: int, readers: int, gap: int
) -> None:
    """Any sizes, neighbours or with gaps, through any buffers; nothing else is written."""
    device = FakeDevice()
    sources = [np.random.default_rng(index).integers(0, 256, size, np.uint8) for index, size in enumerate(sizes)]
    address = device.allocate(sum(sizes) + gap * len(sizes) + 1)
    places = [address + sum(sizes[:index]) + gap * index for index in range(len(sizes))]
    loader = WeightLoader(device, buffers=buffers, buffer_bytes=buffer_bytes, readers=readers)
    for _ in range(2):
        loader.load(zip(places, sources, strict=True))
    for place, source in zip(places, sources, strict=True):
        assert np.array_equal(device.bytes_at(place, len(source)), source)
        assert (device.bytes_at(place + len(source), gap) == 0xFF).all()
    assert device.peak_pinned == buffers * buffer_bytes
    assert not reader_threads()
    loader.close()
    loader.close()
    device.free(address)
    device.close()
    device.closed_clean()


def test_neighbours_are_copied_together() -> None:
    device = FakeDevice()
    address = device.allocate(1000)
    loader = WeightLoader(device, buffers=2, buffer_bytes=1000, readers=1)
    loader.load([(address + 10 * index, np.full(10, index, np.uint8)) for index in range(100)])
    assert device.calls.count("copy_to_device") == 1


def test_what_a_reader_raises_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a file on a network that went away; no thread and no copy is left."""
    device = FakeDevice()
    address = device.allocate(1000)
    loader = WeightLoader(device, buffers=2, buffer_bytes=100, readers=2)

    def copies() -> Iterator[tuple[int, Any]]:
        yield address, np.zeros(500, np.uint8)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        loader.load(copies())
    assert not reader_threads()
    loader.load([(address, np.ones(1000, np.uint8))])
    assert (device.bytes_at(address, 1000) == 1).all()
    loader.close()


@pytest.mark.parametrize("call", ["copy_to_device", "record", "synchronize_event", "synchronize"])
def test_readers_end_when_the_device_fails(call: str) -> None:
    device = FakeDevice()
    address = device.allocate(1000)
    loader = WeightLoader(device, buffers=2, buffer_bytes=50, readers=2)
    calls = 0

    def fail(name: str) -> None:
        nonlocal calls
        calls += name == call
        if name == call and calls == 1:
            raise DeviceError("was made to fail")

    device.fail = fail
    with pytest.raises(DeviceError, match="made to fail"):
        loader.load([(address, np.zeros(1000, np.uint8))])
    assert not reader_threads()
    device.free(address)
    loader.close()
    device.close()
    device.closed_clean()


def test_the_same_requests_get_the_same_addresses() -> None:
    """What a captured step relies on."""
    device = FakeDevice()
    pool = MemoryPool(device)

    def step() -> list[int]:
        kept = []
        hidden = pool.tensor((3, 100), "float32")
        for _ in range(4):
            out = pool.tensor((3, 100), "float32")
            kept += [hidden.address, out.address, pool.tensor((7,), "int32").address]
            hidden = out
        return kept

    first = step()
    allocated = len(device.memory)
    assert step() == first
    assert len(device.memory) == allocated
    pool.close()
    device.close()
    device.closed_clean()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 4096, 5000, 2**20 + 1, 3 * 2**20, 335_544_320])
def test_a_block_is_large_enough_and_wastes_little(size: int) -> None:
    blocks: list[int] = []

    class Counting(FakeDevice):
        def allocate(self, size: int) -> int:
            blocks.append(size)
            return 1 << 40

    MemoryPool(Counting()).block(size)
    assert size <= blocks[0] <= max(512, size * 1.25)


def experts_of(checkpoint: MappedCheckpoint, bundle: Path, alignment: int) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    component = manifest.component("moe_layer")
    assert component.layers is not None
    return checkpoint.weights_to_copy(component, component.layers[-1], "fp32", alignment=alignment)


@pytest.mark.parametrize("alignment", [8, 128, 4096])
def test_experts_to_copy_are_those_in_place(exported: Any, alignment: int) -> None:
    """Every expert's tensors through the table, byte for byte; aligned; the words and scales are one buffer."""
    manifest = read_manifest(exported.bundle)
    checkpoint = MappedCheckpoint(manifest, exported.checkpoint)
    component = manifest.component("moe_layer")
    assert component.layers is not None
    copied = experts_of(checkpoint, exported.bundle, alignment)
    in_place = checkpoint.weights(component, component.layers[-1], "fp32")
    assert copied.keys() == in_place.keys()
    words, scales, table = (copied[name] for name in ("expert_words", "expert_scales", "expert_table"))
    assert isinstance(words, ScatteredTensor)
    assert words.source is scales.source
    assert (words.dtype, scales.dtype) == ("int32", "bfloat16")
    assert words.shape[0] * 8 == scales.shape[0] * 8 == words.source.size
    rows = table.array
    assert (rows * 8 % alignment == 0).all()
    buffer = words.source.gathered()
    known = in_place["expert_words"].array.reshape(-1).view(np.uint8)
    lengths = {}
    for group in manifest.tensors:
        for column, pattern in enumerate(component.bindings["expert_words"].tensors or ()):
            if group.name == pattern.replace("{layer}", str(component.layers[-1])):
                lengths[column] = group.length
    for expert, column in np.ndindex(*rows.shape):
        length = lengths[column]
        start, other = rows[expert, column] * 8, in_place["expert_table"].array[expert, column] * 8
        assert np.array_equal(buffer[start : start + length], known[other : other + length])
    for name, tensor in copied.items():
        if not name.startswith("expert_"):
            assert isinstance(tensor, HostTensor)
            assert np.array_equal(tensor.array, in_place[name].array)


def test_nothing_of_the_experts_is_read_to_lay_them_out(tiny: Any) -> None:
    """The pieces are views of the map."""
    checkpoint = MappedCheckpoint(read_manifest(tiny.bundle), tiny.checkpoint)
    words = experts_of(checkpoint, tiny.bundle, 128)["expert_words"]
    assert all(not piece.flags.owndata and not piece.flags.writeable for _, piece in words.source.pieces)
