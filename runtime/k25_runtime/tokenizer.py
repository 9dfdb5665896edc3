"""Kimi K2.5's tokenizer, from the small files of a bundle: text to token ids and back.

Ids below `vocab_size - 256` are the byte-pair ranks of `tiktoken.model`; the 256 after them are special tokens,
named in `tokenizer_config.json` (`added_tokens_decoder`) or reserved. Merging is tiktoken's; the pre-tokeniser, the
special ids and the way long inputs are cut follow the official `tokenization_kimi.py`.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import SupportsIndex

import tiktoken

from k25_export.tokenizer_pattern import KIMI_PATTERN
from k25_plugins.errors import InputError, mismatch

RANKS_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_ID_COUNT = 256

# tiktoken's pattern matcher is recursive: the official tokenizer cuts its input here so that the stack suffices.
_MAX_CHARACTERS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Text ↔ token ids. Build it with `Tokenizer.from_folder`.

    `special_ids` maps the text of each of the 256 special tokens to its id; those without a name are spelled
    `<|reserved_token_ID|>`.
    """

    def __init__(self, tokens: Sequence[bytes], special_names: Mapping[int, str]) -> None:
        """`tokens` in the order of their ranks, all 256 single bytes among them; names of special ids by id."""
        base = len(tokens)
        names = [special_names.get(i, f"<|reserved_token_{i}|>") for i in range(base, base + SPECIAL_ID_COUNT)]
        self.special_ids: Mapping[str, int] = MappingProxyType({name: base + i for i, name in enumerate(names)})
        self._bytes = [*tokens, *(name.encode() for name in names)]
        self._special = re.compile("|".join(re.escape(name) for name in names))
        self._longest_special = max(len(name) for name in names)
        self._encoding = tiktoken.Encoding(
            "kimi-k2.5",
            pat_str=KIMI_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=dict(self.special_ids),
        )

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int) -> Tokenizer:
        """The tokenizer of a checkpoint folder or of a bundle's `tokenizer` folder.

        `vocab_size` is the model's; it must be the number of ranks plus 256. Raises `InputError`, naming file and
        line or key, where a file is missing or does not fit.
        """
        ranks_path, config_path = folder / RANKS_FILE, folder / CONFIG_FILE
        tokens = _tokens_from_file(ranks_path)
        if len(tokens) + SPECIAL_ID_COUNT != vocab_size:
            raise mismatch(
                str(ranks_path),
                expected=f"{vocab_size - SPECIAL_ID_COUNT} ranks (vocab_size {vocab_size} less 256 special ids)",
                found=f"{len(tokens)} ranks",
                hint="The file belongs to another model.",
            )
        return cls(tokens, _special_names_from_file(config_path, first_id=len(tokens)))

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and special tokens."""
        return len(self._bytes)

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Token ids of a text. With `allow_special` the text of a special token becomes its id, as in the official
        tokenizer; without, it is text like any other (use this for text from strangers).
        """
        ids: list[int] = []
        for part in self._parts(text, allow_special=allow_special):
            if allow_special:
                ids += self._encoding.encode(part, allowed_special="all", disallowed_special=())
            else:
                ids += self._encoding.encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. Raises `InputError` for an unknown id."""
        return b"".join(map(self._token_bytes, ids)).decode("utf-8", errors="replace")

    def decode_stream(self) -> DecodeStream:
        """A decoder for ids that come one at a time."""
        return DecodeStream(self)

    def token_text(self, token_id: SupportsIndex) -> str:
        """The text of one id; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.decode((token_id,))

    def _token_bytes(self, token_id: SupportsIndex) -> bytes:
        index = operator.index(token_id)
        if not 0 <= index < len(self._bytes):
            raise mismatch("token id", expected=f"0..{len(self._bytes) - 1}", found=index)
        return self._bytes[index]

    def _parts(self, text: str, *, allow_special: bool) -> Iterator[str]:
        """The text in parts that tiktoken can encode; no cut goes through the text of a special token."""
        start = 0
        for cut in _cuts(text):
            end = self._before_special(text, cut) if allow_special else cut
            if end > start:
                yield text[start:end]
                start = end
        yield text[start:]

    def _before_special(self, text: str, cut: int) -> int:
        """The cut, moved to the start of the special token that it would split."""
        first = max(0, cut - self._longest_special + 1)
        for match in self._special.finditer(text, first, cut + self._longest_special - 1):
            if match.start() < cut < match.end():
                return match.start()
        return cut


class DecodeStream:
    """Text from ids that come one at a time: what is pushed and flushed joins to `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The text that this id completes: empty while a character is unfinished."""
        return self._decoder.decode(self._tokenizer._token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character. The stream can be used again."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _cuts(text: str) -> Iterator[int]:
    """Where the official tokenizer cuts: every 400,000 characters, and in these, runs longer than 25,000 characters
    that are all whitespace or all not.
    """
    for start in range(0, len(text), _MAX_CHARACTERS):
        if start:
            yield start
        if len(text) - start > _MAX_RUN:
            for run in _RUN.finditer(text, start, start + _MAX_CHARACTERS):
                yield from range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)


def _tokens_from_file(path: Path) -> list[bytes]:
    """The tokens of a `tiktoken.model` file by rank. A line is `base64 rank`; ranks are 0..n-1 in any order."""
    lines = [(number, line) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    tokens: list[bytes | None] = [None] * len(lines)
    line_of: dict[bytes, int] = {}
    for number, line in lines:
        where = f"{path}, line {number}"
        token, rank = _parsed_line(where, line)
        if rank >= len(tokens) or tokens[rank] is not None:
            raise mismatch(where, expected=f"each rank 0..{len(tokens) - 1} once", found=f"rank {rank}")
        if line_of.setdefault(token, number) != number:
            raise mismatch(where, expected="each token once", found=f"the token of line {line_of[token]} again")
        tokens[rank] = token
    missing = [value for value in range(256) if bytes([value]) not in line_of]
    if missing:
        raise mismatch(str(path), expected="a token for each of the 256 bytes", found=f"none for byte {missing[0]}")
    return [token for token in tokens if token is not None]


def _parsed_line(where: str, line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit():
        raise mismatch(where, expected="a token in base64 and its rank", found=repr(line[:60]))
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise mismatch(where, expected="a token in base64", found=f"{fields[0][:60]!r} ({error})") from error
    if not token:
        raise mismatch(where, expected="a token in base64", found="an empty token")
    return token, int(fields[1])


def _special_names_from_file(path: Path, *, first_id: int) -> dict[int, str]:
    """Names by id from `added_tokens_decoder`; each must be one of the 256 special ids, and no text may come twice."""
    try:
        values = json.loads(_read(path))
    except ValueError as error:
        raise mismatch(str(path), expected="JSON", found=str(error)) from error
    added = values.get("added_tokens_decoder") if isinstance(values, dict) else None
    if not isinstance(added, dict):
        found = "nothing" if added is None else type(added).__name__
        raise mismatch(f"{path}: added_tokens_decoder", expected="an object of special tokens by id", found=found)
    names: dict[int, str] = {}
    for key, entry in added.items():
        where = f"{path}: added_tokens_decoder.{key}"
        if not (key.isascii() and key.isdigit() and first_id <= int(key) < first_id + SPECIAL_ID_COUNT):
            raise mismatch(where, expected=f"an id {first_id}..{first_id + SPECIAL_ID_COUNT - 1}", found=repr(key))
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or content in names.values():
            raise mismatch(where, expected="content: a text that no other id has", found=repr(content))
        names[int(key)] = content
    return names


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. A bundle's tokenizer folder holds it.") from error
