"""Layers at positions far beyond any prompt, without running what lies before them.

A sequence of a few tokens at positions 0, 1, 2 ... goes on at a far position: the reference simply computes it so. The
runtime's contract is that a token sees every position before its own, so its cache must hold something in the gap. The
block table names one block for all of it, filled with one *mute* row: a row whose score with every head of every far
token lies so far below its best one that the whole gap weighs less than 1e-13. Everything else is as in use: the
component as it ships, positions, rotation, block table, cache.

Legend: T tokens, N heads, C columns of the cache, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from k25_plugins.native_library import native_library
from k25_runtime.batch import Batch
from k25_runtime.model_runner import LayerOutput
from k25_runtime.runtime import Runtime
from k25_validate.agreement import compare_routing
from k25_validate.metrics import TensorComparison, compare_tensors
from k25_validate.plain_model import PlainModel
from k25_validate.reference import LayerTrace, Reference
from k25_validate.tolerances import ROUTER_TIE

Float32 = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

#: Where the far tokens start; the last positions that the model has come to these.
FAR_POSITIONS = (5_000, 100_000, 200_000)
NEAR_TOKENS = 16
FAR_TOKENS = 4

#: A mute row's score, in nats below the best one: exp(-45) times 262,144 rows is 8e-15.
MUTE_NATS = 45.0
_BLOCK_SIZE = 32

#: The function body of `k25.MLA` gathers all rows that a token sees, and holds them in so many forms.
_BODY_BYTES = 1 << 30
_BODY_COPIES = 8
_SEED = 25


@dataclass(frozen=True, kw_only=True)
class FarParity:
    """One layer whose last `tokens` tokens start at `position`, fed with the reference's input.

    `scores` is the largest sum of |query · key| over the columns, in nats: what rounding of a score is relative to.
    """

    component: str
    layer: int
    position: int
    tokens: int
    local: TensorComparison
    router_differs: int
    scores: float


def far_starts(runtime: Runtime) -> tuple[int, ...]:
    """The far positions that model and backend have; without native ops, those whose cache fits a function body."""
    limits, text = runtime.runner.limits, runtime.manifest.model.text
    last = min(text.max_position_embeddings, limits.largest("blocks_per_sequence") * _BLOCK_SIZE)
    longest = last if native_library() is not None else _BODY_BYTES // (_BODY_COPIES * 4 * text.cache_dim)
    starts = {*FAR_POSITIONS, last - FAR_TOKENS}
    return tuple(start for start in sorted(starts) if 2 * _BLOCK_SIZE <= start <= min(last - FAR_TOKENS, longest))


def far_parity(
    runtime: Runtime,
    reference: Reference,
    plain: PlainModel,
    starts: Sequence[int],
    *,
    is_streamed: bool = False,
    progress: Progress,
) -> tuple[FarParity, ...]:
    """The first layer of each kind at each of these positions. `plain` makes the mute rows, and judges nothing."""
    text = runtime.manifest.model.text
    ids = np.random.default_rng(_SEED).integers(0, text.vocab_size, NEAR_TOKENS + FAR_TOKENS).tolist()
    found = []
    for done, start in enumerate(starts):
        progress("far positions", done, len(starts))
        sequence = _FarSequence(runtime, plain, start)
        walk = reference.walk(ids, positions=[*range(NEAR_TOKENS), *range(start, start + FAR_TOKENS)])
        hidden = walk.embed()
        kinds: set[str] = set()
        for layer in range(min(text.first_k_dense_replace + 1, text.num_hidden_layers)):
            trace = walk.layer(layer, hidden)
            component = runtime.runner.component_of(layer)
            if component not in kinds:
                kinds.add(component)
                found.append(sequence.compared(layer, hidden, trace))
                if is_streamed:
                    runtime.runner.release_layers()
            hidden = trace.hidden
    progress("far positions", len(starts), len(starts))
    return tuple(found)


class _FarSequence:
    def __init__(self, runtime: Runtime, plain: PlainModel, start: int) -> None:
        self._runner = runtime.runner
        self._plain = plain
        self._start = start

    @torch.inference_mode()
    def compared(self, layer: int, hidden: Float32, trace: LayerTrace) -> FarParity:
        mute = self._mute_row(layer, hidden)
        tokens = mute.tokens
        near_blocks = -(-NEAR_TOKENS // _BLOCK_SIZE)
        first_block, last_block = self._start // _BLOCK_SIZE, (self._start + tokens - 1) // _BLOCK_SIZE
        tail = np.arange(near_blocks + 1, near_blocks + 2 + last_block - first_block)
        gap = np.full(first_block - near_blocks, near_blocks)
        table = np.concatenate([np.arange(near_blocks), gap, tail]).astype(np.int32)[None]
        cache = self._runner.cache_of_rows(np.tile(mute.row, (int(tail[-1]) + 1, _BLOCK_SIZE, 1)))
        self._run(layer, hidden[:NEAR_TOKENS], 0, table[:, :near_blocks], cache)
        rows = slice(NEAR_TOKENS, NEAR_TOKENS + tokens)
        output = self._run(layer, hidden[rows], self._start, table, cache)
        actual, kept, differs = output.hidden.to_float32(), np.ones(tokens, bool), 0
        if trace.expert_ids is not None and trace.expert_weights is not None and trace.router_scores is not None:
            assert output.expert_ids is not None
            assert output.expert_weights is not None
            router = compare_routing(
                actual_ids=output.expert_ids,
                actual_weights=output.expert_weights,
                expected_ids=trace.expert_ids[rows],
                expected_weights=trace.expert_weights[rows],
                scores=trace.router_scores[rows],
                margin=ROUTER_TIE,
            )
            kept, differs = ~router.ties, int(router.differs.sum())
        kept = kept if kept.any() else np.ones(tokens, bool)
        return FarParity(
            component=self._runner.component_of(layer),
            layer=layer,
            position=self._start,
            tokens=tokens,
            local=compare_tensors(actual[kept], trace.hidden[rows][kept]),
            router_differs=differs,
            scores=mute.scores,
        )

    def _run(self, layer: int, hidden: Float32, start: int, table: npt.NDArray[np.int32], cache: object) -> LayerOutput:
        tokens = len(hidden)
        batch = Batch(
            token_ids=np.zeros(tokens, np.int32),
            positions=np.arange(start, start + tokens, dtype=np.int32),
            query_start=np.array([0, tokens], np.int32),
            block_table=np.ascontiguousarray(table),
        )
        return self._runner.run_layer(layer, self._runner.hidden_from_float32(hidden), batch, cache)

    def _mute_row(self, layer: int, hidden: Float32) -> _MuteRow:
        """The shortest solution of queries · row = best score - MUTE_NATS."""
        positions = torch.tensor([*range(NEAR_TOKENS), *range(self._start, self._start + FAR_TOKENS)])
        x_TH = torch.from_numpy(hidden).to(self._plain.dtype)
        queries, rows = self._plain.queries_and_rows(layer, x_TH, self._plain.rotation_at(positions))
        heads, columns = queries.shape[1:]
        tokens = max(1, min(FAR_TOKENS, columns // (2 * heads)))
        span = range(NEAR_TOKENS, NEAR_TOKENS + tokens)
        best = torch.stack([(queries[token] @ rows[: token + 1].T).amax(dim=-1) for token in span])
        far = queries[NEAR_TOKENS : NEAR_TOKENS + tokens]
        if not (torch.isfinite(far).all() and torch.isfinite(rows).all()):  # a failure anyway; no row would help
            return _MuteRow(row=np.zeros(columns, np.float32), tokens=tokens, scores=0.0)
        matrix, wanted = far.double().flatten(0, 1).numpy(), best.double().flatten().numpy() - MUTE_NATS
        seen = rows[: NEAR_TOKENS + tokens].abs()
        return _MuteRow(
            row=np.linalg.lstsq(matrix, wanted, rcond=None)[0].astype(np.float32),
            tokens=tokens,
            scores=float((far.abs() @ seen.T).max()),
        )


@dataclass(frozen=True, kw_only=True)
class _MuteRow:
    """A cache row [C] that no head of the first `tokens` far tokens looks at: as many as leave it room in C columns."""

    row: Float32
    tokens: int
    scores: float
