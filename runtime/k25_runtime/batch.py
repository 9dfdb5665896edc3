"""The inputs of one step: tokens of several sequences packed flat, and where they belong."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_runtime.media_tokens import PlacedMedia, joined_media
from k25_runtime.sequence import Sequence

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`token_ids`, `positions` [T]; `query_start` [S + 1]; `block_table` [S, blocks]; all int32.

    `media` are the embeddings that replace those of placeholder tokens.
    """

    token_ids: Int32
    positions: Int32
    query_start: Int32
    block_table: Int32
    media: PlacedMedia | None = None

    @property
    def tokens(self) -> int:
        """T, the number of tokens of the step."""
        return len(self.token_ids)


def batch_from_chunks(
    chunks: Sequence_[tuple[Sequence, Sequence_[int]]], media: Sequence_[PlacedMedia | None] | None = None
) -> Batch:
    """Pack the next tokens of each sequence; its blocks must have been reserved. Unused table entries are 0.

    `media` holds, for each chunk, what stands among its tokens.
    """
    counts = [len(tokens) for _, tokens in chunks]
    positions = [row for sequence, tokens in chunks for row in range(sequence.length, sequence.length + len(tokens))]
    width = max(len(sequence.blocks) for sequence, _ in chunks)
    table = np.zeros((len(chunks), width), np.int32)
    for row, (sequence, _) in enumerate(chunks):
        table[row, : len(sequence.blocks)] = sequence.blocks
    return Batch(
        token_ids=np.array([token for _, tokens in chunks for token in tokens], np.int32),
        positions=np.array(positions, np.int32),
        query_start=np.array([0, *itertools.accumulate(counts)], np.int32),
        block_table=table,
        media=None if media is None else joined_media(list(zip(counts, media, strict=True))),
    )
