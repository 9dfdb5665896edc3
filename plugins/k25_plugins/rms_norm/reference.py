"""Eager reference of `k25.RMSNorm`. Source: Zhang and Sennrich, arXiv 1910.07467, equation 4."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [..., size] over the root of its mean square, times `weight` bfloat16 [size]: [..., size] in x's dtype.

    x * rsqrt(mean(x^2) + eps) is computed in float32 and cast to x's dtype before it meets the weight.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)
