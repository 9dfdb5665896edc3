"""Ties and disagreements of routers and of the first token."""

from __future__ import annotations

import numpy as np
import pytest

from k25_validate.agreement import RouterComparison, compare_routing, top1_disagreements

SCORES = np.array([[0.9, 0.5, 0.5 - 1e-7, 0.1], [0.9, 0.5, 0.3, 0.1]], np.float32)


def _compare(actual: list[list[int]], weights: list[list[float]] | None = None) -> RouterComparison:
    expected = np.array([[0, 1], [0, 1]])
    return compare_routing(
        actual_ids=np.array(actual),
        actual_weights=np.array(weights or [[0.6, 0.4]] * 2, np.float32),
        expected_ids=expected,
        expected_weights=np.array([[0.6, 0.4]] * 2, np.float32),
        scores=SCORES,
        margin=1e-5,
    )


def test_order_does_not_matter() -> None:
    found = _compare([[1, 0], [0, 1]], [[0.4, 0.6], [0.6, 0.4]])
    assert not found.ties.any()
    assert not found.differs.any()
    assert found.weights_max_abs == 0


def test_weights_are_compared_expert_by_expert() -> None:
    found = _compare([[1, 0], [0, 1]], [[0.6, 0.4], [0.6, 0.4]])
    assert found.weights_max_abs == pytest.approx(0.2)


def test_equal_scores_are_a_tie_and_others_are_not() -> None:
    found = _compare([[0, 2], [0, 2]])
    assert found.ties.tolist() == [True, False]
    assert found.differs.tolist() == [False, True]


@pytest.mark.parametrize("ids", [[0, 0], [0, 7]])
def test_impossible_ids_differ(ids: list[int]) -> None:
    found = _compare([ids, [0, 1]])
    assert found.differs.tolist() == [True, False]


def test_weights_that_are_not_finite_are_an_infinite_error() -> None:
    assert _compare([[0, 1], [0, 1]], [[np.nan, 0.4], [0.6, 0.4]]).weights_max_abs == np.inf


def test_first_token_may_change_only_within_the_margin() -> None:
    expected = np.array([[1.0, 1.0 - 1e-7, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
    actual = np.array([[0.9, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, np.nan, 0.0]])
    assert top1_disagreements(actual, expected, margin=1e-5).tolist() == [1, 2]
