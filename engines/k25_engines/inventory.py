"""What engines a bundle has and what they are worth here: whether intact, whether up to date, for which GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from k25_engines.engine_key import built_with, engine_key
from k25_engines.manifest import EngineEntry, read_engine_file, read_engine_manifest
from k25_engines.targets import TARGETS
from k25_engines.tensorrt_module import InstalledTensorRT, installed_tensorrt
from k25_export.manifest import Manifest
from k25_plugins.errors import BackendMissingError, InputError


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """One engine: `problem` says what is wrong with its file; `stale` why compiling now would build it again."""

    entry: EngineEntry
    problem: str | None
    stale: str | None
    runs_on: str

    @property
    def is_built_here(self) -> bool:
        """Whether its key is what this machine would build now, and its file is intact."""
        return self.problem is None and self.stale is None


def engine_statuses(bundle: Path, manifest: Manifest) -> tuple[EngineStatus, ...]:
    """The engines that `engines.json` records. Raises `InputError` where it cannot be used; needs no TensorRT."""
    return tuple(_status(bundle, manifest, entry) for entry in read_engine_manifest(bundle).engines)


def _status(bundle: Path, manifest: Manifest, entry: EngineEntry) -> EngineStatus:
    problem = None
    try:
        read_engine_file(bundle, entry)
    except InputError as error:
        problem = str(error)
    return EngineStatus(entry=entry, problem=problem, stale=_stale(manifest, entry), runs_on=_runs_on(entry))


def _stale(manifest: Manifest, entry: EngineEntry) -> str | None:
    graphs = _graphs(manifest, entry)
    if graphs != entry.component_sha256:
        return "made from other components than the bundle has now"
    try:
        installed = installed_tensorrt(entry.flavour)
    except BackendMissingError as error:
        return str(error)
    if installed.version != entry.version:
        return f"built with {entry.flavour} {entry.version}, this machine has {installed.version}"
    if _key(installed, entry, graphs) != entry.key:
        return "built by other plugin or builder code than is installed"
    return None


def _graphs(manifest: Manifest, entry: EngineEntry) -> dict[str, str]:
    """The SHA-256 that the bundle's components have now, of those that the engine was made from."""
    found = {}
    for component in manifest.components:
        for file in component.files:
            if component.name in entry.component_sha256 and file.precision == entry.precision:
                found[component.name] = file.sha256
    return found


def _key(installed: InstalledTensorRT, entry: EngineEntry, graphs: dict[str, str]) -> str:
    library = entry.plugins.library_sha256 if entry.plugins is not None else None
    return engine_key(
        built_with(installed, library),
        component=entry.component,
        target=entry.target,
        precision=entry.precision,
        portable=entry.portable,
        component_sha256=graphs,
        profiles=entry.profiles,
    )


def _runs_on(entry: EngineEntry) -> str:
    gpus = {target.compute_capability: target.gpus for target in TARGETS.values()}
    return "; ".join(
        f"{capability} ({gpus[capability]})" if capability in gpus else capability
        for capability in entry.compute_capabilities
    )
