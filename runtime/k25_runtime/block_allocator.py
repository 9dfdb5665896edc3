"""Which blocks of the latent cache are free. One allocator serves all layers: their caches have the same shape."""

from __future__ import annotations

from k25_plugins.errors import InputError
from k25_runtime.sequence import Sequence


class BlockAllocator:
    """Hands out blocks of `block_size` positions."""

    def __init__(self, *, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def blocks_needed(self, sequence: Sequence, tokens: int) -> int:
        """New blocks that `tokens` more positions of the sequence take."""
        return max(-(-(sequence.length + tokens) // self.block_size) - len(sequence.blocks), 0)

    def reserve(self, requests: list[tuple[Sequence, int]]) -> None:
        """Give each sequence blocks for that many more tokens; `InputError`, and nothing taken, where they run out."""
        needed = [self.blocks_needed(sequence, tokens) for sequence, tokens in requests]
        if sum(needed) > len(self._free):
            raise InputError(
                f"latent cache: expected {sum(needed)} free blocks of {self.block_size} tokens, "
                f"found {len(self._free)} of {self.blocks}. "
                "Free a sequence, or open the runtime with more sequences or a larger context."
            )
        for (sequence, _), count in zip(requests, needed, strict=True):
            sequence.blocks += [self._free.pop() for _ in range(count)]

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back and close it."""
        self._free += reversed(sequence.blocks)
        sequence.blocks = []
        sequence.length = 0
        sequence.is_open = False
