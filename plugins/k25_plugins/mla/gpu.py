"""GPU kernels of `k25.MLA` over the paged latent cache, in the Triton language.

    rotate_append   rotates q and k, writes the rows of the cache                          every token
    absorb          q_nope @ UK                                                            short sequences
    split           attends over one share of the context, a group of heads at once   short sequences
    combine         weights the shares, @ UV                                               short sequences
    expand          keys and values of the context from its latents                        long sequences
    prefill         causal attention on the expanded heads                                 long sequences

A sequence is long where this call brings at least `LONG` of its tokens: then expanding its context costs less than
attending in the latent space. It also has to fit: expanded rows of the long sequences lie one after the other, and
where they would end past `capacity` rows the sequence is attended as a short one. Each program decides that on the
device, so one call serves any mix and may be captured in a CUDA graph; grids are bounds that follow from shapes, and
programs without work leave at once.

Rows that a token does not see are never read, or read as zero: what they hold reaches nobody, NaN included.
Legend: T tokens, N heads, R latent rank, W = R + D the width of a cache row, D rope width, S sequences, B context rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k25_plugins.triton_math import dot, rounded

LOG2E = tl.constexpr(1.4426950408889634)
#: Sequences looked at in one step of a scan.
SCAN = tl.constexpr(128)


@triton.jit
def sequence_of(query_start, sequences, token):
    """The sequence that a token belongs to: how many sequences end at or before it."""
    found = 0
    for base in range(0, sequences, SCAN):
        s = base + tl.arange(0, SCAN)
        end = tl.load(query_start + 1 + s, mask=s < sequences, other=0x7FFFFFFF)
        found += tl.sum((end <= token).to(tl.int32))
    return found


@triton.jit
def long_before(query_start, positions, sequences, wanted, LONG: tl.constexpr):
    """Context rows of the long sequences before sequence `wanted`: where its expanded rows start."""
    rows = tl.zeros((), tl.int64)
    for base in range(0, sequences, SCAN):
        s = base + tl.arange(0, SCAN)
        known = s < wanted
        lo = tl.load(query_start + s, mask=known, other=0)
        hi = tl.load(query_start + 1 + s, mask=known, other=0)
        is_long = hi - lo >= LONG
        last = tl.load(positions + hi - 1, mask=is_long, other=-1)
        rows += tl.sum((last + 1).to(tl.int64))
    return rows


@triton.jit
def cache_rows(block_table, sequence, place, seen, blocks_per_sequence, PAGE: tl.constexpr):
    """Rows of the cache [blocks * PAGE] that hold these positions of a sequence, int64; 0 where not `seen`."""
    at = block_table + sequence.to(tl.int64) * blocks_per_sequence + place // PAGE
    return tl.load(at, mask=seen, other=0).to(tl.int64) * PAGE + place % PAGE


@triton.jit
def rotate_append(
    q,
    latent,
    positions,
    query_start,
    block_table,
    cache,
    qa,
    inv_freq,
    sequences,
    blocks_per_sequence,
    N: tl.constexpr,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    NB: tl.constexpr,
    RB: tl.constexpr,
    FB: tl.constexpr,
    UP: tl.constexpr,
):
    """A token's row of the cache, and its rotated q in `qa` [T, N, W] behind the first R. Grid (T,).

    `inv_freq` is a tuple of D / 2 floats. NB, RB and FB are powers of two that hold N, R and D / 2.
    """
    token = tl.program_id(0)
    if token < tl.load(query_start + sequences):
        W: tl.constexpr = R + D
        position = tl.load(positions + token)
        pair = tl.arange(0, FB)
        frequency = tl.zeros((FB,), tl.float32)
        for i in tl.static_range(D // 2):
            frequency = tl.where(pair == i, inv_freq[i], frequency)
        angle = position.to(tl.float32) * frequency
        cos = tl.cos(angle)
        sin = tl.sin(angle)
        is_pair = pair < D // 2

        sequence = sequence_of(query_start, sequences, token)
        row = cache_rows(block_table, sequence, position, position >= 0, blocks_per_sequence, PAGE) * W
        source = latent + token.to(tl.int64) * W
        r = tl.arange(0, RB)
        kind = cache.dtype.element_ty
        tl.store(cache + row + r, rounded(tl.load(source + r, mask=r < R).to(tl.float32), kind, UP), mask=r < R)
        first = tl.load(source + R + 2 * pair, mask=is_pair, other=0.0).to(tl.float32)
        second = tl.load(source + R + 2 * pair + 1, mask=is_pair, other=0.0).to(tl.float32)
        tl.store(cache + row + R + 2 * pair, rounded(first * cos - second * sin, kind, UP), mask=is_pair)
        tl.store(cache + row + R + 2 * pair + 1, rounded(first * sin + second * cos, kind, UP), mask=is_pair)

        head = tl.arange(0, NB)[:, None]
        is_both = (head < N) & is_pair[None, :]
        at = q + (token.to(tl.int64) * N + head) * (NOPE + D) + NOPE + 2 * pair[None, :]
        first_N = tl.load(at, mask=is_both, other=0.0).to(tl.float32)
        second_N = tl.load(at + 1, mask=is_both, other=0.0).to(tl.float32)
        to = qa + (token.to(tl.int64) * N + head) * W + R + 2 * pair[None, :]
        like = qa.dtype.element_ty
        tl.store(to, rounded(first_N * cos[None, :] - second_N * sin[None, :], like, UP), mask=is_both)
        tl.store(to + 1, rounded(first_N * sin[None, :] + second_N * cos[None, :], like, UP), mask=is_both)


@triton.jit
def absorb(
    q,
    kv_b,
    query_start,
    qa,
    sequences,
    tokens,
    N: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DB: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    UP: tl.constexpr,
):
    """`qa` [T, N, :R] = q_nope @ UK of the head. Grid (cdiv(T, BM), N, cdiv(R, BR)). DB is a power of two >= NOPE."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    live = tl.load(query_start + sequences)
    if tl.program_id(0) * BM < live:
        d = tl.arange(0, DB)
        is_token = token < live
        at = q + (token[:, None].to(tl.int64) * N + head) * (NOPE + D) + d[None, :]
        qn = tl.load(at, mask=is_token[:, None] & (d < NOPE)[None, :], other=0.0)
        weight = kv_b + (head * (NOPE + V) + d[:, None]) * R + r[None, :]
        uk = tl.load(weight, mask=(d < NOPE)[:, None] & (r < R)[None, :], other=0.0).to(qn.dtype)
        value = dot(qn, uk, tl.zeros((BM, BR), tl.float32), UP)
        to = qa + (token[:, None].to(tl.int64) * N + head) * (R + D) + r[None, :]
        tl.store(to, rounded(value, qa.dtype.element_ty, UP), mask=is_token[:, None] & (r < R)[None, :])


