"""Eager reference of `k25.VisionAttention`: one head at a time, in blocks of queries.

Legend: P patches, N heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Scores of this many queries of one head are held at a time.
QUERY_BLOCK = 512


def vision_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, softmax_scale: float) -> Tensor:
    """softmax(scale * q k^T) v of each head, every patch seeing every patch. Computes in float32.

    `q`, `k`, `v` [P, N * D], rotated where the model rotates. Returns [P, N * D] in q's dtype. At most
    `QUERY_BLOCK` * P scores exist at a time.
    """
    patches = q.shape[0]
    q_NPD, k_NPD, v_NPD = (x.float().view(patches, num_heads, -1).transpose(0, 1) for x in (q, k, v))
    out_NPD = torch.empty_like(q_NPD)
    for head in range(num_heads):
        keys_DP, values_PD = k_NPD[head].T, v_NPD[head]
        for start in range(0, patches, QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            scores_BP = q_NPD[head, block] @ keys_DP * softmax_scale
            out_NPD[head, block] = scores_BP.softmax(dim=-1) @ values_PD
    return out_NPD.transpose(0, 1).reshape(patches, -1).to(q.dtype)
