"""A bisection's walk on disk, so that an interrupted one goes on where it was. Plain numpy arrays, no pickle."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from k25_plugins.whole_file import write_whole
from k25_validate.bisect_walk import BisectState, LocalError

STATE_NAME = ".bisect-state.npz"


def write_bisect_state(path: Path, state: BisectState, *, key: str) -> None:
    """Write the state, whole or not at all. `key` names the inputs that it belongs to."""
    facts = {
        "key": key,
        "next_layer": state.next_layer,
        "prompts": len(state.expected),
        "found": [asdict(local) for local in state.found],
    }
    arrays: dict[str, Any] = {f"expected_{index}": array for index, array in enumerate(state.expected)}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_bisect_state(path: Path, *, key: str) -> BisectState | None:
    """The state of these inputs, or None where there is none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if facts["key"] != key:
                return None
            return BisectState(
                next_layer=facts["next_layer"],
                expected=[arrays[f"expected_{index}"] for index in range(facts["prompts"])],
                found=[LocalError(**values) for values in facts["found"]],
            )
    except (OSError, KeyError, ValueError, TypeError, BadZipFile):
        return None  # absent or damaged: the walk starts again
