"""`k25.MoEDispatch`, the eager reference and the ONNX function body, against a float64 oracle.

The oracle takes nibbles with Python's integer shifts. A region is laid out here in any order with junk between the
tensors, so that a read at a wrong place is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_plugins import torch_ops
from k25_plugins.onnx_functions import functions_for

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
BFLOAT16, FLOAT, INT32, INT64 = (
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
)
FORMS = ["eager", "onnx"]
EXTREME_WORDS = np.array([-(2**31), 2**31 - 1, -1, 0, 1, -(2**31) + 1, -0x77777778, 0x12345678], np.int32)
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: waking a second thread costs more than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bfloat16_bits(values: Array) -> npt.NDArray[np.uint16]:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


def bfloat16_values(bits: Array) -> npt.NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclass
class Matrix:
    """A quantised [out, in] matrix as it is stored: words [out, in / 8] and bfloat16 bits [out, in / group]."""

    words: npt.NDArray[np.int32]
    scales: npt.NDArray[np.uint16]

    def weight(self) -> npt.NDArray[np.float64]:
        """By the definition, one element at a time."""
        rows, columns = self.words.shape[0], self.words.shape[1] * 8
        group = columns // self.scales.shape[1]
        nibbles = np.array(
            [
                [
                    (int(self.words[row, column // 8]) & 0xFFFFFFFF) >> (4 * (column % 8)) & 15
                    for column in range(columns)
                ]
                for row in range(rows)
            ]
        )
        scales = bfloat16_values(self.scales)
        with np.errstate(invalid="ignore"):  # 0 times infinity, where a test asks for it
            return (nibbles - 8) * scales[:, np.arange(columns) // group]


def random_matrix(generator: np.random.Generator, out_features: int, in_features: int, group: int) -> Matrix:
    words = generator.integers(-(2**31), 2**31, (out_features, in_features // 8), np.int64).astype(np.int32)
    extremes = generator.random(words.shape) < 0.2
    words[extremes] = generator.choice(EXTREME_WORDS, extremes.sum())
    # Neighbouring groups differ by large factors: an element with its neighbour's scale is far off.
    factors = 4.0 ** generator.integers(-2, 3, (out_features, in_features // group))
    return Matrix(words, bfloat16_bits(factors / (8 * np.sqrt(in_features))))


Expert = tuple[Matrix, Matrix, Matrix]  # gate, up, down


@dataclass
class Layer:
    """Experts in a byte region: `table` row e is where expert e's six tensors start, in rows of 8 bytes."""

    hidden: int
    intermediate: int
    group: int
    experts: list[Expert]
    region: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int64]

    @functools.cached_property
    def weights(self) -> list[tuple[Array, Array, Array]]:
        return [(gate.weight(), up.weight(), down.weight()) for gate, up, down in self.experts]

    def apply(self, x: Array, expert: int) -> Array:
        """down(silu(gate x) * up x) in float64, for one token."""
        gate, up, down = self.weights[expert]
        g = gate @ x
        silu = g * (1 + np.tanh(g / 2)) / 2
        return down @ (silu * (up @ x))

    def oracle(self, x: Array, ids: Array, weights: Array) -> Array:
        out = np.zeros(x.shape)
        for token in range(x.shape[0]):
            for expert, weight in zip(ids[token], weights[token], strict=True):
                if self.table[expert, 0] >= 0:
                    out[token] += np.float64(weight) * self.apply(x[token].astype(np.float64), int(expert))
        return out


def layer_of(experts: list[Expert], hidden: int, intermediate: int, group: int, seed: int = 0) -> Layer:
    """Lay the tensors out in random order, with 0 to 3 rows of junk (all bits set, NaN as bfloat16) between them."""
    generator = np.random.default_rng([seed, 77])
    pieces = [
        (expert, column, values.tobytes())
        for expert, matrices in enumerate(experts)
        for column, values in enumerate(part for matrix in matrices for part in (matrix.words, matrix.scales))
    ]
    table = np.zeros((len(experts), 6), np.int64)
    data = b"\xff" * 8
    for index in generator.permutation(len(pieces)):
        expert, column, octets = pieces[index]
        table[expert, column] = len(data) // 8
        data += octets + b"\xff" * (8 * int(generator.integers(0, 4)))
        assert len(data) % 8 == 0
    return Layer(hidden, intermediate, group, experts, np.frombuffer(data, np.uint8), table)


