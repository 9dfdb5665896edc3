"""Inspection of a checkpoint on disk. The official sizes are counted in `test_tensor_patterns.py`."""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.inspection import inspection_of_checkpoint

ITEM_SIZES = {"BF16": 2, "F32": 4, "I32": 4}


class ExportedFiles(Protocol):
    """The shared fixture: a checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path


def stored_tensors(checkpoint: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape), from the shards themselves."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found |= {name: (item["dtype"], item["shape"]) for name, item in header.items()}
    return found


def kind_of(name: str) -> str:
    parts = {
        ".weight_packed": "routed experts (INT4 words)",
        ".weight_scale": "routed experts (scales)",
        ".weight_shape": "routed experts (shapes)",
    }
    for part, kind in parts.items():
        if name.endswith(part):
            return kind
    return "text (bf16)" if name.startswith("language_model.") else "vision"


def parameters_of(name: str, shape: list[int]) -> int:
    if name.endswith((".weight_scale", ".weight_shape")):
        return 0
    return math.prod(shape) * (8 if name.endswith(".weight_packed") else 1)


def test_kinds_are_counted_as_the_shards_have_them(exported: ExportedFiles) -> None:
    tensors = stored_tensors(exported.checkpoint)
    inspection = inspection_of_checkpoint(checkpoint_from_folder(exported.checkpoint))
    expected: dict[str, dict[str, Any]] = {}
    for name, (dtype, shape) in tensors.items():
        kind = expected.setdefault(kind_of(name), {"name": kind_of(name), "tensors": 0, "parameters": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["parameters"] += parameters_of(name, shape)
        kind["bytes"] += math.prod(shape) * ITEM_SIZES[dtype]
    assert {kind.name: asdict(kind) for kind in inspection.kinds} == expected
    assert inspection.tensors == len(tensors)
    assert inspection.parameters_total == sum(parameters_of(name, shape) for name, (_, shape) in tensors.items())


def test_active_parameters_are_those_one_token_uses(exported: ExportedFiles) -> None:
    text = json.loads((exported.checkpoint / "config.json").read_text())["text_config"]
    unused = range(text["num_experts_per_tok"], text["n_routed_experts"])
    used = sum(
        parameters_of(name, shape)
        for name, (_, shape) in stored_tensors(exported.checkpoint).items()
        if name.startswith("language_model.")
        and "embed_tokens" not in name
        and not any(f".experts.{expert}." in name for expert in unused)
    )
    assert inspection_of_checkpoint(checkpoint_from_folder(exported.checkpoint)).parameters_active == used


def test_files_are_counted_as_the_folder_has_them(exported: ExportedFiles) -> None:
    paths = list(exported.checkpoint.glob("*.safetensors"))
    inspection = inspection_of_checkpoint(checkpoint_from_folder(exported.checkpoint))
    assert inspection.folder == str(exported.checkpoint.resolve())
    assert inspection.shards == len(paths)
    assert inspection.file_bytes == sum(path.stat().st_size for path in paths)
    index = json.loads((exported.checkpoint / "model.safetensors.index.json").read_text())
    assert inspection.tensor_bytes == index["metadata"]["total_size"]
    assert inspection.problems == ()


def test_the_configuration_is_shown(odd: ExportedFiles) -> None:
    inspection = inspection_of_checkpoint(checkpoint_from_folder(odd.checkpoint))
    text = json.loads((odd.checkpoint / "config.json").read_text())["text_config"]
    for key in ("num_hidden_layers", "n_routed_experts", "v_head_dim", "rope_theta"):
        assert inspection.config["text"][key] == text[key]
    assert inspection.config["quantization"]["num_bits"] == 4
    json.dumps(asdict(inspection))


def test_problems_are_shown_and_do_not_stop_it(tiny: ExportedFiles, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["q_lora_rank"] += 1
    (folder / "config.json").write_text(json.dumps(values))
    checkpoint = checkpoint_from_folder(folder)
    inspection = inspection_of_checkpoint(checkpoint)
    assert inspection.problems == checkpoint.problems
    assert len(inspection.problems) == 3 * values["text_config"]["num_hidden_layers"]


def test_a_checkpoint_without_vision(tiny: ExportedFiles, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"] = None
    (folder / "config.json").write_text(json.dumps(values))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = {name: file for name, file in index["weight_map"].items() if name.startswith("language_model.")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    inspection = inspection_of_checkpoint(checkpoint_from_folder(folder))
    assert inspection.problems == ()
    assert "vision" not in {kind.name for kind in inspection.kinds}
    assert inspection.tensors == len(weight_map)
