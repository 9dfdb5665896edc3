"""The plan against arithmetic of its own: shapes of the official checkpoint as literals, formulas of docs/plan.md."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest

from k25_export.byte_sizes import bytes_from_text
from k25_export.config import ModelConfig, model_config_from_dict
from k25_export.demo.official_config import official_config_from_preset
from k25_export.demo.presets import preset_with_overrides
from k25_export.gpus import GPUS, bandwidth_from_text, gpu_from_name
from k25_export.plan import (
    MOST_GPUS,
    Deployment,
    Plan,
    cache_bytes_per_token,
    plan_from_config,
    workspace_bytes,
)
from k25_export.tensor_patterns import tensor_patterns
from k25_export.weight_shares import weight_shares
from k25_plugins.errors import InputError

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text("utf-8")
GIB = 1024**3
GB = 1000**3

# Kimi K2.5, bytes as stored: bf16 is 2, a code half, a scale 2 for 32 codes.
EXPERT_CODES = 3 * 2048 * 7168 // 2
EXPERT_SCALES = 3 * 2048 * 7168 // 32 * 2
STORED = {
    "routed experts, codes": 60 * 384 * EXPERT_CODES,
    "routed experts, scales": 60 * 384 * EXPERT_SCALES,
    "routed experts, shapes": 60 * 384 * 3 * 2 * 4,
    "shared experts": 60 * 3 * 2048 * 7168 * 2,
    "router": 60 * (384 * 7168 * 2 + 384 * 4),
    "dense MLP": 3 * 18432 * 7168 * 2,
    "attention, by head": 61 * (12288 * 1536 + 16384 * 512 + 7168 * 8192) * 2,
    "attention, latent": 61 * (1536 + 576) * 7168 * 2,
    "norms": (61 * (2 * 7168 + 1536 + 512) + 7168) * 2,
    "embedding": 163840 * 7168 * 2,
    "lm_head": 163840 * 7168 * 2,
    "vision": (
        27 * (4 * 1152 + 3456 * 1152 + 3456 + 1152 * 1152 + 1152 + 2 * 4304 * 1152 + 4304 + 1152)
        + (1152 * 3 * 14 * 14 + 1152 + 64 * 64 * 1152 + 2 * 1152)
        + (2 * 1152 + 4608 * 4608 + 4608 + 7168 * 4608 + 7168)
    )
    * 2,
}
PARTS = {
    "routed experts, codes": 384,
    "routed experts, scales": 384,
    "routed experts, shapes": 384,
    "shared experts": 2048,
    "dense MLP": 18432,
    "attention, by head": 64,
    "embedding": 163840,
    "lm_head": 163840,
}
READ_ALWAYS = ("shared experts", "router", "dense MLP", "attention, by head", "attention, latent", "norms", "lm_head")


def ceil(a: int, b: int) -> int:
    return (a + b - 1) // b


def official(**overrides: int) -> ModelConfig:
    return model_config_from_dict(official_config_from_preset(preset_with_overrides("full-sparse", overrides)))


def plan(gpu: str = "h200", *, config: ModelConfig | None = None, **values: Any) -> Plan:
    return plan_from_config(config or official(), Deployment(gpu=GPUS[gpu], **{"context": 262144, **values}))


def held(gpus: int) -> dict[str, int]:
    """Bytes of the busiest GPU."""
    return {kind: stored // PARTS.get(kind, 1) * ceil(PARTS.get(kind, 1), gpus) for kind, stored in STORED.items()}


def workspace(gpus: int, sequences: int) -> int:
    attention = 2 * (1536 + 576 + ceil(64, gpus) * (192 + 576 + 512 + 128))
    dense = 2 * 2 * ceil(18432, gpus)
    experts = min(8, ceil(384, gpus)) * (2 * 2 * 2048 + 4 * 7168) + 2 * 2 * ceil(2048, gpus) + 4 * 384
    return 8192 * (2 * 3 * 7168 + max(attention, dense, experts)) + sequences * 163840 * 4


def by_kind(made: Plan) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for share in made.weights:
        both = sums.setdefault(share.kind, [0, 0])
        both[0] += share.total_bytes
        both[1] += share.gpu_bytes
    return sums


def in_docs(*figures: int) -> None:
    missing = [f"{figure:,}" for figure in figures if not re.search(rf"(?<![\d,]){figure:,}(?![\d,])", DOCS)]
    assert missing == []


def test_stored_bytes_are_those_of_the_official_checkpoint() -> None:
    made = plan(gpus=8)
    assert made.weight_bytes == sum(STORED.values()) == 595_148_192_736
    assert {kind: both[0] for kind, both in by_kind(made).items()} == STORED
    precisions = {(share.kind, share.precision) for share in made.weights}
    assert {("routed experts, codes", "INT4"), ("router", "bf16"), ("router", "fp32")} <= precisions
    in_docs(*(stored for kind, stored in STORED.items() if kind != "router"), made.weight_bytes)
    in_docs(EXPERT_CODES, EXPERT_SCALES, 384 * 7168 * 2 * 60, 384 * 4 * 60)
    in_docs(*(share for kind, share in held(8).items() if kind != "router"), sum(held(8).values()))


@pytest.mark.parametrize("gpus", [1, 2, 4, 6, 7, 8, 9, 16, 72])
def test_the_busiest_gpu_holds_its_share_rounded_up(gpus: int) -> None:
    made = plan(gpus=gpus)
    assert {kind: both[1] for kind, both in by_kind(made).items()} == held(gpus)
    assert made.memory.weights == sum(held(gpus).values())


def test_every_tensor_belongs_to_one_kind() -> None:
    config = official()
    assert sum(share.total_bytes for share in weight_shares(config, gpus=3)) == sum(STORED.values())
    assert len(tensor_patterns(config)) > 40


def test_the_latent_cache_is_70272_bytes_a_token() -> None:
    config = official()
    assert cache_bytes_per_token(config) == 61 * (512 + 64) * 2 == 70_272
    assert cache_bytes_per_token(config, "fp32") == 2 * 70_272
    made = plan(gpus=8)
    assert made.cache_bytes_per_token == 70_272
    assert made.memory.cache == 70_272 * 262_144
    assert round(made.memory.cache / GIB, 2) == 17.16
    # A vLLM log has 715,072 tokens in 46.80 GiB for the same architecture.
    assert round(715_072 * 70_272 / GIB, 2) == 46.80
    assert "17.16 GiB" in DOCS


# gpu, GPUs, longest context, most sequences of 262,144 tokens, fewest GPUs, ms a step, tokens/s: as in docs/plan.md
WORKED = [
    ("h200", 8, 262_144, 3, 6, "5.094", "196.3"),
    ("rtx-pro-6000", 8, 183_040, 0, 9, "13.645", "73.3"),
    ("rtx-pro-6000", 4, 0, 0, 9, "15.794", "63.3"),
    ("rtx-pro-6000", 1, 0, 0, 9, "28.687", "34.9"),
]
MEMORY = {"h200": 141 * GB, "rtx-pro-6000": 96 * GB}
BANDWIDTH = {"h200": 4800 * GB, "rtx-pro-6000": 1792 * GB}


@pytest.mark.parametrize(("gpu", "gpus", "longest", "most", "fewest", "step", "speed"), WORKED)
def test_figures_worked_out_by_hand(
    gpu: str, gpus: int, longest: int, most: int, fewest: int, step: str, speed: str
) -> None:
    made = plan(gpu, gpus=gpus)
    weights, cache, work = sum(held(gpus).values()), 70_272 * 262_144, workspace(gpus, 1)
    needed = weights + cache + work + 3 * GIB
    free = MEMORY[gpu] - needed
    memory = made.memory
    assert (memory.weights, memory.cache, memory.workspace) == (weights, cache, work)
    assert (memory.cuda_context, memory.reserve) == (GIB, 2 * GIB)
    assert (memory.needed, memory.available, memory.free) == (needed, MEMORY[gpu], free)
    assert made.fits is (free >= 0)

    room = MEMORY[gpu] - weights - work - 3 * GIB
    assert made.longest_context == longest == max(0, min(262_144, room // (32 * 70_272) * 32))
    assert made.longest_context_limit == ("max_position_embeddings" if longest == 262_144 else "memory")
    assert made.most_sequences == most == max(0, (room + 4 * 163_840) // (cache + 4 * 163_840))
    assert made.fewest_gpus == fewest
    sizes = {g: sum(held(g).values()) + cache + workspace(g, 1) + 3 * GIB for g in (fewest - 1, fewest)}
    assert sizes[fewest] <= MEMORY[gpu] < sizes[fewest - 1]

    always = sum(held(gpus)[kind] for kind in READ_ALWAYS)
    hit = ceil(384, gpus) * 60 * (EXPERT_CODES + EXPERT_SCALES) * 8 // 384
    assert [decode.sequences for decode in made.decode] == [1]
    decode = made.decode[0]
    assert decode.experts_hit == pytest.approx(ceil(384, gpus) / 48, rel=1e-12)
    assert (decode.weight_bytes, decode.cache_bytes) == (always + hit, cache)
    assert decode.seconds == pytest.approx((always + hit + cache) / BANDWIDTH[gpu], rel=1e-12)
    assert f"{decode.seconds * 1e3:.3f}" == step
    assert f"{decode.tokens_per_second:.1f}" == speed
    in_docs(weights, cache, work, 3 * GIB, needed, MEMORY[gpu], abs(free), always, always + hit, longest or 262_144)
    assert f"{step} ms" in DOCS
    assert speed in DOCS


def test_sixteen_sequences_worked_out_by_hand() -> None:
    made = plan(gpus=8, context=32_768, sequences=16)
    cache, weights = 16 * 32_768 * 70_272, sum(held(8).values())
    needed = weights + cache + workspace(8, 16) + 3 * GIB
    assert (made.memory.needed, made.fits) == (needed, True)
    assert made.longest_context == (141 * GB - needed + cache) // (16 * 32 * 70_272) * 32 == 51_424
    assert made.most_sequences == (141 * GB - needed + cache + 16 * 4 * 163_840) // (32_768 * 70_272 + 4 * 163_840)
    one, many = made.decode
    assert (one.sequences, many.sequences) == (1, 16)
    share = 1 - Fraction(47, 48) ** 16
    always = sum(held(8)[kind] for kind in READ_ALWAYS)
    hit = always + round(48 * 60 * (EXPERT_CODES + EXPERT_SCALES) * share)
    assert (many.weight_bytes, many.cache_bytes) == (hit, cache)
    assert many.experts_hit == pytest.approx(float(48 * share), rel=1e-12)
    assert many.tokens_per_second == pytest.approx(16 * 4.8e12 / (hit + cache), rel=1e-12)
    assert f"{many.seconds * 1e3:.3f}" == "12.873"
    assert f"{many.tokens_per_second:,.1f}" == "1,242.9"
    in_docs(cache, workspace(8, 16), needed, 51_424, hit)
    assert all(text in DOCS for text in ("0.28599", "13.73 a layer", "12.873 ms", "1,242.9 tokens/s", "77.7"))


def test_expected_hits_are_those_of_the_kernel_figures() -> None:
    # Published for the prototype kernels: 59.5 of 384 experts at 8 tokens, 110 at 16, 284 at 64, all at 512.
    hits = {batch: plan(context=1, sequences=batch).decode[-1].experts_hit for batch in (1, 8, 16, 64, 512)}
    assert {batch: round(hit, 1) for batch, hit in hits.items()} == {1: 8, 8: 59.5, 16: 109.8, 64: 284.2, 512: 384}


def test_busiest_gpu_of_a_layer_as_the_docs_say() -> None:
    """The mean of the largest count when 8 of 384 experts lie on 8 GPUs of 48: by counting choices."""

    def choices(most: int) -> int:
        ways = [1] + [0] * 8
        for _ in range(8):
            ways = [sum(ways[n - j] * comb(48, j) for j in range(min(most, n) + 1)) for n in range(9)]
        return ways[8]

    mean = sum(1 - Fraction(choices(most), comb(384, 8)) for most in range(8))
    assert f"{float(mean):.2f}" == "2.57"
    assert "2.57" in DOCS
    decode = plan(gpus=8, context=1000).decode[0]
    assert f"{decode.tokens_per_second:.1f}" == "786.8"
    one = 60 * (EXPERT_CODES + EXPERT_SCALES)
    slower = 4.8e12 / (decode.weight_bytes + decode.cache_bytes + float(mean - 1) * one)
    assert f"{slower:.1f}" == "568.6"
    assert "786.8" in DOCS
    assert "568.6" in DOCS


def test_sequences_layout_shares_out_the_cache_instead_of_the_heads() -> None:
    heads = plan("b200", gpus=8, sequences=20, context=131_072)
    sequences = plan("b200", gpus=8, sequences=20, context=131_072, attention="sequences")
    per_sequence = 131_072 * 70_272
    assert heads.memory.cache == 20 * per_sequence
    assert sequences.memory.cache == 3 * per_sequence
    assert sequences.memory.weights - heads.memory.weights == STORED["attention, by head"] * 7 // 8
    assert f"{STORED['attention, by head'] * 7 // 8 / GB:.2f} GB more each" in DOCS
    assert [decode.cache_bytes for decode in sequences.decode] == [per_sequence, 3 * per_sequence]
    assert (heads.fits, sequences.fits) == (False, True)
    assert sequences.most_sequences % 8 == 0
    assert "20 sequences do not divide by 8 GPUs: the busiest has 3" in sequences.notes
    assert any("cache of its own sequences" in line for line in sequences.assumptions)
    assert any("a whole copy" in line for line in heads.assumptions)
    # One row of a token is much wider with all heads, but the experts' buffers are wider still.
    assert sequences.memory.workspace == heads.memory.workspace


def test_what_the_components_allow_today_as_the_docs_say() -> None:
    whole = ("attention, by head", "shared experts", "dense MLP")
    more = sum(STORED[kind] for kind in whole) * 7 // 8
    in_docs(more)
    assert plan(gpus=8).memory.needed + more < 141 * GB


@pytest.mark.parametrize("gpus", [6, 7, 100, 500])
def test_counts_that_do_not_divide_are_rounded_up_and_named(gpus: int) -> None:
    made = plan(gpus=gpus)
    heads = f"64 attention heads do not divide by {gpus} GPUs: the busiest has {ceil(64, gpus)}"
    assert any(note.startswith(heads) for note in made.notes)
    assert any(note.endswith("some have none") for note in made.notes) is (gpus > 64)
    experts = [note for note in made.notes if "experts a layer" in note]
    assert [f"the busiest has {ceil(384, gpus)}" in note for note in experts] == ([] if gpus == 6 else [True])


def test_odd_models() -> None:
    config = official(num_attention_heads=5, n_routed_experts=10, num_experts_per_tok=3, n_shared_experts=2)
    made = plan(config=config, gpus=4)
    shares = {share.kind: share for share in made.weights}
    heads = shares["attention, by head"]
    assert heads.total_bytes == 61 * 5 * (192 * 1536 + 256 * 512 + 7168 * 128) * 2
    assert heads.gpu_bytes * 5 == heads.total_bytes * 2
    assert shares["routed experts, codes"].gpu_bytes == 60 * 3 * EXPERT_CODES
    assert shares["shared experts"].gpu_bytes * 4 == shares["shared experts"].total_bytes
    assert made.decode[0].experts_hit == pytest.approx(0.9, rel=1e-12)
    # A GPU with 3 of 10 experts gets at most 3 rows of a token.
    work = workspace_bytes(config, made.deployment)
    assert work == 8192 * (43_008 + 3 * 36_864 + 2 * 2 * 1024 + 4 * 10) + 163_840 * 4


def test_models_without_vision_or_experts_or_dense_layers() -> None:
    config = official()
    blind = plan(config=replace(config, vision=None))
    assert blind.weight_bytes == 595_148_192_736 - STORED["vision"]
    assert "vision" not in by_kind(blind)
    assert plan().decode == blind.decode

    dense = plan(config=official(num_hidden_layers=3, first_k_dense_replace=3))
    assert not [share for share in dense.weights if "expert" in share.kind or share.kind == "router"]
    assert dense.decode[0].experts_hit == 0
    assert dense.memory.workspace == 8192 * (43_008 + 184_448) + 163_840 * 4

    moe = by_kind(plan(config=official(first_k_dense_replace=0)))
    assert "dense MLP" not in moe
    assert moe["shared experts"][0] == STORED["shared experts"] // 60 * 61


def test_every_expert_is_hit_where_a_token_takes_all() -> None:
    made = plan(config=official(n_routed_experts=8), context=1)
    assert made.decode[0].experts_hit == 8


def test_memory_that_binds_exactly() -> None:
    needed = plan(gpus=8).memory.needed
    exact = replace(GPUS["h200"], memory_bytes=needed, reported_bytes=None)
    short = replace(exact, memory_bytes=needed - 1)
    config = official()
    fits = plan_from_config(config, Deployment(gpu=exact, gpus=8, context=262_144))
    misses = plan_from_config(config, Deployment(gpu=short, gpus=8, context=262_144))
    assert (fits.fits, fits.memory.free, fits.longest_context, fits.most_sequences) == (True, 0, 262_144, 1)
    assert (misses.fits, misses.memory.free, misses.longest_context) == (False, -1, 262_144 - 32)
    assert misses.longest_context_limit == "memory"
    assert (fits.fewest_gpus, misses.fewest_gpus) == (8, 9)


def test_blocks_round_a_context_up_and_a_longest_context_down() -> None:
    made = plan(gpus=8, context=1000, block_size=300)
    assert made.memory.cache == 1200 * 70_272
    assert made.decode[0].cache_bytes == 1000 * 70_272
    assert made.longest_context == 262_144
    assert plan("rtx-pro-6000", gpus=8, block_size=300).longest_context == 183_000


def test_the_memory_that_drivers_report_is_a_note() -> None:
    (note,) = [note for note in plan("rtx-pro-6000", gpus=8).notes if "--gpu-memory" in note]
    assert "97887MiB this fits, the longest context is 262,144 tokens" in note
    gpu = gpu_from_name("rtx-pro-6000", memory_bytes=bytes_from_text("97887MiB"))
    assert plan_from_config(official(), Deployment(gpu=gpu, gpus=8, context=262_144)).fits
    assert not [note for note in plan(gpus=8).notes if "--gpu-memory" in note]


def test_the_whole_weight_of_a_gpu_can_be_too_much_for_any_number_of_gpus() -> None:
    gpu = gpu_from_name("custom", memory_bytes=bytes_from_text("8GB"), bandwidth=bandwidth_from_text("1TB/s"))
    made = plan_from_config(official(), Deployment(gpu=gpu, context=32))
    assert (made.fits, made.fewest_gpus, made.longest_context, made.most_sequences) == (False, None, 0, 0)
    assert MOST_GPUS == 1024


def test_a_cpu_has_fp32_activations() -> None:
    gpu = gpu_from_name("cpu", memory_bytes=768 * GIB, bandwidth=400 * GB)
    deployment = Deployment(gpu=gpu, context=32_768, cache_dtype="fp32", cuda_context_bytes=0)
    made = plan_from_config(official(), deployment)
    experts = 8 * (4 * 2 * 2048 + 4 * 7168) + 4 * 2 * 2048 + 4 * 384
    attention = 4 * (1536 + 576 + 64 * (192 + 576 + 512 + 128))
    assert made.memory.workspace == 8192 * (4 * 3 * 7168 + max(experts, attention)) + 4 * 163_840
    assert made.memory.cache == 32_768 * 140_544
    assert made.memory.needed == sum(STORED.values()) + made.memory.workspace + made.memory.cache + 2 * GIB
    assert made.fewest_gpus == 1
    assert plan_from_config(official(), replace(deployment, gpu=replace(gpu, memory_bytes=GIB))).fewest_gpus is None


def test_efficiency_scales_the_speed() -> None:
    full, less = plan(gpus=8), plan(gpus=8, efficiency=0.5)
    assert less.decode[0].tokens_per_second == pytest.approx(full.decode[0].tokens_per_second / 2, rel=1e-12)
    assert any("100 % of" in line for line in full.assumptions)
    assert any("50 % of" in line for line in less.assumptions)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 262_145}, "context: expected at most max_position_embeddings 262,144.*found 262,145"),
        ({"context": 0}, "context: expected 1 to .*found 0"),
        ({"gpus": 0}, "gpus: expected 1 to"),
        ({"gpus": 1025}, "gpus: expected at most 1024, found 1025"),
        ({"sequences": -1}, "sequences: expected 1 to"),
        ({"sequences": 10**400, "max_batch_tokens": 10**400}, "sequences: expected 1 to"),
        ({"sequences": 9000}, "sequences: expected at most max_batch_tokens 8,192.*Raise --max-batch-tokens"),
        ({"block_size": 0}, "block_size"),
        ({"reserve_bytes": -1}, "reserve_bytes: expected at least 0 bytes"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"efficiency": 1.5}, "efficiency: expected 0.001 to 1, found 1.5"),
        ({"efficiency": float("nan")}, "efficiency"),
        ({"attention": "tensors"}, "attention: expected heads or sequences"),
        ({"cache_dtype": "fp8"}, "cache dtype: expected bf16 or fp32"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**values)


def test_a_cpu_is_one_machine() -> None:
    with pytest.raises(InputError, match="gpus: expected 1 for a CPU, found 2"):
        Deployment(gpu=gpu_from_name("cpu", memory_bytes=GIB, bandwidth=GB), gpus=2, context=1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("141GB", 141_000_000_000),
        ("48GiB", 51_539_607_552),
        (" 1.5 TB ", 1_500_000_000_000),
        ("97887MiB", 102_641_958_912),
        ("0.1GiB", 107_374_182),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("0B", 0),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert bytes_from_text(text) == count


@pytest.mark.parametrize(
    "text", ["", "48", "48G", "48gb", "48Gb", "-1GB", "1e3GB", "1,5GB", "GB", "48GB/s", "nanGB", "٤GB"]
)
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="size: expected a number and a unit"):
        bytes_from_text(text)


def test_bandwidths() -> None:
    assert bandwidth_from_text("900GB/s") == 900 * GB
    assert bandwidth_from_text("4.8 TB/s") == 4800 * GB
    for text in ("900GB", "900GB/h", "900/s", "900Gb/s", "GB/s", "900GB/s/s"):
        with pytest.raises(InputError, match="bandwidth: expected bytes a second"):
            bandwidth_from_text(text)


def test_the_table_of_gpus_is_the_one_of_the_docs() -> None:
    for name, gpu in GPUS.items():
        (row,) = [line for line in DOCS.splitlines() if line.startswith(f"| `{name}`")]
        assert f" {gpu.memory_bytes // GB} GB" in row
        assert gpu.reported_bytes is not None
        assert f"{gpu.reported_bytes >> 20:,} MiB = {gpu.reported_bytes / GB:.2f} GB" in row
        assert f"{gpu.bandwidth / 10**12:g} TB/s |" in row
        assert gpu.memory_bytes < gpu.reported_bytes
    figures = {name: (gpu.memory_bytes // GB, gpu.bandwidth // GB) for name, gpu in GPUS.items()}
    assert figures == {"h100": (80, 3350), "h200": (141, 4800), "b200": (180, 8000), "rtx-pro-6000": (96, 1792)}


def test_gpus_by_name() -> None:
    slower = gpu_from_name("rtx-pro-6000", bandwidth=1597 * GB)
    assert (slower.memory_bytes, slower.bandwidth) == (96 * GB, 1597 * GB)
    assert slower.reported_bytes == GPUS["rtx-pro-6000"].reported_bytes
    assert gpu_from_name("h200", memory_bytes=GB).reported_bytes is None
    with pytest.raises(InputError, match=r"gpu: expected h100, .* custom or cpu, found 'a100'"):
        gpu_from_name("a100")
    for name in ("custom", "cpu"):
        with pytest.raises(InputError, match=f"gpu {name}: .*found only a memory size. Give both"):
            gpu_from_name(name, memory_bytes=GB)
        with pytest.raises(InputError, match="found neither"):
            gpu_from_name(name)
        with pytest.raises(InputError, match="found only a bandwidth"):
            gpu_from_name(name, bandwidth=GB)
