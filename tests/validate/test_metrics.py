"""Metrics: their definitions, their coordinates, and that nothing broken can pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from k25_validate.metrics import (
    compare_tensors,
    cosine_similarity,
    kl_divergence,
    max_abs_error,
    relative_l2,
    router_agreement,
    top1_agreement,
    topk_agreement,
)

Array = npt.NDArray[np.float64]

_SHAPES = hnp.array_shapes(max_dims=3, max_side=6)
_PAIRS = _SHAPES.flatmap(
    lambda shape: st.tuples(
        *(hnp.arrays(np.float64, shape, elements=st.floats(-1e6, 1e6, allow_subnormal=False)) for _ in range(2))
    )
)
_LOGITS = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8).flatmap(
    lambda shape: st.tuples(*(hnp.arrays(np.float64, shape, elements=st.floats(-50, 50)) for _ in range(2)))
)


def pair(seed: int = 0, shape: tuple[int, ...] = (7, 33)) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=shape)
    return expected + 0.01 * generator.normal(size=shape), expected


def polygraphy_metric(name: str, actual: Array, expected: Array) -> float:
    """What Polygraphy's comparator says of the same two arrays."""
    comparator = pytest.importorskip("polygraphy.comparator")
    function, field = {
        "l2": ("L2CompareFunc", "l2_norm"),
        "cosine": ("CosineSimilarityCompareFunc", "cosine_similarity"),
    }[name]
    results = [comparator.IterationResult(outputs={"y": array}) for array in (actual, expected)]
    return float(getattr(getattr(comparator, function)()(*results)["y"], field))


@given(_PAIRS)
def test_relative_l2_is_the_ratio_of_norms(arrays: tuple[Array, Array]) -> None:
    actual, expected = arrays
    distance, norm = math.hypot(*(actual - expected).ravel()), math.hypot(*expected.ravel())
    if norm > 1e-100:
        assert relative_l2(actual, expected) == pytest.approx(distance / norm)
    elif norm == 0:
        assert relative_l2(actual, expected) == (math.inf if actual.any() else 0)


@given(_PAIRS)
def test_equal_tensors_have_no_error(arrays: tuple[Array, Array]) -> None:
    result = compare_tensors(arrays[0], arrays[0])
    assert (result.max_abs, result.relative_l2) == (0, 0)
    assert result.cosine == pytest.approx(1)


@given(_PAIRS)
def test_cosine_is_bounded_and_symmetric(arrays: tuple[Array, Array]) -> None:
    actual, expected = arrays
    assert -1 <= cosine_similarity(actual, expected) <= 1
    assert cosine_similarity(actual, expected) == pytest.approx(cosine_similarity(expected, actual))


@given(_PAIRS, st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans(), st.data())
def test_a_non_finite_value_anywhere_is_never_a_pass(
    arrays: tuple[Array, Array], bad: float, on_both_sides: bool, data: st.DataObject
) -> None:
    actual, expected = arrays
    index = tuple(data.draw(st.integers(0, side - 1)) for side in actual.shape)
    actual[index] = bad
    if on_both_sides:
        expected[index] = bad
    for result in (compare_tensors(actual, expected), compare_tensors(expected, actual)):
        assert result.max_abs == math.inf
        assert result.worst_index == index
        assert result.relative_l2 == math.inf
        assert result.cosine == -math.inf
        assert result.actual_nonfinite + result.expected_nonfinite == 1 + on_both_sides


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_ratios_do_not_depend_on_the_scale(scale: float) -> None:
    actual, expected = pair()
    assert relative_l2(actual * scale, expected * scale) == pytest.approx(relative_l2(actual, expected))
    assert cosine_similarity(actual * scale, expected * scale) == pytest.approx(cosine_similarity(actual, expected))


def test_the_worst_coordinate_is_named() -> None:
    actual, expected = pair(shape=(3, 4, 5))
    actual[2, 1, 4] = 40.0
    result = compare_tensors(actual.astype(np.float32), expected.astype(np.float32))
    assert result.worst_index == (2, 1, 4)
    assert result.actual == 40.0
    assert result.expected == np.float32(expected[2, 1, 4])
    assert result.max_abs == pytest.approx(40 - expected[2, 1, 4], rel=1e-6)
    assert max_abs_error(actual, expected)[1] == (2, 1, 4)


