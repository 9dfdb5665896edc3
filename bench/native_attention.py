"""The native attention kernels at Kimi K2.5's sizes, against what the machine can do, measured in the same run.

    .venv/bin/python bench/native_attention.py [--rounds 9] [--threads 2] [--patches 4096] [--json FILE]

Interleaved: every round measures the peak of float32 multiply-adds and of reading memory, then each kernel and each
peer once. Best and median of the rounds, and their ratio to the time that the peaks allow: for decode the cache's bytes
at the read bandwidth, or 64 heads x 1088 x 2 FLOP for each row at the FLOP peak, whichever takes longer. Peers: ONNX
Runtime on the function body, torch (matmul and softmax for decode, scaled_dot_product_attention for the vision tower).
With --threads 1 all times are the thread's own CPU time, which other work on the machine disturbs little.
Needs the native library and g++ (for the peaks).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from k25_plugins.native_calls import call_native
from k25_plugins.native_library import MODES, Isa, Mode, NativeLibrary, Parallel, Run, native_library
from k25_plugins.onnx_functions import functions_for

Array = npt.NDArray[Any]
HEADS, NOPE, ROPE, V, RANK, BLOCK = 64, 128, 64, 128, 512, 16
VISION_HEADS, VISION_WIDTH = 16, 72
MLA_ATTRIBUTES: dict[str, Any] = {
    "num_heads": HEADS,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": V,
    "softmax_scale": 0.14467963,
    "inv_freq": [50000.0 ** (-2 * index / ROPE) for index in range(ROPE // 2)],
}
VISION_ATTRIBUTES: dict[str, Any] = {"num_heads": VISION_HEADS, "softmax_scale": VISION_WIDTH**-0.5}


class Machine:
    """The peaks of this machine, from native_probe.cc, and the threads that the kernels run on."""

    def __init__(self, library: NativeLibrary, threads: int) -> None:
        self.threads = threads
        self.library = library
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(__file__).with_name("native_probe.cc"), Path(folder) / "probe.so"
            flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
            self.probe = ctypes.CDLL(str(library))
        self.probe.probe_multiply_add.restype = self.probe.probe_read.restype = ctypes.c_double
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.parallel = Parallel(Run(), None, threads)  # the library's own, as in the runtime
        self.memory = np.ones(1 << 26, np.float64)  # 512 MB, far past any cache

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long a call takes, with the library's threads awake as they are within a decode step."""
        self.wake()
        started = self.clock()
        call()
        return self.clock() - started

    def wake(self) -> None:
        """Give the library's threads something small to do."""
        small = [np.zeros((1, 64), np.float32), np.zeros((2048, 64), np.uint16)]
        call_native(self.library, "Linear", small, {}, parallel=self.parallel)

    def peak_flops(self) -> float:
        """Float32 multiply-adds, in FLOP/s."""
        started = self.clock()
        done = self.probe.probe_multiply_add(self.threads)
        return float(done) / (self.clock() - started)

    def bandwidth(self) -> float:
        """Reading memory, in bytes/s."""
        size, data = ctypes.c_size_t(self.memory.nbytes), ctypes.c_void_p(self.memory.ctypes.data)
        started = self.clock()
        done = self.probe.probe_read(self.threads, data, size)
        return float(done) / (self.clock() - started)


def bits_of(values: Array) -> Array:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def floats_of(values: Array) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


