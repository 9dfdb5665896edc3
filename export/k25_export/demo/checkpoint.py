"""Write a demo checkpoint: random or trained weights in the official layout of Kimi K2.5, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from k25_export.config import model_config_from_dict
from k25_export.demo.layout import Shard, index_json, shards_from_config
from k25_export.demo.official_config import official_config_from_preset
from k25_export.demo.presets import preset_with_overrides
from k25_export.demo.small_files import json_bytes, small_files
from k25_export.demo.trained import trained_shard
from k25_export.demo.weights import tensor_bytes
from k25_export.staging import staged_folder
from k25_plugins.errors import mismatch
from k25_plugins.version import __version__

MARKER_FILE = "demo.json"
MARKER_FORMAT = "k25-demo-checkpoint"

Progress = Callable[[str, int, int], None]


def write_demo_checkpoint(
    folder: Path,
    *,
    preset: str,
    seed: int = 0,
    overrides: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of random weights into `folder`, and return it. A sparse preset has zeros that take no room,
    a trained one has the text weights that come with the package, and takes neither `seed` nor `overrides`.

    The bytes depend on `preset`, `seed`, `overrides` (sizes of `text_config` by key) and the version of k25-export,
    and on nothing else. The folder appears under its name only when it is complete; a demo checkpoint that is there
    already is replaced whole. `progress` is called with (file, bytes written, bytes in all) after every tensor.

    Raises `InputError` for a preset, key or size that does not fit, for a folder that holds something else, and for
    what the operating system refuses.
    """
    sizes = preset_with_overrides(preset, overrides)
    if sizes.is_trained and seed:
        raise mismatch(f"demo seed: preset {preset}", expected="0, the weights are not drawn", found=seed)
    values = official_config_from_preset(sizes)
    config = model_config_from_dict(values)
    shards = shards_from_config(config)
    with staged_folder(folder, is_ours=_is_demo_checkpoint, what="demo checkpoint") as staging:
        files = {
            "config.json": json_bytes(values),
            "model.safetensors.index.json": index_json(shards).encode(),
            MARKER_FILE: _marker_bytes(preset, seed, overrides or {}),
            **small_files(
                vocab_size=config.text.vocab_size,
                context_length=config.text.max_position_embeddings,
                words=sizes.words,
            ),
        }
        for name, content in files.items():
            (staging / name).write_bytes(content)
        if sizes.is_sparse:
            _write_sparse_shards(staging, shards, progress=progress)
        else:
            _write_shards(staging, shards, seed=seed, is_trained=sizes.is_trained, progress=progress)
    return folder


def _marker_bytes(preset: str, seed: int, overrides: Mapping[str, int]) -> bytes:
    marker = {"format": MARKER_FORMAT, "version": __version__, "preset": preset, "seed": seed}
    return json_bytes({**marker, "overrides": dict(sorted(overrides.items()))})


def _is_demo_checkpoint(folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("format") == MARKER_FORMAT


def _write_sparse_shards(folder: Path, shards: tuple[Shard, ...], *, progress: Progress | None) -> None:
    """Every safetensors file with its header, and a hole where the data would be."""
    for number, shard in enumerate(shards, start=1):
        with (folder / shard.file).open("wb") as file:
            header = shard.header()
            file.write(header)
            file.truncate(len(header) + shard.data_bytes)
        if progress is not None:
            progress("sparse shards", number, len(shards))


def _write_shards(
    folder: Path, shards: tuple[Shard, ...], *, seed: int, is_trained: bool, progress: Progress | None
) -> None:
    """Every safetensors file, streamed tensor by tensor; those that were trained, as they come with the package."""
    total = sum(shard.data_bytes for shard in shards)
    written = 0
    for shard in shards:
        trained = trained_shard(shard) if is_trained else None
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header() if trained is None else trained)
            for tensor in shard.tensors:
                if trained is None:
                    for piece in tensor_bytes(tensor, seed=seed):
                        file.write(piece)
                written += tensor.byte_count
                if progress is not None:
                    progress(shard.file, written, total)
