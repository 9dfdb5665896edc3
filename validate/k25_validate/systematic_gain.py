"""A factor common to all values: small, but no rounding.

Rounding errors have random signs, so their component along the reference averages out over the values; an epsilon, a
scale or a multiplier that is slightly wrong does not. It shows in this one number long before it shows in the norm.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from k25_validate.tolerances import UNIT_ROUNDOFF, Tolerance

GAIN = UNIT_ROUNDOFF
_ROWS = 8.0
_STANDARD_ERRORS = 3.0


def gain_tolerance(rows: int, noise: float = 0.0) -> Tolerance:
    """u (1 + 8 / sqrt(rows)): what rounds a whole row (a norm's factor) averages over the different rows only.

    `noise` is the standard error of the gain (`gain_noise`): three of them are no evidence of a common factor. In a
    model that has learnt, rounding of one score or router weight can move a whole row by many u.
    """
    return Tolerance(
        name="gain",
        value=GAIN * (1 + _ROWS / math.sqrt(max(rows, 1))) + _STANDARD_ERRORS * noise,
        bound="at most",
        reason=f"u (1 + 8 / sqrt({rows} tokens)) and three standard errors ({noise:.1e} each): rounding averages out, "
        "a wrong factor does not",
    )


def gain_noise(actual: npt.ArrayLike, expected: npt.ArrayLike, labels: npt.NDArray[np.integer]) -> float:
    """Standard error of the systematic gain of rows [T, H], as the mean of the rows' own gains, weighted by energy.

    Rows with one label [T] (one token, repeated) count as one. Not finite values: 0, the gain itself is infinite then.
    """
    left, right = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    size = np.abs(right).max(initial=0.0)
    if size == 0 or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return 0.0
    left, right = left / size, right / size
    along, energy = ((left - right) * right).sum(axis=1), (right * right).sum(axis=1)
    deviations = (along - along.sum() / energy.sum() * energy) / energy.sum()
    groups = np.unique(labels, return_inverse=True)[1]
    return float(np.sqrt(np.square(np.bincount(groups, weights=deviations)).sum()))


def systematic_gain(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """<actual - expected, expected> / <expected, expected>: how much longer the result is along the reference.

    Infinite where a value is not finite; 0 where the reference is zero.
    """
    left, right = np.asarray(actual, np.float64).reshape(-1), np.asarray(expected, np.float64).reshape(-1)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return float("inf")
    size = np.abs(right).max(initial=0.0)
    if size == 0:
        return 0.0
    return float(((left - right) / size) @ (right / size) / ((right / size) @ (right / size)))