def random_layer(hidden: int, intermediate: int, experts: int, *, group: int = 32, seed: int = 0) -> Layer:
    generator = np.random.default_rng(seed)
    made: list[Expert] = [
        (
            random_matrix(generator, intermediate, hidden, group),
            random_matrix(generator, intermediate, hidden, group),
            random_matrix(generator, hidden, intermediate, group),
        )
        for _ in range(experts)
    ]
    return layer_of(made, hidden, intermediate, group, seed)


def random_call(layer: Layer, tokens: int, k: int, *, seed: int = 0) -> tuple[Array, Array, Array]:
    """x, expert ids (k different ones a token) and weights; x has values that bfloat16 has."""
    generator = np.random.default_rng([seed, 5])
    x = generator.normal(size=(tokens, layer.hidden)).astype(np.float32)
    x = bfloat16_values(bfloat16_bits(x)).astype(np.float32)
    ids = np.array([generator.permutation(len(layer.experts))[:k] for _ in range(tokens)], np.int32)
    return x, ids, generator.uniform(0.1, 1.5, (tokens, k)).astype(np.float32)


@functools.cache
def session(t: str, intermediate: int, group: int) -> ort.InferenceSession:
    """A graph of one k25.MoEDispatch node with its function bodies; y is cast to float32, which numpy has."""
    helper = onnx.helper
    elem_type = {"float32": FLOAT, "bfloat16": BFLOAT16}[t]
    types = [elem_type, INT32, FLOAT, INT32, BFLOAT16, INT64]
    names = [f"input_{index}" for index in range(6)]
    inputs = [helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in zip(names, types, strict=True)]
    attributes = {"intermediate_size": intermediate, "group_size": group}
    nodes = [
        helper.make_node("MoEDispatch", names, ["y_t"], domain="k25", **attributes),
        helper.make_node("Cast", ["y_t"], ["y"], to=FLOAT),
    ]
    graph = helper.make_graph(nodes, "moe", inputs, [helper.make_tensor_value_info("y", FLOAT, [None, None])])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions_for(["MoEDispatch"]), ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_moe(
    form: str, layer: Layer, x: Array, ids: Array, weights: Array, *, t: str = "float32", table: Array | None = None
) -> Array:
    """y as float32. Words and scales are two views of the same bytes."""
    words, scales = layer.region.view(np.int32).reshape(-1, 2), layer.region.view(np.uint16).reshape(-1, 4)
    table = layer.table if table is None else table
    if form == "eager":
        tensors = [torch.from_numpy(np.array(values)) for values in (ids, weights, words, scales, table)]
        tensors[3] = tensors[3].view(torch.bfloat16)
        x_t = torch.from_numpy(x).to(getattr(torch, t))
        y = torch.ops.k25.moe_dispatch(x_t, *tensors, layer.intermediate, layer.group)
        assert y.dtype == x_t.dtype
        return y.float().numpy()
    value, typed = ort.OrtValue.ortvalue_from_numpy, ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = [
        value(x) if t == "float32" else typed(bfloat16_bits(x), BFLOAT16),
        *(value(ids), value(weights), value(words), typed(scales, BFLOAT16), value(table)),
    ]
    feeds = {f"input_{index}": item for index, item in enumerate(values)}
    return session(t, layer.intermediate, layer.group).run_with_ort_values(None, feeds)[0].numpy()


def check_close(found: Array, expected: Array, t: str = "float32") -> None:
    """Float32 arithmetic (error relative to the largest value of the token), then one rounding to `t`."""
    assert found.shape == expected.shape
    error = np.abs(found - expected)
    allowed = 3e-6 * np.abs(expected).max(axis=1, keepdims=True) + 1e-9
    if t == "bfloat16":
        allowed = allowed + 2.0**-8 * np.abs(expected)
    assert (error <= allowed).all(), f"off by {error.max()} of {np.abs(expected).max()}"


@each_form
@pytest.mark.parametrize("t", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "experts", "k", "tokens"),
    [
        (32, 32, 1, 1, 1),
        (96, 64, 10, 3, 1),
        (96, 64, 10, 3, 7),
        (64, 96, 5, 5, 4),
        (32, 160, 3, 2, 11),
    ],
)
def test_odd_sizes(form: str, t: str, hidden: int, intermediate: int, experts: int, k: int, tokens: int) -> None:
    layer = random_layer(hidden, intermediate, experts, seed=experts)
    x, ids, weights = random_call(layer, tokens, k)
    expected = layer.oracle(x, ids, weights)
    assert np.abs(expected).max() > 0.1
    found = run_moe(form, layer, x, ids, weights, t=t)
    check_close(found, expected, t)
    if t == "bfloat16":
        np.testing.assert_array_equal(bfloat16_values(bfloat16_bits(found)), found)


