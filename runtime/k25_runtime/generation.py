"""Generating tokens: the loop, what it yields and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from k25_runtime.sampler import Sampler

Float32 = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GeneratedToken:
    """One new token. `text` is what it completes (empty inside a character, or where there is no tokenizer)."""

    id: int
    text: str
    logits: Float32


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The result: prompt and new token ids, the new text, why it ended, and what was asked for of the logits.

    `prompt_logits` [P, V] and `step_logits` [N, V] are float32, or None where logits were not kept.
    """

    prompt_ids: list[int]
    new_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_logits: Float32 | None = field(default=None, repr=False)
    step_logits: Float32 | None = field(default=None, repr=False)


def generated_tokens(
    decode: Callable[[int], Float32],
    last_logits: Float32,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[tuple[int, Float32, bool]]:
    """Yield (id, logits it was chosen from, whether it is the last); a stop id is yielded, then the loop ends.

    `decode` appends a token and returns the logits [V] after it.
    """
    logits = last_logits
    for remaining in range(max_new_tokens, 0, -1):
        token_id = sampler.choose(logits)
        is_last = token_id in stop_ids or remaining == 1
        yield token_id, logits, is_last
        if is_last:
            return
        logits = decode(token_id)


def finish_reason(new_ids: Sequence[int], stop_ids: frozenset[int]) -> FinishReason:
    """`stop` where the last token is a stop id, else `length`."""
    return "stop" if new_ids and new_ids[-1] in stop_ids else "length"
