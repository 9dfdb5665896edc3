"""Build jobs in child processes: in parallel, within limits of time and memory, ended whenever the parent ends."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k25_engines.build_job import BuildJob, Built, Event, Failed, event_from_json, job_to_json
from k25_plugins.errors import InputError

_POLL_SECONDS = 0.05
#: What a build takes while it is young: as many run at once as the free memory has room for.
BUILD_BYTES = 1 << 30
#: What is started for a job; the file that describes it is added. -P: nothing is imported from where the user stands.
COMMAND = (sys.executable, "-P", "-m", "k25_engines.build_child")
_LOG_TAIL = 3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ChildLimits:
    """For each engine `seconds`, for each child `memory_bytes` of resident memory; `parallel` children at once."""

    seconds: float = 600.0
    memory_bytes: int = 4 << 30
    parallel: int = 0

    def at_once(self, jobs: int) -> int:
        """How many children run at once: what was asked for, or what processors and free memory allow."""
        wanted = self.parallel or min(os.cpu_count() or 1, max(1, free_memory_bytes() // BUILD_BYTES))
        return max(1, min(wanted, jobs))


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What became of a job: an engine or a reason for each target."""

    built: tuple[Built, ...]
    failed: tuple[Failed, ...]


def run_jobs(
    jobs: Sequence[BuildJob],
    *,
    limits: ChildLimits,
    environment: Mapping[str, str],
    progress: Progress,
) -> list[JobResult]:
    """Run each job in a child process; results in the order of the jobs. Children are killed on any way out.

    A job's log is `<its output folder>/log`. A child that crashes, is killed, takes too long or too much memory is a
    `Failed` that names component and target, like one that TensorRT refuses.
    """
    waiting = [_Child(job, limits, environment) for job in jobs]
    children = list(waiting)
    running: list[_Child] = []
    total = sum(len(job.targets) for job in jobs)
    at_once = limits.at_once(len(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                child = waiting.pop(0)
                child.start()
                running.append(child)
            for child in running:
                child.poll()
            running = [child for child in running if not child.is_done]
            done = sum(len(child.built) + len(child.failed) for child in children)
            progress("building " + (", ".join(child.label for child in running) or "engines"), done, total)
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        for child in children:
            child.kill()
    return [JobResult(built=tuple(child.built), failed=tuple(child.failed)) for child in children]


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, as the kernel estimates it; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass
class _Child:
    """One child process and what it has told so far."""

    job: BuildJob
    limits: ChildLimits
    environment: Mapping[str, str]
    built: list[Built] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    is_done: bool = False
    _process: subprocess.Popen[str] | None = None
    _lines: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    _current: str | None = None
    _since: float = 0.0
    _ended_by_us: str | None = None

    @property
    def label(self) -> str:
        return f"{self.job.component} {self._current or ''}".strip()

    @property
    def log(self) -> Path:
        return Path(self.job.output) / "log"

    def start(self) -> None:
        job_file = Path(self.job.output) / "job.json"
        job_file.write_text(job_to_json(self.job), encoding="utf-8")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*COMMAND, str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **self.environment},
                start_new_session=True,  # an interrupt on the terminal is the parent's to handle
            )
        self._since = time.monotonic()
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def poll(self) -> None:
        """Take what the child has said; end it where it is over a limit."""
        ended = False
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._lines.get_nowait()
                if line is None:
                    ended = True
                    break
                self._take(line)
        if ended:
            self._finish()
        elif self._ended_by_us is None:
            self._ended_by_us = self._over_limit()
            if self._ended_by_us is not None:
                self.kill()

    def _take(self, line: str) -> None:
        try:
            event: Event = event_from_json(line)
        except InputError:
            return  # cut off by the end of the child
        self._since = time.monotonic()
        if event.started is not None:
            self._current = event.started
        if event.built is not None:
            self.built.append(event.built)
            self._current = None
        if event.failed is not None:
            self.failed.append(event.failed)
            self._current = None

    def _over_limit(self) -> str | None:
        if time.monotonic() - self._since > self.limits.seconds:
            return f"took more than {self.limits.seconds:g} s and was ended; --timeout allows more"
        resident = self._resident_bytes()
        if resident > self.limits.memory_bytes:
            return (
                f"took {resident} bytes of memory, more than the limit of {self.limits.memory_bytes}, and was ended; "
                "--memory-limit allows more"
            )
        return None

    def _resident_bytes(self) -> int:
        assert self._process is not None
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
        return 0

    def _finish(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        known = {engine.target for engine in self.built} | {failure.target for failure in self.failed}
        missing = [target for target in self.job.targets if target not in known]
        for target in missing:
            is_input = self._ended_by_us is not None
            reason = self._ended_by_us or _death(code)
            tail = "" if is_input else self._log_tail()
            self.failed.append(
                Failed(
                    target=target,
                    kind="input" if is_input else "internal",
                    message=f"{self.job.component} for {target}: the building process {reason}{tail}",
                )
            )
        self.is_done = True

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()[-_LOG_TAIL:]
            return f". It said last: {' | '.join(lines)}" if lines else ""
        return ""

    def kill(self) -> None:
        """End the child and all that it started; harmless where it has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _death(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code} before it was done"
    name = signal.Signals(-code).name if -code in {item.value for item in signal.Signals} else f"signal {-code}"
    hints = {
        "SIGKILL": "somebody ended it; where that was the kernel, memory was out: try --parallel 1",
        "SIGABRT": "a check inside TensorRT failed",
        "SIGSEGV": "TensorRT, or a plugin library, crashed",
    }
    return f"was killed by {name}" + (f" ({hints[name]})" if name in hints else "")
