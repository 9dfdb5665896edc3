"""Weights over the mapped shards: the same bytes, not copies; where the bytes do not allow it, copies that are equal.

A checkpoint can be laid out anew (`laid_out`): the same tensors in other shards, in another order, at other offsets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.manifest import Binding, manifest_to_json, read_manifest
from k25_export.tensor_groups import shard_entries, tensor_groups
from k25_plugins.errors import InputError
from k25_runtime import Runtime
from k25_runtime.host_tensor import HostTensor
from k25_runtime.mapped_checkpoint import MappedCheckpoint, checkpoint_folder

PROMPT = [7, 1, 8, 2, 8, 1, 8]
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F32": "float32", "I32": "int32"}
EXPERT_PARTS = [f"{name}_proj.weight_{part}" for name in ("gate", "up", "down") for part in ("packed", "scale")]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, read by its header alone."""

    dtype: str
    shape: list[int]
    data: bytes


def stored_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = StoredTensor(entry["dtype"], entry["shape"], content[start + begin : start + end])
    return tensors


def write_shard(path: Path, tensors: Mapping[str, StoredTensor], *, remainder: int) -> None:
    """A safetensors file whose data starts at an offset with this remainder by 8."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * ((remainder - len(text)) % 8)
    data = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def laid_out(source: Any, folder: Path, *, shard_of: Callable[[str], int], remainder: int, reverse: bool) -> Path:
    """The checkpoint's tensors in shards by name, with its other files."""
    folder.mkdir()
    for path in source.checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy(path, folder)
    tensors = stored_tensors(source.checkpoint)
    shards: dict[int, dict[str, StoredTensor]] = {}
    for name in sorted(tensors, reverse=reverse):
        shards.setdefault(shard_of(name), {})[name] = tensors[name]
    files = {shard: f"model-{shard:05}.safetensors" for shard in shards}
    for shard, members in shards.items():
        write_shard(folder / files[shard], members, remainder=remainder)
    weight_map = {name: files[shard] for shard, members in shards.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def bundle_of_layout(source: Any, checkpoint: Path, folder: Path) -> Path:
    """The bundle of a new layout: graphs do not depend on where tensors lie, so they are not traced again."""
    opened = checkpoint_from_folder(checkpoint)
    opened.require_no_problems()
    manifest = replace(read_manifest(source.bundle), shards=shard_entries(opened), tensors=tensor_groups(opened))
    shutil.copytree(source.bundle, folder)
    (folder / "manifest.json").write_text(manifest_to_json(manifest), encoding="utf-8")
    return folder


def expert_of(name: str) -> int | None:
    part = name.partition(".mlp.experts.")[2]
    return int(part.split(".")[0]) if part else None


def by_expert(name: str) -> int:
    """Experts with odd numbers in a shard of their own."""
    expert = expert_of(name)
    return 0 if expert is None else 1 + expert % 2


def by_part(name: str) -> int:
    """Every part of an expert in another shard; one of them ends with the scales."""
    return next((1 + index for index, part in enumerate(EXPERT_PARTS) if name.endswith(part)), 0)


@dataclass(frozen=True)
class Layout:
    """How tensors lie, and what of them can be used where it is: plain tensors, and the regions of experts."""

    shard_of: Callable[[str], int]
    remainder: int
    reverse: bool
    plain_mapped: bool
    experts_mapped: bool


def one_shard(name: str) -> int:
    return 0


LAYOUTS = {
    "one shard": Layout(one_shard, 0, False, True, True),
    "one shard, last first": Layout(one_shard, 0, True, True, True),
    "experts over two shards": Layout(by_expert, 0, False, True, False),
    "parts over many shards": Layout(by_part, 0, True, True, False),
    "offsets of 4 by 8": Layout(one_shard, 4, False, True, False),
    "odd offsets": Layout(one_shard, 1, False, False, False),
    "odd offsets over two shards": Layout(by_expert, 7, True, False, False),
}


def mapped_at(array: npt.NDArray[Any]) -> tuple[str, int] | None:
    """File and offset that an array's first byte is mapped from, as the operating system says."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(value, 16) for value in span.split("-"))
        if start <= address < end:
            return (path[0], address - start + int(offset, 16)) if path and path[0].startswith("/") else None
    return None


def opened(bundle: Path, checkpoint: Path) -> MappedCheckpoint:
    return MappedCheckpoint(read_manifest(bundle), checkpoint)


def all_weights(bundle: Path, checkpoint: Path) -> dict[tuple[str, int | None], dict[str, HostTensor]]:
    mapped = opened(bundle, checkpoint)
    return {
        (component.name, layer): mapped.weights(component, layer, "fp32")
        for component in read_manifest(bundle).components
        for layer in component.layers or (None,)
    }


def full_name(component: str, layer: int | None, port: str) -> str:
    if component == "vision":
        return port
    return f"language_model.{port}" if layer is None else f"language_model.model.layers.{layer}.{port}"


def assert_weights_are_the_stored_bytes(
    weights: Mapping[tuple[str, int | None], Mapping[str, HostTensor]], tensors: Mapping[str, StoredTensor]
) -> None:
    """Every input against the tensor of its name; experts through the table, as the graph reads them."""
    for (component, layer), inputs in weights.items():
        for port, tensor in inputs.items():
            if port not in ("expert_words", "expert_scales", "expert_table"):
                expected = tensors[full_name(component, layer, port)]
                assert (tensor.dtype, list(tensor.array.shape)) == (DTYPES[expected.dtype], expected.shape), port
                assert tensor.array.tobytes() == expected.data, port
        if component == "moe_layer":
            table, words, scales = (inputs[f"expert_{kind}"] for kind in ("table", "words", "scales"))
            assert (table.dtype, words.dtype, scales.dtype) == ("int64", "int32", "bfloat16")
            assert (words.array.shape[1], scales.array.shape) == (2, (len(words.array), 4))
            assert table.array.shape[1] == 6
            region = words.array.view(np.uint8).reshape(-1)
            for expert, rows in enumerate(table.array.tolist()):
                for row, part in zip(rows, EXPERT_PARTS, strict=True):
                    expected = tensors[full_name(component, layer, f"mlp.experts.{expert}.{part}")]
                    assert region[row * 8 : row * 8 + len(expected.data)].tobytes() == expected.data


@pytest.fixture(scope="module")
def expected_logits(odd: Any) -> npt.NDArray[np.float32]:
    with Runtime.open(odd.bundle, context=16, threads=1) as runtime:
        return runtime.prefill(PROMPT)


# Views of the map.


def test_every_weight_is_the_stored_bytes_and_a_view_of_the_map(exported: Any) -> None:
    tensors = stored_tensors(exported.checkpoint)
    weights = all_weights(exported.bundle, exported.checkpoint)
    assert_weights_are_the_stored_bytes(weights, tensors)
    bound = 0
    for (component, layer), inputs in weights.items():
        for port, tensor in inputs.items():
            if port == "expert_table":
                continue
            place = mapped_at(tensor.array)
            assert place is not None, f"{component} {layer}: {port} is a copy"
            assert Path(place[0]).parent == exported.checkpoint
            assert not tensor.array.flags.writeable
            assert tensor.array.flags.c_contiguous
            bound += 1
    assert bound > 40


def test_words_and_scales_of_the_experts_are_the_same_bytes(exported: Any) -> None:
    for (component, _), inputs in all_weights(exported.bundle, exported.checkpoint).items():
        if component == "moe_layer":
            words, scales = inputs["expert_words"].array, inputs["expert_scales"].array
            assert words.ctypes.data == scales.ctypes.data
            assert words.nbytes == scales.nbytes
            assert np.shares_memory(words, scales)


def test_a_region_starts_at_the_first_and_ends_with_the_last_tensor(exported: Any) -> None:
    """bundle-format.md, rule `region`: the smallest offset to the largest end, in rows of 8 bytes."""
    mapped, manifest = opened(exported.bundle, exported.checkpoint), read_manifest(exported.bundle)
    component = manifest.component("moe_layer")
    for layer in component.layers or ():
        weights = mapped.weights(component, layer, "fp32")
        prefix = f"language_model.model.layers.{layer}.mlp.experts."
        members = [tensor for group in manifest.tensors for tensor in group.members() if tensor.name.startswith(prefix)]
        members = [tensor for tensor in members if not tensor.name.endswith("weight_shape")]
        start = min(tensor.offset for tensor in members)
        end = max(tensor.offset + tensor.length for tensor in members)
        assert len({tensor.shard for tensor in members}) == 1
        place = mapped_at(weights["expert_words"].array)
        assert place == (str(exported.checkpoint / manifest.shards[members[0].shard].file), start)
        assert weights["expert_words"].array.nbytes == end - start + -(end - start) % 8
        for tensor in members:
            expert, part = tensor.name.removeprefix(prefix).split(".", 1)
            row = weights["expert_table"].array[int(expert), EXPERT_PARTS.index(part)]
            assert row == (tensor.offset - start) // 8


def test_a_tensor_by_its_name(exported: Any) -> None:
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    tensor, expected = opened(exported.bundle, exported.checkpoint).tensor(name), stored_tensors(exported.checkpoint)
    assert tensor.array.tobytes() == expected[name].data
    with pytest.raises(InputError, match=r"tensor language_model\.nothing: expected one tensor of this name.*found 0"):
        opened(exported.bundle, exported.checkpoint).tensor("language_model.nothing")


# Other layouts.


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_allows_no_view_is_copied_and_gives_the_same_logits(
    odd: Any, tmp_path: Path, expected_logits: npt.NDArray[np.float32], name: str
) -> None:
    layout = LAYOUTS[name]
    checkpoint = laid_out(
        odd,
        tmp_path / "checkpoint",
        shard_of=layout.shard_of,
        remainder=layout.remainder,
        reverse=layout.reverse,
    )
    bundle = bundle_of_layout(odd, checkpoint, tmp_path / "bundle")
    weights = all_weights(bundle, checkpoint)
    assert_weights_are_the_stored_bytes(weights, stored_tensors(odd.checkpoint))
    for (component, _), inputs in weights.items():
        for port, tensor in inputs.items():
            if port in ("expert_words", "expert_scales"):
                assert (mapped_at(tensor.array) is not None) == layout.experts_mapped, port
            elif port != "expert_table":
                assert (mapped_at(tensor.array) is not None) == layout.plain_mapped, port
            assert tensor.array.ctypes.data % tensor.array.itemsize == 0, port
        if component == "moe_layer":
            assert inputs["expert_words"].array.ctypes.data == inputs["expert_scales"].array.ctypes.data
    with Runtime.open(bundle, checkpoint=checkpoint, context=16, threads=1) as runtime:
        assert np.array_equal(runtime.prefill(PROMPT), expected_logits)


def test_a_checkpoint_laid_out_anew_can_be_exported(
    odd: Any, tmp_path: Path, expected_logits: npt.NDArray[np.float32]
) -> None:
    """The whole way, with a layer's experts in two shards and nothing aligned."""
    checkpoint = laid_out(odd, tmp_path / "checkpoint", shard_of=by_expert, remainder=3, reverse=False)
    manifest, reused = bundle_from_checkpoint(
        checkpoint_from_folder(checkpoint), tmp_path / "bundle", precisions=("fp32",)
    )
    assert not reused
    assert len(manifest.shards) == 3
    with Runtime.open(tmp_path / "bundle", context=16, threads=1) as runtime:
        assert np.array_equal(runtime.prefill(PROMPT), expected_logits)


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 0, 3), (0, 5, 17), (1, 2, 9), (1, 0, 1)])
def test_a_slice_is_a_ranks_share(odd: Any, axis: int, start: int, stop: int) -> None:
    """bundle-format.md, rule `slice`: rows or columns `start` to `stop` of one axis."""
    manifest = read_manifest(odd.bundle)
    component, port = manifest.component("dense_layer"), "self_attn.o_proj.weight"
    name = full_name("dense_layer", 1, port)
    binding = Binding(tensor=name.replace(".1.", ".{layer}."), rule="slice", axis=axis, start=start, stop=stop)
    component = replace(component, bindings={**component.bindings, port: binding})
    found = opened(odd.bundle, odd.checkpoint).weights(component, 1, "fp32")[port]
    stored = stored_tensors(odd.checkpoint)[name]
    whole = np.frombuffer(stored.data, np.uint16).reshape(stored.shape)
    expected = whole[start:stop] if axis == 0 else whole[:, start:stop]
    assert np.array_equal(found.array, expected)
    assert found.array.flags.c_contiguous
    assert found.dtype == "bfloat16"


