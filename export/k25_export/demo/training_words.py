"""What the demo tokenizer is trained on: the words of `corpus.txt`, then as many invented words as are needed.

The words of the corpus weigh more than all invented words, so that real text is joined first and the low ranks
look like those of a real tokenizer. Nothing here depends on the seed of a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib import resources

import numpy as np
import regex  # type: ignore[import-untyped]  # the standard `re` has no script classes

from k25_export.tokenizer_pattern import KIMI_PATTERN

_ONSETS = ("", *"bcdfghklmnprstvz", "br", "ch", "dr", "gl", "qu", "st")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "l", "m", "n", "nd", "r", "s", "st", "t")
_SYLLABLES = tuple(onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS)


def training_words(token_count: int) -> dict[bytes, int]:
    """Weighted words, UTF-8, that are enough to train `token_count` tokens."""
    counts = Counter(pieces(resources.files(__package__).joinpath("corpus.txt").read_text("utf-8")))
    weight = 4 * token_count  # more often than any pair of letters can occur in the invented words
    words = {word.encode(): count * weight for word, count in counts.items()}
    # An invented word has two to four syllables, so that each gives about two tokens, and at least its own.
    for word in _invented_words(token_count // 2):
        words.setdefault(b" " + word.encode(), 1)
    return words


def pieces(text: str) -> list[str]:
    """The pre-tokens of a text: no token crosses the border of a piece."""
    found: list[str] = regex.findall(KIMI_PATTERN, text, regex.VERSION1)
    return found


def _invented_words(count: int) -> Iterator[str]:
    """`count` different pronounceable words of two to four syllables, always the same."""
    generator = np.random.PCG64(25)
    seen: set[str] = set()
    while len(seen) < count:
        length, *choices = (int(raw) for raw in generator.random_raw(5))
        word = "".join(_SYLLABLES[choice % len(_SYLLABLES)] for choice in choices[: 2 + length % 3])
        if word not in seen:
            seen.add(word)
            yield word
