"""How large a step may be: a backend whose graphs were compiled takes sizes inside ranges only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from k25_plugins.errors import InputError

Range = tuple[int, int]

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """(smallest, largest) size of each named axis of a step's tensors; an axis without an entry may have any size."""

    ranges: Mapping[str, Range] = field(default_factory=dict)

    def only(self, axis: str) -> int | None:
        """The size, where there is but one."""
        low, high = self.ranges.get(axis, (0, NO_LIMIT))
        return low if low == high else None

    def largest(self, axis: str) -> int:
        """The largest size."""
        return self.ranges.get(axis, (0, NO_LIMIT))[1]

    def check(self, axis: str, size: int, *, what: str) -> None:
        """`InputError` where a size is outside."""
        low, high = self.ranges.get(axis, (0, NO_LIMIT))
        if not low <= size <= high:
            raise InputError(
                f"{what}: expected {low} to {high}, the range that the engines were built for, found {size}. "
                "Open with other sizes, or compile with larger profiles."
            )