def test_a_binding_to_another_type_or_to_no_tensor_is_refused(odd: Any) -> None:
    manifest = read_manifest(odd.bundle)
    component = manifest.component("dense_layer")
    mapped = opened(odd.bundle, odd.checkpoint)
    for tensor, text in (
        (
            "language_model.model.layers.2.mlp.gate.e_score_correction_bias",
            r"dense_layer: input input_layernorm\.weight: expected bfloat16, found float32",
        ),
        (
            "language_model.model.layers.{layer}.nothing.weight",
            r"tensor language_model\.model\.layers\.0\.nothing\.weight: expected one tensor of this name",
        ),
    ):
        bindings = {**component.bindings, "input_layernorm.weight": Binding(tensor=tensor)}
        with pytest.raises(InputError, match=text):
            mapped.weights(replace(component, bindings=bindings), 0, "fp32")


# Shards that are not the ones of the export.


@pytest.fixture
def moved(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "moved"))


def first_moe_shard(checkpoint: Path) -> Path:
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    return checkpoint / str(next(file for name, file in sorted(weight_map.items()) if ".mlp.experts." in name))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def header_changed(path: Path) -> None:
    """Another tensor's name, in as many bytes."""
    content = path.read_bytes()
    assert b"experts.0." in content
    path.write_bytes(content.replace(b"experts.0.", b"experts.1.", 1))


