"""Discrete choices (experts, the first token) compared with an eye for ties: rounding may decide a tie either way.

Legend: T tokens, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class RouterComparison:
    """`ties` and `differs` are masks [T]: another expert set within, or beyond, the tie margin."""

    ties: npt.NDArray[np.bool_]
    differs: npt.NDArray[np.bool_]
    weights_max_abs: float


def compare_routing(
    *,
    actual_ids: npt.NDArray[np.integer],
    actual_weights: npt.NDArray[np.floating],
    expected_ids: npt.NDArray[np.integer],
    expected_weights: npt.NDArray[np.floating],
    scores: npt.NDArray[np.floating],
    margin: float,
) -> RouterComparison:
    """Compare the experts of each token, ids and weights [T, K], whatever their order.

    `scores` [T, E] are the reference's selection scores. Sets that differ are a tie where every expert that one side
    chose alone has a score within `margin` of every expert that the other side chose alone. Weights are compared
    for tokens with equal sets.
    """
    tokens = len(expected_ids)
    ties, differs = np.zeros(tokens, bool), np.zeros(tokens, bool)
    weights_max_abs = 0.0
    for token in range(tokens):
        actual, expected = actual_ids[token], expected_ids[token]
        if set(actual.tolist()) == set(expected.tolist()):
            pair = actual_weights[token][np.argsort(actual)], expected_weights[token][np.argsort(expected)]
            error = float(np.abs(pair[0].astype(np.float64) - pair[1]).max())
            weights_max_abs = max(weights_max_abs, error if np.isfinite(error) else np.inf)
            continue
        row = scores[token]
        only_actual, only_expected = np.setdiff1d(actual, expected), np.setdiff1d(expected, actual)
        in_range = only_actual.size == only_expected.size and only_actual.max(initial=0) < len(row)
        gap = row[only_expected][:, None] - row[only_actual][None, :] if in_range else np.array([[np.inf]])
        is_tie = bool((np.abs(gap) <= margin).all())  # NaN compares false: never a tie
        (ties if is_tie else differs)[token] = True
    return RouterComparison(ties=ties, differs=differs, weights_max_abs=weights_max_abs)


def top1_disagreements(
    actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating], *, margin: float
) -> npt.NDArray[np.intp]:
    """Rows of logits [T, V] whose best token differs, although the reference's logits of the two are no tie.

    A tie is a gap of at most `margin` times the root mean square of the reference's row. A row with a value that is
    not finite always disagrees.
    """
    rows = np.arange(len(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = expected[rows, expected.argmax(axis=1)] - expected[rows, actual.argmax(axis=1)]
        scale = np.sqrt(np.square(expected, dtype=np.float64).mean(axis=1))
    is_finite = np.isfinite(actual).all(axis=1) & np.isfinite(expected).all(axis=1)
    return np.flatnonzero(~is_finite | (gap > margin * scale))
