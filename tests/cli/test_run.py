"""`run`: logits that can be compared from outside, seeds, prompts, and checkpoints of the Hugging Face cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from k25_cli.main import run

TOLERANCE = 2e-5
HUB_ID = "moonshotai/Kimi-K2.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Json = dict[str, Any]


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


def generated(capfd: pytest.CaptureFixture[str], bundle: Path, *options: str) -> Json:
    """The JSON of a run that works."""
    assert run(["run", str(bundle), "--json", *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    values: Json = json.loads(out)
    return values


def relative_l2(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def vocabulary(bundle: Path) -> int:
    size: int = json.loads((bundle / "manifest.json").read_bytes())["model"]["text"]["vocab_size"]
    return size


@pytest.mark.parametrize("new_tokens", [0, 1, 12])
def test_saved_logits_are_those_of_the_plain_reference(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, new_tokens: int
) -> None:
    from k25_validate.plain_reference import PlainReference

    size = vocabulary(tiny.bundle)
    prompt = [int(token) for token in np.random.default_rng(5).integers(0, size, 37)]
    path = tmp_path / "missing" / "logits.npz"
    values = generated(
        capfd,
        tiny.bundle,
        *("--token-ids", " ".join(map(str, prompt)), "--max-new-tokens", str(new_tokens), "--ignore-eos"),
        *("--save-logits", str(path)),
    )
    assert [item.name for item in path.parent.iterdir()] == ["logits.npz"]
    with np.load(path, allow_pickle=False) as saved:
        assert sorted(saved.files) == ["prompt_logits", "step_logits", "token_ids"]
        ids, prompt_logits, step_logits = saved["token_ids"], saved["prompt_logits"], saved["step_logits"]
    assert ids.tolist() == prompt + values["new_ids"]
    assert len(values["new_ids"]) == new_tokens
    assert np.issubdtype(ids.dtype, np.integer)
    assert (prompt_logits.dtype, prompt_logits.shape) == (np.float32, (len(prompt), size))
    assert (step_logits.dtype, step_logits.shape) == (np.float32, (new_tokens, size))
    assert np.array_equal(step_logits[:1], prompt_logits[-1:][:new_tokens])
    assert step_logits.argmax(axis=1).tolist() == values["new_ids"]  # greedy, from these very rows
    expected = PlainReference(tiny.checkpoint).trace(ids.tolist()).logits
    assert relative_l2(prompt_logits, expected[: len(prompt)]) < TOLERANCE
    if new_tokens:
        rows = expected[len(prompt) - 1 : len(prompt) - 1 + new_tokens]
        assert relative_l2(step_logits, rows) < TOLERANCE
        assert rows.argmax(axis=1).tolist() == values["new_ids"]


def test_saved_logits_tell_two_prompts_apart(capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path) -> None:
    """What the comparison above would say of a wrong token."""
    logits = []
    for last in (4, 5):
        path = tmp_path / f"{last}.npz"
        generated(
            capfd, tiny.bundle, "--token-ids", f"1 2 3 {last}", "--max-new-tokens", "1", "--save-logits", str(path)
        )
        logits.append(np.load(path)["prompt_logits"])
    assert relative_l2(logits[0][:3], logits[1][:3]) < TOLERANCE
    assert relative_l2(logits[0][3:], logits[1][3:]) > 100 * TOLERANCE


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--top-p", "0.95", "--top-k", "200"]])
def test_the_same_seed_gives_the_same_text(capfd: pytest.CaptureFixture[str], tiny: Any, sampling: list[str]) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "16", "--ignore-eos", *sampling]
    first, second = (generated(capfd, tiny.bundle, *options, "--seed", "7") for _ in range(2))
    assert first == second
    assert len(first["new_ids"]) == 16
    other = generated(capfd, tiny.bundle, *options, "--seed", "8")
    assert (other["new_ids"] != first["new_ids"]) == bool(sampling)  # greedy knows no seed


def test_text_is_streamed_as_in_the_json(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "12", "--ignore-eos"]
    text = generated(capfd, tiny.bundle, *options)["text"]
    assert run(["run", str(tiny.bundle), *options]) == 0
    out, err = capfd.readouterr()
    assert out == text + "\n"
    assert err == ""


def test_the_text_is_that_of_the_tokens(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    """Nothing is lost, not even an unfinished character at the end."""
    from k25_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny.bundle / "tokenizer", vocab_size=vocabulary(tiny.bundle))
    unfinished = 0
    for seed in range(12):
        values = generated(
            capfd,
            tiny.bundle,
            *("--token-ids", "1 2 3", "--max-new-tokens", "6", "--ignore-eos", "--temperature", "2"),
            *("--seed", str(seed)),
        )
        text = tokenizer.decode(values["new_ids"])
        unfinished += text.endswith("\ufffd")
        assert values["text"] == text
    assert unfinished > 0  # otherwise this shows nothing


def test_a_prompt_goes_through_the_chat_template(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "1"]
    thinking, not_thinking, raw = (
        generated(capfd, tiny.bundle, *options, *flags)["prompt_ids"]
        for flags in (["--thinking"], ["--no-thinking"], ["--raw"])
    )
    assert generated(capfd, tiny.bundle, *options)["prompt_ids"] == thinking
    assert len({tuple(ids) for ids in (thinking, not_thinking, raw)}) == 3
    text = " ".join(map(str, raw))
    assert f" {text} " in f" {' '.join(map(str, thinking))} "
    assert len(raw) < len(thinking)


def test_an_end_token_ends_the_text(capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path) -> None:
    """Whatever comes first becomes the end token; `--ignore-eos` goes on."""
    bundle = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle", copy_function=os.link))
    options = ["--token-ids", "1 2 3", "--max-new-tokens", "5"]
    everything = generated(capfd, bundle, *options, "--ignore-eos")
    assert everything["finish_reason"] == "length"
    path = bundle / "tokenizer" / "generation_config.json"
    path.unlink()
    path.write_text(json.dumps({"eos_token_id": [everything["new_ids"][2]]}))
    stopped = generated(capfd, bundle, *options)
    end = everything["new_ids"].index(everything["new_ids"][2]) + 1
    assert stopped["new_ids"] == everything["new_ids"][:end]
    assert stopped["finish_reason"] == "stop"
    assert generated(capfd, bundle, *options, "--ignore-eos")["new_ids"] == everything["new_ids"]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_checkpoint_that_has_moved_can_be_given(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle", copy_function=os.link))
    moved = Path(shutil.copytree(tiny.checkpoint, tmp_path / "moved", copy_function=os.link))
    location = json.loads((bundle / "checkpoint.json").read_bytes())
    (bundle / "checkpoint.json").unlink()
    (bundle / "checkpoint.json").write_text(json.dumps({**location, "path": str(tmp_path / "gone")}))
    options = ["--token-ids", "1 2 3", "--max-new-tokens", "4", "--ignore-eos"]
    assert run(["run", str(bundle), *options]) == 3
    assert str(tmp_path / "gone") in capfd.readouterr().err
    if how == "environment":
        monkeypatch.setenv("K25_CHECKPOINT", str(moved))
    given = ["--checkpoint", str(moved)] if how == "option" else []
    assert generated(capfd, bundle, *options, *given) == generated(capfd, tiny.bundle, *options)


# The Hugging Face cache.


@pytest.fixture
def hub(tiny: Any, tmp_path: Path) -> Path:
    """A cache with the checkpoint in it: snapshots are links into `blobs`, which are named by hash."""
    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for path in tiny.checkpoint.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        if not (repository / "blobs" / blob).exists():
            os.link(path, repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.fixture
def _traced_instantly(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from k25_export.manifest import read_manifest
    from k25_export.traced_component import TracedComponent

    manifest = read_manifest(tiny.bundle)

    def traced(spec: Any, precision: str) -> TracedComponent:
        file = manifest.component(spec.name).file(precision)
        return TracedComponent(data=(tiny.bundle / file.path).read_bytes(), inputs=file.inputs, outputs=file.outputs)

    monkeypatch.setattr("k25_export.trace.traced_component_from_spec", traced)


@pytest.mark.parametrize("location", [HUB_ID, f"{HUB_ID}@main", f"{HUB_ID}@{COMMIT}"])
def test_inspect_takes_an_id(capfd: pytest.CaptureFixture[str], hub: Path, location: str) -> None:
    assert run(["inspect", location, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["folder"] == str(hub)
    assert found["problems"] == []


@pytest.mark.usefixtures("_traced_instantly")
def test_export_run_and_validate_take_an_id(
    capfd: pytest.CaptureFixture[str], tiny: Any, hub: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    assert run(["export", HUB_ID, "--output", str(bundle), "-q"]) == 0
    capfd.readouterr()
    assert json.loads((bundle / "checkpoint.json").read_bytes())["path"] == str(hub)
    assert (bundle / "manifest.json").read_bytes() == (tiny.bundle / "manifest.json").read_bytes()
    assert not [path for path in bundle.rglob("*") if path.is_symlink()]
    options = ["--prompt", "Hello", "--max-new-tokens", "4", "--ignore-eos"]
    expected = generated(capfd, tiny.bundle, *options)
    assert generated(capfd, bundle, *options) == expected
    assert generated(capfd, tiny.bundle, *options, "--checkpoint", HUB_ID) == expected
    assert run(["validate", str(bundle), "--checkpoint", HUB_ID, "-q"]) == 0
    assert "PASSED" in capfd.readouterr().out


@pytest.mark.parametrize("location", ["moonshotai/Kimi-K9", f"{HUB_ID}@another"])
def test_an_id_that_is_not_in_the_cache(capfd: pytest.CaptureFixture[str], hub: Path, location: str) -> None:
    assert run(["inspect", location]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"k25-export: checkpoint {location}: ")
    assert err.count("\n") == 1


def test_a_download_that_is_not_complete(capfd: pytest.CaptureFixture[str], hub: Path) -> None:
    """A link of the snapshot whose blob has not come yet."""
    link = sorted(hub.glob("*.safetensors"))[-1]
    link.resolve().unlink()
    assert run(["inspect", HUB_ID]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert link.name in err
    assert "download" in err