def header_length_changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def linked_outside(path: Path) -> None:
    outside = path.parent.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncated, r"expected \d+ bytes, found \d+ bytes.*changed since the export"),
        (grown, r"expected \d+ bytes, found \d+ bytes"),
        (emptied, r"expected \d+ bytes, found 0 bytes"),
        (removed, r"no file"),
        (broken_link, r"no file"),
        (folder_instead, r"expected \d+ bytes|cannot be read"),
        (header_changed, r"header hash: expected [0-9a-f]{64}, found [0-9a-f]{64}"),
        (header_length_changed, r"header hash: expected [0-9a-f]{64}, found [0-9a-f]{64}"),
        (linked_outside, r"leads out of"),
    ],
)
def test_a_shard_that_is_not_the_exported_one_is_refused(
    tiny: Any, moved: Path, damage: Callable[[Path], None], text: str
) -> None:
    shard = first_moe_shard(moved)
    damage(shard)
    with pytest.raises(InputError, match=text) as caught:
        Runtime.open(tiny.bundle, checkpoint=moved, context=16)
    assert shard.name in str(caught.value)


def test_a_link_inside_the_folder_is_followed(tiny: Any, moved: Path) -> None:
    shard = first_moe_shard(moved)
    (moved / "store").mkdir()
    shard.rename(moved / "store" / "blob")
    shard.symlink_to(Path("store") / "blob")
    with Runtime.open(tiny.bundle, checkpoint=moved, context=16, threads=1) as runtime:
        assert np.isfinite(runtime.prefill(PROMPT)).all()


