"""Eager reference of `k25.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., in] (float32 or bfloat16) times `weight` bfloat16 [out, in], transposed: [..., out] in x's dtype."""
    return torch.nn.functional.linear(x, weight.to(x.dtype))
