"""The GPU kernels on one GPU: right against float64, then their time against what the device does in the same run.

    python bench/gpu.py [--library libk25_ops.so] [--json FILE] [--only TEXT] [--rounds N] [--experts N]
    TRITON_INTERPRET=1 python bench/gpu.py --dry-run      # no GPU: tiny sizes, the interpreter, no times

Prints one Markdown table and writes a JSON beside it. Ceilings are a device copy and a bf16 matmul; peers are PyTorch
(eager and compiled) and FlashMLA and FlashInfer where they are installed. Everything is timed by CUDA events around
replays of a CUDA graph, in rounds that take turns; a kernel whose result is wrong has no time. Needs PyTorch with CUDA
(2.11 or newer) and a library built with -DK25_GPU_KERNELS; no Triton. About 25 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "plugins"))
sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
sys.path.insert(0, str(Path(__file__).parent))

from gpu_cases import Case, attention_case, expert_region, experts_case, linear_case
from gpu_peers import peers_of

from k25_plugins.errors import K25Error
from k25_plugins.gpu_launch import device_tensor, gpu_kernel_count, launch, prepare, set_even_rows, workspace_bytes
from k25_plugins.gpu_specialisations import ModelDims, specialisations, targets_from_text
from k25_plugins.native_library import LIBRARY, load_library

TOLERANCE = 8e-3
REPLAYS = 10


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a case is held to: a share of a ceiling (`copy` bytes or `matmul` products), or microseconds."""

    of: str
    wanted: float


@dataclass(kw_only=True)
class Result:
    """A case and what was measured; seconds by who ran it."""

    name: str
    bar: Bar | None
    least_bytes: int
    flops: int
    error: float
    seconds: dict[str, float] = field(default_factory=dict)


