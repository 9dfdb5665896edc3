"""`k25.MLA`, the eager reference and the ONNX function body, against the expanded form in float64.

The oracle is another form of the attention than the one under test: keys [UK c | k_rope] and values UV c are built for
each head, as the papers define them, and it keeps its own account of which block holds which position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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
BFLOAT16, FLOAT, INT32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
ONNX_FLOATS = {"float32": FLOAT, "bfloat16": BFLOAT16}
TORCH_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Half a unit in the last place of bfloat16 (8 significant bits), relative.
HALF_ULP = {"float32": 0.0, "bfloat16": 2.0**-8}
FORMS = ["eager", "onnx"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: waking a second thread costs more than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Sizes:
    """`table_width` is the number of entries of a block-table row."""

    heads: int = 5
    nope: int = 12
    rope: int = 6
    v: int = 28
    rank: int = 20
    block_size: int = 3
    table_width: int = 8
    t: str = "float32"
    tc: str = "float32"

    @property
    def width(self) -> int:
        return self.rank + self.rope

    @property
    def scale(self) -> float:
        return 1.3 / float(np.sqrt(self.nope + self.rope))

    @property
    def inv_freq(self) -> list[float]:
        return [0.9 ** (3 * index) for index in range(self.rope // 2)]


def rounded(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    return torch.from_numpy(np.asarray(values, np.float32)).to(TORCH_FLOATS[dtype]).float().numpy()


def rotated(vectors: Array, position: int, inv_freq: Sequence[float]) -> Array:
    """Each adjacent pair (a, b) as the complex number a + ib times e^(i position inv_freq), in double precision."""
    pairs = np.asarray(vectors, np.float64).reshape(*vectors.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * position * np.asarray(inv_freq, np.float64))
    return np.stack([turned.real, turned.imag], -1).reshape(vectors.shape)


class Model:
    """Random weights, and random projections for every (sequence, position)."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        self.sizes, self.seed = sizes, seed
        generator = np.random.default_rng(seed)
        shape = (sizes.heads * (sizes.nope + sizes.v), sizes.rank)
        self.kv_b = rounded(generator.normal(size=shape) / np.sqrt(sizes.rank), "bfloat16")

    def token(self, sequence: int, position: int) -> tuple[Array, Array]:
        """q [heads * (nope + rope)] and latent [rank + rope] of one token, before rotation, as the op takes them."""
        sizes = self.sizes
        generator = np.random.default_rng([self.seed, sequence, position])
        q = generator.normal(size=sizes.heads * (sizes.nope + sizes.rope))
        return rounded(2 * q, sizes.t), rounded(generator.normal(size=sizes.width), sizes.t)

    def row(self, sequence: int, position: int) -> Array:
        """What the cache must hold for a token: the latent as it is, then the rotated key."""
        latent = self.token(sequence, position)[1].astype(np.float64)
        rank = self.sizes.rank
        return np.concatenate([latent[:rank], rotated(latent[rank:], position, self.sizes.inv_freq)])

    def attended(self, sequence: int, position: int, rows: Array) -> Array:
        """The expanded form over the rows [position + 1, width] that the cache holds: [heads * v]."""
        sizes = self.sizes
        q = self.token(sequence, position)[0].astype(np.float64).reshape(sizes.heads, -1)
        out = []
        for head in range(sizes.heads):
            block = self.kv_b.astype(np.float64).reshape(sizes.heads, sizes.nope + sizes.v, sizes.rank)[head]
            latents, key_ropes = rows[:, : sizes.rank], rows[:, sizes.rank :]
            keys = np.concatenate([latents @ block[: sizes.nope].T, key_ropes], 1)
            values = latents @ block[sizes.nope :].T
            query = np.concatenate([q[head, : sizes.nope], rotated(q[head, sizes.nope :], position, sizes.inv_freq)])
            scores = sizes.scale * (keys @ query)
            weights = np.exp(scores - scores.max())
            out.append((weights / weights.sum()) @ values)
        return np.concatenate(out)


