"""Prompts and passages: the built-in ones, and those of a user's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_plugins.errors import InputError
from k25_runtime.bundle_files import BundleFiles
from k25_validate.media_samples import built_in_media
from k25_validate.prompt_files import (
    BUILT_IN_PASSAGE,
    PASSAGE_TOKENS,
    PASSAGES,
    passages_from_file,
    passages_from_text,
    prompts_from_file,
)
from k25_validate.prompts import SPECIAL_IDS, Prompt, prompts_for_bundle
from k25_validate.validation import parity_report_from_bundle
from k25_validate.validation_options import ValidationOptions


@pytest.fixture(scope="module")
def files(tiny: Any) -> BundleFiles:
    return BundleFiles(tiny.bundle)


@pytest.fixture
def without_tokenizer(tiny: Any, tmp_path: Path) -> Path:
    bundle = shutil.copytree(tiny.bundle, tmp_path / "bundle")
    shutil.rmtree(bundle / "tokenizer")
    return bundle


def _by_name(prompts: tuple[Prompt, ...]) -> dict[str, Prompt]:
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    return {prompt.name: prompt for prompt in prompts}


def test_the_built_in_prompts_exercise_what_breaks(files: BundleFiles) -> None:
    vision = files.manifest.model.vision
    assert vision is not None
    prompts = _by_name(prompts_for_bundle(files, built_in_media(vision)))
    vocab = files.manifest.model.text.vocab_size
    assert len(prompts["one token"].prompt_ids) == 1
    assert len(set(prompts["one token repeated"].prompt_ids)) == 1
    special = {token for token in prompts["special and tool tokens"].token_ids if token >= vocab - SPECIAL_IDS}
    named = files.tokenizer.special_ids
    assert {named["<|tool_call_begin|>"], named["<|im_end|>"], named["[BOS]"]} <= special
    assert files.manifest.model.media_placeholder_token_id not in special
    languages = files.tokenizer.decode(prompts["many languages"].prompt_ids)
    assert all(text in languages for text in ("世界", "Привет", "नमस्ते", "العالم"))
    assert files.tokenizer.decode(prompts["code"].prompt_ids).startswith("def f(")
    assert files.tokenizer.decode(prompts["chat text"].prompt_ids).count("<|im_end|>") >= 1
    assert prompts["text and pictures"].media
    assert all(0 <= token < vocab for prompt in prompts.values() for token in prompt.token_ids)
    assert prompts_for_bundle(files) == prompts_for_bundle(files)


def test_a_prompt_is_cut_behind_its_pictures(files: BundleFiles) -> None:
    vision = files.manifest.model.vision
    assert vision is not None
    for prompt in prompts_for_bundle(files, built_in_media(vision)):
        cut = prompt.resumed_at
        assert cut is not None
        assert all(placed.first_token + placed.sample.item.tokens <= cut for placed in prompt.media)
    assert Prompt(name="one", prompt_ids=(1,)).resumed_at is None
    assert Prompt(name="text", prompt_ids=(1, 2, 3), is_passage=True).resumed_at is None


def test_without_a_tokenizer_there_are_ids_only(without_tokenizer: Path) -> None:
    prompts = _by_name(prompts_for_bundle(BundleFiles(without_tokenizer)))
    assert prompts.keys() == {"random tokens", "one token", "one token repeated", "special and tool tokens"}
    report = parity_report_from_bundle(without_tokenizer, threads=1)
    assert report.passed, report.summary()
    assert report.passages == ()
    assert any("no tokenizer" in item for item in report.not_checked)
    assert report.logits is not None
    assert report.logits.worst[0].token.isdigit()


def test_own_prompts_are_what_is_run(files: BundleFiles, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"text": "Hello", "name": "a </script> name"},
        {"token_ids": [5, 6, 7, 8, 9, 10], "decode": 2},
        {"text": "raw <|im_end|>", "raw": True, "decode": 0},
    ]
    path.write_text("\n".join(["", *map(json.dumps, lines), ""]), "utf-8")
    chat, ids, raw = prompts_from_file(path, files)
    assert (chat.name, ids.name, raw.name) == ("a </script> name", "prompt 2", "prompt 3")
    assert (ids.prompt_ids, ids.next_ids) == ((5, 6, 7, 8), (9, 10))
    assert raw.token_ids == tuple(files.tokenizer.encode("raw <|im_end|>"))
    assert len(chat.next_ids) == 4
    assert "Hello" in files.tokenizer.decode(chat.token_ids)
    text = tmp_path / "text.txt"
    text.write_text("One two three. <|im_end|>", "utf-8")
    report = parity_report_from_bundle(
        tiny.bundle, samples=(), options=ValidationOptions(prompts=path, text=text), threads=1
    )
    assert [row.name for row in report.prompts] == ["a </script> name", "prompt 2", "prompt 3", "text.txt"]
    assert report.passed, report.summary()
    (passage,) = report.passages
    assert passage.name == "text.txt"
    assert passage.reference_perplexity == pytest.approx(np.exp(passage.reference_nll))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected a JSON object"),
        ("[1]", "line 1: expected an object with one of text and token_ids"),
        ("{}", "one of text and token_ids"),
        ('{"text": "a", "token_ids": [1]}', "one of text and token_ids"),
        ('{"text": "a", "temperature": 1}', "line 1: expected keys among .*found temperature"),
        ('{"token_ids": []}', "line 1: expected 1 to .* tokens, found 0"),
        ('{"token_ids": [1, "2"]}', "token_ids: expected a list of integers"),
        ('{"token_ids": [1, true]}', "token_ids: expected a list of integers"),
        ('{"token_ids": [-1]}', "token_ids: expected ids in 0..1023, found -1"),
        ('{"token_ids": [1024]}', "found 1024"),
        ('{"token_ids": [1], "decode": -1}', "decode: expected 0 or more"),
        ('{"token_ids": [1], "name": 7}', "name: expected str"),
        ('{"token_ids": [1], "name": ""}', "name: expected 1 to 80 characters"),
        ('{"text": "\\ud800"}', "text: expected Unicode text"),
        ('{"token_ids": [1], "name": "a"}\n{"token_ids": [1], "name": "a"}', "expected a name for each prompt"),
        ("\n \n", "expected a prompt in each line"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, message: str, files: BundleFiles, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line, "utf-8")
    with pytest.raises(InputError, match=message):
        prompts_from_file(path, files)


def test_files_that_cannot_be_read(files: BundleFiles, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b"caf\xe9 au lait")
    for name, message in (("gone", "cannot be read"), ("latin1", "expected UTF-8 text")):
        for read in (prompts_from_file, passages_from_file):
            with pytest.raises(InputError, match=message):
                read(tmp_path / name, files)
    with pytest.raises(InputError, match="at least 2 tokens"):
        passages_from_text(files, "", name="nothing")


def test_a_long_text_is_cut_into_windows(files: BundleFiles) -> None:
    passages = passages_from_text(files, BUILT_IN_PASSAGE * 40, name="long")
    assert [len(prompt.prompt_ids) for prompt in passages] == [PASSAGE_TOKENS] * PASSAGES
    assert [prompt.name for prompt in passages][:2] == ["long, part 1", "long, part 2"]
    text = files.tokenizer.decode([token for prompt in passages for token in prompt.token_ids])
    assert (BUILT_IN_PASSAGE * 40).startswith(text.rstrip("\ufffd"))
