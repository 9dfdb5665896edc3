"""The native CPU kernel of `k25.MLA`, every code path, against the expanded form in float64 and the eager reference.

The oracle rounds what the op rounds on purpose (angles to float32, new rows to the cache's dtype) and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import own_threads

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.native_calls import call_native
from k25_plugins.native_library import Isa, Mode, NativeLibrary, Parallel, Run, native_library

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "avx512_bf16")
#: Relative L2 against float64: float32 sums; bf16 dot products; the output rounded to bfloat16 (half a unit at most).
EXACT, FAST, ROUNDED = 1e-5, 3e-3, 2.0**-8


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("the native library is not built: sh scripts/native.sh")
    return found


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, library: NativeLibrary) -> Isa:
    chosen: Isa = request.param
    if not library.supports(chosen):
        pytest.skip(f"this machine has no {chosen}")
    return chosen


@dataclass(frozen=True, kw_only=True)
class Case:
    """`sequences` are (rows already in the cache, new tokens). Odd sizes unless said otherwise."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 5
    nope: int = 12
    rope: int = 6
    v: int = 28
    rank: int = 20
    block_size: int = 3
    t: str = "float32"
    tc: str = "float32"
    scale: float = 1.0
    seed: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_heads": self.heads,
            "qk_nope_head_dim": self.nope,
            "v_head_dim": self.v,
            "softmax_scale": self.scale / float(np.sqrt(self.nope + self.rope)),
            "inv_freq": [0.9 ** (3 * index) for index in range(self.rope // 2)],
        }


def bits_of(values: Array) -> Array:
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def stored(values: Array, dtype: str) -> Array:
    return bits_of(values) if dtype == "bfloat16" else np.ascontiguousarray(values, np.float32)


def floats_of(values: Array) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


def inputs_of(case: Case) -> list[Array]:
    """The seven inputs. What no token may see (unused rows and blocks, rows not yet written) is NaN."""
    generator = np.random.default_rng(case.seed)
    width = case.rank + case.rope
    counts = [-(-(before + new) // case.block_size) for before, new in case.sequences]
    order = generator.permutation(sum(counts) + 2).astype(np.int32)
    table = np.zeros((len(counts), max(1, *counts) + 1), np.int32)
    cache = np.full((len(order), case.block_size, width), np.nan, np.float32)
    for row, (count, start) in enumerate(zip(counts, itertools.accumulate([0, *counts[:-1]]), strict=True)):
        table[row, :count] = order[start : start + count]
        for position in range(case.sequences[row][0]):
            block, slot = divmod(position, case.block_size)
            cache[table[row, block], slot] = generator.normal(size=width)
    new = [new for _, new in case.sequences]
    tokens = sum(new)
    positions = np.concatenate([np.arange(before, before + n) for before, n in case.sequences]).astype(np.int32)
    return [
        stored(generator.normal(size=(tokens, case.heads * (case.nope + case.rope))), case.t),
        stored(generator.normal(size=(tokens, width)), case.t),
        stored(cache, case.tc),
        bits_of(generator.normal(size=(case.heads * (case.nope + case.v), case.rank)) / np.sqrt(case.rank)),
        positions,
        np.array([0, *itertools.accumulate(new)], np.int32),
        table,
    ]


def native(
    library: NativeLibrary,
    case: Case,
    inputs: Sequence[Array],
    *,
    isa: Isa = "best",
    mode: Mode = "exact",
    parallel: Parallel | None = None,
    in_place: bool = True,
) -> tuple[Array, Array]:
    arrays = [array.copy() for array in inputs]
    outputs = {1: arrays[2]} if in_place else None
    out, cache = call_native(
        library, "MLA", arrays, case.attributes, outputs=outputs, mode=mode, isa=isa, parallel=parallel
    )
    if not in_place:
        np.testing.assert_array_equal(arrays[2], inputs[2])
    return out, cache


def rotated(vectors: Array, position: int, inv_freq: Sequence[float]) -> Array:
    angles = np.float32(position) * np.asarray(inv_freq, np.float32)
    pairs = np.asarray(vectors, np.float64).reshape(*vectors.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles.astype(np.float64))
    return np.stack([turned.real, turned.imag], -1).reshape(vectors.shape)


def expected_cache(case: Case, inputs: Sequence[Array]) -> Array:
    """The cache, in its own dtype, with the new rows in it."""
    _, latent, cache, _, positions, starts, table = inputs
    after = cache.copy()
    for sequence, (low, high) in enumerate(itertools.pairwise(starts)):
        for token in range(low, high):
            row = floats_of(latent)[token].astype(np.float64)
            row[case.rank :] = rotated(row[case.rank :], positions[token], case.attributes["inv_freq"])
            block, slot = divmod(int(positions[token]), case.block_size)
            after[table[sequence, block], slot] = stored(row, case.tc)
    return after


def expected(case: Case, inputs: Sequence[Array], after: Array, *, size: bool = False) -> Array:
    """`out` in float64 from the rows that the cache holds now: keys [UK c | k_rope], values UV c of each head.

    With `size`, what it would be if nothing that is added up in the values had a sign: where values cancel, an error is
    no part of their sum but of their size.
    """
    q, _, _, kv_b, positions, starts, table = inputs
    inv_freq, scale = case.attributes["inv_freq"], case.attributes["softmax_scale"]
    weights = floats_of(kv_b).astype(np.float64).reshape(case.heads, case.nope + case.v, case.rank)
    queries = floats_of(q).astype(np.float64).reshape(-1, case.heads, case.nope + case.rope)
    out = np.empty((len(positions), case.heads, case.v))
    for sequence, (low, high) in enumerate(itertools.pairwise(starts)):
        rows = floats_of(after)[table[sequence]].reshape(-1, case.rank + case.rope).astype(np.float64)
        keys = np.matmul(rows[:, : case.rank], weights[:, : case.nope].transpose(0, 2, 1))
        latents, uv = rows[:, : case.rank], weights[:, case.nope :]
        values = np.matmul(np.abs(latents), np.abs(uv).transpose(0, 2, 1)) if size else latents @ uv.transpose(0, 2, 1)
        for token in range(low, high):
            seen = slice(0, int(positions[token]) + 1)
            query = queries[token]
            turned = rotated(query[:, case.nope :], positions[token], inv_freq)
            scores = np.matmul(keys[:, seen], query[:, : case.nope, None])[..., 0]
            scores = scale * (scores + turned @ rows[seen, case.rank :].T)
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            out[token] = np.matmul(chances[:, None], values[:, seen])[:, 0]
    return out.reshape(len(positions), -1)


def relative_l2(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(floats_of(found) - wanted) / np.linalg.norm(wanted))


def tolerance(case: Case, isa: Isa, mode: Mode) -> float:
    uses_pairs = mode == "fast" and case.tc == "bfloat16" and isa in ("avx512_bf16", "best")
    return (FAST if uses_pairs else EXACT) + (ROUNDED if case.t == "bfloat16" else 0.0)


def check(library: NativeLibrary, case: Case, isa: Isa, mode: Mode, *, by_size: bool = False) -> None:
    inputs = inputs_of(case)
    out, cache = native(library, case, inputs, isa=isa, mode=mode)
    wanted, wanted_cache = expected(case, inputs, cache), expected_cache(case, inputs)
    size = np.linalg.norm(expected(case, inputs, cache, size=True) if by_size else wanted)
    assert np.linalg.norm(floats_of(out) - wanted) <= tolerance(case, isa, mode) * size
    ulp = 2.0**-7 if case.tc == "bfloat16" else 1e-6  # one step of the cache's dtype: sums before rounding differ
    np.testing.assert_allclose(floats_of(cache), floats_of(wanted_cache), rtol=ulp, atol=1e-6)


CASES = {
    "one token, nothing before": Case(sequences=((0, 1),)),
    "one head, one of all": Case(sequences=((4, 1),), heads=1, nope=1, rope=2, v=1, rank=1, block_size=1),
    "decode at block boundaries": Case(sequences=((15, 1), (16, 1), (17, 1), (31, 1), (32, 1)), block_size=16),
    "tile boundaries": Case(sequences=((62, 1), (63, 1), (64, 1), (127, 1), (128, 1)), block_size=5),
    "splits": Case(sequences=((511, 1), (512, 1), (1150, 1)), block_size=32, heads=3),
    "one long and many short": Case(sequences=((900, 1), *(((index, 1)) for index in range(9))), block_size=16),
    "sequences without a token": Case(sequences=((7, 0), (5, 1), (0, 0), (9, 2), (3, 0))),
    "more heads than a panel": Case(sequences=((40, 1), (3, 2)), heads=71, rank=33),
    "heads of three vectors": Case(sequences=((70, 1),), heads=41, block_size=1),
    "short contexts": Case(sequences=((255, 1), (0, 1), (3, 2)), heads=5, rank=75, block_size=3),
    "short contexts of whole vectors": Case(sequences=((254, 1), (126, 1)), heads=6, nope=32, rope=32, v=32, rank=288),
    "a context too long to be short": Case(sequences=((256, 1), (2, 1)), heads=5, rank=75, block_size=3),
    "a token too many to be short": Case(sequences=((9, 1), (255, 1), (1, 2), (0, 1)), heads=2, rank=40),
    "prefill": Case(sequences=((0, 150),), block_size=16, nope=24, v=24, rank=72),
    "chunk over a prefix": Case(sequences=((130, 90), (3, 77)), heads=2, rank=65, block_size=5),
    "prefill and decode": Case(sequences=((0, 100), (80, 1), (64, 64), (1, 3)), heads=3, rank=64, block_size=32),
    "more tokens than a wave": Case(sequences=((3, 1),) * 60, heads=71, nope=1, rope=2, v=1, rank=900),
    "values wider than all else": Case(sequences=((0, 40), (9, 1)), heads=2, nope=1, rope=2, v=150, rank=3),
    "wide heads in prefill": Case(sequences=((2, 70),), heads=2, nope=70, rope=10, v=81, rank=90, block_size=16),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("t", "tc"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_is_the_attention_of_the_expanded_form(library: NativeLibrary, isa: Isa, name: str, t: str, tc: str) -> None:
    for mode in ("fast", "exact"):
        check(library, replace(CASES[name], t=t, tc=tc), isa, mode)


def test_real_head_sizes(library: NativeLibrary, isa: Isa) -> None:
    sizes: dict[str, Any] = {"nope": 128, "rope": 64, "v": 128, "rank": 512, "block_size": 16}
    check(library, Case(sequences=((600, 1),), heads=64, **sizes), isa, "exact")
    check(library, Case(sequences=((200, 1),), heads=64, tc="bfloat16", **sizes), isa, "fast")
    check(library, Case(sequences=((20, 70),), heads=1, tc="bfloat16", **sizes), isa, "fast")


def test_prefill_of_more_tokens_than_pass_a_tile_together(library: NativeLibrary, isa: Isa) -> None:
    check(library, Case(sequences=((5, 2100),), heads=1, nope=2, rope=2, v=3, rank=4, block_size=32), isa, "exact")


def test_is_the_eager_reference(library: NativeLibrary, isa: Isa) -> None:
    case = Case(sequences=((30, 1), (0, 45), (12, 3)), t="bfloat16", tc="bfloat16")
    inputs = inputs_of(case)
    inputs[2] = bits_of(np.nan_to_num(floats_of(inputs[2])))
    tensors = [
        torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16) if a.dtype == np.uint16 else torch.from_numpy(a)
        for a in inputs
    ]
    wanted, wanted_cache = torch.ops.k25.mla(*tensors, *case.attributes.values())
    out, cache = native(library, case, inputs, isa=isa)
    np.testing.assert_allclose(floats_of(out), wanted.float().numpy(), rtol=2.0**-7, atol=1e-5)
    np.testing.assert_allclose(floats_of(cache), wanted_cache.float().numpy(), rtol=2.0**-7, atol=1e-6)


def test_far_positions_turn_by_the_angle_of_the_reference(library: NativeLibrary, isa: Isa) -> None:
    case = Case(sequences=((262_143, 1),), heads=1, nope=2, rope=8, v=3, rank=4, block_size=1024, tc="bfloat16")
    inputs = inputs_of(replace(case, sequences=((0, 1),)))
    inputs[2] = np.zeros((257, 1024, 12), np.uint16)
    inputs[4][:] = 262_143
    inputs[6] = np.arange(256, dtype=np.int32)[None]
    out, cache = native(library, case, inputs, isa=isa)
    np.testing.assert_allclose(floats_of(cache), floats_of(expected_cache(case, inputs)), rtol=2.0**-7)
    assert relative_l2(out, expected(case, inputs, cache)) <= EXACT


def test_separate_cache_output_is_a_copy(library: NativeLibrary) -> None:
    case = CASES["prefill and decode"]
    inputs = inputs_of(case)
    for left, right in zip(
        native(library, case, inputs, in_place=False), native(library, case, inputs, in_place=True), strict=True
    ):
        np.testing.assert_array_equal(left, right)


class Threads:
    """A `k25_parallel` over Python threads that takes the tasks in an order of its own."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.value = Parallel(Run(self._run), None)

    def _run(self, context: int | None, task: Callable[[int | None, int], None], state: int | None, count: int) -> None:
        order = np.random.default_rng(count).permutation(count).tolist()
        list(self.pool.map(lambda index: task(state, index), order))


def test_any_number_of_threads_gives_the_same_bits(library: NativeLibrary, isa: Isa) -> None:
    for name in ("one long and many short", "prefill and decode", "more heads than a panel"):
        case = CASES[name]
        inputs = inputs_of(case)
        out, cache = native(library, case, inputs, isa=isa)
        several = [Threads(threads).value for threads in (1, 2, 5)] + [own_threads(2), own_threads(5)]
        for parallel in several:
            again, cache_again = native(library, case, inputs, isa=isa, parallel=parallel)
            np.testing.assert_array_equal(out, again)
            np.testing.assert_array_equal(cache, cache_again)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_sequence_alone_and_in_a_batch_are_the_same_bits(library: NativeLibrary, isa: Isa, mode: Mode) -> None:
    case = replace(
        CASES["prefill and decode"], sequences=((0, 100), (700, 1), (64, 64), (1, 3), (2, 1)), rank=75, tc="bfloat16"
    )
    q, latent, cache, kv_b, positions, starts, table = inputs_of(case)
    whole, _ = native(library, case, [q, latent, cache, kv_b, positions, starts, table], isa=isa, mode=mode)
    for sequence, (low, high) in enumerate(itertools.pairwise(starts)):
        span = slice(low, high)
        count = np.array([0, high - low], np.int32)
        alone = [q[span], latent[span], cache, kv_b, positions[span], count, table[sequence : sequence + 1]]
        np.testing.assert_array_equal(native(library, case, alone, isa=isa, mode=mode)[0], whole[span])


def test_a_token_alone_and_among_many_agree(library: NativeLibrary, isa: Isa) -> None:
    """Few tokens of short contexts take another way than many: the sums are in another order."""
    case = replace(
        CASES["a token too many to be short"], sequences=((9, 1), (255, 1), (100, 1), (31, 1), (0, 1), (256, 1))
    )
    q, latent, cache, kv_b, positions, starts, table = inputs_of(case)
    whole, _ = native(library, case, [q, latent, cache, kv_b, positions, starts, table], isa=isa)
    for token in range(len(q)):
        span = slice(token, token + 1)
        one = [q[span], latent[span], cache, kv_b, positions[span], np.array([0, 1], np.int32), table[span]]
        alone, _ = native(library, case, one, isa=isa)
        np.testing.assert_allclose(alone, whole[span], rtol=1e-5, atol=1e-6)


def test_a_row_that_is_not_a_number_reaches_only_those_who_see_it(library: NativeLibrary, isa: Isa) -> None:
    """In the prefill of one sequence the last tokens are NaN: the tokens before must not notice, whatever the form."""
    for tokens, bad in ((90, 61), (90, 89), (4, 3)):
        case = replace(CASES["prefill"], sequences=((10, tokens),))
        inputs = inputs_of(case)
        clean, _ = native(library, case, inputs, isa=isa)
        for value in (np.nan, np.inf):
            inputs[1][bad:] = value
            out, _ = native(library, case, inputs, isa=isa)
            np.testing.assert_allclose(out[:bad], clean[:bad], rtol=1e-4, atol=1e-6)
            assert not np.isfinite(out[bad:]).any()


def test_tokens_of_a_sequence_may_come_in_any_order(library: NativeLibrary, isa: Isa) -> None:
    case = CASES["chunk over a prefix"]
    q, latent, cache, kv_b, positions, starts, table = inputs_of(case)
    wanted, _ = native(library, case, [q, latent, cache, kv_b, positions, starts, table], isa=isa)
    shuffled = np.random.default_rng(1).permutation
    order = np.concatenate([shuffled(np.arange(low, high)) for low, high in itertools.pairwise(starts)])
    out, _ = native(library, case, [q[order], latent[order], cache, kv_b, positions[order], starts, table], isa=isa)
    np.testing.assert_allclose(out, wanted[order], rtol=1e-4, atol=1e-5)


BAD_VALUES: dict[str, tuple[int, Any, int, str]] = {
    "position too far": (4, (0,), 1000, r"positions, token 0: expected 0 to \d+ .* found 1000"),
    "position below zero": (4, (2,), -1, r"positions, token 2: .* found -1"),
    "block past the cache": (6, (1, 0), 999, r"block_table, sequence 1, entry 0: expected 0 to \d+ .* found 999"),
    "block below zero": (6, (0, 1), -5, r"block_table, sequence 0, entry 1: .* found -5"),
    "start not zero": (5, (0,), 1, r"query_start: expected the first value 0 .* found 1"),
    "end not tokens": (5, (2,), 2, r"query_start: .* the last 3 \(tokens\), found 0 and 2"),
    "end far below zero": (5, (2,), -(2**31), r"query_start: "),
    "starts descending": (5, (1,), 7, r"query_start: expected ascending values, found 3 after 7 at 2"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_index_memory_are_checked(library: NativeLibrary, isa: Isa, name: str) -> None:
    case = Case(sequences=((5, 1), (2, 2)))
    index, at, value, message = BAD_VALUES[name]
    inputs = inputs_of(case)
    inputs[index][at] = value
    with pytest.raises(InputError, match=f"k25.MLA: input {message}"):
        native(library, case, inputs, isa=isa)


def test_entries_of_the_table_that_no_token_reaches_are_not_looked_at(library: NativeLibrary) -> None:
    case = Case(sequences=((5, 1), (2, 2)))
    inputs = inputs_of(case)
    out, _ = native(library, case, inputs)
    inputs[6][:, -1] = 2**31 - 1
    np.testing.assert_array_equal(native(library, case, inputs)[0], out)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 70)), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 3, 7, 16, 17, 33, 65]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.integers(1, 50)),
    block_size=st.sampled_from([1, 2, 5, 16, 32]),
    dtypes=st.sampled_from(list(itertools.product(["float32", "bfloat16"], repeat=2))),
    mode=st.sampled_from(["fast", "exact"]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 9),
)
def test_any_shape(
    sequences: list[tuple[int, int]],
    heads: int,
    sizes: tuple[int, int, int, int],
    block_size: int,
    dtypes: tuple[str, str],
    mode: Mode,
    isa: Isa,
    seed: int,
) -> None:
    found = native_library()
    if found is None or not found.supports(isa):
        pytest.skip("the native library is not built, or this machine lacks the code path")
    if sum(new for _, new in sequences) == 0:
        sequences = [*sequences, (3, 1)]
    nope, half_rope, v, rank = sizes
    case = Case(
        sequences=tuple(sequences),
        heads=heads,
        nope=nope,
        rope=2 * half_rope,
        v=v,
        rank=rank,
        block_size=block_size,
        t=dtypes[0],
        tc=dtypes[1],
        scale=0.7,
        seed=seed,
    )
    check(found, case, isa, mode, by_size=True)
