"""A checkpoint folder: configuration, index and shard headers. No tensor is read."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from k25_export.checkpoint_files import file_in_checkpoint, folder_of_checkpoint
from k25_export.config import DEFAULT_LATENT_NORM_EPS, ModelConfig, model_config_from_dict
from k25_export.manifest import is_plain_file_name, json_object
from k25_export.safetensors_header import HeaderEntry, SafetensorsHeader, header_from_file
from k25_export.tensor_patterns import TensorPattern, tensor_patterns
from k25_plugins.errors import InputError, mismatch

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SHOWN_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file of the checkpoint."""

    file: str
    header: SafetensorsHeader


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are well formed. `problems` lists tensors that do not fit the configuration.

    `shard_of` maps every tensor name to its index in `shards`.
    """

    folder: Path
    config: ModelConfig
    shards: tuple[Shard, ...]
    shard_of: dict[str, int]
    patterns: tuple[TensorPattern, ...]
    problems: tuple[str, ...]

    def entry(self, name: str) -> HeaderEntry:
        """The header entry of a tensor."""
        return self.shards[self.shard_of[name]].header.entries[name]

    def require_no_problems(self) -> None:
        """Raise `InputError` with the first problems, if there are any."""
        if self.problems:
            shown = "\n  ".join(self.problems[:SHOWN_PROBLEMS])
            more = len(self.problems) - SHOWN_PROBLEMS
            rest = f"\n  ... and {more} more (`k25-export inspect` shows all)" if more > 0 else ""
            raise InputError(f"checkpoint {self.folder}: {len(self.problems)} tensors do not fit:\n  {shown}{rest}")


def checkpoint_from_folder(location: str | Path, *, latent_norm_eps: float = DEFAULT_LATENT_NORM_EPS) -> Checkpoint:
    """Read configuration, index and headers. `location` is a folder or a Hugging Face id in the local cache.

    Raises `InputError` where a file is missing, malformed or of an unsupported model; tensors that do not fit are
    collected in `problems`.
    """
    with _paused_garbage_collection():
        return _checkpoint_from_folder(folder_of_checkpoint(location), latent_norm_eps)


@contextlib.contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Headers are hundreds of thousands of small objects and no cycle: collections in between double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _checkpoint_from_folder(folder: Path, latent_norm_eps: float) -> Checkpoint:
    config_text = _read(folder, CONFIG_NAME)
    config = model_config_from_dict(json_object(config_text, where=CONFIG_NAME), latent_norm_eps=latent_norm_eps)
    weight_map = _weight_map_from_json(_read(folder, INDEX_NAME))
    files = sorted(set(weight_map.values()))
    shards = tuple(Shard(file=name, header=header_from_file(file_in_checkpoint(folder, name))) for name in files)
    shard_of = {name: index for index, shard in enumerate(shards) for name in shard.header.entries}
    patterns = tensor_patterns(config)
    problems = [*_index_problems(weight_map, shards, shard_of), *_tensor_problems(patterns, shards, shard_of)]
    return Checkpoint(
        folder=folder,
        config=config,
        shards=shards,
        shard_of=shard_of,
        patterns=patterns,
        problems=tuple(problems),
    )


def _read(folder: Path, name: str) -> bytes:
    path = file_in_checkpoint(folder, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {folder}: cannot read {name}: {error.strerror}") from error


def _weight_map_from_json(text: bytes) -> dict[str, str]:
    try:
        index = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise mismatch(INDEX_NAME, expected="JSON", found=str(error)) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise mismatch(
            f"{INDEX_NAME}: weight_map", expected="an object of tensor names", found=type(weight_map).__name__
        )
    for file in dict.fromkeys(weight_map.values()) if _are_strings(weight_map.values()) else [None]:
        if file is None or not is_plain_file_name(file):
            raise mismatch(
                f"{INDEX_NAME}: weight_map", expected="plain names of files in the checkpoint folder", found=repr(file)
            )
    return weight_map


def _are_strings(values: Any) -> bool:
    return all(type(value) is str for value in values)


def _index_problems(weight_map: dict[str, str], shards: tuple[Shard, ...], shard_of: dict[str, int]) -> Iterator[str]:
    files = [shard.file for shard in shards]
    places = list(map(shard_of.get, weight_map))
    if None not in places and [files[place] for place in places if place is not None] == list(weight_map.values()):
        unplaced: Iterable[tuple[str, str]] = ()  # the usual case, at the speed of C
    else:
        unplaced = weight_map.items()
    for name, file in unplaced:
        index = shard_of.get(name)
        if index is None:
            yield f"{name}: expected in shard {file}, as the index says, found in no shard"
        elif files[index] != file:
            yield f"{name}: expected in shard {file}, as the index says, found in {files[index]}"
    if sum(len(shard.header.entries) for shard in shards) != len(weight_map):
        for shard in shards:
            for name in shard.header.entries:
                if name not in weight_map:
                    yield f"{name}: in shard {shard.file} but not in {INDEX_NAME}"
                elif files[shard_of[name]] != shard.file:
                    yield f"{name}: in shard {shard.file} and again in {files[shard_of[name]]}"


def _tensor_problems(
    patterns: tuple[TensorPattern, ...], shards: tuple[Shard, ...], shard_of: dict[str, int]
) -> Iterator[str]:
    entries = [shard.header.entries for shard in shards]
    matched = 0
    for pattern in patterns:
        kinds = {(dtype, pattern.shape) for dtype in pattern.dtypes}
        for family in pattern.families():
            home = shard_of.get(family[0])
            found = list(map(entries[home].get, family)) if home is not None else [None]
            if None not in found and {entry[:2] for entry in found if entry is not None} <= kinds:
                matched += len(family)  # the usual case: a family in one shard, all as expected
                continue
            for name in family:
                index = shard_of.get(name)
                if index is None:
                    yield f"{name}: expected {pattern.dtypes[0]} {list(pattern.shape)}, found no such tensor"
                    continue
                matched += 1
                entry = entries[index][name]
                if entry[:2] not in kinds:
                    wanted = f"{' or '.join(pattern.dtypes)} {list(pattern.shape)}"
                    kind = f"{entry.dtype} {list(entry.shape)}"
                    yield f"{name}: expected {wanted}, found {kind} in shard {shards[index].file}"
    if matched != len(shard_of):
        known = {name for pattern in patterns for name in pattern.names()}
        for name, index in shard_of.items():
            if name not in known:
                entry = entries[index][name]
                yield (
                    f"{name}: {entry.dtype} {list(entry.shape)} in shard {shards[index].file} "
                    "belongs to no part of a Kimi K2.5 model"
                )
