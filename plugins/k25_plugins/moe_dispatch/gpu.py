"""GPU kernels of `k25.MoEDispatch` in the Triton language.

A pair is (token, one of its K experts); its number is token * K + slot. Three ways to find what an expert has to do:

- `PAIRS`: few tokens. A program serves one pair and reads the expert's id itself; nothing is routed.
- `route_small`: up to 512 pairs, one program sorts them by expert.
- `route_large`: any number; one program for each expert lists its pairs.

then `gate_up` (SwiGLU fused), `down` and `combine`. Nothing is counted on the host: grids follow from shapes, bounds
are read on the device, so a launch may be captured in a CUDA graph. There are no atomics: results are the same in every
run.

Weights are the rows of a matrix product (`W @ x^T`), and the eight nibbles of a word are eight slices of K: slice j
holds nibble j of every word. Activations are stored in that order, so words go to the tensor cores as they lie in the
checkpoint: `permuted[.., b, j, i] = plain[.., b * BK + 8 * i + j]`. A row is as long as its whole blocks; what lies
behind the columns of the last block is neither written nor read.

An expert that is not held (table row of -1) and an id outside the table add nothing, and their rows are never read.
Legend: T tokens, H hidden, I expert width, E experts, P pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k25_plugins.triton_math import dot, rounded, unpacked_slice

#: Columns of the expert table that are read (`EXPERT_TABLE_COLUMNS`).
TABLE_COLUMNS = tl.constexpr(6)


@triton.constexpr_function
def width(columns, block):
    """Columns of a row of whole blocks."""
    return -(-columns // block) * block


@triton.jit
def permute_x(x, out, H: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr):
    """`x` [T, H] into the order of the slices, `out` [T, width of H]. Grid (T, cdiv(width of H, BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place % BK
    source = place - inside + 8 * (inside % (BK // 8)) + inside // (BK // 8)
    tl.store(out + token * width(H, BK) + place, tl.load(x + token * H + source, mask=source < H), mask=source < H)


@triton.jit
def is_held(table, expert, experts):
    """Whether the table has a row for this expert that is not -1."""
    known = (expert >= 0) & (expert < experts)
    return known & (tl.load(table + expert.to(tl.int64) * TABLE_COLUMNS, mask=known, other=-1) >= 0)


@triton.jit
def route_small(ids, table, order, start, count, active, pairs, experts, P: tl.constexpr, E: tl.constexpr):
    """Pairs sorted by expert, all in one program: `order` [P], `start` and `count` [E], `active` [1 + slots].

    `active[0]` is the number of experts with pairs, then their ids. P and E are powers of two that hold them.
    """
    pair = tl.arange(0, P)
    expert = tl.arange(0, E)
    chosen = tl.load(ids + pair, mask=pair < pairs, other=-1)
    is_mine = (pair < pairs) & is_held(table, chosen, experts)
    held = tl.where(expert < experts, tl.histogram(tl.where(is_mine, chosen, 0), E, mask=is_mine), 0)
    first = tl.cumsum(held, 0) - held
    slot = tl.cumsum((held > 0).to(tl.int32), 0) - 1
    tl.store(start + expert, first, mask=expert < experts)
    tl.store(count + expert, held, mask=expert < experts)
    tl.store(active + 1 + slot, expert, mask=held > 0)
    tl.store(active, tl.sum((held > 0).to(tl.int32)))
    key = tl.sort(tl.where(is_mine, chosen * P + pair, 0x7FFFFFFF))
    tl.store(order + pair, key % P, mask=key < 0x7FFFFFFF)


@triton.jit
def route_large(ids, table, order, start, count, active, pairs, experts, BLOCK: tl.constexpr):
    """As `route_small` for any number of pairs; `active` is the identity. Program e scans all ids. Grid (experts,)."""
    mine = tl.program_id(0)
    before = 0
    total = 0
    is_here = is_held(table, mine, experts)
    for base in range(0, pairs, BLOCK):
        pair = base + tl.arange(0, BLOCK)
        chosen = tl.load(ids + pair, mask=pair < pairs, other=-1)
        before += tl.sum(((chosen >= 0) & (chosen < mine)).to(tl.int32))
        total += tl.sum((chosen == mine).to(tl.int32))
    total = tl.where(is_here, total, 0)
    tl.store(start + mine, before)
    tl.store(count + mine, total)
    tl.store(active + 1 + mine, mine)
    if mine == 0:
        tl.store(active, experts)
    if total > 0:
        place = before
        for base in range(0, pairs, BLOCK):
            pair = base + tl.arange(0, BLOCK)
            chosen = tl.load(ids + pair, mask=pair < pairs, other=-1)
            is_mine = (chosen == mine).to(tl.int32)
            tl.store(order + place + tl.cumsum(is_mine, 0) - 1, pair, mask=is_mine > 0)
            place += tl.sum(is_mine)


@triton.jit
def weight_rows(table, expert, column: tl.constexpr, ALIGNED: tl.constexpr):
    """First row (of 8 bytes) of one tensor of an expert. `ALIGNED`: every tensor starts at a multiple of 16 bytes."""
    row = tl.load(table + expert.to(tl.int64) * TABLE_COLUMNS + column)
    if ALIGNED:
        row = tl.multiple_of(row, 2)
    return row


@triton.jit
def tile_product(
    words,
    scales,
    word_row,
    scale_row,
    features,
    FEATURES: tl.constexpr,
    x,
    rows,
    is_row,
    K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """acc [BN, BM] = W[features, :] @ x[rows, :]^T over the whole of K; `x` [.., width of K] is permuted."""
    acc = tl.zeros((BN, BM), tl.float32)
    lane = tl.arange(0, BK // 8)
    group = tl.arange(0, BK // 32)
    is_feature = features < FEATURES
    word_at = words + word_row * 2 + features[:, None].to(tl.int64) * (K // 8)
    scale_at = scales + scale_row * 4 + features[:, None].to(tl.int64) * (K // 32)
    for block in range(0, tl.cdiv(K, BK)):
        is_word = is_feature[:, None]
        is_scale = is_feature[:, None]
        is_x = is_row[None, :]
        if K % BK != 0:
            is_word = is_word & (block * (BK // 8) + lane < K // 8)[None, :]
            is_scale = is_scale & (block * (BK // 32) + group < K // 32)[None, :]
            is_x = is_x & (block * (BK // 8) + lane < K // 8)[:, None]
        w = tl.load(word_at + block * (BK // 8) + lane[None, :], mask=is_word, other=0)
        s = tl.load(scale_at + block * (BK // 32) + group[None, :], mask=is_scale, other=0.0)
        s = tl.reshape(tl.broadcast_to(s[:, :, None], (BN, BK // 32, 4)), (BN, BK // 8))
        for j in tl.static_range(8):
            part = block * BK + j * (BK // 8) + lane
            xs = tl.load(x + rows[None, :].to(tl.int64) * width(K, BK) + part[:, None], mask=is_x, other=0.0)
            acc = dot(unpacked_slice(w, s, j, xs.dtype, UP), xs, acc, UP)
    return acc


@triton.jit
def listed_pairs(
    ids, order, start, count, active, table, slot, lane, pairs, experts, BM: tl.constexpr, PAIRS: tl.constexpr
):
    """(expert, first place, end of the places, whether there is work) of a program."""
    if PAIRS:
        expert = tl.load(ids + slot)
        works = is_held(table, expert, experts)
        return expert, slot, slot + 1, works
    works = slot < tl.load(active)
    expert = tl.load(active + 1 + slot, mask=works, other=0)
    first = tl.load(start + expert)
    end = first + tl.load(count + expert)
    return expert, first + lane * BM, end, works


@triton.jit
def gate_up_tile(
    x,
    words,
    scales,
    table,
    order,
    h,
    expert,
    features,
    base,
    end,
    K_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    H_BK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UP: tl.constexpr,
):
    """`gate_up` of BM places of an expert's list."""
    place = base + tl.arange(0, BM)
    is_row = place < end
    if PAIRS:  # noqa: SIM108 (PAIRS is decided when it is compiled)
        pair = place
    else:
        pair = tl.load(order + place, mask=is_row, other=0)
    token = pair // K_EXPERTS
    gate = tile_product(
        words,
        scales,
        weight_rows(table, expert, 0, ALIGNED),
        weight_rows(table, expert, 1, ALIGNED),
        features,
        INTER,
        x,
        token,
        is_row,
        H,
        BN,
        BM,
        BK,
        UP,
    )
    up = tile_product(
        words,
        scales,
        weight_rows(table, expert, 2, ALIGNED),
        weight_rows(table, expert, 3, ALIGNED),
        features,
        INTER,
        x,
        token,
        is_row,
        H,
        BN,
        BM,
        BK,
        UP,
    )
    value = gate / (1.0 + tl.exp(-gate)) * up
    inside = features % H_BK
    column = features - inside + (inside % 8) * (H_BK // 8) + inside // 8
    at = h + place[None, :].to(tl.int64) * width(INTER, H_BK) + column[:, None]
    tl.store(at, rounded(value, h.dtype.element_ty, UP), mask=(features < INTER)[:, None] & is_row[None, :])


@triton.jit
def gate_up(
    x,
    words,
    scales,
    table,
    ids,
    order,
    start,
    count,
    active,
    h,
    pairs,
    experts,
    lanes,
    K_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TAIL: tl.constexpr,
    BK: tl.constexpr,
    H_BK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UP: tl.constexpr,
):
    """`h` [P, width of I] = silu(gate x) * (up x), rows in the order of the lists, columns permuted for `down` (H_BK).

    The last TAIL places of a list, or fewer, are a narrower tile. Grid (lanes, cdiv(I, BN), slots): tiles of one expert
    that share weights are neighbours.
    """
    lane = tl.program_id(0)
    slot = tl.program_id(2)
    expert, first, end, works = listed_pairs(
        ids, order, start, count, active, table, slot, lane, pairs, experts, BM, PAIRS
    )
    if works:
        features = tl.program_id(1) * BN + tl.arange(0, BN)
        for base in range(first, end, BM * lanes):
            whole = True
            if TAIL < BM:
                whole = end - base > TAIL
            if whole:
                gate_up_tile(
                    x, words, scales, table, order, h, expert, features, base, end,
                    K_EXPERTS, H, INTER, BN, BM, BK, H_BK, PAIRS, ALIGNED, UP,
                )  # fmt: skip
            else:
                gate_up_tile(
                    x, words, scales, table, order, h, expert, features, base, end,
                    K_EXPERTS, H, INTER, BN, TAIL, BK, H_BK, PAIRS, ALIGNED, UP,
                )  # fmt: skip


@triton.jit
def down_tile(
    h,
    words,
    scales,
    table,
    order,
    out,
    expert,
    features,
    base,
    end,
    H: tl.constexpr,
    INTER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UP: tl.constexpr,
):
    """`down` of BM places of an expert's list."""
    place = base + tl.arange(0, BM)
    is_row = place < end
    if PAIRS:  # noqa: SIM108 (PAIRS is decided when it is compiled)
        pair = place
    else:
        pair = tl.load(order + place, mask=is_row, other=0)
    value = tile_product(
        words,
        scales,
        weight_rows(table, expert, 4, ALIGNED),
        weight_rows(table, expert, 5, ALIGNED),
        features,
        H,
        h,
        place,
        is_row,
        INTER,
        BN,
        BM,
        BK,
        UP,
    )
    at = out + pair[None, :].to(tl.int64) * H + features[:, None]
    tl.store(at, rounded(value, out.dtype.element_ty, UP), mask=(features < H)[:, None] & is_row[None, :])


@triton.jit
def down(
    h,
    words,
    scales,
    table,
    ids,
    order,
    start,
    count,
    active,
    out,
    pairs,
    experts,
    lanes,
    H: tl.constexpr,
    INTER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TAIL: tl.constexpr,
    BK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UP: tl.constexpr,
):
    """`out` [P, H], a row for each pair = down_proj of its row of `h`. Grid (lanes, cdiv(H, BN), slots)."""
    lane = tl.program_id(0)
    slot = tl.program_id(2)
    expert, first, end, works = listed_pairs(
        ids, order, start, count, active, table, slot, lane, pairs, experts, BM, PAIRS
    )
    if works:
        features = tl.program_id(1) * BN + tl.arange(0, BN)
        for base in range(first, end, BM * lanes):
            whole = True
            if TAIL < BM:
                whole = end - base > TAIL
            if whole:
                down_tile(
                    h, words, scales, table, order, out, expert, features, base, end,
                    H, INTER, BN, BM, BK, PAIRS, ALIGNED, UP,
                )  # fmt: skip
            else:
                down_tile(
                    h, words, scales, table, order, out, expert, features, base, end,
                    H, INTER, BN, TAIL, BK, PAIRS, ALIGNED, UP,
                )  # fmt: skip


@triton.jit
def combine(
    partial,
    ids,
    weights,
    table,
    y,
    experts,
    K_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    UP: tl.constexpr,
):
    """`y` [T, H] = sum over a token's held experts of weight * partial, in float32 and in the order of the slots.

    Grid (T, cdiv(H, BLOCK)).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(K_EXPERTS):
        pair = token * K_EXPERTS + k
        works = is_held(table, tl.load(ids + pair), experts)
        inside = tl.where(works, column, H) < H
        value = tl.load(partial + pair * H + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + pair)
        acc += tl.where(works, value * weight, 0.0)
    tl.store(y + token * H + column, rounded(acc, y.dtype.element_ty, UP), mask=column < H)
