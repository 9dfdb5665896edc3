"""Feed-forward blocks: SwiGLU and the mixture of experts. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from k25_export.config import GROUP_SIZE, TextConfig
from k25_export.modules.layers import Linear


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_TH: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x_TH)) * self.up_proj(x_TH))
        return result


class Router(nn.Module):
    """`k25.Router` on the logits: top-k of sigmoid scores plus a selection bias; the weights are without it.

    Float32 throughout. Returns expert ids int32 [T, K] and weights float32 [T, K], best first.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.scaling_factor = config.routed_scaling_factor
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts), requires_grad=False)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = torch.ops.k25.linear(x_TH.float(), self.weight)
        ids_TK, weights_TK = torch.ops.k25.router(
            logits_TE, self.e_score_correction_bias, self.top_k, int(self.normalise), self.scaling_factor
        )
        return ids_TK, weights_TK


class MixtureOfExperts(nn.Module):
    """Routed INT4 experts through `k25.MoEDispatch`, plus the shared expert times `share`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.intermediate_size = config.moe_intermediate_size
        self.gate = Router(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, x_TH: Tensor, words: Tensor, scales: Tensor, table: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids_TK, weights_TK = self.gate(x_TH)
        routed_TH = torch.ops.k25.moe_dispatch(
            x_TH, ids_TK, weights_TK, words, scales, table, self.intermediate_size, GROUP_SIZE
        )
        return routed_TH + self.shared_experts(x_TH) * share, ids_TK, weights_TK
