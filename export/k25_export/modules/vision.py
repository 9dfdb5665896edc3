"""MoonViT-3D and its projector: the `vision` component, as it is traced. Parameters are named as in the checkpoint.

Everything that depends on the grid (positions, angles, which rows are merged) comes in as an input, so that one graph
serves every resolution. Sources: MoonViT (Kimi-VL, arXiv 2504.07491, section 2.1.1) and Kimi K2.5 (arXiv 2602.02276).

Legend: P patches, W vision width, N heads, D head width, M media tokens, F frames, K patches of a merged block, H text
hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from k25_export.config import VisionConfig
from k25_export.modules.layers import Linear

#: In no official file: `nn.LayerNorm` of the tower has this epsilon in the Hugging Face code.
TOWER_NORM_EPS = 1e-5


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)


class BiasedLinear(Linear):
    """`k25.Linear` plus a bias, bfloat16 [out] as stored."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = _parameter(out_features)

    def forward(self, x_PI: Tensor) -> Tensor:
        return super().forward(x_PI) + self.bias.to(x_PI.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with weight and bias."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(size)
        self.bias = _parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return normed


class PatchProjection(nn.Module):
    """`pixel_values` [P, 3, size, size] to [P, W]: a convolution whose stride is its kernel is a matrix product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = _parameter(config.vt_hidden_size, 3, config.patch_size, config.patch_size)
        self.bias = _parameter(config.vt_hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        projected: Tensor = torch.ops.k25.linear(pixel_values.flatten(1), self.weight.flatten(1))
        return projected + self.bias.to(projected.dtype)


class PatchEmbedding(nn.Module):
    """The projection of the patches; their positions are an input of the component."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        result: Tensor = self.proj(pixel_values)
        return result


def rotated_pairs(x_PW: Tensor, cos_PD: Tensor, sin_PD: Tensor, heads: int) -> Tensor:
    """Rotate the adjacent pairs of each head of `x` [P, N * D] by the angles of cos and sin float32 [P, D / 2]."""
    pairs = x_PW.float().unflatten(1, (heads, -1, 2))
    first, second = pairs.unbind(-1)
    cos, sin = cos_PD.unsqueeze(1), sin_PD.unsqueeze(1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(1).to(x_PW.dtype)


class Mlp(nn.Module):
    """fc1(gelu(fc0 x)), with the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc0 = BiasedLinear(width, inner)
        self.fc1 = BiasedLinear(inner, width)

    def forward(self, x_PW: Tensor) -> Tensor:
        result: Tensor = self.fc1(F.gelu(self.fc0(x_PW), approximate="tanh"))
        return result


class Block(nn.Module):
    """h = x + wo(attention(norm0 x)); h + mlp(norm1 h). All patches of the item see each other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.vt_hidden_size
        self.heads = config.vt_num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.norm0 = LayerNorm(width, eps=TOWER_NORM_EPS)
        self.norm1 = LayerNorm(width, eps=TOWER_NORM_EPS)
        self.wqkv = BiasedLinear(width, 3 * width)
        self.wo = BiasedLinear(width, width)
        self.mlp = Mlp(width, config.vt_intermediate_size)

    def forward(self, x_PW: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        width = x_PW.shape[-1]
        qk_PW, v_PW = self.wqkv(self.norm0(x_PW)).split([2 * width, width], dim=-1)
        q_PW, k_PW = rotated_pairs(qk_PW, rope_cos, rope_sin, 2 * self.heads).chunk(2, dim=-1)
        attended_PW = torch.ops.k25.vision_attention(q_PW, k_PW, v_PW, self.heads, self.scale)
        x_PW = x_PW + self.wo(attended_PW)
        result: Tensor = x_PW + self.mlp(self.norm1(x_PW))
        return result


class Encoder(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vt_num_hidden_layers))
        self.final_layernorm = LayerNorm(config.vt_hidden_size, eps=TOWER_NORM_EPS)

    def forward(self, x_PW: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        for block in self.blocks:
            x_PW = block(x_PW, rope_cos, rope_sin)
        result: Tensor = self.final_layernorm(x_PW)
        return result


class Tower(nn.Module):
    """Patches and their positions, through the encoder: [P, W]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor, position_embedding: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        result: Tensor = self.encoder(self.patch_embed(pixel_values) + position_embedding, rope_cos, rope_sin)
        return result


class Projector(nn.Module):
    """Norm of each of the K vectors of a block [M, K, W], then linear, GELU (exact), linear of all of them: [M, H]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        merged = config.vt_hidden_size * config.merge_kernel_size[0] * config.merge_kernel_size[1]
        self.pre_norm = LayerNorm(config.vt_hidden_size, eps=config.projector_ln_eps)
        self.proj = nn.ModuleDict(
            {"0": BiasedLinear(merged, merged), "2": BiasedLinear(merged, config.text_hidden_size)}
        )

    def forward(self, x_MKW: Tensor) -> Tensor:
        inner = F.gelu(self.proj["0"](self.pre_norm(x_MKW).flatten(1)))
        result: Tensor = self.proj["2"](inner)
        return result


class Vision(nn.Module):
    """One media item, [P, 3, size, size], to `media_embeddings` [M, H]; `merge_index` int32 [M, F, K]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_tower = Tower(config)
        self.mm_projector = Projector(config)

    def forward(
        self, pixel_values: Tensor, position_embedding: Tensor, rope_cos: Tensor, rope_sin: Tensor, merge_index: Tensor
    ) -> Tensor:
        x_PW = self.vision_tower(pixel_values, position_embedding, rope_cos, rope_sin)
        blocks_MFKW = torch.index_select(x_PW, 0, merge_index.flatten()).unflatten(0, merge_index.shape)
        pooled_MKW = blocks_MFKW.float().mean(dim=1).to(x_PW.dtype)
        result: Tensor = self.mm_projector(pooled_MKW)
        return result
