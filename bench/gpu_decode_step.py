"""A decode step of a few real-size layers through ONNX Runtime's CUDA provider, with the GPU kernels of the k25 ops.

    python bench/gpu_decode_step.py [--folder DIR] [--library libk25_ops.so] [--json FILE] [--dense 1] [--moe 2]
        [--experts 384] [--batch 1 16 64] [--context 8192] [--rounds N]
    python bench/gpu_decode_step.py --dry-run     # no GPU: tiny sizes, the CPU provider, float32, the CPU kernels

Writes a checkpoint with random weights (19 GB as above, in DIR or a temporary folder) and its bundle, and runs the
bundle's layers one after the other. Weights, caches and activations are PyTorch tensors on the device, bound by their
addresses: the weights once, the cache as input and output, the experts at multiples of 128 bytes with a table of their
own. Each layer is first held against the eager ops on the same inputs, outputs filled with NaN before; a step whose
result is wrong has no time. Then the time of whole steps by CUDA events (best and median of the rounds), against the
bytes that the step reads at the bandwidth of a device copy in the same run. Needs PyTorch with CUDA, onnxruntime-gpu
and a library built with -DK25_GPU_KERNELS: exit code 4 where one is missing. About 30 GB of GPU memory.

Tolerance: bfloat16 activations are rounded at every op, so the eager layer in bfloat16 is some way from the same layer
in float32, and ONNX Runtime may be twice as far. In float32 (dry run) both only add up in another order: 2e-5.
Distances are relative L2 of what the layer adds to its input. Experts are compared on the same routing, which has to
be a top-k of the eager scores within four times the rounding of those scores (1e-5 in float32).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import onnxruntime as ort
import torch
from decode_step_model import GivenRouting, eager_layer, write_model
from decode_step_places import Cpu, Cuda, Place
from gpu import ceilings
from torch import Tensor

from k25_export.manifest import Manifest, read_bundle_file
from k25_plugins.errors import K25Error
from k25_plugins.gpu_launch import gpu_kernel_count
from k25_plugins.native_library import load_library, native_library
from k25_plugins.signatures import ONNX_DTYPES
from k25_runtime.bench_bytes import model_bytes
from k25_runtime.expert_layout import ScatteredTensor
from k25_runtime.host_tensor import HostTensor
from k25_runtime.mapped_checkpoint import MappedCheckpoint

EXPERT_ALIGNMENT = 128
FLOAT32_TOLERANCE, FLOAT32_SCORE = 2e-5, 1e-5
STEPS_CHECKED = 2
_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run."""

    preset: str
    dense: int
    moe: int
    experts: int
    batches: tuple[int, ...]
    context: int
    block_size: int


@dataclass(kw_only=True)
class Result:
    """One batch: error and what is allowed of the worst layer, how far routing was from a top-k, seconds of a step."""

    batch: int
    context: int
    error: float
    allowed: float
    routing: float
    routing_allowed: float
    bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether it may have a time. NaN is wrong."""
        return self.error <= self.allowed and self.routing <= self.routing_allowed


class Layer:
    """A layer's weights on the device, the session of its component, and its eager module."""

    def __init__(self, component: str, session: ort.InferenceSession, weights: dict[str, Tensor], eager: Any) -> None:
        self.component, self.session, self.weights, self.eager = component, session, weights, eager

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return self.component == "moe_layer"


