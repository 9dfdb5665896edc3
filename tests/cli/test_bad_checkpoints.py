"""Checkpoints that cannot be used: exit code 3, one message that names the thing, and nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run

COMMAND = str(Path(sys.executable).with_name("k25-export"))
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
GIB = 1 << 30

Json = dict[str, Any]
#: Breaks a checkpoint folder; returns what a good message names.
Damage = Callable[[Path], tuple[str, ...]]
#: A shard's tensors by name: [dtype, shape, data].
Tensors = dict[str, list[Any]]


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    """Hard links to the fixture's files: replace a file, never write into it."""
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a bundle would go: the only thing in its folder."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "bundle"


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("K25_CHECKPOINT", "K25_CACHE", "K25_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], *named: str) -> str:
    """Run the command: exit code 3, no output, one message that has all of `named`."""
    assert run(arguments) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    first, *rest = err.splitlines()
    assert first.startswith("k25-export: ")
    assert all(line.startswith("  ") for line in rest), err  # the items of a list
    assert [text for text in named if text not in err] == [], err
    return err


def replace(path: Path, content: bytes) -> None:
    """New content in a new file: the old one may be a hard link."""
    path.unlink()
    path.write_bytes(content)


def edit_json(path: Path, edit: Callable[[Json], object]) -> None:
    values = json.loads(path.read_bytes())
    edit(values)
    replace(path, json.dumps(values).encode())


def weight_map(folder: Path) -> dict[str, str]:
    values: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return values


def tensor_named(folder: Path, suffix: str) -> tuple[str, str]:
    """The last tensor with this end of its name, and its shard."""
    name, shard = [item for item in weight_map(folder).items() if item[0].endswith(suffix)][-1]
    return name, shard


def edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a shard; the file stays a well-formed one."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header: Json = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = [entry["dtype"], entry["shape"], raw[start + begin : start + end]]
    edit(tensors)
    written, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        written[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(written).encode()
    replace(path, len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


# Files that are not what they should be.


def _no_config(folder: Path) -> tuple[str, ...]:
    (folder / CONFIG).unlink()
    return (str(folder), CONFIG)


def _no_index(folder: Path) -> tuple[str, ...]:
    (folder / INDEX).unlink()
    return (str(folder), INDEX)


def _content(file: str, content: bytes) -> Damage:
    def damage(folder: Path) -> tuple[str, ...]:
        replace(folder / file, content)
        return (file, "JSON")

    return damage


def _cut_json(file: str) -> Damage:
    def damage(folder: Path) -> tuple[str, ...]:
        replace(folder / file, (folder / file).read_bytes()[:-3])
        return (file, "JSON")

    return damage


def _folder_for_a_file(folder: Path) -> tuple[str, ...]:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    return (CONFIG, "directory")


def _cut_shard(keep: Callable[[int, int], int]) -> Damage:
    """Truncate a shard to `keep(size, length of its header)` bytes."""

    def damage(folder: Path) -> tuple[str, ...]:
        _, shard = tensor_named(folder, ".weight_scale")
        raw = (folder / shard).read_bytes()
        replace(folder / shard, raw[: keep(len(raw), int.from_bytes(raw[:8], "little"))])
        return (shard, "truncated")

    return damage


def _lying_length(stated: Callable[[int, int], int]) -> Damage:
    """Let the header length say `stated(size, length of the header)`."""

    def damage(folder: Path) -> tuple[str, ...]:
        _, shard = tensor_named(folder, ".weight_scale")
        raw = (folder / shard).read_bytes()
        length = stated(len(raw), int.from_bytes(raw[:8], "little"))
        replace(folder / shard, length.to_bytes(8, "little") + raw[8:])
        return (shard,)

    return damage


def _header_is_no_json(folder: Path) -> tuple[str, ...]:
    _, shard = tensor_named(folder, ".weight_scale")
    raw = (folder / shard).read_bytes()
    replace(folder / shard, raw[:8] + b"?" + raw[9:])
    return (shard, "JSON")


def _missing_shard(folder: Path) -> tuple[str, ...]:
    _, shard = tensor_named(folder, ".weight_scale")
    (folder / shard).unlink()
    return (shard,)


def _index_names_a_missing_shard(folder: Path) -> tuple[str, ...]:
    name, _ = tensor_named(folder, "lm_head.weight")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: "model-of-nobody.safetensors"}))
    return ("model-of-nobody.safetensors",)


