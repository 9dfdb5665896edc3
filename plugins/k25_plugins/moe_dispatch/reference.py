"""Eager reference of `k25.MoEDispatch`.

Legend: T tokens, H hidden, I expert width, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from k25_plugins.int4 import NIBBLES_PER_WORD, ZERO_POINT


def dequantize(words: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """int32 words [out, in / 8] and scales [out, in / group_size] as exact float32 weights [out, in]."""
    shifts = 4 * torch.arange(NIBBLES_PER_WORD, dtype=torch.int32)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    return (nibbles.flatten(-2).float() - ZERO_POINT) * scales.float().repeat_interleave(group_size, -1)


def moe_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    words: Tensor,
    scales: Tensor,
    table: Tensor,
    intermediate_size: int,
    group_size: int,
) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate x) * up x), in float32, returned in x's dtype.

    `x` [T, H]; `expert_ids` int32 and `expert_weights` float32 [T, K]; `words` int32 [rows, 2] and `scales`
    bfloat16 [rows, 4] are the same bytes; `table` int64 [experts, 6] holds the first row of each tensor, in the
    order of `EXPERT_TABLE_COLUMNS`. A row of -1 is an expert that is not held here: it adds nothing.
    """
    hidden = x.shape[1]
    x_TH = x.float()
    y_TH = torch.zeros_like(x_TH)
    for expert in expert_ids.unique().tolist():
        rows = table[expert].tolist()
        if rows[0] < 0:
            continue

        def weight(column: int, out_features: int, in_features: int, rows: list[int] = rows) -> Tensor:
            word_count = out_features * in_features // NIBBLES_PER_WORD
            scale_count = out_features * in_features // group_size
            start = rows[column]
            packed = words[start : start + word_count // 2].reshape(out_features, -1)
            start = rows[column + 1]
            scale = scales[start : start + scale_count // 4].reshape(out_features, -1)
            return dequantize(packed, scale, group_size=group_size)

        token, slot = torch.where(expert_ids == expert)
        x_NH = x_TH[token]
        gate_NI = F.silu(x_NH @ weight(0, intermediate_size, hidden).T)
        up_NI = x_NH @ weight(2, intermediate_size, hidden).T
        out_NH = (gate_NI * up_NI) @ weight(4, hidden, intermediate_size).T
        y_TH.index_add_(0, token, out_NH * expert_weights[token, slot].unsqueeze(1))
    return y_TH.to(x.dtype)
