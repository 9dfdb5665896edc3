"""Running the next tokens of several sequences, in pieces of bounded size. Legend: T tokens, V vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from k25_runtime.batch import Batch, batch_from_chunks
from k25_runtime.media_tokens import PlacedMedia
from k25_runtime.model_runner import ModelRunner
from k25_runtime.sequence import Sequence

Float32 = npt.NDArray[np.float32]
Rows = Literal["all", "last"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next tokens of a sequence, and the media among them."""

    sequence: Sequence
    tokens: list[int]
    media: PlacedMedia | None = None

    def part(self, start: int, stop: int) -> Chunk:
        """Tokens `start` to `stop`, with what media fall on them."""
        media = None if self.media is None else self.media.part(start, stop)
        return Chunk(sequence=self.sequence, tokens=self.tokens[start:stop], media=media)


def packed(chunks: Sequence_[Chunk]) -> Batch:
    """One step of all these tokens."""
    return batch_from_chunks([(chunk.sequence, chunk.tokens) for chunk in chunks], [chunk.media for chunk in chunks])


def logits_of_chunks(
    runner: ModelRunner, chunks: Sequence_[Chunk], *, rows: Rows, max_batch_tokens: int
) -> list[Float32]:
    """Append the tokens, first come first served, at most `max_batch_tokens` a step; logits [T, V] of each chunk.

    With `rows` "last" they are [1, V]. Blocks must have been reserved. No step exceeds the limits of the backend.
    """
    limits = runner.limits
    most_rows, most_sequences = limits.largest("rows"), limits.largest("sequences")
    most_tokens = min(max_batch_tokens, limits.largest("tokens"), most_rows if rows == "all" else max_batch_tokens)
    most_sequences = min(most_sequences, most_rows)
    lengths = [len(chunk.tokens) for chunk in chunks]
    if sum(lengths) <= most_tokens and len(chunks) <= most_sequences:  # as in a step of a token each
        return _logits_of_step(runner, chunks, [0 if rows == "all" else length - 1 for length in lengths])
    found: list[list[Float32]] = [[] for _ in chunks]
    taken = [0] * len(chunks)
    for piece in _pieces(lengths, most_tokens, most_sequences):
        parts = [chunks[index].part(taken[index], taken[index] + count) for index, count in piece]
        firsts = []
        for index, count in piece:
            taken[index] += count
            firsts.append(0 if rows == "all" else count - 1 if taken[index] == lengths[index] else count)
        for (index, _), logits in zip(piece, _logits_of_step(runner, parts, firsts), strict=True):
            found[index].append(logits)
    return [np.concatenate(parts_of_chunk) for parts_of_chunk in found]


def _logits_of_step(runner: ModelRunner, parts: Sequence_[Chunk], firsts: list[int]) -> list[Float32]:
    """Append the tokens in one step; logits of each part's tokens from `firsts` on, in arrays of their own."""
    rows: list[int] = []
    ends: list[int] = []
    start = 0
    for part, first in zip(parts, firsts, strict=True):
        rows += range(start + first, start + len(part.tokens))
        ends.append(len(rows))
        start += len(part.tokens)
    logits = runner.run(packed(parts), np.array(rows, np.int32))
    for part in parts:
        part.sequence.length += len(part.tokens)
    if len(parts) == 1:
        return [logits]
    return [logits[begin:end].copy() for begin, end in itertools.pairwise([0, *ends])]


def _pieces(lengths: Sequence_[int], most_tokens: int, most_sequences: int) -> Iterator[list[tuple[int, int]]]:
    """(chunk, tokens) of each step."""
    left = list(lengths)
    while any(left):
        room = most_tokens
        piece: list[tuple[int, int]] = []
        for index, count in enumerate(left):
            if (taken := min(room, count)) and len(piece) < most_sequences:
                piece.append((index, taken))
                left[index] -= taken
                room -= taken
        yield piece
