"""The manifest's tensor table: every tensor of the checkpoint, experts grouped by shard and pattern."""

from __future__ import annotations

import math

from k25_export.checkpoint import Checkpoint
from k25_export.manifest import STORED_ITEM_SIZES, ShardEntry, TensorGroup
from k25_export.tensor_patterns import TensorPattern


def shard_entries(checkpoint: Checkpoint) -> tuple[ShardEntry, ...]:
    """Name, size and header hash of each shard."""
    return tuple(
        ShardEntry(
            file=shard.file,
            bytes=shard.header.file_bytes,
            data_start=shard.header.data_start,
            header_sha256=shard.header.sha256,
        )
        for shard in checkpoint.shards
    )


def tensor_groups(checkpoint: Checkpoint) -> tuple[TensorGroup, ...]:
    """Groups in the order of the patterns. Needs a checkpoint without problems."""
    groups: list[TensorGroup] = []
    for pattern in checkpoint.patterns:
        stems = [pattern.for_index(index) for index in pattern.indices] or [pattern.name]
        for stem, names in zip(stems, pattern.families(), strict=True):
            groups += (
                _expert_groups(checkpoint, pattern, stem, names) if pattern.experts else [_single(checkpoint, stem)]
            )
    return tuple(groups)


def _single(checkpoint: Checkpoint, name: str) -> TensorGroup:
    shard = checkpoint.shard_of[name]
    header = checkpoint.shards[shard].header
    entry = header.entries[name]
    return TensorGroup(
        name=name,
        shard=shard,
        dtype=entry.dtype,
        shape=entry.shape,
        length=entry.stop - entry.start,
        offset=header.data_start + entry.start,
    )


def _expert_groups(checkpoint: Checkpoint, pattern: TensorPattern, stem: str, names: list[str]) -> list[TensorGroup]:
    members: dict[tuple[int, str], list[tuple[int, int]]] = {}
    places = map(checkpoint.shard_of.__getitem__, names)
    headers = [shard.header for shard in checkpoint.shards]
    for expert, (name, shard) in enumerate(zip(names, places, strict=True)):
        dtype, _, start, _ = headers[shard].entries[name]
        members.setdefault((shard, dtype), []).append((expert, headers[shard].data_start + start))
    return [
        TensorGroup(
            name=stem,
            shard=shard,
            dtype=dtype,
            shape=pattern.shape,
            length=math.prod(pattern.shape) * STORED_ITEM_SIZES[dtype],
            offsets=tuple(offset for _, offset in found),
            experts=None if len(found) == pattern.experts else tuple(expert for expert, _ in found),
        )
        for (shard, dtype), found in members.items()
    ]
