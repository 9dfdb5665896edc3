"""Eager reference of `k25.Router`. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Keeps a sum of weights that are all 0 from dividing by 0.
SMALLEST_TOTAL = 1e-20


def router(logits: Tensor, bias: Tensor, top_k: int, normalise: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """The `top_k` experts with the largest sigmoid(logit) + bias, best first, and their weights.

    `logits` float32 [T, E], `bias` float32 [E]. Returns ids int32 [T, K] and weights float32 [T, K]: the sigmoids
    without the bias, over their sum where `normalise` is not 0, times `scaling_factor`.
    """
    scores_TE = torch.sigmoid(logits)
    ids_TK = torch.topk(scores_TE + bias, top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + SMALLEST_TOTAL)
    return ids_TK.to(torch.int32), weights_TK * scaling_factor
