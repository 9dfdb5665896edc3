"""k25's own runtime as a contender of bench/compare.py: one process, one JSON command a line (see compare.py)."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from k25_runtime import Runtime


def answer(runtime: Runtime, command: dict[str, Any]) -> str:
    """Do what a line asks for."""
    prompt = command["prompt"]
    if command["do"] == "prefill":
        started = time.perf_counter()
        runtime.prefill(prompt, rows="last")
        return f"seconds {time.perf_counter() - started:.9f}"
    if command["do"] == "decode":
        runtime.prefill(prompt, rows="last")
        first, *rest = command["tokens"]
        runtime.decode(first)
        started = time.perf_counter()
        for token in rest:
            runtime.decode(token)
        return f"seconds {(time.perf_counter() - started) / len(rest):.9f}"
    np.save(command["file"], runtime.prefill(prompt, rows="last")[-1])
    return "done 1"


def main() -> None:
    """Open the bundle, then answer lines."""
    options = json.loads(sys.argv[1])
    with Runtime.open(
        options["bundle"],
        checkpoint=options["checkpoint"],
        mode=options["variant"],
        threads=options["threads"],
        context=options["context"],
        max_sequences=1,
    ) as runtime:
        print(f"ready {json.dumps(dict(runtime.runner.details))}", flush=True)
        for line in sys.stdin:
            print(answer(runtime, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
