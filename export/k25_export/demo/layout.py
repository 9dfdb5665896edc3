"""Which tensor lies where: the shards of a demo checkpoint, in the order of the official release."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from k25_export.config import ModelConfig
from k25_export.tensor_patterns import TEXT_PREFIX, TensorPattern, tensor_patterns
from k25_plugins.int4 import NIBBLES_PER_WORD

# The safetensors library sorts a file by dtype, then by name; this is its order of the dtypes in use.
_DTYPE_ORDER = ("F32", "I32", "BF16")
_DTYPE_BYTES = {"F32": 4, "I32": 4, "BF16": 2}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor to write: `dtype` is a safetensors name, `constant` its values where they are not random."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: tuple[int, ...] = ()

    @property
    def byte_count(self) -> int:
        """Length of the data in bytes."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file: its name and its tensors in the order of their data."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def data_bytes(self) -> int:
        """Length of the data part in bytes."""
        return sum(tensor.byte_count for tensor in self.tensors)

    def header(self) -> bytes:
        """What precedes the data: 8 bytes of length, then compact JSON padded with spaces to a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.byte_count
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def shards_from_config(config: ModelConfig) -> tuple[Shard, ...]:
    """One shard a layer, then embedding, final norm and head, then the projector, then the vision tower."""
    patterns = tensor_patterns(config)
    constants = _packed_shapes(patterns)
    members: dict[int, list[TensorSpec]] = {}
    for pattern in patterns:
        dtype, constant = pattern.dtypes[0], constants.get(pattern.name, ())
        for place, family in _families(pattern, config.text.num_hidden_layers):
            members.setdefault(place, []).extend(
                TensorSpec(name=name, dtype=dtype, shape=pattern.shape, constant=constant) for name in family.names()
            )
    total = len(members)
    return tuple(
        Shard(file=_shard_file(number, total), tensors=tuple(sorted(members[place], key=_order_in_file)))
        for number, place in enumerate(sorted(members), start=1)
    )


def index_json(shards: tuple[Shard, ...]) -> str:
    """`model.safetensors.index.json`: total bytes of data, and the shard of every tensor."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    metadata = {"total_size": sum(shard.data_bytes for shard in shards)}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def _shard_file(number: int, total: int) -> str:
    # Five digits and six digits: the official names are like this.
    return f"model-{number:05d}-of-{total:06d}.safetensors"


def _order_in_file(tensor: TensorSpec) -> tuple[int, str]:
    return _DTYPE_ORDER.index(tensor.dtype), tensor.name


def _packed_shapes(patterns: Iterable[TensorPattern]) -> dict[str, tuple[int, ...]]:
    """What `weight_shape` holds, [out, in], by the name of the `weight_shape` pattern."""
    return {
        pattern.name.removesuffix("packed") + "shape": (pattern.shape[0], pattern.shape[1] * NIBBLES_PER_WORD)
        for pattern in patterns
        if pattern.name.endswith(".weight_packed")
    }


def _families(pattern: TensorPattern, layers: int) -> Iterator[tuple[int, TensorPattern]]:
    """The pattern cut by shard: (position of the shard, what of the pattern lies in it)."""
    if pattern.index_symbol == "layer":
        yield from ((layer, replace(pattern, indices=(layer,))) for layer in pattern.indices)
    else:
        yield _place(pattern, layers), pattern


def _place(pattern: TensorPattern, layers: int) -> int:
    """Position among the shards of what is in no layer."""
    if pattern.name.startswith(TEXT_PREFIX):
        return layers
    return layers + 1 if pattern.name.startswith("mm_projector.") else layers + 2
