"""The GPU kernels' own source in Triton's interpreter against the eager references: no GPU is needed.

Outputs, scratch and metadata are filled with NaN or -7 first, so what is read before it is written shows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from k25_plugins.linear import gpu as linear_gpu
from k25_plugins.mla import gpu as mla_gpu
from k25_plugins.mla.reference import mla
from k25_plugins.moe_dispatch import gpu as moe_gpu
from k25_plugins.moe_dispatch.reference import moe_dispatch

#: Relative L2 against the float32 reference: float32 sums in another order, and bfloat16's rounding of operands.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, -7 if dtype == torch.int32 else float("nan")).to(dtype)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - expected).norm() / expected.norm())


# Experts.


def _region(experts: int, hidden: int, inter: int, absent: Sequence[int], odd_rows: bool) -> tuple[torch.Tensor, ...]:
    """Words, scales (the same bytes) and table of random experts; NaN in the bytes between tensors."""
    random = torch.Generator().manual_seed(experts)
    pieces = [torch.full((8,), float("nan"), dtype=torch.bfloat16).view(torch.uint8)]
    table = torch.full((experts, 6), -1, dtype=torch.int64)
    row = 2
    for expert in range(experts):
        if expert in absent:
            continue
        for column in range(0, 6, 2):
            words = torch.randint(-(2**31), 2**31, (hidden * inter // 8,), generator=random).to(torch.int32)
            scales = (torch.rand(hidden * inter // 32, generator=random) * 0.02 + 0.01).to(torch.bfloat16)
            for which, values in enumerate((words, scales)):
                if row % 2 != odd_rows:
                    pieces.append(torch.full((4,), float("nan"), dtype=torch.bfloat16).view(torch.uint8))
                    row += 1
                table[expert, column + which] = row
                pieces.append(values.view(torch.uint8))
                row += pieces[-1].numel() // 8
    data = torch.cat(pieces)
    return data.view(torch.int32).view(-1, 2), data.view(torch.bfloat16).view(-1, 4), table


def _experts_on_gpu_kernels(
    mode: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, region: tuple[torch.Tensor, ...], inter: int,
    *, aligned: bool, block: int = 32, tail: int = 8,
) -> torch.Tensor:  # fmt: skip
    words, scales, table = region
    (tokens, hidden), (experts, k) = x.shape, (table.shape[0], ids.shape[1])
    pairs, slots, lanes = tokens * k, experts, 2
    wide, wide_h = _ceil(hidden, block) * block, _ceil(inter, block) * block
    permuted, h = _unwritten(tokens, wide, dtype=x.dtype), _unwritten(pairs, wide_h, dtype=x.dtype)
    partial, y = _unwritten(pairs, hidden, dtype=torch.float32), _unwritten(tokens, hidden, dtype=x.dtype)
    order = _unwritten(pairs, dtype=torch.int32)
    start, count = (_unwritten(experts, dtype=torch.int32) for _ in range(2))
    active = _unwritten(experts + 1, dtype=torch.int32)
    moe_gpu.permute_x[(tokens, _ceil(wide, 64))](x, permuted, hidden, block, 64)
    if mode == "pairs":
        slots, lanes = pairs, 1
    elif mode == "small":
        sizes = (_power(pairs), _power(experts))
        moe_gpu.route_small[(1,)](ids, table, order, start, count, active, pairs, experts, *sizes)
    else:
        moe_gpu.route_large[(experts,)](ids, table, order, start, count, active, pairs, experts, 16)
    lists = (table, ids, order, start, count, active)
    sizes = (pairs, experts, lanes)
    is_pairs = mode == "pairs"
    moe_gpu.gate_up[(lanes, _ceil(inter, 64), slots)](
        permuted, words, scales, *lists, h, *sizes, k, hidden, inter, 64, 8, tail, block, block, is_pairs, aligned, True
    )
    moe_gpu.down[(lanes, _ceil(hidden, 64), slots)](
        h, words, scales, *lists, partial, *sizes, hidden, inter, 64, 8, tail, block, is_pairs, aligned, True
    )
    moe_gpu.combine[(tokens, _ceil(hidden, 64))](partial, ids, weights, table, y, experts, k, hidden, 64, True)
    return y


@pytest.mark.parametrize("mode", ["pairs", "small", "large"])
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "absent", "dtype"),
    [
        (1, 2, 3, (), torch.bfloat16),
        (5, 3, 7, (1, 4), torch.float32),
        (9, 1, 1, (), torch.float32),
        (3, 2, 5, (0, 1, 2, 3, 4), torch.float32),
    ],
    ids=["one token", "absent experts", "many tokens an expert", "nothing held"],
)
def test_experts(mode: str, tokens: int, k: int, experts: int, absent: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    hidden, inter = 96, 32
    region = _region(experts, hidden, inter, absent, odd_rows=False)
    x = torch.randn(tokens, hidden).to(dtype)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).to(torch.int32)
    weights = torch.rand(tokens, k)
    expected = moe_dispatch(x.float(), ids, weights, *region, inter, 32)
    found = _experts_on_gpu_kernels(mode, x, ids, weights, region, inter, aligned=True)
    if len(absent) == experts:
        assert torch.equal(found, torch.zeros_like(found))
    else:
        assert _relative(found, expected) < TOLERANCES[dtype]


def test_widths_that_are_no_whole_blocks() -> None:
    torch.manual_seed(4)
    region = _region(3, 160, 96, (), odd_rows=False)
    x, weights = torch.randn(4, 160), torch.rand(4, 2)
    ids = torch.tensor([[2, 0], [0, 1], [1, 2], [2, 1]], dtype=torch.int32)
    expected = moe_dispatch(x, ids, weights, *region, 96, 32)
    found = _experts_on_gpu_kernels("small", x, ids, weights, region, 96, aligned=True, block=128)
    assert _relative(found, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("tokens", [3, 4, 8, 12, 13])
def test_the_last_tokens_of_an_expert_are_a_narrower_tile(tokens: int) -> None:
    """Two lanes of tiles of 8: none, one or two whole tiles, then at most 4 tokens, or more than that."""
    torch.manual_seed(tokens)
    region = _region(2, 64, 32, (), odd_rows=False)
    x, weights = torch.randn(tokens, 64), torch.rand(tokens, 1)
    ids = torch.ones(tokens, 1, dtype=torch.int32)
    expected = moe_dispatch(x, ids, weights, *region, 32, 32)
    found = _experts_on_gpu_kernels("small", x, ids, weights, region, 32, aligned=True, tail=4)
    assert _relative(found, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("mode", ["small", "large"])
def test_all_tokens_on_one_expert_and_rows_that_are_not_aligned(mode: str) -> None:
    torch.manual_seed(1)
    region = _region(4, 64, 96, (), odd_rows=True)
    x, weights = torch.randn(9, 64), torch.rand(9, 2)
    ids = torch.tensor([[2, 0]] * 9, dtype=torch.int32)
    expected = moe_dispatch(x, ids, weights, *region, 96, 32)
    found = _experts_on_gpu_kernels(mode, x, ids, weights, region, 96, aligned=False)
    assert _relative(found, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("mode", ["pairs", "small", "large"])
def test_an_expert_of_nan_reaches_only_its_tokens_and_ids_outside_the_table_add_nothing(mode: str) -> None:
    torch.manual_seed(2)
    words, scales, table = _region(3, 32, 32, (), odd_rows=False)
    scales[int(table[1, 1]) : int(table[1, 1]) + 8] = float("nan")
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    ids = torch.tensor([[0, 2], [0, 1], [2, 3 if mode != "pairs" else -1]], dtype=torch.int32)
    known = ids.clone()
    known[2, 1] = 2  # its weight is zero in the expectation
    zeroed = weights.clone()
    zeroed[2, 1] = 0
    expected = moe_dispatch(x, known, zeroed, words, scales, table, 32, 32)
    found = _experts_on_gpu_kernels(mode, x, ids, weights, (words, scales, table), 32, aligned=True)
    assert torch.isnan(found[1]).any()
    assert _relative(found[[0, 2]], expected[[0, 2]]) < TOLERANCES[torch.float32]


def test_routing_is_stable_and_compact() -> None:
    torch.manual_seed(3)
    experts, pairs = 20, 60
    ids = torch.randint(0, experts, (pairs,), dtype=torch.int32)
    table = torch.zeros(experts, 6, dtype=torch.int64)
    table[[3, 7]] = -1
    held = [[i for i in range(pairs) if ids[i] == e] if e not in (3, 7) else [] for e in range(experts)]
    for mode in ("small", "large"):
        order, active = _unwritten(pairs, dtype=torch.int32), _unwritten(experts + 1, dtype=torch.int32)
        start, count = (_unwritten(experts, dtype=torch.int32) for _ in range(2))
        if mode == "small":
            moe_gpu.route_small[(1,)](ids, table, order, start, count, active, pairs, experts, 64, 32)
            assert active[1 : 1 + active[0]].tolist() == [e for e in range(experts) if held[e]]
        else:
            moe_gpu.route_large[(experts,)](ids, table, order, start, count, active, pairs, experts, 16)
        for expert in range(experts):
            at = int(start[expert])
            assert int(count[expert]) == len(held[expert])
            assert order[at : at + len(held[expert])].tolist() == held[expert]


# Attention.

Chunk = tuple[int, int]


def _attention(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    chunks: list[Chunk],
    page: int,
    long: int,
    heads: int = 5,
    capacity: int | None = None,
) -> None:
    """`chunks`: for each sequence the rows before this call and the tokens that it brings."""
    torch.manual_seed(len(chunks) + page)
    N, NOPE, V, R, D, splits, shortest = heads, 12, 28, 20, 6, 3, 4
    S, T, W = len(chunks), sum(count for _, count in chunks), R + D
    needed = [_ceil(before + count, page) for before, count in chunks]
    width = max(1, *needed) + 1
    free = iter((torch.randperm(sum(needed)) + 1).tolist())
    block_table = torch.zeros(S, width, dtype=torch.int32)
    cache = torch.full((sum(needed) + 1, page, W), float("nan"))
    for s, (before, _) in enumerate(chunks):
        block_table[s, : needed[s]] = torch.tensor([next(free) for _ in range(needed[s])], dtype=torch.int32)
        for p in range(before):
            cache[block_table[s, p // page], p % page] = torch.randn(W)
    cache = cache.to(cache_dtype)
    q, latent = torch.randn(T, N * (NOPE + D)).to(dtype), torch.randn(T, W).to(dtype)
    kv_b = (torch.randn(N * (NOPE + V), R) / R**0.5).to(torch.bfloat16)
    positions = torch.cat([torch.arange(before, before + count) for before, count in chunks]).int()
    query_start = torch.tensor([0, *(count for _, count in chunks)]).cumsum(0).int()
    inv_freq, scale = (1.0, 0.31, 0.017), 0.2
    place: Any = (positions, query_start, block_table)
    expected, rows = mla(q.float(), latent.float(), cache.float(), kv_b, *place, N, NOPE, V, scale, list(inv_freq))

    qa, out = _unwritten(T, N, W, dtype=dtype), _unwritten(T, N * V, dtype=dtype)
    part = _unwritten(T, splits, N, R, dtype=torch.float32)
    lse = _unwritten(T, splits, N, dtype=torch.float32)
    capacity = max(1, T // long) * width * page if capacity is None else capacity
    kv = _unwritten(capacity, N, NOPE + V, dtype=dtype)
    mla_gpu.rotate_append[(T,)](
        q,
        latent,
        *place,
        cache,
        qa,
        inv_freq,
        S,
        width,
        N,
        NOPE,
        R,
        D,
        page,
        _power(N),
        _power(R),
        _power(D // 2),
        True,
    )
    mla_gpu.absorb[(_ceil(T, 4), N, _ceil(R, 16))](q, kv_b, query_start, qa, S, T, N, NOPE, V, R, D, 16, 4, 16, True)
    mla_gpu.split[(_ceil(N, 4), splits, T)](
        qa,
        cache,
        *place,
        part,
        lse,
        S,
        width,
        scale,
        splits,
        shortest,
        capacity,
        N,
        R,
        D,
        page,
        long,
        4,
        8,
        16,
        8,
        True,
    )
    mla_gpu.combine[(N, _ceil(T, 4))](part, lse, kv_b, query_start, out, S, splits, N, NOPE, V, R, 8, 32, 4, True)
    mla_gpu.expand[(2, N)](
        cache, kv_b, *place, kv, S, width, 2, capacity, N, NOPE + V, R, D, page, long, 8, 8, 64, True
    )
    mla_gpu.prefill[(_ceil(T, 8) + T // long, N)](
        q, qa, kv, cache, *place, out, S, width, scale, capacity, N, NOPE, V, R, D, page, long, 8, 8, 16, 8, 32, True
    )
    assert _relative(out, expected) < TOLERANCES[torch.bfloat16 if cache_dtype == torch.bfloat16 else dtype]
    assert torch.equal(cache.isnan(), rows.isnan())
    error = (cache.float() - rows).nan_to_num()
    assert float(error.abs().max()) < (1e-6 if cache_dtype == torch.float32 else 0.04)


@pytest.mark.parametrize(
    ("chunks", "page"),
    [
        ([(0, 1)], 5),
        ([(7, 1), (0, 3), (22, 2), (0, 1)], 1),
        ([(0, 13)], 5),
        ([(3, 9), (17, 1), (0, 0), (5, 12), (0, 2)], 8),
    ],
    ids=["one token", "ragged decode", "prefill", "mixed over a cached prefix"],
)
def test_attention(chunks: list[Chunk], page: int) -> None:
    _attention(torch.float32, torch.float32, chunks, page, long=8)


@pytest.mark.parametrize("capacity", [0, 11, 12, 44], ids=["none", "one row short", "the first", "all"])
def test_long_sequences_that_find_no_room_are_attended_as_short_ones(capacity: int) -> None:
    _attention(torch.float32, torch.float32, [(3, 9), (17, 1), (5, 12), (6, 9)], page=8, long=8, capacity=capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_bfloat16_cache(dtype: torch.dtype) -> None:
    _attention(dtype, torch.bfloat16, [(9, 1), (2, 10)], page=4, long=8)


def test_more_sequences_than_one_scan_holds() -> None:
    _attention(torch.float32, torch.float32, [(0, 1)] * 128 + [(1, 8), (2, 1)], page=4, long=8, heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 64, 48), (5, 40, 33), (9, 24, 1)])
def test_linear(dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(torch.bfloat16)
    y = _unwritten(tokens, outputs, dtype=dtype)
    linear_gpu.linear[(_ceil(tokens, 8), _ceil(outputs, 16))](x, weight, y, tokens, inputs, outputs, 16, 8, 16, True)
    assert _relative(y, x.float() @ weight.float().T) < TOLERANCES[dtype]
