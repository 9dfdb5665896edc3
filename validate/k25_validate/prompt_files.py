"""Prompts and passages of a user's own, from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k25_plugins.errors import InputError, mismatch
from k25_runtime.bundle_files import BundleFiles
from k25_validate.prompts import Prompt, ids_of_text

#: Tokens of a passage that stand in one sequence, and how many such sequences are run.
PASSAGE_TOKENS = 256
PASSAGES = 4

#: The references hold all scores of a head at once; far positions are covered without long prompts.
LONGEST_PROMPT = 2048
LONGEST_NAME = 80

#: A passage that every tokenizer has tokens for: words, a number, a quotation, punctuation.
BUILT_IN_PASSAGE = (
    'The lighthouse keeper counted ships. "Thirty-one," she wrote, "and one that has no lights." In the morning the '
    "sea "
    "was flat, the log held 31 names, and nobody had seen the last ship but her."
)

_DECODED = 4
_KEYS = frozenset({"name", "text", "token_ids", "raw", "decode"})


def prompts_from_file(path: Path, files: BundleFiles) -> tuple[Prompt, ...]:
    """Prompts from JSON lines: `{"text": "..."}`, through the chat template unless `"raw": true`, or `{"token_ids":
    [1, 2]}`.

    `name` is what reports call it; the last `decode` tokens (4, where there are as many) are decoded one by one. Raises
    `InputError` with the number of the line.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}, line {number}", len(prompts) + 1, files))
    if not prompts:
        raise mismatch(str(path), expected='a prompt in each line, such as {"text": "Hello"}', found="none")
    names = [prompt.name for prompt in prompts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise mismatch(str(path), expected="a name for each prompt", found=f"{twice[0]!r} twice")
    return tuple(prompts)


def passages_from_text(files: BundleFiles, text: str, *, name: str) -> tuple[Prompt, ...]:
    """The text's first tokens as sequences whose perplexity is measured. A text that spells a special token is text.

    Raises `InputError` for a text of fewer than two tokens, and without a tokenizer.
    """
    window = min(PASSAGE_TOKENS, files.manifest.model.text.max_position_embeddings)
    ids = files.tokenizer.encode(text, allow_special=False)[: window * PASSAGES]
    if len(ids) < 2:
        raise mismatch(f"text {name}", expected="at least 2 tokens", found=len(ids))
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    parts = [part for part in parts if len(part) > 1]
    names = [name] if len(parts) == 1 else [f"{name}, part {index}" for index in range(1, len(parts) + 1)]
    return tuple(
        Prompt(name=label, prompt_ids=tuple(part), is_passage=True) for label, part in zip(names, parts, strict=True)
    )


def passages_from_file(path: Path, files: BundleFiles) -> tuple[Prompt, ...]:
    """`passages_from_text` of a UTF-8 file."""
    return passages_from_text(files, _text(path), name=path.name)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from error


def _prompt(line: str, where: str, number: int, files: BundleFiles) -> Prompt:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: expected a JSON object, found {error}") from error
    if not isinstance(values, dict) or len({"text", "token_ids"} & set(values)) != 1:
        raise mismatch(where, expected="an object with one of text and token_ids", found=line[:60])
    if unknown := sorted(set(values) - _KEYS):
        raise mismatch(where, expected=f"keys among {', '.join(sorted(_KEYS))}", found=unknown[0])
    ids = _ids(values, where, files)
    decode = _typed(values, "decode", int, _DECODED, where)
    if decode < 0:
        raise mismatch(f"{where}: decode", expected="0 or more", found=decode)
    first = max(len(ids) - decode, 1)
    name = _typed(values, "name", str, f"prompt {number}", where)
    if not 0 < len(name) <= LONGEST_NAME:
        raise mismatch(f"{where}: name", expected=f"1 to {LONGEST_NAME} characters", found=len(name))
    return Prompt(name=name, prompt_ids=ids[:first], next_ids=ids[first:])


def _ids(values: Mapping[str, Any], where: str, files: BundleFiles) -> tuple[int, ...]:
    if "text" in values:
        raw = _typed(values, "raw", bool, False, where)
        ids = ids_of_text(files, _typed(values, "text", str, "", where), raw=raw)
    else:
        found = values["token_ids"]
        if not isinstance(found, list) or any(type(token) is not int for token in found):
            raise mismatch(f"{where}: token_ids", expected="a list of integers", found=f"{found!r:.60}")
        ids = tuple(found)
    text = files.manifest.model.text
    longest = min(LONGEST_PROMPT, text.max_position_embeddings)
    if not 0 < len(ids) <= longest:
        raise mismatch(where, expected=f"1 to {longest} tokens", found=len(ids))
    outside = [token for token in ids if not 0 <= token < text.vocab_size]
    if outside:
        raise mismatch(f"{where}: token_ids", expected=f"ids in 0..{text.vocab_size - 1}", found=outside[0])
    return ids


def _typed(values: Mapping[str, Any], key: str, kind: type, default: Any, where: str) -> Any:
    found = values.get(key, default)
    if type(found) is not kind:
        raise mismatch(f"{where}: {key}", expected=kind.__name__, found=f"{found!r:.60}")
    if isinstance(found, str) and any("\ud800" <= character <= "\udfff" for character in found):
        raise mismatch(f"{where}: {key}", expected="Unicode text", found="half of a surrogate pair")
    return found
