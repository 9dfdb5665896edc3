"""The checkpoint's shards, mapped read-only, and the weights of each component bound to them without a copy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_export.checkpoint_files import file_in_checkpoint, folder_of_checkpoint
from k25_export.manifest import (
    Binding,
    ComponentEntry,
    Manifest,
    ShardEntry,
    TensorGroup,
    read_checkpoint_location,
)
from k25_plugins.errors import InputError, mismatch
from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor

CHECKPOINT_VARIABLE = "K25_CHECKPOINT"

_STORED_DTYPES = {"BF16": "bfloat16", "F32": "float32", "I32": "int32", "I64": "int64"}
_NOT_HELD = -1

Bytes = npt.NDArray[np.uint8]


def checkpoint_folder(bundle: Path, override: str | Path | None = None) -> Path:
    """Where the shards are: the override, the environment variable K25_CHECKPOINT, or what the bundle remembers."""
    location = override or os.environ.get(CHECKPOINT_VARIABLE) or read_checkpoint_location(bundle)
    return folder_of_checkpoint(location)


class MappedCheckpoint:
    """Shards checked against the manifest (size and header hash) and mapped; pages are read when they are used."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.folder = folder
        self._shards = [_mapped_shard(folder, shard) for shard in manifest.shards]
        self._groups: dict[str, list[TensorGroup]] = {}
        for group in manifest.tensors:
            self._groups.setdefault(group.name, []).append(group)
        self._regions: dict[tuple[tuple[str, ...], int], tuple[Bytes, npt.NDArray[np.int64]]] = {}

    def weights(self, component: ComponentEntry, layer: int | None, precision: str) -> dict[str, HostTensor]:
        """Every weight input of an instance, by input name. Views of the map wherever the bytes allow it."""
        dtypes = {port.name: port.dtype for port in component.file(precision).inputs}
        return {
            name: self._bound(binding, layer, dtypes[name], f"{component.name}: input {name}")
            for name, binding in component.bindings.items()
        }

    def tensor(self, name: str) -> HostTensor:
        """A tensor by its full name, as stored."""
        group = self._single(name, f"tensor {name}")
        assert group.offset is not None
        data = self._shards[group.shard][group.offset : group.offset + group.length]
        dtype = _STORED_DTYPES[group.dtype]
        storage = np.dtype(STORAGE_DTYPES[dtype])
        if data.ctypes.data % storage.itemsize:
            data = data.copy()  # a kernel may assume natural alignment, which the format does not promise
        return HostTensor(data.view(storage).reshape(group.shape), dtype)

    def _bound(self, binding: Binding, layer: int | None, dtype: str, where: str) -> HostTensor:
        if binding.rule in ("region", "offsets"):
            assert binding.tensors is not None
            assert binding.row_bytes is not None
            names = tuple(_for_layer(name, layer) for name in binding.tensors)
            region, table = self._region(names, binding.row_bytes, where)
            if binding.rule == "offsets":
                return HostTensor(table, "int64")
            storage = np.dtype(STORAGE_DTYPES[dtype])
            return HostTensor(region.view(storage).reshape(-1, binding.row_bytes // storage.itemsize), dtype)
        if binding.tensor is None:
            raise mismatch(f"bundle: {where}", expected="a binding with a tensor or a known rule", found=binding.rule)
        tensor = self.tensor(_for_layer(binding.tensor, layer))
        if tensor.dtype != dtype:
            raise mismatch(f"bundle: {where}", expected=dtype, found=tensor.dtype)
        if binding.rule == "slice":
            rows = [slice(None)] * tensor.array.ndim
            rows[binding.axis or 0] = slice(binding.start, binding.stop)
            return HostTensor(np.ascontiguousarray(tensor.array[tuple(rows)]), dtype)
        return tensor

    def _single(self, name: str, where: str) -> TensorGroup:
        groups = self._groups.get(name, [])
        if len(groups) != 1 or groups[0].offset is None:
            raise mismatch(f"bundle: {where}", expected="one tensor of this name in the manifest", found=len(groups))
        return groups[0]

    def _region(self, names: tuple[str, ...], row_bytes: int, where: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
        """The bytes of the experts as rows, and the first row of each tensor [experts, names]; see bundle-format.md."""
        key = (names, row_bytes)
        if key not in self._regions:
            missing = [name for name in names if name not in self._groups]
            if missing:
                raise mismatch(f"bundle: {where}", expected=f"tensors {missing[0]}", found="none in the manifest")
            experts = 1 + max(expert for name in names for expert, _, _ in self._places(name))
            table = np.full((experts, len(names)), _NOT_HELD, np.int64)
            self._regions[key] = self._mapped_region(names, table, row_bytes) or self._copied_region(
                names, table, row_bytes
            )
        return self._regions[key]

    def _places(self, name: str) -> Iterator[tuple[int, TensorGroup, int]]:
        for group in self._groups[name]:
            for expert, offset in group.numbered_offsets():
                yield expert, group, offset

    def _mapped_region(
        self, names: tuple[str, ...], table: npt.NDArray[np.int64], row_bytes: int
    ) -> tuple[Bytes, npt.NDArray[np.int64]] | None:
        groups = [group for name in names for group in self._groups[name]]
        if len({group.shard for group in groups}) != 1:
            return None
        for column, name in enumerate(names):
            for expert, _, offset in self._places(name):
                table[expert, column] = offset
        shard = self._shards[groups[0].shard]
        start = int(min(min(group.offsets or ()) for group in groups))
        end = max(max(group.offsets or ()) + group.length for group in groups)
        end += -(end - start) % row_bytes
        if (table < 0).any() or (table % row_bytes).any() or end > shard.size:
            return None
        return shard[start:end], (table - start) // row_bytes

    def _copied_region(
        self, names: tuple[str, ...], table: npt.NDArray[np.int64], row_bytes: int
    ) -> tuple[Bytes, npt.NDArray[np.int64]]:
        table.fill(_NOT_HELD)
        total = sum(
            -(-group.length // row_bytes) * row_bytes * len(group.offsets or ())
            for name in names
            for group in self._groups[name]
        )
        buffer = np.zeros(total, np.uint8)
        end = 0
        for column, name in enumerate(names):
            for expert, group, offset in self._places(name):
                buffer[end : end + group.length] = self._shards[group.shard][offset : offset + group.length]
                table[expert, column] = end // row_bytes
                end += -(-group.length // row_bytes) * row_bytes
        return buffer, table


def _for_layer(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("{layer}", str(layer))


def _mapped_shard(folder: Path, shard: ShardEntry) -> Bytes:
    """Map a shard after checking its size and header; `InputError` where it is not the one that was exported."""
    path = file_in_checkpoint(folder, shard.file)
    hint = "The checkpoint has changed since the export: export it again, or restore the file."
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise mismatch(f"shard {shard.file}", expected=f"{shard.bytes} bytes", found=f"{size} bytes", hint=hint)
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(shard.data_start)).hexdigest()
        if digest != shard.header_sha256:
            raise mismatch(f"shard {shard.file}: header hash", expected=shard.header_sha256, found=digest, hint=hint)
        mapped: Any = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise InputError(f"shard {shard.file}: cannot be read: {error.strerror}") from error
    return mapped.view(np.ndarray)  # type: ignore[no-any-return]
