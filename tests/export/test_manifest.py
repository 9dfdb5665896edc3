"""The manifest: what is written is read back, what `docs/bundle-format.md` does not allow is refused."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, Protocol

import pytest

from k25_export.manifest import (
    checkpoint_location_json,
    is_bundle,
    is_plain_file_name,
    manifest_from_json,
    manifest_to_json,
    read_bundle_file,
    read_checkpoint_location,
    read_manifest,
)
from k25_plugins.errors import InputError

Values = dict[str, Any]
Change = Callable[[Values], object]


class ExportedFiles(Protocol):
    """The shared fixture: a checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path


@pytest.fixture(scope="module")
def text(tiny: ExportedFiles) -> str:
    return (tiny.bundle / "manifest.json").read_text("utf-8")


def stored_tensors(checkpoint: Path) -> dict[str, tuple[str, str, list[int], int, int]]:
    """Name -> (file, dtype, shape, offset from the start of the file, length), from the shards themselves."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, item in header.items():
            start, stop = item["data_offsets"]
            found[name] = (path.name, item["dtype"], item["shape"], 8 + length + start, stop - start)
    return found


def test_what_is_written_is_read_back(text: str) -> None:
    manifest = manifest_from_json(text)
    assert manifest_to_json(manifest) == text
    assert manifest_from_json(manifest_to_json(manifest)) == manifest
    with pytest.raises(FrozenInstanceError):
        manifest.inputs_sha256 = ""  # type: ignore[misc]


def test_names_beyond_ascii_are_written_as_utf8(text: str) -> None:
    values = json.loads(text)
    values["shards"][0]["file"] = "größe-重み.safetensors"
    manifest = manifest_from_json(json.dumps(values))
    written = manifest_to_json(manifest)
    assert "größe-重み.safetensors" in written
    assert manifest_from_json(written.encode()) == manifest


def test_keys_are_those_of_the_format(text: str) -> None:
    values = json.loads(text)
    assert set(values) == {
        *("format", "schema_version", "inputs_sha256", "options", "versions", "model", "ops", "shards", "tensors"),
        *("components", "tokenizer", "content_sha256"),
    }
    assert (values["format"], values["schema_version"]) == ("k25-bundle", 1)
    assert values["ops"] == {"domain": "k25", "version": 1}
    assert set(values["options"]) == {"latent_norm_eps", "precisions"}
    assert set(values["versions"]) == {"k25-export", "torch", "onnx", "onnx-ir", "onnxscript", "source"}
    assert set(values["model"]) == {"text", "vision", "quantization", "media_placeholder_token_id"}
    for shard in values["shards"]:
        assert set(shard) == {"file", "bytes", "data_start", "header_sha256"}
    for group in values["tensors"]:
        assert {"name", "shard", "dtype", "shape", "length"} <= set(group)
        assert set(group) <= {"name", "shard", "dtype", "shape", "length", "offset", "offsets", "experts"}
    for component in values["components"]:
        assert set(component) == {"name", "layers", "files", "bindings"}
        for file in component["files"]:
            assert set(file) == {"precision", "path", "bytes", "sha256", "inputs", "outputs"}
            for port in file["inputs"] + file["outputs"]:
                assert set(port) == {"name", "dtype", "shape"}
    for file in values["tokenizer"]:
        assert set(file) == {"path", "bytes", "sha256"}


def test_the_model_has_the_keys_of_the_configuration(exported: ExportedFiles) -> None:
    model = json.loads((exported.bundle / "manifest.json").read_text("utf-8"))["model"]
    config = json.loads((exported.checkpoint / "config.json").read_text("utf-8"))
    text = config["text_config"]
    assert model["text"].pop("latent_norm_eps") == 1e-6
    assert model["text"] == {
        key: {item: text["rope_scaling"][item] for item in value} if key == "rope_scaling" else text[key]
        for key, value in model["text"].items()
    }
    assert {"v_head_dim", "rope_theta", "eos_token_id", "routed_scaling_factor"} <= set(model["text"])
    assert all(config["vision_config"][key] == value for key, value in model["vision"].items())
    assert model["media_placeholder_token_id"] == config["media_placeholder_token_id"]
    assert model["quantization"] == {"format": "pack-quantized", "num_bits": 4, "group_size": 32, "symmetric": True}


def test_every_tensor_of_the_checkpoint_stands_in_one_group(exported: ExportedFiles) -> None:
    manifest = read_manifest(exported.bundle)
    found = [
        (
            member.name,
            (manifest.shards[member.shard].file, member.dtype, list(member.shape), member.offset, member.length),
        )
        for group in manifest.tensors
        for member in group.members()
    ]
    assert len(found) == len(dict(found))
    assert dict(found) == stored_tensors(exported.checkpoint)


def test_groups_say_what_the_format_says(exported: ExportedFiles) -> None:
    # The same from the JSON alone: `{expert}` with one offset for each, in the order of `experts` or 0, 1, 2, ...
    values = json.loads((exported.bundle / "manifest.json").read_text("utf-8"))
    found = {}
    for group in values["tensors"]:
        offsets = group.get("offsets", [group.get("offset")])
        assert ("offset" in group) != ("offsets" in group)
        assert ("{expert}" in group["name"]) == ("offsets" in group)
        assert "{layer}" not in group["name"]
        for expert, offset in zip(group.get("experts", range(len(offsets))), offsets, strict=True):
            name = group["name"].replace("{expert}", str(expert))
            file = values["shards"][group["shard"]]["file"]
            found[name] = (file, group["dtype"], group["shape"], offset, group["length"])
    assert found == stored_tensors(exported.checkpoint)


def test_a_layer_spread_over_shards_lists_its_experts(text: str) -> None:
    values = json.loads(text)
    group = next(item for item in values["tensors"] if "{expert}" in item["name"] and item["dtype"] == "I32")
    offsets = group.pop("offsets")
    groups = [
        {**group, "offsets": offsets[1::2], "experts": list(range(1, len(offsets), 2))},
        {**group, "offsets": offsets[0::2], "experts": list(range(0, len(offsets), 2))},
    ]
    values["tensors"] = groups
    manifest = manifest_from_json(json.dumps(values))
    names = {member.name: member.offset for item in manifest.tensors for member in item.members()}
    assert names == {group["name"].replace("{expert}", str(index)): offset for index, offset in enumerate(offsets)}
    assert json.loads(manifest_to_json(manifest))["tensors"] == groups


def test_no_path_of_this_machine_is_in_it(exported: ExportedFiles) -> None:
    content = (exported.bundle / "manifest.json").read_text("utf-8")
    for path in (str(exported.checkpoint), str(exported.bundle), str(Path.home()), "/tmp", ".venv"):
        assert path not in content
    assert content.endswith("}\n")


def test_components_and_precisions_are_found_by_name(text: str) -> None:
    manifest = manifest_from_json(text)
    assert manifest.component("moe_layer").file("bf16").path == "components/moe_layer.bf16.onnx"
    with pytest.raises(InputError, match=r"audio.*embed.*moe_layer"):
        manifest.component("audio")
    with pytest.raises(InputError, match=r"embed.*fp16.*fp32, bf16"):
        manifest.component("embed").file("fp16")


def set_key(*path: Any, value: Any) -> Change:
    def change(values: Values) -> None:
        owner: Any = values
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = value

    return change


def remove_key(*path: Any) -> Change:
    def change(values: Values) -> None:
        owner: Any = values
        for key in path[:-1]:
            owner = owner[key]
        del owner[path[-1]]

    return change


SINGLE = ("tensors", 0)
FIRST_FILE = ("components", 0, "files", 0)
#: What is changed -> (change, what the message must say besides the file).
MALFORMED: dict[str, tuple[Change, str]] = {
    "another format": (set_key("format", value="onnx-bundle"), "format.*k25-bundle.*onnx-bundle"),
    "no format": (remove_key("format"), "format"),
    "version 2": (set_key("schema_version", value=2), "schema_version.*expected 1, found 2"),
    "version 0": (set_key("schema_version", value=0), "schema_version"),
    "version as text": (set_key("schema_version", value="1"), "schema_version"),
    "no version": (remove_key("schema_version"), "schema_version"),
    "unknown key": (set_key("extra", value=1), "extra"),
    "unknown key of a shard": (set_key("shards", 0, "extra", value=1), "shards.*extra"),
    "unknown key of a tensor": (set_key(*SINGLE, "extra", value=1), "tensors.*extra"),
    "unknown key of a component": (set_key("components", 0, "extra", value=1), "components.*extra"),
    "unknown key of a file": (set_key(*FIRST_FILE, "extra", value=1), "files.*extra"),
    "unknown key of a port": (set_key(*FIRST_FILE, "inputs", 0, "extra", value=1), "inputs.*extra"),
    "unknown key of the model": (set_key("model", "text", "extra", value=1), "text.*extra"),
    "no shards": (remove_key("shards"), "shards"),
    "no components": (remove_key("components"), "components"),
    "no hash": (remove_key("inputs_sha256"), "inputs_sha256"),
    "no size of a shard": (remove_key("shards", 0, "bytes"), "bytes"),
    "no size of the model": (remove_key("model", "text", "v_head_dim"), "v_head_dim"),
    "no dtype of a port": (remove_key(*FIRST_FILE, "inputs", 0, "dtype"), "dtype"),
    "shards no list": (set_key("shards", value={}), "shards.*list"),
    "a shard no object": (set_key("shards", 0, value=5), "shards.*object"),
    "bytes as text": (set_key("shards", 0, "bytes", value="5"), "bytes.*int"),
    "bytes as a number": (set_key("shards", 0, "bytes", value=5.0), "bytes.*int"),
    "bytes as a flag": (set_key("shards", 0, "bytes", value=True), "bytes.*int"),
    "file as a number": (set_key("shards", 0, "file", value=5), "file.*str"),
    "hash as null": (set_key("inputs_sha256", value=None), "inputs_sha256.*str"),
    "shape as text": (set_key(*SINGLE, "shape", value="64"), "shape.*list"),
    "shape of texts": (set_key(*SINGLE, "shape", value=["64"]), "shape.*integers"),
    "shape of numbers": (set_key(*SINGLE, "shape", value=[1024.0, 64.0]), "shape.*integers"),
    "shape of flags": (set_key(*SINGLE, "shape", value=[True]), "shape.*integers"),
    "axis as a number": (set_key(*FIRST_FILE, "inputs", 0, "shape", value=[1.5]), "shape"),
    "layers as text": (set_key("components", 0, "layers", value="0"), "layers.*list"),
    "bindings as a list": (set_key("components", 0, "bindings", value=[]), "bindings.*object"),
    "an unknown precision": (set_key(*FIRST_FILE, "precision", value="fp16"), "precision.*fp32.*fp16"),
    "an unknown rule": (set_key("components", 0, "bindings", "x", value={"rule": "transpose"}), "rule.*transpose"),
    "an unknown key of a binding": (set_key("components", 0, "bindings", "x", value={"stack": 1}), "bindings.*stack"),
    "a flag of the model": (set_key("model", "text", "norm_topk_prob", value=1), "norm_topk_prob.*bool"),
    "a size of the model": (set_key("model", "text", "v_head_dim", value=24.0), "v_head_dim.*int"),
    "a number of the model": (set_key("model", "text", "rms_norm_eps", value="1e-5"), "rms_norm_eps.*float"),
    "a huge number of the model": (set_key("model", "text", "rope_theta", value=10**400), "rope_theta"),
    "merge kernel of three": (set_key("model", "vision", "merge_kernel_size", value=[2, 2, 2]), "merge_kernel_size"),
    "path in a shard's name": (set_key("shards", 0, "file", value="../x.safetensors"), r"plain.*\.\./x"),
    "absolute shard": (set_key("shards", 0, "file", value="/etc/passwd"), "plain.*/etc/passwd"),
    "folder in a shard's name": (set_key("shards", 0, "file", value="a/b"), "plain.*a/b"),
    "backslash in a shard's name": (set_key("shards", 0, "file", value="a\\b"), "plain"),
    "hidden shard": (set_key("shards", 0, "file", value=".x"), "plain"),
    "shard without a name": (set_key("shards", 0, "file", value=""), "plain"),
    "component above the bundle": (set_key(*FIRST_FILE, "path", value="../x.onnx"), r"path.*\.\./x"),
    "component with a long way out": (set_key(*FIRST_FILE, "path", value="components/../../x.onnx"), "path"),
    "absolute component": (set_key(*FIRST_FILE, "path", value="/etc/passwd"), "path.*/etc/passwd"),
    "component without a name": (set_key(*FIRST_FILE, "path", value=""), "path"),
    "tokenizer file above the bundle": (set_key("tokenizer", 0, "path", value="../../x"), r"path.*\.\./x"),
    "shard number too large": (set_key(*SINGLE, "shard", value=99), "embed_tokens.*shard.*99"),
    "shard number negative": (set_key(*SINGLE, "shard", value=-1), "embed_tokens.*shard.*-1"),
    "no offset": (remove_key(*SINGLE, "offset"), "embed_tokens.*offset"),
    "offset and offsets": (set_key(*SINGLE, "offsets", value=[400]), "embed_tokens.*offset"),
    "offset inside the header": (set_key(*SINGLE, "offset", value=8), "embed_tokens.*bytes"),
    "offset negative": (set_key(*SINGLE, "offset", value=-1), "embed_tokens.*bytes"),
    "offset past the shard": (set_key(*SINGLE, "offset", value=10**9), "embed_tokens.*bytes"),
    "offset beyond 64 bits": (set_key(*SINGLE, "offset", value=2**70), "embed_tokens.*bytes"),
    "an unknown dtype": (set_key(*SINGLE, "dtype", value="F8_E4M3"), "embed_tokens.*BF16.*F8_E4M3"),
    "length of another shape": (set_key(*SINGLE, "length", value=2), "embed_tokens.*length"),
    "another shape than the length": (set_key(*SINGLE, "shape", value=[1024, 65]), "embed_tokens.*length"),
    "negative shape": (set_key(*SINGLE, "shape", value=[-1024, -64]), "embed_tokens.*length"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests_are_refused(text: str, name: str) -> None:
    change, message = MALFORMED[name]
    values = json.loads(text)
    change(values)
    with pytest.raises(InputError) as caught:
        manifest_from_json(json.dumps(values), where="BUNDLE/manifest.json")
    found = str(caught.value)
    assert found.startswith("BUNDLE/manifest.json")
    assert re.search(message, found), found
    assert "expected" in found
    assert "found" in found


def expert_group(values: Values) -> Values:
    group: Values = next(item for item in values["tensors"] if "{expert}" in item["name"])
    return group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group["offsets"].__setitem__(3, 10**9), "bytes"),
        (lambda group: group["offsets"].__setitem__(3, 0), "bytes"),
        (lambda group: group["offsets"].__setitem__(3, "8"), "integers"),
        (lambda group: group["offsets"].__setitem__(3, 8.0), "integers"),
        (lambda group: group["offsets"].__setitem__(3, None), "integers"),
        (lambda group: group.__setitem__("experts", [0, 1]), "experts.*found 2"),
        (lambda group: group.__setitem__("experts", ["a"] * 12), "integers"),
        (lambda group: group.__setitem__("offset", 400), "offset"),
    ],
)
def test_malformed_groups_are_refused(text: str, change: Change, message: str) -> None:
    values = json.loads(text)
    change(expert_group(values))
    with pytest.raises(InputError, match=message):
        manifest_from_json(json.dumps(values))


def test_the_last_byte_of_a_shard_is_the_last_that_may_be_used(text: str) -> None:
    values = json.loads(text)
    group = values["tensors"][0]
    last = values["shards"][group["shard"]]["bytes"] - group["length"]
    first = values["shards"][group["shard"]]["data_start"]
    for offset, is_good in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
        changed = copy.deepcopy(values)
        changed["tensors"][0]["offset"] = offset
        if is_good:
            assert manifest_from_json(json.dumps(changed)).tensors[0].offset == offset
        else:
            with pytest.raises(InputError):
                manifest_from_json(json.dumps(changed))


NO_JSON = {
    "empty": b"",
    "cut off": b'{"format": "k25-bundle"',
    "text": b"hello",
    "no UTF-8": b'{"format": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "deep nesting": b"[" * 100_000,
    "a number of 5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_object_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^manifest\.json"):
        manifest_from_json(NO_JSON[name])


@pytest.mark.parametrize("name", NO_JSON)
def test_a_folder_with_such_a_manifest_is_no_bundle(tmp_path: Path, name: str) -> None:
    (tmp_path / "manifest.json").write_bytes(NO_JSON[name])
    assert not is_bundle(tmp_path)


def test_a_bundle_of_any_version_is_ours(tmp_path: Path, tiny: ExportedFiles) -> None:
    assert is_bundle(tiny.bundle)
    assert not is_bundle(tiny.checkpoint)
    assert not is_bundle(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"format": "k25-bundle", "schema_version": 99}')
    assert is_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    assert not is_bundle(tmp_path)


def test_reading_from_a_folder_that_is_no_bundle_says_what_to_do(tmp_path: Path, tiny: ExportedFiles) -> None:
    with pytest.raises(InputError, match=r"no such folder.*k25-export export"):
        read_manifest(tmp_path / "none")
    with pytest.raises(InputError, match=r"manifest\.json.*k25-export export"):
        read_manifest(tiny.checkpoint)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_files_of_a_bundle_are_read_by_hash(tiny: ExportedFiles, tmp_path: Path) -> None:
    entry = read_manifest(tiny.bundle).component("head").file("fp32")
    content = (tiny.bundle / "components" / "head.fp32.onnx").read_bytes()
    assert read_bundle_file(tiny.bundle, entry) == content
    with pytest.raises(InputError, match=r"head\.fp32\.onnx"):
        read_bundle_file(tmp_path, entry)
    (tmp_path / "components").mkdir()
    for changed in (content[:-1], content + b"\0", bytes([content[0] ^ 1]) + content[1:]):
        (tmp_path / "components" / "head.fp32.onnx").write_bytes(changed)
        with pytest.raises(InputError, match=rf"head\.fp32\.onnx.*expected {entry.sha256}, found"):
            read_bundle_file(tmp_path, entry)


@pytest.mark.parametrize("name", ["model-00001-of-000064.safetensors", "a", "a.b", "ä ö", "a..b", "-x"])
def test_plain_file_names(name: str) -> None:
    assert is_plain_file_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "/a", "../a", "a\\b", "C:a", "a\0b", "a/"])
def test_names_that_lead_elsewhere_are_not_plain(name: str) -> None:
    assert not is_plain_file_name(name)


@pytest.mark.parametrize("folder", ["/a/b", "/with space/ünïcode", '/quo"te'])
def test_the_location_of_the_checkpoint_is_read_back(tmp_path: Path, folder: str) -> None:
    (tmp_path / "checkpoint.json").write_text(checkpoint_location_json(Path(folder)), encoding="utf-8")
    assert read_checkpoint_location(tmp_path) == Path(folder)
    values = json.loads((tmp_path / "checkpoint.json").read_text("utf-8"))
    assert values == {"format": "k25-checkpoint-location", "schema_version": 1, "path": folder}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": "k25-checkpoint-location", "schema_version": 2, "path": "/a"}',
        '{"format": "k25-bundle", "schema_version": 1, "path": "/a"}',
        '{"format": "k25-checkpoint-location", "schema_version": 1}',
        '{"format": "k25-checkpoint-location", "schema_version": 1, "path": ""}',
        '{"format": "k25-checkpoint-location", "schema_version": 1, "path": 5}',
    ],
)
def test_malformed_locations_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(InputError, match=r"checkpoint\.json"):
        read_checkpoint_location(tmp_path)


def test_a_missing_location_says_how_to_name_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--checkpoint or K25_CHECKPOINT"):
        read_checkpoint_location(tmp_path)
