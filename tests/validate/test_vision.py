"""Images and chunks of frames: runtime, plain reference and transformers agree, and faults of the component show."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from PIL import Image

from k25_export.config import VisionConfig
from k25_export.manifest import read_manifest
from k25_runtime.runtime import Runtime
from k25_validate import plain_vision
from k25_validate.media_samples import built_in_media, drawn_frame, picture_from_frames
from k25_validate.metrics import relative_l2
from k25_validate.parity_report import ParityReport
from k25_validate.plain_checkpoint import PlainReferenceError
from k25_validate.plain_reference import PlainReference
from k25_validate.reference import Grid, MediaInput
from k25_validate.report_files import write_report
from k25_validate.tolerances import END_TO_END, vision_tolerance
from k25_validate.transformers_reference import TransformersReference
from k25_validate.validation import parity_report_from_bundle

Float32 = npt.NDArray[np.float32]

#: Frames, rows, columns of patches: smallest, odd aspects both ways, the table's own size, larger, t = 1 to 4.
GRIDS: tuple[Grid, ...] = (
    *((1, 2, 2), (1, 2, 18), (1, 18, 2), (1, 10, 14), (1, 14, 10), (1, 6, 22), (1, 34, 30)),
    *((2, 4, 6), (3, 6, 4), (4, 2, 2), (4, 10, 14)),
)


@pytest.fixture(scope="module")
def config(tiny: Any) -> VisionConfig:
    vision = read_manifest(tiny.bundle).model.vision
    assert vision is not None
    return vision


@pytest.fixture(scope="module", params=["off", "on"], ids=["bodies", "native"])
def runtime(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Runtime]:
    """With the function bodies, and with the native kernels where they are built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K25_NATIVE", request.param)
        with Runtime.open(tiny.bundle, mode="exact", context=256) as opened:
            yield opened


@pytest.fixture(scope="module")
def plain(tiny: Any) -> PlainReference:
    return PlainReference(tiny.checkpoint)


@pytest.fixture(scope="module")
def judge(tiny: Any) -> TransformersReference:
    return TransformersReference(tiny.checkpoint)


def some_pixels(grid: Grid, patch: int) -> Float32:
    random = np.random.default_rng(list(grid))
    return random.uniform(-1, 1, (int(np.prod(grid)), 3, patch, patch)).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_embeddings_agree_with_both_references(
    grid: Grid, runtime: Runtime, plain: PlainReference, judge: TransformersReference, config: VisionConfig
) -> None:
    pixels = some_pixels(grid, config.patch_size)
    (own,) = runtime.encode_media(pixels, [grid])
    assert own.shape == (grid[1] * grid[2] // 4, config.text_hidden_size)
    for reference in (plain, judge):
        expected = reference.media_embeddings(pixels, grid)
        assert relative_l2(own, expected) < vision_tolerance(config).value <= END_TO_END


def test_items_of_a_call_do_not_see_each_other(runtime: Runtime, config: VisionConfig) -> None:
    grids: list[Grid] = [(1, 4, 6), (2, 4, 2), (1, 2, 2)]
    pixels = [some_pixels(grid, config.patch_size) for grid in grids]
    together = runtime.encode_media(np.concatenate(pixels), grids)
    for found, values, grid in zip(together, pixels, grids, strict=True):
        np.testing.assert_array_equal(found, runtime.encode_media(values, [grid])[0])


@pytest.mark.slow
def test_a_full_image_agrees_with_transformers(
    runtime: Runtime, judge: TransformersReference, config: VisionConfig
) -> None:
    grid = (1, 128, 128)
    pixels = some_pixels(grid, config.patch_size)
    (own,) = runtime.encode_media(pixels, [grid])
    assert relative_l2(own, judge.media_embeddings(pixels, grid)) < END_TO_END


def conversation(config: VisionConfig, placeholder: int, grids: list[Grid]) -> tuple[list[int], list[MediaInput]]:
    """Text, then for each grid a picture and text; every media token has a placeholder."""
    random = np.random.default_rng(len(grids))
    ids = random.integers(0, 200, 6).tolist()
    media = []
    for grid in grids:
        pixels = some_pixels(grid, config.patch_size)
        media.append(MediaInput(pixel_values=pixels, grid=grid, first_token=len(ids)))
        ids += [placeholder] * (grid[1] * grid[2] // 4) + random.integers(0, 200, 4).tolist()
    return ids, media


@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 6, 2), (1, 8, 10)], [(1, 2, 2), (3, 4, 6)]])
def test_logits_of_text_and_pictures_agree_with_transformers_own_fusing(
    grids: list[Grid], runtime: Runtime, plain: PlainReference, judge: TransformersReference, config: VisionConfig
) -> None:
    placeholder = runtime.manifest.model.media_placeholder_token_id
    assert placeholder is not None
    ids, media = conversation(config, placeholder, grids)
    expected = judge.fused_logits(ids, media)
    own = runtime.prefill(ids, media=[embedding for item in media for embedding in encoded(runtime, item)])
    assert relative_l2(own, expected) < END_TO_END
    assert relative_l2(plain.trace(ids, media=media).logits, expected) < END_TO_END
    assert relative_l2(judge.trace(ids, media=media).logits, expected) < 1e-6
    without = runtime.prefill(ids)
    assert relative_l2(without, expected) > 0.1


def encoded(runtime: Runtime, item: MediaInput) -> list[Float32]:
    return runtime.encode_media(item.pixel_values, [item.grid])