def mla_inputs(before: int, new: int, cache_dtype: str) -> list[Array]:
    """One sequence of `before` rows in the cache, in shuffled blocks, and `new` tokens."""
    generator = np.random.default_rng(0)
    normal: Callable[..., Array] = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
    blocks = -(-(before + new) // BLOCK)
    cache = normal(blocks, BLOCK, RANK + ROPE)
    return [
        normal(new, HEADS * (NOPE + ROPE)) / 3,
        normal(new, RANK + ROPE),
        bits_of(cache) if cache_dtype == "bfloat16" else cache,
        bits_of(normal(HEADS * (NOPE + V), RANK) / np.float32(RANK**0.5)),
        np.arange(before, before + new, dtype=np.int32),
        np.array([0, new], np.int32),
        generator.permutation(blocks).astype(np.int32)[None],
    ]


def native_call(library: NativeLibrary, machine: Machine, op: str, inputs: list[Array], mode: Mode, isa: Isa) -> Any:
    attributes = MLA_ATTRIBUTES if op == "MLA" else VISION_ATTRIBUTES
    outputs = {1: inputs[2]} if op == "MLA" else None
    parallel = machine.parallel

    def call() -> Array:
        return call_native(library, op, inputs, attributes, outputs=outputs, mode=mode, isa=isa, parallel=parallel)[0]

    return call


def onnx_call(op: str, inputs: list[Array], threads: int) -> Callable[[], Any]:
    """ONNX Runtime on the function body of an op, the cache bound in place."""
    codes = {np.dtype(np.float32): 1, np.dtype(np.int32): 6, np.dtype(np.uint16): 16}
    helper = onnx.helper
    names = [f"input_{index}" for index in range(len(inputs))]
    declared = [
        helper.make_tensor_value_info(name, codes[array.dtype], list(array.shape))
        for name, array in zip(names, inputs, strict=True)
    ]
    outs = ["out", "cache_out"] if op == "MLA" else ["out"]
    kinds = [codes[inputs[0].dtype], codes[inputs[2].dtype]][: len(outs)]
    attributes = MLA_ATTRIBUTES if op == "MLA" else VISION_ATTRIBUTES
    graph = helper.make_graph(
        [helper.make_node(op, names, outs, domain="k25", **attributes)],
        op,
        declared,
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outs, kinds, strict=True)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions_for([op]), ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = [
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, 16)
        if array.dtype == np.uint16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for array in inputs
    ]
    binding = session.io_binding()
    for name, value in zip(names, values, strict=True):
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    if op == "MLA":
        binding.bind_ortvalue_output("cache_out", values[2])
    return lambda: session.run_with_iobinding(binding)


def torch_decode(inputs: list[Array]) -> Callable[[], Any]:
    """Absorbed decode as three torch calls on a contiguous context, without the projections of kv_b."""
    context = torch.from_numpy(floats_of(inputs[2])).reshape(-1, RANK + ROPE)
    query = torch.randn(HEADS, RANK + ROPE)
    scale = MLA_ATTRIBUTES["softmax_scale"]
    return lambda: ((query @ context.T) * scale).softmax(-1) @ context[:, :RANK]


def torch_vision(inputs: list[Array]) -> Callable[[], Any]:
    q, k, v = (torch.from_numpy(a).view(-1, VISION_HEADS, VISION_WIDTH).transpose(0, 1)[None] for a in inputs)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def decode_limit(context: int, cache_bytes: int) -> tuple[float, float]:
    """FLOP and bytes of a token's attention; kv_b's are not counted, its time is."""
    return 2.0 * HEADS * (2 * RANK + ROPE) * context, float(context * (RANK + ROPE) * cache_bytes)


def prefill_limit(tokens: int) -> tuple[float, float]:
    """The causal half of the expanded form and expanding every row once."""
    pairs = tokens * (tokens + 1) / 2
    return 2.0 * HEADS * (pairs * (NOPE + ROPE + V) + tokens * (NOPE + V) * RANK), float(tokens * (RANK + ROPE) * 4)


def vision_limit(patches: int) -> tuple[float, float]:
    return 4.0 * VISION_HEADS * VISION_WIDTH * patches**2, 16.0 * VISION_HEADS * VISION_WIDTH * patches


