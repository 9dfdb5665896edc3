"""Ways of breaking a build that its files do not show: the runtime's view of the checkpoint, and the runtime itself."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import onnx
from fault_edits import Build, Edit


def damage_scale(change: Callable[[bytes], bytes], *, both: bool = False) -> Callable[[Build], None]:
    """One expert's down scales are changed in a copy of the checkpoint; sizes and headers stay."""

    def inject(build: Build) -> None:
        copy = build.bundle.parent / "checkpoint"
        shutil.copytree(build.checkpoint, copy)
        values = json.loads((build.bundle / "manifest.json").read_text())
        group = next(group for group in values["tensors"] if group["name"].endswith("down_proj.weight_scale"))
        path = copy / values["shards"][group["shard"]]["file"]
        data = bytearray(path.read_bytes())
        for offset in group["offsets"]:
            span = slice(offset, offset + group["length"])
            data[span] = change(bytes(data[span]))
        path.write_bytes(bytes(data))
        build.checkpoint = copy
        if both:
            build.reference = copy

    return inject


def flip_a_bit(data: bytes) -> bytes:
    return data[:1] + bytes([data[1] ^ 0x01]) + data[2:]


def nan_first(data: bytes) -> bytes:
    return b"\xc0\x7f" + data[2:]


def change_batches(change: Callable[[Any, list[Any]], Any]) -> Callable[[Build], None]:
    """`change` gets each batch that the runtime packs, and the chunks (sequence, tokens) it is made of."""

    def inject(build: Build) -> None:
        from k25_runtime import chunks as packing

        whole = packing.batch_from_chunks

        def wrong(chunks: Any, *rest: Any, **more: Any) -> Any:
            return change(whole(chunks, *rest, **more), chunks)

        build.patches.append(mock.patch.object(packing, "batch_from_chunks", wrong))

    return inject


def misplace_a_block(batch: Any, chunks: list[Any]) -> Any:
    """From the second step on the table leads to the block after the right one."""
    table = batch.block_table.copy()
    if chunks[0][0].length:
        table[0, 0] = table[0, 0] + 1
    return replace(batch, block_table=table)


def positions_one_late(batch: Any, chunks: list[Any]) -> Any:
    late = np.int32(1 if chunks[0][0].length else 0)
    return replace(batch, positions=batch.positions + late)


def blocks_of_the_neighbour(batch: Any, chunks: list[Any]) -> Any:
    table = batch.block_table.copy()
    if len(table) > 1:
        table[1] = table[0]
    return replace(batch, block_table=table)


def change_vision_inputs(name: str, change: Callable[[Any, Any, tuple[Any, ...]], Any]) -> Callable[[Build], None]:
    """`change` gets the module, what its function `name` returns, and the function's arguments."""

    def inject(build: Build) -> None:
        from k25_runtime import vision_inputs

        whole = getattr(vision_inputs, name)

        def wrong(*arguments: Any) -> Any:
            return change(vision_inputs, whole(*arguments), arguments)

        build.patches.append(mock.patch.object(vision_inputs, name, wrong))

    return inject


def time_of_one_frame(module: Any, made: Any, arguments: tuple[Any, ...]) -> Any:
    """The sinusoid of frame 0 is not zero: its cosines are 1."""
    table, grid = arguments
    return made + module.temporal_sinusoids(1, table.shape[2]) if grid[0] == 1 else made


def exchange_rows_and_columns(module: Any, made: Any, arguments: tuple[Any, ...]) -> Any:
    return tuple(
        np.ascontiguousarray(values.reshape(len(values), -1, 2)[..., ::-1]).reshape(values.shape) for values in made
    )


def merge_down_first(module: Any, made: Any, arguments: tuple[Any, ...]) -> Any:
    return np.ascontiguousarray(made[..., [0, 2, 1, 3]])


def other_kernel(edit: Edit) -> Callable[[Build], None]:
    """The backend computes something else than the file says, as a wrong native kernel would."""

    def inject(build: Build) -> None:
        from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu

        load = OnnxRuntimeCpu.load

        def wrong(self: Any, data: bytes, **more: Any) -> Any:
            model = onnx.load_from_string(data)
            with contextlib.suppress(StopIteration):
                edit(model)
            return load(self, model.SerializeToString(), **more)

        build.patches.append(mock.patch.object(OnnxRuntimeCpu, "load", wrong))

    return inject
