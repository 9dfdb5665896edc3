"""`--save-logits`: what a generation was chosen from, as one .npz file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k25_plugins.whole_file import write_whole


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
    buffer = io.BytesIO()
    np.savez(buffer, token_ids=token_ids, prompt_logits=prompt_logits, step_logits=step_logits)
    write_whole(path, buffer.getvalue())
