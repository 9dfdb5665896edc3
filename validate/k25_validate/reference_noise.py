"""How far the reference itself is from float64: what no other float32 computation can be expected to do better.

A bound that follows from sizes alone (2 u sqrt(K)) is not enough where a model is ill-conditioned: large attention
scores, router logits or cancelling experts turn rounding of their inputs into much more. Where a result exceeds that
bound, the reference is run in float64 on the very same input, and the bound becomes a multiple of its own rounding.
What is judged has no part in it, so a fault cannot widen its own tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from k25_validate.metrics import relative_l2
from k25_validate.reference import LayerTrace, ReferenceWalk
from k25_validate.tolerances import Tolerance

#: Two float32 computations are apart by sqrt(2) of one's rounding; the other factor is for an unlucky order of sums.
NOISE_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """float32 against float64 on one input: relative L2 of the output, largest difference of router weights and
    scores.
    """

    hidden: float
    weights: float = 0.0
    scores: float = 0.0


class ReferenceNoise:
    """`walks` are float64 walks, by prompt; a prompt without one has no measure."""

    def __init__(self, walks: Mapping[int, ReferenceWalk]) -> None:
        self._walks = walks

    def layer(self, prompt: int, layer: int, entered: npt.NDArray[np.float32], trace: LayerTrace) -> LayerNoise | None:
        """Of the reference's layer `trace` on the input `entered` [T, H]. Tokens that float64 sends to other experts
        are left out of the tensors."""
        if prompt not in self._walks:
            return None
        exact = self._walks[prompt].layer(layer, entered)
        rows = np.ones(len(entered), bool)
        weights = scores = 0.0
        if exact.expert_ids is not None and trace.expert_ids is not None:
            rows = (np.sort(exact.expert_ids) == np.sort(trace.expert_ids)).all(axis=1)
            weights = _largest(_by_id(trace)[rows], _by_id(exact)[rows])
            scores = _largest(trace.router_scores, exact.router_scores)
        hidden = relative_l2(trace.hidden[rows], exact.hidden[rows]) if rows.any() else 0.0
        return LayerNoise(hidden=hidden, weights=weights, scores=scores)

    def head(self, prompt: int, entered: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> LayerNoise | None:
        """Of the reference's `logits` of the last layer's output."""
        if prompt not in self._walks:
            return None
        return LayerNoise(hidden=relative_l2(logits, self._walks[prompt].logits(entered)))


def widened(tolerance: Tolerance, noise: float | None, *, what: str = "this input") -> Tolerance:
    """The tolerance, or the multiple of the reference's own rounding where that is larger."""
    if noise is None or not np.isfinite(noise) or NOISE_FACTOR * noise <= tolerance.value:
        return tolerance
    return replace(
        tolerance,
        value=NOISE_FACTOR * noise,
        reason=f"{NOISE_FACTOR:g} times the reference's own rounding on {what} ({noise:.2e} against float64), which is "
        f"more than rounding of sums alone ({tolerance.value:.2e})",
    )


def _by_id(trace: LayerTrace) -> npt.NDArray[np.float64]:
    """Expert weights [T, k] in the order of the ids."""
    assert trace.expert_ids is not None
    assert trace.expert_weights is not None
    order = np.argsort(trace.expert_ids, axis=1)
    return np.take_along_axis(trace.expert_weights, order, axis=1).astype(np.float64)


def _largest(left: npt.ArrayLike | None, right: npt.ArrayLike | None) -> float:
    if left is None or right is None:
        return 0.0
    return float(np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64)).max(initial=0.0))
