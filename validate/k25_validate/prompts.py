"""The token sequences that parity is checked on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from k25_runtime.bundle_files import BundleFiles
from k25_runtime.prompts import PromptBuilder
from k25_validate.media_samples import MediaSample

if TYPE_CHECKING:
    from k25_runtime.media import Media
    from k25_runtime.runtime import Runtime

DECODE_STEPS = 12
SPECIAL_IDS = 256  # the last ids of the vocabulary, with or without a name
_SHOWN_SPECIAL_IDS = 24
_CHAT = "Routers pick experts; 7 x 8 = 56. 路由器选择专家。"
_LANGUAGES = "Grüße, Привет, 世界, こんにちは, العالم, नमस्ते, สวัสดี, 한국어 🙂"
_CODE = 'def f(x: dict[str, int]) -> int:\n\treturn x["a"] ** 2 + 0x1F  # {}\n'


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedSample:
    """A picture among the tokens of a prompt: its tokens, all placeholders, start at `first_token`."""

    sample: MediaSample
    first_token: int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`prompt_ids` are run as one prefill, `next_ids` are then decoded one by one (taken as given, not chosen).

    `media` stand among the `prompt_ids`, which have a placeholder for each of their tokens. `is_passage`: a text whose
    perplexity is measured, run as one prefill only.
    """

    name: str
    prompt_ids: tuple[int, ...]
    next_ids: tuple[int, ...] = ()
    media: tuple[PlacedSample, ...] = ()
    is_passage: bool = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self.prompt_ids + self.next_ids

    @property
    def resumed_at(self) -> int | None:
        """Where the prompt is cut to go on over a cached prefix: in the middle, behind its media; None where it
        cannot.
        """
        media_end = max((placed.first_token + placed.sample.item.tokens for placed in self.media), default=0)
        cut = max(len(self.token_ids) // 2, media_end)
        return cut if 0 < cut < len(self.token_ids) and not self.is_passage else None

    def is_text(self) -> npt.NDArray[np.bool_]:
        """Mask [T] of the tokens that no picture stands for."""
        mask = np.ones(len(self.token_ids), bool)
        for placed in self.media:
            mask[placed.first_token : placed.first_token + placed.sample.item.tokens] = False
        return mask


def built_in_prompts(runtime: Runtime, samples: Sequence[MediaSample] = ()) -> tuple[Prompt, ...]:
    """The prompts of `prompts_for_bundle`, for a bundle that is open."""
    return prompts_for_bundle(runtime.files, samples)


def prompts_for_bundle(files: BundleFiles, samples: Sequence[MediaSample] = ()) -> tuple[Prompt, ...]:
    """What breaks, in few tokens: random ones, one, one repeated, special and tool tokens; with a tokenizer the chat
    template, many languages and code; with `samples` text around two pictures."""
    vocab = files.manifest.model.text.vocab_size
    random = np.random.default_rng(25)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(0, vocab, count))

    prompts = [
        Prompt(name="random tokens", prompt_ids=ids(40), next_ids=ids(DECODE_STEPS)),
        Prompt(name="one token", prompt_ids=ids(1), next_ids=ids(2)),
        Prompt(name="one token repeated", prompt_ids=ids(1) * 20, next_ids=ids(2)),
    ]
    if files.has_tokenizer:
        prompts.append(Prompt(name="chat text", prompt_ids=ids_of_text(files, _CHAT), next_ids=ids(2)))
        for name, text in (("many languages", _LANGUAGES), ("code", _CODE)):
            prompts.append(Prompt(name=name, prompt_ids=ids_of_text(files, text, raw=True), next_ids=ids(2)))
    if vocab > SPECIAL_IDS:
        special = _special_ids(files)
        mixed = tuple(token for pair in zip(special, ids(len(special)), strict=True) for token in pair)
        prompts.append(Prompt(name="special and tool tokens", prompt_ids=mixed, next_ids=special[:2]))
    if samples:
        placeholder = files.manifest.model.media_placeholder_token_id
        assert placeholder is not None
        pair = (samples[1], samples[-1])
        prompts.append(
            prompt_with_media(
                "text and pictures", pair, texts=(ids(5), ids(3), ids(4)), next_ids=ids(2), placeholder=placeholder
            )
        )
    return tuple(prompts)


def ids_of_text(files: BundleFiles, text: str, *, raw: bool = False) -> tuple[int, ...]:
    """Token ids of a text, through the chat template unless `raw`. Raises `InputError` without a tokenizer."""
    return tuple(PromptBuilder(files, _no_media).from_text(text, None, raw=raw).token_ids)


def _no_media() -> Media:
    raise AssertionError("texts hold no media")


def _special_ids(files: BundleFiles) -> tuple[int, ...]:
    """Special ids that have a name, as in tool calls; without a tokenizer the first of all. No placeholder of media."""
    model = files.manifest.model
    ids: Sequence[int] = range(model.text.vocab_size - SPECIAL_IDS, model.text.vocab_size)
    if files.has_tokenizer:
        ids = [token for name, token in files.tokenizer.special_ids.items() if "reserved_token" not in name]
    return tuple(token for token in ids if token != model.media_placeholder_token_id)[:_SHOWN_SPECIAL_IDS]


def prompt_with_media(
    name: str,
    samples: Sequence[MediaSample],
    *,
    texts: Sequence[tuple[int, ...]],
    next_ids: tuple[int, ...],
    placeholder: int,
) -> Prompt:
    """Texts with a picture between each and the next: one text more than there are samples."""
    ids = texts[0]
    placed = []
    for sample, text in zip(samples, texts[1:], strict=True):
        placed.append(PlacedSample(sample=sample, first_token=len(ids)))
        ids += (placeholder,) * sample.item.tokens + text
    return Prompt(name=name, prompt_ids=ids, next_ids=next_ids, media=tuple(placed))