@triton.jit
def split(
    qa,
    cache,
    positions,
    query_start,
    block_table,
    part,
    lse,
    sequences,
    blocks_per_sequence,
    scale,
    splits,
    min_chunk,
    capacity,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    LONG: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    UP: tl.constexpr,
):
    """Attention of one token over one share of its context. Grid (cdiv(N, BH), splits, T).

    `part` float32 [T, splits, N, R] is normalised; `lse` float32 [T, splits, N] is in base 2, -inf for an empty share
    (whose `part` is not written), as all are of a token of a long sequence. The latent is read in two halves of RB
    columns, once for keys and values together.
    """
    token = tl.program_id(2)
    share = tl.program_id(1)
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    is_head = head < N
    if token < tl.load(query_start + sequences):
        sequence = sequence_of(query_start, sequences, token)
        brought = tl.load(query_start + sequence + 1) - tl.load(query_start + sequence)
        is_short = brought < LONG
        if brought >= LONG:
            is_short = long_before(query_start, positions, sequences, sequence + 1, LONG) > capacity
        length = tl.where(is_short, tl.load(positions + token) + 1, 0)
        chunk = tl.cdiv(tl.maximum(tl.cdiv(length, splits), min_chunk), BN) * BN
        lo = share * chunk
        hi = tl.minimum(lo + chunk, length)
        at_lse = lse + (token.to(tl.int64) * splits + share) * N + head
        W: tl.constexpr = R + D
        if lo >= hi:
            tl.store(at_lse, tl.full((BH,), float("-inf"), tl.float32), mask=is_head)
        else:
            r = tl.arange(0, RB)
            d = tl.arange(0, DB)
            mine = qa + (token.to(tl.int64) * N + head[:, None]) * W
            q0 = tl.load(mine + r[None, :], mask=is_head[:, None] & (r < R)[None, :], other=0.0)
            q1 = tl.load(mine + RB + r[None, :], mask=is_head[:, None] & (RB + r < R)[None, :], other=0.0)
            qr = tl.load(mine + R + d[None, :], mask=is_head[:, None] & (d < D)[None, :], other=0.0)
            top = tl.full((BH,), float("-inf"), tl.float32)
            total = tl.zeros((BH,), tl.float32)
            acc0 = tl.zeros((BH, RB), tl.float32)
            acc1 = tl.zeros((BH, RB), tl.float32)
            for base in range(lo, hi, BN):
                place = base + tl.arange(0, BN)
                seen = place < hi
                row = cache + cache_rows(block_table, sequence, place, seen, blocks_per_sequence, PAGE)[:, None] * W
                c0 = tl.load(row + r[None, :], mask=seen[:, None] & (r < R)[None, :], other=0.0).to(q0.dtype)
                c1 = tl.load(row + RB + r[None, :], mask=seen[:, None] & (RB + r < R)[None, :], other=0.0).to(q0.dtype)
                kr = tl.load(row + R + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0).to(q0.dtype)
                s = dot(q0, tl.trans(c0), tl.zeros((BH, BN), tl.float32), UP)
                s = dot(q1, tl.trans(c1), s, UP)
                s = dot(qr, tl.trans(kr), s, UP)
                s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                shrink = tl.exp2(top - higher)
                p = tl.exp2(s - higher[:, None])
                total = total * shrink + tl.sum(p, 1)
                p = rounded(p, q0.dtype, UP)
                acc0 = dot(p, c0, acc0 * shrink[:, None], UP)
                acc1 = dot(p, c1, acc1 * shrink[:, None], UP)
                top = higher
            to = part + ((token.to(tl.int64) * splits + share) * N + head[:, None]) * R
            tl.store(to + r[None, :], acc0 / total[:, None], mask=is_head[:, None] & (r < R)[None, :])
            tl.store(to + RB + r[None, :], acc1 / total[:, None], mask=is_head[:, None] & (RB + r < R)[None, :])
            tl.store(at_lse, top + tl.log2(total), mask=is_head)


