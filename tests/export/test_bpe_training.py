"""Byte-pair training: the textbook example, a slow trainer that recounts, and the demo tokenizer's own words."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from k25_export.demo.bpe_training import tiktoken_lines, train_byte_pairs
from k25_export.demo.training_words import pieces, training_words
from k25_export.tokenizer_pattern import KIMI_PATTERN
from k25_plugins.errors import InputError

BYTES = [bytes([value]) for value in range(256)]
TEXTBOOK = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}


def tokens_by_recounting(word_counts: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The same algorithm with all counts made anew for every join."""
    tokens = list(BYTES)
    words = {word: [bytes([value]) for value in word] for word in word_counts}
    while len(tokens) < limit:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                counts[pair] += word_counts[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for parts in words.values():
            position = 0
            while position + 1 < len(parts):
                if (parts[position], parts[position + 1]) == best:
                    parts[position : position + 2] = [best[0] + best[1]]
                position += 1
    return tokens


def test_textbook_words_are_joined_by_count_then_by_rank() -> None:
    tokens = train_byte_pairs(TEXTBOOK, 256 + 8)
    assert tokens[:256] == BYTES
    # 9 times es, before st of higher ranks, and est; 7 times lo and low; 6 times ew, new and newest; 3 times dest.
    assert tokens[256:] == [b"es", b"est", b"lo", b"low", b"ew", b"new", b"newest", b"dest"]


@given(st.dictionaries(st.text("ab", min_size=1, max_size=9).map(str.encode), st.integers(1, 5), max_size=8))
def test_counts_stay_right_while_they_are_updated(word_counts: dict[bytes, int]) -> None:
    expected = tokens_by_recounting(word_counts, 256 + 12)
    assert train_byte_pairs(word_counts, len(expected)) == expected


def test_tokens_are_unique_where_several_pairs_give_the_same_bytes() -> None:
    tokens = train_byte_pairs({b"aaaaaaa": 3, b"aaaaa": 2, b"aaa": 9, b"baaab": 4}, 256 + 6)
    assert len(set(tokens)) == len(tokens)


def test_words_that_give_too_few_tokens_are_an_error() -> None:
    with pytest.raises(InputError, match="expected words that give 300 tokens, found 268 tokens"):
        train_byte_pairs(TEXTBOOK, 300)
    with pytest.raises(InputError, match="at least 256 tokens, found 255"):
        train_byte_pairs(TEXTBOOK, 255)


def test_file_lines_are_what_tiktoken_reads() -> None:
    tokens = train_byte_pairs(TEXTBOOK, 258)
    lines = tiktoken_lines(tokens).decode().splitlines()
    assert lines[97] == "YQ== 97"
    assert lines[257] == f"{base64.b64encode(b'est').decode()} 257"
    assert len(lines) == 258


def test_pieces_cover_the_text() -> None:
    text = "The year 2024 wasn't\n  'easy' — 你好。world!\t\n"
    assert "".join(pieces(text)) == text
    assert pieces(text)[:6] == ["The", " year", " ", "202", "4", " wasn't"]


@pytest.mark.parametrize("token_count", [256, 768, 6000])
def test_training_words_suffice_and_real_text_comes_first(token_count: int) -> None:
    words = training_words(token_count)
    tokens = train_byte_pairs(words, token_count)
    assert len(tokens) == token_count == len(set(tokens))
    if token_count > 256:
        assert {b" t", b"he", b" the"} <= set(tokens[256:300])
    if token_count == 6000:
        real = {word for word, count in words.items() if count > 1}
        assert len(real) > 1500
        assert real < set(tokens)
        assert len(set(words) - real) == 3000


def test_trained_words_encode_to_few_tokens() -> None:
    tokens = train_byte_pairs(training_words(6000), 6000)
    encoding = tiktoken.Encoding(
        "demo", pat_str=KIMI_PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={}
    )
    assert len(encoding.encode(" the harbour 船长")) == 4
    assert encoding.decode(encoding.encode("Zürich 42 ☃")) == "Zürich 42 ☃"
