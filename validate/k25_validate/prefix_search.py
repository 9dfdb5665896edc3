"""The first place of a graph whose values are off, by halving: each run computes the frontier of one prefix.

An error at a tensor counts against ten times the rounding that the reference itself shows there (float32 against
float64, on the same input), and never against less than half of what the component as a whole may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_validate.graph_prefix import Cut
from k25_validate.metrics import relative_l2
from k25_validate.systematic_gain import gain_tolerance, systematic_gain

Array = npt.NDArray[np.floating]

#: How many times the reference's own rounding an independent float32 implementation may be off at one tensor.
NOISE_FACTOR = 10.0

#: A frontier closer than this share to its tolerances may already be wrong: the search goes on with tighter ones.
SUSPICIOUS = 0.5
_TIGHTENED = 0.25
_TIGHTENINGS = 2


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a tensor should hold. `noise` is the reference's own relative rounding there; `floor` the least tolerance.

    `adapt` brings actual values into the form of `values` (rows that count, cache rows out of the pages, ...); `raw` is
    what the tensor as it is should hold, where that is something else. `rows` is how many different rows the systematic
    gain averages over (0: it is not judged), `gain_noise` the reference's own.
    """

    values: Array
    noise: float
    floor: float
    tap: str
    adapt: Callable[[Array], Array] = lambda found: found
    raw: Array | None = None
    rows: int = 0
    gain_noise: float = 0.0

    @property
    def tolerance(self) -> float:
        """Relative L2 that rounding explains."""
        return max(NOISE_FACTOR * self.noise if np.isfinite(self.noise) else 0.0, self.floor)

    def error(self, found: Array) -> float:
        """Relative L2 of what was found; infinite where a value is not finite or the shape differs."""
        adapted = self._adapted(found)
        return relative_l2(adapted, self.values) if adapted is not None else float("inf")

    def excess(self, found: Array) -> float:
        """The error in units of the tolerance, or the systematic gain in units of its own, if that is more.

        Where nothing may differ, any error is infinitely too much.
        """
        error = self.error(found)
        if not self.tolerance or not np.isfinite(error):
            return float("inf") if error else 0.0
        adapted = self._adapted(found)
        if not self.rows or adapted is None:
            return error / self.tolerance
        # An average falls with the number of values; what rounds a whole row, with the number of rows.
        bound = gain_tolerance(self.rows).value + self.tolerance / np.sqrt(self.values.size)
        gain = abs(systematic_gain(adapted, self.values)) / (bound + 4 * self.gain_noise)
        return float(max(error / self.tolerance, gain))

    def _adapted(self, found: Array) -> Array | None:
        adapted = self.adapt(found)
        if adapted.shape == self.values.shape:
            return adapted
        return adapted.reshape(self.values.shape) if adapted.size == self.values.size else None


@dataclass(frozen=True, kw_only=True)
class CutResult:
    """Errors of a frontier, in units of their tolerances too, and the values that were found there."""

    cut: Cut
    errors: Mapping[str, float]
    excess: Mapping[str, float]
    values: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """The last cut that agrees (None: nothing before) and the first that does not; `tensor` is the worst there."""

    before: CutResult | None
    after: CutResult
    tensor: str


class PrefixSearch:
    """`run` computes the tensors of a cut; results are kept, so that searching again with tighter bounds is cheap."""

    def __init__(
        self, cuts: Sequence[Cut], expected: Mapping[str, Expected], run: Callable[[Cut], Mapping[str, Array]]
    ) -> None:
        assert cuts
        self._cuts = cuts
        self._expected = expected
        self._run = run
        self._results: dict[int, CutResult] = {}

    def first_divergence(self) -> Transition | None:
        """None where even the last cut agrees."""
        high = len(self._cuts) - 1
        if self._excess(high) <= 1:
            return None
        scale = 1.0
        low, high = self._halved(-1, high, self._excess, scale)
        for _ in range(_TIGHTENINGS):
            if low < 0 or self._distance(low) <= SUSPICIOUS:
                break
            scale *= _TIGHTENED
            low, high = self._halved(-1, low, self._distance, scale)
        after = self._result(high)
        # What was already there at the last good cut is no news.
        known = set(self._cuts[low].outputs) if low >= 0 else set()
        fresh = [name for name in after.errors if name not in known] or list(after.errors)
        worst = max(fresh, key=after.excess.__getitem__)
        return Transition(before=self._result(low) if low >= 0 else None, after=after, tensor=worst)

    def _halved(self, low: int, high: int, measure: Callable[[int], float], scale: float) -> tuple[int, int]:
        """Neighbours, `low` agreeing (or -1) and `high` not, between two that are known to be so."""
        while high - low > 1:
            middle = (low + high) // 2
            if measure(middle) > scale:
                high = middle
            else:
                low = middle
        return low, high

    def _excess(self, index: int) -> float:
        """The largest error or gain of a cut in units of its tolerance."""
        return max(self._result(index).excess.values())

    def _distance(self, index: int) -> float:
        """The largest error alone, in units of its tolerance."""
        found = self._result(index)
        ratios = [
            error / tolerance if (tolerance := self._expected[name].tolerance) else found.excess[name]
            for name, error in found.errors.items()
        ]
        return max(ratios)

    def _result(self, index: int) -> CutResult:
        if index not in self._results:
            cut = self._cuts[index]
            values = self._run(cut)
            errors = {name: self._expected[name].error(values[name]) for name in cut.outputs}
            excess = {name: self._expected[name].excess(values[name]) for name in cut.outputs}
            self._results[index] = CutResult(cut=cut, errors=errors, excess=excess, values=values)
        return self._results[index]