# Where the checkpoint is.


def forget(bundle: Path, folder: Path) -> Path:
    """A copy of the bundle that remembers a folder that is not there."""
    shutil.copytree(bundle, folder / "bundle")
    location = folder / "bundle" / "checkpoint.json"
    values = json.loads(location.read_text())
    location.write_text(json.dumps({**values, "path": str(folder / "gone")}))
    return folder / "bundle"


def test_a_checkpoint_that_moved_can_be_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K25_CHECKPOINT", raising=False)
    bundle = forget(tiny.bundle, tmp_path)
    with pytest.raises(InputError, match=r"checkpoint .*gone: no such folder"):
        Runtime.open(bundle, context=16)
    expected = Runtime.open(tiny.bundle, context=16, threads=1).prefill(PROMPT)
    named = Runtime.open(bundle, checkpoint=tiny.checkpoint, context=16, threads=1)
    assert np.array_equal(named.prefill(PROMPT), expected)
    monkeypatch.setenv("K25_CHECKPOINT", str(tiny.checkpoint))
    assert np.array_equal(Runtime.open(bundle, context=16, threads=1).prefill(PROMPT), expected)


def test_an_argument_wins_over_the_variable_and_that_over_the_bundle(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argument", "variable"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("K25_CHECKPOINT", raising=False)
    assert checkpoint_folder(tiny.bundle) == tiny.checkpoint
    monkeypatch.setenv("K25_CHECKPOINT", str(tmp_path / "variable"))
    assert checkpoint_folder(tiny.bundle) == tmp_path / "variable"
    assert checkpoint_folder(tiny.bundle, tmp_path / "argument") == tmp_path / "argument"
    assert checkpoint_folder(tiny.bundle, str(tmp_path / "argument")) == tmp_path / "argument"


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_named_checkpoint_that_is_not_there_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """No silent return to the folder that the bundle remembers."""
    monkeypatch.delenv("K25_CHECKPOINT", raising=False)
    if how == "variable":
        monkeypatch.setenv("K25_CHECKPOINT", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"checkpoint .*absent: no such folder"):
        Runtime.open(tiny.bundle, checkpoint=tmp_path / "absent" if how == "argument" else None, context=16)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "other", "schema_version": 1, "path": "/"}',
        '{"format": "k25-checkpoint-location", "schema_version": 2, "path": "/"}',
        '{"format": "k25-checkpoint-location", "schema_version": 1}',
        None,
    ],
)
def test_a_location_that_makes_no_sense_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.delenv("K25_CHECKPOINT", raising=False)
    bundle = forget(tiny.bundle, tmp_path)
    (bundle / "checkpoint.json").unlink()
    if content is not None:
        (bundle / "checkpoint.json").write_text(content)
    with pytest.raises(InputError, match=r"checkpoint\.json"):
        checkpoint_folder(bundle)
    assert checkpoint_folder(bundle, tiny.checkpoint) == tiny.checkpoint


def in_hub_cache(checkpoint: Path, cache: Path) -> Path:
    """The checkpoint as Hugging Face keeps it: blobs, and a snapshot of links to them."""
    repository = cache / "models--maker--model"
    snapshot = repository / "snapshots" / "abc123"
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    for index, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(path, repository / "blobs" / f"blob{index}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{index}")
    return snapshot


def test_a_checkpoint_in_the_hub_cache_is_found_by_its_id(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub_cache(tiny.checkpoint, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with Runtime.open(tiny.bundle, checkpoint="maker/model", context=16, threads=1) as runtime:
        assert np.isfinite(runtime.prefill(PROMPT)).all()
    shard = first_moe_shard(snapshot)
    shutil.move(shard.resolve(), tmp_path / "stray")
    shard.unlink()
    shard.symlink_to(tmp_path / "stray")
    with pytest.raises(InputError, match=rf"{shard.name} leads out of"):
        Runtime.open(tiny.bundle, checkpoint="maker/model", context=16)
