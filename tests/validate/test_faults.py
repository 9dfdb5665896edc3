"""Builds that are wrong in ways that really happen: `validate` must fail each, and `bisect` must name the place."""

from __future__ import annotations

import importlib
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from k25_validate.bisect import bisect_bundle
from k25_validate.prompts import Prompt
from k25_validate.validation import parity_report_from_bundle

ROOT = Path(__file__).parents[2]


def _cases() -> ModuleType:
    """`fault_cases` beside this file: modules of tests belong to no package."""
    with mock.patch.object(sys, "path", [str(Path(__file__).parent), *sys.path]):
        return importlib.import_module("fault_cases")


cases = _cases()
FAULTS: dict[str, Any] = {fault.name: fault for fault in cases.FAULTS}

# More tokens than a block of the cache holds, some of them decoded, and a second sequence for the batch.
_RANDOM = random.Random(5)
PROMPTS = (
    Prompt(name="two blocks", prompt_ids=tuple(_RANDOM.randrange(512) for _ in range(36)), next_ids=(7, 300, 41)),
    Prompt(name="repeated", prompt_ids=(9, 9, 9), next_ids=(9,)),
)


@pytest.fixture(autouse=True)
def _function_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of function bodies show only where no native kernel stands in for them."""
    monkeypatch.setenv("K25_NATIVE", "off")


def test_there_are_as_many_faults_as_promised() -> None:
    assert len(FAULTS) == len(cases.FAULTS) >= 25


@pytest.mark.parametrize("name", FAULTS)
def test_fault_fails_and_is_found(name: str, tiny: Any, tmp_path: Path) -> None:
    found = cases.caught(FAULTS[name], tiny, tmp_path, prompts=PROMPTS)
    assert not found.report.passed
    assert found.checks, found.report.summary()
    assert found.is_found, found.bisection.summary()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_fails_and_is_found_whatever_the_sizes(name: str, odd: Any, tmp_path: Path) -> None:
    found = cases.caught(FAULTS[name], odd, tmp_path)
    assert not found.report.passed
    assert found.checks, found.report.summary()
    assert found.is_found, found.bisection.summary()


@pytest.mark.parametrize("exported_name", ["tiny", "odd"])
def test_an_unchanged_build_passes_both(exported_name: str, request: pytest.FixtureRequest) -> None:
    exported = request.getfixturevalue(exported_name)
    assert parity_report_from_bundle(exported.bundle, threads=1).passed
    assert bisect_bundle(exported.bundle, threads=1).passed


def _with_seed(exported: Any, seed: int, folder: Path) -> Path:
    from k25_export.demo.checkpoint import write_demo_checkpoint

    overrides = json.loads((exported.checkpoint / "demo.json").read_text())["overrides"]
    return write_demo_checkpoint(folder / "checkpoint", preset="tiny", seed=seed, overrides=overrides)


@pytest.mark.parametrize("seed", [3, 17])
def test_an_unchanged_build_passes_whatever_the_seed(seed: int, odd: Any, tmp_path: Path) -> None:
    other = _with_seed(odd, seed, tmp_path)
    report = parity_report_from_bundle(odd.bundle, checkpoint=other, threads=1)
    assert report.passed, report.summary()
    assert bisect_bundle(odd.bundle, checkpoint=other, threads=1).passed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 40))
def test_unchanged_builds_pass_with_many_seeds(seed: int, exported: Any, tmp_path: Path) -> None:
    other = _with_seed(exported, seed, tmp_path)
    report = parity_report_from_bundle(exported.bundle, checkpoint=other)
    assert report.passed, report.summary()
    assert bisect_bundle(exported.bundle, checkpoint=other).passed


def _flipped(exported: Any, folder: Path, seed: int) -> tuple[Path, str]:
    """A copy of the checkpoint with the top exponent bit of one value of a random layer weight changed; its name.

    Only tensors that every token uses: an expert or a row of the embedding that no prompt reaches is out of sight.
    """
    copy = folder / "checkpoint"
    shutil.copytree(exported.checkpoint, copy)
    manifest = json.loads((exported.bundle / "manifest.json").read_text())
    chosen = random.Random(seed).choice(
        [
            group
            for group in manifest["tensors"]
            if ".layers." in group["name"] and group.get("offset") is not None and group["dtype"] == "BF16"
            if group["name"].startswith("language_model.")
        ]
    )
    element = random.Random(seed).randrange(chosen["length"] // 2)
    path = copy / manifest["shards"][chosen["shard"]]["file"]
    data = bytearray(path.read_bytes())
    data[chosen["offset"] + 2 * element + 1] ^= 0x02  # a factor of 16 or 1/16
    path.write_bytes(bytes(data))
    return copy, chosen["name"]


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_in_a_random_weight_is_named(seed: int, tiny: Any, tmp_path: Path) -> None:
    damaged, name = _flipped(tiny, tmp_path, seed)
    found = bisect_bundle(tiny.bundle, checkpoint=damaged, reference_checkpoint=tiny.checkpoint, threads=1).divergence
    assert found is not None
    assert (found.kind, [source.tensor for source in found.weights if source.kind]) == ("bytes", [name])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mscale missing", "shared expert dropped"),
        ("nibble order swapped", "a layer's weights bound to another"),
        ("final norm skipped", "kernel: bf16 accumulation"),
    ],
)
def test_of_two_faults_the_first_in_the_data_is_named(first: str, second: str, tiny: Any, tmp_path: Path) -> None:
    """Whatever the order in which they were made; both of one component at the earlier op."""
    build = cases.build_from(tiny, tmp_path)
    for name in (first, second):
        FAULTS[name].inject(build)
    with build.patched():
        found = bisect_bundle(build.bundle, prompts=PROMPTS, samples=(), threads=1).divergence
    assert found is not None
    expected = {
        "shared expert dropped": "mscale missing",
        "a layer's weights bound to another": "nibble order swapped",
        "kernel: bf16 accumulation": "kernel: bf16 accumulation",
    }[second]
    fault = FAULTS[expected]
    assert (found.component, found.op, found.kind) == (fault.component, fault.op, fault.kind)


def test_the_table_in_the_documentation_is_that_of_the_faults() -> None:
    text = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    table = text.partition("<!-- faults -->")[2].partition("<!-- end of faults -->")[0]
    rows = {cells[0]: cells for cells in _rows(table)}
    assert set(rows) == set(FAULTS)
    for name, cells in rows.items():
        fault = FAULTS[name]
        assert fault.component in cells[-2]
        assert fault.op in cells[-1]
        assert fault.kind in cells[-1]


def _rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[re.sub(r"[`*]", "", cell).strip() for cell in line.strip("|").split("|")] for line in lines]