class Step:
    """A bound decode step: every layer with inputs, outputs and a cache of its own on the device."""

    def __init__(self, place: Place, manifest: Manifest, layers: list[Layer], sizes: Sizes, batch: int) -> None:
        text, self.place, self.layers = manifest.model.text, place, layers
        self.activation = torch.bfloat16 if place.precision == "bf16" else torch.float32
        self.block_size, self.context = sizes.block_size, sizes.context
        blocks = -(-sizes.context // sizes.block_size)
        random = torch.Generator().manual_seed(batch)

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, device=place.device).to(self.activation)

        order = torch.randperm(batch * blocks, generator=random).reshape(batch, blocks)
        self.placement = {
            "positions": torch.full((batch,), sizes.context - 1, dtype=torch.int32, device=place.device),
            "query_start": torch.arange(batch + 1, dtype=torch.int32, device=place.device),
            "block_table": order.to(place.device, torch.int32),
        }
        self.caches = [made(batch * blocks, sizes.block_size, text.cache_dim) for _ in layers]
        self.hidden = [made(batch, text.hidden_size) for _ in range(len(layers) + 1)]
        shape = (batch, text.num_experts_per_tok)
        self.routing = [
            {
                "expert_ids": torch.zeros(shape, dtype=torch.int32, device=place.device),
                "expert_weights": torch.zeros(shape, device=place.device),
            }
            for _ in layers
        ]
        self.share = torch.ones(1, device=place.device)
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bindings = [self._binding(index) for index in range(len(layers))]

    def _binding(self, index: int) -> Any:
        layer = self.layers[index]
        inputs = {**layer.weights, **self.placement, "hidden": self.hidden[index], "cache": self.caches[index]}
        outputs = {"hidden_out": self.hidden[index + 1], "cache_out": self.caches[index]}
        if layer.is_moe:
            inputs["residual_share"] = self.share
            outputs |= self.routing[index]
        binding = layer.session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *self._place_of(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._place_of(tensor))
        return binding

    def _place_of(self, tensor: Tensor) -> tuple[Any, ...]:
        assert tensor.is_contiguous()
        dtype = ONNX_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        return self.place.kind, 0, dtype, list(tensor.shape), tensor.data_ptr()

    def run_layer(self, index: int) -> None:
        """Put one layer on the stream."""
        self.layers[index].session.run_with_iobinding(self.bindings[index], self.options)

    def run(self) -> None:
        """Put the whole step on the stream."""
        for index in range(len(self.layers)):
            self.run_layer(index)

    def new_places(self) -> tuple[Tensor, Tensor]:
        """Block and place in it, int64 [S] each, of the cache rows that this step writes."""
        where = self.placement["positions"].long()
        block = self.placement["block_table"].gather(1, (where // self.block_size).unsqueeze(1).long())
        return block.squeeze(1).long(), where % self.block_size

    def poison(self, index: int) -> None:
        """Fill what the layer has to write: hidden, routing and the new rows of the cache."""
        self.hidden[index + 1].fill_(float("nan"))
        self.routing[index]["expert_ids"].fill_(2**30)
        self.routing[index]["expert_weights"].fill_(float("nan"))
        self.caches[index][self.new_places()] = float("nan")


def on_device(place: Place, found: dict[str, HostTensor | ScatteredTensor]) -> dict[str, Tensor]:
    """Weights in device memory; tensors over the same bytes share a copy. What lies between experts is 0xFF."""
    regions: dict[int, Tensor] = {}
    weights = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        for name, tensor in found.items():
            if isinstance(tensor, HostTensor):
                data = torch.from_numpy(np.ascontiguousarray(tensor.array))
                to = torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype], device=place.device)
                to.copy_(data.view(_DTYPES[tensor.dtype]))
                weights[name] = to
                continue
            if id(tensor.source) not in regions:
                region = torch.full((tensor.source.size,), 0xFF, dtype=torch.uint8, device=place.device)
                for offset, piece in tensor.source.pieces:
                    region[offset : offset + len(piece)].copy_(torch.from_numpy(piece))
                regions[id(tensor.source)] = region
            weights[name] = regions[id(tensor.source)].view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
    return weights


def open_layers(place: Place, folder: Path, manifest: Manifest) -> tuple[list[Layer], dict[str, dict[str, int]]]:
    """Every layer, and how many nodes of each component run on which provider."""
    bundle = folder / "bundle"
    checkpoint = MappedCheckpoint(manifest, folder / "checkpoint")
    sessions: dict[str, ort.InferenceSession] = {}
    layers: dict[int, Layer] = {}
    nodes: dict[str, dict[str, int]] = {}
    for entry in manifest.components:
        if entry.layers is None:
            continue
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if place.library is not None:
            options.register_custom_ops_library(str(place.library.path))
        data = read_bundle_file(bundle, entry.file(place.precision))
        session = sessions[entry.name] = ort.InferenceSession(data, options, providers=place.providers())
        nodes[entry.name] = assigned_nodes(session)
        for layer in entry.layers:
            found = checkpoint.weights_to_copy(entry, layer, place.precision, alignment=EXPERT_ALIGNMENT)
            weights = on_device(place, found)
            layers[layer] = Layer(entry.name, session, weights, eager_layer(manifest, entry.name, weights))
        checkpoint.unmap()
    return [layers[index] for index in sorted(layers)], nodes


