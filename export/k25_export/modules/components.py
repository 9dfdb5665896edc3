"""The four text components, as they are traced. The arguments of `forward` are the graph's activation inputs.

Legend: T tokens, R rows, H hidden, V vocabulary, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k25_export.config import TextConfig
from k25_export.modules.attention import Attention
from k25_export.modules.feed_forward import MixtureOfExperts, SwiGLU
from k25_export.modules.layers import Linear, RMSNorm


class _Weight(nn.Module):
    """A table of bf16 rows."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.bfloat16), requires_grad=False)


class _Backbone(nn.Module):
    """Holds the modules that the checkpoint keeps under `model.`, so that parameter names are the checkpoint's."""


class Embed(nn.Module):
    """`token_ids` int32 [T] to `hidden` [T, H]."""

    def __init__(self, config: TextConfig, activation: torch.dtype) -> None:
        super().__init__()
        self.activation = activation
        self.model = _Backbone()
        self.model.embed_tokens = _Weight(config.vocab_size, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        rows_TH = torch.index_select(self.model.embed_tokens.weight, 0, token_ids)  # type: ignore[union-attr, arg-type]
        return rows_TH.to(self.activation)


class DenseLayer(nn.Module):
    """h = x + Attention(norm(x)); `hidden_out` = h + SwiGLU(norm(h))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden: Tensor, cache: Tensor, positions: Tensor, query_start: Tensor, block_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        attended, cache_out = self.self_attn(self.input_layernorm(hidden), cache, positions, query_start, block_table)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache_out


class MoeLayer(nn.Module):
    """As `DenseLayer` with a mixture of experts; `residual_share` lets ranks be summed (1 on one rank, else 0)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config)

    def forward(
        self,
        hidden: Tensor,
        cache: Tensor,
        positions: Tensor,
        query_start: Tensor,
        block_table: Tensor,
        expert_words: Tensor,
        expert_scales: Tensor,
        expert_table: Tensor,
        residual_share: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attended, cache_out = self.self_attn(self.input_layernorm(hidden), cache, positions, query_start, block_table)
        hidden = hidden + attended
        share = residual_share.to(hidden.dtype)
        mixed, expert_ids, expert_weights = self.mlp(
            self.post_attention_layernorm(hidden), expert_words, expert_scales, expert_table, share
        )
        return hidden * share + mixed, cache_out, expert_ids, expert_weights


class Head(nn.Module):
    """`logits` float32 [R, V] of the rows asked for: lm_head(norm(hidden[rows]))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = _Backbone()
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model.norm(torch.index_select(hidden, 0, rows)))  # type: ignore[operator]
        return logits.float()
