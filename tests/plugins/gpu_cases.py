"""Calls of the GPU kernels on random data, and what they must make, in float64: for tests and the benchmark.

Results are compared on `rows` of the output, so that a case of real size is judged in seconds.
Legend: T tokens, N heads, R latent rank, D rope width, H hidden, I expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k25_plugins.gpu_specialisations import ModelDims


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. `least_bytes` and `flops` are what any implementation must move and multiply."""

    name: str
    op: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    attributes: Mapping[str, Any]
    rows: Tensor
    reference: Callable[[], Tensor]
    least_bytes: int
    flops: int

    def poison(self) -> None:
        """Outputs that nobody wrote are NaN; a cache that is updated in place is left alone."""
        self.outputs[0].fill_(float("nan"))

    def error(self) -> float:
        """Relative L2 of the checked rows against float64; infinite where a value is not finite."""
        found = self.outputs[0].flatten(0, -2)[self.rows].double()
        if not bool(torch.isfinite(found).all()):
            return float("inf")
        expected = self.reference()
        return float((found - expected).norm() / expected.norm())


def rows_to_check(tokens: int, most: int, device: torch.device) -> Tensor:
    """The first, the last and some between."""
    count = min(tokens, most)
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64).round().long().to(device)


def inverse_frequencies(dims: ModelDims) -> list[float]:
    """Plain rotary frequencies: kernels take any."""
    return [float(50000.0 ** (-2 * i / dims.rope_dim)) for i in range(dims.rope_dim // 2)]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def rotated(x: Tensor, positions: Tensor, frequencies: list[float]) -> Tensor:
    """Adjacent pairs of `x` float64 [T, ..., D] rotated; the angle is a float32 product, as in the operator."""
    angle = (positions.float()[:, None] * torch.tensor(frequencies, device=x.device)).double()
    angle = angle.view(len(positions), *[1] * (x.dim() - 2), -1)
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def attention_case(
    name: str, dims: ModelDims, device: torch.device, *, sequences: int, context: int, new: int, check: int = 16
) -> Case:
    """`sequences` of `context` positions, the last `new` of which this call brings. Blocks lie in random order."""
    kind, cached = _dtype(dims.activation_dtype), _dtype(dims.cache_dtype)
    page, width, heads = dims.block_size, dims.latent_dim + dims.rope_dim, dims.num_heads
    nope, v, rank = dims.qk_nope_head_dim, dims.v_head_dim, dims.latent_dim
    blocks, tokens = -(-context // page), sequences * new
    scale, frequencies = float((nope + dims.rope_dim) ** -0.5), inverse_frequencies(dims)
    table = torch.randperm(sequences * blocks, device=device).view(sequences, blocks).int()
    cache = torch.randn(sequences * blocks, page, width, device=device).to(cached)
    q = torch.randn(tokens, heads * (nope + dims.rope_dim), device=device).to(kind)
    latent = torch.randn(tokens, width, device=device).to(kind)
    kv_b = (torch.randn(heads * (nope + v), rank, device=device) / rank**0.5).bfloat16()
    positions = torch.arange(context - new, context, device=device).repeat(sequences).int()
    starts = (torch.arange(sequences + 1, device=device) * new).int()
    out = torch.empty(tokens, heads * v, dtype=kind, device=device)
    rows = rows_to_check(tokens, check, device)

    def reference() -> Tensor:
        uk, uv = kv_b.double().view(heads, nope + v, rank).split([nope, v], 1)
        k_rope = rotated(latent[:, rank:].double(), positions, frequencies)
        brought = torch.cat([latent[:, :rank].double(), k_rope], -1).to(cached)
        found = []
        for token in rows.tolist():
            sequence, length = token // new, int(positions[token]) + 1
            context_rows = cache[table[sequence].long()].flatten(0, 1)[:length].clone()
            before = context - new
            context_rows[before:] = brought[sequence * new : sequence * new + length - before]
            keys = context_rows.double()
            q_N = q[token].double().view(heads, nope + dims.rope_dim)
            q_rope = rotated(q_N[None, :, nope:], positions[token : token + 1], frequencies)[0]
            query = torch.cat([torch.einsum("nd,ndr->nr", q_N[:, :nope], uk), q_rope], -1)
            weights = (query @ keys.T * scale).softmax(-1)
            found.append(torch.einsum("nr,nvr->nv", weights @ keys[:, :rank], uv).flatten())
        return torch.stack(found)

    seen = sequences * (context * new - new * (new - 1) // 2)
    return Case(
        name=name,
        op="MLA",
        inputs=[q, latent, cache, kv_b, positions, starts, table],
        outputs=[out, cache],
        attributes={
            "num_heads": heads,
            "qk_nope_head_dim": nope,
            "v_head_dim": v,
            "softmax_scale": scale,
            "inv_freq": frequencies,
        },
        rows=rows,
        reference=reference,
        least_bytes=sequences * context * width * cache.element_size(),
        flops=2 * seen * heads * ((nope + dims.rope_dim + v) if new > 1 else (2 * rank + dims.rope_dim)),
    )


def expert_region(dims: ModelDims, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales (the same bytes) and table of random experts, each tensor at a multiple of 128 bytes."""
    elements = dims.hidden * dims.intermediate_size
    sizes = [elements // 2, elements // 16] * 3
    starts, at = [], 0
    for _ in range(dims.experts):
        for size in sizes:
            starts.append(at // 8)
            at += -(-size // 128) * 128
    data = torch.randint(-(2**31), 2**31, (at // 4,), dtype=torch.int32, device=device)
    scales = data.view(torch.bfloat16)
    table = torch.tensor(starts, dtype=torch.int64, device=device).view(dims.experts, 6)
    for expert in range(dims.experts):
        for column in (1, 3, 5):
            first = starts[6 * expert + column] * 4
            made = torch.rand(elements // 32, device=device) * 0.02 + 0.01
            scales[first : first + elements // 32] = made.bfloat16()
    return data.view(-1, 2), scales.view(-1, 4), table


def expert_weight(region: tuple[Tensor, Tensor, Tensor], expert: int, column: int, outputs: int, inputs: int) -> Tensor:
    """One matrix of an expert in float64, [outputs, inputs]."""
    words, scales, table = region
    row, scale_row = int(table[expert, column]), int(table[expert, column + 1])
    packed = words[row : row + outputs * inputs // 16].reshape(outputs, inputs // 8)
    shifts = 4 * torch.arange(8, device=words.device, dtype=torch.int32)
    nibbles = ((packed[..., None] >> shifts) & 15).flatten(-2).double() - 8
    scale = scales[scale_row : scale_row + outputs * inputs // 128].reshape(outputs, inputs // 32).double()
    return nibbles * scale.repeat_interleave(32, -1)


def experts_case(
    name: str,
    dims: ModelDims,
    device: torch.device,
    region: tuple[Tensor, Tensor, Tensor],
    *,
    tokens: int,
    check: int = 4,
    nothing: bool = False,
) -> Case:
    """Uniform routing; with `nothing` no expert is hit."""
    kind = _dtype(dims.activation_dtype)
    k, hidden, inter = dims.experts_per_token, dims.hidden, dims.intermediate_size
    x = torch.randn(tokens, hidden, device=device).to(kind)
    ids = torch.stack([torch.randperm(dims.experts)[:k] for _ in range(tokens)]).int().to(device)
    ids = torch.full_like(ids, -1) if nothing else ids
    weights = torch.rand(tokens, k, device=device)
    y = torch.empty(tokens, hidden, dtype=kind, device=device)
    rows = rows_to_check(tokens, check, device)

    def reference() -> Tensor:
        found = torch.zeros(len(rows), hidden, dtype=torch.float64, device=device)
        for place, token in enumerate(rows.tolist()):
            row = x[token].double()
            for slot in range(k):
                expert = int(ids[token, slot])
                if expert < 0:
                    continue
                gate = torch.nn.functional.silu(expert_weight(region, expert, 0, inter, hidden) @ row)
                up = expert_weight(region, expert, 2, inter, hidden) @ row
                product = expert_weight(region, expert, 4, hidden, inter) @ (gate * up)
                found[place] += product * weights[token, slot].double()
        return found

    hit = len(ids[ids >= 0].unique())
    elements = hidden * inter
    return Case(
        name=name,
        op="MoEDispatch",
        inputs=[x, ids, weights, *region],
        outputs=[y],
        attributes={"intermediate_size": inter, "group_size": 32},
        rows=rows,
        reference=reference,
        least_bytes=hit * 3 * (elements // 2 + elements // 16),
        flops=0 if nothing else 6 * tokens * k * elements,
    )


def linear_case(name: str, device: torch.device, *, tokens: int, inputs: int, outputs: int, dtype: str) -> Case:
    """A product with a bfloat16 weight."""
    x = torch.randn(tokens, inputs, device=device).to(_dtype(dtype))
    weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).bfloat16()
    rows = rows_to_check(tokens, 16, device)
    return Case(
        name=name,
        op="Linear",
        inputs=[x, weight],
        outputs=[torch.empty(tokens, outputs, dtype=x.dtype, device=device)],
        attributes={},
        rows=rows,
        reference=lambda: x[rows].double() @ weight.double().T,
        least_bytes=weight.numel() * 2,
        flops=2 * tokens * inputs * outputs,
    )
