"""`BUNDLE/engines/engines.json`: what was built, from what, for what (`docs/engines.md`). Standard library only.

The contract between the engine builder and whoever runs engines. An engine is found by (component, target); its file
is `engines/<target>/<component>.engine`, its log stands beside it. Engines are not byte-identical from build to build,
so they are identified by `key`, the hash of everything that decides them, and guarded by `sha256`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from k25_export.manifest import (
    Port,
    Precision,
    built_value,
    is_plain_file_name,
    json_object,
    plain_value,
    pretty_json,
)
from k25_plugins.errors import InputError, mismatch

FORMAT = "k25-engines"
SCHEMA_VERSION = 1
ENGINES_FOLDER = "engines"
MANIFEST_PATH = f"{ENGINES_FOLDER}/engines.json"

#: The fused decoder: every layer of the model in one engine.
DECODER = "decoder"

#: The optimisation profiles of an engine, in the order of their index in TensorRT.
PROFILE_NAMES = ("decode", "prefill")

Flavour = Literal["tensorrt-rtx", "tensorrt"]
Shape = tuple[int, ...]

_TARGET = re.compile(r"sm[1-9]\d{1,2}", re.ASCII)
_CAPABILITY = re.compile(r"[1-9]\d?\.\d", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimisation profile: for each input with a dynamic axis its smallest, usual and largest shape.

    `name` is `decode` or `prefill`; the place in the list is the profile's index.
    """

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True, kw_only=True)
class PluginBuild:
    """The plugin creators that were registered when the engine was built, and how many layers they made.

    `source_sha256` is over the Python creators and the signature table. `library` and `library_sha256` name the shared
    library where that was used instead. An engine runs with either: names, version and serialised fields agree.
    """

    namespace: str
    version: str
    source_sha256: str
    layers: dict[str, int]
    library: str | None = None
    library_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine file.

    `component` is a component of the bundle, or `decoder`: then `layers` are the layers in it, in order, and an input
    of layer n is named `layers.<n>.<input>`, but for those that all layers share (`docs/engines.md`).
    `aliases` maps an output to the input whose memory it is: bind one address to both. A `portable` engine is made of
    the ops' function bodies, has no plugins and no aliases: its `cache_out` must be bound to a second cache.
    `component_sha256` has the graphs it was made from, by component. `checks` is what was found without a GPU.
    """

    component: str
    target: str
    compute_capabilities: tuple[str, ...]
    path: str
    bytes: int
    sha256: str
    precision: Precision
    portable: bool
    flavour: Flavour
    version: str
    layers: tuple[int, ...] | None = None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: dict[str, str]
    profiles: tuple[Profile, ...]
    plugins: PluginBuild | None = None
    component_sha256: dict[str, str]
    key: str
    build_seconds: float
    peak_memory_bytes: int
    checks: dict[str, str]
    warnings: tuple[str, ...] = ()
    log: str

    @property
    def name(self) -> str:
        """How messages name it: `moe_layer for sm120`."""
        return f"{self.component} for {self.target}"

    def profile_index(self, name: str) -> int:
        """The index in TensorRT of the profile of this name, or `InputError`."""
        names = [profile.name for profile in self.profiles]
        if name not in names:
            raise mismatch(f"engine {self.name}: profiles", expected=name, found=names)
        return names.index(name)

    def runs_on(self, compute_capability: str) -> bool:
        """Whether it was built for a GPU of this compute capability ("12.0")."""
        return compute_capability in self.compute_capabilities


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """The whole of `engines.json`, but for the constants `format` and `schema_version`."""

    engines: tuple[EngineEntry, ...] = ()

    def find(self, component: str, target: str) -> EngineEntry | None:
        """The engine of this component for this target, if there is one."""
        return next((entry for entry in self.engines if entry.component == component and entry.target == target), None)

    def engine(self, component: str, target: str) -> EngineEntry:
        """The engine of this component for this target, or `InputError` that says how to build it."""
        found = self.find(component, target)
        if found is None:
            have = ", ".join(entry.name for entry in self.engines) or "none"
            hint = f"`k25-export compile BUNDLE --target {target}` builds it."
            raise mismatch("bundle: engines", expected=f"{component} for {target}", found=have, hint=hint)
        return found

    def targets(self, compute_capability: str | None = None) -> tuple[str, ...]:
        """The targets that there are engines for; only those that run on this compute capability where one is given."""
        entries = [entry for entry in self.engines if compute_capability is None or entry.runs_on(compute_capability)]
        return tuple(dict.fromkeys(entry.target for entry in entries))

    def without(self, places: set[tuple[str, str]]) -> EngineManifest:
        """The manifest without the engines of these (component, target)."""
        return EngineManifest(
            engines=tuple(entry for entry in self.engines if (entry.component, entry.target) not in places)
        )

    def merged(self, entries: tuple[EngineEntry, ...]) -> EngineManifest:
        """The manifest with these engines, which replace those of the same component and target; sorted."""
        kept = self.without({(entry.component, entry.target) for entry in entries}).engines
        return EngineManifest(engines=tuple(sorted(kept + entries, key=_order)))


def engine_path(component: str, target: str) -> str:
    """The place of an engine in the bundle."""
    return f"{ENGINES_FOLDER}/{target}/{component}.engine"


def log_path(component: str, target: str) -> str:
    """The place of a build's log in the bundle."""
    return f"{ENGINES_FOLDER}/{target}/{component}.log"


