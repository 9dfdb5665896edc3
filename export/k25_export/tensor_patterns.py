"""Every tensor of an official Kimi K2.5 checkpoint: name, dtype, shape and the component that uses it.

One table serves the intake (is everything there?), the bindings (which tensor feeds which input?) and the
demo checkpoint (what must be written?). A pattern's name may hold `{layer}`, `{block}` and `{expert}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from k25_export.config import ModelConfig, TextConfig, VisionConfig

Component = Literal["embed", "dense_layer", "moe_layer", "head", "vision"]

TEXT_PREFIX = "language_model."
LAYER_PREFIX = "language_model.model.layers.{layer}."
EXPERT_PREFIX = LAYER_PREFIX + "mlp.experts.{expert}."
BLOCK_PREFIX = "vision_tower.encoder.blocks.{block}."
POSITION_TABLE = "vision_tower.patch_embed.pos_emb.weight"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TensorPattern:
    """A family of tensors of one dtype and shape.

    `dtypes` are safetensors names, the official one first. `indices` are the values of `{layer}` or `{block}`
    (empty when the name has neither), `experts` the number of experts (0: no `{expert}` in the name).
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    component: Component
    indices: Sequence[int] = ()
    experts: int = 0

    @property
    def index_symbol(self) -> str:
        """`layer`, `block` or an empty string."""
        return next((symbol for symbol in ("layer", "block") if f"{{{symbol}}}" in self.name), "")

    def for_index(self, index: int) -> str:
        """The name with `{layer}` or `{block}` filled in; `{expert}` stays."""
        return self.name.replace("{layer}", str(index)).replace("{block}", str(index))

    def families(self) -> Iterator[list[str]]:
        """The names for each `{layer}` or `{block}`: one name, or one for each expert in order."""
        for stem in [self.for_index(index) for index in self.indices] or [self.name]:
            if self.experts:
                prefix, suffix = stem.split("{expert}")
                yield [f"{prefix}{expert}{suffix}" for expert in range(self.experts)]
            else:
                yield [stem]

    def names(self) -> Iterator[str]:
        """Every tensor name of the pattern."""
        for family in self.families():
            yield from family


def tensor_patterns(config: ModelConfig) -> tuple[TensorPattern, ...]:
    """All tensors that a checkpoint with this configuration must hold, and no others."""
    patterns = list(_text_patterns(config.text, config.quantization.group_size))
    if config.vision is not None:
        patterns += _vision_patterns(config.vision)
    return tuple(patterns)


def _text_patterns(config: TextConfig, group_size: int) -> Iterator[TensorPattern]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    table = (config.vocab_size, hidden)

    def weight(
        name: str, *shape: int, component: Component, indices: Sequence[int] = (), dtype: str = "BF16"
    ) -> TensorPattern:
        return TensorPattern(name=name, dtypes=(dtype,), shape=shape, component=component, indices=indices)

    yield weight(TEXT_PREFIX + "model.embed_tokens.weight", *table, component="embed")
    yield weight(TEXT_PREFIX + "model.norm.weight", hidden, component="head")
    yield weight(TEXT_PREFIX + "lm_head.weight", *table, component="head")
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (config.q_lora_rank, hidden),
        "self_attn.q_a_layernorm": (config.q_lora_rank,),
        "self_attn.q_b_proj": (
            heads * (config.qk_nope_head_dim + config.qk_rope_head_dim),
            config.q_lora_rank,
        ),
        "self_attn.kv_a_proj_with_mqa": (config.cache_dim, hidden),
        "self_attn.kv_a_layernorm": (config.kv_lora_rank,),
        "self_attn.kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "self_attn.o_proj": (hidden, heads * config.v_head_dim),
    }
    dense_shapes = layer_shapes | _mlp_shapes("mlp.", hidden, config.intermediate_size)
    shared_width = config.moe_intermediate_size * config.n_shared_experts
    moe_shapes = layer_shapes | _mlp_shapes("mlp.shared_experts.", hidden, shared_width)
    moe_shapes["mlp.gate"] = (config.n_routed_experts, hidden)
    kinds: tuple[tuple[Component, range, dict[str, tuple[int, ...]]], ...] = (
        ("dense_layer", config.dense_layers, dense_shapes),
        ("moe_layer", config.moe_layers, moe_shapes),
    )
    for component, layers, shapes in kinds:
        for module, shape in shapes.items():
            if layers:
                yield weight(f"{LAYER_PREFIX}{module}.weight", *shape, component=component, indices=layers)
    if config.moe_layers:
        yield weight(
            LAYER_PREFIX + "mlp.gate.e_score_correction_bias",
            config.n_routed_experts,
            component="moe_layer",
            indices=config.moe_layers,
            dtype="F32",
        )
        yield from _expert_patterns(config, group_size)


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj": (width, hidden),
        f"{prefix}up_proj": (width, hidden),
        f"{prefix}down_proj": (hidden, width),
    }


def _expert_patterns(config: TextConfig, group_size: int) -> Iterator[TensorPattern]:
    for projection, (rows, columns) in _mlp_shapes("", config.hidden_size, config.moe_intermediate_size).items():
        parts: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
            ("weight_packed", ("I32",), (rows, columns // 8)),
            ("weight_scale", ("BF16",), (rows, columns // group_size)),
            (
                "weight_shape",
                ("I32", "I64"),
                (2,),
            ),  # the checkpoint has int32, compressed-tensors writes int64
        )
        for part, dtypes, shape in parts:
            yield TensorPattern(
                name=f"{EXPERT_PREFIX}{projection}.{part}",
                dtypes=dtypes,
                shape=shape,
                component="moe_layer",
                indices=config.moe_layers,
                experts=config.n_routed_experts,
            )


def _vision_patterns(config: VisionConfig) -> Iterator[TensorPattern]:
    hidden, width = config.vt_hidden_size, config.vt_intermediate_size
    merged = hidden * config.merge_kernel_size[0] * config.merge_kernel_size[1]
    top: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (hidden, 3, config.patch_size, config.patch_size),
        "vision_tower.patch_embed.proj.bias": (hidden,),
        POSITION_TABLE: (
            config.init_pos_emb_height,
            config.init_pos_emb_width,
            hidden,
        ),
        "vision_tower.encoder.final_layernorm.weight": (hidden,),
        "vision_tower.encoder.final_layernorm.bias": (hidden,),
        "mm_projector.pre_norm.weight": (hidden,),
        "mm_projector.pre_norm.bias": (hidden,),
        "mm_projector.proj.0.weight": (merged, merged),
        "mm_projector.proj.0.bias": (merged,),
        "mm_projector.proj.2.weight": (config.text_hidden_size, merged),
        "mm_projector.proj.2.bias": (config.text_hidden_size,),
    }
    block: dict[str, tuple[int, ...]] = {
        "norm0.weight": (hidden,),
        "norm0.bias": (hidden,),
        "norm1.weight": (hidden,),
        "norm1.bias": (hidden,),
        "wqkv.weight": (3 * hidden, hidden),
        "wqkv.bias": (3 * hidden,),
        "wo.weight": (hidden, hidden),
        "wo.bias": (hidden,),
        "mlp.fc0.weight": (width, hidden),
        "mlp.fc0.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
    }
    blocks = range(config.vt_num_hidden_layers)
    for name, shape in top.items():
        yield TensorPattern(name=name, dtypes=("BF16",), shape=shape, component="vision")
    for name, shape in block.items():
        yield TensorPattern(name=BLOCK_PREFIX + name, dtypes=("BF16",), shape=shape, component="vision", indices=blocks)
