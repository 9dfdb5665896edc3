"""GPU kernel of `k25.Linear` for few tokens, in the Triton language: the weight is streamed once.

The product is written `W @ x^T`, so the weight's rows fill the tensor cores however few the tokens are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k25_plugins.triton_math import dot, rounded


@triton.jit
def linear(
    x,
    weight,
    y,
    tokens,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """`y` [T, OUT] = `x` [T, IN] @ `weight` bfloat16 [OUT, IN]^T. Grid (cdiv(T, BM), cdiv(OUT, BN))."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    feature = tl.program_id(1) * BN + tl.arange(0, BN)
    is_token = token < tokens
    is_feature = feature < OUT
    rows = weight + feature[:, None].to(tl.int64) * IN
    columns = x + token[None, :].to(tl.int64) * IN
    acc = tl.zeros((BN, BM), tl.float32)
    for base in range(0, IN, BK):
        k = base + tl.arange(0, BK)
        xs = tl.load(columns + k[:, None], mask=is_token[None, :] & (k < IN)[:, None], other=0.0)
        w = tl.load(rows + k[None, :], mask=is_feature[:, None] & (k < IN)[None, :], other=0.0).to(xs.dtype)
        acc = dot(w, xs, acc, UP)
    to = y + token[None, :].to(tl.int64) * OUT + feature[:, None]
    tl.store(to, rounded(acc, y.dtype.element_ty, UP), mask=is_feature[:, None] & is_token[None, :])
