"""Captured decode steps: the first of a shape runs, the second runs and is recorded, later ones are replayed.

A graph belongs to the state of the contexts that it was recorded from, so each has contexts of its own. It holds
addresses: its inputs and its output stay where they are, and it is gone before any of that memory is.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from k25_runtime.device import Device, Graph
from k25_runtime.device_memory import DeviceCache, DeviceTensor

DEFAULT_GRAPHS = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class CapturedStep:
    """A graph and what it holds: its inputs (packed at `address`), its output, its contexts (by their number).

    `shape` tells steps apart. `swapped` are the caches that change places when it runs, and `places` where they were.
    """

    shape: Hashable
    graph: Graph
    address: int
    inputs: dict[str, DeviceTensor]
    output: DeviceTensor
    swapped: tuple[DeviceCache, ...]
    places: tuple[bool, ...]
    contexts: int

    def fits(self, shape: Hashable) -> bool:
        """Whether this is the step, and the caches are where it reads them."""
        return self.shape == shape and self.places == tuple(cache.is_swapped for cache in self.swapped)


class StepGraphs:
    """The captured steps, least recently used first."""

    def __init__(self, device: Device, *, limit: int = DEFAULT_GRAPHS) -> None:
        self._device = device
        self._limit = limit
        self._steps: list[CapturedStep] = []
        self._seen: set[Hashable] = set()
        self.refused: dict[Hashable, str] = {}
        self.replays = 0

    def __len__(self) -> int:
        return len(self._steps)

    def find(self, shape: Hashable) -> CapturedStep | None:
        """The step of this shape, if it was captured with the caches where they are."""
        step = next((step for step in self._steps if step.fits(shape)), None)
        if step is not None:
            self._steps.remove(step)
            self._steps.append(step)
        return step

    def is_due(self, shape: Hashable) -> bool:
        """Whether a step of this shape is to be captured: it was seen before, and capture was not refused."""
        if self._limit == 0 or shape in self.refused:
            return False
        was_seen = shape in self._seen
        self._seen.add(shape)
        return was_seen

    def add(self, step: CapturedStep) -> list[int]:
        """Keep a step; the contexts of those that had to go."""
        self._steps.append(step)
        return [self._drop() for _ in range(len(self._steps) - self._limit)]

    def clear(self) -> list[int]:
        """Drop all graphs; their contexts."""
        return [self._drop() for _ in range(len(self._steps))]

    def _drop(self) -> int:
        step = self._steps.pop(0)
        self._device.destroy_graph(step.graph)
        return step.contexts
