"""The model's configuration: what the official `config.json` says, as frozen dataclasses.

`model_config_from_dict` reads the official keys, in the places where releases have put them, and refuses every
value that this project does not compute. Keys that do not change the mathematics are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k25_plugins.errors import InputError, mismatch

MODEL_TYPE = "kimi_k25"
TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
GROUP_SIZE = 32
DEFAULT_LATENT_NORM_EPS = 1e-6

# Far beyond any model, and small enough that no table built from a configuration exhausts memory.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_NUMBER = 1e30


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN rotary scaling (arXiv 2309.00071), as DeepSeek-V3 parametrises it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The language model. Names are those of the official `text_config`.

    `latent_norm_eps` is the epsilon of `q_a_layernorm` and `kv_a_layernorm`. It is in no official file: the
    Hugging Face code uses 1e-6, SGLang uses `rms_norm_eps`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    latent_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnConfig
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    @property
    def dense_layers(self) -> range:
        """Layers with a dense MLP."""
        return range(min(self.first_k_dense_replace, self.num_hidden_layers))

    @property
    def moe_layers(self) -> range:
        """Layers with routed experts."""
        return range(len(self.dense_layers), self.num_hidden_layers)

    @property
    def cache_dim(self) -> int:
        """Width of a row of the latent cache: the normed latent, then the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """MoonViT-3D and its projector. Names are those of the official `vision_config`."""

    patch_size: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    init_pos_emb_time: int
    vt_hidden_size: int
    vt_num_hidden_layers: int
    vt_num_attention_heads: int
    vt_intermediate_size: int
    merge_kernel_size: tuple[int, int]
    mm_hidden_size: int
    projector_ln_eps: float
    text_hidden_size: int


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Routed experts: compressed-tensors `pack-quantized`, symmetric INT4, one bf16 scale a group."""

    format: str
    num_bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the export needs to know of the model."""

    text: TextConfig
    vision: VisionConfig | None
    quantization: QuantizationConfig
    media_placeholder_token_id: int | None


