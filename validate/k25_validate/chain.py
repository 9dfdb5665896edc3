"""A way of sending tokens through the model, layer by layer: all at once, prompt and then one by one, or in a batch.

Tokens of later steps can be taken through a layer before the first step has seen the next layer, because they are
given and not chosen. So every way is walked layer by layer, and one layer's weights are enough. Legend: T tokens of the
chain, H hidden, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_runtime.batch import Batch
from k25_runtime.media_item import MediaItem
from k25_runtime.model_runner import ModelRunner
from k25_runtime.runtime import Runtime
from k25_runtime.sequence import Sequence

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """`expert_ids` int32 and `expert_weights` float32 [T, K] of one layer."""

    expert_ids: npt.NDArray[np.int32]
    expert_weights: Float32


class Chain:
    """Steps that are run one after the other in every layer; `hidden` float32 [T, H] is what the next layer gets."""

    def __init__(self, steps: Sequence_[Batch]) -> None:
        self._steps = steps
        self.hidden: Float32 = np.empty((0, 0), np.float32)

    def embed(self, runner: ModelRunner) -> None:
        """Set `hidden` to the embeddings of the chain's tokens."""
        self.hidden = np.concatenate([runner.embed(step).to_float32() for step in self._steps])

    def run_layer(self, runner: ModelRunner, layer: int) -> Routing | None:
        """Take `hidden` through a layer, step by step; the routing of an MoE layer."""
        outputs = []
        start = 0
        for step in self._steps:
            hidden = runner.hidden_from_float32(self.hidden[start : start + step.tokens])
            outputs.append(runner.run_layer(layer, hidden, step))
            start += step.tokens
        self.hidden = np.concatenate([output.hidden.to_float32() for output in outputs])
        ids = [output.expert_ids for output in outputs if output.expert_ids is not None]
        weights = [output.expert_weights for output in outputs if output.expert_weights is not None]
        return Routing(expert_ids=np.concatenate(ids), expert_weights=np.concatenate(weights)) if ids else None

    def logits(self, runner: ModelRunner, rows_of: slice = slice(None)) -> Float32:
        """Logits float32 of these rows."""
        rows = np.arange(len(self.hidden), dtype=np.int32)[rows_of]
        return runner.head(runner.hidden_from_float32(self.hidden), rows)


def chain_of_steps(runtime: Runtime, steps: Sequence_[Sequence_[int]], media: Sequence_[MediaItem] = ()) -> Chain:
    """One sequence whose tokens come in these steps; the media stand in the first."""
    sequence = runtime.new_sequence()
    return Chain(
        [_reserved(runtime, [(sequence, tokens)], [() if index else media]) for index, tokens in enumerate(steps)]
    )


def chain_of_batch(
    runtime: Runtime, sequences: Sequence_[Sequence_[int]], media: Sequence_[Sequence_[MediaItem]] | None = None
) -> Chain:
    """Several sequences in one step, each with its media; rows in the order of the sequences."""
    chunks = [(runtime.new_sequence(), tokens) for tokens in sequences]
    return Chain([_reserved(runtime, chunks, [()] * len(chunks) if media is None else media)])


def _reserved(
    runtime: Runtime, chunks: list[tuple[Sequence, Sequence_[int]]], media: Sequence_[Sequence_[MediaItem]]
) -> Batch:
    batch = runtime.reserved_batch(chunks, media=[list(items) or None for items in media])
    for sequence, tokens in chunks:
        sequence.length += len(tokens)
    return batch
