"""The sizes of the demo checkpoints: one entry a preset, keys as in the official `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from k25_export.demo.special_tokens import SPECIAL_ID_COUNT
from k25_plugins.errors import InputError, mismatch

SMALLEST_VOCABULARY = 256 + SPECIAL_ID_COUNT


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What differs between demo checkpoints; everything else is as in the official configuration.

    `text` holds sizes of `text_config`, `vision` sizes of `vision_config`. `words` are what the tokenizer is made from
    (None: those of `training_words`). `is_sparse`: headers are real, data are holes in the files, which read as zeros
    and take no room. `is_trained`: the text weights are those of `k25_export.demo.trained`, and no size can be changed.
    """

    text: Mapping[str, int]
    vision: Mapping[str, int]
    words: Mapping[bytes, int] | None = None
    is_sparse: bool = False
    is_trained: bool = False


# Deliberately awkward: no two sizes are equal by accident, and few are powers of two.
_TINY = Preset(
    text={
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "intermediate_size": 160,
        "moe_intermediate_size": 96,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "num_attention_heads": 6,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "max_position_embeddings": 262144,
    },
    vision={
        "init_pos_emb_height": 10,
        "init_pos_emb_width": 14,
        "init_pos_emb_time": 4,
        "vt_hidden_size": 36,
        "vt_num_hidden_layers": 2,
        "vt_num_attention_heads": 3,
        "vt_intermediate_size": 56,
    },
)

# 486 million text parameters: large enough to time, small enough for any machine.
_SMALL = Preset(
    text={
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "first_k_dense_replace": 1,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "num_attention_heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 262144,
    },
    vision={
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "init_pos_emb_time": 4,
        "vt_hidden_size": 192,
        "vt_num_hidden_layers": 4,
        "vt_num_attention_heads": 4,
        "vt_intermediate_size": 720,
    },
)

# The official sizes: 1.03 T parameters, 595 GB.
_FULL_SPARSE = Preset(
    text={
        "vocab_size": 163840,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 1,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 262144,
    },
    vision={
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "init_pos_emb_time": 4,
        "vt_hidden_size": 1152,
        "vt_num_hidden_layers": 27,
        "vt_num_attention_heads": 16,
        "vt_intermediate_size": 4304,
    },
    is_sparse=True,
)

# Large enough for the tasks of `k25_export.demo.tasks`, small enough to ship. Every byte that a task uses is a token;
# the names of the chat template's roles are one each. The vision tower is that of `tiny`, with random weights.
_TRAINED = Preset(
    text={
        "vocab_size": 527,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "max_position_embeddings": 262144,
    },
    vision=_TINY.vision,
    words={b"user": 1, b"assistant": 1, b"system": 1},
    is_trained=True,
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": _TINY,
        "small": _SMALL,
        "full-sparse": _FULL_SPARSE,
        "trained": _TRAINED,
    }
)


def preset_with_overrides(name: str, overrides: Mapping[str, int] | None = None) -> Preset:
    """The preset of this name, with text sizes replaced by key.

    Raises `InputError` for a preset that does not exist, for a key that is no size of `text_config` and for any key of
    a trained preset. Whether the sizes fit together is judged where the configuration is read (`k25_export.config`).
    """
    if name not in PRESETS:
        raise mismatch("demo preset", expected=" or ".join(PRESETS), found=repr(name))
    preset = PRESETS[name]
    unknown = sorted(set(overrides or {}) - set(preset.text))
    if unknown:
        raise InputError(f"demo overrides: expected keys among {', '.join(preset.text)}; found {', '.join(unknown)}")
    if overrides and preset.is_trained:
        raise mismatch(
            f"demo overrides: preset {name}", expected="none, the weights have its sizes", found=", ".join(overrides)
        )
    text = {**preset.text, **(overrides or {})}
    if text["vocab_size"] < SMALLEST_VOCABULARY:
        raise mismatch(
            "demo overrides: vocab_size",
            expected=f"at least {SMALLEST_VOCABULARY} (256 bytes and {SPECIAL_ID_COUNT} special ids)",
            found=text["vocab_size"],
        )
    return replace(preset, text=text)
