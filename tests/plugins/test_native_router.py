"""The native kernel of `k25.Router`, each code path of this machine in turn, against float64.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import LIBRARY_OR_NONE, PATHS, REASON, own_threads, run_on_threads
from test_router import SIZES, oracle, random_call, sigmoid

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.native_calls import call_native
from k25_plugins.native_library import Isa, Mode

assert torch_ops.REFERENCES  # importing it registers the ops
pytestmark = pytest.mark.skipif(LIBRARY_OR_NONE is None, reason=REASON)

Array = npt.NDArray[Any]
#: Of a weight, against float64: one exponential, a sum and a quotient in float32.
TOLERANCE = 2e-6
#: The smallest normal number: what is below it may have any digits, or none.
TINY = float(np.finfo(np.float32).tiny)
CANARY = 77
each_isa = pytest.mark.parametrize("isa", [pytest.param(isa, id=isa) for isa in PATHS] or ["best"])
each_mode = pytest.mark.parametrize("mode", ["fast", "exact"])
each_size = pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)


def attributes(top_k: int, normalise: int = 1, scaling_factor: float = 2.827) -> dict[str, Any]:
    return {"top_k": top_k, "normalise": normalise, "scaling_factor": scaling_factor}


def route(
    logits_TE: Array, bias_E: Array, top_k: int, normalise: int = 1, scaling_factor: float = 2.827, **options: Any
) -> tuple[Array, Array]:
    assert LIBRARY_OR_NONE is not None
    values = attributes(top_k, normalise, scaling_factor)
    ids_TK, weights_TK = call_native(LIBRARY_OR_NONE, "Router", [logits_TE, bias_E], values, **options)
    assert ids_TK.shape == weights_TK.shape == (len(logits_TE), top_k)
    assert (ids_TK.dtype, weights_TK.dtype) == (np.dtype(np.int32), np.dtype(np.float32))
    return ids_TK, weights_TK


def assert_equal_bits(found: tuple[Array, Array], wanted: tuple[Array, Array]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.view(np.int32), other.view(np.int32))


def assert_distinct(ids_TK: Array, experts: int) -> None:
    for row in ids_TK.tolist():
        assert len({*row} & {*range(experts)}) == len(row), row


def zeros(experts: int) -> Array:
    return np.zeros(experts, np.float32)


def shifted(values: Array, shift: int, around: float) -> Array:
    """A copy that begins `shift` elements after a cache line, between elements of another value."""
    room = np.full(values.size + 48, around, values.dtype)
    line = -room.ctypes.data % 64 // 4
    view = room[line + shift :][: values.size].reshape(values.shape)
    view[...] = values
    return view


@each_isa
@each_mode
@each_size
@pytest.mark.parametrize("normalise", [0, 1, -1, 256, 2**32])
def test_values(isa: Isa, mode: Mode, tokens: int, experts: int, top_k: int, normalise: int) -> None:
    call = random_call(tokens, experts)
    ids, weights = route(*call, top_k, normalise, isa=isa, mode=mode)
    wanted_ids, wanted_weights = oracle(*call, top_k, normalise)
    assert ids.tolist() == wanted_ids.tolist()
    np.testing.assert_allclose(weights, wanted_weights, rtol=TOLERANCE)


@each_isa
def test_is_the_eager_reference(isa: Isa) -> None:
    call = random_call(60, 331)
    ids, weights = torch.ops.k25.router(*map(torch.from_numpy, call), 9, 1, 2.827)
    found = route(*call, 9, isa=isa)
    assert found[0].tolist() == ids.tolist()
    np.testing.assert_allclose(found[1], weights.numpy(), rtol=TOLERANCE)


@each_isa
@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0, 1e-30, 1e30])
def test_the_factor_multiplies(isa: Isa, factor: float) -> None:
    call = random_call(7, 20)
    for normalise in (0, 1):
        wanted = oracle(*call, 5, normalise, factor)[1]
        np.testing.assert_allclose(route(*call, 5, normalise, factor, isa=isa)[1], wanted, rtol=TOLERANCE)


@each_isa
@each_mode
@pytest.mark.parametrize("experts", [1, 2, 7, 8, 15, 16, 17, 31, 33, 100, 384, 385, 1023])
def test_of_equal_scores_the_lower_id_is_first(isa: Isa, mode: Mode, experts: int) -> None:
    """Equal logits have equal scores wherever in a vector, or in what is left of one, they lie."""
    generator = np.random.default_rng(experts)
    values = np.concatenate([[0.0, 11.1, -60.0, 200.0, -200.0], generator.normal(scale=4, size=95)])
    logits = np.repeat(values.astype(np.float32)[:, None], experts, axis=1)
    for top_k in {1, min(8, experts), experts}:
        ids, weights = route(logits, zeros(experts), top_k, 0, 1.0, isa=isa, mode=mode)
        assert ids.tolist() == [[*range(top_k)]] * 100
        np.testing.assert_array_equal(weights, np.repeat(weights[:, :1], top_k, axis=1))
    # Scores that many experts share, in any order; a bias that does not tell them apart.
    logits = generator.choice(np.array([-1.0, 2.0, 0.5, 1.0], np.float32), size=(5, experts))
    bias = np.full(experts, 0.25, np.float32)
    for top_k in {1, min(8, experts), experts}:
        assert route(logits, bias, top_k, isa=isa, mode=mode)[0].tolist() == oracle(logits, bias, top_k)[0].tolist()


@each_isa
def test_zeros_of_either_sign_are_equal(isa: Isa) -> None:
    logits, bias = np.full((1, 20), -200, np.float32), zeros(20)
    bias[::2] = -0.0
    assert route(logits, bias, 20, isa=isa)[0].tolist() == [[*range(20)]]
    logits, bias = zeros(20)[None], np.full(20, -0.5, np.float32)  # 0.5 - 0.5
    logits[0, ::3] = -0.0
    assert route(logits, bias, 20, isa=isa)[0].tolist() == [[*range(20)]]


@each_isa
def test_the_bias_turns_the_choice_and_no_weight(isa: Isa) -> None:
    logits, _ = random_call(9, 50)
    bias = zeros(50)
    bias[[41, 7, 30]] = 9, 8, 7
    ids, weights = route(logits, bias, 3, 0, 1.0, isa=isa)
    assert ids.tolist() == [[41, 7, 30]] * 9
    np.testing.assert_allclose(weights, sigmoid(logits[:, [41, 7, 30]]), rtol=TOLERANCE)
    bias[[41, 7, 30]] = -8, -9, -7
    ids, weights = route(logits, bias, 50, 1, 1.0, isa=isa)
    assert ids[:, -3:].tolist() == [[30, 41, 7]] * 9
    scores = sigmoid(logits)
    shares = np.take_along_axis(scores / scores.sum(axis=1, keepdims=True), ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(weights, shares, rtol=TOLERANCE)


@each_isa
@each_mode
def test_scores_that_all_vanish_have_weight_zero(isa: Isa, mode: Mode) -> None:
    """exp(-200) is 0 in float32: 0 / (0 + 1e-20)."""
    logits, bias = random_call(3, 37)
    logits[1] = -200
    for normalise in (0, 1):
        ids, weights = route(logits, zeros(37), 5, normalise, isa=isa, mode=mode)
        assert ids[1].tolist() == [0, 1, 2, 3, 4]
        assert not weights[1].any()
        np.testing.assert_allclose(weights[::2], oracle(logits, zeros(37), 5, normalise)[1][::2], rtol=TOLERANCE)
    assert route(logits, bias, 5, isa=isa, mode=mode)[0][1].tolist() == np.argsort(-bias)[:5].tolist()


@each_isa
@pytest.mark.parametrize("top", [-5.0, -20.0, -40.0, -46.0, -60.0, -80.0, 15.0, 80.0])
def test_scores_near_zero_and_one_keep_their_digits(isa: Isa, top: float) -> None:
    """Down to sums that 1e-20 outweighs."""
    logits = (top - 0.5 * np.arange(11)).astype(np.float32)[None]
    bias = np.linspace(1, 0.5, 11, dtype=np.float32)
    for normalise in (0, 1):
        ids, weights = route(logits, bias, 11, normalise, 1.0, isa=isa)
        wanted_ids, wanted = oracle(logits, bias, 11, normalise, 1.0)
        assert ids.tolist() == wanted_ids.tolist()
        np.testing.assert_allclose(weights, wanted, rtol=TOLERANCE)


@each_isa
def test_scores_below_the_smallest_normal_number_stay_between_nothing_and_that(isa: Isa) -> None:
    logits = np.linspace(-86, -110, 60, dtype=np.float32)[None]
    _, weights = route(logits, zeros(60), 60, 0, 1.0, isa=isa)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    np.testing.assert_allclose(np.sort(weights[0])[::-1], sigmoid(logits)[0], rtol=TOLERANCE, atol=TINY)


@each_isa
@each_mode
def test_infinite_logits_are_scores_of_nothing_and_one(isa: Isa, mode: Mode) -> None:
    for experts in (4, 16, 37):
        logits = np.full((2, experts), -np.inf, np.float32)
        logits[0, :4] = 0, -np.inf, np.inf, 1
        logits[1, [0, -1]] = np.inf
        ids, weights = route(logits, zeros(experts), 4, 0, 1.0, isa=isa, mode=mode)
        assert ids.tolist() == [[2, 3, 0, 1], [0, experts - 1, 1, 2]]
        one = float(sigmoid(np.array(1.0)))
        np.testing.assert_allclose(weights, np.array([[1, one, 0.5, 0], [1, 1, 0, 0]]), rtol=TOLERANCE)
        _, weights = route(logits, zeros(experts), 4, 1, 1.0, isa=isa, mode=mode)
        np.testing.assert_allclose(weights[1], [0.5, 0.5, 0, 0], rtol=TOLERANCE)


@each_isa
@each_mode
@pytest.mark.parametrize("experts", [7, 16, 37, 384])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_a_number_counts_as_the_largest(isa: Isa, mode: Mode, experts: int, sign: int) -> None:
    logits, bias = random_call(6, experts)
    clean = route(logits, bias, 4, isa=isa, mode=mode)
    places = [1, experts // 2, experts - 1]
    not_a_number = np.copysign(np.float32(np.nan), np.float32(sign))
    logits[2, places[1:]] = not_a_number
    logits[3, places[0]] = np.inf
    logits[3, places[2]] = not_a_number
    logits[4] = not_a_number
    found = route(logits, bias, 4, isa=isa, mode=mode)
    assert found[0][2, :2].tolist() == places[1:]
    assert found[0][3, 0] == places[2]
    assert found[0][4].tolist() == [0, 1, 2, 3]
    assert_distinct(found[0], experts)
    assert np.isnan(found[1][[2, 3, 4]]).all()  # by their sum
    others = [0, 1, 5]
    assert_equal_bits((found[0][others], found[1][others]), (clean[0][others], clean[1][others]))
    _, weights = route(logits, bias, 4, 0, isa=isa, mode=mode)  # without a sum, only its own weight
    assert np.isnan(weights[2]).tolist() == [True, True, False, False]
    assert np.isnan(weights[3]).tolist() == [True, False, False, False]
    ids, _ = route(logits, bias, experts, isa=isa, mode=mode)
    assert_distinct(ids, experts)


@each_isa
@pytest.mark.parametrize("experts", [7, 16, 37])
def test_a_bias_that_is_not_finite(isa: Isa, experts: int) -> None:
    logits, bias = random_call(3, experts)
    bias[[2, 3, 5, 6]] = -np.inf, np.inf, np.nan, np.inf
    for top_k in (1, 4, experts):
        ids, weights = route(logits, bias, top_k, 0, 1.0, isa=isa)
        assert_distinct(ids, experts)
        assert ids[:, :3].tolist() == [[5, 3, 6][:top_k]] * 3
        scores = np.take_along_axis(sigmoid(logits), ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(weights, scores, rtol=TOLERANCE)
    assert ids[:, -1].tolist() == [2] * 3
    logits[1, 3] = -np.inf  # 0 and inf
    logits[1, 2] = np.inf  # 1 and -inf
    assert route(logits, bias, experts, isa=isa)[0][1, [0, 1, 2, -1]].tolist() == [5, 3, 6, 2]


@each_isa
@each_mode
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 384, 8), (130, 384, 8), (300, 100, 3), (999, 17, 17)])
def test_the_number_of_threads_changes_no_bit(isa: Isa, mode: Mode, tokens: int, experts: int, top_k: int) -> None:
    call = random_call(tokens, experts)
    alone = route(*call, top_k, isa=isa, mode=mode)
    for parallel in [*map(run_on_threads, (1, 2, 5)), own_threads(3)]:
        assert_equal_bits(route(*call, top_k, isa=isa, mode=mode, parallel=parallel), alone)


@each_isa
@each_size
def test_a_token_alone_has_the_bits_that_it_has_in_a_batch(isa: Isa, tokens: int, experts: int, top_k: int) -> None:
    logits, bias = random_call(tokens, experts)
    ids, weights = route(logits, bias, top_k, isa=isa)
    for token in {0, tokens // 2, tokens - 1}:
        row = slice(token, token + 1)
        assert_equal_bits(route(logits[row], bias, top_k, isa=isa), (ids[row], weights[row]))


@each_isa
@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (3, 2), (15, 4), (16, 16), (17, 8), (33, 33), (100, 7), (384, 8)]
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_beyond_an_array_is_read_or_written(isa: Isa, tokens: int, experts: int, top_k: int) -> None:
    """Arrays that begin anywhere in a cache line: what is read beyond them would be chosen."""
    assert LIBRARY_OR_NONE is not None
    logits, bias = random_call(tokens, experts)
    wanted_ids, wanted_weights = oracle(logits, bias, top_k)
    found = []
    for around in (np.nan, np.inf, 100.0):
        for shift in (0, 1, 3, 8, 15):
            inputs = [shifted(logits, shift, around), shifted(bias, (shift + 5) % 16, around)]
            ids = shifted(np.zeros((tokens, top_k), np.int32), shift + 1, CANARY)
            weights = shifted(np.zeros((tokens, top_k), np.float32), shift, CANARY)
            rooms, outputs = [ids.base, weights.base], {0: ids, 1: weights}
            call_native(LIBRARY_OR_NONE, "Router", inputs, attributes(top_k), outputs=outputs, isa=isa)
            assert ids.tolist() == wanted_ids.tolist()
            found.append(weights.copy())
            ids[...] = CANARY
            weights[...] = CANARY
            for room in rooms:
                assert room is not None
                assert (room == CANARY).all()
    np.testing.assert_allclose(found[0], wanted_weights, rtol=TOLERANCE)
    for weights in found:
        np.testing.assert_array_equal(weights, found[0])


@each_isa
def test_inputs_keep_their_values(isa: Isa) -> None:
    call = random_call(9, 77)
    before = [array.copy() for array in call]
    route(*call, 9, isa=isa)
    for array, kept in zip(call, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_inputs_that_do_not_fit_are_named() -> None:
    assert LIBRARY_OR_NONE is not None
    logits, bias = np.zeros((4, 10), np.float32), zeros(10)
    refusals: list[tuple[list[Array], int, str]] = [
        ([logits, bias], 0, "attribute top_k: expected 1 to the 10 experts of input logits, found 0"),
        ([logits, bias], -3, "attribute top_k: expected 1 to the 10 experts of input logits, found -3"),
        ([logits, bias], 11, "attribute top_k: expected 1 to the 10 experts of input logits, found 11"),
        ([logits, bias[:9]], 3, "input bias, axis experts: expected 10, found 9"),
        ([logits[0], bias], 3, "input logits: expected axes [tokens, experts], found shape [10]"),
        ([logits, bias[None]], 3, "input bias: expected axes [experts], found shape [1, 10]"),
        ([logits, bias.astype(np.int32)], 3, "input bias: expected dtype float32, found int32"),
        ([logits.astype(np.uint16), bias], 3, "input logits: expected dtype float32, found bfloat16"),
    ]
    for inputs, top_k, message in refusals:
        with pytest.raises(InputError) as caught:
            call_native(LIBRARY_OR_NONE, "Router", inputs, attributes(top_k))
        assert str(caught.value) == f"k25.Router: {message}"
    for inputs in ([logits[:0], bias], [logits[:, :0], bias[:0]]):
        with pytest.raises(InputError, match=r"k25\.Router: input logits: expected no empty axis"):
            call_native(LIBRARY_OR_NONE, "Router", inputs, attributes(1))


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 40),
    sizes=st.integers(1, 80).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))),
    spread=st.sampled_from([0.5, 1.5, 4.0]),
    shift=st.integers(0, 15),
    threads=st.sampled_from([1, 1, 3]),
    normalise=st.integers(0, 1),
    mode=st.sampled_from(["fast", "exact"]),
    isa=st.sampled_from(PATHS or ("best",)),
)
def test_any_shape(
    tokens: int, sizes: tuple[int, int], spread: float, shift: int, threads: int, normalise: int, mode: Mode, isa: Isa
) -> None:
    logits, bias = random_call(tokens, sizes[0], spread)
    parallel = run_on_threads(threads) if threads > 1 else None
    options: dict[str, Any] = {"isa": isa, "mode": mode, "parallel": parallel}
    ids, weights = route(shifted(logits, shift, np.nan), bias, sizes[1], normalise, **options)
    wanted_ids, wanted_weights = oracle(logits, bias, sizes[1], normalise)
    assert ids.tolist() == wanted_ids.tolist()
    np.testing.assert_allclose(weights, wanted_weights, rtol=TOLERANCE)


SPECIAL = [0.0, -0.0, 1.0, 1.0000001, -1.0, 88.8, -88.8, 104.0, -104.0, 1e38, -1e38, np.inf, -np.inf, np.nan, 1e-40]


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=70),
    seed=st.integers(0, 99),
    top_k=st.integers(1, 70),
    isa=st.sampled_from(PATHS or ("best",)),
)
def test_any_number_is_a_logit(logits: list[float], seed: int, top_k: int, isa: Isa) -> None:
    row, experts = np.array([logits], np.float32), len(logits)
    bias = np.random.default_rng(seed).choice(np.array(SPECIAL, np.float32), size=experts)
    top_k = min(top_k, experts)
    ids, weights = route(row, bias, top_k, 0, 1.0, isa=isa)
    assert_distinct(ids, experts)
    with np.errstate(invalid="ignore"):
        scores, biased = sigmoid(row)[0], (sigmoid(row).astype(np.float32) + bias)[0]
    chosen = biased[ids[0]]
    numbers = chosen[np.isnan(biased).sum() :]
    assert np.isnan(chosen[: np.isnan(biased).sum()]).all()
    assert not np.isnan(numbers).any()
    assert (numbers[:-1] >= numbers[1:] - 1e-6).all()
    wanted = scores[ids[0]]
    np.testing.assert_allclose(weights[0], wanted, rtol=TOLERANCE, atol=TINY)
