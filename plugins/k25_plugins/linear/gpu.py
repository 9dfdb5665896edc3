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
    inputs,
    outputs,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """`y` [T, outputs] = `x` [T, inputs] @ `weight` bfloat16 [outputs, inputs]^T.

    Grid (cdiv(T, BM), cdiv(outputs, BN)).
    """
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    feature = tl.program_id(1) * BN + tl.arange(0, BN)
    is_token = token < tokens
    is_feature = feature < outputs
    rows = weight + feature[:, None].to(tl.int64) * inputs
    columns = x + token[None, :].to(tl.int64) * inputs
    acc = tl.zeros((BN, BM), tl.float32)
    for base in range(0, inputs, BK):
        k = base + tl.arange(0, BK)
        xs = tl.load(columns + k[:, None], mask=is_token[None, :] & (k < inputs)[:, None], other=0.0)
        w = tl.load(rows + k[None, :], mask=is_feature[:, None] & (k < inputs)[None, :], other=0.0).to(xs.dtype)
        acc = dot(w, xs, acc, UP)
    to = y + token[None, :].to(tl.int64) * outputs + feature[:, None]
    tl.store(to, rounded(acc, y.dtype.element_ty, UP), mask=is_feature[:, None] & is_token[None, :])
