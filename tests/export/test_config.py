"""The configuration: the official values are read from every place where releases put them, anything else is refused.

`OFFICIAL` is written from the public description of Kimi K2.5's `config.json`, not from our code.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from k25_export.config import DEFAULT_LATENT_NORM_EPS, ModelConfig, model_config_from_dict
from k25_plugins.errors import InputError

QUANTIZATION: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
ROPE = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
TEXT = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 163840,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": ROPE,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "pad_token_id": 163839,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "pretraining_tp": 1,
    "quantization_config": QUANTIZATION,
}
VISION = {
    "patch_size": 14,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed",
    "vt_hidden_size": 1152,
    "vt_num_hidden_layers": 27,
    "vt_num_attention_heads": 16,
    "vt_intermediate_size": 4304,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "video_attn_type": "spatial_temporal",
    "mm_projector_type": "patchmerger",
    "mm_hidden_size": 1152,
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
    "text_hidden_size": 7168,
    "_attn_implementation": "flash_attention_2",
}
OFFICIAL = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
    "model_type": "kimi_k25",
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "pad_token_id": 163839,
    "media_placeholder_token_id": 163605,
    "ignore_index": -100,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "text_config": TEXT,
    "vision_config": VISION,
}
MISSING = object()


def changed(path: str, value: Any, base: Mapping[str, Any] = OFFICIAL) -> dict[str, Any]:
    """The official configuration with one dotted key replaced, added or (MISSING) removed."""
    values = copy.deepcopy(dict(base))
    *parents, key = path.split(".")
    owner = values
    for parent in parents:
        owner = owner[parent]
    if value is MISSING:
        del owner[key]
    else:
        owner[key] = value
    return values


def refusal(path: str, value: Any, base: Mapping[str, Any] = OFFICIAL) -> str:
    with pytest.raises(InputError) as caught:
        model_config_from_dict(changed(path, value, base))
    return str(caught.value)


def test_official_configuration() -> None:
    config = model_config_from_dict(OFFICIAL)
    text = config.text
    for item in fields(text):
        if item.name not in ("latent_norm_eps", "rope_scaling"):
            assert getattr(text, item.name) == TEXT[item.name], item.name
    for item in fields(text.rope_scaling):
        assert getattr(text.rope_scaling, item.name) == ROPE[item.name], item.name
    assert config.vision is not None
    for item in fields(config.vision):
        assert getattr(config.vision, item.name) == (
            (2, 2) if item.name == "merge_kernel_size" else VISION[item.name]
        ), item.name
    quantization = config.quantization
    assert (quantization.format, quantization.num_bits, quantization.group_size) == ("pack-quantized", 4, 32)
    assert quantization.symmetric is True
    assert config.media_placeholder_token_id == 163605


def test_derived_values() -> None:
    text = model_config_from_dict(OFFICIAL).text
    assert list(text.dense_layers) == [0]
    assert list(text.moe_layers) == list(range(1, 61))
    assert text.cache_dim == 576


@pytest.mark.parametrize(
    ("first", "dense", "moe"), [(0, [], [0, 1, 2]), (2, [0, 1], [2]), (3, [0, 1, 2], []), (9, [0, 1, 2], [])]
)
def test_layers_are_dense_first(first: int, dense: list[int], moe: list[int]) -> None:
    values = changed("text_config.num_hidden_layers", 3)
    text = model_config_from_dict(changed("text_config.first_k_dense_replace", first, values)).text
    assert (list(text.dense_layers), list(text.moe_layers)) == (dense, moe)


def test_epsilon_of_the_latent_norms_is_a_parameter() -> None:
    assert DEFAULT_LATENT_NORM_EPS == 1e-6
    assert model_config_from_dict(OFFICIAL).text.latent_norm_eps == 1e-6
    assert model_config_from_dict(OFFICIAL, latent_norm_eps=1e-5).text.latent_norm_eps == 1e-5
    assert model_config_from_dict(OFFICIAL, latent_norm_eps=1e-5).text.rms_norm_eps == 1e-5


def test_configuration_cannot_be_changed() -> None:
    config = model_config_from_dict(OFFICIAL)
    with pytest.raises(FrozenInstanceError):
        config.text.hidden_size = 1  # type: ignore[misc]


def same_as_official(values: Mapping[str, Any]) -> bool:
    found: ModelConfig = model_config_from_dict(values)
    return found == model_config_from_dict(OFFICIAL)


def test_quantization_is_found_in_every_place() -> None:
    top_only = changed("text_config.quantization_config", MISSING)
    top_only["quantization_config"] = QUANTIZATION
    assert same_as_official(top_only)
    assert same_as_official({**OFFICIAL, "quantization_config": QUANTIZATION})
    assert same_as_official({**changed("text_config.quantization_config", None), "quantization_config": QUANTIZATION})
    assert same_as_official({**OFFICIAL, "quantization_config": None})


def test_rope_is_found_as_transformers_5_writes_it() -> None:
    values = changed("text_config.rope_scaling", MISSING)
    del values["text_config"]["rope_theta"]
    parameters = {key: value for key, value in ROPE.items() if key != "type"}
    values["text_config"]["rope_parameters"] = {**parameters, "rope_type": "yarn", "rope_theta": 50000.0}
    assert same_as_official(values)
    # Dumps may keep the base outside, or write the old key as null.
    values["text_config"]["rope_parameters"].pop("rope_theta")
    values["text_config"] |= {"rope_theta": 50000.0, "rope_scaling": None}
    assert same_as_official(values)


def test_text_model_type_of_a_dump_is_accepted() -> None:
    assert same_as_official(changed("text_config.model_type", "deepseek_v3"))


@pytest.mark.parametrize(
    "path",
    [
        "text_config.num_key_value_heads",
        "text_config.num_nextn_predict_layers",
        "text_config.attention_bias",
        "text_config.tie_word_embeddings",
        "text_config.scoring_func",
        "text_config.topk_method",
        "text_config.n_group",
        "text_config.topk_group",
        "text_config.moe_layer_freq",
        "tie_word_embeddings",
        "vision_config.mm_hidden_size",
        "vision_config.text_hidden_size",
        "vision_config.projector_ln_eps",
        "text_config.aux_loss_alpha",
        "dtype",
    ],
)
def test_keys_with_one_meaning_may_be_left_out(path: str) -> None:
    assert same_as_official(changed(path, MISSING))


def test_unknown_keys_are_ignored() -> None:
    assert same_as_official({**OFFICIAL, "something_new": {"a": 1}})
    assert same_as_official(changed("text_config.something_new", [1, 2]))


def test_integers_may_be_written_where_numbers_are_expected() -> None:
    config = model_config_from_dict(changed("text_config.rope_theta", 50000))
    assert config.text.rope_theta == 50000.0
    assert type(config.text.rope_theta) is float


def test_text_only_checkpoint() -> None:
    for value in (None, MISSING):
        assert model_config_from_dict(changed("vision_config", value)).vision is None
    assert model_config_from_dict(changed("media_placeholder_token_id", None)).media_placeholder_token_id is None


GROUP = "text_config.quantization_config.config_groups.group_0"
OTHER_MODELS = [
    ("model_type", MISSING),
    ("model_type", "kimi_k2"),
    ("model_type", "deepseek_v3"),
    ("model_type", "llama"),
    ("model_type", 5),
    ("text_config", MISSING),
    ("text_config", []),
    ("text_config.model_type", MISSING),
    ("text_config.model_type", "llama"),
    ("text_config.model_type", "kimi_k25"),
    ("tie_word_embeddings", True),
    ("text_config.tie_word_embeddings", True),
    ("text_config.hidden_act", "gelu"),
    ("text_config.hidden_act", MISSING),
    ("text_config.scoring_func", "softmax"),
    ("text_config.topk_method", "greedy"),
    ("text_config.n_group", 8),
    ("text_config.topk_group", 4),
    ("text_config.moe_layer_freq", 2),
    ("text_config.attention_bias", True),
    ("text_config.num_nextn_predict_layers", 1),
    ("text_config.num_key_value_heads", 8),
    ("vision_config", "moonvit"),
    ("vision_config.pos_emb_type", "learned"),
    ("vision_config.merge_type", "avg"),
    ("vision_config.mm_projector_type", "mlp"),
    ("vision_config.projector_hidden_act", "silu"),
    ("vision_config.merge_kernel_size", [4, 4]),
    ("vision_config.merge_kernel_size", 2),
    ("vision_config.mm_hidden_size", 1024),
    ("vision_config.text_hidden_size", 4096),
    ("vision_config.vt_hidden_size", 1150),
]
OTHER_QUANTIZATIONS = [
    ("text_config.quantization_config", MISSING),
    ("text_config.quantization_config", None),
    ("text_config.quantization_config", "int4"),
    ("text_config.quantization_config.quant_method", "gptq"),
    ("text_config.quantization_config.quant_method", MISSING),
    ("text_config.quantization_config.format", "int-quantized"),
    ("text_config.quantization_config.format", "nvfp4-pack-quantized"),
    ("text_config.quantization_config.format", "float-quantized"),
    ("text_config.quantization_config.kv_cache_scheme", {"num_bits": 8, "type": "float"}),
    ("text_config.quantization_config.config_groups", {}),
    ("text_config.quantization_config.config_groups", MISSING),
    ("text_config.quantization_config.config_groups", []),
    (f"{GROUP}.input_activations", {"num_bits": 8, "type": "int"}),
    (f"{GROUP}.output_activations", {"num_bits": 8, "type": "int"}),
    (f"{GROUP}.weights", None),
    (f"{GROUP}.weights.type", "float"),
    (f"{GROUP}.weights.num_bits", 8),
    (f"{GROUP}.weights.num_bits", MISSING),
    (f"{GROUP}.weights.symmetric", False),
    (f"{GROUP}.weights.strategy", "channel"),
    (f"{GROUP}.weights.group_size", 128),
    (f"{GROUP}.weights.group_size", 64),
    (f"{GROUP}.weights.group_size", None),
    (f"{GROUP}.weights.actorder", "group"),
]
OTHER_ROPES = [
    ("text_config.rope_scaling", MISSING),
    ("text_config.rope_scaling", None),
    ("text_config.rope_scaling", []),
    ("text_config.rope_scaling.type", "linear"),
    ("text_config.rope_scaling.type", "llama3"),
    ("text_config.rope_scaling.type", "dynamic"),
    ("text_config.rope_scaling.type", MISSING),
    ("text_config.rope_scaling.factor", MISSING),
    ("text_config.rope_scaling.mscale", 0.707),
    ("text_config.rope_scaling.mscale_all_dim", MISSING),
    ("text_config.rope_scaling.original_max_position_embeddings", MISSING),
    ("text_config.rope_scaling.original_max_position_embeddings", 0.5),
    ("text_config.rope_theta", MISSING),
]


def key_of(path: str) -> str:
    return {"text_config.rope_scaling": "rope"}.get(path, path.rpartition(".")[2])


@pytest.mark.parametrize(("path", "value"), OTHER_MODELS + OTHER_QUANTIZATIONS + OTHER_ROPES)
def test_what_this_project_does_not_compute_is_refused(path: str, value: Any) -> None:
    # A disagreement of two keys may name either of them.
    partner = {"mscale_all_dim": "mscale", "vt_hidden_size": "mm_hidden_size"}
    message = refusal(path, value)
    key = key_of(path)
    assert message.startswith("config.json: ")
    assert key in message or partner.get(key, key) in message, message
    assert "expected" in message
    assert "found" in message


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": {}}, "ignore": []},
    ],
    ids=["FP8", "NVFP4"],
)
def test_other_releases_are_refused(block: dict[str, Any]) -> None:
    message = refusal("text_config.quantization_config", block)
    assert "quantization_config.quant_method" in message
    assert "compressed-tensors" in message
    assert repr(block["quant_method"]) in message


def test_two_quantization_groups_are_refused() -> None:
    group = QUANTIZATION["config_groups"]["group_0"]
    message = refusal("text_config.quantization_config.config_groups", {"group_0": group, "group_1": group})
    assert "config_groups" in message
    assert "2" in message


def test_bfloat16_experts_are_refused_with_what_to_do() -> None:
    message = refusal("text_config.quantization_config", MISSING)
    assert "INT4" in message
    assert "quantization_config" in message


def test_the_place_of_the_quantization_is_named() -> None:
    top = changed("text_config.quantization_config", MISSING)
    top["quantization_config"] = copy.deepcopy(QUANTIZATION)
    top["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    with pytest.raises(
        InputError, match=r"config\.json: quantization_config\.config_groups\.group_0\.weights\.group_size"
    ):
        model_config_from_dict(top)
    assert f"config.json: {GROUP}.weights.group_size" in refusal(f"{GROUP}.weights.group_size", 128)


INTEGERS = [
    *(
        f"text_config.{item}"
        for item in TEXT
        if type(TEXT[item]) is int
        and item
        not in (
            "moe_layer_freq",
            "n_group",
            "topk_group",
            "num_nextn_predict_layers",
            "num_key_value_heads",
            "ep_size",
            "pretraining_tp",
        )
    ),
    *(f"vision_config.{item}" for item in VISION if type(VISION[item]) is int),
    "text_config.rope_scaling.original_max_position_embeddings",
    "media_placeholder_token_id",
]
NUMBERS = [
    "text_config.rms_norm_eps",
    "text_config.routed_scaling_factor",
    "text_config.rope_theta",
    "text_config.rope_scaling.factor",
    "text_config.rope_scaling.beta_fast",
    "text_config.rope_scaling.beta_slow",
    "text_config.rope_scaling.mscale",
    "text_config.rope_scaling.mscale_all_dim",
    "vision_config.projector_ln_eps",
]  # fmt: skip


@pytest.mark.parametrize("path", INTEGERS)
@pytest.mark.parametrize("value", ["64", 64.0, True, -1, [64], {}])
def test_integers_of_another_type_are_refused(path: str, value: Any) -> None:
    message = refusal(path, value)
    assert f"config.json: {path}" in message
    assert repr(value) in message


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", ["1.0", True, 0, -1.0, math.nan, math.inf, [1.0]])
def test_numbers_of_another_type_or_not_finite_are_refused(path: str, value: Any) -> None:
    message = refusal(path, value)
    assert f"config.json: {path}" in message


def test_numbers_beyond_double_precision_are_refused() -> None:
    # JSON allows an integer of 400 digits, and Python parses it as one.
    huge = json.loads("1" + "0" * 400)
    for path in NUMBERS:
        assert f"config.json: {path}" in refusal(path, huge)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.rope_theta", 1.0),  # its logarithm is divided by
        ("text_config.rope_scaling.original_max_position_embeddings", 10**400),
        ("text_config.num_hidden_layers", 10**9),  # the names of their tensors fill any memory
        ("text_config.n_routed_experts", 10**9),
        ("vision_config.vt_num_hidden_layers", 10**9),
    ],
    ids=["theta", "context", "layers", "experts", "blocks"],
)
def test_sizes_that_nobody_can_compute_are_refused(path: str, value: float) -> None:
    assert f"config.json: {path}" in refusal(path, value)


@pytest.mark.parametrize(("key", "value"), [("truncate", False), ("attention_factor", 3.0)])
def test_keys_that_change_yarn_are_refused(key: str, value: Any) -> None:
    # transformers rounds the corners unless `truncate` is false, and scales cos and sin by `attention_factor`.
    assert key in refusal(f"text_config.rope_scaling.{key}", value)


def test_flags_of_another_type_are_refused() -> None:
    for value in (1, "true", None):
        assert "config.json: text_config.norm_topk_prob" in refusal("text_config.norm_topk_prob", value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.hidden_size", 7168 + 16),
        ("text_config.moe_intermediate_size", 2048 + 8),
        ("text_config.num_experts_per_tok", 385),
        ("text_config.qk_rope_head_dim", 63),
        ("text_config.bos_token_id", 163840),
        ("text_config.eos_token_id", 163840),
        ("text_config.pad_token_id", 200000),
        ("media_placeholder_token_id", 163840),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(path: str, value: int) -> None:
    message = refusal(path, value)
    assert f"config.json: {path}" in message
    assert str(value) in message


def test_the_highest_ids_and_the_smallest_sizes_are_accepted() -> None:
    for path, value in {
        "text_config.bos_token_id": 163839,
        "text_config.eos_token_id": 0,
        "media_placeholder_token_id": 163839,
        "text_config.num_experts_per_tok": 384,
        "text_config.qk_rope_head_dim": 2,
        "text_config.first_k_dense_replace": 0,
    }.items():
        model_config_from_dict(changed(path, value))


def test_messages_stay_short() -> None:
    message = refusal("model_type", "x" * 100_000)
    assert len(message) < 300