def engine_manifest_to_json(manifest: EngineManifest) -> str:
    """The text of `engines.json`."""
    head: dict[str, Any] = {"format": FORMAT, "schema_version": SCHEMA_VERSION}
    return pretty_json(head | plain_value(manifest)) + "\n"


def engine_manifest_from_json(text: str | bytes, *, where: str = MANIFEST_PATH) -> EngineManifest:
    """Parse and check `engines.json`. Raises `InputError` for bad JSON, unknown keys, versions, paths or profiles."""
    values = json_object(text, where=where)
    version = values.get("schema_version")
    if values.get("format") != FORMAT:
        raise mismatch(f"{where}: format", expected=repr(FORMAT), found=repr(values.get("format")))
    if type(version) is not int or version != SCHEMA_VERSION:
        hint = "Compile the bundle again with this version of k25-export."
        raise mismatch(f"{where}: schema_version", expected=SCHEMA_VERSION, found=repr(version), hint=hint)
    body = {key: value for key, value in values.items() if key not in ("format", "schema_version")}
    manifest: EngineManifest = built_value(EngineManifest, body, where)
    for entry in manifest.engines:
        _check(entry, f"{where}: engine {entry.name}")
    places = [(entry.component, entry.target) for entry in manifest.engines]
    twice = [place for place in places if places.count(place) > 1]
    if twice:
        raise mismatch(f"{where}: engines", expected="each component once a target", found=f"{twice[0]} twice")
    return manifest


def read_engine_manifest(bundle: Path) -> EngineManifest:
    """The engines of a bundle; an empty manifest where none were built. `InputError` where it cannot be used."""
    path = bundle / MANIFEST_PATH
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return EngineManifest()
    except OSError as error:
        raise InputError(f"bundle {bundle}: cannot read {MANIFEST_PATH}: {error.strerror or 'unreadable'}") from error
    return engine_manifest_from_json(text, where=str(path))


def read_engine_file(bundle: Path, entry: EngineEntry) -> bytes:
    """The engine's bytes; `InputError` where the file is missing or is not the one that was built."""
    where = f"bundle {bundle}: engine {entry.name}: {entry.path}"
    hint = f"Build it again: k25-export compile {bundle} --target {entry.target}"
    try:
        data = (bundle / entry.path).read_bytes()
    except OSError as error:
        raise mismatch(where, expected="a file", found=error.strerror or "unreadable", hint=hint) from error
    if len(data) != entry.bytes:
        raise mismatch(where, expected=f"{entry.bytes} bytes", found=len(data), hint=hint)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise mismatch(f"{where}: SHA-256", expected=entry.sha256, found=digest, hint=hint)
    return data


