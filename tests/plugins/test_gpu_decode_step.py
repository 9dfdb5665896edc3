"""bench/gpu_decode_step.py without a GPU: the same code on the CPU provider, and that it tells wrong results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import decode_step_model
import decode_step_places
import gpu_decode_step as bench

from k25_plugins.native_library import native_library

BATCH, CONTEXT = 3, 21
SIZES = bench.Sizes(preset="tiny", dense=1, moe=2, experts=7, batches=(BATCH,), context=CONTEXT, block_size=8)
OPTIONS = ["--dry-run", "--experts", "7", "--context", str(CONTEXT), "--batch", str(BATCH), "--rounds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decode_step")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Any:
    return decode_step_model.write_model(folder, preset="tiny", dense=1, moe=2, experts=7, precision="fp32")


@pytest.fixture(scope="module")
def place() -> bench.Cpu:
    return bench.Cpu(native_library())


@pytest.fixture(scope="module")
def layers(place: bench.Cpu, folder: Path, manifest: Any) -> list[bench.Layer]:
    return bench.open_layers(place, folder, manifest)[0]


def test_a_dry_run_is_right_and_says_what_it_measured(
    folder: Path, manifest: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "step.json"
    assert bench.main([*OPTIONS, "--folder", str(folder), "--json", str(report)]) == 0
    record = json.loads(report.read_text())
    (case,) = record["cases"]
    assert case["is_right"]
    assert (case["batch"], case["context"], len(case["seconds"])) == (BATCH, CONTEXT, 2)
    assert 0 < case["error"] <= case["allowed"] == bench.FLOAT32_TOLERANCE
    cache = 3 * BATCH * CONTEXT * manifest.model.text.cache_dim * 4
    assert case["bytes"] > cache
    assert set(record["nodes"]) == {"dense_layer", "moe_layer"}
    assert f"| {BATCH} | {CONTEXT} |" in capsys.readouterr().out


def test_experts_lie_at_multiples_of_128_bytes_and_their_bytes_differ(layers: list[bench.Layer]) -> None:
    for layer in layers[1:]:
        table, words = layer.weights["expert_table"], layer.weights["expert_words"]
        assert table.shape == (7, 6)
        assert not (table * 8 % 128).any(), "a row has 8 bytes"
        assert words.data_ptr() == layer.weights["expert_scales"].data_ptr(), "one copy"
        firsts = {tuple(words[row : row + 4].flatten().tolist()) for row in table[:, 0].tolist()}
        assert len(firsts) == 7


def noise(step: bench.Step, index: int) -> None:
    step.hidden[index + 1].mul_(1 + 1e-3)


def other_row(step: bench.Step, index: int) -> None:
    block, at = step.new_places()
    step.caches[index][block, (at + 1) % step.block_size] += 1


def no_row(step: bench.Step, index: int) -> None:
    step.caches[index][step.new_places()] = float("nan")


def no_hidden(step: bench.Step, index: int) -> None:
    step.hidden[index + 1].fill_(float("nan"))


def same_expert_twice(step: bench.Step, index: int) -> None:
    ids = step.routing[index]["expert_ids"]
    ids[:, 1] = ids[:, 0]


def weights_of_others(step: bench.Step, index: int) -> None:
    step.routing[index]["expert_weights"].copy_(step.routing[index]["expert_weights"].flip(-1))


def no_such_expert(step: bench.Step, index: int) -> None:
    step.routing[index]["expert_ids"][0, 0] = 7


@pytest.mark.parametrize(
    "fault",
    [noise, other_row, no_row, no_hidden, same_expert_twice, weights_of_others, no_such_expert],
    ids=lambda fault: fault.__name__,
)
def test_a_wrong_step_is_seen_and_not_timed(
    fault: Callable[[bench.Step, int], None],
    place: bench.Cpu,
    manifest: Any,
    layers: list[bench.Layer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_layer = bench.Step.run_layer

    def faulty(step: bench.Step, index: int) -> None:
        run_layer(step, index)
        if index == len(layers) - 1:
            fault(step, index)

    monkeypatch.setattr(bench.Step, "run_layer", faulty)
    result = bench.measured(place, manifest, layers, SIZES, BATCH, 1)
    assert not result.is_right
    assert result.seconds == []


@pytest.mark.parametrize(("scale", "is_right"), [(1.0, True), (1.05, False)])
def test_bfloat16_may_be_twice_as_far_as_the_eager_layer(
    scale: float,
    is_right: bool,
    manifest: Any,
    layers: list[bench.Layer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The eager layer in bfloat16 stands for ONNX Runtime; what it adds is scaled to make it wrong."""

    class Bfloat16(bench.Cpu):
        precision = "bf16"

    def run_layer(step: bench.Step, index: int) -> None:
        layer, routing = step.layers[index], step.routing[index]
        arguments = [step.hidden[index], step.caches[index], *step.placement.values()]
        if layer.is_moe:
            gate = layer.eager.mlp.gate
            gate.ids = torch.arange(routing["expert_ids"].shape[1], dtype=torch.int32).expand_as(routing["expert_ids"])
            arguments += [layer.weights[name] for name in ("expert_words", "expert_scales", "expert_table")]
            arguments.append(step.share)
            layer.eager(*arguments)
            gate.ids = gate.scores.topk(gate.ids.shape[1], dim=-1).indices.to(torch.int32)
        with torch.no_grad():
            out, cache, *chosen = layer.eager(*arguments)
        step.hidden[index + 1].copy_(step.hidden[index] + scale * (out - step.hidden[index]))
        step.caches[index].copy_(cache)
        for name, value in zip(("expert_ids", "expert_weights"), chosen, strict=False):
            routing[name].copy_(value)

    monkeypatch.setattr(bench.Step, "run_layer", run_layer)
    monkeypatch.setattr(bench.Step, "_binding", lambda step, index: None)
    result = bench.measured(Bfloat16(None), manifest, layers, SIZES, BATCH, 1)
    assert result.is_right == is_right
    assert bench.FLOAT32_TOLERANCE < result.allowed < 0.03


def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    providers = ["CPUExecutionProvider"]
    monkeypatch.setattr(bench.ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(decode_step_places, "gpu_kernel_count", lambda library: 0)
    for has_gpu, words in ((False, "sees no GPU"), (True, "no CUDA provider"), (True, "no GPU kernels")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        if words == "no GPU kernels":
            providers.insert(0, "CUDAExecutionProvider")
        assert bench.main([]) == 4
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
