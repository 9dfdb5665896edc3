"""A walk's state on disk, so that an interrupted validation goes on where it was. Plain numpy arrays, no pickle."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from k25_plugins.whole_file import write_whole
from k25_validate.metrics import TensorComparison
from k25_validate.parity_walk import ComponentParity, WalkState

STATE_NAME = ".walk-state.npz"

_ARRAYS = ("batched", "expected_load", "actual_load")
_LISTS = ("expected", "own", "decoded", "resumed", "kept")


def write_state(path: Path, state: WalkState, *, key: str) -> None:
    """Write the state, whole or not at all. `key` names the inputs that it belongs to."""
    arrays: dict[str, Any] = {name: getattr(state, name) for name in _ARRAYS}
    for name in _LISTS:
        arrays |= {f"{name}_{index}": array for index, array in enumerate(getattr(state, name))}
    facts = {
        "key": key,
        "next_layer": state.next_layer,
        "prompts": len(state.kept),
        "components": [asdict(component) for component in state.components],
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_state(path: Path, *, key: str) -> WalkState | None:
    """The state of these inputs, or None where there is none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if facts["key"] != key:
                return None
            count = range(facts["prompts"])
            lists = {name: [arrays[f"{name}_{index}"] for index in count] for name in _LISTS}
            fields: dict[str, Any] = {**lists, **{name: arrays[name] for name in _ARRAYS}}
            components = [_component(values) for values in facts["components"]]
            return WalkState(next_layer=facts["next_layer"], components=components, **fields)
    except (OSError, KeyError, ValueError, TypeError, BadZipFile):
        return None  # absent or damaged: the walk starts again


def _component(values: dict[str, Any]) -> ComponentParity:
    local = TensorComparison(**{**values["local"], "worst_index": tuple(values["local"]["worst_index"])})
    return ComponentParity(**{**values, "local": local})