@each_form
def test_all_tokens_on_one_expert(form: str) -> None:
    layer = random_layer(64, 32, 6)
    x, ids, weights = random_call(layer, 9, 1)
    ids[:] = 4
    check_close(run_moe(form, layer, x, ids, weights), layer.oracle(x, ids, weights))


@each_form
def test_weights_are_those_of_the_chosen_slot(form: str) -> None:
    layer = random_layer(32, 32, 4)
    x, _, _ = random_call(layer, 2, 1)
    ids = np.array([[2, 0], [0, 2]], np.int32)
    weights = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    expected = np.array([layer.apply(x[0].astype(np.float64), 2), layer.apply(x[1].astype(np.float64), 0)])
    check_close(run_moe(form, layer, x, ids, weights), expected)


@each_form
def test_experts_that_are_not_held_add_nothing(form: str) -> None:
    layer = random_layer(64, 32, 7)
    x, ids, weights = random_call(layer, 6, 3)
    ids[2] = [1, 3, 5]
    held = layer.table.copy()
    held[[1, 3, 5]] = -1
    found = run_moe(form, layer, x, ids, weights, table=held)
    layer.table = held
    expected = layer.oracle(x, ids, weights)
    check_close(found, expected)
    assert found[2].tolist() == [0.0] * 64
    assert np.abs(expected).max() > 0.01


@each_form
def test_shares_of_several_ranks_sum_to_the_whole(form: str) -> None:
    layer = random_layer(64, 64, 8)
    x, ids, weights = random_call(layer, 5, 4)
    total = np.zeros(x.shape)
    for rank in range(3):
        table = layer.table.copy()
        table[np.arange(8) % 3 != rank] = -1
        total += run_moe(form, layer, x, ids, weights, table=table)
    check_close(total, layer.oracle(x, ids, weights))


@each_form
def test_no_expert_is_held(form: str) -> None:
    layer = random_layer(32, 32, 3)
    x, ids, weights = random_call(layer, 4, 2)
    found = run_moe(form, layer, x, ids, weights, table=np.full_like(layer.table, -1))
    np.testing.assert_array_equal(found, np.zeros((4, 32), np.float32))


@each_form
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("matrix", [0, 1, 2], ids=["gate", "up", "down"])
def test_a_non_finite_expert_stays_with_the_tokens_that_chose_it(form: str, bits: int, matrix: int) -> None:
    layer = random_layer(32, 64, 5)
    bad = 3
    layer.experts[bad][matrix].scales[:] = bits
    layer = layer_of(layer.experts, 32, 64, 32)
    x, ids, weights = random_call(layer, 8, 2)
    ids[:5] = [[0, 1], [2, 4], [1, 0], [4, 2], [0, 4]]
    ids[5:] = [[3, 1], [2, 3], [3, 0]]
    found = run_moe(form, layer, x, ids, weights)
    clean = [token for token in range(8) if bad not in ids[token]]
    assert clean == [0, 1, 2, 3, 4]
    check_close(found[clean], layer.oracle(x[clean], ids[clean], weights[clean]))
    assert not np.isfinite(found[5:]).all(axis=1).any()


@each_form
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_token_stays_alone(form: str, value: float) -> None:
    layer = random_layer(32, 32, 4)
    x, ids, weights = random_call(layer, 5, 2)
    expected = layer.oracle(x, ids, weights)
    x[2, 7] = value
    ids[2] = [ids[0, 0], ids[1, 1] if ids[1, 1] != ids[0, 0] else (ids[0, 0] + 1) % 4]
    found = run_moe(form, layer, x, ids, weights)
    others = [0, 1, 3, 4]
    check_close(found[others], expected[others])
    assert np.isnan(found[2]).any()


def identity_layer(gate: Matrix) -> Layer:
    """One expert: `gate` under test, up makes a constant, so that the output shows the gate's rows one by one."""
    generator = np.random.default_rng(9)
    out, columns = gate.words.shape[0], gate.words.shape[1] * 8
    up, down = random_matrix(generator, out, columns, 32), random_matrix(generator, columns, out, 32)
    return layer_of([(gate, up, down)], columns, out, 32)


