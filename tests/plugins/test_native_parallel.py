"""Phases, ranges and the library's own threads: the promises of `core/parallel.h` and `core/workers.h`."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from native_calls import LIBRARY_OR_NONE, REASON, bfloat16_bits

CORE = Path(__file__).parents[2] / "plugins/core"
COMPILER = shutil.which("c++")
needs_library = pytest.mark.skipif(LIBRARY_OR_NONE is None, reason=REASON)


def compiled(folder: Path, *flags: str) -> Path | None:
    """The check as a program, or None where the compiler has not these flags."""
    program = folder / "parallel_check"
    sources = [Path(__file__).parent / "parallel_check.cc", CORE / "parallel.cc", CORE / "workers.cc"]
    command = [COMPILER or "c++", "-std=c++17", "-O1", "-g", "-pthread", *flags, f"-I{CORE}", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if done.returncode != 0 and flags:
        return None
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("sanitizer", ["", "thread"])
def test_every_task_runs_once_and_phases_follow_one_another(tmp_path: Path, sanitizer: str) -> None:
    program = compiled(tmp_path, *([f"-fsanitize={sanitizer}"] if sanitizer else []))
    if program is None:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    command = [str(program), "5" if sanitizer else "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok: ")


@pytest.fixture
def session_threads() -> Iterator[Any]:
    """Sets the threads of the sessions that the test makes."""
    assert LIBRARY_OR_NONE is not None
    yield LIBRARY_OR_NONE.set_session_threads
    LIBRARY_OR_NONE.set_session_threads(0)


def linear_session() -> ort.InferenceSession:
    assert LIBRARY_OR_NONE is not None
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in (("x", 1), ("weight", 16))]
    output = helper.make_tensor_value_info("y", 1, None)
    node = helper.make_node("Linear", ["x", "weight"], ["y"], domain="k25")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    graph = helper.make_graph([node], "g", inputs, [output])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(LIBRARY_OR_NONE.path))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def product(session: ort.InferenceSession, x: npt.NDArray[np.float32], weight: npt.NDArray[np.uint16]) -> Any:
    values = {"x": ort.OrtValue.ortvalue_from_numpy(x)}
    values["weight"] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(weight, 16)
    return session.run_with_ort_values(None, values)[0].numpy()


@needs_library
@pytest.mark.parametrize("tokens", [1, 37])
def test_sessions_with_any_threads_agree_to_the_bit(session_threads: Any, tokens: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((tokens, 96), np.float32)
    weight = bfloat16_bits(generator.standard_normal((700, 96), np.float32))
    found = []
    for threads in (0, 1, 2, 5):
        session_threads(threads)
        session = linear_session()
        found += [product(session, x, weight) for _ in range(20)]
    assert all(np.array_equal(y, found[0]) for y in found)


@needs_library
def test_sessions_that_run_at_the_same_time_share_the_threads(session_threads: Any) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, 256), np.float32)
    weights = [bfloat16_bits(generator.standard_normal((2000, 256), np.float32)) for _ in range(3)]
    session_threads(3)
    sessions = [linear_session() for _ in weights]
    wanted = [product(session, x, weight) for session, weight in zip(sessions, weights, strict=True)]
    found: list[bool] = []

    def work(index: int) -> None:
        results = [product(sessions[index], x, weights[index]) for _ in range(100)]
        found.extend(np.array_equal(result, wanted[index]) for result in results)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 300
    assert all(found)
