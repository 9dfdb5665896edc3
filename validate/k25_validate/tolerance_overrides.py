"""Tolerances set from outside: by name, recorded in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from k25_plugins.errors import mismatch
from k25_validate.report_rows import Override
from k25_validate.tolerances import Tolerance

#: What can be overridden. Components take a layer as well: `moe_layer.3`.
COMPONENT_NAMES = ("embed", "dense_layer", "moe_layer", "head", "vision")
OTHER_NAMES = (
    *("gain", "choices", "router-weights", "ties", "logits", "kl", "perplexity", "tasks"),
    *("far-positions", "growth"),
)

Overrides = Mapping[str, float]


def override_from_text(text: str) -> tuple[str, float]:
    """`NAME=VALUE`; raises `InputError` for anything else, and for values below 0 or not finite."""
    name, separator, value = text.partition("=")
    known = (*COMPONENT_NAMES, *OTHER_NAMES)
    is_known = name in known or re.fullmatch(r"(dense_layer|moe_layer)\.(0|[1-9][0-9]{0,5})", name)
    if not separator or not is_known:
        raise mismatch(
            f"tolerance {text!r}",
            expected=f"NAME=VALUE, where NAME is one of {', '.join(known)}, or a layer as in moe_layer.3",
            found=repr(name),
        )
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise mismatch(f"tolerance {name}", expected="a number, 0 or more", found=repr(value))
    return name, number


def overridden(tolerance: Tolerance, overrides: Overrides, *, layer: int | None = None) -> Tolerance:
    """The tolerance, or with the value that was given for its name, or for its name and layer."""
    for name in (f"{tolerance.name}.{layer}", tolerance.name):
        if name in overrides:
            return replace(
                tolerance,
                value=overrides[name],
                default=tolerance.value,
                reason=f"given as --tolerance {name}={overrides[name]:g}; by default {tolerance.value:.3g}: "
                f"{tolerance.reason}",
            )
    return tolerance


def check_layers(overrides: Overrides, layers_of: Mapping[str, Collection[int]]) -> None:
    """Raise `InputError` for an override of a layer that the model does not have; `layers_of` are those of each
    kind.
    """
    for name in overrides:
        component, separator, layer = name.partition(".")
        if separator and int(layer) not in layers_of.get(component, ()):
            found = sorted(layers_of.get(component, ()))
            shown = f"layers {found[0]} to {found[-1]}" if found else "none"
            raise mismatch(f"tolerance {name}", expected=f"a layer that is a {component}", found=shown)


def recorded_overrides(overrides: Overrides, found: Mapping[str, list[Tolerance]]) -> tuple[Override, ...]:
    """One record for each override; `found` are the tolerances that it has replaced."""
    records = []
    for name, value in overrides.items():
        replaced = found.get(name, [])
        defaults = [tolerance.default for tolerance in replaced if tolerance.default is not None]
        records.append(
            Override(
                name=name,
                value=value,
                default=max(defaults, default=None),
                is_loosened=any(tolerance.is_loosened for tolerance in replaced),
            )
        )
    return tuple(records)
