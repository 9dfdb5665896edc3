"""Bundles, prompts and files that cannot be used: exit code 3, one message that names the thing, nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run

COMMAND = str(Path(sys.executable).with_name("k25-export"))

Json = dict[str, Any]
VERBS = {
    "run": ["--token-ids", "1 2", "--max-new-tokens", "1", "--context", "64"],
    "validate": ["-q"],
}


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    """Hard links to the fixture's files: replace a file, never write into it."""
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle", copy_function=os.link))


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    """Hard links, too."""
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("K25_CHECKPOINT", "K25_CACHE", "K25_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of torch that wait for one another burn what a busy machine has left."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], *named: str) -> str:
    """Run the command: exit code 3, no output, one message that has all of `named`."""
    assert run(arguments) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("k25-export: ")
    assert err.count("\n") == 1
    assert [text for text in named if text not in err] == [], err
    return err


def files(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden files too: content by name, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def edit_manifest(bundle: Path, edit: Callable[[Json], Any]) -> None:
    values = json.loads((bundle / "manifest.json").read_bytes())
    edit(values)
    replace(bundle / "manifest.json", json.dumps(values).encode())


def component(manifest: Json, name: str) -> Json:
    found: Json = next(entry for entry in manifest["components"] if entry["name"] == name)
    return found


def remove(*parts: str) -> Callable[[Path], None]:
    return lambda bundle: bundle.joinpath(*parts).unlink()


def content(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda bundle: replace(bundle / name, data)


def manifest(edit: Callable[[Json], Any]) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, edit)


def _cut_manifest(bundle: Path) -> None:
    replace(bundle / "manifest.json", (bundle / "manifest.json").read_bytes()[:-3])


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no manifest": (remove("manifest.json"), ("manifest.json",)),
    "manifest is empty": (content("manifest.json", b""), ("manifest.json", "JSON")),
    "manifest is cut": (_cut_manifest, ("manifest.json", "JSON")),
    "manifest is no UTF-8": (content("manifest.json", b'{"format": "\xff"}'), ("manifest.json", "UTF-8")),
    "manifest is a list": (content("manifest.json", b"[]"), ("manifest.json", "object")),
    "manifest of another format": (manifest(lambda m: m.update(format="zip")), ("manifest.json", "format", "zip")),
    "manifest of a later version": (manifest(lambda m: m.update(schema_version=99)), ("schema_version", "99")),
    "an unknown key": (manifest(lambda m: m.update(colour="red")), ("colour",)),
    "a key is missing": (manifest(lambda m: m.pop("tensors")), ("tensors",)),
    "a shard with a path": (manifest(lambda m: m["shards"][0].update(file="../x.safetensors")), ("../x.safetensors",)),
    "a tensor beyond its shard": (
        manifest(lambda m: next(g for g in m["tensors"] if "offset" in g).update(offset=1 << 50)),
        ("tensor ",),
    ),
    "a component is missing": (
        manifest(lambda m: m["components"].remove(component(m, "head"))),
        ("head",),
    ),
    "no components": (manifest(lambda m: m.update(components=[])), ("component",)),
    "a layer is missing": (
        manifest(lambda m: component(m, "moe_layer")["layers"].pop()),
        ("layer",),
    ),
    "more layers than components": (
        manifest(lambda m: m["model"]["text"].update(num_hidden_layers=1 + m["model"]["text"]["num_hidden_layers"])),
        ("layer",),
    ),
    "a component lacks a binding": (
        manifest(lambda m: component(m, "head")["bindings"].popitem()),
        ("head",),
    ),
    "a region of rows of no bytes": (
        manifest(lambda m: component(m, "moe_layer")["bindings"]["expert_words"].update(row_bytes=0)),
        ("expert_words",),
    ),
    "a region of no tensors": (
        manifest(lambda m: component(m, "moe_layer")["bindings"]["expert_table"].update(tensors=[])),
        ("expert_table",),
    ),
    "a binding to an unknown tensor": (
        manifest(lambda m: next(iter(component(m, "embed")["bindings"].values())).update(tensor="of.nobody")),
        ("of.nobody",),
    ),
    "no fp32 graph": (
        manifest(lambda m: component(m, "embed").update(files=component(m, "embed")["files"][1:])),
        ("embed", "fp32"),
    ),
    "a component file is missing": (remove("components", "embed.fp32.onnx"), ("embed.fp32.onnx",)),
    "a component file is empty": (content("components/embed.fp32.onnx", b""), ("embed",)),
    "a component file is no ONNX": (content("components/embed.fp32.onnx", b"no ONNX"), ("embed",)),
    "no checkpoint.json": (remove("checkpoint.json"), ("checkpoint.json", "--checkpoint")),
    "checkpoint.json is no JSON": (content("checkpoint.json", b"{"), ("checkpoint.json", "JSON")),
    "checkpoint.json of another format": (content("checkpoint.json", b"{}"), ("checkpoint.json",)),
    "checkpoint.json without a folder": (
        content("checkpoint.json", b'{"format": "k25-checkpoint-location", "schema_version": 1, "path": 1}'),
        ("checkpoint.json", "path"),
    ),
    "checkpoint.json names a folder that is gone": (
        content("checkpoint.json", b'{"format": "k25-checkpoint-location", "schema_version": 1, "path": "/gone/away"}'),
        ("/gone/away",),
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_bundles_are_refused(capfd: pytest.CaptureFixture[str], bundle: Path, name: str, verb: str) -> None:
    damage, named = DAMAGE[name]
    damage(bundle)
    before = files(bundle)
    refused(capfd, [verb, str(bundle), *VERBS[verb]], *named)
    assert files(bundle) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "where", ["nothing", "a/b/c", "checkpoint", "bundle/manifest.json", pytest.param("x" * 300, id="long")]
)
def test_no_such_bundle(
    capfd: pytest.CaptureFixture[str],
    bundle: Path,
    checkpoint: Path,
    where: str,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(bundle.parent)
    refused(capfd, [verb, where, *VERBS[verb]], f"bundle {where}")


# The checkpoint that a bundle needs.


def _shard_of(bundle: Path) -> Json:
    shards: list[Json] = json.loads((bundle / "manifest.json").read_bytes())["shards"]
    return shards[-1]


def _cut_shard(path: Path) -> None:
    replace(path, path.read_bytes()[:-1])


def _other_header(path: Path) -> None:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    assert b"BF16" in raw[:end]
    replace(path, raw[:end].replace(b"BF16", b"F16 ", 1) + raw[end:])


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "no file"),
    "truncated": (_cut_shard, "bytes"),
    "another header": (_other_header, "header"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_a_checkpoint_that_is_not_the_one_that_was_exported(
    capfd: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, name: str, verb: str
) -> None:
    damage, says = SHARD_DAMAGE[name]
    shard = _shard_of(bundle)["file"]
    damage(checkpoint / shard)
    refused(capfd, [verb, str(bundle), *VERBS[verb], "--checkpoint", str(checkpoint)], shard, says)


@pytest.mark.parametrize("verb", VERBS)
def test_the_checkpoint_that_is_given_must_exist(capfd: pytest.CaptureFixture[str], bundle: Path, verb: str) -> None:
    refused(capfd, [verb, str(bundle), *VERBS[verb], "--checkpoint", "gone"], "checkpoint gone", "no such folder")


def test_the_checkpoint_of_the_environment_must_exist(
    capfd: pytest.CaptureFixture[str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K25_CHECKPOINT", "gone")
    refused(capfd, ["run", str(bundle), *VERBS["run"]], "checkpoint gone", "no such folder")


# Prompts.


def _vocabulary(bundle: Path) -> int:
    size: int = json.loads((bundle / "manifest.json").read_bytes())["model"]["text"]["vocab_size"]
    return size


@pytest.mark.parametrize("past", [-1, "end", 1 << 40, 10**30])
def test_a_token_id_outside_the_vocabulary(capfd: pytest.CaptureFixture[str], tiny: Any, past: Any) -> None:
    vocabulary = _vocabulary(tiny.bundle)
    wrong = vocabulary if past == "end" else past
    refused(capfd, ["run", str(tiny.bundle), "--token-ids", f"1 {wrong}"], f"0..{vocabulary - 1}", f"found {wrong}")


def test_the_last_token_id_of_the_vocabulary_is_fine(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    last = _vocabulary(tiny.bundle) - 1
    assert run(["run", str(tiny.bundle), "--token-ids", str(last), "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["prompt_ids"] == [last]


@pytest.mark.parametrize("ids", ["", " , "])
def test_no_tokens_at_all(capfd: pytest.CaptureFixture[str], tiny: Any, ids: str) -> None:
    refused(capfd, ["run", str(tiny.bundle), "--token-ids", ids], "token")


def test_a_prompt_longer_than_the_context(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    command = ["run", str(tiny.bundle), "--context", "8", "--max-new-tokens", "1"]
    refused(capfd, [*command, "--token-ids", "1 " * 8], "context of 8", "found 8")
    refused(capfd, [*command, "--prompt", "far too long " * 9], "context of 8")
    assert run([*command, "--token-ids", "1 " * 7]) == 0


def test_a_context_that_the_model_does_not_have(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    text = json.loads((tiny.bundle / "manifest.json").read_bytes())["model"]["text"]
    beyond = text["max_position_embeddings"] + 1
    refused(
        capfd,
        ["run", str(tiny.bundle), "--token-ids", "1", "--context", str(beyond)],
        f"at most {beyond - 1}",
        f"found {beyond}",
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", "-1"), ("temperature", "nan"), ("top-p", "0"), ("top-p", "1.5"), ("top-k", "-1"), ("seed", "-1")],
)
def test_sampling_that_makes_no_sense(capfd: pytest.CaptureFixture[str], tiny: Any, option: str, value: str) -> None:
    arguments = ["run", str(tiny.bundle), "--token-ids", "1", f"--{option}", value]
    assert run(arguments) in (2, 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert option.replace("-", "_") in err or f"--{option}" in err


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove("tokenizer", "tiktoken.model"), "tiktoken.model"),
        (content("tokenizer/tiktoken.model", b""), "tiktoken.model"),
        (content("tokenizer/tiktoken.model", b"no base64\n"), "tiktoken.model"),
        (remove("tokenizer", "tokenizer_config.json"), "tokenizer_config.json"),
        (content("tokenizer/tokenizer_config.json", b"{"), "tokenizer_config.json"),
        (remove("tokenizer", "chat_template.jinja"), "chat_template.jinja"),
        (content("tokenizer/chat_template.jinja", b"{% if %}"), "chat template"),
        (content("tokenizer/chat_template.jinja", b"{{ raise_exception('no users') }}"), "no users"),
        (content("tokenizer/generation_config.json", b"{"), "generation_config.json"),
    ],
)
def test_a_prompt_needs_the_tokenizer(
    capfd: pytest.CaptureFixture[str], bundle: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(bundle)
    refused(capfd, ["run", str(bundle), "--prompt", "Hi", "--max-new-tokens", "1"], named)


def test_token_ids_need_no_tokenizer(capfd: pytest.CaptureFixture[str], bundle: Path) -> None:
    shutil.rmtree(bundle / "tokenizer")
    arguments = ["run", str(bundle), "--token-ids", "1 2", "--max-new-tokens", "3", "--ignore-eos"]
    assert run([*arguments, "--json"]) == 0
    new_ids = json.loads(capfd.readouterr().out)["new_ids"]
    assert len(new_ids) == 3
    assert run(arguments) == 0
    assert capfd.readouterr().out.split() == [str(item) for item in new_ids]


# Where --save-logits and the reports go.


@pytest.mark.parametrize("where", ["folder", "file/logits.npz", pytest.param("x" * 300, id="long"), ".", ""])
def test_logits_that_cannot_be_saved(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("as it was")
    arguments = ["run", str(tiny.bundle), "--token-ids", "1", "--max-new-tokens", "1", "--save-logits", where]
    assert run(arguments) == 3
    err = capfd.readouterr().err
    assert err.startswith("k25-export: ")
    assert err.count("\n") == 1
    assert where in err
    assert files(tmp_path) == {"folder": None, "file": b"as it was"}


def _small_files_only() -> None:
    """As on a full disk: Python ignores SIGXFSZ, so a write beyond the limit fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_logits_that_do_not_fit_the_disk_leave_the_older_file(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "logits.npz"
    path.write_bytes(b"older")
    arguments = ["run", tiny.bundle, "--token-ids", "1", "--max-new-tokens", "1", "--save-logits", path]
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=60, preexec_fn=_small_files_only
    )
    assert done.returncode == 3
    assert done.stderr == f"k25-export: {path}: cannot be written: File too large\n"
    assert files(tmp_path) == {"logits.npz": b"older"}


def test_reports_that_do_not_fit_the_disk_leave_the_older_ones(bundle: Path) -> None:
    shutil.rmtree(bundle / "reports")
    (bundle / "reports").mkdir()
    (bundle / "reports" / "parity.json").write_bytes(b"older")
    before = files(bundle)
    done = subprocess.run(
        [COMMAND, "validate", bundle, "-q"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=_small_files_only,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # see _one_thread
    )
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("k25-export: ")
    assert done.stderr.count("\n") == 1
    assert str(bundle / "reports") in done.stderr
    assert "File too large" in done.stderr
    assert files(bundle) == before
