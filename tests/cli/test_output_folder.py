"""The folder that `export` writes (and `build`, `demo-checkpoint`): whole or not at all, reused, or left alone."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from k25_cli.main import run

COMMAND = str(Path(sys.executable).with_name("k25-export"))
#: Runs a command that permissions bind, even as root: without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2).
BOUND = (
    "import ctypes, os, sys; drop = ctypes.CDLL(None).prctl; drop(24, 1, 0, 0, 0); drop(24, 2, 0, 0, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("K25_CHECKPOINT", "K25_CACHE", "K25_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    """Hard links to the fixture's files: replace a file, never write into it."""
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """An empty folder for the outputs."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


@pytest.fixture
def bundle(tiny: Any, parent: Path) -> Path:
    """A bundle of the checkpoint, in `parent`. Hard links, too."""
    return Path(shutil.copytree(tiny.bundle, parent / "bundle", copy_function=os.link))


@pytest.fixture
def traced(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs come from the fixture's bundle at no cost; lists what was asked for."""
    from k25_export.manifest import read_manifest
    from k25_export.traced_component import TracedComponent

    asked: list[str] = []
    manifest = read_manifest(tiny.bundle)

    def instantly(spec: Any, precision: str) -> TracedComponent:
        asked.append(f"{spec.name}.{precision}")
        file = manifest.component(spec.name).file(precision)
        return TracedComponent(data=(tiny.bundle / file.path).read_bytes(), inputs=file.inputs, outputs=file.outputs)

    monkeypatch.setattr("k25_export.trace.traced_component_from_spec", instantly)
    return asked


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], *named: str) -> str:
    """Run the command: exit code 3, no output, one message that has all of `named`."""
    assert run([*arguments, "-q"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("k25-export: ")
    assert err.count("\n") == 1
    assert [text for text in named if text not in err] == [], err
    return err


def exported(capfd: pytest.CaptureFixture[str], checkpoint: Path, output: Path, *options: str) -> Json:
    """What a successful `export` says."""
    code = run(["export", str(checkpoint), "--output", str(output), "--json", "-q", *options])
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    values: Json = json.loads(out)
    return values


def files(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden files too: content by name, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def manifest_of(bundle: Path) -> Json:
    values: Json = json.loads((bundle / "manifest.json").read_bytes())
    return values


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# Outputs that are refused.


def _file(parent: Path) -> Path:
    (parent / "file").write_text("mine")
    return parent / "file"


def _below_a_file(parent: Path) -> Path:
    return _file(parent) / "bundle"


def _with_my_notes(parent: Path) -> Path:
    (parent / "mine").mkdir()
    (parent / "mine" / "notes.txt").write_text("mine")
    return parent / "mine"


def _with_a_hidden_file(parent: Path) -> Path:
    (parent / "mine").mkdir()
    (parent / "mine" / ".hidden").write_text("mine")
    return parent / "mine"


def _with_a_manifest(text: str) -> Callable[[Path], Path]:
    def make(parent: Path) -> Path:
        (parent / "mine").mkdir()
        (parent / "mine" / "manifest.json").write_text(text)
        return parent / "mine"

    return make


def _dangling_link(parent: Path) -> Path:
    (parent / "link").symlink_to("nowhere")
    return parent / "link"


def _loop(parent: Path) -> Path:
    (parent / "loop").symlink_to("loop")
    return parent / "loop"


def _below_a_loop(parent: Path) -> Path:
    return _loop(parent) / "bundle"


def _itself(parent: Path) -> Path:
    return parent.parent / "checkpoint"


def _long_name(parent: Path) -> Path:
    return parent / ("x" * 300)


def _long_path(parent: Path) -> Path:
    return parent / ("x/" * 3000)


REFUSED = [
    _file, _below_a_file, _with_my_notes, _with_a_hidden_file, _dangling_link, _loop, _below_a_loop, _itself,
    _long_name, _long_path,
    _with_a_manifest('{"format": "web-extension"}'), _with_a_manifest("no JSON"), _with_a_manifest("[]"),
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED)
@pytest.mark.parametrize("verb", ["export", "build"])
def test_an_output_that_is_no_bundle_of_ours_is_left_alone(
    capfd: pytest.CaptureFixture[str],
    checkpoint: Path,
    parent: Path,
    traced: list[str],
    verb: str,
    make: Callable[[Path], Path],
) -> None:
    output = make(parent)
    before = files(parent.parent)
    refused(capfd, [verb, str(checkpoint), "--output", str(output)], output.name[:40])
    assert files(parent.parent) == before
    assert traced == []


@pytest.mark.parametrize("make", [_file, _below_a_file, _with_my_notes, _with_a_hidden_file, _long_name, _long_path])
def test_a_demo_checkpoint_overwrites_nothing(
    capfd: pytest.CaptureFixture[str], parent: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(parent)
    before = files(parent)
    refused(capfd, ["demo-checkpoint", str(folder)], folder.name[:40])
    assert files(parent) == before


def test_the_checkpoint_is_not_deleted_with_the_bundle_that_it_lies_in(
    capfd: pytest.CaptureFixture[str], tiny: Any, bundle: Path, traced: list[str]
) -> None:
    """Replacing a bundle whole must not take the checkpoint, which may be 595 GB, with it."""
    inside = bundle / "checkpoint"
    shutil.copytree(tiny.checkpoint, inside, copy_function=os.link)
    before = files(bundle)
    arguments = ["export", str(inside), "--output", str(bundle), "--latent-norm-eps", "1e-5"]
    refused(capfd, arguments, str(bundle))
    assert files(bundle) == before


def test_a_bundle_inside_its_checkpoint_is_fine(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, traced: list[str]
) -> None:
    before = files(checkpoint)
    exported(capfd, checkpoint, checkpoint / "bundle")
    after = files(checkpoint)
    assert {name: after[name] for name in before} == before
    assert exported(capfd, checkpoint, checkpoint / "bundle")["reused"] is True


# Outputs that are written.


def test_missing_parents_are_created(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, parent: Path, traced: list[str]
) -> None:
    output = parent / "a" / "b c" / "ünïcødé" / "bundle"
    values = exported(capfd, checkpoint, output)
    assert values["bundle"] == str(output)
    assert values["reused"] is False
    assert values["components"] == ["embed", "dense_layer", "moe_layer", "head", "vision"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle"]
    assert run(["run", str(output), "--token-ids", "1", "--max-new-tokens", "1"]) == 0


def test_an_empty_folder_and_a_link_to_one_are_filled(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, parent: Path, traced: list[str]
) -> None:
    (parent / "real").mkdir()
    (parent / "link").symlink_to("real")
    exported(capfd, checkpoint, parent / "link")
    assert sorted(path.name for path in parent.iterdir()) == ["link", "real"]
    assert (parent / "link").is_symlink()
    assert (parent / "real" / "manifest.json").is_file()


def test_a_relative_output_is_below_the_working_folder(
    capfd: pytest.CaptureFixture[str],
    checkpoint: Path,
    parent: Path,
    traced: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(parent)
    assert exported(capfd, Path("../checkpoint"), Path("bundle"))["bundle"] == str(parent / "bundle")
    assert json.loads((parent / "bundle" / "checkpoint.json").read_bytes())["path"] == str(checkpoint)


# An existing bundle.


def test_a_bundle_is_reused_where_nothing_changed(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path, traced: list[str]
) -> None:
    (bundle / "reports" / "mine.txt").write_text("kept")
    before = files(bundle)
    places = {path: path.stat().st_ino for path in bundle.rglob("*") if path.name != "checkpoint.json"}
    values = exported(capfd, checkpoint, bundle)
    assert values["reused"] is True
    assert traced == []
    assert {path: path.stat().st_ino for path in places} == places
    after = files(bundle)
    assert json.loads(after.pop("checkpoint.json") or b"")["path"] == str(checkpoint)  # it has moved
    assert after == {name: content for name, content in before.items() if name != "checkpoint.json"}


def _other_option(checkpoint: Path, bundle: Path) -> list[str]:
    return ["--latent-norm-eps", "1e-5"]


def _other_config(checkpoint: Path, bundle: Path) -> list[str]:
    values = json.loads((checkpoint / "config.json").read_bytes())
    values["text_config"]["routed_scaling_factor"] = 1.25
    replace(checkpoint / "config.json", json.dumps(values).encode())
    return []


def _other_tokenizer(checkpoint: Path, bundle: Path) -> list[str]:
    replace(checkpoint / "chat_template.jinja", b"{{ messages[0].content }}")
    return []


def _lost_component(checkpoint: Path, bundle: Path) -> list[str]:
    (bundle / "components" / "head.bf16.onnx").unlink()
    return []


def _changed_component(checkpoint: Path, bundle: Path) -> list[str]:
    path = bundle / "components" / "head.fp32.onnx"
    raw = path.read_bytes()
    replace(path, raw[:-1] + bytes([raw[-1] ^ 1]))
    return []


def _changed_tokenizer_of_the_bundle(checkpoint: Path, bundle: Path) -> list[str]:
    replace(bundle / "tokenizer" / "tiktoken.model", b"")
    return []


def _manifest_of_another_version(checkpoint: Path, bundle: Path) -> list[str]:
    replace(bundle / "manifest.json", b'{"format": "k25-bundle", "schema_version": 0}')
    return []


CHANGES = [
    _other_option, _other_config, _other_tokenizer, _lost_component, _changed_component,
    _changed_tokenizer_of_the_bundle, _manifest_of_another_version,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_is_replaced_whole_where_something_changed(
    capfd: pytest.CaptureFixture[str],
    checkpoint: Path,
    bundle: Path,
    traced: list[str],
    change: Callable[[Path, Path], list[str]],
) -> None:
    options = change(checkpoint, bundle)
    (bundle / "components" / "stale.fp32.onnx").write_bytes(b"of an older version")
    (bundle / "reports" / "parity.json").write_bytes(b"of the older bundle")
    values = exported(capfd, checkpoint, bundle, *options)
    assert values["reused"] is False
    assert len(traced) == len(list((bundle / "components").iterdir()))
    fresh = bundle.parent / "fresh"
    exported(capfd, checkpoint, fresh, *options)
    assert files(bundle) == files(fresh)
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "fresh"]


def _disk_full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted() -> NoReturn:
    raise KeyboardInterrupt


def _broken() -> NoReturn:
    raise ZeroDivisionError("on purpose")


@pytest.fixture(params=["moe_layer.bf16", "manifest.json", "rename"])
def failing_at(request: pytest.FixtureRequest, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets an export fail: `failing_at(how)`."""

    def fail(how: Callable[[], NoReturn]) -> None:
        write_bytes, write_text, rename = Path.write_bytes, Path.write_text, Path.rename

        def bytes_written(path: Path, data: Any) -> int:
            if request.param in path.name:
                write_bytes(path, data[:1])
                how()
            return write_bytes(path, data)

        def text_written(path: Path, data: str, **options: Any) -> int:
            if request.param == path.name:
                write_text(path, data[:1], **options)
                how()
            return write_text(path, data, **options)

        def renamed(path: Path, target: Any) -> Path:
            if request.param == "rename" and Path(target).name == "bundle" and ".partial" in str(path):
                monkeypatch.undo()  # putting the old one back must work
                how()
            return rename(path, target)

        monkeypatch.setattr(Path, "write_bytes", bytes_written)
        monkeypatch.setattr(Path, "write_text", text_written)
        monkeypatch.setattr(Path, "rename", renamed)

    return iter([fail])


@pytest.mark.parametrize(("how", "code"), [(_disk_full, 3), (_interrupted, 130), (_broken, 5)])
@pytest.mark.parametrize("existing", [True, False], ids=["over a bundle", "new"])
def test_a_failing_export_leaves_things_as_they_were(
    capfd: pytest.CaptureFixture[str],
    checkpoint: Path,
    bundle: Path,
    failing_at: Iterator[Callable[[Callable[[], NoReturn]], None]],
    how: Callable[[], NoReturn],
    code: int,
    existing: bool,
) -> None:
    if not existing:
        shutil.rmtree(bundle)
    before = files(bundle.parent)
    next(failing_at)(how)
    arguments = ["export", str(checkpoint), "--output", str(bundle), "--latent-norm-eps", "1e-5", "-q"]
    assert run(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert files(bundle.parent) == before
    if code == 3:
        assert err.startswith(f"k25-export: bundle {bundle}: cannot be written: No space left on device")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--cache", "FILE"], "cache "), (["--cache", "FOLDER", "--cache-limit", "much"], "much")],
)
def test_a_cache_that_cannot_be_used(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, parent: Path, options: list[str], named: str
) -> None:
    (parent / "file").write_text("mine")
    places = {"FILE": str(parent / "file"), "FOLDER": str(parent / "folder")}
    arguments = ["export", str(checkpoint), "--output", str(parent / "bundle")]
    refused(capfd, [*arguments, *(places.get(item, item) for item in options)], named)
    assert not (parent / "bundle").exists()
    assert (parent / "file").read_text() == "mine"


# What the operating system refuses, in a process of its own.


def _command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(item) for item in arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


def _small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # Python ignores SIGXFSZ: writing fails


def test_a_demo_checkpoint_that_cannot_be_written_to_its_end(parent: Path) -> None:
    done = _command(COMMAND, "demo-checkpoint", parent / "new", "-q", preexec_fn=_small_files_only)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith(f"k25-export: demo checkpoint {parent / 'new'}: cannot be written: File too large")
    assert done.stderr.count("\n") == 1
    assert list(parent.iterdir()) == []


@pytest.fixture
def read_only(parent: Path) -> Iterator[Path]:
    """`parent`, without write permission; skips where a process can be given none that is bound by it."""
    parent.chmod(0o555)
    touched = _command(sys.executable, "-c", BOUND, "/usr/bin/touch", parent / "probe")
    if touched.returncode == 0:
        pytest.skip("permissions do not bind this user")
    yield parent
    parent.chmod(0o755)


@pytest.mark.parametrize("verb", ["export", "build", "demo-checkpoint"])
@pytest.mark.parametrize("name", ["new", "new/deeper"])
def test_a_folder_that_is_not_writable(checkpoint: Path, read_only: Path, verb: str, name: str) -> None:
    output = read_only / name
    arguments = [output] if verb == "demo-checkpoint" else [checkpoint, "--output", output]
    done = _command(sys.executable, "-c", BOUND, COMMAND, verb, *arguments)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("k25-export: ")
    assert done.stderr.count("\n") == 1
    assert str(output) in done.stderr
    assert "Permission denied" in done.stderr
    assert list(read_only.iterdir()) == []


def test_a_checkpoint_that_is_not_readable(checkpoint: Path, read_only: Path) -> None:
    (shard,) = checkpoint.glob("model-00001-*")
    for path, content in ((shard, shard.read_bytes()), (checkpoint / "config.json", b"{}")):
        replace(path, content)
        path.chmod(0)
        done = _command(sys.executable, "-c", BOUND, COMMAND, "inspect", checkpoint)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert done.stderr.count("\n") == 1
        assert path.name in done.stderr
        assert "Permission denied" in done.stderr
