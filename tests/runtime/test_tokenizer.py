"""The tokenizer: pre-tokenising, special tokens, streaming, long inputs, and files that do not fit."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from k25_export.demo.small_files import small_files
from k25_plugins.errors import InputError
from k25_runtime.tokenizer import KIMI_PATTERN, Tokenizer

VOCABULARY = 1024
BASE = VOCABULARY - 256
TEXT = st.text(st.characters(codec="utf-8"))
RANKS, CONFIG = "tiktoken.model", "tokenizer_config.json"


def written(folder: Path) -> Path:
    for name, content in small_files(vocab_size=VOCABULARY, context_length=4096).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    "pieces",
    [
        ["你好", "。", "世界", "abc", "世"],
        ["Hello", " World", "Wide", " CAMELCase", "X"],
        ["don't", " WE'RE", " it's", " they'Ll", " Ann", "'q"],
        [" HTMLParser", "ABCdef", "Ghi"],
        ["123", "456", "78", " ", "9½²", "٣"],
        ["foo", "_bar", "(x", ")", " +=", " [", "1", "]"],
        ["a", " ...\n\n", "b", " !?\r\n", "c"],
        ["a", "  \n \r\n", "  ", " b", "\t\t", "\tc"],
        ["a", "\u3000b", "\u00a0", "\u2003c", "  "],
        ["ünï", " né", " Ωmega", " שלום", " नमस्ते"],
        ["e\u0301t", "\U0001f600\u0301x", "\n", "\u0301"],
    ],
)
def test_text_is_cut_into_pieces_as_described(pieces: list[str]) -> None:
    # tiktoken takes a piece whole where the vocabulary has it, and no larger piece is in this vocabulary.
    tokens = [bytes([value]) for value in range(256)]
    tokens += sorted({piece.encode() for piece in pieces if len(piece.encode()) > 1})
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("pieces", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens={})
    found = [
        encoding.decode_single_token_bytes(token).decode(errors="replace") for token in encoding.encode("".join(pieces))
    ]
    assert found == pieces


@given(text=TEXT, allow_special=st.booleans())
def test_text_survives_encoding(tokenizer: Tokenizer, text: str, allow_special: bool) -> None:
    ids = tokenizer.encode(text, allow_special=allow_special)
    assert tokenizer.decode(ids) == text
    assert allow_special or max(ids, default=0) < BASE


def test_special_ids_are_kimis(tokenizer: Tokenizer) -> None:
    offsets = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "<|im_assistant|>": 4, "<|im_system|>": 10}
    offsets |= {"<|im_middle|>": 17, "<|media_pad|>": 21, "<think>": 22, "</think>": 23, "[UNK]": 254, "[PAD]": 255}
    assert {name: tokenizer.special_ids[name] - BASE for name in offsets} == offsets
    assert tokenizer.special_ids[f"<|reserved_token_{BASE + 5}|>"] == BASE + 5
    assert sorted(tokenizer.special_ids.values()) == list(range(BASE, VOCABULARY))
    assert tokenizer.vocab_size == VOCABULARY


def test_special_text_is_one_id_unless_refused(tokenizer: Tokenizer) -> None:
    text = "<|im_user|>user<|im_middle|>Hi<|im_end|>"
    ids = tokenizer.encode(text)
    assert [token - BASE for token in ids if token >= BASE] == [3, 17, 2]
    assert tokenizer.decode(ids) == text
    ordinary = tokenizer.encode(text, allow_special=False)
    assert max(ordinary) < BASE
    assert tokenizer.decode(ordinary) == text


def test_token_text_and_ids_of_any_integer_type(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(np.int64(BASE + 22)) == "<think>"
    assert tokenizer.token_text(0xE4) == "\ufffd"
    assert tokenizer.decode(np.array([72, 105], np.int32)) == "Hi"


@pytest.mark.parametrize("token_id", [-1, VOCABULARY, 2**70])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token_id: int) -> None:
    decoders: list[Callable[[], object]] = [
        lambda: tokenizer.decode([72, token_id]),
        lambda: tokenizer.token_text(token_id),
        lambda: tokenizer.decode_stream().push(token_id),
    ]
    for decode in decoders:
        with pytest.raises(InputError, match=f"token id: expected 0..{VOCABULARY - 1}, found {token_id}"):
            decode()


def test_stream_holds_back_unfinished_characters(tokenizer: Tokenizer) -> None:
    stream = tokenizer.decode_stream()
    assert [stream.push(byte) for byte in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]
    assert stream.flush() == ""
    assert [stream.push(byte) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(97) == "a"


@given(ids=st.lists(st.one_of(st.integers(0, 255), st.integers(0, VOCABULARY - 1)), max_size=30))
def test_stream_joins_to_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.decode_stream()
    assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "7", "汉", "é́", "word ", "\ud7ff<|im_end|>"])
def test_long_inputs_are_encoded(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (450_000 // len(unit) + 1)
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 3


def test_cuts_fall_where_the_official_tokenizer_cuts(tokenizer: Tokenizer) -> None:
    short, cut = "b" + "1" * 24_999, "b" + "1" * 25_000
    assert tokenizer.encode(cut) == tokenizer.encode(short) + tokenizer.encode("1")
    spaced = "x " + cut
    assert tokenizer.encode(spaced) == tokenizer.encode("x " + short) + tokenizer.encode("1")
    long = "ab " * 133_333 + "é1"  # 400,001 characters
    assert tokenizer.encode(long) == tokenizer.encode(long[:-1]) + tokenizer.encode("1")


def test_no_cut_goes_through_a_special_token(tokenizer: Tokenizer) -> None:
    for before in range(24_985, 25_003):
        ids = tokenizer.encode("x" * before + "<|im_middle|>" + "y" * 60)
        assert [token for token in ids if token >= BASE] == [BASE + 17], before
    ids = tokenizer.encode("ab " * 133_331 + "<|im_middle|>z")
    assert ids[-2] == BASE + 17
    ordinary = tokenizer.encode("x" * 24_990 + "<|im_middle|>", allow_special=False)
    assert max(ordinary) < BASE


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + f" {rank}".encode()


@pytest.mark.parametrize(
    ("number", "replacement", "message"),
    [
        (300, b"!!!! 299", "line 300: expected a token in base64, found b'!!!!'"),
        (300, b"YWJj", "line 300: expected a token in base64 and its rank, found b'YWJj'"),
        (300, b"YWJj -1", "line 300: expected a token in base64 and its rank"),
        (300, b" 299", "line 300: expected a token in base64 and its rank"),
        (300, line(b"", 299), "line 300: expected a token in base64 and its rank"),
        (300, line(b"zzzzz", 298), "line 300: expected each rank 0..767 once, found rank 298"),
        (300, line(b"zzzzz", 768), "line 300: expected each rank 0..767 once, found rank 768"),
        (300, line(b"a", 299), "line 300: expected each token once, found the token of line 98 again"),
        (98, line(b"zzzzz", 97), "tiktoken.model: expected a token for each of the 256 bytes, found none for byte 97"),
        (768, b"", "tiktoken.model: expected 768 ranks .*vocab_size 1024 less 256.*, found 767 ranks"),
    ],
)
def test_rank_lines_that_do_not_fit_are_named(tmp_path: Path, number: int, replacement: bytes, message: str) -> None:
    path = written(tmp_path) / RANKS
    lines = path.read_bytes().splitlines()
    lines[number - 1] = replacement
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(tmp_path, vocab_size=VOCABULARY)


def test_rank_lines_may_come_in_any_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path) / RANKS
    path.write_bytes(b"\n\n".join(reversed(path.read_bytes().splitlines())))
    other = Tokenizer.from_folder(tmp_path, vocab_size=VOCABULARY)
    assert other.encode("The ferry left the harbour.") == tokenizer.encode("The ferry left the harbour.")


def test_vocabulary_must_be_the_models(folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected 776 ranks .*, found 768 ranks"):
        Tokenizer.from_folder(folder, vocab_size=VOCABULARY + 8)


@pytest.mark.parametrize("name", [RANKS, CONFIG])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    (written(tmp_path) / name).unlink()
    with pytest.raises(InputError, match=f"{name}: cannot be read: No such file or directory[.]"):
        Tokenizer.from_folder(tmp_path, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer_config.json: expected JSON"),
        (b"\xff", "tokenizer_config.json: expected JSON"),
        ([], "added_tokens_decoder: expected an object of special tokens by id, found nothing"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected an object .*, found list"),
        ({"added_tokens_decoder": {"767": {"content": "x"}}}, "added_tokens_decoder.767: expected an id 768..1023"),
        ({"added_tokens_decoder": {"1024": {"content": "x"}}}, "added_tokens_decoder.1024: expected an id"),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, "added_tokens_decoder.x: expected an id"),
        ({"added_tokens_decoder": {"800": {"content": ""}}}, "added_tokens_decoder.800: expected content"),
        ({"added_tokens_decoder": {"800": "x"}}, "added_tokens_decoder.800: expected content"),
        (
            {"added_tokens_decoder": {"800": {"content": "x"}, "801": {"content": "x"}}},
            "added_tokens_decoder.801: expected content: a text that no other id has, found 'x'",
        ),
    ],
)
def test_tokenizer_configs_that_do_not_fit_are_named(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path) / CONFIG
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(tmp_path, vocab_size=VOCABULARY)