def _index_leads_out(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, "lm_head.weight")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: f"../checkpoint/{shard}"}))
    return (INDEX, f"../checkpoint/{shard}")


def _link_leads_out(folder: Path) -> tuple[str, ...]:
    _, shard = tensor_named(folder, "lm_head.weight")
    (folder / shard).rename(folder.parent / shard)
    (folder / shard).symlink_to(folder.parent / shard)
    return (shard, str(folder))


FILES: dict[str, Damage] = {
    "no config.json": _no_config,
    "no index": _no_index,
    "config.json is empty": _content(CONFIG, b""),
    "config.json is cut": _cut_json(CONFIG),
    "config.json is no UTF-8": _content(CONFIG, b'{"model_type": "\xff"}'),
    "config.json is a list": _content(CONFIG, b"[]"),
    "config.json is a folder": _folder_for_a_file,
    "index is empty": _content(INDEX, b""),
    "index is cut": _cut_json(INDEX),
    "header is no JSON": _header_is_no_json,
    "shard lacks its last byte": _cut_shard(lambda size, header: size - 1),
    "shard ends in its header": _cut_shard(lambda size, header: 8 + header // 2),
    "shard ends in its header's length": _cut_shard(lambda size, header: 7),
    "shard is empty": _cut_shard(lambda size, header: 0),
    "header longer than the file": _lying_length(lambda size, header: size),
    "header longer than any file": _lying_length(lambda size, header: (1 << 64) - 1),
    "header longer than it is": _lying_length(lambda size, header: header + 8),
    "header shorter than it is": _lying_length(lambda size, header: header - 8),
    "header of no length": _lying_length(lambda size, header: 0),
    "a shard is missing": _missing_shard,
    "index names a missing shard": _index_names_a_missing_shard,
    "index names a path": _index_leads_out,
    "a shard is a link that leads out": _link_leads_out,
}


@pytest.mark.parametrize("verb", ["inspect", "export", "build"])
@pytest.mark.parametrize("name", FILES)
def test_malformed_files_are_refused(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, output: Path, name: str, verb: str
) -> None:
    named = FILES[name](checkpoint)
    refused(capfd, [verb, str(checkpoint), *(["--output", str(output)] if verb != "inspect" else [])], *named)
    assert list(output.parent.iterdir()) == []


# Configurations of other models.


def _config(edit: Callable[[Json], None], *named: str) -> Damage:
    def damage(folder: Path) -> tuple[str, ...]:
        edit_json(folder / CONFIG, edit)
        return (CONFIG, "expected", "found", *named)

    return damage


def _quantization(value: Any, *named: str) -> Damage:
    """Another quantisation, wherever the configuration has it."""

    def edit(config: Json) -> None:
        places = [place for place in (config["text_config"], config) if place.get("quantization_config") is not None]
        assert places
        for place in places:
            place["quantization_config"] = value(place["quantization_config"]) if callable(value) else value

    return _config(edit, *named)


def _weights(**changes: Any) -> Callable[[Json], Json]:
    """The official quantisation with other values for its weights."""

    def changed(block: Json) -> Json:
        for group in block["config_groups"].values():
            group["weights"].update(changes)
        return block

    return changed


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 4, "group_size": 16, "strategy": "tensor_group"},
        }
    },
}
MODELS: dict[str, Damage] = {
    "architecture": _config(lambda config: config.update(model_type="llama"), "model_type", "llama"),
    "architecture missing": _config(lambda config: config.pop("model_type"), "model_type"),
    "text model": _config(lambda config: config["text_config"].update(model_type="qwen3_moe"), "qwen3_moe"),
    "FP8": _quantization(FP8, "quant_method", "fp8"),
    "NVFP4": _quantization(NVFP4, "format", "nvfp4-pack-quantized"),
    "bf16 experts": _quantization(None, "quantization_config", "bf16"),
    "INT8": _quantization(_weights(num_bits=8), "num_bits", "found 8"),
    "groups of 128": _quantization(_weights(group_size=128), "group_size", "expected 32", "found 128"),
    "asymmetric": _quantization(_weights(symmetric=False), "symmetric", "found False"),
    "a scale for each channel": _quantization(_weights(strategy="channel", group_size=None), "strategy"),
}


@pytest.mark.parametrize("verb", ["inspect", "export", "build"])
@pytest.mark.parametrize("name", MODELS)
def test_other_models_are_refused(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, output: Path, name: str, verb: str
) -> None:
    named = MODELS[name](checkpoint)
    refused(capfd, [verb, str(checkpoint), *(["--output", str(output)] if verb != "inspect" else [])], *named)
    assert list(output.parent.iterdir()) == []


