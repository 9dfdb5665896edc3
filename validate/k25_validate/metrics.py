"""How far a result is from its reference: metrics under the names of the field, computed in float64.

A NaN or an infinity on either side is an infinite error (and a similarity of -inf, an agreement of 0), so that no
threshold can pass it. Tensors of different shapes, and empty ones, raise `ValueError`: there is nothing to measure.

Legend: T rows (tokens), V vocabulary, k experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """One tensor against its reference. `actual` and `expected` are the values at `worst_index`."""

    max_abs: float
    worst_index: tuple[int, ...]
    actual: float
    expected: float
    relative_l2: float
    cosine: float
    actual_nonfinite: int
    expected_nonfinite: int


@dataclass(frozen=True, kw_only=True)
class KlDivergence:
    """Kullback-Leibler divergence over rows of logits, in nats; `worst_row` is the row of `maximum`."""

    mean: float
    maximum: float
    worst_row: int


def compare_tensors(actual: npt.ArrayLike, expected: npt.ArrayLike) -> TensorComparison:
    """All measures of one tensor of any shape. Raises `ValueError` for shapes that differ or hold nothing."""
    actual, expected = _pair(actual, expected)
    max_abs, index = max_abs_error(actual, expected)
    return TensorComparison(
        max_abs=max_abs,
        worst_index=index,
        actual=float(actual[index]),
        expected=float(expected[index]),
        relative_l2=relative_l2(actual, expected),
        cosine=cosine_similarity(actual, expected),
        actual_nonfinite=int(actual.size - np.isfinite(actual).sum()),
        expected_nonfinite=int(expected.size - np.isfinite(expected).sum()),
    )


def relative_l2(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """||actual - expected|| / ||expected||, over all elements.

    Where the reference is zero the ratio says nothing: 0 if the result is zero as well, else infinity.
    """
    actual, expected = _pair(actual, expected)
    if not _all_finite(actual, expected):
        return math.inf
    # Both norms in units of the largest magnitude: squares neither overflow nor vanish, whatever the scale.
    unit = _magnitude(actual, expected)
    if unit == 0:
        return 0.0
    error = _norm(actual / unit - expected / unit)
    return error / reference if (reference := _norm(expected / unit)) else math.inf


def max_abs_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> tuple[float, tuple[int, ...]]:
    """The largest |actual - expected| and its coordinate (the first, in row-major order, of several)."""
    actual, expected = _pair(actual, expected)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(actual - expected)
    error[~(np.isfinite(actual) & np.isfinite(expected))] = math.inf
    index = np.unravel_index(int(error.argmax()), error.shape)
    return float(error[index]), tuple(int(i) for i in index)


def cosine_similarity(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Cosine of the angle between both tensors as flat vectors: 1 is best; 1 if both are zero, 0 if only one is."""
    actual, expected = _pair(actual, expected)
    if not _all_finite(actual, expected):
        return -math.inf
    units = _magnitude(actual), _magnitude(expected)
    if 0 in units:
        return 1.0 if units == (0, 0) else 0.0
    left, right = actual.ravel() / units[0], expected.ravel() / units[1]
    return float(np.clip(left @ right / (_norm(left) * _norm(right)), -1.0, 1.0))


def kl_divergence(actual_logits: npt.ArrayLike, expected_logits: npt.ArrayLike) -> KlDivergence:
    """KL(expected || actual) of the softmax of each row, in nats: what is lost by sampling from `actual`.

    Logits are [T, V], or [V] for one row.
    """
    divergence_T = kl_divergence_of_rows(actual_logits, expected_logits)
    worst = int(divergence_T.argmax())
    return KlDivergence(mean=float(divergence_T.mean()), maximum=float(divergence_T[worst]), worst_row=worst)


