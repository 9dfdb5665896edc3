"""Layers at far positions: the gap is mute, both sides agree, and faults that only distance shows are seen."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from k25_export.manifest import read_manifest
from k25_plugins.signatures import DOMAIN
from k25_runtime.runtime import Runtime
from k25_validate.far_positions import FAR_POSITIONS, NEAR_TOKENS, FarParity, far_parity, far_starts
from k25_validate.metrics import relative_l2
from k25_validate.plain_reference import PlainReference
from k25_validate.report_files import write_report
from k25_validate.tolerances import component_tolerance, far_tolerance
from k25_validate.transformers_reference import TransformersReference
from k25_validate.validation import parity_report_from_bundle


def measured(bundle: Path, checkpoint: Path, starts: tuple[int, ...] | None = None) -> tuple[FarParity, ...]:
    reference = PlainReference(checkpoint)
    with Runtime.open(bundle, mode="exact", context=64, max_sequences=1, bind_layers=False, threads=1) as runtime:
        return far_parity(
            runtime, reference, reference.model, starts or far_starts(runtime), progress=lambda *step: None
        )


def shares(bundle: Path, found: tuple[FarParity, ...]) -> list[float]:
    """What each uses up of its tolerance."""
    config = read_manifest(bundle).model.text
    return [
        far_tolerance(component_tolerance(part.component, config), part.scores).used(part.local.relative_l2)
        for part in found
    ]


@pytest.mark.parametrize("native", ["on", "off"])
def test_the_first_layer_of_each_kind_agrees_everywhere(
    native: str, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K25_NATIVE", native)
    found = measured(exported.bundle, exported.checkpoint)
    text = read_manifest(exported.bundle).model.text
    kinds = {("dense_layer", 0), ("moe_layer", text.first_k_dense_replace)}
    assert {(part.component, part.layer) for part in found} == kinds
    starts = {part.position for part in found}
    assert set(FAR_POSITIONS) < starts
    assert max(starts) + 4 == text.max_position_embeddings
    assert max(shares(exported.bundle, found)) < 0.5
    assert not any(part.router_differs for part in found)


def test_what_lies_in_the_gap_is_not_seen(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has no gap at all; and its far tokens do see the near ones."""
    reference = PlainReference(exported.checkpoint)
    ids = list(range(1, NEAR_TOKENS + 4))
    far = [*range(NEAR_TOKENS), 70_000, 70_001, 70_002]
    here, there, alone = (
        reference.walk(tokens, positions=positions)
        for tokens, positions in ((ids, None), (ids, far), (ids[NEAR_TOKENS:], far[NEAR_TOKENS:]))
    )
    hidden = here.embed()
    rows = slice(NEAR_TOKENS, None)
    moved = there.layer(0, hidden).hidden
    np.testing.assert_array_equal(moved[:NEAR_TOKENS], here.layer(0, hidden).hidden[:NEAR_TOKENS])
    assert relative_l2(moved[rows], here.layer(0, hidden).hidden[rows]) > 1e-3
    assert relative_l2(moved[rows], alone.layer(0, hidden[rows]).hidden) > 1e-3


def test_transformers_computes_the_same_over_a_gap(tiny: Any) -> None:
    """A token sees those before it wherever they stand; within what two float32 angles differ at 5,000."""
    positions = [*range(NEAR_TOKENS), *range(5_000, 5_004)]
    ids = list(range(3, 3 + len(positions)))
    ours, theirs = (
        reference.walk(ids, positions=positions)
        for reference in (PlainReference(tiny.checkpoint), TransformersReference(tiny.checkpoint))
    )
    hidden = ours.embed()
    expected = theirs.layer(0, hidden).hidden
    assert relative_l2(ours.layer(0, hidden).hidden, expected) < 5_000 * 2**-24
    unmoved = PlainReference(tiny.checkpoint).walk(ids).layer(0, hidden).hidden
    assert relative_l2(unmoved, expected) > 1e-2


def _changed(exported: Any, folder: Path, edit: Callable[[onnx.AttributeProto], None]) -> Path:
    """A copy of the bundle with an attribute of every MLA node changed."""
    bundle = shutil.copytree(exported.bundle, folder / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    for component in manifest["components"]:
        for file in component["files"]:
            path = bundle / file["path"]
            model = onnx.load(path)
            for node in model.graph.node:
                if node.domain == DOMAIN and node.op_type == "MLA":
                    for attribute in node.attribute:
                        edit(attribute)
            path.write_bytes(model.SerializeToString())
            file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def _stretch_the_slowest_pair(attribute: onnx.AttributeProto) -> None:
    """YaRN's factor 1 % off in the slowest pair: what no prompt of a few hundred tokens can show."""
    if attribute.name == "inv_freq":
        attribute.floats[-1] *= 1.01


def test_a_slow_frequency_that_is_wrong_shows_only_far_away(tiny: Any, tmp_path: Path) -> None:
    bundle = _changed(tiny, tmp_path, _stretch_the_slowest_pair)
    found = shares(bundle, measured(bundle, tiny.checkpoint, (100, 200_000)))
    near, far = max(found[:2]), max(found[2:])
    assert far > 10 > 5 * near


def test_a_model_with_one_layer_and_few_positions(tiny: Any, tmp_path: Path) -> None:
    from k25_export.bundle import bundle_from_checkpoint
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.demo.checkpoint import write_demo_checkpoint

    checkpoint = write_demo_checkpoint(
        tmp_path / "checkpoint",
        preset="tiny",
        overrides={"num_hidden_layers": 1, "first_k_dense_replace": 0, "max_position_embeddings": 84},
    )
    bundle = tmp_path / "bundle"
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), bundle, precisions=["fp32"])
    found = measured(bundle, checkpoint)
    assert [(part.component, part.layer, part.position) for part in found] == [("moe_layer", 0, 80)]
    assert max(shares(bundle, found)) < 0.5
    report = parity_report_from_bundle(bundle, threads=1)
    assert report.passed, report.summary()
    assert {row.name for row in report.prompts} >= {"random tokens", "built-in text, part 2"}
    assert all(row.prompt_tokens + row.decoded_tokens <= 84 for row in report.prompts)
    assert [row.label for row in report.rows] == ["vision", "embed", "moe_layer 0", "head"]
    assert "moe_layer 0" in write_report(report, tmp_path).read_text("utf-8")


def test_float64_is_as_far_away_as_its_angles(tiny: Any) -> None:
    """Why float32 angles are part of the op's definition: against exact ones nobody could be judged at 200,000."""
    ids, positions = list(range(20)), [*range(16), *range(200_000, 200_004)]
    walks = [
        PlainReference(tiny.checkpoint, dtype=dtype).walk(ids, positions=positions)
        for dtype in (torch.float32, torch.float64)
    ]
    hidden = walks[0].embed()
    error = relative_l2(*(walk.layer(0, hidden).hidden for walk in walks))
    assert component_tolerance("dense_layer", read_manifest(tiny.bundle).model.text).value < error < 200_000 * 2**-24