class Gpu:
    """The CUDA device: launches the library's kernels and times graphs of them."""

    is_real = True
    dims = ModelDims()

    def __init__(self, library: Path) -> None:
        if not torch.cuda.is_available():
            raise K25Error("bench/gpu.py: PyTorch sees no GPU here. Without one: --dry-run")
        self.device = torch.device("cuda")
        torch.zeros(1, device=self.device)
        self.library = load_library(library)
        prepare(self.library)
        set_even_rows(self.library, is_even=True)
        self.name = torch.cuda.get_device_name()

    def launcher(self, case: Case) -> Callable[[], None]:
        """What puts a case on the current stream."""
        inputs, outputs = [device_tensor(t) for t in case.inputs], [device_tensor(t) for t in case.outputs]
        size = workspace_bytes(self.library, case.op, inputs, case.attributes)
        workspace = torch.full((max(size, 16),), 0xFF, dtype=torch.uint8, device=self.device)

        def run() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            launch(
                self.library, case.op, inputs, outputs, case.attributes,
                workspace=workspace.data_ptr(), stream=stream,
            )  # fmt: skip

        return run

    def timer(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Seconds of one call: a graph of it is replayed between two events."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def seconds() -> float:
            graph.replay()
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / REPLAYS

        return seconds

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class DryRun:
    """No GPU: the C++ launches are written down by a stand-in driver and replayed in Triton's interpreter."""

    is_real = False
    dims = ModelDims(
        num_heads=4, qk_nope_head_dim=16, v_head_dim=16, latent_dim=32, rope_dim=8, block_size=8, hidden=64,
        intermediate_size=32, experts=6, experts_per_token=2,
    )  # fmt: skip
    name = "dry run"

    def __init__(self, folder: Path) -> None:
        import gpu_replay

        self.device = torch.device("cpu")
        kernels = folder / "kernels"
        kernels.mkdir()
        os.environ["K25_CUDA_LIBRARY"] = str(gpu_replay.driver_library(kernels))
        gpu_replay.compile_driver(gpu_replay.driver_library(kernels))
        self.gpu = gpu_replay.FakeGpu(kernels, specialisations([self.dims], targets_from_text("90")))
        set_even_rows(self.gpu.library, is_even=True)

    def launcher(self, case: Case) -> Callable[[], None]:
        import gpu_replay

        moved = replace(
            case, inputs=[gpu_replay.aligned(t) for t in case.inputs], outputs=[gpu_replay.aligned(case.outputs[0])]
        )
        outputs = [moved.outputs[0], moved.inputs[2]] if case.op == "MLA" else moved.outputs

        def run() -> None:
            gpu_replay.run(self.gpu, case.op, moved.inputs, outputs, case.attributes)
            case.outputs[0].copy_(moved.outputs[0])

        return run

    def timer(self, run: Callable[[], Any]) -> Callable[[], float]:
        run()
        return lambda: 0.0

    def synchronize(self) -> None:
        pass


Device = Gpu | DryRun
Work = tuple[str, Callable[[], Case], Bar | None]


def cases_of(device: Device, experts: int) -> list[Work]:
    """The work of the table, each case made when its turn comes."""
    dims, where = device.dims, device.device
    scale = 1 if device.is_real else 64  # a dry run is this much shorter
    if device.is_real:
        dims = replace(dims, experts=experts)
    region = expert_region(dims, where)
    long, prompt, many = 8192 // scale, 4096 // scale, 4096 // scale

    def attention(name: str, sequences: int, context: int, new: int, bar: Bar | None) -> Work:
        sizes = {"sequences": sequences, "context": context, "new": new, "check": 4}
        return name, lambda: attention_case(name, dims, where, **sizes), bar

    def layer(name: str, tokens: int, bar: Bar, nothing: bool = False) -> Work:
        sizes = {"tokens": tokens, "check": 2, "nothing": nothing}
        return name, lambda: experts_case(name, dims, where, region, **sizes), bar

    def product(tokens: int, inputs: int, outputs: int) -> Work:
        name = f"Linear {inputs} -> {outputs}, M = {tokens}"
        sizes = {"tokens": tokens, "inputs": inputs, "outputs": outputs}
        return name, lambda: linear_case(name, where, dtype="bfloat16", **sizes), None

    batch = 64 // (1 if device.is_real else 16)
    streamed, multiplied = Bar(of="copy", wanted=0.7), Bar(of="matmul", wanted=0.5)
    return [
        attention(f"MLA decode, batch {batch}, context {long}", batch, long, 1, Bar(of="copy", wanted=0.8)),
        attention(f"MLA decode, batch 1, context {long}", 1, long, 1, None),
        attention(f"MLA prefill, {prompt} tokens, causal", 1, prompt, prompt, multiplied),
        *(layer(f"experts, M = {tokens}", tokens, streamed) for tokens in (1, 16, 64)),
        layer(f"experts, M = {many}, prefill", many, multiplied),
        layer("dispatch alone, M = 1, no expert held", 1, Bar(of="microseconds", wanted=10), nothing=True),
        product(1, dims.hidden, 18432 // scale),
        product(64, 8192 // scale, dims.hidden),
    ]


def ceilings(device: Device) -> dict[str, Callable[[], float]]:
    """Timers of a copy (bytes read and written) and a matmul."""
    size = 2**30 if device.is_real else 2**10
    side = 8192 if device.is_real else 16
    source = torch.zeros(size, dtype=torch.uint8, device=device.device)
    to = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device.device).bfloat16() for _ in range(2))
    return {"copy": device.timer(lambda: to.copy_(source)), "matmul": device.timer(lambda: torch.matmul(a, b))}


def measured(device: Device, make: Callable[[], Case], bar: Bar | None, rounds: int) -> Result:
    """Numerics first; then the kernel and every peer in turn."""
    torch.manual_seed(17)
    case = make()
    run = device.launcher(case)
    case.poison()
    run()
    device.synchronize()
    error = case.error() if case.flops else float(case.outputs[0].float().abs().max())
    result = Result(name=case.name, bar=bar, least_bytes=case.least_bytes, flops=case.flops, error=error)
    if not error < TOLERANCE:
        return result
    timers = {"k25": device.timer(run)}
    for name, peer in peers_of(case, device.is_real):
        try:
            timers[name] = device.timer(peer)
        except Exception as failure:
            print(f"{case.name}: {name} did not run: {failure}", file=sys.stderr)
    turns: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            turns[name].append(timer())
    result.seconds = {name: statistics.median(times) for name, times in turns.items()}
    return result


def share(result: Result, rates: dict[str, float]) -> float | None:
    """Of its ceiling, or microseconds, for a case with a bar."""
    seconds = result.seconds.get("k25", 0.0)
    if result.bar is None or not seconds:
        return None
    if result.bar.of == "microseconds":
        return seconds * 1e6
    work = result.least_bytes if result.bar.of == "copy" else result.flops
    return work / seconds / rates[result.bar.of]


def table(name: str, results: Sequence[Result], rates: dict[str, float]) -> str:
    """One row a case."""
    lines = [
        f"{name}: copy {rates['copy'] / 1e12:.2f} TB/s, bf16 matmul {rates['matmul'] / 1e12:.0f} TFLOP/s",
        "",
        "| case | error | k25 µs | TB/s | TFLOP/s | of its ceiling | bar | peers µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds = result.seconds.get("k25", 0.0)
        found = share(result, rates)
        is_time = result.bar is not None and result.bar.of == "microseconds"
        reached = "" if found is None else f"{found:.1f} µs" if is_time else f"{found:.0%}"
        wanted = "" if result.bar is None else f"{result.bar.wanted:g} µs" if is_time else f"{result.bar.wanted:.0%}"
        peers = ", ".join(f"{peer} {value * 1e6:.0f}" for peer, value in result.seconds.items() if peer != "k25")
        speed = (
            f"{seconds * 1e6:.1f} | {result.least_bytes / seconds / 1e12:.2f} | {result.flops / seconds / 1e12:.0f}"
            if seconds
            else "| | "
        )
        lines.append(f"| {result.name} | {result.error:.1e} | {speed} | {reached} | {wanted} | {peers} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=384, help="experts of the layer (fewer need less memory)")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            device: Device = DryRun(Path(folder)) if arguments.dry_run else Gpu(arguments.library)
        except K25Error as error:
            print(error, file=sys.stderr)
            return error.exit_code
        limits = ceilings(device)
        results = []
        seconds: dict[str, list[float]] = {name: [] for name in limits}
        for title, make, bar in cases_of(device, arguments.experts):
            if arguments.only not in title:
                continue
            for name, timer in limits.items():
                seconds[name].append(timer())
            results.append(measured(device, make, bar, arguments.rounds))
            print(
                f"{results[-1].name}: error {results[-1].error:.1e} {results[-1].seconds}", file=sys.stderr, flush=True
            )
    best = {name: min(times) or 1.0 for name, times in seconds.items()}
    size, side = 2 * 2**30, 8192
    rates = {"copy": size / best["copy"], "matmul": 2 * side**3 / best["matmul"]}
    print(table(device.name, results, rates))
    if arguments.json is not None:
        record = {
            "device": device.name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "torch": torch.__version__,
            "kernels": gpu_kernel_count(device.library) if isinstance(device, Gpu) else 0,
            "rates": rates,
            "cases": [
                {"name": r.name, "error": r.error, "seconds": r.seconds, "least_bytes": r.least_bytes, "flops": r.flops}
                for r in results
            ],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(result.error < TOLERANCE for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
