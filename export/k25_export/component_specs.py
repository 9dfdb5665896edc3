"""What each kind of component is: its module, its named inputs and outputs with their axes, its layers.

The table drives the trace, the checks after it and the manifest. Example sizes are distinct and at least 2, so that
no two axes are taken for one and none is specialised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from k25_export.config import ModelConfig, VisionConfig
from k25_export.manifest import Precision
from k25_export.modules.components import DenseLayer, Embed, Head, MoeLayer
from k25_export.modules.vision import Vision
from k25_export.passes.repeat_blocks import BlockStack
from k25_export.tensor_patterns import BLOCK_PREFIX, LAYER_PREFIX, TEXT_PREFIX

ACTIVATION_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Example sizes of the dynamic axes, used only while tracing.
EXAMPLE_SIZES: Mapping[str, int] = {
    "tokens": 5,
    "blocks": 7,
    "block_size": 16,
    "sequences": 3,
    "blocks_per_sequence": 6,
    "expert_rows": 11,
    "rows": 9,
    "patches": 24,
    "media_tokens": 10,
    "frames": 2,
}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """An activation input: `dtype` is a torch dtype, or None for the precision's activation dtype.

    An axis is a size, a name of `EXAMPLE_SIZES`, or such a name + 1.
    """

    name: str
    dtype: torch.dtype | None
    axes: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One kind of component. `prefix` is what the checkpoint's names have before the graph's input names.

    `build` makes the module with `stack.traced` blocks where there is a `stack`.
    """

    name: str
    build: Callable[[torch.dtype], nn.Module]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[tuple[str, tuple[int | str, ...]], ...]
    prefix: str
    layers: tuple[int, ...] | None = None
    stack: BlockStack | None = None


def component_specs(config: ModelConfig) -> tuple[ComponentSpec, ...]:
    """The components that a model with this configuration has, in the order of the data."""
    text = config.text
    hidden_axes = ("tokens", text.hidden_size)
    cache_axes = ("blocks", "block_size", text.cache_dim)
    layer_inputs = (
        InputSpec(name="hidden", dtype=None, axes=hidden_axes),
        InputSpec(name="cache", dtype=None, axes=cache_axes),
        InputSpec(name="positions", dtype=torch.int32, axes=("tokens",)),
        InputSpec(name="query_start", dtype=torch.int32, axes=("sequences + 1",)),
        InputSpec(name="block_table", dtype=torch.int32, axes=("sequences", "blocks_per_sequence")),
    )
    expert_inputs = (
        InputSpec(name="expert_words", dtype=torch.int32, axes=("expert_rows", 2)),
        InputSpec(name="expert_scales", dtype=torch.bfloat16, axes=("expert_rows", 4)),
        InputSpec(name="expert_table", dtype=torch.int64, axes=(text.n_routed_experts, 6)),
        InputSpec(name="residual_share", dtype=torch.float32, axes=(1,)),
    )
    layer_outputs = (("hidden_out", hidden_axes), ("cache_out", cache_axes))
    top_k = ("tokens", text.num_experts_per_tok)
    specs = [
        ComponentSpec(
            name="embed",
            build=lambda activation: Embed(text, activation),
            inputs=(InputSpec(name="token_ids", dtype=torch.int32, axes=("tokens",)),),
            outputs=(("hidden", hidden_axes),),
            prefix=TEXT_PREFIX,
        )
    ]
    if text.dense_layers:
        specs.append(
            ComponentSpec(
                name="dense_layer",
                build=lambda activation: DenseLayer(text),
                inputs=layer_inputs,
                outputs=layer_outputs,
                prefix=LAYER_PREFIX,
                layers=tuple(text.dense_layers),
            )
        )
    if text.moe_layers:
        specs.append(
            ComponentSpec(
                name="moe_layer",
                build=lambda activation: MoeLayer(text),
                inputs=layer_inputs + expert_inputs,
                outputs=(*layer_outputs, ("expert_ids", top_k), ("expert_weights", top_k)),
                prefix=LAYER_PREFIX,
                layers=tuple(text.moe_layers),
            )
        )
    specs.append(
        ComponentSpec(
            name="head",
            build=lambda activation: Head(text),
            inputs=(
                InputSpec(name="hidden", dtype=None, axes=hidden_axes),
                InputSpec(name="rows", dtype=torch.int32, axes=("rows",)),
            ),
            outputs=(("logits", ("rows", text.vocab_size)),),
            prefix=TEXT_PREFIX,
        )
    )
    if config.vision is not None:
        specs.append(_vision_spec(config.vision))
    return tuple(specs)


def _vision_spec(vision: VisionConfig) -> ComponentSpec:
    """The tower and the projector in one graph; its input names are the checkpoint's, so there is no prefix."""
    angle_axes = ("patches", vision.vt_hidden_size // vision.vt_num_attention_heads // 2)
    kernel = vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
    stack = BlockStack(prefix=BLOCK_PREFIX.removesuffix("{block}."), count=vision.vt_num_hidden_layers)
    return ComponentSpec(
        name="vision",
        build=lambda activation: Vision(replace(vision, vt_num_hidden_layers=stack.traced)),
        inputs=(
            InputSpec(name="pixel_values", dtype=None, axes=("patches", 3, vision.patch_size, vision.patch_size)),
            InputSpec(name="position_embedding", dtype=None, axes=("patches", vision.vt_hidden_size)),
            InputSpec(name="rope_cos", dtype=torch.float32, axes=angle_axes),
            InputSpec(name="rope_sin", dtype=torch.float32, axes=angle_axes),
            InputSpec(name="merge_index", dtype=torch.int32, axes=("media_tokens", "frames", kernel)),
        ),
        outputs=(("media_embeddings", ("media_tokens", vision.text_hidden_size)),),
        prefix="",
        stack=stack,
    )
