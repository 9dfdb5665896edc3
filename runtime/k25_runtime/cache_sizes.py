"""How much the latent cache holds: what the caller asks for, inside what model and backend take."""

from __future__ import annotations

from dataclasses import dataclass

from k25_plugins.errors import InputError
from k25_runtime.step_limits import StepLimits

DEFAULT_CONTEXT = 8192
DEFAULT_MAX_SEQUENCES = 8
DEFAULT_BLOCK_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """`context` tokens of a sequence; `blocks` of `block_size` tokens for all of them."""

    context: int
    block_size: int
    blocks: int


def cache_sizes(
    limits: StepLimits,
    *,
    longest: int,
    context: int | None,
    max_sequences: int | None,
    block_size: int | None,
    max_batch_tokens: int,
) -> CacheSizes:
    """Sizes that are given, and defaults that fit for the others. `longest` is the model's max_position_embeddings.

    Raises `InputError` where one that is given does not fit.
    """
    if block_size is None:
        block_size = limits.only("block_size") or DEFAULT_BLOCK_SIZE
    _require_positive(block_size=block_size, max_batch_tokens=max_batch_tokens)
    limits.check("block_size", block_size, what="block_size")
    if context is None:
        context = min(longest, DEFAULT_CONTEXT, limits.largest("blocks_per_sequence") * block_size)
    _require_positive(context=context)
    if context > longest:
        raise InputError(f"context: expected at most {longest}, the model's max_position_embeddings, found {context}")
    blocks_per_sequence = -(-context // block_size)
    limits.check("blocks_per_sequence", blocks_per_sequence, what=f"context {context}: blocks of {block_size} tokens")
    if max_sequences is None:
        max_sequences = max(min(DEFAULT_MAX_SEQUENCES, limits.largest("blocks") // blocks_per_sequence), 1)
    _require_positive(max_sequences=max_sequences)
    blocks = max_sequences * blocks_per_sequence
    limits.check("blocks", blocks, what=f"latent cache of {max_sequences} sequences of {context} tokens: blocks")
    return CacheSizes(context=context, block_size=block_size, blocks=blocks)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}")
