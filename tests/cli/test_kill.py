"""SIGKILL in the middle of bind, verify and a streamed validation: the rerun completes, and nothing is left over."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run

PROGRAM = """
import os, sys
from pathlib import Path
real = Path.replace
count = 0
def replace(path, target):  # die between writing a temporary file and renaming it
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    return real(path, target)
Path.replace = replace
from k25_cli.main import main
main(sys.argv[2:])
"""


def _partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial" in path.name]


@pytest.mark.parametrize("verb", ["bind", "verify", "validate"])
@pytest.mark.parametrize("nth", [1, 2])
def test_killed_before_a_rename(odd: Any, tmp_path: Path, verb: str, nth: int) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(odd.checkpoint, checkpoint)
    shutil.copytree(odd.bundle, bundle)
    arguments = [verb, str(bundle), "--checkpoint", str(checkpoint), "-q"]
    arguments += {
        "bind": ["--all", "--output", str(checkpoint)],
        "verify": ["--record"],
        "validate": ["--stream", "on"],
    }[verb]
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(nth), *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert _partial_files(tmp_path)
    assert run(arguments) == 0
    assert _partial_files(tmp_path) == []
    assert run(["verify", str(bundle), "--checkpoint", str(checkpoint), "-q"]) == 0


def test_killed_at_any_time_a_bundle_is_whole_or_not_there(odd: Any, tmp_path: Path) -> None:
    """Reuse is quick, so the kill falls anywhere between start and end."""
    bundle = tmp_path / "bundle"
    shutil.copytree(odd.bundle, bundle)
    before = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    arguments = ["export", str(odd.checkpoint), "--output", str(bundle), "-q"]
    code = "import sys; from k25_cli.main import main; main(sys.argv[1:])"
    for delay in (0.02, 0.1, 0.2):
        with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL) as process:
            time.sleep(delay)
            process.kill()
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        assert {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
