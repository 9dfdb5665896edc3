"""Where the bytes of a binding lie, from the manifest alone: a contract for the runtime, `bind` and `verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_export.manifest import Manifest, Tensor, TensorGroup
from k25_plugins.errors import mismatch

#: A table entry of an expert that is not held.
NOT_HELD = -1

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Bytes `start` to `stop` of a shard's file, and the first row of each tensor in them: `table` [experts, names]."""

    shard: int
    start: int
    stop: int
    table: Table


class TensorTable:
    """The tensors of a manifest by name. A name with `{expert}` stands for all experts."""

    def __init__(self, manifest: Manifest) -> None:
        self._shard_bytes = [shard.bytes for shard in manifest.shards]
        self._groups: dict[str, list[TensorGroup]] = {}
        for group in manifest.tensors:
            self._groups.setdefault(group.name, []).append(group)

    def tensor(self, name: str) -> Tensor:
        """The single tensor of this name, or `InputError`."""
        groups = self._groups.get(name, [])
        if len(groups) != 1 or groups[0].offset is None:
            raise mismatch(f"bundle: tensor {name}", expected="one tensor of this name", found=f"{len(groups)} groups")
        return next(groups[0].members())

    def experts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(expert, tensor) of every expert that a name with `{expert}` stands for, or `InputError`."""
        if name not in self._groups:
            raise mismatch("bundle: tensors", expected=name, found="none of this name in the manifest")
        for group in self._groups[name]:
            yield from zip((expert for expert, _ in group.numbered_offsets()), group.members(), strict=True)

    def region(self, names: Sequence[str], *, row_bytes: int) -> Region | None:
        """The region of these tensors as `docs/bundle-format.md`, section 4, defines it; None where there is none.

        There is none where they lie in several shards, or where an offset is no multiple of `row_bytes`.
        """
        missing = [name for name in names if name not in self._groups]
        if missing:
            raise mismatch("bundle: tensors", expected=missing[0], found="none of this name in the manifest")
        groups = [group for name in names for group in self._groups[name]]
        if len({group.shard for group in groups}) != 1:
            return None
        experts = 1 + max(expert for group in groups for expert, _ in group.numbered_offsets())
        offsets = np.full((experts, len(names)), NOT_HELD, np.int64)
        for column, name in enumerate(names):
            for group in self._groups[name]:
                for expert, offset in group.numbered_offsets():
                    offsets[expert, column] = offset
        start = int(offsets[offsets >= 0].min())
        stop = max(offset + group.length for group in groups for _, offset in group.numbered_offsets())
        stop += -(stop - start) % row_bytes
        if (offsets < 0).any() or (offsets % row_bytes).any() or stop > self._shard_bytes[groups[0].shard]:
            return None
        return Region(shard=groups[0].shard, start=start, stop=stop, table=(offsets - start) // row_bytes)


def for_layer(name: str, layer: int | None) -> str:
    """A binding's tensor name for one instance: `{layer}` filled in."""
    return name if layer is None else name.replace("{layer}", str(layer))
