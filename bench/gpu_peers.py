"""What users would otherwise run for a case of bench/gpu.py: PyTorch, and kernels of other projects where installed.

Each peer gets the data in the layout that it likes best, prepared before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from gpu_cases import Case, expert_weight
from torch.nn import functional as F

Peer = tuple[str, Callable[[], Any]]
#: Experts whose weights are kept in bfloat16 for a peer: 88 MB each at K2.5's sizes.
_MOST_EXPERTS = 64


def peers_of(case: Case, compiled: bool) -> Iterator[Peer]:
    """Peers that can run here; one that fails when it runs is reported by the caller."""
    if case.flops == 0:
        return
    kinds = {"MLA": _attention, "MoEDispatch": _experts, "Linear": _linear}
    for name, run in kinds[case.op](case):
        yield name, run
        if compiled and name.startswith("torch"):
            yield f"{name}, compiled", torch.compile(run)


def _attention(case: Case) -> Iterator[Peer]:
    q, _, cache, kv_b, positions, starts, table = case.inputs
    sequences, new = len(starts) - 1, int(starts[1])
    context = int(positions.max()) + 1
    heads, nope, v = (case.attributes[name] for name in ("num_heads", "qk_nope_head_dim", "v_head_dim"))
    rope = 2 * len(case.attributes["inv_freq"])
    rank, scale = cache.shape[-1] - rope, case.attributes["softmax_scale"]
    rows = cache[table.long()].flatten(1, 2)[:, :context]
    if new == 1:
        query = torch.randn(sequences, heads, 1, rank + rope, dtype=q.dtype, device=q.device)
        keys, values = rows[:, None], rows[:, None, :, :rank].contiguous()
        yield (
            "torch SDPA on latents",
            lambda: F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True),
        )
        yield from _flash_mla(case, sequences, context)
        yield from _flash_infer(case, sequences, context)
        return
    q_N = q.view(sequences, new, heads, nope + rope).transpose(1, 2)
    expanded = F.linear(rows[..., :rank], kv_b).view(sequences, context, heads, nope + v).transpose(1, 2)
    shared = rows[:, None, :, rank:].expand(-1, heads, -1, -1)
    keys = torch.cat([expanded[..., :nope], shared], -1).contiguous()
    values = F.pad(expanded[..., nope:], (0, nope + rope - v)).contiguous()  # one width for the fused kernels
    yield (
        "torch SDPA on expanded heads",
        lambda: F.scaled_dot_product_attention(q_N, keys, values, scale=scale, is_causal=True),
    )


def _flash_mla(case: Case, sequences: int, context: int) -> Iterator[Peer]:
    if find_spec("flash_mla") is None:
        return
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    cache, table = case.inputs[2], case.inputs[6]
    heads, rank = case.attributes["num_heads"], cache.shape[-1] - 2 * len(case.attributes["inv_freq"])
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=cache.device)
    query = torch.randn(sequences, 1, heads, cache.shape[-1], dtype=cache.dtype, device=cache.device)
    metadata, splits = get_mla_metadata(lengths, heads, 1)
    yield "FlashMLA", lambda: flash_mla_with_kvcache(
        query, cache[:, :, None], table, lengths, rank, metadata, splits,
        softmax_scale=case.attributes["softmax_scale"], causal=True,
    )  # fmt: skip


def _flash_infer(case: Case, sequences: int, context: int) -> Iterator[Peer]:
    if find_spec("flashinfer") is None:
        return
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    cache, table = case.inputs[2], case.inputs[6]
    heads, rope, page = case.attributes["num_heads"], 2 * len(case.attributes["inv_freq"]), cache.shape[1]
    rank = cache.shape[-1] - rope
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(2**27, dtype=torch.uint8, device=cache.device))
    ones = torch.arange(sequences + 1, dtype=torch.int32, device=cache.device)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=cache.device)
    wrapper.plan(
        ones, ones * table.shape[1], table.flatten(), lengths, heads, rank, rope, page, True,
        case.attributes["softmax_scale"], cache.dtype, cache.dtype,
    )  # fmt: skip
    q_latent = torch.randn(sequences, heads, rank, dtype=cache.dtype, device=cache.device)
    q_rope = torch.randn(sequences, heads, rope, dtype=cache.dtype, device=cache.device)
    latent, k_rope = cache[..., :rank].contiguous(), cache[..., rank:].contiguous()
    yield "FlashInfer", lambda: wrapper.run(q_latent, q_rope, latent, k_rope)


def _experts(case: Case) -> Iterator[Peer]:
    """bfloat16 experts, one matmul after the other for those that are hit: four times the bytes of INT4."""
    x, ids, weights, *region = case.inputs
    inter, hidden = case.attributes["intermediate_size"], x.shape[1]
    hit = ids.unique().tolist()
    if len(hit) > _MOST_EXPERTS and x.is_cuda:
        return

    def weight(expert: int, column: int, outputs: int, inputs: int) -> torch.Tensor:
        return expert_weight((region[0], region[1], region[2]), expert, column, outputs, inputs).to(x.dtype)

    held = [
        (
            weight(expert, 0, inter, hidden),
            weight(expert, 2, inter, hidden),
            weight(expert, 4, hidden, inter),
            *torch.where(ids == expert),
        )
        for expert in hit
    ]

    def run() -> torch.Tensor:
        y = torch.zeros_like(x)
        for gate, up, down, token, slot in held:
            mine = x[token]
            made = F.linear(F.silu(F.linear(mine, gate)) * F.linear(mine, up), down)
            y.index_add_(0, token, made * weights[token, slot, None].to(x.dtype))
        return y

    yield "torch bf16 experts", run


def _linear(case: Case) -> Iterator[Peer]:
    x, weight = case.inputs
    yield "torch matmul", lambda: F.linear(x, weight)
