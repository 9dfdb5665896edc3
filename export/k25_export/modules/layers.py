"""The leaves of every component: a linear layer and RMSNorm, with bf16 weights whatever the activation's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """`k25.Linear`: weight bfloat16 [out, in], no bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        return torch.ops.k25.linear(x_TI, self.weight)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """`k25.RMSNorm`: weight bfloat16 [size]."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return torch.ops.k25.rms_norm(x_TH, self.weight, self.eps)  # type: ignore[no-any-return]
