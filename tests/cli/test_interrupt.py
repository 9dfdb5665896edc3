"""An export that is stopped in the middle, or is not alone: whole or not at all, and the next run clears up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run

DEADLINE = 60
LARGEST_PROCESS_ID = 1 << 22
#: Forks a process for each export, so that torch is imported once. Graphs come from a finished bundle: no test waits
#: for a trace. A request says what happens at the third graph: `wait` announces it and sleeps; `swallow` loses a
#: SIGINT, as a callback of a weak reference in torch sometimes does.
NURSERY = """
import json, os, resource, signal, sys, time
from pathlib import Path
from k25_cli.main import main
from k25_export import trace
from k25_export.manifest import read_manifest
from k25_export.traced_component import TracedComponent

finished = Path(sys.argv[1])
manifest = read_manifest(finished)
request, count = {}, 0

class Swallower:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # Python prints what a destructor raises, and goes on

def traced(spec, precision):
    global count
    count += 1
    if count == 3 and request["at_the_third"] == "wait":
        print("third", file=sys.stderr, flush=True)
        time.sleep(1000)
    if count == 3 and request["at_the_third"] == "swallow":
        Swallower()
    file = manifest.component(spec.name).file(precision)
    return TracedComponent(data=(finished / file.path).read_bytes(), inputs=file.inputs, outputs=file.outputs)