def contenders(library: NativeLibrary, machine: Machine, patches: int) -> dict[str, tuple[Any, tuple[float, float]]]:
    """Name -> what to run, and its FLOP and bytes."""
    found: dict[str, tuple[Any, tuple[float, float]]] = {}
    for context in (8192, 32768):
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            inputs = mla_inputs(context - 1, 1, dtype)
            limit = decode_limit(context, size)
            for mode in MODES if dtype == "bfloat16" else MODES[1:]:
                call = native_call(library, machine, "MLA", inputs, mode, "best")
                found[f"MLA decode {context} {dtype} {mode}"] = (call, limit)
            if dtype == "float32":
                found[f"MLA decode {context} torch matmul"] = (torch_decode(inputs), limit)
                found[f"MLA decode {context} onnxruntime body"] = (onnx_call("MLA", inputs, machine.threads), limit)
    for tokens in (512, 2048):
        for dtype, mode in (("float32", MODES[1]), ("bfloat16", MODES[0])):
            call = native_call(library, machine, "MLA", mla_inputs(0, tokens, dtype), mode, "best")
            found[f"MLA prefill {tokens} {dtype} {mode}"] = (call, prefill_limit(tokens))
    generator = np.random.default_rng(0)
    shape = (patches, VISION_HEADS * VISION_WIDTH)
    inputs = [generator.standard_normal(shape, np.float32) for _ in range(3)]
    for mode in MODES:
        call = native_call(library, machine, "VisionAttention", inputs, mode, "best")
        found[f"vision {patches} {mode}"] = (call, vision_limit(patches))
    found[f"vision {patches} torch sdpa"] = (torch_vision(inputs), vision_limit(patches))
    found[f"vision {patches} onnxruntime body"] = (
        onnx_call("VisionAttention", inputs, machine.threads),
        vision_limit(patches),
    )
    return found


def measure(library: NativeLibrary, threads: int, rounds: int, patches: int) -> dict[str, Any]:
    """Peaks and times of interleaved rounds."""
    machine = Machine(library, threads)
    torch.set_num_threads(threads)
    rows = contenders(library, machine, patches)
    for call, _ in rows.values():
        call()
    flops: list[float] = []
    bandwidths: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        flops.append(machine.peak_flops())
        bandwidths.append(machine.bandwidth())
        for name, (call, _) in rows.items():
            times[name].append(machine.seconds(call))
    results = {}
    for name, (_, (work, moved)) in rows.items():
        allowed = max(work / max(flops), moved / max(bandwidths))
        allowed_median = max(work / statistics.median(flops), moved / statistics.median(bandwidths))
        best, median = min(times[name]), statistics.median(times[name])
        results[name] = {
            "best_ms": best * 1e3,
            "median_ms": median * 1e3,
            "of_peak_best": allowed / best,
            "of_peak_median": allowed_median / median,
        }
    return {
        "library": library.version,
        "isa": library.isa,
        "threads": threads,
        "clock": "thread CPU time" if threads == 1 else "wall",
        "rounds": rounds,
        "peak_gflops": {"best": max(flops) / 1e9, "median": statistics.median(flops) / 1e9},
        "read_gb_per_s": {"best": max(bandwidths) / 1e9, "median": statistics.median(bandwidths) / 1e9},
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    peak, read = report["peak_gflops"], report["read_gb_per_s"]
    lines = [
        f"{report['library']}, {report['isa']}, {report['threads']} threads, {report['rounds']} rounds; "
        f"float32 peak {peak['best']:.0f} GFLOP/s (median {peak['median']:.0f}), "
        f"reading {read['best']:.1f} GB/s (median {read['median']:.1f})",
        f"{'':36} {'best ms':>9} {'median ms':>10} {'of peak':>8} {'median':>7}",
    ]
    for name, row in report["results"].items():
        lines.append(
            f"{name:36} {row['best_ms']:9.2f} {row['median_ms']:10.2f} "
            f"{row['of_peak_best']:8.2f} {row['of_peak_median']:7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The native attention kernels against the machine's peaks.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--patches", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    library = native_library()
    if library is None:
        sys.exit("no native library: sh scripts/native.sh")
    report = measure(library, options.threads, options.rounds, options.patches)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
