"""The cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

#: Where a container finds its limits: control groups, version 2 and version 1.
CONTROL_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Their number, hardware threads counted each; no more than a container's quota of time comes to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """Seconds of cores a second, or None where nothing limits them."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            words = " ".join((CONTROL_GROUP / name).read_text() for name in files).split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no such group, or "max"
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None
