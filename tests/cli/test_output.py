"""What goes where: results on standard output, progress on standard error, JSON for machines, pipes that close."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import VERBS, run

COMMAND = str(Path(sys.executable).with_name("k25-export"))
FULL = Path("/dev/full")

Json = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """Copies (hard links) of the fixture's folders, and one that does not exist."""

    checkpoint: Path
    bundle: Path
    new: Path


@pytest.fixture
def places(tiny: Any, tmp_path: Path) -> Places:
    for name in ("checkpoint", "bundle"):
        shutil.copytree(getattr(tiny, name), tmp_path / name, copy_function=os.link)
    return Places(checkpoint=tmp_path / "checkpoint", bundle=tmp_path / "bundle", new=tmp_path / "new")


@pytest.fixture(autouse=True)
def _traced_instantly(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a graph must be traced in this process, it is the fixture's. The environment says nothing."""
    from k25_export.manifest import read_manifest
    from k25_export.traced_component import TracedComponent

    manifest = read_manifest(tiny.bundle)

    def traced(spec: Any, precision: str) -> TracedComponent:
        file = manifest.component(spec.name).file(precision)
        return TracedComponent(data=(tiny.bundle / file.path).read_bytes(), inputs=file.inputs, outputs=file.outputs)

    monkeypatch.setattr("k25_export.trace.traced_component_from_spec", traced)
    for name in ("K25_CHECKPOINT", "K25_CACHE", "K25_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of torch that wait for one another burn what a busy machine has left."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: A call of each verb that prints a result, and a key of its JSON.
CALLS: dict[str, tuple[Callable[[Places], list[object]], str]] = {
    "inspect": (lambda at: [at.checkpoint], "parameters_total"),
    "demo-checkpoint": (lambda at: [at.new], "checkpoint"),
    "export": (lambda at: [at.checkpoint, "--output", at.new], "components"),
    "validate": (lambda at: [at.bundle], "checks"),
    "build": (lambda at: [at.checkpoint, "--output", at.new], "checks"),
    "run": (lambda at: [at.bundle, "--token-ids", "1 2", "--max-new-tokens", "3"], "new_ids"),
    "bind": (lambda at: [at.bundle, "--layer", "0", "--output", at.checkpoint, "--checkpoint", at.checkpoint], "files"),
    "verify": (lambda at: [at.bundle], "verified"),
    "compile": (lambda at: [at.bundle, "--target", "sm86", "--component", "embed"], "engines"),
    "bisect": (lambda at: [at.bundle, "--token-ids", "1 2", "--output", at.new], "sentence"),
    "bench": (lambda at: [at.bundle, "--tokens", "4", "--steps", "1", "--rounds", "1"], "read_bandwidth"),
    "plan": (lambda at: [at.checkpoint, "--gpu", "h200", "--gpus", "8", "--context", "64"], "checkpoint"),
}
#: Those that work long enough to show progress.
LONG = ["demo-checkpoint", "export", "validate", "build"]


def call(verb: str, places: Places, *options: str) -> list[str]:
    return [verb, *(str(item) for item in CALLS[verb][0](places)), *options]


def strict_json(text: str) -> Json:
    """One JSON object, without NaN and Infinity, which are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values: Json = json.loads(text, parse_constant=refuse)
    assert isinstance(values, dict)
    return values


def test_every_verb_that_prints_a_result_is_called_here() -> None:
    silent = {"completion"}
    missing = VERBS.keys() - CALLS.keys() - silent
    assert missing == set(), "add a call of the new verb to CALLS"


@pytest.mark.parametrize("verb", [verb for verb in CALLS if verb in VERBS])
def test_json_is_one_object_and_nothing_else(capfd: pytest.CaptureFixture[str], places: Places, verb: str) -> None:
    assert run(call(verb, places, "--json")) == 0
    out, err = capfd.readouterr()
    assert CALLS[verb][1] in strict_json(out)
    assert "{" not in err
    assert (err != "") or verb not in LONG


@pytest.mark.parametrize("verb", [verb for verb in CALLS if verb in VERBS])
def test_quiet_silences_standard_error(capfd: pytest.CaptureFixture[str], places: Places, verb: str) -> None:
    assert run(call(verb, places, "--quiet")) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.strip() != ""


@pytest.mark.parametrize("verb", LONG)
def test_progress_goes_to_standard_error(capfd: pytest.CaptureFixture[str], places: Places, verb: str) -> None:
    assert run(call(verb, places)) == 0
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert lines != []
    assert len(set(lines)) == len(lines)  # a line for each thing, not for each step
    assert [line for line in lines if line in out] == []


def test_the_bundle_of_the_json_is_its_folder(capfd: pytest.CaptureFixture[str], places: Places) -> None:
    """Under the same key for `export` and `build`: what a CI job hands on."""
    for verb in ("export", "build"):
        assert run(call(verb, places, "--json", "-q")) == 0
        assert strict_json(capfd.readouterr().out)["bundle"] == str(places.new)


def test_the_bundle_of_the_json_is_absolute(
    capfd: pytest.CaptureFixture[str], places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places.new.parent)
    assert run(["export", "checkpoint", "--output", "new", "--json", "-q"]) == 0
    assert strict_json(capfd.readouterr().out)["bundle"] == str(places.new)


def test_inspect_says_what_the_checkpoint_holds(capfd: pytest.CaptureFixture[str], tiny: Any) -> None:
    assert run(["inspect", str(tiny.checkpoint), "--json"]) == 0
    found = strict_json(capfd.readouterr().out)
    index = json.loads((tiny.checkpoint / "model.safetensors.index.json").read_bytes())
    assert found["tensors"] == len(index["weight_map"])
    assert found["shards"] == len(set(index["weight_map"].values()))
    assert found["tensor_bytes"] == index["metadata"]["total_size"]
    assert found["file_bytes"] == sum(path.stat().st_size for path in tiny.checkpoint.glob("*.safetensors"))
    assert sum(kind["bytes"] for kind in found["kinds"]) == found["tensor_bytes"]
    assert 0 < found["parameters_active"] < found["parameters_total"]
    assert found["problems"] == []
    assert run(["inspect", str(tiny.checkpoint)]) == 0
    out, err = capfd.readouterr()
    assert f"{found['shards']} shards" in out
    assert f"{found['tensors']:,}" in out
    assert "problems: none" in out
    assert err == ""


def test_a_terminal_gets_a_bar_and_standard_output_stays_clean(places: Places) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "demo-checkpoint", places.new],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.decode().splitlines() == [f"checkpoint: {places.new} (preset tiny, seed 0)"]
    assert b"\x1b[" in shown
    assert "━".encode() in shown


# Completion.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(capfd: pytest.CaptureFixture[str], shell: str) -> None:
    assert run(["completion", shell]) == 0
    out, err = capfd.readouterr()
    assert f"_K25_EXPORT_COMPLETE={shell}_complete" in out
    assert "k25-export" in out
    assert err == ""
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True, timeout=60)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_completion_completes(places: Places) -> None:
    environment = {"_K25_EXPORT_COMPLETE": "bash_complete", "COMP_CWORD": "1", "COMP_WORDS": "k25-export in"}
    done = subprocess.run([COMMAND], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["plain,inspect"]
    assert "Traceback" not in done.stderr


# Standard output that does not take it.


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "BUNDLE", "--token-ids", "1 2", "--max-new-tokens", "400", "--ignore-eos"],
        ["run", "BUNDLE", "--token-ids", "1 2", "--json"],
        ["inspect", "CHECKPOINT"],
        ["--help"],
        ["completion", "bash"],
    ],
)
def test_a_reader_that_goes_away_is_no_error(places: Places, arguments: list[str]) -> None:
    """`k25-export ... | head -1`: silent, and no code that means something else (1 would be: parity failed)."""
    names = {"BUNDLE": places.bundle, "CHECKPOINT": places.checkpoint}
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [COMMAND, *(names.get(item, item) for item in arguments)], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 0


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["inspect", "CHECKPOINT"], ["run", "BUNDLE", "--token-ids", "1", "--max-new-tokens", "2"]]
)
def test_standard_output_on_a_full_disk(places: Places, arguments: list[str]) -> None:
    names = {"BUNDLE": places.bundle, "CHECKPOINT": places.checkpoint}
    with FULL.open("wb") as full:
        done = subprocess.run(
            [COMMAND, *(names.get(item, item) for item in arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 3
    assert done.stderr.startswith("k25-export: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_does_not_matter(places: Places, closed: str) -> None:
    """As a service manager may start it."""
    script = f'exec "$@" {closed}>&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", COMMAND, "demo-checkpoint", places.new], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr
    assert (places.new / "config.json").is_file()


def test_text_that_the_terminal_cannot_show(places: Places) -> None:
    """A run must not end where a token's text has no encoding."""
    done = subprocess.run(
        [COMMAND, "run", places.bundle, "--token-ids", "1 2 3", "--max-new-tokens", "60", "--ignore-eos"],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stderr == b""
