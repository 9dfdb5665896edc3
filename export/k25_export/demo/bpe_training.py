"""Byte-pair training: from counted words to ranked tokens, as tiktoken reads them.

The usual greedy algorithm (Sennrich et al., arXiv 1508.07909, on bytes): join the most frequent pair of
neighbouring tokens, give the result the next rank, repeat. Counts are kept up to date instead of recounted, and
equal counts are decided by rank, so that the result depends on nothing but the counts given.
"""

from __future__ import annotations

import heapq
from base64 import b64encode
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from k25_plugins.errors import mismatch

_Pair = tuple[int, int]
BYTE_TOKENS = 256


def train_byte_pairs(word_counts: Mapping[bytes, int], token_count: int) -> list[bytes]:
    """Tokens in the order of their ranks: the 256 bytes by value, then joined pairs, `token_count` in all.

    `word_counts` are the pieces that no token may cross, with their weights (positive). Raises `InputError` if
    fewer than 256 tokens are asked for, or more than the words can give.
    """
    if token_count < BYTE_TOKENS:
        raise mismatch("byte-pair vocabulary", expected=f"at least {BYTE_TOKENS} tokens", found=token_count)
    trainer = _Trainer(word_counts)
    while len(trainer.tokens) < token_count:
        pair = trainer.most_frequent_pair()
        if pair is None:
            raise mismatch(
                "byte-pair vocabulary",
                expected=f"words that give {token_count} tokens",
                found=f"{len(trainer.tokens)} tokens",
                hint="Train on more text.",
            )
        trainer.join(pair)
    return trainer.tokens


def tiktoken_lines(tokens: Sequence[bytes]) -> bytes:
    """The content of a `tiktoken.model` file: a line `base64 rank` for each token."""
    return b"".join(b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


class _Trainer:
    """Words as lists of token ids, with the count and the places of every pair of neighbours."""

    def __init__(self, word_counts: Mapping[bytes, int]) -> None:
        self.tokens = [bytes([value]) for value in range(BYTE_TOKENS)]
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        self._words = [list(word) for word in word_counts]
        self._counts = list(word_counts.values())
        self._pair_counts: defaultdict[_Pair, int] = defaultdict(int)
        self._pair_words: defaultdict[_Pair, set[int]] = defaultdict(set)
        for index, (word, count) in enumerate(zip(self._words, self._counts, strict=True)):
            for pair in pairwise(word):
                self._pair_counts[pair] += count
                self._pair_words[pair].add(index)
        # Entries whose count is no longer the pair's own are skipped when they come up.
        self._heap = [(-count, pair) for pair, count in self._pair_counts.items()]
        heapq.heapify(self._heap)

    def most_frequent_pair(self) -> _Pair | None:
        """The pair to join next; of equal counts the one of lowest ranks. None when every word is one token."""
        while self._heap:
            count, pair = heapq.heappop(self._heap)
            if self._pair_counts.get(pair) == -count:
                return pair
        return None

    def join(self, pair: _Pair) -> None:
        """Replace the pair everywhere by one token, which is new unless other pairs gave the same bytes before."""
        joined = self.tokens[pair[0]] + self.tokens[pair[1]]
        token = self._ids.setdefault(joined, len(self.tokens))
        if token == len(self.tokens):
            self.tokens.append(joined)
        changes: defaultdict[_Pair, int] = defaultdict(int)
        for index in list(self._pair_words[pair]):
            self._rewrite_word(index, _joined(self._words[index], pair, token), changes)
        for other, change in changes.items():
            if change:
                self._change_count(other, change)

    def _rewrite_word(self, index: int, word: list[int], changes: defaultdict[_Pair, int]) -> None:
        """Replace a word and its places; what this does to the pair counts is added to `changes`."""
        before, after = list(pairwise(self._words[index])), list(pairwise(word))
        self._words[index] = word
        count = self._counts[index]
        for pair in before:
            changes[pair] -= count
            self._pair_words[pair].discard(index)
        for pair in after:
            changes[pair] += count
            self._pair_words[pair].add(index)

    def _change_count(self, pair: _Pair, change: int) -> None:
        count = self._pair_counts[pair] + change
        if count:
            self._pair_counts[pair] = count
            heapq.heappush(self._heap, (-count, pair))
        else:
            del self._pair_counts[pair], self._pair_words[pair]


def _joined(word: list[int], pair: _Pair, token: int) -> list[int]:
    """The word with every occurrence of the pair, from the left, replaced by the token."""
    result: list[int] = []
    position = 0
    while position < len(word):
        if position + 1 < len(word) and (word[position], word[position + 1]) == pair:
            result.append(token)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result
