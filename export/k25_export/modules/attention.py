"""Multi-head latent attention around `k25.MLA`. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k25_export.config import TextConfig
from k25_export.modules.layers import Linear, RMSNorm
from k25_export.rope import softmax_scale, yarn_inverse_frequencies


class Attention(nn.Module):
    """Projections and norms; rotation, cache and attention are the op's."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        q_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.latent_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.cache_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.latent_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)

    def forward(
        self, x_TH: Tensor, cache: Tensor, positions: Tensor, query_start: Tensor, block_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TH)))
        compressed, k_rope = self.kv_a_proj_with_mqa(x_TH).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent = torch.cat([self.kv_a_layernorm(compressed), k_rope], dim=-1)
        attended, cache_out = torch.ops.k25.mla(
            q,
            latent,
            cache,
            self.kv_b_proj.weight,
            positions,
            query_start,
            block_table,
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.v_head_dim,
            softmax_scale(config),
            list(yarn_inverse_frequencies(config)),
        )
        return self.o_proj(attended), cache_out
