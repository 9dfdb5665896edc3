"""Compile: the components of a bundle become engines, each for each target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_engines.build_job import Built, Failed, log_of_target
from k25_engines.child_processes import ChildLimits, run_jobs
from k25_engines.engine_key import BuiltWith, built_with, engine_key
from k25_engines.engine_options import EngineOptions
from k25_engines.engine_store import StagedEngine, install, reusable_engine, staging
from k25_engines.engine_units import EngineUnit, job_for_unit, units_from_manifest
from k25_engines.manifest import EngineEntry, Flavour, PluginBuild, engine_path, log_path, read_engine_manifest
from k25_engines.plugin_creators import library_sha256
from k25_engines.targets import TENSORRT, TENSORRT_RTX, Target, require_flavour, target_from_text
from k25_engines.tensorrt_module import (
    InstalledTensorRT,
    device_compute_capability,
    installed_tensorrt,
    parser_environment,
)
from k25_export.manifest import read_manifest
from k25_plugins.errors import BackendMissingError, InputError, K25Error, VerificationError
from k25_plugins.tensorrt_plugin_rules import NAMESPACE, PLUGIN_VERSION

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """The engines that were asked for, and which of them were built now."""

    engines: tuple[EngineEntry, ...]
    built: tuple[EngineEntry, ...]


def engines_from_bundle(
    bundle: Path,
    targets: Sequence[str],
    *,
    options: EngineOptions | None = None,
    components: Sequence[str] = (),
    fuse_decoder: bool = False,
    flavour: Flavour | None = None,
    plugin_library: Path | None = None,
    limits: ChildLimits | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Compilation:
    """Build each component for each target, or take the engine that is there and was made from the same inputs.

    `components` names some of them; with `fuse_decoder` also the fused decoder. Raises `K25Error` naming every
    component and target that could not be built; then the bundle is as before.
    """
    options = options or EngineOptions()
    chosen, installed = require_targets(targets, flavour)
    manifest = read_manifest(bundle)
    units = units_from_manifest(bundle, manifest, options, components=components, fuse_decoder=fuse_decoder)
    library = None if options.portable else plugin_library
    tools = built_with(installed, None if library is None else library_sha256(library))
    known = read_engine_manifest(bundle)
    kept: list[EngineEntry] = []
    missing: list[tuple[EngineUnit, Target]] = []
    for unit in units:
        for target in chosen:
            key = _key(tools, unit, target, options)
            found = reusable_engine(bundle, known, component=unit.name, target=target.name, key=key)
            if found is None:
                missing.append((unit, target))
            else:
                kept.append(found)
    built: list[EngineEntry] = []
    if missing:
        with staging(bundle) as folder:
            staged = _build(missing, folder, installed, tools, options, library, limits or ChildLimits(), progress)
            install(bundle, staged)
            built = [item.entry for item in staged]
    order = [(target.name, unit.name) for target in chosen for unit in units]
    engines = sorted([*kept, *built], key=lambda entry: order.index((entry.target, entry.component)))
    return Compilation(engines=tuple(engines), built=tuple(built))


def _build(
    missing: Sequence[tuple[EngineUnit, Target]],
    folder: Path,
    installed: InstalledTensorRT,
    tools: BuiltWith,
    options: EngineOptions,
    library: Path | None,
    limits: ChildLimits,
    progress: Progress,
) -> list[StagedEngine]:
    """One child process for each unit builds it for its targets; all of them, or `K25Error`."""
    units = {unit.name: unit for unit, _ in missing}
    jobs = [
        job_for_unit(
            unit,
            [target for other, target in missing if other.name == name],
            installed,
            portable=options.portable,
            plugin_library=library,
            output=folder / str(index),
        )
        for index, (name, unit) in enumerate(units.items())
    ]
    with tempfile.TemporaryDirectory(prefix="k25-engines-") as links:
        environment = parser_environment(installed, Path(links))
        results = run_jobs(jobs, limits=limits, environment=environment, progress=progress)
    _raise_failures([failure for result in results for failure in result.failed])
    return [
        _staged(units[job.component], engine, tools, options, library, Path(job.output))
        for job, result in zip(jobs, results, strict=True)
        for engine in result.built
    ]


def require_targets(
    targets: Sequence[str], flavour: Flavour | None = None
) -> tuple[tuple[Target, ...], InstalledTensorRT]:
    """The targets, each once, and the TensorRT that builds for all of them; nothing is imported.

    Raises `InputError` for a target that there cannot be, `BackendMissingError` for one that cannot be built here.
    """
    chosen = _targets(targets)
    return chosen, _installed_for(chosen, flavour)


def _targets(texts: Sequence[str]) -> tuple[Target, ...]:
    if not texts:
        raise InputError("compile: expected at least one target, such as sm120")
    return tuple({target.name: target for target in map(target_from_text, texts)}.values())


def _installed_for(targets: Sequence[Target], flavour: Flavour | None) -> InstalledTensorRT:
    """The TensorRT that builds for all of these targets."""
    try:
        installed = installed_tensorrt(flavour)
    except BackendMissingError:
        for target in targets:  # what could never be built here is said first
            if (flavour or TENSORRT_RTX) not in target.flavours:
                require_flavour(target, flavour or TENSORRT_RTX, device=None)
        raise
    device = device_compute_capability() if installed.flavour == TENSORRT else None
    for target in targets:
        require_flavour(target, installed.flavour, device=device)
    return installed


def _key(tools: BuiltWith, unit: EngineUnit, target: Target, options: EngineOptions) -> str:
    return engine_key(
        tools,
        component=unit.name,
        target=target.name,
        precision=options.precision,
        portable=options.portable,
        component_sha256=unit.component_sha256,
        profiles=unit.profiles,
    )


def _staged(
    unit: EngineUnit, engine: Built, tools: BuiltWith, options: EngineOptions, plugin_library: Path | None, output: Path
) -> StagedEngine:
    target = target_from_text(engine.target)
    plugins = PluginBuild(
        namespace=NAMESPACE,
        version=PLUGIN_VERSION,
        source_sha256=tools.plugin_source_sha256,
        layers=engine.plugin_layers,
        library=None if tools.library_sha256 is None or plugin_library is None else plugin_library.name,
        library_sha256=tools.library_sha256,
    )
    entry = EngineEntry(
        component=unit.name,
        target=target.name,
        compute_capabilities=(target.compute_capability,),
        path=engine_path(unit.name, target.name),
        bytes=engine.bytes,
        sha256=engine.sha256,
        precision=options.precision,
        portable=options.portable,
        flavour=tools.flavour,
        version=tools.version,
        layers=None if unit.layers is None else tuple(range(len(unit.layers))),
        inputs=unit.inputs,
        outputs=unit.outputs,
        aliases=unit.aliases,
        profiles=unit.profiles,
        plugins=None if options.portable or not engine.plugin_layers else plugins,
        component_sha256=unit.component_sha256,
        key=_key(tools, unit, target, options),
        build_seconds=engine.seconds,
        peak_memory_bytes=engine.peak_memory_bytes,
        checks=engine.checks,
        warnings=engine.warnings,
        log=log_path(unit.name, target.name),
    )
    log = output / f"{target.name}.log"
    log.write_text(log_of_target((output / "log").read_text("utf-8", "replace"), target.name), encoding="utf-8")
    return StagedEngine(entry=entry, file=output / f"{target.name}.engine", log=log)


def _raise_failures(failures: Sequence[Failed]) -> None:
    """One error of everything that failed, of the kind of the gravest."""
    if not failures:
        return
    kinds = {failure.kind for failure in failures}
    text = "\n".join(dict.fromkeys(failure.message for failure in failures))
    for kind, error in (("internal", K25Error), ("backend", BackendMissingError), ("verification", VerificationError)):
        if kind in kinds:
            raise error(text)
    raise InputError(text)
