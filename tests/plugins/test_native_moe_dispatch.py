"""The native kernel of `k25.MoEDispatch`, each code path of this machine in turn, against a float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import INVALID, LIBRARY_OR_NONE, OK, PATHS, REASON, Named, call, named, own_threads, values_of
from test_moe_dispatch import EXTREME_WORDS, Layer, layer_of, random_call, random_layer

from k25_plugins.native_library import Isa, Mode, MoeDispatchAttributes, Parallel

pytestmark = pytest.mark.skipif(LIBRARY_OR_NONE is None, reason=REASON)

Array = npt.NDArray[Any]
#: Relative L2 against float64: float32 sums, and activations and inner values rounded to bfloat16 with float32 sums.
EXACT, FAST = 1e-5, 3e-3
#: Rounding of the result to bfloat16.
BFLOAT16 = 2**-8
ISAS = [pytest.param(isa, id=isa) for isa in PATHS] or [pytest.param("best", id="none")]
each_isa = pytest.mark.parametrize("isa", ISAS)
each_mode = pytest.mark.parametrize("mode", ["fast", "exact"])


def inputs_of(layer: Layer, x: Array, ids: Array, weights: Array, dtype: str) -> list[Named]:
    region = np.pad(layer.region, (0, -len(layer.region) % 8))
    return [
        named(x, dtype),
        Named(np.ascontiguousarray(ids, np.int32), "int32"),
        Named(np.ascontiguousarray(weights, np.float32), "float32"),
        Named(region.view(np.int32).reshape(-1, 2), "int32"),
        Named(region.view(np.uint16).reshape(-1, 4), "bfloat16"),
        Named(layer.table, "int64"),
    ]


def attributes(layer: Layer) -> MoeDispatchAttributes:
    return MoeDispatchAttributes(layer.intermediate, layer.group)


def moe(
    layer: Layer,
    x: Array,
    ids: Array,
    weights: Array,
    *,
    isa: Isa = "best",
    mode: Mode = "exact",
    dtype: str = "float32",
    threads: int | Parallel = 1,
) -> npt.NDArray[np.float32]:
    y = named(np.full(x.shape, np.nan, np.float32), dtype)
    inputs = inputs_of(layer, x, ids, weights, dtype)
    status, message = call("moe_dispatch", inputs, [y], attributes(layer), isa=isa, mode=mode, threads=threads)
    assert status == OK, message
    return values_of(y)


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


# hidden, intermediate, experts, experts a token, tokens, group size
SIZES = [
    pytest.param(32, 32, 2, 1, 1, 32, id="smallest"),
    pytest.param(96, 64, 10, 3, 1, 32, id="one token"),
    pytest.param(96, 64, 10, 3, 7, 32, id="no whole vectors"),
    pytest.param(544, 544, 5, 5, 33, 32, id="a chunk and a piece"),
    pytest.param(1056, 96, 3, 2, 70, 32, id="a panel and a piece"),
    pytest.param(128, 128, 3, 2, 50, 64, id="groups of 64"),
    pytest.param(128, 128, 3, 2, 50, 16, id="groups of 16"),
    pytest.param(96, 2080, 2, 2, 6, 32, id="more columns than a tile"),
]


@each_isa
@each_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "intermediate", "experts", "k", "tokens", "group"), SIZES)
def test_values(
    isa: Isa, mode: Mode, dtype: str, hidden: int, intermediate: int, experts: int, k: int, tokens: int, group: int
) -> None:
    layer = random_layer(hidden, intermediate, experts, group=group)
    x, ids, weights = random_call(layer, tokens, k)
    found = moe(layer, x, ids, weights, isa=isa, mode=mode, dtype=dtype)
    limit = (EXACT if mode == "exact" else FAST) + (BFLOAT16 if dtype == "bfloat16" else 0)
    assert error(found, layer.oracle(x, ids, weights)) < limit


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 12, 13, 64, 65])
def test_all_tokens_on_one_expert(isa: Isa, mode: Mode, tokens: int) -> None:
    """Every size of a block of tokens; the other experts have none."""
    layer = random_layer(64, 64, 3)
    x, _, weights = random_call(layer, tokens, 1)
    ids = np.full((tokens, 1), 1, np.int32)
    wanted = layer.oracle(x, ids, weights)
    assert error(moe(layer, x, ids, weights, isa=isa, mode=mode), wanted) < (EXACT if mode == "exact" else FAST)


@each_isa
@each_mode
def test_an_expert_chosen_twice_counts_twice(isa: Isa, mode: Mode) -> None:
    layer = random_layer(64, 64, 3)
    x, _, weights = random_call(layer, 5, 2)
    ids = np.array([[0, 0], [2, 2], [1, 0], [0, 0], [2, 0]], np.int32)
    wanted = layer.oracle(x, ids, weights)
    assert error(moe(layer, x, ids, weights, isa=isa, mode=mode), wanted) < (EXACT if mode == "exact" else FAST)


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_nibble_of_every_word(isa: Isa, mode: Mode, tokens: int) -> None:
    """x picks one column, so that each weight is seen alone; one inner value, rounded, may be all there is."""
    layer = random_layer(64, 32, 2)
    for matrix in layer.experts[0]:
        matrix.words.flat[: len(EXTREME_WORDS)] = EXTREME_WORDS
    layer = layer_of(layer.experts, 64, 32, 32)
    for column in range(0, 64, 7):
        x = np.zeros((tokens, 64), np.float32)
        x[:, column] = 1
        ids, weights = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
        wanted = layer.oracle(x, ids, weights)
        assert error(moe(layer, x, ids, weights, isa=isa, mode=mode), wanted) < (EXACT if mode == "exact" else BFLOAT16)


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [2, 20])
def test_experts_that_are_not_held_add_nothing(isa: Isa, mode: Mode, tokens: int) -> None:
    layer = random_layer(64, 64, 4)
    x, ids, weights = random_call(layer, tokens, 2)
    layer.table[[0, 2]] = -1
    found, wanted = moe(layer, x, ids, weights, isa=isa, mode=mode), layer.oracle(x, ids, weights)
    none = np.isin(ids, [0, 2]).all(axis=1)
    assert np.array_equal(found[none], np.zeros_like(found[none]))
    assert error(found, wanted) < (EXACT if mode == "exact" else FAST)
    layer.table[:] = -1
    assert np.array_equal(moe(layer, x, ids, weights, isa=isa, mode=mode), np.zeros_like(x))


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [3, 24])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFFFF])
def test_what_is_not_finite_stays_where_it_is_used(isa: Isa, mode: Mode, tokens: int, bits: int) -> None:
    """NaN or infinity in the scales of an expert, and in a token: only what uses them."""
    layer = random_layer(96, 64, 4)
    layer.experts[1][2].scales[:] = bits
    layer = layer_of(layer.experts, 96, 64, 32)
    x, ids, weights = random_call(layer, tokens, 2)
    ids[:] = np.where(np.arange(tokens)[:, None] % 3 == 0, [[1, 0]], [[3, 2]])
    x[1] = np.nan
    found = moe(layer, x, ids, weights, isa=isa, mode=mode)
    clean = (np.arange(tokens) % 3 != 0) & (np.arange(tokens) != 1)
    assert np.isfinite(found[clean]).all()
    assert error(found[clean], layer.oracle(x[clean], ids[clean], weights[clean])) < FAST
    assert not np.isfinite(found[~clean]).all(axis=1).any()


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_number_of_threads_changes_no_bit(isa: Isa, mode: Mode, tokens: int) -> None:
    layer = random_layer(160, 96, 6)
    x, ids, weights = random_call(layer, tokens, 3)
    one = moe(layer, x, ids, weights, isa=isa, mode=mode)
    for threads in (2, 5, own_threads(2), own_threads(5)):
        assert np.array_equal(moe(layer, x, ids, weights, isa=isa, mode=mode, threads=threads), one)


@each_mode
def test_alone_or_in_a_batch(mode: Mode) -> None:
    """A token's neighbours change rounding only: few tokens of an expert are computed more exactly, even when fast."""
    layer = random_layer(256, 128, 5)
    x, ids, weights = random_call(layer, 30, 2)
    together = moe(layer, x, ids, weights, mode=mode)
    for token in (0, 17, 29):
        one = slice(token, token + 1)
        alone = moe(layer, x[one], ids[one], weights[one], mode=mode)
        assert error(together[one], alone.astype(np.float64)) < (EXACT if mode == "exact" else 2 * FAST)


