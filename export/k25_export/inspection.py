"""What a checkpoint holds, from its headers alone: parameters, bytes by kind, quantisation, problems."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from k25_export.checkpoint import Checkpoint
from k25_export.config import ModelConfig
from k25_export.manifest import STORED_ITEM_SIZES
from k25_export.tensor_patterns import TensorPattern
from k25_plugins.int4 import NIBBLES_PER_WORD

#: Kinds of bytes, in the order in which they are shown.
KINDS = ("routed experts (INT4 words)", "routed experts (scales)", "routed experts (shapes)", "text (bf16)", "vision")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Tensors, weights and bytes of one kind. A packed word counts as eight parameters, a scale or a shape as none."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts of a checkpoint. `parameters_active` are used for one token, the embedding table not counted."""

    folder: str
    config: dict[str, Any]
    shards: int
    file_bytes: int
    tensors: int
    tensor_bytes: int
    parameters_total: int
    parameters_active: int
    kinds: tuple[Kind, ...]
    problems: tuple[str, ...]


def inspection_of_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Count what the configuration asks for; `problems` says where the shards differ from it."""
    kinds = {name: [0, 0, 0] for name in KINDS}
    for pattern in checkpoint.patterns:
        counted = kinds[_kind(pattern)]
        count = max(len(pattern.indices), 1) * max(pattern.experts, 1)
        counted[0] += count
        counted[1] += count * _parameters(pattern)
        counted[2] += count * math.prod(pattern.shape) * STORED_ITEM_SIZES[pattern.dtypes[0]]
    headers = [shard.header for shard in checkpoint.shards]
    return Inspection(
        folder=str(checkpoint.folder),
        config=asdict(checkpoint.config),
        shards=len(headers),
        file_bytes=sum(header.file_bytes for header in headers),
        tensors=sum(len(header.entries) for header in headers),
        tensor_bytes=sum(header.file_bytes - header.data_start for header in headers),
        parameters_total=sum(counted[1] for counted in kinds.values()),
        parameters_active=_active_parameters(checkpoint.config, checkpoint.patterns),
        kinds=tuple(
            Kind(name=name, tensors=counted[0], parameters=counted[1], bytes=counted[2])
            for name, counted in kinds.items()
            if counted[0]
        ),
        problems=checkpoint.problems,
    )


def _kind(pattern: TensorPattern) -> str:
    if pattern.experts:
        return KINDS[("weight_packed", "weight_scale", "weight_shape").index(pattern.name.rpartition(".")[2])]
    return KINDS[4] if pattern.component == "vision" else KINDS[3]


def _parameters(pattern: TensorPattern) -> int:
    """Parameters of one tensor of the family."""
    elements = math.prod(pattern.shape)
    if not pattern.experts:
        return elements
    return elements * NIBBLES_PER_WORD if pattern.name.endswith("weight_packed") else 0


def _active_parameters(config: ModelConfig, patterns: tuple[TensorPattern, ...]) -> int:
    active = 0
    for pattern in patterns:
        if pattern.component in ("vision", "embed"):
            continue
        experts = config.text.num_experts_per_tok if pattern.experts else 1
        active += max(len(pattern.indices), 1) * experts * _parameters(pattern)
    return active
