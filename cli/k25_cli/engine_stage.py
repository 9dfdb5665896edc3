"""Options and calls of the engines stage that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k25_cli.extras import require_extra
from k25_cli.output import Progress, human_bytes, print_table

if TYPE_CHECKING:
    from k25_engines.compilation import Compilation
    from k25_engines.inventory import EngineStatus
    from k25_engines.manifest import EngineEntry, Flavour


def require_targets(targets: Sequence[str], flavour: Flavour | None = None) -> None:
    """Raise `K25Error` where engines for these targets cannot be built here; nothing is imported or built."""
    from k25_engines.compilation import require_targets as require

    require_extra("tensorrt-rtx")
    require(targets, flavour)


def compile_bundle(bundle: Path, targets: Sequence[str], *, progress: Progress, **options: Any) -> Compilation:
    """Build the engines of a bundle, or reuse those that are there."""
    require_extra("tensorrt-rtx")
    from k25_engines.compilation import engines_from_bundle

    return engines_from_bundle(bundle, targets, progress=progress, **options)


def compilation_values(compilation: Compilation) -> dict[str, Any]:
    """The result as JSON values."""
    built = {entry.path for entry in compilation.built}
    return {
        "engines": [engine_values(entry) | {"reused": entry.path not in built} for entry in compilation.engines],
        "built": len(built),
        "reused": len(compilation.engines) - len(built),
    }


def engine_values(entry: EngineEntry) -> dict[str, Any]:
    """One engine as JSON values: what a program wants to know, without ports."""
    keys = (
        "component", "target", "path", "bytes", "sha256", "precision", "portable", "flavour", "version", "key",
        "build_seconds", "peak_memory_bytes", "checks",
    )  # fmt: skip
    values: dict[str, Any] = {key: getattr(entry, key) for key in keys}
    return values | {
        "compute_capabilities": list(entry.compute_capabilities),
        "warnings": list(entry.warnings),
        "log": entry.log,
    }


def print_compilation(bundle: Path, compilation: Compilation) -> None:
    """A table of the engines, and what TensorRT warned of."""
    built = {entry.path for entry in compilation.built}
    rows = [
        (
            f"{entry.component} {entry.target}",
            human_bytes(entry.bytes),
            f"{entry.build_seconds:.2f} s" if entry.path in built else "reused",
            human_bytes(entry.peak_memory_bytes),
            str(sum((entry.plugins.layers if entry.plugins else {}).values())),
            entry.checks.get("warnings", ""),
        )
        for entry in compilation.engines
    ]
    first = compilation.engines[0]
    kind = "portable" if first.portable else "with plugins"
    title = f"{bundle / 'engines'}: {first.flavour} {first.version}, {first.precision}, {kind}"
    print_table(title, rows, header=("engine", "size", "build", "peak memory", "plugins", "warnings"))
    for entry in compilation.engines:
        for warning in entry.warnings:
            click.echo(f"{entry.name}: warning: {warning}")


def engine_rows(statuses: Sequence[EngineStatus]) -> list[tuple[str, ...]]:
    """A table's rows of what a bundle's engines are worth here."""
    return [
        (
            f"{status.entry.component} {status.entry.target}",
            human_bytes(status.entry.bytes),
            status.entry.precision + (", portable" if status.entry.portable else ""),
            f"{status.entry.flavour} {status.entry.version}",
            "yes" if status.is_built_here else "no",
            status.runs_on,
        )
        for status in statuses
    ]


ENGINE_HEADER = ("engine", "size", "precision", "TensorRT", "built here", "can run on")