class PagedCache:
    """Blocks of sequences in a cache, given out in a shuffled order; block 0 is given out too."""

    def __init__(self, sizes: Sizes, sequences: int, *, filler: float = 0.0, spare: int = 2, seed: int = 0) -> None:
        self.sizes = sizes
        count = sequences * sizes.table_width + spare
        self.free = np.random.default_rng(seed).permutation(count).tolist()
        self.blocks: list[list[int]] = [[] for _ in range(sequences)]
        self.values = np.full((count, sizes.block_size, sizes.width), filler, np.float32)

    def reserve(self, sequence: int, length: int) -> None:
        while len(self.blocks[sequence]) * self.sizes.block_size < length:
            block = self.free.pop()
            self.blocks[sequence].append(block)
            self.values[block] = 0  # zero-filled when allocated

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        block, slot = divmod(position, self.sizes.block_size)
        return self.blocks[sequence][block], slot

    def rows(self, sequence: int, length: int) -> Array:
        found = [self.values[self.place(sequence, position)] for position in range(length)]
        return np.array(found, np.float64)

    def table(self) -> npt.NDArray[np.int32]:
        table = np.zeros((len(self.blocks), self.sizes.table_width), np.int32)
        for sequence, blocks in enumerate(self.blocks):
            table[sequence, : len(blocks)] = blocks
        return table


@functools.cache
def session(t: str, tc: str, attributes: tuple[tuple[str, Any], ...]) -> ort.InferenceSession:
    """A graph of one k25.MLA node with its function body; outputs are cast to float32, which numpy has."""
    helper = onnx.helper
    types = [ONNX_FLOATS[t], ONNX_FLOATS[t], ONNX_FLOATS[tc], BFLOAT16, INT32, INT32, INT32]
    ranks = [2, 2, 3, 2, 1, 1, 2]
    names = [f"input_{index}" for index in range(7)]
    inputs = [
        helper.make_tensor_value_info(name, elem_type, [None] * rank)
        for name, elem_type, rank in zip(names, types, ranks, strict=True)
    ]
    outputs = [
        helper.make_tensor_value_info("out", FLOAT, [None] * 2),
        helper.make_tensor_value_info("cache_out", FLOAT, [None] * 3),
    ]
    nodes = [
        helper.make_node("MLA", names, ["out_t", "cache_out_t"], domain="k25", **dict(attributes)),
        helper.make_node("Cast", ["out_t"], ["out"], to=FLOAT),
        helper.make_node("Cast", ["cache_out_t"], ["cache_out"], to=FLOAT),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    graph = helper.make_graph(nodes, "mla", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, functions=functions_for(["MLA"]), ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ort_value(values: Array, dtype: str) -> ort.OrtValue:
    if dtype == "bfloat16":
        bits = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))


def run_mla(form: str, sizes: Sizes, arrays: Sequence[Array], kv_b: Array) -> tuple[Array, Array]:
    """`arrays` are q, latent, cache, positions, query_start and block_table; floats are given as float32."""
    q, latent, cache, positions, query_start, block_table = arrays
    if form == "eager":
        floats = [
            torch.from_numpy(np.array(values)).to(TORCH_FLOATS[dtype])
            for values, dtype in ((q, sizes.t), (latent, sizes.t), (cache, sizes.tc), (kv_b, "bfloat16"))
        ]
        integers = [torch.from_numpy(values) for values in (positions, query_start, block_table)]
        kept = floats[2].clone()
        out, cache_out = torch.ops.k25.mla(
            *floats, *integers, sizes.heads, sizes.nope, sizes.v, sizes.scale, sizes.inv_freq
        )
        torch.testing.assert_close(floats[2], kept, rtol=0, atol=0, equal_nan=True, msg="the input cache was changed")
        assert (out.dtype, cache_out.dtype) == (TORCH_FLOATS[sizes.t], TORCH_FLOATS[sizes.tc])
        return out.float().numpy(), cache_out.float().numpy()
    attributes = {
        "num_heads": sizes.heads,
        "qk_nope_head_dim": sizes.nope,
        "v_head_dim": sizes.v,
        "softmax_scale": sizes.scale,
        "inv_freq": tuple(sizes.inv_freq),
    }
    values = [
        *(ort_value(q, sizes.t), ort_value(latent, sizes.t), ort_value(cache, sizes.tc), ort_value(kv_b, "bfloat16")),
        *(ort_value(integers, "int32") for integers in (positions, query_start, block_table)),
    ]
    feeds = {f"input_{index}": value for index, value in enumerate(values)}
    found = session(sizes.t, sizes.tc, tuple(attributes.items())).run_with_ort_values(None, feeds)
    return found[0].numpy(), found[1].numpy()