def kl_divergence_of_rows(actual_logits: npt.ArrayLike, expected_logits: npt.ArrayLike) -> _Array:
    """`kl_divergence` of each row, float64 [T]."""
    actual, expected = _rows(actual_logits, expected_logits)
    with np.errstate(invalid="ignore", over="ignore"):
        log_actual, log_expected = log_softmax(actual), log_softmax(expected)
        probability = np.exp(log_expected)
        terms = np.where(probability > 0, probability * (log_expected - log_actual), 0.0)
        divergence_T: _Array = np.maximum(terms.sum(axis=-1), 0.0)  # rounding can take equal rows below zero
    divergence_T[~_finite_rows(actual, expected)] = math.inf
    return divergence_T


def top1_agreement(actual_logits: npt.ArrayLike, expected_logits: npt.ArrayLike) -> float:
    """Share of rows whose most likely token is the same (the lower id of equal logits). Logits are [T, V] or [V]."""
    return topk_agreement(actual_logits, expected_logits, k=1)


def topk_agreement(actual_logits: npt.ArrayLike, expected_logits: npt.ArrayLike, *, k: int = 5) -> float:
    """Share of the reference's k most likely tokens that are also among the result's, averaged over rows.

    Equal logits are ordered by id. Raises `ValueError` unless 1 <= k <= V.
    """
    actual, expected = _rows(actual_logits, expected_logits)
    if not 1 <= k <= actual.shape[-1]:
        raise ValueError(f"k: expected 1..{actual.shape[-1]}, found {k}")
    shared = [
        len(np.intersect1d(top_indices(actual_V, k), top_indices(expected_V, k)))
        for actual_V, expected_V, finite in zip(actual, expected, _finite_rows(actual, expected), strict=True)
        if finite
    ]
    return sum(shared) / (k * len(actual))


def router_agreement(actual_ids: npt.ArrayLike, expected_ids: npt.ArrayLike) -> float:
    """Share of tokens that go to the same set of experts, whatever the order. Ids are [T, k]."""
    actual, expected = np.asarray(actual_ids), np.asarray(expected_ids)
    _check_shapes(actual, expected)
    if actual.ndim != 2:
        raise ValueError(f"expert ids: expected shape [tokens, experts per token], found {list(actual.shape)}")
    return float((np.sort(actual, axis=-1) == np.sort(expected, axis=-1)).all(axis=-1).mean())


def _pair(actual: npt.ArrayLike, expected: npt.ArrayLike) -> tuple[_Array, _Array]:
    left, right = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    _check_shapes(left, right)
    return left, right


def _rows(actual: npt.ArrayLike, expected: npt.ArrayLike) -> tuple[_Array, _Array]:
    left, right = _pair(actual, expected)
    if left.ndim not in (1, 2):
        raise ValueError(f"logits: expected shape [rows, vocabulary] or [vocabulary], found {list(left.shape)}")
    return np.atleast_2d(left), np.atleast_2d(right)


def _check_shapes(actual: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> None:
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: expected {list(expected.shape)}, found {list(actual.shape)}")
    if actual.size == 0:
        raise ValueError(f"nothing to compare: both tensors have shape {list(actual.shape)}")


def _all_finite(*arrays: _Array) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _finite_rows(actual: _Array, expected: _Array) -> npt.NDArray[np.bool_]:
    return np.asarray((np.isfinite(actual) & np.isfinite(expected)).all(axis=-1))


def _magnitude(*arrays: _Array) -> float:
    return max(float(np.abs(array).max()) for array in arrays)


def _norm(array: _Array) -> float:
    return float(np.linalg.norm(array.ravel()))


def log_softmax(logits_TV: _Array) -> _Array:
    """Log-probabilities of rows of logits."""
    shifted = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    normalised: _Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def top_indices(logits_V: _Array, k: int) -> npt.NDArray[np.intp]:
    """The k largest, largest first; the lower index of equal values. No full sort: vocabularies are large."""
    threshold = np.partition(logits_V, -k)[-k]
    candidates = np.flatnonzero(logits_V >= threshold)
    return candidates[np.argsort(-logits_V[candidates], kind="stable")[:k]]
