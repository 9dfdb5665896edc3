"""What the tensors of one step should hold: the reference's taps, row by row as the step packs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_export.config import TextConfig
from k25_runtime.batch import Batch
from k25_validate.bisect_walk import Mask, Step
from k25_validate.metrics import relative_l2
from k25_validate.plain_taps import Taps
from k25_validate.prefix_search import Expected
from k25_validate.systematic_gain import systematic_gain
from k25_validate.tolerances import component_tolerance

Array = npt.NDArray[Any]

#: Values of a token that are a set: the order of experts that tie is nobody's fault.
_SORTED = ("mlp.gate.ids", "mlp.gate.weights")
#: Half of a component's tolerance, u sqrt(K): no tensor of it is held to less.
FLOOR_SHARE = 0.5


class StepTaps:
    """Taps of each prompt in float64 and, for the noise, in float32; prompts that take no part are None."""

    def __init__(
        self,
        *,
        component: str,
        config: TextConfig,
        exact: Sequence[Taps | None],
        rounded: Sequence[Taps | None],
        ties: Sequence[Mask],
    ) -> None:
        self._exact = exact
        self._rounded = rounded
        self._ties = ties
        self._floor = FLOOR_SHARE * component_tolerance(component, config).value

    def expected(self, step: Step, taps: Mapping[str, str]) -> dict[str, Expected]:
        """For each tensor of the graph whose tap the reference has."""
        known = next(found for found in self._exact if found is not None)
        found = {}
        for tensor, tap in taps.items():
            if tap == "cache_out":
                found[tensor] = self._cache(step)
            elif tap == "rows":
                found[tensor] = self._rows(step, "hidden")
            elif tap in known:
                found[tensor] = self._rows(step, tap)
        return found

    def shapes(self, step: Step, taps: Mapping[str, str], cache: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape that each tensor should have."""
        known = next(found for found in self._exact if found is not None)
        shapes = {tensor: cache for tensor, tap in taps.items() if tap == "cache_out"}
        for tensor, tap in taps.items():
            name = "hidden" if tap == "rows" else tap
            if name in known:
                shapes[tensor] = (step.batch.tokens, *known[name].shape[1:])
        return shapes

    def cache_rows(self, prompt: int, start: int, stop: int) -> Array:
        """The cache rows [S, C] of these tokens."""
        taps = self._exact[prompt]
        assert taps is not None
        return taps["self_attn.cache_rows"][start:stop]

    def _rows(self, step: Step, tap: str) -> Expected:
        exact, rounded = self._step_rows(step, self._exact, tap), self._step_rows(step, self._rounded, tap)
        kept = ~np.concatenate([self._ties[span.prompt][span.start : span.stop] for span in step.spans])
        adapt: Callable[[Array], Array] = (
            (lambda found: np.sort(found[kept], axis=-1)) if tap in _SORTED else (lambda found: found[kept])
        )
        values = adapt(exact)
        return Expected(
            values=values,
            noise=relative_l2(adapt(rounded), values) if values.size else 0.0,
            floor=self._floor,
            tap=tap,
            adapt=adapt,
            raw=exact,
            rows=len(np.unique(step.batch.token_ids[kept])),
            gain_noise=abs(systematic_gain(adapt(rounded), values)),
        )

    def _cache(self, step: Step) -> Expected:
        exact = np.concatenate([self.cache_rows(span.prompt, 0, span.stop) for span in step.spans])
        rounded = np.concatenate(
            [_taps(self._rounded[span.prompt])["self_attn.cache_rows"][: span.stop] for span in step.spans]
        )
        return Expected(
            values=exact,
            noise=relative_l2(rounded, exact),
            floor=self._floor,
            tap="cache_out",
            adapt=lambda found: gathered_rows(found, step.batch, [span.stop for span in step.spans]),
        )

    @staticmethod
    def _step_rows(step: Step, taps: Sequence[Taps | None], tap: str) -> Array:
        return np.concatenate([_taps(taps[span.prompt])[tap][span.start : span.stop] for span in step.spans])


def _taps(found: Taps | None) -> Taps:
    assert found is not None
    return found


def gathered_rows(
    cache: npt.NDArray[np.floating], batch: Batch, stops: Sequence[int], table: npt.NDArray[np.integer] | None = None
) -> npt.NDArray[np.floating]:
    """The rows of positions 0 to `stops` of each sequence out of a paged cache, one sequence after the other."""
    size = cache.shape[1]
    table = batch.block_table if table is None else table
    parts = []
    for sequence, stop in enumerate(stops):
        positions = np.arange(stop)
        parts.append(cache[table[sequence, positions // size], positions % size])
    return np.concatenate(parts)