#: Of few tokens in the fast mode: activations in 16 bits, one scale for eight of them.
FIXED = 1e-4


@each_isa
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_few_tokens_are_nearly_exact_whatever_their_range(isa: Isa, tokens: int, scale: float) -> None:
    """Outliers spoil their own block of eight only."""
    layer = random_layer(288, 160, 3)
    x, ids, weights = random_call(layer, tokens, 2)
    x[:, ::61] *= 1000
    x = (x * scale).astype(np.float32)
    assert error(moe(layer, x, ids, weights, isa=isa, mode="fast"), layer.oracle(x, ids, weights)) < FIXED


@each_isa
@each_mode
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45, -0.0])
def test_nothing_gives_nothing(isa: Isa, mode: Mode, value: float) -> None:
    """Blocks that are zero, or too small to have a scale."""
    layer = random_layer(128, 128, 2)
    ids, weights = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    assert np.abs(moe(layer, np.full((1, 128), value, np.float32), ids, weights, isa=isa, mode=mode)).max() < 1e-30


@each_isa
@each_mode
@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 64), (2048, 160), (2080, 2112)])
def test_where_the_region_begins_changes_no_bit(
    isa: Isa, mode: Mode, tokens: int, hidden: int, intermediate: int
) -> None:
    """Tensors of a shard begin where its header ends: anywhere in a cache line."""
    layer = random_layer(hidden, intermediate, 3)
    x, ids, weights = random_call(layer, tokens, 2)
    inputs = inputs_of(layer, x, ids, weights, "float32")
    region = inputs[3].array.reshape(-1)
    room = np.zeros(region.size + 32, np.int32)
    line = -room.ctypes.data // 4 % 16
    found = []
    for shift in (0, 2, 8, 10, 14):
        moved = room[line + shift :][: region.size]
        moved[:] = region
        inputs[3] = Named(moved.reshape(-1, 2), "int32")
        inputs[4] = Named(moved.view(np.uint16).reshape(-1, 4), "bfloat16")
        y = named(np.zeros_like(x), "float32")
        status, message = call("moe_dispatch", inputs, [y], attributes(layer), isa=isa, mode=mode)
        assert status == OK, message
        found.append(y.array)
    assert all(np.array_equal(y, found[0]) for y in found)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([8, 16, 32, 64, 96]))
    hidden, intermediate = group * data.draw(st.integers(1, 9)), group * data.draw(st.integers(1, 7))
    if hidden * intermediate % (4 * group) or hidden * intermediate % 16:
        intermediate *= 4  # words and scales fill rows of 8 bytes
    experts = data.draw(st.integers(1, 6))
    k, tokens = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 80))
    layer = random_layer(hidden, intermediate, experts, group=group, seed=data.draw(st.integers(0, 99)))
    x, ids, weights = random_call(layer, tokens, k)
    mode: Mode = data.draw(st.sampled_from(["fast", "exact"]))
    found = moe(layer, x, ids, weights, isa=data.draw(st.sampled_from(PATHS)), mode=mode)
    assert error(found, layer.oracle(x, ids, weights)) < (EXACT if mode == "exact" else FAST)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
