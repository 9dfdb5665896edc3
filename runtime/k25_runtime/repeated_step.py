"""What the last step ran, so that the next one of the same shapes need not find it out again.

In Python a decode step asks for buffers, gathers the inputs of each component and compares them with what is bound,
only to find all as it was; its code and objects have been washed out of the caches by the weights meanwhile.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from k25_runtime.host_tensor import HostTensor


class Repeatable(Protocol):
    """A bound component that can run once more on what it ran on last."""

    def run_again(self) -> None:
        """Run on the buffers of the last run."""


class RepeatedStep:
    """Notes the runs of one step, in order, and repeats them.

    `begin`, the runs and `end` make the note, which is good until anything else runs, or is about to, and as long as
    the function of the step and every instance are alive: it keeps none.
    """

    def __init__(self) -> None:
        self._function: weakref.ref[Any] | None = None
        self._shapes: Hashable = None
        self._runs: list[weakref.ref[Repeatable]] = []
        self._result: HostTensor | None = None
        self._is_noting = False

    def begin(self) -> None:
        """A step begins: what it runs is noted."""
        self.forget()
        self._is_noting = True

    def runs(self, instance: Repeatable) -> None:
        """An instance is about to be bound and run. Where one runs twice in a step, only its last is bound."""
        if not self._is_noting or any(run() is instance for run in self._runs):
            self.forget()
        else:
            self._runs.append(weakref.ref(instance))

    def end(self, function: Callable[..., Any], shapes: Hashable, result: HostTensor | None) -> None:
        """The step has ended; it is repeated for this function of inputs of these shapes."""
        if self._is_noting:
            is_method = inspect.ismethod(function)
            self._function = weakref.WeakMethod(function) if is_method else weakref.ref(function)
            self._shapes, self._result, self._is_noting = shapes, result, False

    def forget(self) -> None:
        """Nothing can be repeated any more."""
        self._function, self._shapes, self._runs, self._result, self._is_noting = None, None, [], None, False

    def noted_runs(self, function: Callable[..., Any], shapes: Hashable) -> list[Repeatable] | None:
        """What this step ran, or None."""
        if self._function is None or self._function() != function or shapes != self._shapes:
            return None
        found = [instance for run in self._runs if (instance := run()) is not None]
        return found if len(found) == len(self._runs) else None

    @property
    def result(self) -> HostTensor | None:
        """What the step made."""
        return self._result