def test_the_plain_reference_in_float64_is_nearer_to_the_truth(tiny: Any, config: VisionConfig) -> None:
    pixels = torch.from_numpy(some_pixels((2, 6, 10), config.patch_size))
    single = plain_vision.PlainVision(tiny.checkpoint, dtype=torch.float32).embeddings(pixels, (2, 6, 10))
    double = plain_vision.PlainVision(tiny.checkpoint, dtype=torch.float64).embeddings(pixels, (2, 6, 10))
    assert double.dtype == torch.float64
    assert 0 < relative_l2(single.numpy(), double.numpy()) < 2e-6


@pytest.mark.parametrize("grid", [(1, 3, 2), (1, 2, 3), (5, 2, 2), (1, 2, 4)])
def test_the_plain_reference_refuses_grids_that_do_not_fit(grid: Grid, plain: PlainReference, config: Any) -> None:
    count = 8 if grid == (1, 2, 4) else int(np.prod(grid))
    pixels = some_pixels((1, 1, count + (grid == (1, 2, 4))), config.patch_size)
    with pytest.raises(PlainReferenceError, match=re.escape(f"grid {grid}: expected")):
        plain.media_embeddings(pixels, grid)


@pytest.mark.parametrize("kind", [PlainReference, TransformersReference])
def test_references_of_a_text_only_checkpoint_say_so(kind: Any, tiny: Any, tmp_path: Path, config: Any) -> None:
    folder = shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vision_config": None}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name.startswith("language_")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"config\.json: expected a vision_config, found none"):
        kind(folder).media_embeddings(some_pixels((1, 2, 2), config.patch_size), (1, 2, 2))


# The report.


@pytest.fixture(scope="module")
def report(tiny: Any) -> ParityReport:
    return parity_report_from_bundle(tiny.bundle)


def test_the_report_has_a_section_with_a_picture_of_every_input(
    report: ParityReport, config: VisionConfig, tmp_path: Path
) -> None:
    samples = built_in_media(config)
    assert {sample.item.grid[0] for sample in samples} == {1, 2, 3, 4}
    assert [(row.name, row.grid) for row in report.media] == [(sample.name, sample.item.grid) for sample in samples]
    checks = {check.name: check for check in report.checks if check.section == "vision"}
    assert checks.keys() == {row.name for row in report.media} | {"text and pictures"}
    (row,) = [row for row in report.rows if row.component == "vision"]
    assert row.local == max(sample.relative_l2 for sample in report.media) > 0
    for sample, found in zip(samples, report.media, strict=True):
        assert checks[found.name].value == found.relative_l2
        picture = Image.open(io.BytesIO(base64.b64decode(found.picture.partition(",")[2])))
        height, width = sample.frames[0].shape[:2]
        assert picture.width / picture.height == pytest.approx(len(sample.frames) * width / height, rel=0.05)
        assert max(picture.size) <= 112 * len(sample.frames)
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert page.count("src='data:image/png;base64,") == len(samples)
    data = json.loads((tmp_path / "reports" / "parity.json").read_text())
    assert [entry["grid"] for entry in data["media"]] == [list(sample.item.grid) for sample in samples]
    assert 'name="vision"' in (tmp_path / "reports" / "parity.xml").read_text()


def test_pictures_are_the_frames_side_by_side() -> None:
    frames = [drawn_frame(28, 56, moment=moment) for moment in (0.0, 0.5)]
    data = base64.b64decode(picture_from_frames(frames).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels, np.concatenate(frames, axis=1))
    assert not np.array_equal(*frames)


Edit = Callable[[onnx.ModelProto], None]


def _swap(model: onnx.ModelProto, one: str, other: str) -> None:
    """Exchange two inputs of the graph everywhere."""
    names = {one: other, other: one}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _exact_gelu_in_the_tower(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]


def _another_scale(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "softmax_scale":
                attribute.f *= 1.01


def _blocks_that_start_too_late(model: onnx.ModelProto) -> None:
    """Each block of queries starts where blocks of full length would: only pictures of several blocks show it."""
    function = next(function for function in model.functions if function.name == "VisionAttention")
    loop = next(node for node in function.node if node.op_type == "Loop")
    node = next(node for node in loop.attribute[0].g.node if node.output[0] == "first_row")
    node.input[1] = "longest_block"


def _maximum_over_the_frames(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            node.op_type = "ReduceMax"


FAULTS: dict[str, Edit] = {
    "cos and sin exchanged": lambda model: _swap(model, "rope_cos", "rope_sin"),
    "norms of a block exchanged": lambda model: _swap(
        model, "vision_tower.encoder.blocks.1.norm0.weight", "vision_tower.encoder.blocks.1.norm1.weight"
    ),
    "exact GELU in the tower": _exact_gelu_in_the_tower,
    "softmax scale": _another_scale,
    "blocks of queries start too late": _blocks_that_start_too_late,
    "frames not averaged": _maximum_over_the_frames,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_component_is_found_there(
    fault: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K25_NATIVE", "off")  # the faults are in the graph and its function bodies
    bundle = shutil.copytree(tiny.bundle, tmp_path / "bundle")
    path = bundle / "components" / "vision.fp32.onnx"
    model = onnx.load(path)
    FAULTS[fault](model)
    assert model.SerializeToString() != onnx.load(path).SerializeToString()
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["components"] if entry["name"] == "vision"]
    for file in entry["files"]:
        file["sha256"] = hashlib.sha256((bundle / file["path"]).read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    report = parity_report_from_bundle(bundle)
    assert not report.passed
    assert {check.name for check in report.failures if check.section == "components"} == {"vision"}
