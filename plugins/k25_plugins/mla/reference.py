"""Eager reference of `k25.MLA`: the absorbed form, one sequence at a time.

Legend: T tokens, N heads, R latent rank, D rope width, S context length.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, positions: Tensor, inv_freq: list[float]) -> Tensor:
    """Rotate adjacent pairs of `x` float32 [T, ..., D] by positions [T] times inv_freq [D / 2]."""
    angles = positions.float().unsqueeze(-1) * torch.tensor(inv_freq, dtype=torch.float32)
    angles = angles.view(angles.shape[0], *[1] * (x.dim() - 2), angles.shape[1])
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


def mla(
    q: Tensor,
    latent: Tensor,
    cache: Tensor,
    kv_b: Tensor,
    positions: Tensor,
    query_start: Tensor,
    block_table: Tensor,
    num_heads: int,
    qk_nope_head_dim: int,
    v_head_dim: int,
    softmax_scale: float,
    inv_freq: list[float],
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, append the latents to the paged cache, attend causally. Computes in float32.

    `q` [T, N * (nope + D)] not rotated; `latent` [T, R + D] with the first R normed and the rest not rotated;
    `cache` [blocks, block_size, R + D]; `kv_b` bfloat16 [N * (nope + v), R]; `positions` int32 [T];
    `query_start` int32 [sequences + 1]; `block_table` int32 [sequences, blocks_per_sequence].
    Returns `out` [T, N * v] in q's dtype and the updated cache as a new tensor.
    """
    tokens = q.shape[0]
    rope_dim = 2 * len(inv_freq)
    rank = cache.shape[2] - rope_dim
    block_size = cache.shape[1]
    q_TN = q.float().view(tokens, num_heads, qk_nope_head_dim + rope_dim)
    q_nope_TN, q_rope_TN = q_TN.split([qk_nope_head_dim, rope_dim], dim=-1)
    c_TR, k_rope_TD = latent.float().split([rank, rope_dim], dim=-1)
    row_T = torch.cat([c_TR, rotate_pairs(k_rope_TD, positions, inv_freq)], dim=-1)
    kv_b_N = kv_b.float().view(num_heads, qk_nope_head_dim + v_head_dim, rank)
    uk_N, uv_N = kv_b_N.split([qk_nope_head_dim, v_head_dim], dim=1)
    query_TN = torch.cat(
        [torch.einsum("tnd,ndr->tnr", q_nope_TN, uk_N), rotate_pairs(q_rope_TN, positions, inv_freq)], dim=-1
    )

    cache_out = cache.clone()
    bounds = query_start.tolist()
    spans = [(s, slice(lo, hi)) for s, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]
    for sequence, span in spans:  # every row is written before any is read
        where = positions[span].long()
        block = block_table[sequence].long()[where // block_size]
        cache_out[block, where % block_size] = row_T[span].to(cache.dtype)

    z_TN = torch.empty(tokens, num_heads, rank)
    for sequence, span in spans:
        for token in range(span.start, span.stop):  # a token at a time: rows that it does not see are not touched
            length = int(positions[token]) + 1
            blocks = block_table[sequence, : -(-length // block_size)].long()
            context_S = cache_out[blocks].flatten(0, 1)[:length].float()
            probabilities_NS = (query_TN[token] @ context_S.T * softmax_scale).softmax(dim=-1)
            z_TN[token] = probabilities_NS @ context_S[:, :rank]
    out_TN = torch.einsum("tnr,nvr->tnv", z_TN, uv_N)
    return out_TN.flatten(1).to(q.dtype), cache_out