@triton.jit
def combine(
    part,
    lse,
    kv_b,
    query_start,
    out,
    sequences,
    splits,
    N: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    VB: tl.constexpr,
    BT: tl.constexpr,
    UP: tl.constexpr,
):
    """`out` [T, N * V]: the shares of each token weighted by their sums, times UV of the head. Grid (N, cdiv(T, BT)).

    A token without any share belongs to a long sequence: its row is left to `prefill`.
    """
    head = tl.program_id(0)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    known = token < tl.load(query_start + sequences)
    top = tl.full((BT,), float("-inf"), tl.float32)
    for share in range(0, splits):
        value = tl.load(lse + (token.to(tl.int64) * splits + share) * N + head, mask=known, other=float("-inf"))
        top = tl.maximum(top, value)
    live = top > float("-inf")
    if tl.sum(live.to(tl.int32)) > 0:
        v = tl.arange(0, VB)
        kind = out.dtype.element_ty
        value = tl.zeros((BT, VB), tl.float32)
        for base in range(0, R, BK):
            r = base + tl.arange(0, BK)
            total = tl.zeros((BT,), tl.float32)
            z = tl.zeros((BT, BK), tl.float32)
            for share in range(0, splits):
                at = (token.to(tl.int64) * splits + share) * N + head
                sum2 = tl.load(lse + at, mask=known, other=float("-inf"))
                has = live & (sum2 != float("-inf"))
                weight = tl.where(has, tl.exp2(sum2 - top), 0.0)
                mine = part + at[:, None] * R + r[None, :]
                z += weight[:, None] * tl.load(mine, mask=has[:, None] & (r < R)[None, :], other=0.0)
                total += weight
            z = z / tl.where(live, total, 1.0)[:, None]
            uv = kv_b + (head * (NOPE + V) + NOPE + v[None, :]) * R + r[:, None]
            uv = tl.load(uv, mask=(v < V)[None, :] & (r < R)[:, None], other=0.0).to(kind)
            value = dot(rounded(z, kind, UP), uv, value, UP)
        to = out + (token[:, None].to(tl.int64) * N + head) * V + v[None, :]
        tl.store(to, rounded(value, kind, UP), mask=live[:, None] & (v < V)[None, :])