# Tensors that do not fit the configuration.


def _missing_everywhere(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, ".self_attn.o_proj.weight")
    edit_tensors(folder / shard, lambda tensors: tensors.pop(name))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return (name, "no such tensor")


def _missing_in_the_shard(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, ".down_proj.weight_packed")
    edit_tensors(folder / shard, lambda tensors: tensors.pop(name))
    return (name, shard)


def _extra(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, "lm_head.weight")
    extra = name.replace("lm_head", "second_head")
    edit_tensors(folder / shard, lambda tensors: tensors.update({extra: ["BF16", [1, 3], bytes(6)]}))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({extra: shard}))
    return (extra, shard, "BF16 [1, 3]")


def _not_in_the_index(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, "lm_head.weight")
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return (name, shard, INDEX)


def _wrong_shape(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, ".gate_proj.weight_packed")
    shapes: list[list[int]] = []

    def flatten(tensors: Tensors) -> None:
        shapes.append(tensors[name][1])
        tensors[name][1] = [shapes[0][0] * shapes[0][1]]

    edit_tensors(folder / shard, flatten)
    return (name, shard, f"expected I32 {shapes[0]}", f"found I32 [{shapes[0][0] * shapes[0][1]}]")


def _wrong_dtype(folder: Path) -> tuple[str, ...]:
    name, shard = tensor_named(folder, ".up_proj.weight_scale")

    def as_half(tensors: Tensors) -> None:
        tensors[name][0] = "F16"

    edit_tensors(folder / shard, as_half)
    return (name, shard, "expected BF16", "found F16")


TENSORS: dict[str, Damage] = {
    "missing": _missing_everywhere,
    "missing in the shard": _missing_in_the_shard,
    "extra": _extra,
    "not in the index": _not_in_the_index,
    "wrong shape": _wrong_shape,
    "wrong dtype": _wrong_dtype,
}


@pytest.mark.parametrize("verb", ["export", "build"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, output: Path, name: str, verb: str
) -> None:
    named = TENSORS[name](checkpoint)
    refused(capfd, [verb, str(checkpoint), "--output", str(output)], str(checkpoint), *named)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("name", TENSORS)
def test_inspect_lists_tensors_that_do_not_fit(capfd: pytest.CaptureFixture[str], checkpoint: Path, name: str) -> None:
    named = TENSORS[name](checkpoint)
    assert run(["inspect", str(checkpoint), "--json"]) == 3
    out, err = capfd.readouterr()
    problems = json.loads(out)["problems"]
    assert err == ""
    assert [text for text in named if text not in "\n".join(problems)] == []
    assert run(["inspect", str(checkpoint)]) == 3
    out, err = capfd.readouterr()
    assert [problem for problem in problems if problem not in out] == []
    assert err == ""


# Folders that are none.


@pytest.mark.parametrize("verb", ["inspect", "export", "build"])
@pytest.mark.parametrize(
    "location",
    [
        "nothing",
        "nothing/here",
        "../nothing",
        "moonshotai/Kimi-K2.5",
        "checkpoint/config.json",
        "ünïcødé \U0001f4a5",
        "nothing\x00here",
        pytest.param("x" * 300, id="a long name"),
        pytest.param("x/" * 3000, id="a long path"),
    ],
)
def test_no_such_folder(
    capfd: pytest.CaptureFixture[str],
    checkpoint: Path,
    output: Path,
    location: str,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    options = ["--output", str(output)] if verb != "inspect" else []
    refused(capfd, [verb, location, *options], location[:200].partition("\x00")[0])
    assert list(output.parent.iterdir()) == []


def test_a_file_instead_of_a_folder_is_called_so(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    refused(capfd, ["inspect", str(checkpoint / CONFIG)], str(checkpoint / CONFIG), "expected a folder, found a file")


def test_a_configuration_of_absurd_size_is_refused_at_once(checkpoint: Path, output: Path) -> None:
    """It must not be counted out: a machine has less memory than that."""

    def edit(config: Json) -> None:
        config["text_config"]["num_hidden_layers"] = 1 << 40

    edit_json(checkpoint / CONFIG, edit)
    done = subprocess.run(
        [COMMAND, "export", checkpoint, "--output", output],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB)),
    )
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("k25-export: ")
    assert list(output.parent.iterdir()) == []