@each_form
@pytest.mark.parametrize("word", EXTREME_WORDS.tolist())
def test_extreme_words(form: str, word: int) -> None:
    scales = bfloat16_bits(np.full((32, 1), 0.05))
    layer = identity_layer(Matrix(np.full((32, 4), word, np.int32), scales))
    x, ids, weights = random_call(layer, 3, 1)
    expected = layer.oracle(x, ids, weights)
    check_close(run_moe(form, layer, x, ids, weights), expected)


@each_form
def test_every_nibble_value_at_every_place(form: str) -> None:
    # Row r of the gate has value r mod 16 at place r div 4 mod 8, and a token for each column picks it out.
    words = np.full((32, 4), -0x77777778, np.int32)  # every nibble 8, that is 0
    for row in range(32):
        place, nibble = row // 4 % 8, row % 16
        unsigned = (0x88888888 & ~(15 << (4 * place))) | (nibble << (4 * place))
        words[row, row % 4] = np.array([unsigned], np.uint32).view(np.int32)[0]
    layer = identity_layer(Matrix(words, bfloat16_bits(np.full((32, 1), 0.25))))
    x = np.eye(32, dtype=np.float32)
    ids, weights = np.zeros((32, 1), np.int32), np.ones((32, 1), np.float32)
    check_close(run_moe(form, layer, x, ids, weights), layer.oracle(x, ids, weights))


@each_form
@pytest.mark.parametrize("group", [16, 32, 64])
def test_scales_change_exactly_at_group_boundaries(form: str, group: int) -> None:
    layer = random_layer(128, 128, 2, group=group)
    for matrices in layer.experts:
        for matrix in matrices:
            factors = np.where(np.arange(128 // group) % 2, 8.0, 1.0) / 200
            matrix.scales[:] = bfloat16_bits(np.tile(factors, (128, 1)))
    layer = layer_of(layer.experts, 128, 128, group)
    x, ids, weights = random_call(layer, 3, 2)
    check_close(run_moe(form, layer, x, ids, weights), layer.oracle(x, ids, weights))


@each_form
def test_weights_are_not_rounded_to_bfloat16(form: str) -> None:
    # -7 * 1.0078125 needs more bits than bfloat16 has; a rounded weight is off by 4e-3.
    words = np.full((32, 4), 0x11111111, np.int32)
    layer = identity_layer(Matrix(words, bfloat16_bits(np.full((32, 1), 1.0078125))))
    x, ids, weights = np.full((1, 32), 1 / 64, np.float32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    assert layer.experts[0][0].weight()[0, 0] == -7 * 1.0078125
    check_close(run_moe(form, layer, x, ids, weights), layer.oracle(x, ids, weights))


@each_form
def test_the_sum_over_experts_is_float32_for_bfloat16_activations(form: str) -> None:
    # Eight experts of about the same size: partial sums in bfloat16 would add eight roundings.
    layer = random_layer(32, 32, 8)
    layer = layer_of([layer.experts[0]] * 8, 32, 32, 32)
    x, ids, _ = random_call(layer, 4, 8)
    weights = np.full((4, 8), 0.123, np.float32)
    check_close(run_moe(form, layer, x, ids, weights, t="bfloat16"), layer.oracle(x, ids, weights), "bfloat16")


@functools.cache
def shared_layer() -> Layer:
    return random_layer(64, 32, 9, seed=4)


@each_form
@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(1, 6), k=st.integers(1, 9), seed=st.integers(0, 10_000), held=st.sets(st.integers(0, 8)))
def test_any_choice(form: str, tokens: int, k: int, seed: int, held: set[int]) -> None:
    layer = shared_layer()
    x, ids, weights = random_call(layer, tokens, k, seed=seed)
    table = layer.table.copy()
    table[sorted(set(range(9)) - held)] = -1
    partial = Layer(layer.hidden, layer.intermediate, layer.group, layer.experts, layer.region, table)
    partial.weights = layer.weights
    check_close(run_moe(form, layer, x, ids, weights, table=table), partial.oracle(x, ids, weights))


@each_form
def test_a_token_does_not_depend_on_the_others(form: str) -> None:
    layer = shared_layer()
    x, ids, weights = random_call(layer, 6, 3, seed=1)
    alone = [run_moe(form, layer, x[[token]], ids[[token]], weights[[token]]) for token in range(6)]
    check_close(run_moe(form, layer, x, ids, weights), np.concatenate(alone))
