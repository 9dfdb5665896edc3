"""Folders that appear whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from k25_export.staging import staged_folder
from k25_plugins.errors import InputError

MARKER = "ours"


def is_ours(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def write(target: Path, content: str = "new") -> None:
    with staged_folder(target, is_ours=is_ours, what="thing") as staging:
        assert list(staging.iterdir()) == []
        (staging / MARKER).write_text(content)
        (staging / "sub").mkdir()
        (staging / "sub" / "data").write_text(content)


def write_half(target: Path, error: BaseException) -> None:
    with staged_folder(target, is_ours=is_ours, what="thing") as staging:
        (staging / MARKER).write_text("half")
        raise error


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


NEW = {MARKER: "new", "sub/data": "new"}
OLD = {MARKER: "old", "sub/data": "old", "more": "old"}


def make_old(target: Path) -> None:
    (target / "sub").mkdir(parents=True)
    for name in OLD:
        (target / name).write_text("old")


def dead_process() -> int:
    """The id of a process that was there and is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_the_folder_appears_with_its_missing_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "bundle"
    with staged_folder(target, is_ours=is_ours, what="thing") as staging:
        (staging / "x").write_text("x")
        assert not target.exists()
    assert contents(tmp_path) == {"a/b/bundle/x": "x"}
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_others_may_read_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "bundle")
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) & 0o055 == 0o055


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == NEW


def test_a_folder_of_ours_is_replaced_whole(tmp_path: Path) -> None:
    make_old(tmp_path / "bundle")
    write(tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    make_old(tmp_path / "bundle")
    with staged_folder(tmp_path / "bundle", is_ours=is_ours, what="thing") as staging:
        (staging / MARKER).write_text("new")
        assert contents(tmp_path / "bundle") == OLD
    assert contents(tmp_path / "bundle") == {MARKER: "new"}


def test_relative_and_linked_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("relative"))
    assert contents(tmp_path / "relative") == NEW
    make_old(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == NEW


def test_leaving_the_working_directory_does_not_move_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder(Path("bundle"), is_ours=is_ours, what="thing") as staging:
        (staging / "x").write_text("x")
        os.chdir(tmp_path / "elsewhere")
    assert contents(tmp_path) == {"bundle/x": "x"}


@pytest.mark.parametrize("names", [["data"], [".hidden"], ["manifest.json", "other"]])
def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "bundle").mkdir()
    for name in names:
        (tmp_path / "bundle" / name).write_text("foreign")
    with pytest.raises(InputError, match=r"thing .*bundle: the folder is not empty and is no thing of ours"):
        write(tmp_path / "bundle")
    assert contents(tmp_path) == {f"bundle/{name}": "foreign" for name in names}


def test_a_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("foreign")
    with pytest.raises(InputError, match="expected a folder, found a file"):
        write(tmp_path / "bundle")
    assert contents(tmp_path) == {"bundle": "foreign"}


def test_a_dangling_link_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to("nowhere")
    with pytest.raises(InputError):
        write(tmp_path / "bundle")
    assert (tmp_path / "bundle").readlink() == Path("nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


class Stop(BaseException):
    """Neither an error nor an interrupt that anybody knows."""


@pytest.mark.parametrize("error", [ValueError("x"), InputError("x"), KeyboardInterrupt(), SystemExit(3), Stop()])
@pytest.mark.parametrize("is_there", [False, True])
def test_nothing_half_written_is_left(tmp_path: Path, error: BaseException, is_there: bool) -> None:
    target = tmp_path / "bundle"
    if is_there:
        make_old(target)
    with pytest.raises(type(error)) as caught:
        write_half(target, error)
    assert caught.value is error
    assert contents(tmp_path) == ({f"bundle/{name}": text for name, text in OLD.items()} if is_there else {})
    assert [path.name for path in tmp_path.iterdir()] == (["bundle"] if is_there else [])


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def raise_it(*arguments: Any, **options: Any) -> NoReturn:
        raise error

    return raise_it


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_is_an_input_error(tmp_path: Path, number: int, is_there: bool) -> None:
    target = tmp_path / "bundle"
    if is_there:
        make_old(target)
    with pytest.raises(InputError, match=os.strerror(number)) as caught:
        write_half(target, OSError(number, os.strerror(number), "/somewhere/big.onnx"))
    assert str(target) in str(caught.value)
    assert "big.onnx" in str(caught.value)
    assert contents(tmp_path) == ({f"bundle/{name}": text for name, text in OLD.items()} if is_there else {})
    assert [path.name for path in tmp_path.iterdir()] == (["bundle"] if is_there else [])


def test_a_disk_that_is_full_only_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(tmp_path / "bundle")
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match="No space left on device"):
        write(tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_files_are_flushed_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "bundle").exists()
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "bundle")
    for name in NEW:
        assert (tmp_path / "bundle" / name).stat().st_ino in flushed


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"thing .*bundle"):
        write(tmp_path / "file" / "bundle")
    assert contents(tmp_path) == {"file": "x"}


