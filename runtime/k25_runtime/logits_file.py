"""`--save-logits`: what a generation was chosen from, as one .npz file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import InputError


def save_logits(
    path: Path,
    *,
    token_ids: npt.NDArray[np.int64],
    prompt_logits: npt.NDArray[np.float32],
    step_logits: npt.NDArray[np.float32],
) -> None:
    """Write `token_ids` [P + N], `prompt_logits` [P, V] and `step_logits` [N, V].

    Row i of `step_logits` is what new token i was chosen from, so row 0 equals the last row of `prompt_logits`.
    Written whole or not at all.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, token_ids=token_ids, prompt_logits=prompt_logits, step_logits=step_logits)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
