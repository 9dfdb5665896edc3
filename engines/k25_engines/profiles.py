"""Optimisation profiles from the axis names of a component's inputs: one line for each axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from k25_engines.engine_options import MAX_FRAMES, Limits
from k25_engines.manifest import PROFILE_NAMES, Profile
from k25_export.manifest import Port
from k25_plugins.errors import mismatch

#: (smallest, usual, largest)
Range = tuple[int, int, int]

PLUS_ONE = " + 1"


def _same(low: int, usual: int, high: int) -> tuple[Range, Range]:
    return (low, usual, high), (low, usual, high)


#: Axis -> its range in the profiles of `PROFILE_NAMES`. An axis `<name> + 1` follows from `<name>`.
AXES: Mapping[str, Callable[[Limits], tuple[Range, Range]]] = {
    "tokens": lambda its: ((1, its.max_sequences, its.max_sequences), (1, its.max_tokens, its.max_tokens)),
    "sequences": lambda its: ((1, its.max_sequences, its.max_sequences), (1, 1, its.max_sequences)),
    "rows": lambda its: ((1, its.max_sequences, its.max_sequences), (1, 1, its.max_rows)),
    "block_size": lambda its: _same(its.block_size, its.block_size, its.block_size),
    "blocks": lambda its: _same(1, its.blocks, its.blocks),
    "blocks_per_sequence": lambda its: _same(1, its.blocks_per_sequence, its.blocks_per_sequence),
    "expert_rows": lambda its: _same(1, its.expert_rows, its.max_expert_rows),
    "patches": lambda its: _same(1, min(1024, its.max_patches), its.max_patches),
    "media_tokens": lambda its: _same(1, min(256, its.max_patches // 4), its.max_patches // 4),
    "frames": lambda its: _same(1, 1, MAX_FRAMES),
}


def profiles_for(component: str, inputs: Sequence[Port], limits: Limits) -> tuple[Profile, ...]:
    """The profiles of a component: `decode` and `prefill`, or `prefill` alone where they would be the same.

    None where no input has a dynamic axis. Raises `InputError` for an axis that has no line in `AXES`.
    """
    profiles = []
    for index, name in enumerate(PROFILE_NAMES):
        shapes = {
            port.name: _shapes([_range(component, port.name, axis, limits)[index] for axis in port.shape])
            for port in inputs
            if any(isinstance(axis, str) for axis in port.shape)
        }
        profiles.append(Profile(name=name, shapes=shapes))
    if not profiles[0].shapes:
        return ()
    return tuple(profiles[1:] if profiles[0].shapes == profiles[1].shapes else profiles)


def _shapes(ranges: Sequence[Range]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    low, usual, high = zip(*ranges, strict=True)
    return low, usual, high


def _range(component: str, port: str, axis: int | str, limits: Limits) -> tuple[Range, Range]:
    if isinstance(axis, int):
        return _same(axis, axis, axis)
    name = axis.removesuffix(PLUS_ONE)
    if name not in AXES:
        raise mismatch(f"component {component}: input {port}: axis", expected=" or ".join(AXES), found=repr(axis))
    more = 1 if axis.endswith(PLUS_ONE) else 0
    (a, b, c), (d, e, f) = AXES[name](limits)
    return (a + more, b + more, c + more), (d + more, e + more, f + more)
