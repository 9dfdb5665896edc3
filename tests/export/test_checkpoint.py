"""Checkpoint intake: every tensor is accounted for, and every way to be wrong has its message."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from k25_export.checkpoint import Checkpoint, checkpoint_from_folder
from k25_plugins.errors import InputError

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
NORM = "language_model.model.norm.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj"
ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


class ExportedFiles(Protocol):
    """The shared fixture: a checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path


@dataclass
class StoredTensor:
    """One tensor of a shard, as its header has it."""

    dtype: str
    shape: list[int]
    data: bytes


Shard = dict[str, StoredTensor]


def read_shard(path: Path) -> Shard:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: StoredTensor(item["dtype"], item["shape"], data[slice(*item["data_offsets"])])
        for name, item in header.items()
    }


def write_shard(path: Path, tensors: Shard) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        assert len(tensor.data) == math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [len(data), len(data) + len(tensor.data)],
        }
        data += tensor.data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Copy:
    """A copy of the checkpoint that a test may damage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def index(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / INDEX).read_text())
        return values

    def write_index(self, values: object) -> None:
        (self.folder / INDEX).write_text(json.dumps(values))

    def shard_of(self, name: str) -> str:
        file: str = self.index()["weight_map"][name]
        return file

    def change_shard(self, file: str, change: Callable[[Shard], object]) -> None:
        tensors = read_shard(self.folder / file)
        change(tensors)
        write_shard(self.folder / file, tensors)

    def change_index(self, change: Callable[[dict[str, str]], object]) -> None:
        values = self.index()
        change(values["weight_map"])
        self.write_index(values)

    def read(self) -> Checkpoint:
        return checkpoint_from_folder(self.folder)

    def only_problem(self) -> str:
        """The one problem; the checkpoint is refused with it."""
        checkpoint = self.read()
        assert len(checkpoint.problems) == 1, checkpoint.problems
        with pytest.raises(InputError) as caught:
            checkpoint.require_no_problems()
        assert checkpoint.problems[0] in str(caught.value)
        assert str(self.folder) in str(caught.value)
        return checkpoint.problems[0]

    def refusal(self) -> str:
        with pytest.raises(InputError) as caught:
            self.read()
        return str(caught.value)


@pytest.fixture
def copy(tiny: ExportedFiles, tmp_path: Path) -> Copy:
    shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint")
    return Copy(tmp_path / "checkpoint")


def test_a_good_checkpoint_has_no_problems(exported: ExportedFiles) -> None:
    checkpoint = checkpoint_from_folder(exported.checkpoint)
    assert checkpoint.problems == ()
    checkpoint.require_no_problems()
    assert checkpoint.folder == exported.checkpoint.resolve()
    weight_map = json.loads((exported.checkpoint / INDEX).read_text())["weight_map"]
    assert {name: checkpoint.shards[index].file for name, index in checkpoint.shard_of.items()} == weight_map
    assert [shard.file for shard in checkpoint.shards] == sorted(set(weight_map.values()))


def test_entries_are_those_of_the_headers(tiny: ExportedFiles) -> None:
    checkpoint = checkpoint_from_folder(tiny.checkpoint)
    for shard in checkpoint.shards:
        for name, tensor in read_shard(tiny.checkpoint / shard.file).items():
            entry = checkpoint.entry(name)
            assert (entry.dtype, list(entry.shape)) == (tensor.dtype, tensor.shape)
            start, stop = entry.start, entry.stop
            place = shard.header.data_start + start
            content = (tiny.checkpoint / shard.file).read_bytes()
            assert content[place : place + stop - start] == tensor.data


def test_the_configuration_is_that_of_the_file(odd: ExportedFiles) -> None:
    text = json.loads((odd.checkpoint / CONFIG).read_text())["text_config"]
    config = checkpoint_from_folder(odd.checkpoint, latent_norm_eps=1e-5).config
    assert config.text.v_head_dim == text["v_head_dim"]
    assert config.text.n_routed_experts == text["n_routed_experts"]
    assert config.text.latent_norm_eps == 1e-5


def test_layers_may_share_shards_in_any_way(copy: Copy) -> None:
    # Everything in one file, in reverse order: not how the official files are, but well formed.
    everything: Shard = {}
    for path in sorted(copy.folder.glob("*.safetensors")):
        everything |= read_shard(path)
        path.unlink()
    write_shard(copy.folder / "all.safetensors", dict(reversed(everything.items())))
    copy.write_index({"weight_map": dict.fromkeys(everything, "all.safetensors")})
    assert copy.read().problems == ()


def test_weight_shapes_may_be_int64(copy: Copy) -> None:
    name = f"{EXPERT}.weight_shape"

    def widen(tensors: Shard) -> None:
        sizes = struct.unpack("<2i", tensors[name].data)
        tensors[name] = StoredTensor("I64", [2], struct.pack("<2q", *sizes))

    copy.change_shard(copy.shard_of(name), widen)
    assert copy.read().problems == ()


@pytest.mark.parametrize("name", [NORM, f"{EXPERT}.weight_scale", "vision_tower.encoder.blocks.1.wo.bias"])
def test_a_missing_tensor_is_named_with_what_was_expected(copy: Copy, name: str) -> None:
    expected = copy.read().entry(name)
    copy.change_shard(copy.shard_of(name), lambda tensors: tensors.pop(name))
    copy.change_index(lambda weight_map: weight_map.pop(name))
    problem = copy.only_problem()
    for part in (name, expected.dtype, str(list(expected.shape)), "expected", "found"):
        assert part in problem


def test_a_tensor_that_only_the_index_has_is_named_with_its_shard(copy: Copy) -> None:
    shard = copy.shard_of(NORM)
    copy.change_shard(shard, lambda tensors: tensors.pop(NORM))
    problems = copy.read().problems
    assert any(NORM in problem and shard in problem for problem in problems)
    assert all(problem.startswith(f"{NORM}: expected") for problem in problems)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.61.self_attn.q_a_proj.weight",
        "language_model.model.layers.1.mlp.experts.12.up_proj.weight_packed",
        "language_model.model.layers.0.mlp.gate.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.layers.1.self_attn.q_a_proj.bias",
        "language_model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_an_extra_tensor_is_named_with_its_shard(copy: Copy, name: str) -> None:
    shard = copy.shard_of(NORM)
    copy.change_shard(shard, lambda tensors: tensors.update({name: StoredTensor("F16", [3, 1], bytes(6))}))
    copy.change_index(lambda weight_map: weight_map.update({name: shard}))
    problem = copy.only_problem()
    for part in (name, shard, "F16", "[3, 1]"):
        assert part in problem


def test_an_extra_tensor_that_the_index_does_not_have_is_named(copy: Copy) -> None:
    shard = copy.shard_of(NORM)
    copy.change_shard(shard, lambda tensors: tensors.update({"extra": StoredTensor("F32", [1], bytes(4))}))
    problems = copy.read().problems
    assert problems
    assert all("extra" in problem and shard in problem for problem in problems)
    assert any(INDEX in problem for problem in problems)


def test_a_known_tensor_that_the_index_does_not_have_is_named(copy: Copy) -> None:
    shard = copy.shard_of(NORM)
    copy.change_index(lambda weight_map: weight_map.pop(NORM))
    problem = copy.only_problem()
    for part in (NORM, shard, INDEX):
        assert part in problem


WRONG_TENSORS = [
    (NORM, "BF16", [65]),
    (NORM, "BF16", [64, 1]),
    (NORM, "F32", [64]),
    (NORM, "F16", [64]),
    (f"{EXPERT}.weight_packed", "I32", [64, 96]),
    (f"{EXPERT}.weight_packed", "I64", [96, 8]),
    (f"{EXPERT}.weight_scale", "F32", [96, 2]),
    (f"{EXPERT}.weight_shape", "I32", [3]),
    ("language_model.model.layers.1.mlp.gate.e_score_correction_bias", "BF16", [12]),
]


@pytest.mark.parametrize(("name", "dtype", "shape"), WRONG_TENSORS)
def test_a_wrong_tensor_is_named_with_shard_expected_and_found(
    copy: Copy, name: str, dtype: str, shape: list[int]
) -> None:
    shard, expected = copy.shard_of(name), copy.read().entry(name)
    data = bytes(math.prod(shape) * ITEM_SIZES[dtype])
    copy.change_shard(shard, lambda tensors: tensors.update({name: StoredTensor(dtype, shape, data)}))
    problem = copy.only_problem()
    for part in (name, shard, expected.dtype, str(list(expected.shape)), f"{dtype} {shape}", "expected", "found"):
        assert part in problem, (part, problem)


def test_a_tensor_in_two_shards_is_named_with_both(copy: Copy) -> None:
    home, other = copy.shard_of(NORM), "model-00001-of-000007.safetensors"
    assert home != other
    tensor = read_shard(copy.folder / home)[NORM]
    copy.change_shard(other, lambda tensors: tensors.update({NORM: tensor}))
    problems = copy.read().problems
    assert problems
    assert all(NORM in problem for problem in problems)
    assert any(home in problem and other in problem for problem in problems)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(copy: Copy) -> None:
    home, other = copy.shard_of(NORM), "model-00001-of-000007.safetensors"
    copy.change_index(lambda weight_map: weight_map.update({NORM: other}))
    problem = copy.only_problem()
    for part in (NORM, home, other):
        assert part in problem


def test_another_configuration_than_the_tensors_is_seen(copy: Copy) -> None:
    values = json.loads((copy.folder / CONFIG).read_text())
    values["text_config"]["v_head_dim"] += 4
    (copy.folder / CONFIG).write_text(json.dumps(values))
    problems = copy.read().problems
    layers = values["text_config"]["num_hidden_layers"]
    assert len(problems) == 2 * layers
    assert {problem.split(":")[0].rpartition("self_attn.")[2] for problem in problems} == {
        "kv_b_proj.weight",
        "o_proj.weight",
    }


def test_many_problems_are_counted_and_the_first_ones_shown(copy: Copy) -> None:
    values = json.loads((copy.folder / CONFIG).read_text())
    values["text_config"]["num_hidden_layers"] += 1
    (copy.folder / CONFIG).write_text(json.dumps(values))
    checkpoint = copy.read()
    assert len(checkpoint.problems) > 100
    with pytest.raises(InputError) as caught:
        checkpoint.require_no_problems()
    message = str(caught.value)
    assert str(len(checkpoint.problems)) in message
    assert f"{len(checkpoint.problems) - 10} more" in message
    assert all(problem in message for problem in checkpoint.problems[:10])
    assert checkpoint.problems[10] not in message


def test_a_shard_that_the_index_names_but_nobody_has_is_refused(copy: Copy) -> None:
    (copy.folder / "model-00003-of-000007.safetensors").unlink()
    message = copy.refusal()
    assert "model-00003-of-000007.safetensors" in message
    assert str(copy.folder) in message


def test_a_truncated_shard_is_refused(copy: Copy) -> None:
    path = copy.folder / "model-00002-of-000007.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = copy.refusal()
    assert path.name in message
    assert "truncated" in message


def test_a_lying_header_length_is_refused(copy: Copy) -> None:
    path = copy.folder / "model-00002-of-000007.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**40) + content[8:])
    assert path.name in copy.refusal()


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", ".hidden", "a\\b", "c:d", "a\0b", "./a"],
)
def test_an_index_with_a_path_is_refused(copy: Copy, file: str) -> None:
    shutil.copy(copy.folder / copy.shard_of(NORM), copy.folder.parent / "x.safetensors")
    (copy.folder / "sub").mkdir()
    shutil.copy(copy.folder / copy.shard_of(NORM), copy.folder / "sub" / "x.safetensors")
    copy.change_index(lambda weight_map: weight_map.update({NORM: file}))
    message = copy.refusal()
    assert INDEX in message
    assert repr(file) in message


@pytest.mark.parametrize(
    "values", [[], 5, None, "text", {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}]
)
def test_an_index_without_a_weight_map_is_refused(copy: Copy, values: object) -> None:
    copy.write_index(values)
    assert "weight_map" in copy.refusal()


@pytest.mark.parametrize("file", [None, 5, ["a.safetensors"], {}, True, 1.5])
def test_an_index_with_something_else_than_names_is_refused(copy: Copy, file: object) -> None:
    values = copy.index()
    values["weight_map"][NORM] = file
    copy.write_index(values)
    assert "weight_map" in copy.refusal()


@pytest.mark.parametrize("name", [INDEX, CONFIG])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"hello", b'{"a": "\xff"}', b"[" * 100_000, b"\x00" * 50, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut off", "no JSON", "no UTF-8", "deep nesting", "zeros", "a number of 5000 digits"],
)
def test_json_that_is_none_is_refused(copy: Copy, name: str, content: bytes) -> None:
    (copy.folder / name).write_bytes(content)
    message = copy.refusal()
    assert name in message
    assert len(message) < 400


@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_missing_files_are_refused(copy: Copy, name: str) -> None:
    (copy.folder / name).unlink()
    message = copy.refusal()
    assert name in message
    assert str(copy.folder) in message


@pytest.mark.parametrize("name", [INDEX, CONFIG, "model-00002-of-000007.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_refused(copy: Copy, name: str) -> None:
    (copy.folder / name).unlink()
    (copy.folder / name).mkdir()
    assert name in copy.refusal()


@pytest.mark.parametrize("content", [b"[]", b"null", b"5", b'"text"'])
def test_a_configuration_that_is_no_object_is_refused(copy: Copy, content: bytes) -> None:
    (copy.folder / CONFIG).write_bytes(content)
    message = copy.refusal()
    assert CONFIG in message
    assert "object" in message


def test_an_unsupported_architecture_is_refused(copy: Copy) -> None:
    values = json.loads((copy.folder / CONFIG).read_text())
    values["model_type"] = "llama"
    (copy.folder / CONFIG).write_text(json.dumps(values))
    assert "model_type" in copy.refusal()


@pytest.mark.parametrize("name", [INDEX, CONFIG, "model-00002-of-000007.safetensors"])
def test_a_link_out_of_the_folder_is_refused(copy: Copy, name: str) -> None:
    outside = copy.folder.parent / "outside"
    (copy.folder / name).rename(outside)
    (copy.folder / name).symlink_to(outside)
    message = copy.refusal()
    assert name in message
    assert "out of" in message


def test_a_link_inside_the_folder_is_followed(copy: Copy) -> None:
    name = "model-00002-of-000007.safetensors"
    (copy.folder / "data").mkdir()
    (copy.folder / name).rename(copy.folder / "data" / "blob")
    (copy.folder / name).symlink_to("data/blob")
    assert copy.read().problems == ()


def test_reading_headers_does_not_read_tensors(copy: Copy) -> None:
    # The data of every shard becomes a hole of zeros, except that its length stays.
    for path in copy.folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            file.truncate(8 + length)
            file.truncate(size)
    assert copy.read().problems == ()