def with_file(entry: EngineEntry, data: bytes) -> EngineEntry:
    """The entry with size and hash of these bytes."""
    return replace(entry, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _order(entry: EngineEntry) -> tuple[int, str]:
    return int(entry.target.removeprefix("sm")), entry.component


def _check(entry: EngineEntry, where: str) -> None:
    if not is_plain_file_name(entry.component):
        raise mismatch(f"{where}: component", expected="a plain name", found=repr(entry.component))
    if not _TARGET.fullmatch(entry.target):
        raise mismatch(f"{where}: target", expected="a name such as sm120", found=repr(entry.target))
    paths = {"path": engine_path(entry.component, entry.target), "log": log_path(entry.component, entry.target)}
    for key, path in paths.items():
        if getattr(entry, key) != path:
            raise mismatch(f"{where}: {key}", expected=path, found=repr(getattr(entry, key)))
    for capability in entry.compute_capabilities:
        if not _CAPABILITY.fullmatch(capability):
            raise mismatch(f"{where}: compute_capabilities", expected="such as 12.0", found=repr(capability))
    if not entry.compute_capabilities:
        raise mismatch(f"{where}: compute_capabilities", expected="at least one", found="none")
    for key, digest in {"sha256": entry.sha256, "key": entry.key, **entry.component_sha256}.items():
        if not _SHA256.fullmatch(digest):
            raise mismatch(f"{where}: {key}", expected="64 hexadecimal digits", found=repr(digest))
    if entry.bytes <= 0 or entry.peak_memory_bytes < 0 or entry.build_seconds < 0:
        raise mismatch(where, expected="sizes and times that are not negative", found="others")
    _check_aliases(entry, where)
    for index, profile in enumerate(entry.profiles):
        _check_profile(profile, entry, f"{where}: profile {index}")


def _check_aliases(entry: EngineEntry, where: str) -> None:
    inputs = {port.name: port for port in entry.inputs}
    outputs = {port.name: port for port in entry.outputs}
    if len(inputs) != len(entry.inputs) or len(outputs) != len(entry.outputs):
        raise mismatch(where, expected="each input and output once", found="a name twice")
    if entry.portable and (entry.aliases or entry.plugins is not None):
        raise mismatch(where, expected="no aliases and no plugins in a portable engine", found="some")
    for output, source in entry.aliases.items():
        if output not in outputs or source not in inputs:
            raise mismatch(f"{where}: aliases", expected="an output and an input", found=f"{output}: {source}")
        if (outputs[output].dtype, outputs[output].shape) != (inputs[source].dtype, inputs[source].shape):
            raise mismatch(f"{where}: aliases", expected=f"{output} like {source}", found="another dtype or shape")


def _check_profile(profile: Profile, entry: EngineEntry, where: str) -> None:
    if profile.name not in PROFILE_NAMES:
        raise mismatch(f"{where}: name", expected=" or ".join(PROFILE_NAMES), found=repr(profile.name))
    shapes = {port.name: port.shape for port in entry.inputs}
    dynamic = {name for name, shape in shapes.items() if any(isinstance(axis, str) for axis in shape)}
    if profile.shapes.keys() != dynamic:
        found = sorted(profile.shapes.keys() ^ dynamic)
        raise mismatch(where, expected="the inputs with a dynamic axis", found=f"a difference in {found[0]}")
    for name, ranges in profile.shapes.items():
        for axis, values in zip(shapes[name], zip(*ranges, strict=False), strict=False):
            low, usual, high = values
            is_ordered = 0 <= low <= usual <= high
            if not is_ordered or (isinstance(axis, int) and {low, usual, high} != {axis}):
                raise mismatch(f"{where}: {name}: axis {axis}", expected="min <= opt <= max", found=list(values))
        if {len(shape) for shape in ranges} != {len(shapes[name])}:
            raise mismatch(f"{where}: {name}", expected=f"{len(shapes[name])} axes", found=ranges)
