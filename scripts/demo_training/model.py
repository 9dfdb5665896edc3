"""The Kimi K2.5 text model as `train_demo.py` trains it: batched, differentiable, named as in the checkpoint.

The formulas are those of `k25_validate.plain_model` (MLA in the expanded form, sigmoid router whose bias takes part in
the choice only, SwiGLU, YaRN). Two things are different, and neither changes a value: rows of a batch hold several
texts, which attention keeps apart by a mask, and the experts of a layer are one parameter [E, out, in].

Legend: B rows of a batch, L tokens of a row, T = B * L, H hidden, N heads, D head width, P rotated channels,
E experts, K experts a token, O and C rows and columns of a weight, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from k25_export.config import TextConfig
from k25_export.demo.quantizer import STEPS
from k25_export.rope import softmax_scale, yarn_inverse_frequencies
from k25_plugins.int4 import GROUP_SIZE


def fake_quantized(weight: Tensor) -> Tensor:
    """[..., O, C] with the values that INT4 storage will give it; the gradient passes through as if unchanged.

    The values are those of `k25_export.demo.quantizer`.
    """
    groups = weight.detach().unflatten(-1, (-1, GROUP_SIZE))
    scale = (groups.abs().amax(-1, keepdim=True) / STEPS).bfloat16().float()
    codes = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-STEPS - 1, STEPS)
    stored: Tensor = (codes * scale).flatten(-2)
    return weight + (stored - weight.detach())


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _linear(rows: int, columns: int, *, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(columns))
    return layer


class Attention(nn.Module):
    """Multi-head latent attention; keys and values of each head are made from the latent."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_a_proj = _linear(config.q_lora_rank, config.hidden_size)
        self.q_a_layernorm = Norm(config.q_lora_rank, config.latent_norm_eps)
        self.q_b_proj = _linear(heads * (nope + rope), config.q_lora_rank)
        self.kv_a_proj_with_mqa = _linear(config.cache_dim, config.hidden_size)
        self.kv_a_layernorm = Norm(config.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = _linear(heads * (nope + config.v_head_dim), config.kv_lora_rank)
        self.o_proj = _linear(config.hidden_size, heads * config.v_head_dim, gain=0.5)

    def forward(self, x_BLH: Tensor, rotation: tuple[Tensor, Tensor], mask_B1LL: Tensor) -> Tensor:
        config = self.config
        nope, heads = config.qk_nope_head_dim, config.num_attention_heads
        q_BNLD = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BLH))).unflatten(-1, (heads, -1)).transpose(1, 2)
        latent, key = self.kv_a_proj_with_mqa(x_BLH).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        up = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        key_BNLP = _rotated(key.unsqueeze(1), rotation).expand(-1, heads, -1, -1)
        queries = torch.cat([q_BNLD[..., :nope], _rotated(q_BNLD[..., nope:], rotation)], dim=-1)
        keys = torch.cat([up[..., :nope], key_BNLP], dim=-1)
        scores_BNLL = (queries @ keys.transpose(-1, -2) * softmax_scale(config)).masked_fill(~mask_B1LL, -math.inf)
        attended: Tensor = scores_BNLL.softmax(-1) @ up[..., nope:]
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Adjacent pairs of [..., L, P] turned by the angles whose cos and sin are [L, P / 2]."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = _linear(width, hidden)
        self.up_proj = _linear(width, hidden)
        self.down_proj = _linear(hidden, width, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Router(nn.Module):
    """Top-k of sigmoid scores plus the bias; `load` [E] counts the choices since it was last set to zero."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) / config.hidden_size**0.5)
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.load = torch.zeros(config.n_routed_experts)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = F.linear(x_TH, self.weight).sigmoid()
        ids_TK = (scores_TE + self.e_score_correction_bias).topk(self.config.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        self.load += torch.bincount(ids_TK.flatten(), minlength=len(self.load))
        return ids_TK, weights_TK * self.config.routed_scaling_factor

    def balance(self, step: float) -> None:
        """Raise the bias of experts that were chosen less than the mean, lower the others (DeepSeek-V3, 2.1.2)."""
        self.e_score_correction_bias += step * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Experts(nn.Module):
    """The routed experts of a layer, each a SwiGLU: parameters [E, out, in]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.is_quantized = False
        self.gate_proj = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)
        self.up_proj = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * 0.5 / width**0.5)

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = map(fake_quantized, weights) if self.is_quantized else weights
        order = ids_TK.flatten().argsort(stable=True)
        tokens = order // ids_TK.shape[1]
        counts = torch.bincount(ids_TK.flatten(), minlength=len(gate)).tolist()
        parts = x_TH.index_select(0, tokens).split(counts)
        outs = [
            F.linear(F.silu(F.linear(part, gate[expert])) * F.linear(part, up[expert]), down[expert])
            for expert, part in enumerate(parts)
        ]
        chosen_weights = weights_TK.flatten().index_select(0, order)
        return torch.zeros_like(x_TH).index_add(0, tokens, torch.cat(outs) * chosen_weights[:, None])


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_BLH: Tensor) -> Tensor:
        x_TH = x_BLH.flatten(0, 1)
        mixed: Tensor = self.experts(x_TH, *self.gate(x_TH)) + self.shared_experts(x_TH)
        return mixed.view_as(x_BLH)


class Layer(nn.Module):
    """h = x + Attention(norm x); h + MLP(norm h), dense or a mixture of experts."""

    def __init__(self, config: TextConfig, *, is_dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if is_dense else MixtureOfExperts(config)

    def forward(self, x_BLH: Tensor, rotation: tuple[Tensor, Tensor], mask_B1LL: Tensor) -> Tensor:
        x_BLH = x_BLH + self.self_attn(self.input_layernorm(x_BLH), rotation, mask_B1LL)
        return x_BLH + self.mlp(self.post_attention_layernorm(x_BLH))  # type: ignore[no-any-return]


class DemoModel(nn.Module):
    """Token ids [B, L] and the text each belongs to [B, L] to the hidden states [B, L, H] before `lm_head`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, is_dense=layer in config.dense_layers) for layer in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = _linear(config.vocab_size, config.hidden_size)

    def forward(self, ids_BL: Tensor, texts_BL: Tensor) -> Tensor:
        length = ids_BL.shape[1]
        angles = torch.arange(length)[:, None] * torch.tensor(yarn_inverse_frequencies(self.config))
        rotation = angles.cos(), angles.sin()
        is_same_text = texts_BL[:, :, None] == texts_BL[:, None, :]
        mask_B1LL = (is_same_text & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        x_BLH = self.embed_tokens(ids_BL)
        for layer in self.layers:
            x_BLH = layer(x_BLH, rotation, mask_B1LL)
        return self.norm(x_BLH)  # type: ignore[no-any-return]

    def mixtures(self) -> list[MixtureOfExperts]:
        """The mixtures of experts, first layer first."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureOfExperts)]
