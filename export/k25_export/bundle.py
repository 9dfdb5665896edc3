"""Export: a checkpoint becomes a bundle. `docs/bundle-format.md` specifies what is written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from k25_export.checkpoint import Checkpoint
from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.component_cache import ComponentCache
from k25_export.config import ModelConfig
from k25_export.manifest import (
    COMPONENTS_FOLDER,
    LOCATION_NAME,
    MANIFEST_NAME,
    REPORTS_FOLDER,
    SCHEMA_VERSION,
    TOKENIZER_FOLDER,
    ComponentEntry,
    ComponentFile,
    FileEntry,
    Manifest,
    Precision,
    checkpoint_location_json,
    content_hash,
    is_bundle,
    read_bundle_file,
    read_manifest,
    sealed_manifest,
)
from k25_export.staging import staged_folder
from k25_export.tensor_groups import shard_entries, tensor_groups
from k25_plugins.errors import InputError
from k25_plugins.source_hash import source_sha256
from k25_plugins.version import __version__
from k25_plugins.whole_file import write_whole

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

#: Small files that a runtime needs, copied from the checkpoint where they exist. Data only: no code is taken.
TOKENIZER_FILES = (
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
MAX_TOKENIZER_FILE_BYTES = 64 << 20
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")

Progress = Callable[[str, int, int], None]


def _no_progress(what: str, done: int, total: int) -> None:
    return None


def bundle_from_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    *,
    precisions: Sequence[Precision] = PRECISIONS,
    cache: ComponentCache | None = None,
    progress: Progress = _no_progress,
) -> tuple[Manifest, bool]:
    """Write the bundle `output`, or reuse it where it was made from the same inputs; components may come from `cache`.

    Returns the manifest and whether the bundle was reused. Raises `InputError` where the checkpoint has problems or
    the folder cannot be written; then nothing is left under its name.
    """
    checkpoint.require_no_problems()
    if checkpoint.folder.is_relative_to(os.path.realpath(output)):
        raise InputError(
            f"bundle {output}: the checkpoint {checkpoint.folder} lies in it, and writing the bundle replaces the "
            "folder whole. Choose another name."
        )
    options = {"latent_norm_eps": checkpoint.config.text.latent_norm_eps, "precisions": list(precisions)}
    versions = tool_versions()
    tokenizer = _tokenizer_files(checkpoint.folder)
    inputs_sha256 = _inputs_hash(checkpoint, options, versions, tokenizer)
    reused = _reusable(output, inputs_sha256)
    if reused is not None:
        _write_location(output, checkpoint.folder)
        return reused, True
    with staged_folder(output, is_ours=is_bundle, what="bundle") as staging:
        components = _write_components(checkpoint, staging, precisions, versions, cache, progress)
        manifest = Manifest(
            inputs_sha256=inputs_sha256,
            options=options,
            versions=versions,
            model=checkpoint.config,
            shards=shard_entries(checkpoint),
            tensors=tensor_groups(checkpoint),
            components=components,
            tokenizer=tuple(_write_file(staging, f"{TOKENIZER_FOLDER}/{name}", data) for name, data in tokenizer),
        )
        manifest, text = sealed_manifest(manifest)
        (staging / REPORTS_FOLDER).mkdir()
        (staging / MANIFEST_NAME).write_text(text, encoding="utf-8")
        (staging / LOCATION_NAME).write_text(checkpoint_location_json(checkpoint.folder), encoding="utf-8")
    return manifest, False


def tool_versions() -> dict[str, str]:
    """Versions of everything that decides the bytes of a component; `source` hashes the ops and this stage."""
    versions = {"k25-export": __version__, "source": source_sha256("k25_plugins", "k25_export")}
    return versions | {tool: importlib.metadata.version(tool).partition("+")[0] for tool in _TOOLS}


def _inputs_hash(
    checkpoint: Checkpoint, options: dict[str, Any], versions: dict[str, str], tokenizer: list[tuple[str, bytes]]
) -> str:
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "options": options,
        "versions": versions,
        "model": asdict(checkpoint.config),
        "shards": [asdict(shard) for shard in shard_entries(checkpoint)],
        "tokenizer": {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _reusable(output: Path, inputs_sha256: str) -> Manifest | None:
    """The manifest of an existing bundle of the same inputs whose files are all intact."""
    if not is_bundle(output):
        return None
    try:
        manifest = read_manifest(output)
    except InputError:
        return None
    if manifest.inputs_sha256 != inputs_sha256 or manifest.content_sha256 != content_hash(manifest):
        return None
    try:
        for component in manifest.components:
            for file in component.files:
                read_bundle_file(output, file)
        for entry in manifest.tokenizer:
            read_bundle_file(output, entry)
    except InputError:
        return None
    return manifest


def _component_key(config: ModelConfig, versions: dict[str, str], name: str, precision: Precision) -> str:
    facts = [asdict(config), versions, name, precision]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write_location(output: Path, folder: Path) -> None:
    path = output / LOCATION_NAME
    text = checkpoint_location_json(folder)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)


def _tokenizer_files(folder: Path) -> list[tuple[str, bytes]]:
    files = []
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            path = file_in_checkpoint(folder, name)
            if path.stat().st_size > MAX_TOKENIZER_FILE_BYTES:
                raise InputError(f"checkpoint {folder}: {name} is larger than {MAX_TOKENIZER_FILE_BYTES} bytes")
            try:
                files.append((name, path.read_bytes()))
            except OSError as error:
                raise InputError(f"checkpoint {folder}: cannot read {name}: {error.strerror}") from error
    return files


def _write_file(staging: Path, relative: str, data: bytes) -> FileEntry:
    path = staging / relative
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return FileEntry(path=relative, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write_components(
    checkpoint: Checkpoint,
    staging: Path,
    precisions: Sequence[Precision],
    versions: dict[str, str],
    cache: ComponentCache | None,
    progress: Progress,
) -> tuple[ComponentEntry, ...]:
    from k25_export.bindings import component_bindings
    from k25_export.component_specs import component_specs
    from k25_export.trace import traced_component_from_spec

    specs = component_specs(checkpoint.config)
    total = len(specs) * len(precisions)
    done = 0
    components = []
    for spec in specs:
        files = []
        for precision in precisions:
            progress(f"tracing {spec.name}.{precision}", done, total)
            make = partial(traced_component_from_spec, spec, precision)
            key = _component_key(checkpoint.config, versions, spec.name, precision)
            traced = make() if cache is None else cache.component(key, make)
            entry = _write_file(staging, f"{COMPONENTS_FOLDER}/{spec.name}.{precision}.onnx", traced.data)
            files.append(
                ComponentFile(
                    precision=precision,
                    path=entry.path,
                    bytes=entry.bytes,
                    sha256=entry.sha256,
                    inputs=traced.inputs,
                    outputs=traced.outputs,
                )
            )
            done += 1
        names = [port.name for port in files[0].inputs]
        bindings = component_bindings(spec, names, checkpoint.patterns)
        components.append(ComponentEntry(name=spec.name, layers=spec.layers, files=tuple(files), bindings=bindings))
    progress("tracing", total, total)
    return tuple(components)
