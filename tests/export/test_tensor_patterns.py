"""The table of tensors, against the published totals and names of the official checkpoint. No file is read.

`official_tensors` is written from the public tensor listing of Kimi K2.5, not from our table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_export.checkpoint import Checkpoint
from k25_export.config import ModelConfig, model_config_from_dict
from k25_export.inspection import Inspection, inspection_of_checkpoint
from k25_export.tensor_patterns import TensorPattern, tensor_patterns

TEXT: dict[str, Any] = {
    "model_type": "kimi_k2", "hidden_act": "silu", "vocab_size": 163840, "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 64, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "rope_theta": 50000.0, "bos_token_id": 163584,
    "eos_token_id": 163585, "pad_token_id": 163839,
    "rope_scaling": {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0},
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {
            "type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}}},
    },
}  # fmt: skip
VISION = {
    "patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "init_pos_emb_time": 4,
    "vt_hidden_size": 1152, "vt_num_hidden_layers": 27, "vt_num_attention_heads": 16, "vt_intermediate_size": 4304,
}  # fmt: skip

TENSORS, ELEMENTS, BYTES = 208_550, 170_738_182_128, 595_148_192_736
BYTES_OF = {"BF16": 2, "F32": 4, "I32": 4}
Listed = dict[str, tuple[str, tuple[int, ...]]]


def official_tensors() -> Listed:
    """Name -> (dtype, shape) of every tensor, as the public listing has them."""
    found: Listed = {}

    def add(name: str, *shape: int, dtype: str = "BF16") -> None:
        assert name not in found
        found[name] = (dtype, shape)

    def linear_with_bias(name: str, out_features: int, in_features: int) -> None:
        add(f"{name}.weight", out_features, in_features)
        add(f"{name}.bias", out_features)

    def layer_norm(name: str, size: int) -> None:
        add(f"{name}.weight", size)
        add(f"{name}.bias", size)

    add("language_model.model.embed_tokens.weight", 163840, 7168)
    add("language_model.lm_head.weight", 163840, 7168)
    add("language_model.model.norm.weight", 7168)
    for layer in range(61):
        prefix = f"language_model.model.layers.{layer}"
        add(f"{prefix}.input_layernorm.weight", 7168)
        add(f"{prefix}.post_attention_layernorm.weight", 7168)
        add(f"{prefix}.self_attn.q_a_proj.weight", 1536, 7168)
        add(f"{prefix}.self_attn.q_a_layernorm.weight", 1536)
        add(f"{prefix}.self_attn.q_b_proj.weight", 12288, 1536)
        add(f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", 576, 7168)
        add(f"{prefix}.self_attn.kv_a_layernorm.weight", 512)
        add(f"{prefix}.self_attn.kv_b_proj.weight", 16384, 512)
        add(f"{prefix}.self_attn.o_proj.weight", 7168, 8192)
        if layer == 0:
            add(f"{prefix}.mlp.gate_proj.weight", 18432, 7168)
            add(f"{prefix}.mlp.up_proj.weight", 18432, 7168)
            add(f"{prefix}.mlp.down_proj.weight", 7168, 18432)
            continue
        add(f"{prefix}.mlp.gate.weight", 384, 7168)
        add(f"{prefix}.mlp.gate.e_score_correction_bias", 384, dtype="F32")
        for expert in range(384):
            for projection, rows, columns in (("gate", 2048, 7168), ("up", 2048, 7168), ("down", 7168, 2048)):
                name = f"{prefix}.mlp.experts.{expert}.{projection}_proj"
                add(f"{name}.weight_packed", rows, columns // 8, dtype="I32")
                add(f"{name}.weight_scale", rows, columns // 32)
                add(f"{name}.weight_shape", 2, dtype="I32")
        add(f"{prefix}.mlp.shared_experts.gate_proj.weight", 2048, 7168)
        add(f"{prefix}.mlp.shared_experts.up_proj.weight", 2048, 7168)
        add(f"{prefix}.mlp.shared_experts.down_proj.weight", 7168, 2048)
    add("vision_tower.patch_embed.proj.weight", 1152, 3, 14, 14)
    add("vision_tower.patch_embed.proj.bias", 1152)
    add("vision_tower.patch_embed.pos_emb.weight", 64, 64, 1152)
    for block in range(27):
        prefix = f"vision_tower.encoder.blocks.{block}"
        layer_norm(f"{prefix}.norm0", 1152)
        layer_norm(f"{prefix}.norm1", 1152)
        linear_with_bias(f"{prefix}.wqkv", 3456, 1152)
        linear_with_bias(f"{prefix}.wo", 1152, 1152)
        linear_with_bias(f"{prefix}.mlp.fc0", 4304, 1152)
        linear_with_bias(f"{prefix}.mlp.fc1", 1152, 4304)
    layer_norm("vision_tower.encoder.final_layernorm", 1152)
    layer_norm("mm_projector.pre_norm", 1152)
    linear_with_bias("mm_projector.proj.0", 4608, 4608)
    linear_with_bias("mm_projector.proj.2", 7168, 4608)
    return found


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return model_config_from_dict(
        {
            "model_type": "kimi_k25",
            "text_config": TEXT,
            "vision_config": VISION,
            "media_placeholder_token_id": 163605,
        }
    )


@pytest.fixture(scope="module")
def patterns(config: ModelConfig) -> tuple[TensorPattern, ...]:
    return tensor_patterns(config)


@pytest.fixture(scope="module")
def listed() -> Listed:
    return official_tensors()


def members(patterns: tuple[TensorPattern, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for pattern in patterns:
        for name in pattern.names():
            yield name, pattern.dtypes[0], pattern.shape


def test_the_listing_reproduces_the_published_totals(listed: Listed) -> None:
    assert len(listed) == TENSORS
    assert sum(math.prod(shape) for _, shape in listed.values()) == ELEMENTS
    assert sum(math.prod(shape) * BYTES_OF[dtype] for dtype, shape in listed.values()) == BYTES


def test_patterns_are_exactly_the_official_tensors(patterns: tuple[TensorPattern, ...], listed: Listed) -> None:
    found = {name: (dtype, shape) for name, dtype, shape in members(patterns)}
    assert sorted(found.keys() ^ listed.keys())[:5] == []
    assert {name: (found[name], listed[name]) for name in found if found[name] != listed[name]} == {}


def test_no_tensor_belongs_to_two_patterns(patterns: tuple[TensorPattern, ...]) -> None:
    assert sum(1 for _ in members(patterns)) == TENSORS


def test_every_tensor_has_the_component_that_uses_it(patterns: tuple[TensorPattern, ...]) -> None:
    def component_of(name: str) -> str:
        if name.startswith(("vision_tower.", "mm_projector.")):
            return "vision"
        if ".layers." in name:
            return "dense_layer" if ".layers.0." in name else "moe_layer"
        return "embed" if "embed_tokens" in name else "head"

    for pattern in patterns:
        assert {component_of(name) for name in pattern.names()} == {pattern.component}, pattern.name


def test_only_weight_shape_may_have_another_dtype(patterns: tuple[TensorPattern, ...]) -> None:
    # The checkpoint has int32, the compressed-tensors library writes int64: accept both.
    for pattern in patterns:
        if pattern.name.endswith(".weight_shape"):
            assert pattern.dtypes == ("I32", "I64")
        else:
            assert len(pattern.dtypes) == 1, pattern.name


def test_index_is_filled_in_and_experts_stay(patterns: tuple[TensorPattern, ...]) -> None:
    by_name = {pattern.name: pattern for pattern in patterns}
    expert = by_name["language_model.model.layers.{layer}.mlp.experts.{expert}.up_proj.weight_scale"]
    assert expert.for_index(7) == "language_model.model.layers.7.mlp.experts.{expert}.up_proj.weight_scale"
    assert (expert.index_symbol, list(expert.indices), expert.experts) == ("layer", list(range(1, 61)), 384)
    block = by_name["vision_tower.encoder.blocks.{block}.wo.bias"]
    assert block.for_index(26) == "vision_tower.encoder.blocks.26.wo.bias"
    assert (block.index_symbol, list(block.indices), block.experts) == ("block", list(range(27)), 0)
    assert by_name["language_model.lm_head.weight"].index_symbol == ""


def test_names_of_a_model_without_vision(config: ModelConfig, listed: Listed) -> None:
    found = {name for name, _, _ in members(tensor_patterns(replace(config, vision=None)))}
    assert found == {name for name in listed if name.startswith("language_model.")}


@pytest.mark.parametrize(("first", "absent"), [(0, "layers.0.mlp.up_proj.weight"), (61, "layers.60.mlp.gate.weight")])
def test_models_of_one_kind_of_layer(config: ModelConfig, first: int, absent: str) -> None:
    text = replace(config.text, first_k_dense_replace=first)
    found = tensor_patterns(replace(config, text=text))
    names = {name for name, _, _ in members(found)}
    assert f"language_model.model.{absent}" not in names
    assert "language_model.model.layers.0.self_attn.o_proj.weight" in names
    assert "language_model.model.layers.60.self_attn.o_proj.weight" in names
    assert all("{layer}" not in name and "{expert}" not in name for name in names)
    assert {pattern.component for pattern in found} & {"dense_layer", "moe_layer"} == {
        "moe_layer" if first == 0 else "dense_layer"
    }


def test_shared_experts_widen_with_their_number(config: ModelConfig) -> None:
    text = replace(config.text, n_shared_experts=3)
    shapes = {pattern.name: pattern.shape for pattern in tensor_patterns(replace(config, text=text))}
    prefix = "language_model.model.layers.{layer}.mlp.shared_experts"
    assert shapes[f"{prefix}.gate_proj.weight"] == (3 * 2048, 7168)
    assert shapes[f"{prefix}.down_proj.weight"] == (7168, 3 * 2048)


def test_widths_of_heads_are_not_mixed_up(config: ModelConfig) -> None:
    sizes = {"num_attention_heads": 5, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 28}
    text = replace(config.text, **sizes, kv_lora_rank=20, q_lora_rank=36, hidden_size=96)
    shapes = {
        pattern.name.rpartition("{layer}.")[2]: pattern.shape for pattern in tensor_patterns(replace(config, text=text))
    }
    assert shapes["self_attn.q_b_proj.weight"] == (5 * (12 + 6), 36)
    assert shapes["self_attn.kv_b_proj.weight"] == (5 * (12 + 28), 20)
    assert shapes["self_attn.kv_a_proj_with_mqa.weight"] == (20 + 6, 96)
    assert shapes["self_attn.o_proj.weight"] == (96, 5 * 28)


@pytest.fixture(scope="module")
def inspection(config: ModelConfig, patterns: tuple[TensorPattern, ...]) -> Inspection:
    empty = Checkpoint(folder=Path("official"), config=config, shards=(), shard_of={}, patterns=patterns, problems=())
    return inspection_of_checkpoint(empty)


def test_inspection_counts_tensors_and_bytes_of_every_kind(inspection: Inspection, listed: Listed) -> None:
    assert sum(kind.tensors for kind in inspection.kinds) == TENSORS
    assert sum(kind.bytes for kind in inspection.kinds) == BYTES
    by_name = {kind.name: kind for kind in inspection.kinds}

    def bytes_of(*parts: str) -> int:
        chosen = [entry for name, entry in listed.items() if any(part in name for part in parts)]
        return sum(math.prod(shape) * BYTES_OF[dtype] for dtype, shape in chosen)

    assert by_name["routed experts (INT4 words)"].bytes == bytes_of(".weight_packed")
    assert by_name["routed experts (scales)"].bytes == bytes_of(".weight_scale")
    assert by_name["routed experts (shapes)"].bytes == bytes_of(".weight_shape")
    assert by_name["vision"].bytes == bytes_of("vision_tower.", "mm_projector.")
    # Published: codes 472.5 GiB, scales 59.06 GiB.
    assert by_name["routed experts (INT4 words)"].bytes / 2**30 == pytest.approx(472.5, abs=0.05)
    assert by_name["routed experts (scales)"].bytes / 2**30 == pytest.approx(59.06, abs=0.005)


def test_inspection_counts_the_published_parameters(inspection: Inspection, listed: Listed) -> None:
    def parameters(*parts: str) -> int:
        total = 0
        for name, (_, shape) in listed.items():
            if name.endswith(("weight_scale", "weight_shape")) or not any(part in name for part in parts):
                continue
            total += math.prod(shape) * (8 if name.endswith("weight_packed") else 1)
        return total

    by_name = {kind.name: kind.parameters for kind in inspection.kinds}
    assert by_name["routed experts (INT4 words)"] == parameters(".experts.") == 60 * 384 * 3 * 2048 * 7168
    assert by_name["routed experts (scales)"] == by_name["routed experts (shapes)"] == 0
    assert by_name["vision"] == parameters("vision_tower.", "mm_projector.")
    assert inspection.parameters_total == parameters("")
    # Published, in billions: routed 1,014.69; other text 11.72; vision 0.4169 + 0.0543; all 1,026.88.
    assert round(by_name["routed experts (INT4 words)"] / 1e9, 2) == 1014.69
    assert round((parameters("language_model.") - parameters(".experts.")) / 1e9, 2) == 11.72
    assert round(parameters("vision_tower.") / 1e6, 1) == 416.9
    assert round(parameters("mm_projector.") / 1e6, 1) == 54.3
    assert round(inspection.parameters_total / 1e9, 2) == 1026.88


def test_inspection_counts_the_published_active_parameters(inspection: Inspection) -> None:
    # Published: 31.69 billion with lm_head and without the embedding table, 32.86 with it.
    assert round(inspection.parameters_active / 1e9, 2) == 31.69
    assert round((inspection.parameters_active + 163840 * 7168) / 1e9, 2) == 32.86