@triton.jit
def context_tile(query_start, positions, sequences, tile, BM: tl.constexpr, LONG: tl.constexpr):
    """(sequence, its tile, expanded rows before it, all tiles) of a tile of the contexts of the long sequences."""
    found = 0
    before = 0
    passed = 0
    rows = tl.zeros((), tl.int64)
    for base in range(0, sequences, SCAN):
        s = base + tl.arange(0, SCAN)
        known = s < sequences
        lo = tl.load(query_start + s, mask=known, other=0)
        hi = tl.load(query_start + 1 + s, mask=known, other=0)
        is_long = known & (hi - lo >= LONG)
        length = tl.load(positions + hi - 1, mask=is_long, other=-1) + 1
        tiles = tl.cdiv(length, BM)
        is_past = known & (passed + tl.cumsum(tiles, 0) <= tile)
        found += tl.sum(is_past.to(tl.int32))
        before += tl.sum(tl.where(is_past, tiles, 0))
        rows += tl.sum(tl.where(is_past, length, 0).to(tl.int64))
        passed += tl.sum(tiles)
    return found, tile - before, rows, passed


@triton.jit
def expand(
    cache,
    kv_b,
    positions,
    query_start,
    block_table,
    kv,
    sequences,
    blocks_per_sequence,
    lanes,
    capacity,
    N: tl.constexpr,
    KV: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    LONG: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    KVB: tl.constexpr,
    UP: tl.constexpr,
):
    """`kv` [B, N, KV]: the heads' keys (without rope) and values of the contexts of the long sequences.

    KV = nope + v; KVB is a power of two that holds it. Grid (lanes, N): a program takes every `lanes`-th tile.
    """
    head = tl.program_id(1)
    _past, _of_it, _rows, all_tiles = context_tile(query_start, positions, sequences, 0, BM, LONG)
    for tile in range(tl.program_id(0), all_tiles, lanes):
        sequence, mine, start, _all = context_tile(query_start, positions, sequences, tile, BM, LONG)
        length = tl.load(positions + tl.load(query_start + sequence + 1) - 1) + 1
        if start + length <= capacity:
            place = mine * BM + tl.arange(0, BM)
            seen = place < length
            row = cache_rows(block_table, sequence, place, seen, blocks_per_sequence, PAGE) * (R + D)
            column = tl.arange(0, KVB)
            kind = kv.dtype.element_ty
            acc = tl.zeros((BM, KVB), tl.float32)
            for base in range(0, R, BK):
                r = base + tl.arange(0, BK)
                c = tl.load(cache + row[:, None] + r[None, :], mask=seen[:, None] & (r < R)[None, :], other=0.0)
                weight = kv_b + (head * KV + column[None, :]) * R + r[:, None]
                w = tl.load(weight, mask=(column < KV)[None, :] & (r < R)[:, None], other=0.0)
                acc = dot(c.to(kind), w.to(kind), acc, UP)
            to = kv + ((start + place[:, None]) * N + head) * KV + column[None, :]
            tl.store(to, rounded(acc, kind, UP), mask=seen[:, None] & (column < KV)[None, :])


