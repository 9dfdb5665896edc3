"""What a reference computes: the contract between the references and everything that is judged against them.

Legend: T tokens, H hidden, V vocabulary, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class ReferenceTrace:
    """All intermediate results of one sequence, run causally from an empty cache.

    `token_ids` is int64 [T]. `hidden` has one more entry than there are layers, each float32 [T, H]: `hidden[0]` is
    the embedding and `hidden[i + 1]` the output of layer i, before the final norm. `expert_ids` (int64 [T, k], in
    the reference's own order), `expert_weights` (float32 [T, k], scaled) and `router_scores` (float32 [T, E], sigmoid
    plus bias: what the choice is made by) exist for the MoE layers. `logits` is float32 [T, V].
    """

    token_ids: npt.NDArray[np.int64]
    hidden: tuple[npt.NDArray[np.float32], ...]
    expert_ids: Mapping[int, npt.NDArray[np.int64]]
    expert_weights: Mapping[int, npt.NDArray[np.float32]]
    router_scores: Mapping[int, npt.NDArray[np.float32]]
    logits: npt.NDArray[np.float32]


class Reference(Protocol):
    """A text model that the exported one is judged against; `name` is `plain` or `transformers`."""

    @property
    def name(self) -> str:
        """The name that reports and `--reference` use."""
        ...

    def trace(self, token_ids: Sequence[int], *, first_position: int = 0) -> ReferenceTrace:
        """Run one sequence whose first token stands at `first_position`, with nothing before it."""
        ...
