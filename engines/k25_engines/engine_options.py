"""What a caller may choose about engines, checked against the bundle: the largest sizes that they must take."""

from __future__ import annotations

from dataclasses import dataclass

from k25_export.manifest import Manifest, Precision
from k25_export.tensor_table import TensorTable, for_layer
from k25_plugins.errors import mismatch

#: TensorRT takes no dimension of this size or more.
DIMENSION_LIMIT = 1 << 31
DEFAULT_BLOCK_SIZE = 64
#: Where each expert tensor starts in the buffer that a runtime copies a layer's experts to: a multiple of this.
EXPERT_ALIGNMENT = 128
#: Frames that the vision tower's time embedding has room for (vision_config.init_pos_emb_time).
MAX_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes as the caller gives them; None takes what the bundle says.

    `max_sequences` sequences decode at once; a prefill step has at most `max_tokens` tokens; logits of at most
    `max_rows` rows are asked for in a call. A sequence holds at most `context` tokens in blocks of `block_size`, of
    which the cache has at most `blocks`. `max_expert_rows` bounds the experts' region of a layer in rows of 8 bytes.
    """

    precision: Precision = "bf16"
    portable: bool = False
    max_sequences: int = 8
    max_tokens: int = 4096
    max_rows: int = 256
    block_size: int = DEFAULT_BLOCK_SIZE
    context: int | None = None
    blocks: int | None = None
    max_expert_rows: int | None = None
    max_patches: int = 16384


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`EngineOptions` with everything filled in and checked."""

    max_sequences: int
    max_tokens: int
    max_rows: int
    block_size: int
    blocks_per_sequence: int
    blocks: int
    expert_rows: int
    max_expert_rows: int
    max_patches: int


def limits_from_options(options: EngineOptions, manifest: Manifest) -> Limits:
    """The limits for the engines of this bundle. Raises `InputError` that names the option."""
    _require("--max-sequences", options.max_sequences, 1, 65536)
    _require("--max-tokens", options.max_tokens, 1, 1 << 20)
    _require("--max-rows", options.max_rows, 1, 1 << 20)
    _require("--block-size", options.block_size, 1, 4096)
    _require("--max-patches", options.max_patches, 4, 1 << 20)
    longest = manifest.model.text.max_position_embeddings
    context = options.context if options.context is not None else longest
    _require("--context", context, 1, longest)
    blocks_per_sequence = -(-context // options.block_size)
    blocks = options.blocks
    if blocks is None:
        blocks = blocks_per_sequence * options.max_sequences
    _require("--blocks", blocks, blocks_per_sequence, DIMENSION_LIMIT - 1)
    needed = needed_expert_rows(manifest)
    max_expert_rows = options.max_expert_rows if options.max_expert_rows is not None else max(needed, 1)
    _require("--max-expert-rows", max_expert_rows, max(needed, 1), DIMENSION_LIMIT - 1)
    return Limits(
        max_sequences=options.max_sequences,
        max_tokens=options.max_tokens,
        max_rows=min(options.max_rows, options.max_tokens),
        block_size=options.block_size,
        blocks_per_sequence=blocks_per_sequence,
        blocks=blocks,
        expert_rows=max(needed, 1),
        max_expert_rows=max_expert_rows,
        max_patches=options.max_patches,
    )


def needed_expert_rows(manifest: Manifest) -> int:
    """Rows of the largest region of experts of any layer, whether bound in place or copied; 0 without experts."""
    table = TensorTable(manifest)
    rows = 0
    for component in manifest.components:
        for binding in component.bindings.values():
            if binding.rule != "region":
                continue
            assert binding.row_bytes is not None
            for layer in component.layers or ():
                names = [for_layer(name, layer) for name in binding.tensors or ()]
                rows = max(rows, _region_rows(table, names, binding.row_bytes))
    return rows


def _region_rows(table: TensorTable, names: list[str], row_bytes: int) -> int:
    region = table.region(names, row_bytes=row_bytes)
    in_place = 0 if region is None else (region.stop - region.start) // row_bytes
    units = sum(-(-tensor.length // EXPERT_ALIGNMENT) for name in names for _, tensor in table.experts(name))
    return max(in_place, units * EXPERT_ALIGNMENT // row_bytes)


def _require(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise mismatch(option, expected=f"{low} to {high}", found=value)
