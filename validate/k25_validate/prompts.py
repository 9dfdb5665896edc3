"""The token sequences that parity is checked on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from k25_runtime.runtime import Runtime

DECODE_STEPS = 12
_TEXT = "Routers pick experts; 7 x 8 = 56. 路由器选择专家。 def f(x): return x + 1"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`prompt_ids` are run as one prefill, `next_ids` are then decoded one by one (taken as given, not chosen)."""

    name: str
    prompt_ids: tuple[int, ...]
    next_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self.prompt_ids + self.next_ids


def built_in_prompts(runtime: Runtime) -> tuple[Prompt, ...]:
    """Random tokens, one token, one token repeated, and text through the chat template where there is a tokenizer."""
    vocab = runtime.manifest.model.text.vocab_size
    random = np.random.default_rng(25)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(0, vocab, count))

    prompts = [
        Prompt(name="random tokens", prompt_ids=ids(40), next_ids=ids(DECODE_STEPS)),
        Prompt(name="one token", prompt_ids=ids(1), next_ids=ids(2)),
        Prompt(name="one token repeated", prompt_ids=ids(1) * 20, next_ids=ids(2)),
    ]
    if runtime.files.has_tokenizer:
        text = tuple(runtime.prompt_ids(_TEXT))
        prompts.append(Prompt(name="chat text", prompt_ids=text, next_ids=ids(2)))
    return tuple(prompts)