def assigned_nodes(session: ort.InferenceSession) -> dict[str, int]:
    """Nodes by provider, where this ONNX Runtime tells."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    counts: dict[str, int] = {}
    for part in tell() if tell is not None else ():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def eager(step: Step, index: int, cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """`hidden_out` minus `hidden`, the new rows of the cache, and the router (None: dense), of the eager layer."""
    layer, hidden = step.layers[index], step.hidden[index].to(dtype)
    arguments = [hidden, cache.to(dtype), *step.placement.values()]
    router: GivenRouting | None = None
    if layer.is_moe:
        router = layer.eager.mlp.gate
        router.ids = step.routing[index]["expert_ids"]
        arguments += [layer.weights[name] for name in ("expert_words", "expert_scales", "expert_table")]
        arguments.append(step.share)
    with torch.no_grad(), torch.device(step.place.device):
        out, cache_out, *_ = layer.eager(*arguments)
    return out.double() - hidden.double(), cache_out[step.new_places()].double(), router


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN counts."""
    return float((found.double() - expected).norm() / expected.norm())


def checked_layer(step: Step, index: int) -> tuple[float, float, float, float]:
    """(error, allowed, routing, routing allowed) of one layer on poisoned outputs; error is NaN for a broken cache."""
    before = step.caches[index].clone()
    step.poison(index)
    step.run_layer(index)
    step.place.synchronize()
    after, routing = step.caches[index].clone(), step.routing[index]
    if step.layers[index].is_moe:
        ids, experts = routing["expert_ids"], len(step.layers[index].weights["expert_table"])
        if not bool(((ids >= 0) & (ids < experts)).all()):
            return float("nan"), 0.0, float("inf"), 0.0
    expected, row, router = eager(step, index, before, torch.float32)
    found = step.hidden[index + 1].double() - step.hidden[index].double()
    errors = [distance(found, expected), distance(after[step.new_places()], row)]
    allowed, margin, shortfall, scores = FLOAT32_TOLERANCE, FLOAT32_SCORE, 0.0, None
    if router is not None:
        errors.append(distance(routing["expert_weights"], router.weights.double()))
        shortfall, scores = router.shortfall(), router.scores
    if step.activation == torch.bfloat16:
        rounded, rounded_row, router = eager(step, index, before, torch.bfloat16)
        allowed = 2 * max(distance(rounded, expected), distance(rounded_row, row))
        if router is not None:
            margin = 4 * float((router.scores - scores).abs().max())
    if not unchanged(step, before, after):
        errors.append(float("nan"))
    return max(errors, key=lambda error: (error != error, error)), allowed, shortfall, margin


def unchanged(step: Step, before: Tensor, after: Tensor) -> bool:
    """Whether the step left every other row of the cache as it was, bit for bit."""
    for cache in (before, after):
        cache[step.new_places()] = 0
    return torch.equal(before, after)


def measured(place: Place, manifest: Manifest, layers: list[Layer], sizes: Sizes, batch: int, rounds: int) -> Result:
    """Two checked steps, the second with the rows that the first wrote; then the time."""
    torch.manual_seed(17 + batch)
    step = Step(place, manifest, layers, sizes, batch)
    found = []
    for back in range(STEPS_CHECKED, 0, -1):
        step.placement["positions"].fill_(sizes.context - back)
        step.hidden[0].copy_(torch.randn_like(step.hidden[0]))
        found += [checked_layer(step, index) for index in range(len(layers))]
    worst = max(found, key=lambda item: item[0] / item[1] if item[0] <= item[1] else float("inf"))
    routing = max(found, key=lambda item: item[2] / item[3] if item[3] else item[2])
    hit = {index: float(len(step.routing[index]["expert_ids"].unique())) for index in moe_layers(layers)}
    counted = model_bytes(manifest, precision=place.precision).step(
        sequences=batch, context=sizes.context, experts=hit
    )  # fmt: skip
    result = Result(
        batch=batch, context=sizes.context, error=worst[0], allowed=worst[1], routing=routing[2],
        routing_allowed=routing[3], bytes=counted.dense + counted.experts + counted.cache,
    )  # fmt: skip
    if result.is_right:
        timer = place.timer(step.run)
        result.seconds = [timer() for _ in range(rounds)]
    return result


