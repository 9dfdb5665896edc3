"""The inputs of a step, as bundle-format.md section 5 describes them."""

from __future__ import annotations

import numpy as np
import pytest

from k25_runtime.batch import batch_from_chunks
from k25_runtime.sequence import Sequence


def test_tokens_of_sequences_are_packed_flat() -> None:
    # Block size 4: six cached tokens and two new ones take two blocks, four new ones take one.
    running, starting = Sequence(length=6, blocks=[7, 2]), Sequence(length=0, blocks=[5])
    batch = batch_from_chunks([(running, [11, 12]), (starting, [13, 14, 15, 16])])
    assert batch.token_ids.tolist() == [11, 12, 13, 14, 15, 16]
    assert batch.positions.tolist() == [6, 7, 0, 1, 2, 3]
    assert batch.query_start.tolist() == [0, 2, 6]
    assert batch.block_table.tolist() == [[7, 2], [5, 0]]
    assert batch.tokens == 6


def test_one_token_of_one_sequence() -> None:
    batch = batch_from_chunks([(Sequence(length=3, blocks=[9]), [8])])
    assert (batch.token_ids.tolist(), batch.positions.tolist()) == ([8], [3])
    assert (batch.query_start.tolist(), batch.block_table.tolist()) == ([0, 1], [[9]])
    assert batch.tokens == 1


@pytest.mark.parametrize("name", ["token_ids", "positions", "query_start", "block_table"])
def test_every_input_is_contiguous_int32(name: str) -> None:
    value = getattr(batch_from_chunks([(Sequence(length=2, blocks=[1]), [3, 4]), (Sequence(blocks=[0]), [5])]), name)
    assert value.dtype == np.int32
    assert value.flags.c_contiguous


def test_packing_changes_no_sequence() -> None:
    sequence = Sequence(length=2, blocks=[4, 1])
    batch = batch_from_chunks([(sequence, [3])])
    batch.block_table[:] = -1
    assert (sequence.length, sequence.blocks, sequence.is_open) == (2, [4, 1], True)


def test_every_token_lies_in_a_block_of_its_own_sequence() -> None:
    """Each (block, slot) that a step writes is written once, in a block of the sequence that `query_start` names."""
    generator, block_size = np.random.default_rng(0), 3
    order = iter(generator.permutation(100).tolist())
    chunks = []
    for _ in range(8):
        cached, new = generator.integers(0, 9), generator.integers(1, 7)
        blocks = [next(order) for _ in range(-(-(cached + new) // block_size))]
        chunks.append((Sequence(length=int(cached), blocks=blocks), generator.integers(0, 50, new).tolist()))
    batch = batch_from_chunks(chunks)
    written = set()
    for row, (sequence, tokens) in enumerate(chunks):
        start, stop = batch.query_start[row : row + 2]
        assert batch.token_ids[start:stop].tolist() == tokens
        assert batch.positions[start:stop].tolist() == list(range(sequence.length, sequence.length + len(tokens)))
        for position in batch.positions[start:stop].tolist():
            block = int(batch.block_table[row, position // block_size])
            assert block in sequence.blocks
            written.add((block, position % block_size))
    assert len(written) == batch.tokens == batch.query_start[-1]
