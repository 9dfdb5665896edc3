"""Blocks of the latent cache: nobody shares one, none is lost, and a request that does not fit takes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from k25_plugins.errors import InputError
from k25_runtime.block_allocator import BlockAllocator
from k25_runtime.sequence import Sequence


def appended(allocator: BlockAllocator, sequence: Sequence, tokens: int) -> None:
    allocator.reserve([(sequence, tokens)])
    sequence.length += tokens


@pytest.mark.parametrize(
    ("cached", "new", "blocks"),
    [(0, 1, 1), (0, 4, 1), (0, 5, 2), (3, 1, 0), (4, 1, 1), (3, 2, 1), (4, 8, 2), (4, 9, 3)],
)
def test_a_block_is_taken_when_the_last_one_is_full(cached: int, new: int, blocks: int) -> None:
    allocator, sequence = BlockAllocator(blocks=10, block_size=4), Sequence()
    if cached:
        appended(allocator, sequence, cached)
    before = allocator.free_blocks
    assert allocator.blocks_needed(sequence, new) == blocks
    appended(allocator, sequence, new)
    assert before - allocator.free_blocks == blocks
    assert len(sequence.blocks) == -(-(cached + new) // 4)


def test_every_block_is_handed_out_once() -> None:
    allocator = BlockAllocator(blocks=6, block_size=2)
    sequences = [Sequence() for _ in range(3)]
    allocator.reserve([(sequence, 4) for sequence in sequences])
    assert sorted(block for sequence in sequences for block in sequence.blocks) == list(range(6))
    assert allocator.free_blocks == 0


def test_reserving_again_before_the_tokens_are_cached_takes_nothing() -> None:
    allocator, sequence = BlockAllocator(blocks=4, block_size=4), Sequence()
    allocator.reserve([(sequence, 6)])
    blocks = list(sequence.blocks)
    allocator.reserve([(sequence, 6)])
    assert sequence.blocks == blocks
    assert allocator.free_blocks == 2


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    allocator = BlockAllocator(blocks=5, block_size=4)
    held, small, large = Sequence(), Sequence(), Sequence()
    appended(allocator, held, 7)
    with pytest.raises(InputError, match=r"latent cache: expected 4 free blocks of 4 tokens, found 3 of 5"):
        allocator.reserve([(small, 4), (large, 9)])
    assert (small.blocks, large.blocks, len(held.blocks)) == ([], [], 2)
    assert allocator.free_blocks == 3
    allocator.reserve([(large, 12)])
    assert allocator.free_blocks == 0


def test_freed_blocks_are_handed_out_again_and_the_sequence_is_closed() -> None:
    allocator, first, second = BlockAllocator(blocks=3, block_size=4), Sequence(), Sequence()
    appended(allocator, first, 12)
    assert allocator.free_blocks == 0
    taken = set(first.blocks)
    allocator.free(first)
    assert (first.blocks, first.length, first.is_open) == ([], 0, False)
    appended(allocator, second, 12)
    assert set(second.blocks) == taken


def test_freeing_twice_gives_nothing_back_twice() -> None:
    allocator, sequence = BlockAllocator(blocks=3, block_size=4), Sequence()
    appended(allocator, sequence, 5)
    allocator.free(sequence)
    allocator.free(sequence)
    assert allocator.free_blocks == 3
    others = [Sequence() for _ in range(3)]
    allocator.reserve([(other, 4) for other in others])
    assert len({block for other in others for block in other.blocks}) == 3


def test_no_block_is_shared_or_lost_over_many_steps() -> None:
    generator = np.random.default_rng(5)
    allocator, running = BlockAllocator(blocks=12, block_size=3), list[Sequence]()
    refused = 0
    for _ in range(400):
        if running and generator.random() < 0.3:
            allocator.free(running.pop(int(generator.integers(len(running)))))
        else:
            if generator.random() < 0.5 or not running:
                running.append(Sequence())
            sequence, tokens = running[int(generator.integers(len(running)))], int(generator.integers(1, 9))
            try:
                appended(allocator, sequence, tokens)
            except InputError:
                refused += 1
        held = [block for sequence in running for block in sequence.blocks]
        assert len(held) == len(set(held)) == 12 - allocator.free_blocks
        assert all(len(sequence.blocks) == -(-sequence.length // 3) for sequence in running)
    assert 0 < refused < 400
    for sequence in running:
        allocator.free(sequence)
    assert allocator.free_blocks == 12