def test_an_expert_id_outside_is_refused(bad: int) -> None:
    layer = random_layer(64, 64, 4)
    x, ids, weights = random_call(layer, 3, 2)
    ids[2, 1] = bad
    y = named(np.zeros_like(x), "float32")
    status, message = call("moe_dispatch", inputs_of(layer, x, ids, weights, "float32"), [y], attributes(layer))
    assert status == INVALID
    assert message == f"k25.MoEDispatch: input expert_ids, token 2, slot 1: expected an id in 0..3, found {bad}"


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("bad", ["last", "far", "negative"])
def test_a_table_row_outside_the_region_is_refused(column: int, bad: str) -> None:
    layer = random_layer(64, 64, 4)
    x, ids, weights = random_call(layer, 3, 2)
    ids[0, 0] = 2
    inputs = inputs_of(layer, x, ids, weights, "float32")
    rows = 64 * 64 // (16 if column % 2 == 0 else 128)
    table = layer.table.copy()
    table[2, column] = {"last": inputs[3].array.shape[0] - rows + 1, "far": 2**62, "negative": -7}[bad]
    inputs[5] = Named(table, "int64")
    y = named(np.full_like(x, 7), "float32")
    status, message = call("moe_dispatch", inputs, [y], attributes(layer))
    if column == 0 and bad == "negative":
        assert status == OK  # not held
        return
    assert status == INVALID
    assert "k25.MoEDispatch: input table, expert 2" in message
    assert str(table[2, column]) in message
    assert (y.array == 7).all()


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group", "part"),
    [(64, 48, 32, "multiples of group_size"), (48, 64, 32, "multiples of group_size"), (64, 64, 12, "group_size")],
)
def test_sizes_that_do_not_fit_groups_are_refused(hidden: int, intermediate: int, group: int, part: str) -> None:
    layer = random_layer(64, 64, 2)
    x = np.zeros((2, hidden), np.float32)
    inputs = inputs_of(layer, x, np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32), "float32")
    status, message = call(
        "moe_dispatch", inputs, [named(x, "float32")], MoeDispatchAttributes(intermediate, group), mode="exact"
    )
    assert status == INVALID
    assert part in message
