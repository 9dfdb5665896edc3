"""One sequence: how many tokens of it are cached, and in which blocks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """A sequence of the runtime. `length` counts cached tokens; position p lies in blocks[p // block_size]."""

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    is_open: bool = True
