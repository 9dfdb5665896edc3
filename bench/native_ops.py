"""The native ops at K2.5's real shapes, against the memory bandwidth and, where it is there, kt-kernel, in one run.

    .venv/bin/python bench/native_ops.py [--json FILE] [--rounds N] [--tokens 1,2,4,8,16,64] [--peer PYTHON] [--qmoe]

Everything that is compared takes turns, N rounds; best and median of each. `--peer` is a Python with torch and
kt-kernel (bench/peers/kt_kernel.py says how to make one), `--qmoe` adds ONNX Runtime's own QMoE, in float32 and with
int8 activations (3 GB of memory). Peers are stopped while it is not their turn. Experts are 16 random ones (400 MB), so
that nothing stays in a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from k25_plugins.native_library import Mode, NativeLibrary, native_library
from k25_runtime.bench_bandwidth import ReadBandwidth

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, GROUP = 7168, 2048, 16, 8, 32
WORD_BYTES, SCALE_BYTES = HIDDEN * INTERMEDIATE // 2, HIDDEN * INTERMEDIATE // GROUP * 2
EXPERT_BYTES = 3 * (WORD_BYTES + SCALE_BYTES)
FLOAT, INT32, INT64, BFLOAT16 = 1, 6, 7, 16
PROBE_BYTES = 2**30


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def session(library: NativeLibrary, node: onnx.NodeProto, types: list[int], threads: int, mode: Mode) -> Any:
    """An ONNX Runtime session of one node."""
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(node.input, types, strict=True)]
    output = helper.make_tensor_value_info(node.output[0], types[0], None)
    graph = helper.make_graph([node], "op", inputs, [output])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(library.path))
    library.set_session_mode(mode)
    library.set_session_threads(threads)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class ExpertLayer:
    """k25.MoEDispatch over a region of 16 experts. Which eight a token takes changes from call to call."""

    def __init__(self, library: NativeLibrary, threads: int, mode: Mode = "fast") -> None:
        generator = np.random.default_rng(0)
        part = generator.integers(0, 256, EXPERT_BYTES, dtype=np.uint8)
        self.region = np.tile(part, EXPERTS)
        self.table = np.zeros((EXPERTS, 6), np.int64)
        at = 0
        for expert in range(EXPERTS):
            for column in range(6):
                size = WORD_BYTES if column % 2 == 0 else SCALE_BYTES
                self.table[expert, column] = at // 8
                if column % 2:
                    self.region[at : at + size].view(np.uint16)[:] = 0x3C00
                at += size
        self.generator = generator
        names = ["x", "ids", "weights", "words", "scales", "table"]
        node = onnx.helper.make_node(
            "MoEDispatch", names, ["y"], domain="k25", intermediate_size=INTERMEDIATE, group_size=GROUP
        )
        self.session = session(library, node, [FLOAT, INT32, FLOAT, INT32, BFLOAT16, INT64], threads, mode)
        self.binding = self.session.io_binding()
        self.calls = 0
        value = ort.OrtValue.ortvalue_from_numpy
        self.binding.bind_ortvalue_input("words", value(self.region.view(np.int32).reshape(-1, 2)))
        scales = self.region.view(np.uint16).reshape(-1, 4)
        self.binding.bind_ortvalue_input("scales", ort.OrtValue.ortvalue_from_numpy_with_onnx_type(scales, BFLOAT16))
        self.binding.bind_ortvalue_input("table", value(self.table))

    def seconds(self, tokens: int) -> tuple[float, int]:
        """Seconds of one call, and the experts that it used."""
        self.calls += 1
        if tokens == 1:
            ids = (np.arange(TOP_K, dtype=np.int32) + self.calls % 2 * TOP_K)[None] % EXPERTS
        else:
            ids = np.array([self.generator.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)], np.int32)
        x = self.generator.standard_normal((tokens, HIDDEN), np.float32)
        feeds = {"x": x, "ids": ids, "weights": np.full(ids.shape, 0.1, np.float32)}
        for name, array in feeds.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.empty_like(x)))
        return timed(lambda: self.session.run_with_iobinding(self.binding)), len(np.unique(ids))


class Matrix:
    """k25.Linear, four different matrices in turn so that none stays in a cache."""

    def __init__(self, library: NativeLibrary, out: int, columns: int, threads: int) -> None:
        self.bytes = out * columns * 2
        generator = np.random.default_rng(0)
        bits = (generator.integers(0, 2**15, (4, out, columns), dtype=np.uint16) & 0x83FF) | 0x3C00
        weights = (ort.OrtValue.ortvalue_from_numpy_with_onnx_type(matrix, BFLOAT16) for matrix in bits)
        self.bits, self.weights = bits, list(weights)
        node = onnx.helper.make_node("Linear", ["x", "weight"], ["y"], domain="k25")
        self.session = session(library, node, [FLOAT, BFLOAT16], threads, "fast")
        self.columns, self.out, self.calls = columns, out, 0

    def seconds(self, tokens: int) -> float:
        """Seconds of one call."""
        self.calls += 1
        binding = self.session.io_binding()
        x = np.ones((tokens, self.columns), np.float32)
        y = np.empty((tokens, self.out), np.float32)
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_input("weight", self.weights[self.calls % 4])
        binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
        return timed(lambda: self.session.run_with_iobinding(binding))


class Peer:
    """A script in a process of its own, one call for each line that it is sent; stopped in between."""

    def __init__(self, name: str, python: str, script: str, *arguments: int) -> None:
        self.name = name
        path = Path(__file__).parent / "peers" / script
        command = [python, "-P", str(path), *(str(argument) for argument in arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line("ready")
        self.process.send_signal(signal.SIGSTOP)

    def seconds(self, tokens: int) -> float:
        """Seconds of one call."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        print(tokens, file=self.process.stdin, flush=True)
        seconds = float(self._line("seconds"))
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

    def _line(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(f"{word} "):
                return line.split()[1]
        raise SystemExit("the peer ended early")


def row(name: str, tokens: int, seconds: list[float], used_bytes: int, operations: float) -> dict[str, Any]:
    """Best and median, with the rates of the best."""
    best = min(seconds)
    return {
        "work": name,
        "tokens": tokens,
        "best_ms": round(best * 1e3, 3),
        "median_ms": round(statistics.median(seconds) * 1e3, 3),
        "gb_per_s": round(used_bytes / best / 1e9, 1),
        "gflop_per_s": round(operations / best / 1e9),
    }


def opened_peers(options: argparse.Namespace) -> Iterator[Peer]:
    """Those that were asked for."""
    if options.peer:
        yield Peer("kt-kernel AMXInt4_KGroup_MOE", options.peer, "kt_kernel.py", options.threads)
    if options.qmoe:
        yield Peer("ONNX Runtime QMoE, float32", sys.executable, "qmoe.py", options.threads, 0)
        yield Peer("ONNX Runtime QMoE, int8", sys.executable, "qmoe.py", options.threads, 4)


def main() -> None:
    """Parse, measure in turns, print a table and, where asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", default="1,2,4,8,16,64,256")
    parser.add_argument("--peer", help="a Python with torch and kt-kernel")
    parser.add_argument("--qmoe", action="store_true", help="ONNX Runtime's QMoE takes part")
    options = parser.parse_args()
    library = native_library()
    if library is None:
        raise SystemExit("native_ops: no native library; run make setup")
    bandwidth, layer = ReadBandwidth(library, size=PROBE_BYTES), ExpertLayer(library, options.threads)
    matrix = Matrix(library, 7168, 7168, options.threads)
    peers = list(opened_peers(options))
    sizes = [int(size) for size in options.tokens.split(",")]
    rates: list[float] = []
    rows: list[dict[str, Any]] = []
    for tokens in sizes:
        ours: list[float] = []
        linear: list[float] = []
        theirs: dict[str, list[float]] = {peer.name: [] for peer in peers}
        used = 0
        rounds = max(3, options.rounds if tokens <= 16 else options.rounds // 3)
        for turn in range(rounds + 1):
            seconds, used = layer.seconds(tokens)
            others = {peer.name: peer.seconds(tokens) for peer in peers}
            dense = matrix.seconds(tokens)
            if turn:  # the first is a warm-up
                ours.append(seconds)
                for name, other in others.items():
                    theirs[name].append(other)
                linear.append(dense)
            rates.append(bandwidth() / 1e9)
        operations = 6.0 * tokens * TOP_K * HIDDEN * INTERMEDIATE
        rows.append(row("expert layer 7168/2048, top-8", tokens, ours, used * EXPERT_BYTES, operations))
        for name, times in theirs.items():
            rows.append(row(f"  {name}", tokens, times, used * EXPERT_BYTES, operations))
            rows[-1]["k25_of_it"] = round(min(ours) / min(times), 3)
            rows[-1]["k25_of_it_median"] = round(statistics.median(ours) / statistics.median(times), 3)
        rows.append(row("linear 7168x7168 bf16", tokens, linear, matrix.bytes, 2.0 * tokens * matrix.bytes / 2))
    for peer in peers:
        peer.close()
    best = max(rates)
    for entry in rows:
        entry["of_bandwidth"] = round(entry["gb_per_s"] / best, 2)
    result = {
        "library": library.version,
        "isa": library.isa,
        "threads": options.threads,
        "bandwidth_gb_per_s": {"best": round(best, 1), "median": round(statistics.median(rates), 1)},
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{library.version}, {library.isa}, {options.threads} threads; read bandwidth {best:.1f} GB/s", file=sys.stderr
    )
    print("| work | tokens | best ms | median ms | GB/s | of bandwidth | GFLOP/s | k25 takes of it (median) |")
    print("|---|---|---|---|---|---|---|---|")
    for entry in rows:
        ratio = f"{entry['k25_of_it']} ({entry['k25_of_it_median']})" if "k25_of_it" in entry else ""
        cells = [entry[name] for name in ("work", "tokens", "best_ms", "median_ms", "gb_per_s", "of_bandwidth")]
        print("| " + " | ".join(str(cell) for cell in [*cells, entry["gflop_per_s"], ratio]) + " |")


if __name__ == "__main__":
    main()
