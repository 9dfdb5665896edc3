"""What the last step ran, so that the next one of the same shapes need not find it out again.

In Python a decode step asks for buffers, gathers the inputs of each component and compares them with what is bound,
only to find all as it was; its code and objects have been washed out of the caches by the weights meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Protocol

from k25_runtime.host_tensor import HostTensor


class Repeatable(Protocol):
    """A bound component that can run once more on what it ran on last."""

    def run_again(self) -> None:
        """Run on the buffers of the last run."""


class RepeatedStep:
    """Notes the runs of one step, in order, and repeats them.

    `begin`, the runs and `end` make the note, which is good until anything else runs and as long as every instance is
    alive: it keeps none.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._runs: list[weakref.ref[Repeatable]] = []
        self._result: HostTensor | None = None
        self._is_noting = False

    def begin(self) -> None:
        """A step begins: what it runs is noted."""
        self.forget()
        self._is_noting = True

    def ran(self, instance: Repeatable) -> None:
        """An instance has run. One that runs twice is bound to its last buffers only: no such step is kept."""
        if not self._is_noting or any(run() is instance for run in self._runs):
            self.forget()
        else:
            self._runs.append(weakref.ref(instance))

    def end(self, key: Hashable, result: HostTensor | None) -> None:
        """The step has ended; it is repeated for this key."""
        if self._is_noting:
            self._key, self._result, self._is_noting = key, result, False

    def forget(self) -> None:
        """Nothing can be repeated any more."""
        self._key, self._runs, self._result, self._is_noting = None, [], None, False

    def runs_of(self, key: Hashable) -> list[Repeatable] | None:
        """What the step of this key ran, or None."""
        if self._key is None or key != self._key:
            return None
        found = [instance for run in self._runs if (instance := run()) is not None]
        return found if len(found) == len(self._runs) else None

    @property
    def result(self) -> HostTensor | None:
        """What the step made."""
        return self._result
