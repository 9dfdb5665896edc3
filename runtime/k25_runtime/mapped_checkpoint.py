"""The checkpoint's shards, mapped read-only, and the weights of each component bound to them without a copy."""

from __future__ import annotations

import hashlib
import os
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
    Tensor,
    read_checkpoint_location,
)
from k25_export.tensor_table import Table, TensorTable, for_layer
from k25_plugins.errors import InputError, mismatch
from k25_runtime.expert_layout import ScatteredBytes, ScatteredTensor, expert_layout
from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor

CHECKPOINT_VARIABLE = "K25_CHECKPOINT"

_STORED_DTYPES = {"BF16": "bfloat16", "F32": "float32", "I32": "int32", "I64": "int64"}
Bytes = npt.NDArray[np.uint8]


def checkpoint_folder(bundle: Path, override: str | Path | None = None) -> Path:
    """Where the shards are: the override, the environment variable K25_CHECKPOINT, or what the bundle remembers."""
    location = override or os.environ.get(CHECKPOINT_VARIABLE) or read_checkpoint_location(bundle)
    return folder_of_checkpoint(location)


class MappedCheckpoint:
    """Shards checked against the manifest (size and header hash) and mapped; pages are read when they are used."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.folder = folder
        self._paths = [_checked_shard(folder, shard) for shard in manifest.shards]
        self._maps: dict[int, Bytes] = {}
        self._table = TensorTable(manifest)
        self._regions: dict[tuple[str, ...], tuple[Bytes, Table]] = {}

    def weights(self, component: ComponentEntry, layer: int | None, precision: str) -> dict[str, HostTensor]:
        """Every weight input of an instance, by input name. Views of the map wherever the bytes allow it."""
        dtypes = {port.name: port.dtype for port in component.file(precision).inputs}
        return {
            name: self._bound(binding, layer, dtypes[name], f"{component.name}: input {name}")
            for name, binding in component.bindings.items()
        }

    def weights_to_copy(
        self, component: ComponentEntry, layer: int | None, precision: str, *, alignment: int
    ) -> dict[str, HostTensor | ScatteredTensor]:
        """Every weight input of an instance, for a backend that copies: expert tensors at multiples of `alignment`.

        The experts come as pieces of the map; nothing of them is read here.
        """
        dtypes = {port.name: port.dtype for port in component.file(precision).inputs}
        layouts: dict[tuple[str, ...], tuple[ScatteredBytes, Table]] = {}
        found: dict[str, HostTensor | ScatteredTensor] = {}
        for name, binding in component.bindings.items():
            if binding.tensors is None or binding.row_bytes is None:
                found[name] = self._bound(binding, layer, dtypes[name], f"{component.name}: input {name}")
                continue
            names = tuple(for_layer(pattern, layer) for pattern in binding.tensors)
            if names not in layouts:
                layouts[names] = self._layout(names, row_bytes=binding.row_bytes, alignment=alignment)
            source, table = layouts[names]
            if binding.rule == "offsets":
                found[name] = HostTensor(table, "int64")
                continue
            columns = binding.row_bytes // np.dtype(STORAGE_DTYPES[dtypes[name]]).itemsize
            shape = (source.size // binding.row_bytes, columns)
            found[name] = ScatteredTensor(source=source, dtype=dtypes[name], shape=shape)
        return found

    def tensor(self, name: str) -> HostTensor:
        """A tensor by its full name, as stored."""
        tensor = self._table.tensor(name)
        data = self._bytes(tensor)
        dtype = _STORED_DTYPES[tensor.dtype]
        storage = np.dtype(STORAGE_DTYPES[dtype])
        if data.ctypes.data % storage.itemsize:
            data = data.copy()  # a kernel may assume natural alignment, which the format does not promise
        return HostTensor(data.view(storage).reshape(tensor.shape), dtype)

    def unmap(self) -> None:
        """Let go of maps and copied regions; memory is free once nothing bound to them is left."""
        self._maps.clear()
        self._regions.clear()

    def _map(self, shard: int) -> Bytes:
        if shard not in self._maps:
            try:
                mapped: Any = np.memmap(self._paths[shard], np.uint8, "r")
            except (OSError, ValueError) as error:
                raise InputError(f"shard {self._paths[shard].name}: cannot be mapped: {error}") from error
            self._maps[shard] = mapped.view(np.ndarray)
        return self._maps[shard]

    def _bytes(self, tensor: Tensor) -> Bytes:
        return self._map(tensor.shard)[tensor.offset : tensor.offset + tensor.length]

    def _bound(self, binding: Binding, layer: int | None, dtype: str, where: str) -> HostTensor:
        if binding.rule in ("region", "offsets"):
            assert binding.tensors is not None
            assert binding.row_bytes is not None
            region, table = self._region(tuple(for_layer(name, layer) for name in binding.tensors), binding.row_bytes)
            if binding.rule == "offsets":
                return HostTensor(table, "int64")
            storage = np.dtype(STORAGE_DTYPES[dtype])
            return HostTensor(region.view(storage).reshape(-1, binding.row_bytes // storage.itemsize), dtype)
        if binding.tensor is None:
            raise mismatch(f"bundle: {where}", expected="a binding with a tensor or a known rule", found=binding.rule)
        tensor = self.tensor(for_layer(binding.tensor, layer))
        if tensor.dtype != dtype:
            raise mismatch(f"bundle: {where}", expected=dtype, found=tensor.dtype)
        if binding.rule == "slice":
            return HostTensor(_sliced(tensor.array, binding, where), dtype)
        return tensor

    def _region(self, names: tuple[str, ...], row_bytes: int) -> tuple[Bytes, Table]:
        """The bytes of a layer's experts as rows, and where each tensor starts: mapped, or else copied."""
        if names not in self._regions:
            region = self._table.region(names, row_bytes=row_bytes)
            self._regions[names] = (
                self._copied_region(names, row_bytes)
                if region is None
                else (self._map(region.shard)[region.start : region.stop], region.table)
            )
        return self._regions[names]

    def _copied_region(self, names: tuple[str, ...], row_bytes: int) -> tuple[Bytes, Table]:
        source, table = self._layout(names, row_bytes=row_bytes, alignment=row_bytes)
        return source.gathered(), table

    def _layout(self, names: tuple[str, ...], *, row_bytes: int, alignment: int) -> tuple[ScatteredBytes, Table]:
        return expert_layout(self._table, names, row_bytes=row_bytes, alignment=alignment, bytes_of=self._bytes)


def _sliced(array: npt.NDArray[Any], binding: Binding, where: str) -> npt.NDArray[Any]:
    axis, start, stop = binding.axis, binding.start, binding.stop
    if (
        axis is None
        or start is None
        or stop is None
        or not 0 <= axis < array.ndim
        or not 0 <= start < stop <= array.shape[axis]
    ):
        raise mismatch(
            f"bundle: {where}",
            expected=f"a slice inside a tensor of shape {list(array.shape)}",
            found=f"axis {axis}, {start} to {stop}",
        )
    rows = [slice(None)] * array.ndim
    rows[axis] = slice(start, stop)
    return np.ascontiguousarray(array[tuple(rows)])


def _checked_shard(folder: Path, shard: ShardEntry) -> Path:
    """The real path of a shard; `InputError` where size or header are not those that were exported."""
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
    except OSError as error:
        raise InputError(f"shard {shard.file}: cannot be read: {error.strerror}") from error
    return path
