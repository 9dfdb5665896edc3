"""What a reference computes: the contract between the references and everything that is judged against them.

Legend: T tokens, H hidden, V vocabulary, E experts, k experts per token, P patches, M media tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class MediaInput:
    """An image or a chunk of frames in a sequence: `pixel_values` float32 [P, 3, size, size] of `grid` (frames, rows,
    columns), in that order. The embeddings of its M tokens replace those of the tokens from `first_token` on."""

    pixel_values: npt.NDArray[np.float32]
    grid: Grid
    first_token: int = 0


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


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What one layer of the reference computes: as in `ReferenceTrace`; the last three are None without a router."""

    hidden: npt.NDArray[np.float32]
    expert_ids: npt.NDArray[np.int64] | None = None
    expert_weights: npt.NDArray[np.float32] | None = None
    router_scores: npt.NDArray[np.float32] | None = None


class ReferenceWalk(Protocol):
    """One sequence, layer by layer: for a model that does not fit into memory, and for walks that are resumed."""

    def embed(self) -> npt.NDArray[np.float32]:
        """The embedding, float32 [T, H]."""
        ...

    def layer(self, layer: int, hidden: npt.NDArray[np.float32]) -> LayerTrace:
        """Layer `layer` on its input float32 [T, H]: the reference's own output of the layer before."""
        ...

    def logits(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of the last layer's output."""
        ...


class Reference(Protocol):
    """A model that the exported one is judged against; `name` is `plain` or `transformers`."""

    @property
    def name(self) -> str:
        """The name that reports and `--reference` use."""
        ...

    def trace(
        self, token_ids: Sequence[int], *, first_position: int = 0, media: Sequence[MediaInput] = ()
    ) -> ReferenceTrace:
        """Run one sequence whose first token stands at `first_position`, with nothing before it."""
        ...

    def walk(
        self,
        token_ids: Sequence[int],
        *,
        media: Sequence[MediaInput] = (),
        positions: Sequence[int] | None = None,
    ) -> ReferenceWalk:
        """The same, layer by layer, at consecutive positions from 0 or at the ascending ones given.

        Each token sees itself and those before it in `token_ids`, wherever they stand.
        """
        ...

    def media_embeddings(self, pixel_values: npt.NDArray[np.float32], grid: Grid) -> npt.NDArray[np.float32]:
        """Embeddings float32 [M, H] of one media item, from vision tower and projector."""
        ...


class TraceWalk:
    """A walk over a trace that was made at once; the inputs of its layers are ignored."""

    def __init__(self, trace: ReferenceTrace) -> None:
        self._trace = trace

    def embed(self) -> npt.NDArray[np.float32]:
        """The embedding."""
        return self._trace.hidden[0]

    def layer(self, layer: int, hidden: npt.NDArray[np.float32]) -> LayerTrace:
        """What the trace holds of the layer."""
        trace = self._trace
        return LayerTrace(
            hidden=trace.hidden[layer + 1],
            expert_ids=trace.expert_ids.get(layer),
            expert_weights=trace.expert_weights.get(layer),
            router_scores=trace.router_scores.get(layer),
        )

    def logits(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The trace's logits."""
        return self._trace.logits