class Simulation:
    """Sequences that grow step by step through one cache, every step checked against the oracle."""

    def __init__(self, form: str, sizes: Sizes, sequences: int, *, filler: float = 0.0, seed: int = 0) -> None:
        self.form, self.sizes, self.model = form, sizes, Model(sizes, seed)
        self.cache = PagedCache(sizes, sequences, filler=filler, seed=seed)
        self.lengths = [0] * sequences

    def call(self, counts: Sequence[int]) -> tuple[list[tuple[int, int]], list[Array]]:
        """The tokens (sequence, position) of a step, and q, latent, cache, positions, query_start, block_table."""
        tokens = [
            (sequence, self.lengths[sequence] + index)
            for sequence, count in enumerate(counts)
            for index in range(count)
        ]
        for sequence, count in enumerate(counts):
            self.lengths[sequence] += count
            self.cache.reserve(sequence, self.lengths[sequence])
        projections = [self.model.token(*token) for token in tokens]
        return tokens, [
            np.array([q for q, _ in projections], np.float32),
            np.array([latent for _, latent in projections], np.float32),
            self.cache.values,
            np.array([position for _, position in tokens], np.int32),
            np.cumsum([0, *counts]).astype(np.int32),
            self.cache.table(),
        ]

    def step(self, counts: Sequence[int]) -> Array:
        """Append `counts[s]` tokens to sequence s in one call. Checks everything; returns `out` [tokens, heads * v]."""
        tokens, arrays = self.call(counts)
        before = self.cache.values
        out, after = run_mla(self.form, self.sizes, arrays, self.model.kv_b)
        self.check_cache(tokens, before, after)
        self.cache.values = np.array(after)
        for index, (sequence, position) in enumerate(tokens):
            expected = self.model.attended(sequence, position, self.cache.rows(sequence, position + 1))
            self.check_close(out[index], expected, self.sizes.t, f"sequence {sequence}, position {position}")
        return out

    def check_cache(self, tokens: Sequence[tuple[int, int]], before: Array, after: Array) -> None:
        is_written = np.zeros(after.shape[:2], bool)
        for token in tokens:
            place = self.cache.place(*token)
            is_written[place] = True
            self.check_close(after[place], self.model.row(*token), self.sizes.tc, f"cache row of {token}")
        assert is_written.sum() == len(tokens)
        np.testing.assert_array_equal(after[~is_written], before[~is_written])

    @staticmethod
    def check_close(found: Array, expected: Array, dtype: str, what: str) -> None:
        """Float32 arithmetic, then at most one rounding to `dtype`."""
        error = np.abs(found - expected)
        allowed = 2e-5 * max(1.0, float(np.abs(expected).max())) + HALF_ULP[dtype] * np.abs(expected)
        assert (error <= allowed).all(), f"{what}: off by {error.max()}, expected {expected}, found {found}"
        np.testing.assert_array_equal(rounded(found, dtype), found, err_msg=f"{what} is not rounded to {dtype}")


DTYPES = [(t, tc) for t in ("float32", "bfloat16") for tc in ("float32", "bfloat16")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "tc"), DTYPES)
def test_one_token_then_one_more(form: str, t: str, tc: str) -> None:
    simulation = Simulation(form, Sizes(t=t, tc=tc, block_size=1), 1)
    first = simulation.step([1])
    assert np.abs(first).max() > 0.1
    simulation.step([1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "tc"), DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_ragged_sequences_through_shuffled_blocks(form: str, t: str, tc: str, block_size: int) -> None:
    width = -(-24 // block_size)
    simulation = Simulation(form, Sizes(t=t, tc=tc, block_size=block_size, table_width=width), 4)
    simulation.step([7, 0, 3, 1])  # one sequence has not started
    simulation.step([1, 17, 0, 2])  # one has no token in this call
    simulation.step([1, 1, 1, 1])
    simulation.step([0, 0, 20, 0])
    assert simulation.lengths == [9, 18, 24, 4]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads=1, nope=1, rope=2, v=1, rank=1),
        Sizes(heads=3, nope=7, rope=2, v=11, rank=5),
        Sizes(heads=7, nope=4, rope=10, v=3, rank=33, block_size=5),
        Sizes(heads=2, nope=24, rope=4, v=16, rank=8, table_width=20),
    ],
)
def test_sizes_that_have_nothing_in_common(form: str, sizes: Sizes) -> None:
    simulation = Simulation(form, sizes, 2)
    simulation.step([4, 2])
    simulation.step([1, 5])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tc", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 7], [3, 3, 3, 3, 1], [12, 1]])
