"""The key of an engine: a hash of everything that decides it. Engines themselves differ from build to build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k25_engines.manifest import Flavour, Profile
from k25_engines.plugin_creators import plugin_source_sha256
from k25_engines.tensorrt_module import InstalledTensorRT
from k25_export.manifest import plain_value
from k25_plugins.source_hash import source_sha256


@dataclass(frozen=True, kw_only=True)
class BuiltWith:
    """What engines are built with on this machine: TensorRT, the plugin creators, this stage."""

    flavour: Flavour
    version: str
    plugin_source_sha256: str
    library_sha256: str | None
    source_sha256: str


def built_with(installed: InstalledTensorRT, library_sha256: str | None = None) -> BuiltWith:
    """What this machine builds with."""
    return BuiltWith(
        flavour=installed.flavour,
        version=installed.version,
        plugin_source_sha256=plugin_source_sha256(),
        library_sha256=library_sha256,
        source_sha256=source_sha256("k25_engines"),
    )


def engine_key(
    tools: BuiltWith,
    *,
    component: str,
    target: str,
    precision: str,
    portable: bool,
    component_sha256: Mapping[str, str],
    profiles: tuple[Profile, ...],
) -> str:
    """SHA-256 over the graphs, the target, the options and what it is built with."""
    values: dict[str, Any] = {
        "tools": plain_value(tools),
        "component": component,
        "target": target,
        "precision": precision,
        "portable": portable,
        "component_sha256": dict(component_sha256),
        "profiles": plain_value(list(profiles)),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