def test_a_parent_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may write everywhere: the refusal is simulated.
    monkeypatch.setattr(tempfile, "mkdtemp", raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match=r"thing .*bundle: cannot be created: Permission denied"):
        write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match="Permission denied"):
        write(tmp_path / "a" / "bundle")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    monkeypatch.setattr(Path, "iterdir", raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match="Permission denied"):
        write(tmp_path / "bundle")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="thing"):
        write(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="thing"):
        write(tmp_path / ("x" * 250))  # the name of the temporary folder does not fit
    assert list(tmp_path.iterdir()) == []


class Renames:
    """Stands in for `os.rename` and `os.replace`: the call of this number raises, all others are done."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.number, self.error, self.calls = number, error, 0
        self.rename = os.rename

    def __call__(self, source: Any, target: Any, **options: Any) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise self.error
        self.rename(source, target, **options)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_an_old_folder_is_kept_when_the_exchange_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    make_old(tmp_path / "bundle")
    renames = Renames(number, error)
    monkeypatch.setattr(os, "rename", renames)
    monkeypatch.setattr(os, "replace", renames)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write(tmp_path / "bundle")
    assert renames.calls >= number
    assert contents(tmp_path) == {f"bundle/{name}": text for name, text in OLD.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def leftover(parent: Path, process: int, name: str = "bundle") -> Path:
    path = parent / f".{name}.partial-{process}-abcd1234"
    path.mkdir()
    (path / "half").write_text("half")
    return path


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    path = leftover(tmp_path, dead_process())
    write(tmp_path / "bundle")
    assert not path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    # Not a name that we make up: what a process leaves that is killed while it writes.
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from k25_export.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), is_ours=lambda folder: False, what='thing') as staging:\n"
        "    (staging / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "bundle")], check=False)
    assert done.returncode == -9
    assert len(list(tmp_path.rglob("half"))) == 1
    assert not (tmp_path / "bundle").exists()
    write(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_work_of_living_processes_and_of_others_is_kept(tmp_path: Path) -> None:
    living = leftover(tmp_path, os.getpid())
    another = leftover(tmp_path, dead_process(), name="another")
    write(tmp_path / "bundle")
    assert living.is_dir()
    assert another.is_dir()


@pytest.mark.parametrize("owner", ["99999999999999999999", "²", "x", "-1"])
def test_folders_that_look_like_leftovers_do_no_harm(tmp_path: Path, owner: str) -> None:
    path = tmp_path / f".bundle.partial-{owner}-abcd"
    path.mkdir()
    write(tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == NEW


@pytest.mark.parametrize("name", ["bundle[1]", "bund*", "b?"])
def test_leftovers_are_found_by_name_and_not_by_pattern(tmp_path: Path, name: str) -> None:
    mine = leftover(tmp_path, dead_process(), name=name)
    similar = leftover(tmp_path, dead_process(), name=name.replace("[1]", "1").replace("*", "le").replace("?", "x"))
    write(tmp_path / name)
    assert contents(tmp_path / name) == NEW
    assert not mine.exists()
    assert similar.exists()


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("data")
    (tmp_path / f".bundle.partial-{dead_process()}-abcd").symlink_to(tmp_path / "precious")
    write(tmp_path / "bundle")
    assert contents(tmp_path / "precious") == {"data": "data"}


def test_a_second_writer_of_the_same_target_does_not_disturb(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "bundle", is_ours=is_ours, what="thing") as first:
        (first / MARKER).write_text("first")
        write(tmp_path / "bundle", "second")
        assert contents(first) == {MARKER: "first"}
    assert contents(tmp_path / "bundle") == {MARKER: "first"}
    shutil.rmtree(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
