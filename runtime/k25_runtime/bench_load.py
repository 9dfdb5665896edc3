"""Opening a bundle in a process of its own: how long it takes, and how much memory becomes the process's own.

    python -m k25_runtime.bench_load '{"bundle": "BUNDLE", ...}'

prints one JSON object. Importing is not counted, reading what the imports leave to the first use is.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k25_plugins.errors import InputError, K25Error

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class LoadCost:
    """Seconds of opening; bytes of anonymous memory added by it, and by it and first use. None outside Linux."""

    seconds: float
    anonymous_bytes: int | None
    anonymous_bytes_after_use: int | None


def load_cost(settings: dict[str, Any]) -> LoadCost:
    """Open in a new process. `settings`: bundle, checkpoint, mode, threads, context, sequences, tokens."""
    command = [sys.executable, "-m", "k25_runtime.bench_load", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise K25Error(f"bench: the process that loads the bundle was ended by signal {-done.returncode}")
    try:
        return LoadCost(**json.loads(done.stdout))
    except (ValueError, TypeError) as error:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise InputError(f"bench: the process that loads the bundle failed: {last}") from error


def measured_load(settings: dict[str, Any]) -> LoadCost:
    """Open the bundle in this process, prefill `tokens` and decode one."""
    from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
    from k25_runtime.runtime import Runtime

    before = anonymous_bytes()
    started = time.perf_counter()
    backend = OnnxRuntimeCpu(threads=settings["threads"], mode=settings["mode"])
    runtime = Runtime.open(
        settings["bundle"],
        checkpoint=settings["checkpoint"],
        context=settings["context"],
        max_sequences=settings["sequences"],
        backend=backend,
    )
    seconds = time.perf_counter() - started
    gc.collect()
    opened = anonymous_bytes()
    runtime.prefill(settings["tokens"], rows="last")
    runtime.decode(settings["tokens"][0])
    gc.collect()
    used = anonymous_bytes()
    return LoadCost(
        seconds=seconds,
        anonymous_bytes=None if opened is None or before is None else opened - before,
        anonymous_bytes_after_use=None if used is None or before is None else used - before,
    )


def anonymous_bytes() -> int | None:
    """This process's resident anonymous memory (what is not pages of files), from /proc."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("RssAnon:")]
    return int(found[0][1]) * 1024 if found else None


if __name__ == "__main__":
    print(json.dumps(asdict(measured_load(json.loads(sys.argv[1])))))