@triton.jit
def long_tile(query_start, sequences, tile, BM: tl.constexpr, LONG: tl.constexpr):
    """(sequence, tile within it) of a tile of queries counted over the long sequences; sequence = S past the last."""
    found = 0
    before = 0
    passed = 0
    for base in range(0, sequences, SCAN):
        s = base + tl.arange(0, SCAN)
        known = s < sequences
        lo = tl.load(query_start + s, mask=known, other=0)
        hi = tl.load(query_start + 1 + s, mask=known, other=0)
        tiles = tl.where(hi - lo >= LONG, tl.cdiv(hi - lo, BM), 0)
        end = passed + tl.cumsum(tiles, 0)
        is_past = known & (end <= tile)
        found += tl.sum(is_past.to(tl.int32))
        before += tl.sum(tl.where(is_past, tiles, 0))
        passed += tl.sum(tiles)
    return found, tile - before


@triton.jit
def prefill(
    q,
    qa,
    kv,
    cache,
    positions,
    query_start,
    block_table,
    out,
    sequences,
    blocks_per_sequence,
    scale,
    capacity,
    N: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    LONG: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NOPEB: tl.constexpr,
    DB: tl.constexpr,
    VB: tl.constexpr,
    UP: tl.constexpr,
):
    """Causal attention of the long sequences' queries on their expanded heads. Grid (cdiv(T, BM) + T // LONG, N).

    A query sees the positions up to its own. Rotated q comes from `qa`, rotated k from the cache, the rest from `kv`.
    """
    sequence, tile = long_tile(query_start, sequences, tl.program_id(0), BM, LONG)
    fits = sequence < sequences
    if fits:
        fits = long_before(query_start, positions, sequences, sequence + 1, LONG) <= capacity
    if fits:
        head = tl.program_id(1)
        W: tl.constexpr = R + D
        KV: tl.constexpr = NOPE + V
        first = tl.load(query_start + sequence) + tile * BM
        end = tl.load(query_start + sequence + 1)
        token = first + tl.arange(0, BM)
        is_query = token < end
        own = tl.load(positions + token, mask=is_query, other=-1)
        n = tl.arange(0, NOPEB)
        d = tl.arange(0, DB)
        v = tl.arange(0, VB)
        is_n = is_query[:, None] & (n < NOPE)[None, :]
        qn = tl.load(q + (token[:, None].to(tl.int64) * N + head) * (NOPE + D) + n[None, :], mask=is_n, other=0.0)
        is_d = is_query[:, None] & (d < D)[None, :]
        qr = tl.load(qa + (token[:, None].to(tl.int64) * N + head) * W + R + d[None, :], mask=is_d, other=0.0)
        kind = qn.dtype
        start = long_before(query_start, positions, sequences, sequence, LONG)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, VB), tl.float32)
        length = tl.max(own, 0) + 1
        for base in range(0, length, BN):
            place = base + tl.arange(0, BN)
            seen = place < length
            at = kv + ((start + place[:, None]) * N + head) * KV
            k = tl.load(at + n[None, :], mask=seen[:, None] & (n < NOPE)[None, :], other=0.0)
            row = cache_rows(block_table, sequence, place, seen, blocks_per_sequence, PAGE) * W + R
            kr = tl.load(cache + row[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0).to(kind)
            s = dot(qn, tl.trans(k), tl.zeros((BM, BN), tl.float32), UP)
            s = dot(qr, tl.trans(kr), s, UP)
            s = tl.where(place[None, :] <= own[:, None], s * (scale * LOG2E), float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            higher = tl.where(is_query, higher, 0.0)
            shrink = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            values = tl.load(at + NOPE + v[None, :], mask=seen[:, None] & (v < V)[None, :], other=0.0)
            acc = dot(rounded(p, kind, UP), values, acc * shrink[:, None], UP)
            top = higher
        to = out + (token[:, None].to(tl.int64) * N + head) * V + v[None, :]
        value = rounded(acc / tl.where(is_query, total, 1.0)[:, None], out.dtype.element_ty, UP)
        tl.store(to, value, mask=is_query[:, None] & (v < V)[None, :])