def test_zero_references() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert relative_l2(one, zero) == math.inf
    assert relative_l2(zero, zero) == 0
    assert cosine_similarity(one, zero) == 0
    assert cosine_similarity(zero, zero) == 1


def test_polygraphy_measures_the_same() -> None:
    actual, expected = pair()
    assert cosine_similarity(actual, expected) == pytest.approx(polygraphy_metric("cosine", actual, expected))
    distance = polygraphy_metric("l2", actual, expected)
    assert relative_l2(actual, expected) * np.linalg.norm(expected) == pytest.approx(distance)


@given(_LOGITS)
def test_kl_divergence_is_that_of_the_softmaxes(arrays: tuple[Array, Array]) -> None:
    actual, expected = arrays
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in arrays)
    rows = (p * np.log(p / q)).sum(-1)
    result = kl_divergence(actual, expected)
    assert result.mean == pytest.approx(rows.mean(), abs=1e-12)
    assert result.maximum == pytest.approx(rows.max(), abs=1e-12)
    assert 0 <= result.mean <= result.maximum


@given(_LOGITS, st.floats(-1e4, 1e4))
def test_kl_divergence_ignores_a_constant(arrays: tuple[Array, Array], constant: float) -> None:
    assert kl_divergence(arrays[0] + constant, arrays[0]).maximum == pytest.approx(0, abs=1e-8)


def test_kl_divergence_has_a_direction_a_worst_row_and_a_limit() -> None:
    expected = np.log([[0.5, 0.5], [0.5, 0.5]])
    result = kl_divergence(np.log([[0.5, 0.5], [0.9, 0.1]]), expected)
    assert result.maximum == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert result.worst_row == 1
    assert result.mean == pytest.approx(result.maximum / 2)
    assert kl_divergence([0.0, -1e6], [0.0, 0.0]).maximum == pytest.approx(5e5 - math.log(2))
    assert kl_divergence([1.7e308, -1.7e308], [-1.7e308, 1.7e308]).maximum == math.inf


def test_a_non_finite_row_of_logits_agrees_with_nothing() -> None:
    expected = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    actual = expected.copy()
    actual[0, 0] = math.nan
    result = kl_divergence(actual, expected)
    assert (result.mean, result.maximum, result.worst_row) == (math.inf, math.inf, 0)
    assert top1_agreement(actual, expected) == 0.5
    assert topk_agreement(actual, expected, k=2) == 0.5


def test_top_k_agreement_counts_shared_tokens() -> None:
    expected = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    actual = np.array([[4.0, 5.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert top1_agreement(actual, expected) == 0.5
    assert topk_agreement(actual, expected, k=2) == 1
    assert topk_agreement([1.0, 2.0, 3.0, 9.0, 8.0], [9.0, 8.0, 3.0, 2.0, 1.0], k=3) == pytest.approx(1 / 3)


@given(_LOGITS.filter(lambda arrays: arrays[0].shape[1] >= 3))
def test_top_k_agreement_is_that_of_a_stable_sort(arrays: tuple[Array, Array]) -> None:
    actual, expected = (np.round(array) for array in arrays)  # rounded, so that there are ties
    order = [np.argsort(-array, axis=-1, kind="stable")[:, :3] for array in (actual, expected)]
    shared = [len(set(a.tolist()) & set(e.tolist())) for a, e in zip(*order, strict=True)]
    assert topk_agreement(actual, expected, k=3) == pytest.approx(np.mean(shared) / 3)


def test_router_agreement_compares_sets() -> None:
    expected = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert router_agreement(expected[:, ::-1], expected) == 1
    assert router_agreement(np.where(expected == 9, 10, expected), expected) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "metric",
    [compare_tensors, relative_l2, max_abs_error, cosine_similarity, kl_divergence, top1_agreement, router_agreement],
)
def test_what_cannot_be_compared_is_refused(metric: Callable[[Array, Array], object]) -> None:
    with pytest.raises(ValueError, match=r"shapes differ: expected \[2, 4\], found \[2, 3\]"):
        metric(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="nothing to compare"):
        metric(np.zeros((0, 3)), np.zeros((0, 3)))


def test_odd_arguments_are_refused() -> None:
    row = np.zeros((2, 4))
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"k: expected 1\.\.4"):
            topk_agreement(row, row, k=k)
    with pytest.raises(ValueError, match="logits: expected shape"):
        kl_divergence(row[None], row[None])
    with pytest.raises(ValueError, match="expert ids: expected shape"):
        router_agreement(row[0], row[0])
