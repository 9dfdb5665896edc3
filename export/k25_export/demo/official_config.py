"""`config.json` with the keys of the official Kimi K2.5 release, for the sizes of a demo preset.

Values that are not sizes (rotary scaling, router, quantisation, epsilons) are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k25_export.demo.presets import Preset
from k25_export.demo.special_tokens import BOS, EOS, MEDIA_PAD, PAD, special_id

PATCH_SIZE = 14
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"


def official_config_from_preset(preset: Preset) -> dict[str, Any]:
    """The whole `config.json`, as an object that `json` can write."""
    vocab_size = preset.text["vocab_size"]
    ids = _token_ids(vocab_size)
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_kimi_k25.KimiK25Config",
            "AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
        },
        **ids,
        "dtype": "bfloat16",
        "ignore_index": -100,
        "media_placeholder_token_id": special_id(vocab_size, MEDIA_PAD),
        "model_type": "kimi_k25",
        "text_config": _text_config(preset.text, ids),
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": VIDEO_PLACEHOLDER,
        "vision_config": _vision_config(preset),
    }


def _token_ids(vocab_size: int) -> dict[str, int]:
    return {
        "bos_token_id": special_id(vocab_size, BOS),
        "eos_token_id": special_id(vocab_size, EOS),
        "pad_token_id": special_id(vocab_size, PAD),
    }


def _text_config(sizes: Mapping[str, int], ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        **ids,
        "dtype": "bfloat16",
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "kimi_k2",
        "moe_layer_freq": 1,
        "n_group": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": sizes["num_attention_heads"],
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "quantization_config": _quantization_config(),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        **sizes,
    }


def _quantization_config() -> dict[str, Any]:
    return {
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
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _vision_config(preset: Preset) -> dict[str, Any]:
    return {
        "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool",
        "mm_hidden_size": preset.vision["vt_hidden_size"],
        "mm_projector_type": "patchmerger",
        "patch_size": PATCH_SIZE,
        "pos_emb_type": "divided_fixed",
        "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-05,
        "text_hidden_size": preset.text["hidden_size"],
        "video_attn_type": "spatial_temporal",
        **preset.vision,
    }