trace.traced_component_from_spec = traced
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "wait_for" in request:
        _, status = os.waitpid(request["wait_for"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    process = os.fork()
    if process == 0:
        signal.alarm(request["deadline"])
        if request["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], request["largest_file"]))
        for number, path in enumerate(request["files"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        main(request["arguments"])
    print(process, flush=True)
"""


class Nursery:
    """Starts exports of the tiny checkpoint in processes of their own."""

    def __init__(self, tiny: Any, folder: Path) -> None:
        self._tiny = tiny
        self._folder = folder
        self._started = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, tiny.bundle],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("K25_")},
            # A shell has its background jobs ignore interrupts, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        self._process.communicate(timeout=DEADLINE)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, **request: Any) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def start(self, output: Path, *options: str, at_the_third: str = "go on", largest_file: int = 0) -> Run:
        self._started += 1
        streams = [self._folder / f"{self._started}.{kind}" for kind in ("out", "err")]
        arguments = ["export", str(self._tiny.checkpoint), "--output", str(output), *options]
        process = self.ask(
            arguments=arguments,
            files=[str(path) for path in streams],
            at_the_third=at_the_third,
            largest_file=largest_file,
            deadline=DEADLINE,
        )
        return Run(self, process, *streams)


class Run:
    """One export under way."""

    def __init__(self, nursery: Nursery, process: int, out: Path, err: Path) -> None:
        self._nursery = nursery
        self._process = process
        self._out, self._err = out, err

    def reach_the_third_graph(self) -> None:
        _wait_until(lambda: self._err.is_file() and "third\n" in self._err.read_text())

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process, number)

    def end(self) -> tuple[int, str, str]:
        """Exit code (negative: a signal), standard output, standard error."""
        code = self._nursery.ask(wait_for=self._process)
        return code, self._out.read_text(), self._err.read_text()


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def nursery(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    found = Nursery(tiny, tmp_path_factory.mktemp("streams"))
    yield found
    found.close()


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """An empty folder for the outputs."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftovers(output: Path) -> list[str]:
    """What lies beside the output: hidden folders of an export under way or killed."""
    return [name for name in names(output.parent) if name != output.name]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped_in_the_middle(nursery: Nursery, output: Path, number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal when the third graph is under way and something has been written."""
    started = nursery.start(output, "--latent-norm-eps", "1e-5", at_the_third="wait")
    started.reach_the_third_graph()
    (staging,) = leftovers(output)
    assert files(output.parent / staging) != {}
    started.send(number)
    return started.end()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over a bundle"])
def test_a_write_that_the_system_refuses_half_way(nursery: Nursery, tiny: Any, parent: Path, existing: bool) -> None:
    """As on a full disk: Python ignores SIGXFSZ, so a write beyond the limit fails."""
    if existing:
        shutil.copytree(tiny.bundle, parent / "bundle")
    before = files(parent)
    largest = max(path.stat().st_size for path in (tiny.bundle / "components").iterdir())
    started = nursery.start(parent / "bundle", "-q", "--latent-norm-eps", "1e-5", largest_file=largest - 1)
    code, out, err = started.end()
    assert (code, out) == (3, "")
    assert err.startswith(f"k25-export: bundle {parent / 'bundle'}: cannot be written: File too large")
    assert err.count("\n") == 1
    assert names(parent) == (["bundle"] if existing else [])
    assert files(parent) == before


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over a bundle"])
def test_sigint_leaves_things_as_they_were(nursery: Nursery, tiny: Any, parent: Path, existing: bool) -> None:
    if existing:
        shutil.copytree(tiny.bundle, parent / "bundle")
    before = files(parent)
    code, out, err = stopped_in_the_middle(nursery, parent / "bundle", signal.SIGINT)
    assert code == 130
    assert out == ""
    assert err.splitlines()[-1] == "k25-export: interrupted"
    assert "Traceback" not in err
    assert names(parent) == (["bundle"] if existing else [])
    assert files(parent) == before


def test_a_sigint_that_a_destructor_swallows_still_ends_the_run(nursery: Nursery, parent: Path) -> None:
    code, out, err = nursery.start(parent / "bundle", at_the_third="swallow").end()
    assert "__del__" in err  # Python has swallowed it
    assert code == 130
    assert out == ""
    assert names(parent) == []


def test_a_sigint_while_a_library_is_loaded_is_130(tiny: Any) -> None:
    """A library written in C turns an interrupt of its import into an ImportError; onnxruntime does."""
    program = """
import signal, sys
from k25_cli.main import main

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("initialization failed") from None

sys.meta_path.insert(0, Interrupted())
main(sys.argv[1:])
"""
    arguments = [sys.executable, "-c", program, "run", tiny.bundle, "--token-ids", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.strip() == "k25-export: interrupted"


@pytest.mark.parametrize("name", ["bundle", "bundle [v1]"])
def test_the_next_run_clears_up_after_sigkill(nursery: Nursery, parent: Path, name: str) -> None:
    output = parent / name
    code, _, _ = stopped_in_the_middle(nursery, output, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not output.exists()
    assert len(leftovers(output)) == 1
    code, out, err = nursery.start(output, "--json", "-q").end()
    assert (code, err) == (0, "")
    assert json.loads(out)["reused"] is False
    assert names(parent) == [name]
    assert run(["run", str(output), "--token-ids", "1", "--max-new-tokens", "1"]) == 0


def test_sigkill_leaves_the_older_bundle(nursery: Nursery, tiny: Any, parent: Path) -> None:
    bundle = Path(shutil.copytree(tiny.bundle, parent / "bundle"))
    before = files(bundle)
    stopped_in_the_middle(nursery, bundle, signal.SIGKILL)
    assert files(bundle) == before


def test_only_what_dead_runs_left_of_this_output_is_removed(nursery: Nursery, parent: Path) -> None:
    kept = [f".bundle.partial-{os.getpid()}-abc", f".bundle2.partial-{LARGEST_PROCESS_ID}-abc", ".bundle.mine"]
    for name in [*kept, f".bundle.partial-{LARGEST_PROCESS_ID}-abc"]:
        (parent / name).mkdir()
    code, _, err = nursery.start(parent / "bundle", "-q").end()
    assert (code, err) == (0, "")
    assert names(parent) == sorted([*kept, "bundle"])


def test_exports_at_once_make_one_bundle(nursery: Nursery, tiny: Any, parent: Path) -> None:
    output = parent / "bundle"
    shutil.copytree(tiny.bundle, output)
    epsilons = ["1e-05", "0.0001", "0.001"]
    started = [nursery.start(output, "-q", "--latent-norm-eps", epsilon) for epsilon in epsilons]
    results = [each.end() for each in started]
    codes = [code for code, _, _ in results]
    assert 0 in codes
    assert set(codes) <= {0, 3}  # one that another overtakes may say so
    assert [err for code, _, err in results if code == 0 and err] == []
    assert names(parent) == ["bundle"]
    manifest = json.loads((output / "manifest.json").read_bytes())
    assert str(manifest["options"]["latent_norm_eps"]) in epsilons
    assert sorted(files(output)) == sorted(name for name in files(tiny.bundle) if not name.startswith("reports/"))


def test_an_export_under_way_is_no_leftover(nursery: Nursery, parent: Path) -> None:
    """A second export must not take away what a first one is writing."""
    output = parent / "bundle"
    first = nursery.start(output, at_the_third="wait")
    first.reach_the_third_graph()
    under_way = leftovers(output)
    second, _, err = nursery.start(output, "-q").end()
    assert (second, err) == (0, "")
    assert leftovers(output) == under_way
    first.send(signal.SIGINT)
    code, _, _ = first.end()
    assert code == 130
    assert names(parent) == ["bundle"]
