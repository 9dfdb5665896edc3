"""How many cores a process may use: those of its mask, within the quota of its container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k25_runtime import cores


@pytest.fixture
def eight_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores, and the folder of its control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "CONTROL_GROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("9900000 100000", 8)],
)
def test_the_quota_of_a_container_counts(eight_cores: Path, text: str, expected: int) -> None:
    (eight_cores / "cpu.max").write_text(text + "\n")
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_so_does_one_of_the_first_version(eight_cores: Path, quota: str, expected: int) -> None:
    (eight_cores / "cpu").mkdir()
    (eight_cores / "cpu/cpu.cfs_quota_us").write_text(quota)
    (eight_cores / "cpu/cpu.cfs_period_us").write_text("100000")
    assert cores.usable_cores() == expected


@pytest.mark.parametrize("text", ["", "nonsense", "100000", "100000 0", "nan nan"])
def test_files_that_say_nothing_limit_nothing(eight_cores: Path, text: str) -> None:
    assert cores.usable_cores() == 8
    (eight_cores / "cpu.max").write_text(text)
    assert cores.usable_cores() == 8