def test_chunks_equal_one_go(form: str, tc: str, chunks: list[int]) -> None:
    sizes = Sizes(tc=tc, table_width=5)
    whole, parts = Simulation(form, sizes, 1), Simulation(form, sizes, 1)
    at_once = whole.step([13])
    in_parts = np.concatenate([parts.step([count]) for count in chunks])
    np.testing.assert_allclose(in_parts, at_once, rtol=0, atol=2e-5)
    np.testing.assert_allclose(parts.cache.rows(0, 13), whole.cache.rows(0, 13), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_context_crosses_a_block_boundary_at_every_position(form: str) -> None:
    sizes = Sizes(block_size=3, table_width=4)
    for before in range(1, 9):
        simulation = Simulation(form, sizes, 1, seed=before)
        simulation.step([before])
        simulation.step([2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("filler", [1e20, np.inf, np.nan])
def test_free_blocks_are_not_seen(form: str, filler: float) -> None:
    # Blocks that nobody owns hold anything, and unused table entries (0) may point at one of them.
    filled = Simulation(form, Sizes(table_width=6), 3, filler=filler)
    calm = Simulation(form, Sizes(table_width=6), 3)
    for counts in ([4, 1, 0], [1, 1, 9], [3, 0, 1]):
        np.testing.assert_array_equal(filled.step(counts), calm.step(counts))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tc", ["float32", "bfloat16"])
def test_a_token_that_is_not_finite_reaches_no_other_sequence_and_no_earlier_token(form: str, tc: str) -> None:
    simulation = Simulation(form, Sizes(tc=tc, table_width=6), 3)
    # Block 0, which all padding of the table points at, belongs to the sequence that goes wrong.
    simulation.cache.free.remove(0)
    simulation.cache.blocks[1].append(0)
    simulation.cache.values[0] = 0
    tokens, arrays = simulation.call([4, 5, 2])
    clean, _ = run_mla(form, simulation.sizes, arrays, simulation.model.kv_b)
    bad = tokens.index((1, 2))
    arrays[0][bad], arrays[1][bad] = np.nan, np.inf
    found, _ = run_mla(form, simulation.sizes, arrays, simulation.model.kv_b)
    unreached = [index for index, (sequence, position) in enumerate(tokens) if sequence != 1 or position < 2]
    np.testing.assert_array_equal(found[unreached], clean[unreached])
    assert np.isnan(found[[index for index in range(len(tokens)) if index not in unreached]]).any(axis=1).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_wider_block_table_changes_nothing(form: str) -> None:
    narrow, wide = Simulation(form, Sizes(table_width=2), 1), Simulation(form, Sizes(table_width=40), 1)
    np.testing.assert_allclose(wide.step([6]), narrow.step([6]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_of_the_step_are_not_seen(form: str) -> None:
    first, second = Simulation(form, Sizes(), 1), Simulation(form, Sizes(), 1)
    np.testing.assert_allclose(first.step([8])[:3], second.step([3]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_stay_finite(form: str) -> None:
    sizes = Sizes()
    model = Model(sizes)
    model.kv_b = rounded(model.kv_b * 400, "bfloat16")  # scores of several thousand: exp overflows unless shifted
    simulation = Simulation(form, sizes, 1)
    simulation.model = model
    out = simulation.step([9])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("form", FORMS)
def test_far_positions(form: str) -> None:
    simulation = Simulation(form, Sizes(block_size=16, table_width=16), 2)
    simulation.step([150, 30])
    simulation.step([1, 3])


schedules = st.lists(
    st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(lambda counts: sum(counts) > 0), min_size=1, max_size=4
)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=25)
@given(schedule=schedules, block_size=st.sampled_from([1, 2, 3, 16]), tc=st.sampled_from(["float32", "bfloat16"]))
def test_any_schedule(form: str, schedule: list[list[int]], block_size: int, tc: str) -> None:
    simulation = Simulation(form, Sizes(block_size=block_size, table_width=20, tc=tc), 3)
    for counts in schedule:
        simulation.step(counts)
