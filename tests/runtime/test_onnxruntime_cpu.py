"""The backend on ONNX Runtime: buffers and weights are memory of the caller, and failures name the component."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from k25_plugins.errors import InputError, K25Error
from k25_runtime.host_tensor import HostTensor
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu, ort_value

WEIGHT = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def backend() -> OnnxRuntimeCpu:
    return OnnxRuntimeCpu(threads=1)


@pytest.fixture(scope="module")
def embed(tiny: Any) -> bytes:
    return (Path(tiny.bundle) / "components" / "embed.fp32.onnx").read_bytes()


@pytest.fixture(scope="module")
def table(tiny: Any) -> npt.NDArray[np.uint16]:
    """A random table [V, H] of finite bfloat16 bits in the size that the component takes."""
    text = json.loads((tiny.bundle / "manifest.json").read_text())["model"]["text"]
    values = np.random.default_rng(0).standard_normal((text["vocab_size"], text["hidden_size"]), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def as_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def int32(*values: int) -> HostTensor:
    return HostTensor(np.array(values, np.int32), "int32")


@pytest.mark.parametrize(
    ("dtype", "storage", "element_type"),
    [("float32", np.float32, 1), ("int32", np.int32, 6), ("int64", np.int64, 7), ("bfloat16", np.uint16, 16)],
)
def test_a_buffer_is_the_memory_of_the_tensor(
    backend: OnnxRuntimeCpu, dtype: str, storage: type[np.generic], element_type: int
) -> None:
    array = np.arange(6).astype(storage).reshape(2, 3)
    value = backend.buffer(HostTensor(array, dtype))
    assert value.data_ptr() == array.ctypes.data
    assert list(value.shape()) == [2, 3]
    assert value.element_type() == element_type  # ONNX's TensorProto.DataType


def test_a_buffer_over_read_only_memory_is_not_a_copy(backend: OnnxRuntimeCpu, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(64)))
    mapped = np.memmap(tmp_path / "weights", np.uint16, "r")
    assert backend.buffer(HostTensor(mapped, "bfloat16")).data_ptr() == mapped.ctypes.data


@pytest.mark.parametrize(("dtype", "storage"), [("float32", np.float32), ("bfloat16", np.uint16)])
def test_a_buffer_keeps_its_memory_alive(dtype: str, storage: type[np.generic]) -> None:
    array = np.ones(1000, storage)
    memory = weakref.ref(array)
    value = ort_value(HostTensor(array, dtype))
    del array
    gc.collect()
    assert memory() is not None
    del value
    gc.collect()
    assert memory() is None


def test_a_bound_instance_runs_and_keeps_its_weights(
    backend: OnnxRuntimeCpu, embed: bytes, table: npt.NDArray[np.uint16]
) -> None:
    """Rows of the table, upcast; outputs are written into the caller's memory."""
    weights = table.copy()
    memory = weakref.ref(weights)
    instance = backend.load(embed, label="component embed").bind({WEIGHT: HostTensor(weights, "bfloat16")})
    del weights
    gc.collect()
    assert memory() is not None
    hidden = np.full((3, table.shape[1]), np.nan, np.float32)
    for ids in ((5, 0, len(table) - 1), (1, 1, 2)):
        outputs = {"hidden": backend.buffer(HostTensor(hidden, "float32"))}
        instance.run({"token_ids": backend.buffer(int32(*ids))}, outputs)
        assert np.array_equal(hidden, as_float32(table)[list(ids)])


def test_two_instances_of_a_component_have_their_own_weights(
    backend: OnnxRuntimeCpu, embed: bytes, table: npt.NDArray[np.uint16]
) -> None:
    component = backend.load(embed, label="component embed")
    tables = [table, table[::-1].copy()]
    instances = [component.bind({WEIGHT: HostTensor(bits, "bfloat16")}) for bits in tables]
    for bits, instance in zip(tables, instances, strict=True):
        hidden = np.empty((1, table.shape[1]), np.float32)
        outputs = {"hidden": backend.buffer(HostTensor(hidden, "float32"))}
        instance.run({"token_ids": backend.buffer(int32(7))}, outputs)
        assert np.array_equal(hidden, as_float32(bits)[[7]])


@pytest.mark.parametrize("data", [b"", b"not a graph", b"\x08\x0a" * 50])
def test_a_file_that_is_no_graph_is_refused(backend: OnnxRuntimeCpu, data: bytes) -> None:
    with pytest.raises(InputError, match="component embed: ONNX Runtime cannot load the file"):
        backend.load(data, label="component embed")


def test_half_a_graph_is_refused(backend: OnnxRuntimeCpu, embed: bytes) -> None:
    with pytest.raises(InputError, match="component embed: ONNX Runtime cannot load the file"):
        backend.load(embed[: len(embed) // 2], label="component embed")


@pytest.mark.parametrize("fault", ["dtype", "id", "rank", "output"])
def test_a_failed_run_names_the_component(
    backend: OnnxRuntimeCpu, embed: bytes, table: npt.NDArray[np.uint16], fault: str
) -> None:
    """An error of ours, whatever ONNX Runtime raises; it is an internal one, since the runtime checks its inputs."""
    instance = backend.load(embed, label="component embed").bind({WEIGHT: HostTensor(table, "bfloat16")})
    ids = {
        "dtype": HostTensor(np.array([1, 2], np.int64), "int64"),
        "id": int32(1, len(table)),
        "rank": HostTensor(np.zeros((1, 2), np.int32), "int32"),
    }.get(fault, int32(1, 2))
    hidden = np.zeros((3 if fault == "output" else 2, table.shape[1]), np.float32)
    with pytest.raises(K25Error, match="component embed: ONNX Runtime failed") as caught:
        instance.run({"token_ids": backend.buffer(ids)}, {"hidden": backend.buffer(HostTensor(hidden, "float32"))})
    assert caught.value.exit_code == 5
