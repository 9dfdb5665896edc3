"""Bundles with fake engines in them: what `compile` would have written, for `FakeDevice`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k25_engines.engine_options import EngineOptions, limits_from_options
from k25_engines.manifest import (
    MANIFEST_PATH,
    EngineEntry,
    EngineManifest,
    engine_manifest_to_json,
    engine_path,
    log_path,
    with_file,
)
from k25_engines.profiles import profiles_for
from k25_export.manifest import ComponentEntry, Manifest, read_manifest

Change = Callable[[str, dict[str, Any]], None]
CAPABILITIES = {"sm80": "8.0", "sm120": "12.0"}
OPTIONS = EngineOptions(precision="fp32", max_sequences=3, max_tokens=16, max_rows=16, block_size=4, context=48)


def bundle_with_engines(
    source: Path,
    folder: Path,
    *,
    portable: bool = False,
    options: EngineOptions = OPTIONS,
    target: str = "sm120",
    version: str = "1.7.1.116",
    change: Change = lambda component, described: None,
) -> Path:
    """A copy of an exported bundle with an engine for each component; `change` may spoil what an engine says."""
    bundle = folder / "bundle"
    shutil.copytree(source, bundle)
    manifest = read_manifest(bundle)
    entries = []
    for component in manifest.components:
        entry = _entry(component, manifest, portable=portable, options=options, target=target, version=version)
        described = _described(entry, bundle / component.file(entry.precision).path)
        change(component.name, described)
        data = json.dumps(described).encode()
        (bundle / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (bundle / entry.path).write_bytes(data)
        entries.append(with_file(entry, data))
    (bundle / MANIFEST_PATH).write_text(engine_manifest_to_json(EngineManifest(engines=tuple(entries))))
    return bundle


def _entry(
    component: ComponentEntry, manifest: Manifest, *, portable: bool, options: EngineOptions, target: str, version: str
) -> EngineEntry:
    file = component.file(options.precision)
    has_cache = any(port.name == "cache_out" for port in file.outputs)
    return EngineEntry(
        component=component.name,
        target=target,
        compute_capabilities=(CAPABILITIES[target],),
        path=engine_path(component.name, target),
        bytes=1,
        sha256="0" * 64,
        precision=options.precision,
        portable=portable,
        flavour="tensorrt-rtx",
        version=version,
        inputs=file.inputs,
        outputs=file.outputs,
        aliases={"cache_out": "cache"} if has_cache and not portable else {},
        profiles=profiles_for(component.name, file.inputs, limits_from_options(options, manifest)),
        component_sha256={component.name: file.sha256},
        key="1" * 64,
        build_seconds=0.5,
        peak_memory_bytes=1,
        checks={},
        log=log_path(component.name, target),
    )


def _described(entry: EngineEntry, graph: Path) -> dict[str, Any]:
    ports = [(port, True) for port in entry.inputs] + [(port, False) for port in entry.outputs]
    return {
        "graph": str(graph),
        "axes": {port.name: port.shape for port, _ in ports},
        "ports": [
            {
                "name": port.name,
                "dtype": port.dtype,
                "shape": [axis if isinstance(axis, int) else -1 for axis in port.shape],
                "is_input": is_input,
            }
            for port, is_input in ports
        ],
        "profiles": [_plain(profile.shapes) for profile in entry.profiles],
        "aliases": dict(entry.aliases),
        "scratch": 1000,
    }


def _plain(shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [list(shape) for shape in ranges] for name, ranges in shapes.items()}
