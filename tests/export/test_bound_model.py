"""`bind`: a layer as a standalone file over the original shards, opened by tools that know nothing of us."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from polygraphy.backend.onnx import OnnxFromPath

from k25_export.bound_model import BoundModelWriter
from k25_export.manifest import Manifest, read_manifest
from k25_plugins.errors import InputError
from k25_runtime.runtime import Runtime


@pytest.fixture
def place(exported: Any, tmp_path: Path) -> tuple[Path, Path, Manifest]:
    """A bundle, a copy of its checkpoint two folders down, and the manifest."""
    checkpoint = tmp_path / "models" / "kimi"
    shutil.copytree(exported.checkpoint, checkpoint)
    return exported.bundle, checkpoint, read_manifest(exported.bundle)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _layer_inputs(manifest: Manifest) -> dict[str, Any]:
    text = manifest.model.text
    random = np.random.default_rng(1)
    return {
        "hidden": random.standard_normal((3, text.hidden_size), np.float32),
        "cache": np.zeros((2, 4, text.cache_dim), np.float32),
        "positions": np.arange(3, dtype=np.int32),
        "query_start": np.array([0, 3], np.int32),
        "block_table": np.array([[1]], np.int32),
    }


@pytest.mark.parametrize("parent", [False, True])
def test_other_tools_open_every_layer(place: tuple[Path, Path, Manifest], parent: bool) -> None:
    bundle, checkpoint, manifest = place
    output = checkpoint.parent if parent else checkpoint
    writer = BoundModelWriter(bundle=bundle, manifest=manifest, checkpoint=checkpoint, output=output)
    before = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    with Runtime.open(bundle, checkpoint=checkpoint, mode="exact") as runtime:
        for layer in writer.layers:
            path = writer.write(layer, "fp32")
            assert path == output / f"layer-{layer}.fp32.onnx"
            assert path.stat().st_size < 100_000
            onnx.checker.check_model(str(path), full_check=True)
            assert len(OnnxFromPath(str(path))().graph.node) > 10
            inputs = _layer_inputs(manifest)
            found = _session(path).run(["hidden_out"], inputs)[0]
            batch = runtime.reserved_batch([(runtime.new_sequence(), [0, 0, 0])])
            expected = runtime.runner.run_layer(layer, runtime.runner.hidden_from_float32(inputs["hidden"]), batch)
            np.testing.assert_allclose(found, expected.hidden.to_float32(), rtol=1e-5, atol=1e-5)
    assert {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")} == before


def test_bytes_are_referred_to_and_not_copied(place: tuple[Path, Path, Manifest]) -> None:
    bundle, checkpoint, manifest = place
    writer = BoundModelWriter(bundle=bundle, manifest=manifest, checkpoint=checkpoint, output=checkpoint)
    model = onnx.load(writer.write(writer.layers[-1], "bf16"), load_external_data=False)
    onnx.checker.check_model(str(checkpoint / f"layer-{writer.layers[-1]}.bf16.onnx"), full_check=True)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    external = {name for name, tensor in initializers.items() if tensor.external_data}
    component = manifest.component("moe_layer")
    assert external == component.bindings.keys() - {"expert_table"}
    where = {
        name: {item.key: item.value for item in initializers[name].external_data}
        for name in ("expert_words", "expert_scales")
    }
    assert where["expert_words"] == where["expert_scales"]
    assert onnx.numpy_helper.to_array(initializers["residual_share"]).tolist() == [1.0]
    shards = {shard.file for shard in manifest.shards}
    for name in external:
        assert {item.value for item in initializers[name].external_data if item.key == "location"} <= shards


def test_elsewhere_only_with_links(place: tuple[Path, Path, Manifest], tmp_path: Path) -> None:
    bundle, checkpoint, manifest = place
    with pytest.raises(InputError, match=r"expected the folder of the shards or a parent.*--link.*onnx\.checker"):
        BoundModelWriter(bundle=bundle, manifest=manifest, checkpoint=checkpoint, output=tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    writer = BoundModelWriter(
        bundle=bundle, manifest=manifest, checkpoint=checkpoint, output=tmp_path / "elsewhere", link=True
    )
    path = writer.write(writer.layers[0], "fp32")
    assert _session(path).run(["hidden_out"], _layer_inputs(manifest))[0].shape[0] == 3
    linked = [link.name for link in path.parent.glob("*.safetensors")]
    assert linked
    assert all((path.parent / name).samefile(checkpoint / name) for name in linked)
    with pytest.raises(onnx.checker.ValidationError, match="hard link"):
        onnx.checker.check_model(str(path))


def test_a_hugging_face_cache_is_bound_in_the_repository_folder(exported: Any, tmp_path: Path) -> None:
    repository = tmp_path / "models--moonshotai--Kimi-K2.5"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in exported.checkpoint.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    manifest = read_manifest(exported.bundle)
    with pytest.raises(InputError, match="or a parent of it"):
        BoundModelWriter(bundle=exported.bundle, manifest=manifest, checkpoint=snapshot, output=snapshot)
    writer = BoundModelWriter(bundle=exported.bundle, manifest=manifest, checkpoint=snapshot, output=repository)
    path = writer.write(writer.layers[-1], "fp32")
    model = onnx.load(path, load_external_data=False)
    locations = {
        item.value for tensor in model.graph.initializer for item in tensor.external_data if item.key == "location"
    }
    assert all(location.startswith("blobs/") for location in locations)
    assert _session(path).run(["hidden_out"], _layer_inputs(manifest))[0].shape[0] == 3


def test_a_layer_that_is_not_there_is_named(place: tuple[Path, Path, Manifest]) -> None:
    bundle, checkpoint, manifest = place
    writer = BoundModelWriter(bundle=bundle, manifest=manifest, checkpoint=checkpoint, output=checkpoint)
    with pytest.raises(InputError, match=r"layer: expected one of 0\.\.\d+, found 99"):
        writer.write(99, "fp32")
    assert not list(checkpoint.glob("*.onnx*"))
