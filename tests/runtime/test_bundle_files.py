"""A bundle folder opened: the ids that end a generation, the tokenizer, and what is no bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_plugins.errors import InputError
from k25_runtime.bundle_files import BundleFiles

Manifest = dict[str, Any]


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


def special_id(bundle: Path, text: str) -> int:
    """The id of a special token, as tokenizer_config.json says."""
    added = json.loads((bundle / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    (found,) = [int(key) for key, entry in added.items() if entry["content"] == text]
    return found


def edit_manifest(bundle: Path, edit: Callable[[Manifest], None]) -> None:
    path = bundle / "manifest.json"
    values = json.loads(path.read_text("utf-8"))
    edit(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def write_generation_config(bundle: Path, text: str) -> None:
    (bundle / "tokenizer" / "generation_config.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("stated", "ids"), [("[5, 6]", {5, 6}), ("5", {5}), ("[]", set()), ("null", set())])
def test_stop_ids_come_from_three_places(bundle: Path, stated: str, ids: set[int]) -> None:
    write_generation_config(bundle, f'{{"eos_token_id": {stated}, "top_p": 0.9}}')
    edit_manifest(bundle, lambda manifest: manifest["model"]["text"].update(eos_token_id=11))
    assert BundleFiles(bundle).stop_ids == {11, special_id(bundle, "<|im_end|>"), *ids}


def test_stop_ids_of_an_untouched_bundle(exported: Any) -> None:
    config = json.loads((exported.checkpoint / "config.json").read_text("utf-8"))["text_config"]
    generation = json.loads((exported.checkpoint / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    end_of_turn = special_id(exported.bundle, "<|im_end|>")
    assert BundleFiles(exported.bundle).stop_ids == {config["eos_token_id"], end_of_turn, *generation}


@pytest.mark.parametrize("text", ["{}", None])
def test_a_generation_config_without_end_ids_or_none_at_all(bundle: Path, text: str | None) -> None:
    if text is None:
        (bundle / "tokenizer" / "generation_config.json").unlink()
    else:
        write_generation_config(bundle, text)
    files = BundleFiles(bundle)
    assert files.stop_ids == {files.manifest.model.text.eos_token_id, special_id(bundle, "<|im_end|>")}


def test_a_tokenizer_without_an_end_of_turn_adds_none(bundle: Path) -> None:
    path = bundle / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text("utf-8").replace("<|im_end|>", "<|other|>"), encoding="utf-8")
    write_generation_config(bundle, "{}")
    files = BundleFiles(bundle)
    assert files.stop_ids == {files.manifest.model.text.eos_token_id}


@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token_id": "5"}', '{"eos_token_id": [1, 2.5]}', "\udc80"])
def test_a_generation_config_that_makes_no_sense_is_refused(bundle: Path, text: str) -> None:
    (bundle / "tokenizer" / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"generation_config\.json.*expected .*, found"):
        _ = BundleFiles(bundle).stop_ids


def test_the_tokenizer_is_the_bundles(exported: Any) -> None:
    files = BundleFiles(exported.bundle)
    assert files.has_tokenizer
    assert files.tokenizer_folder == exported.bundle / "tokenizer"
    assert files.tokenizer.vocab_size == files.manifest.model.text.vocab_size
    assert files.tokenizer.decode(files.tokenizer.encode("Grüße!")) == "Grüße!"


def test_a_bundle_without_tokenizer_has_stop_ids_and_says_what_to_do(bundle: Path) -> None:
    shutil.rmtree(bundle / "tokenizer")
    files = BundleFiles(bundle)
    assert not files.has_tokenizer
    assert files.stop_ids == {files.manifest.model.text.eos_token_id}
    with pytest.raises(InputError, match=r"tokenizer/tiktoken\.model: expected .*, found none\. Give token ids"):
        _ = files.tokenizer


def test_a_tokenizer_of_another_model_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["model"]["text"].update(vocab_size=5000))
    with pytest.raises(InputError, match=r"tiktoken\.model: expected 4744 ranks"):
        _ = BundleFiles(bundle).tokenizer


def test_no_folder_no_manifest_and_a_file_are_no_bundles(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder").mkdir()
    for name in ("missing", "file", "folder"):
        with pytest.raises(InputError, match=rf"bundle .*{name}: cannot read manifest\.json: .*k25-export export"):
            BundleFiles(tmp_path / name)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda manifest: manifest.update(schema_version=2), r"schema_version: expected 1, found 2"),
        (lambda manifest: manifest.update(format="other"), r"format: expected 'k25-bundle', found 'other'"),
        (lambda manifest: manifest.update(extra=1), r"'extra'"),
        (lambda manifest: manifest.pop("shards"), r"'shards'"),
        (lambda manifest: manifest["shards"][0].update(file="../outside"), r"shards: .*'\.\./outside'"),
        (lambda manifest: manifest["shards"][0].update(file="/etc/passwd"), r"shards: .*'/etc/passwd'"),
        (lambda manifest: manifest["shards"][0].update(bytes=2000), r"tensor language_model\..*bytes"),
        (lambda manifest: manifest["tensors"][0].update(shard=999), r"tensor language_model\..*999"),
        (lambda manifest: manifest["tensors"][0].update(offset=1 << 40), r"tensor language_model\..*bytes"),
        (lambda manifest: manifest["tensors"][0].update(offset=-8), r"tensor language_model\..*bytes"),
        (lambda manifest: manifest["tensors"][0].update(length=10), r"tensor language_model\..*length"),
        (lambda manifest: manifest["components"][0]["files"][0].update(path="../x.onnx"), r"path: .*'\.\./x\.onnx'"),
    ],
)
def test_a_manifest_that_must_be_refused(bundle: Path, edit: Callable[[Manifest], None], text: str) -> None:
    """bundle-format.md section 6."""
    edit_manifest(bundle, edit)
    with pytest.raises(InputError, match=text):
        BundleFiles(bundle)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": "\xff"}', b""])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json: expected"):
        BundleFiles(bundle)