class _Section:
    """One JSON object of the configuration, read key by key with errors that name the key."""

    def __init__(self, name: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise mismatch(f"config.json: {name}", expected="an object", found=_shown(values))
        self.name = name
        self.values = values

    def where(self, key: str) -> str:
        return f"config.json: {self.name}.{key}" if self.name else f"config.json: {key}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def integer(self, key: str, *, minimum: int = 1, maximum: int = MAX_SIZE, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise mismatch(self.where(key), expected=f"an integer in {minimum}..{maximum}", found=_shown(value))
        return value

    def number(self, key: str, *, above: float = 0.0, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < MAX_NUMBER:
            raise mismatch(self.where(key), expected=f"a finite number > {above:g}", found=_shown(value))
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise mismatch(self.where(key), expected="true or false", found=_shown(value))
        return value

    def require(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Refuse a value that changes the mathematics into something this project does not compute."""
        value = self.values.get(key, default)
        if value not in allowed:
            wanted = " or ".join(_shown(item) for item in allowed)
            raise mismatch(
                self.where(key),
                expected=wanted,
                found=_shown(value),
                hint="Only Kimi K2.5's own choice is supported.",
            )


def _shown(value: Any) -> str:
    try:
        text = "nothing" if value is None else repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def model_config_from_dict(
    values: Mapping[str, Any], *, latent_norm_eps: float = DEFAULT_LATENT_NORM_EPS
) -> ModelConfig:
    """The configuration from the parsed `config.json`; `InputError` names the key that does not fit."""
    if not 0 < latent_norm_eps < 1:
        raise mismatch("latent_norm_eps", expected="a number in 0..1", found=latent_norm_eps)
    top = _Section("", values)
    if top.get("model_type") != MODEL_TYPE:
        raise mismatch(
            "config.json: model_type",
            expected=repr(MODEL_TYPE),
            found=_shown(top.get("model_type")),
            hint="This exporter supports the Kimi K2.5 architecture only.",
        )
    top.require("tie_word_embeddings", False, None)
    text_section = _Section("text_config", top.get("text_config"))
    text = _text_config(text_section, latent_norm_eps=latent_norm_eps)
    vision = None
    if top.get("vision_config") is not None:
        vision = _vision_config(_Section("vision_config", top.get("vision_config")), text)
    placeholder = top.get("media_placeholder_token_id")
    if placeholder is not None and top.integer("media_placeholder_token_id", minimum=0) >= text.vocab_size:
        raise mismatch(
            "config.json: media_placeholder_token_id",
            expected=f"an id below vocab_size {text.vocab_size}",
            found=placeholder,
        )
    return ModelConfig(
        text=text,
        vision=vision,
        quantization=_quantization_config(top, text_section),
        media_placeholder_token_id=placeholder,
    )


def _text_config(section: _Section, *, latent_norm_eps: float) -> TextConfig:
    section.require("model_type", *TEXT_MODEL_TYPES)
    section.require("hidden_act", "silu")
    section.require("scoring_func", "sigmoid", default="sigmoid")
    section.require("topk_method", "noaux_tc", default="noaux_tc")
    section.require("n_group", 1, default=1)
    section.require("topk_group", 1, default=1)
    section.require("moe_layer_freq", 1, default=1)
    section.require("attention_bias", False, default=False)
    section.require("tie_word_embeddings", False, default=False)
    section.require("num_nextn_predict_layers", 0, None)
    heads = section.integer("num_attention_heads")
    section.require("num_key_value_heads", heads, None)
    # transformers 5 writes the rotary settings as `rope_parameters`, with the base inside.
    rope_key = "rope_scaling" if section.get("rope_scaling") is not None else "rope_parameters"
    rope = _Section(f"text_config.{rope_key}", section.get(rope_key))
    theta_owner = section if section.get("rope_theta") is not None else rope
    config = TextConfig(
        vocab_size=section.integer("vocab_size"),
        hidden_size=section.integer("hidden_size"),
        num_hidden_layers=section.integer("num_hidden_layers", maximum=MAX_LAYERS),
        first_k_dense_replace=section.integer("first_k_dense_replace", minimum=0, default=0),
        intermediate_size=section.integer("intermediate_size"),
        moe_intermediate_size=section.integer("moe_intermediate_size"),
        n_routed_experts=section.integer("n_routed_experts", maximum=MAX_EXPERTS),
        num_experts_per_tok=section.integer("num_experts_per_tok"),
        n_shared_experts=section.integer("n_shared_experts"),
        norm_topk_prob=section.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=section.number("routed_scaling_factor"),
        num_attention_heads=heads,
        q_lora_rank=section.integer("q_lora_rank"),
        kv_lora_rank=section.integer("kv_lora_rank"),
        qk_nope_head_dim=section.integer("qk_nope_head_dim"),
        qk_rope_head_dim=section.integer("qk_rope_head_dim", minimum=2),
        v_head_dim=section.integer("v_head_dim"),
        rms_norm_eps=section.number("rms_norm_eps"),
        latent_norm_eps=latent_norm_eps,
        max_position_embeddings=section.integer("max_position_embeddings"),
        rope_theta=theta_owner.number("rope_theta", above=1.0),
        rope_scaling=_yarn_config(rope),
        bos_token_id=section.integer("bos_token_id", minimum=0),
        eos_token_id=section.integer("eos_token_id", minimum=0),
        pad_token_id=section.integer("pad_token_id", minimum=0),
    )
    _check_sizes(section, config)
    return config


def _check_sizes(section: _Section, config: TextConfig) -> None:
    for key in ("hidden_size", "moe_intermediate_size"):
        if section.get(key) % GROUP_SIZE:
            raise mismatch(
                section.where(key),
                expected=f"a multiple of the group size {GROUP_SIZE}",
                found=section.get(key),
            )
    if config.num_experts_per_tok > config.n_routed_experts:
        raise mismatch(
            section.where("num_experts_per_tok"),
            expected=f"at most n_routed_experts {config.n_routed_experts}",
            found=config.num_experts_per_tok,
        )
    if config.qk_rope_head_dim % 2:
        raise mismatch(section.where("qk_rope_head_dim"), expected="an even number", found=config.qk_rope_head_dim)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if section.get(key) >= config.vocab_size:
            raise mismatch(
                section.where(key),
                expected=f"an id below vocab_size {config.vocab_size}",
                found=section.get(key),
            )


def _yarn_config(rope: _Section) -> YarnConfig:
    kind = rope.get("type", rope.get("rope_type"))
    if kind != "yarn":
        raise mismatch(f"config.json: {rope.name}.type", expected="'yarn'", found=_shown(kind))
    # transformers' YaRN has two more settings that change the rotation.
    rope.require("truncate", True, None)
    rope.require("attention_factor", None)
    config = YarnConfig(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=rope.number("mscale", default=1.0),
        mscale_all_dim=rope.number("mscale_all_dim"),
    )
    if config.mscale != config.mscale_all_dim:
        raise mismatch(
            rope.where("mscale"),
            expected=f"mscale_all_dim {config.mscale_all_dim} (cos and sin unscaled, as in K2.5)",
            found=config.mscale,
        )
    return config


def _vision_config(section: _Section, text: TextConfig) -> VisionConfig:
    section.require("pos_emb_type", "divided_fixed", default="divided_fixed")
    section.require("merge_type", "sd2_tpool", default="sd2_tpool")
    section.require("mm_projector_type", "patchmerger", default="patchmerger")
    section.require("projector_hidden_act", "gelu", default="gelu")
    merge = section.get("merge_kernel_size", [2, 2])
    if not isinstance(merge, list | tuple) or list(merge) != [2, 2]:
        raise mismatch(section.where("merge_kernel_size"), expected="[2, 2]", found=_shown(merge))
    config = VisionConfig(
        patch_size=section.integer("patch_size"),
        init_pos_emb_height=section.integer("init_pos_emb_height"),
        init_pos_emb_width=section.integer("init_pos_emb_width"),
        init_pos_emb_time=section.integer("init_pos_emb_time"),
        vt_hidden_size=section.integer("vt_hidden_size"),
        vt_num_hidden_layers=section.integer("vt_num_hidden_layers", maximum=MAX_LAYERS),
        vt_num_attention_heads=section.integer("vt_num_attention_heads"),
        vt_intermediate_size=section.integer("vt_intermediate_size"),
        merge_kernel_size=(2, 2),
        mm_hidden_size=section.integer("mm_hidden_size", default=section.integer("vt_hidden_size")),
        projector_ln_eps=section.number("projector_ln_eps", default=1e-5),
        text_hidden_size=section.integer("text_hidden_size", default=text.hidden_size),
    )
    if config.vt_hidden_size % (4 * config.vt_num_attention_heads):
        raise mismatch(
            section.where("vt_hidden_size"),
            expected=f"a multiple of 4 x vt_num_attention_heads {config.vt_num_attention_heads}",
            found=config.vt_hidden_size,
        )
    for key, wanted in (("text_hidden_size", text.hidden_size), ("mm_hidden_size", config.vt_hidden_size)):
        if getattr(config, key) != wanted:
            raise mismatch(section.where(key), expected=wanted, found=getattr(config, key))
    return config


def _quantization_config(top: _Section, text: _Section) -> QuantizationConfig:
    # Official releases nest the block in text_config; dumps through transformers repeat it at the top.
    name, block = next(
        (
            (section.where("quantization_config"), section.get("quantization_config"))
            for section in (text, top)
            if section.get("quantization_config") is not None
        ),
        ("", None),
    )
    if block is None:
        raise InputError(
            "config.json: quantization_config: expected compressed-tensors pack-quantized INT4 experts, found no "
            "quantisation. Checkpoints with bf16 experts are not supported: use the official INT4 release."
        )
    section = _Section(name.removeprefix("config.json: "), block)
    section.require("quant_method", "compressed-tensors")
    section.require("format", "pack-quantized")
    section.require("kv_cache_scheme", None)
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        count = len(groups) if isinstance(groups, Mapping) else 0
        raise mismatch(section.where("config_groups"), expected="one group", found=f"{count} groups")
    group = _Section(f"{section.name}.config_groups.{next(iter(groups))}", next(iter(groups.values())))
    group.require("input_activations", None)
    group.require("output_activations", None)
    weights = _Section(f"{group.name}.weights", group.get("weights"))
    weights.require("type", "int")
    weights.require("num_bits", 4)
    weights.require("symmetric", True)
    weights.require("strategy", "group")
    weights.require("group_size", GROUP_SIZE)
    weights.require("actorder", None, False)
    return QuantizationConfig(format="pack-quantized", num_bits=4, group_size=GROUP_SIZE, symmetric=True)
