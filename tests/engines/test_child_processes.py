"""Children that crash, hang, eat memory or are killed: a message for each target, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import some_job

from k25_engines import child_processes
from k25_engines.build_job import Built, Event, event_from_json, event_to_json, job_from_json, job_to_json
from k25_engines.child_processes import ChildLimits, JobResult, free_memory_bytes, run_jobs
from k25_plugins.errors import InputError

#: What the stand-ins for the real child begin with: they say that they started sm80.
STARTED = "import os, sys, time, json; print(json.dumps({'started': 'sm80'}), flush=True); "
BUILT = Built(
    target="sm80", bytes=3, sha256="0" * 64, seconds=1.5, peak_memory_bytes=9, plugin_layers={"MLA": 1},
    checks={"parser": "accepted"}, warnings=("odd",),
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobResult]:
    def run(program: str, **limits: Any) -> JobResult:
        monkeypatch.setattr(child_processes, "COMMAND", (sys.executable, "-c", program))
        job = some_job(tmp_path / "job")
        (result,) = run_jobs([job], limits=ChildLimits(**limits), environment={}, progress=lambda *_: None)
        return result

    return run


def messages(result: JobResult) -> str:
    assert [failure.target for failure in result.failed] == ["sm80", "sm120"]
    for failure in result.failed:
        assert failure.message.startswith(f"moe_layer for {failure.target}: ")
    return result.failed[0].message


def test_a_crash_names_the_signal_and_the_last_words(run: Callable[..., JobResult]) -> None:
    result = run(STARTED + "print('assertion x failed', file=sys.stderr, flush=True); os.abort()")
    assert "SIGABRT" in messages(result)
    assert "assertion x failed" in messages(result)
    assert {failure.kind for failure in result.failed} == {"internal"}


def test_a_kill_says_that_memory_may_be_out(run: Callable[..., JobResult]) -> None:
    result = run(STARTED + "os.kill(os.getpid(), 9)")
    assert "SIGKILL" in messages(result)
    assert "memory" in messages(result)


def test_an_early_end_names_the_exit_code(run: Callable[..., JobResult]) -> None:
    assert "exit code 7" in messages(run(STARTED + "sys.exit(7)"))


def test_a_child_that_takes_too_long_is_ended(run: Callable[..., JobResult]) -> None:
    begin = time.monotonic()
    result = run(STARTED + "time.sleep(300)", seconds=0.3)
    assert time.monotonic() - begin < 60
    assert "took more than 0.3 s" in messages(result)
    assert "--timeout" in messages(result)
    assert {failure.kind for failure in result.failed} == {"input"}


def test_a_child_that_takes_too_much_memory_is_ended(run: Callable[..., JobResult]) -> None:
    program = STARTED + "data = bytearray(b'x') * (300 << 20); time.sleep(300)"
    result = run(program, memory_bytes=100 << 20)
    assert "more than the limit of 104857600" in messages(result)
    assert "--memory-limit" in messages(result)


def test_what_was_built_before_a_crash_is_kept(run: Callable[..., JobResult]) -> None:
    line = event_to_json(Event(built=BUILT))
    result = run(f"import os; print({line!r}, flush=True); os.abort()")
    assert result.built == (BUILT,)
    assert [failure.target for failure in result.failed] == ["sm120"]


def test_half_a_line_is_no_event(run: Callable[..., JobResult]) -> None:
    line = event_to_json(Event(built=BUILT))
    result = run(f"import os; print({line[:40]!r}, end='', flush=True); os.kill(os.getpid(), 9)")
    assert result.built == ()
    assert "SIGKILL" in messages(result)


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: type[BaseException]
) -> None:
    note = tmp_path / "pid"
    program = f"import os, time, pathlib; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(300)"
    monkeypatch.setattr(child_processes, "COMMAND", (sys.executable, "-c", program))

    def interrupt(what: str, done: int, total: int) -> None:
        if note.exists() and note.read_text():
            raise how

    with pytest.raises(how):
        run_jobs([some_job(tmp_path / "job")], limits=ChildLimits(), environment={}, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """kill -9 of the parent: the real child asks the system to end it as well."""
    program = (
        "import sys, time; from pathlib import Path; from k25_engines import build_child\n"
        "build_child._end_with_parent(); Path(sys.argv[1]).write_text('up'); time.sleep(300)"
    )
    note = tmp_path / "note"
    parent_program = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); "
        "print(child.pid, flush=True); time.sleep(300)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_program, program, str(note)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    _wait_until(note.exists)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait_until(lambda: not _runs(child))


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited a minute")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_jobs_run_at_once_as_far_as_memory_and_processors_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(child_processes, "free_memory_bytes", lambda: 5 << 30)
    assert ChildLimits().at_once(9) == 5
    assert ChildLimits().at_once(2) == 2
    assert ChildLimits(parallel=7).at_once(9) == 7
    monkeypatch.setattr(child_processes, "free_memory_bytes", lambda: 0)
    assert ChildLimits().at_once(9) == 1
    monkeypatch.undo()
    assert free_memory_bytes() > 0


def test_progress_counts_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [event_to_json(Event(built=replace(BUILT, target=target))) for target in ("sm80", "sm120")]
    monkeypatch.setattr(child_processes, "COMMAND", (sys.executable, "-c", f"print({chr(10).join(lines)!r})"))
    jobs = [some_job(tmp_path / "a"), some_job(tmp_path / "b", component="head")]
    seen: list[tuple[int, int]] = []

    def count(what: str, done: int, total: int) -> None:
        seen.append((done, total))

    results = run_jobs(jobs, limits=ChildLimits(parallel=1), environment={}, progress=count)
    assert [len(result.built) for result in results] == [2, 2]
    assert seen[-1] == (4, 4)
    assert seen == sorted(seen)


def test_the_environment_is_the_parents_and_what_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K25_ONE", "1")
    program = "import os, sys; sys.exit(int(os.environ['K25_ONE']) + int(os.environ['K25_TWO']))"
    monkeypatch.setattr(child_processes, "COMMAND", (sys.executable, "-c", program))
    (result,) = run_jobs(
        [some_job(tmp_path / "job")], limits=ChildLimits(), environment={"K25_TWO": "2"}, progress=lambda *_: None
    )
    assert "exit code 3" in result.failed[0].message


def test_jobs_and_events_are_read_back(tmp_path: Path) -> None:
    job = some_job(tmp_path / "job", decoder_layers=("dense_layer", "moe_layer"))
    assert job_from_json(job_to_json(job)) == job
    event = Event(built=BUILT)
    assert event_from_json(event_to_json(event)) == event
    with pytest.raises(InputError, match="unknown key"):
        event_from_json(json.dumps({"finished": 1}))


def test_no_thread_is_left(run: Callable[..., JobResult]) -> None:
    before = threading.active_count()
    run(STARTED + "sys.exit(1)")
    _wait_until(lambda: threading.active_count() <= before)
