"""What a parity result belongs to: with equal keys, running it again would compare the same bytes by the same code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.manifest import REPORTS_FOLDER, Manifest, json_object
from k25_plugins.errors import InputError
from k25_plugins.native_library import native_library
from k25_plugins.source_hash import source_sha256
from k25_validate.prompts import Prompt
from k25_validate.validation_options import ValidationOptions

_TOOLS = ("onnxruntime", "numpy", "torch")


def validation_key(
    manifest: Manifest, *, reference: str, checkpoint: Path, options: ValidationOptions | None = None
) -> str:
    """SHA-256 over the export, the reference, size and times of the shards, options, versions, the native ops that are
    found and our own source."""
    stamps = []
    for shard in manifest.shards:
        status = file_in_checkpoint(checkpoint, shard.file).stat()
        stamps.append([shard.file, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    tools = (*_TOOLS, "transformers") if reference == "transformers" else _TOOLS
    native = native_library()
    facts = {
        "inputs_sha256": manifest.inputs_sha256,
        "reference": reference,
        "shards": stamps,
        "versions": {tool: importlib.metadata.version(tool) for tool in tools},
        "options": None if options is None else options.facts(),
        "native ops": [] if native is None else [native.version, native.isa, native.path.stat().st_mtime_ns],
        "source": source_sha256("k25_plugins", "k25_export", "k25_runtime", "k25_validate"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over tokens and pictures: what a walk's state belongs to."""
    digest = hashlib.sha256()
    for prompt in prompts:
        media = [(placed.first_token, placed.sample.name, placed.sample.item.grid) for placed in prompt.media]
        digest.update(repr((prompt.name, prompt.prompt_ids, prompt.next_ids, prompt.is_passage, media)).encode())
    return digest.hexdigest()


def reusable_report(bundle: Path, *, key: str) -> dict[str, object] | None:
    """`parity.json` of the bundle, if it is a complete result of this key; None otherwise."""
    folder = bundle / REPORTS_FOLDER
    if not all((folder / name).is_file() for name in ("parity.html", "parity.xml")):
        return None
    try:
        values = json_object((folder / "parity.json").read_bytes(), where="parity.json")
    except (OSError, InputError):
        return None
    return values if values.get("key") == key and isinstance(values.get("passed"), bool) else None
