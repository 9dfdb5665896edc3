"""Does an engine fit the bundle, and which steps fit the engine? Every mismatch is found before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from k25_engines.manifest import EngineEntry
from k25_export.manifest import ComponentEntry, Port
from k25_plugins.errors import InputError, mismatch
from k25_runtime.device import DeviceEngine, Shape
from k25_runtime.step_limits import NO_LIMIT, Range, StepLimits


def check_entry(entry: EngineEntry, component: ComponentEntry, bundle: Path) -> None:
    """The engine was made from the graph that the bundle has now."""
    file = component.file(entry.precision)
    where = f"bundle {bundle}: engine {entry.name}"
    hint = f"The bundle has changed since: k25-export compile {bundle} --target {entry.target}"
    made_from = entry.component_sha256.get(component.name)
    if made_from != file.sha256:
        raise mismatch(
            f"{where}: made from the {entry.precision} graph", expected=file.sha256, found=made_from, hint=hint
        )
    for kind, expected, found in (("input", file.inputs, entry.inputs), ("output", file.outputs, entry.outputs)):
        wanted, have = {port.name: port for port in expected}, {port.name: port for port in found}
        for name in wanted.keys() | have.keys():
            if wanted.get(name) != have.get(name):
                raise mismatch(
                    f"{where}: {kind} {name}",
                    expected=_words(wanted.get(name)),
                    found=_words(have.get(name)),
                    hint=hint,
                )


def check_engine(entry: EngineEntry, engine: DeviceEngine) -> None:
    """The loaded engine is what `engines.json` says: names, dtypes, axes, profiles and aliases."""
    where = f"engine {entry.name}"
    hint = "engines.json and the engine do not belong together: compile again."
    found = {(port.name, port.is_input): port for port in engine.ports}
    expected = {(port.name, True): port for port in entry.inputs} | {(port.name, False): port for port in entry.outputs}
    for (name, is_input), port in expected.items():
        label = f"{where}: {'input' if is_input else 'output'} {name}"
        have = found.pop((name, is_input), None)
        if have is None:
            raise mismatch(label, expected=_words(port), found="none in the engine", hint=hint)
        shape = tuple(axis if isinstance(axis, int) else -1 for axis in port.shape)
        if have.dtype != port.dtype or not _shape_fits(shape, have.shape):
            raise mismatch(label, expected=_words(port), found=f"{have.dtype} {list(have.shape)}", hint=hint)
    if found:
        raise mismatch(where, expected="no further tensors", found=sorted(name for name, _ in found), hint=hint)
    if engine.profiles != max(len(entry.profiles), 1):
        raise mismatch(f"{where}: profiles", expected=max(len(entry.profiles), 1), found=engine.profiles, hint=hint)
    for index, profile in enumerate(entry.profiles):
        for name, shapes in profile.shapes.items():
            have_shapes = engine.profile_shapes(name, index)
            if have_shapes != shapes:
                label = f"{where}: profile {profile.name}: {name}"
                raise mismatch(label, expected=shapes, found=have_shapes, hint=hint)
    for port in entry.outputs:
        alias = engine.aliased_input(port.name)  # not told for a plugin's output by every version: None proves nothing
        if alias is not None and alias != entry.aliases.get(port.name):
            label = f"{where}: output {port.name}"
            raise mismatch(label, expected=f"the memory of {entry.aliases.get(port.name)}", found=alias, hint=hint)


def profile_for(entry: EngineEntry, shapes: Mapping[str, Shape], *, label: str) -> int:
    """The first profile (decode before prefill) that all shapes fit; `InputError` names what fits none."""
    if not entry.profiles:
        return 0
    misfits = []
    for index, profile in enumerate(entry.profiles):
        misfit = next((name for name, shape in shapes.items() if not _in_profile(entry, index, name, shape)), None)
        if misfit is None:
            return index
        low, _, high = profile.shapes.get(misfit, (_fixed(entry, misfit),) * 3)
        misfits.append(f"{misfit} {list(shapes[misfit])} not in {list(low)}..{list(high)} of {profile.name}")
    raise InputError(
        f"{label}: expected shapes inside a profile of engine {entry.name}, found {'; '.join(misfits)}. "
        "Run smaller steps or a smaller context, or compile with larger profiles."
    )


def check_weight(entry: EngineEntry, name: str, dtype: str, shape: Shape, *, label: str) -> None:
    """A weight fits its input in at least one profile."""
    port = next((port for port in entry.inputs if port.name == name), None)
    if port is None:
        raise mismatch(f"{label}: input {name}", expected="an input of the engine", found="none of this name")
    if port.dtype != dtype:
        raise mismatch(f"{label}: input {name}", expected=port.dtype, found=dtype)
    if not any(_in_profile(entry, index, name, shape) for index in range(max(len(entry.profiles), 1))):
        ranges = [profile.shapes.get(name) for profile in entry.profiles]
        expected = f"{list(port.shape)}, profiles {ranges}" if any(ranges) else list(port.shape)
        raise mismatch(f"{label}: input {name}", expected=expected, found=list(shape))


def step_limits(entries: Iterable[EngineEntry]) -> StepLimits:
    """The widest range of each axis over the profiles of an engine, narrowed to what every engine takes."""
    ranges: dict[str, Range] = {}
    for entry in entries:
        for axis, (low, high) in _axis_ranges(entry).items():
            known = ranges.get(axis, (0, NO_LIMIT))
            ranges[axis] = (max(low, known[0]), min(high, known[1]))
    return StepLimits(ranges=ranges)


def _axis_ranges(entry: EngineEntry) -> dict[str, Range]:
    ports = {port.name: port for port in entry.inputs}
    found: dict[str, Range] = {}
    for profile in entry.profiles:
        for name, (low, _, high) in profile.shapes.items():
            for axis, smallest, largest in zip(ports[name].shape, low, high, strict=True):
                if isinstance(axis, str):
                    known = found.get(axis, (smallest, largest))
                    found[axis] = (min(smallest, known[0]), max(largest, known[1]))
    return found


def _in_profile(entry: EngineEntry, profile: int, name: str, shape: Shape) -> bool:
    ranges = entry.profiles[profile].shapes.get(name) if entry.profiles else None
    if ranges is None:
        return shape == _fixed(entry, name)
    low, _, high = ranges
    return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _fixed(entry: EngineEntry, name: str) -> Shape:
    port = next(port for port in entry.inputs if port.name == name)
    return tuple(axis for axis in port.shape if isinstance(axis, int))


def _shape_fits(expected: Shape, found: Shape) -> bool:
    """A dynamic axis of the graph may have become fixed in the engine's outputs, never the other way."""
    return len(expected) == len(found) and all(want in (-1, have) for want, have in zip(expected, found, strict=True))


def _words(port: Port | None) -> str:
    return "none" if port is None else f"{port.dtype} {list(port.shape)}"