def moe_layers(layers: list[Layer]) -> list[int]:
    """Their indices."""
    return [index for index, layer in enumerate(layers) if layer.is_moe]


def table(name: str, what: str, results: list[Result], rate: float) -> str:
    """One row a batch."""
    lines = [
        f"{name}: {what}; copy {rate / 1e12:.3f} TB/s",
        "",
        "| batch | context | error | allowed | GB | best µs | median µs | TB/s | of copy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        times = "| | | "
        if result.seconds:
            best = min(result.seconds)
            speed = result.bytes / best
            times = (
                f"{best * 1e6:.0f} | {statistics.median(result.seconds) * 1e6:.0f} | {speed / 1e12:.3f} | "
                f"{speed / rate:.0%}"
            )
        lines.append(
            f"| {result.batch} | {result.context} | {result.error:.1e} | {result.allowed:.1e} | "
            f"{result.bytes / 1e9:.3f} | {times} |"
        )
    return "\n".join(lines)


def run(place: Place, folder: Path, sizes: Sizes, rounds: int) -> tuple[dict[str, Any], str, bool]:
    """The record for the JSON, the table, and whether all was right."""
    manifest = write_model(
        folder, preset=sizes.preset, dense=sizes.dense, moe=sizes.moe, experts=sizes.experts, precision=place.precision
    )
    layers, nodes = open_layers(place, folder, manifest)
    copy, results, copies = ceilings(place)["copy"], [], []  # type: ignore[arg-type]
    for batch in sizes.batches:
        copies.append(copy())
        results.append(measured(place, manifest, layers, sizes, batch, rounds))
        copies.append(copy())
        if not results[-1].is_right:
            print(f"batch {batch}: WRONG: {results[-1]}", file=sys.stderr)
    rate = 2 * (2**30 if place.is_real else 2**10) / min(copies)
    record = {
        "device": place.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "kernels": gpu_kernel_count(place.library),
        "precision": place.precision,
        "sizes": asdict(sizes),
        "nodes": nodes,
        "rates": {"copy": rate},
        "cases": [{**_finite(asdict(result)), "is_right": result.is_right} for result in results],
    }
    what = f"{sizes.dense} dense + {sizes.moe} MoE layers, {sizes.experts} experts, nodes {json.dumps(nodes)}"
    return record, table(place.name, what, results, rate), all(result.is_right for result in results)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def main(given: list[str] | None = None) -> int:
    """Write, check, measure, print; 1 where a result is wrong, 4 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint and the bundle go, and stay")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--moe", type=int, default=2)
    parser.add_argument("--experts", type=int, help="of a layer (default: 384; dry run: 12)")
    parser.add_argument("--batch", type=int, nargs="+", help="(default: 1 16 64; dry run: 1 3)")
    parser.add_argument("--context", type=int, help="(default: 8192; dry run: 21)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(given)
    is_dry = options.dry_run
    sizes = Sizes(
        preset="tiny" if is_dry else "full-sparse",
        dense=options.dense,
        moe=options.moe,
        experts=options.experts or (12 if is_dry else 384),
        batches=tuple(options.batch or ((1, 3) if is_dry else (1, 16, 64))),
        context=options.context or (21 if is_dry else 8192),
        block_size=8 if is_dry else 64,
    )
    try:
        library = native_library() if options.library is None else load_library(options.library)
        place: Place = Cpu(library) if is_dry else Cuda(library)
        with tempfile.TemporaryDirectory() as temporary:
            record, text, is_right = run(place, options.folder or Path(temporary), sizes, options.rounds)
    except K25Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
