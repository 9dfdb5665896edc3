"""`k25.Router`, the eager reference and the ONNX function body, against a float64 oracle.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from k25_plugins import torch_ops
from k25_plugins.errors import InputError
from k25_plugins.onnx_functions import functions_for

assert torch_ops.REFERENCES  # importing it registers the ops

Array = npt.NDArray[Any]
Run = Callable[..., tuple[Array, Array]]
#: ONNX Runtime's sigmoid is good to some 1e-7 of 1, not of itself.
TOLERANCE = 5e-6
#: Scores that lie closer together than this may be chosen in any order.
APART = 1e-6
# tokens, experts, experts a token
SIZES = [
    *((1, 1, 1), (1, 3, 2), (7, 10, 3), (5, 17, 1), (3, 17, 17), (2, 255, 255)),
    *((1, 384, 8), (130, 384, 8), (9, 385, 6), (33, 64, 64), (4, 1023, 31)),
]
each_size = pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)


def sigmoid(logits: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))))


def biased_scores(logits_TE: Array, bias_E: Array) -> Array:
    return np.asarray(sigmoid(logits_TE) + bias_E.astype(np.float64))


def random_call(tokens: int, experts: int, spread: float = 1.5) -> tuple[Array, Array]:
    """Logits and a bias that choose the same experts in any arithmetic: no two biased scores are nearly equal."""
    generator = np.random.default_rng([tokens, experts])
    bias_E = generator.normal(scale=0.1, size=experts).astype(np.float32)
    rows: list[Array] = []
    while len(rows) < tokens:
        row = (spread * generator.normal(size=(1, experts))).astype(np.float32)
        gaps = np.diff(np.sort(biased_scores(row, bias_E)))
        while (close := np.flatnonzero(gaps[0] < APART)).size:  # rare: another logit for one of the two
            order = np.argsort(biased_scores(row, bias_E)[0])
            row[0, order[close]] = spread * generator.normal(size=close.size)
            gaps = np.diff(np.sort(biased_scores(row, bias_E)))
        rows.append(row)
    return np.concatenate(rows), bias_E


def oracle(
    logits_TE: Array, bias_E: Array, top_k: int, normalise: int = 1, scaling_factor: float = 2.827
) -> tuple[Array, Array]:
    """Best first, of equal ones the lower id."""
    scores_TE = sigmoid(logits_TE)
    ids_TK = np.argsort(-(scores_TE + bias_E.astype(np.float64)), axis=1, kind="stable")[:, :top_k]
    weights_TK = np.take_along_axis(scores_TE, ids_TK, axis=1)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(axis=1, keepdims=True) + 1e-20)
    return ids_TK, weights_TK * scaling_factor


def model(top_k: int, normalise: int, scaling_factor: float) -> bytes:
    helper, floats, ints = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    inputs = [
        helper.make_tensor_value_info("logits", floats, ["tokens", "experts"]),
        helper.make_tensor_value_info("bias", floats, ["experts"]),
    ]
    outputs = [
        helper.make_tensor_value_info("expert_ids", ints, ["tokens", top_k]),
        helper.make_tensor_value_info("expert_weights", floats, ["tokens", top_k]),
    ]
    attributes = {"top_k": top_k, "normalise": normalise, "scaling_factor": scaling_factor}
    node = helper.make_node("Router", ["logits", "bias"], ["expert_ids", "expert_weights"], domain="k25", **attributes)
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions_for(["Router"]), ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    data: bytes = made.SerializeToString()
    return data


@functools.cache
def session(top_k: int, normalise: int, scaling_factor: float) -> ort.InferenceSession:
    return ort.InferenceSession(model(top_k, normalise, scaling_factor), providers=["CPUExecutionProvider"])


def checked(ids_TK: Array, weights_TK: Array, tokens: int, top_k: int) -> tuple[Array, Array]:
    assert (ids_TK.dtype, weights_TK.dtype) == (np.dtype(np.int32), np.dtype(np.float32))
    assert ids_TK.shape == weights_TK.shape == (tokens, top_k)
    return ids_TK, weights_TK


def eager(
    logits_TE: Array, bias_E: Array, top_k: int, normalise: int = 1, scaling_factor: float = 2.827
) -> tuple[Array, Array]:
    tensors = [torch.from_numpy(array) for array in (logits_TE, bias_E)]
    ids_TK, weights_TK = torch.ops.k25.router(*tensors, top_k, normalise, scaling_factor)
    return checked(ids_TK.numpy(), weights_TK.numpy(), len(logits_TE), top_k)


def body(
    logits_TE: Array, bias_E: Array, top_k: int, normalise: int = 1, scaling_factor: float = 2.827
) -> tuple[Array, Array]:
    run = session(top_k, normalise, scaling_factor)
    ids_TK, weights_TK = run.run(None, {"logits": logits_TE, "bias": bias_E})
    return checked(ids_TK, weights_TK, len(logits_TE), top_k)


each_form = pytest.mark.parametrize("run", [eager, body], ids=["eager", "onnx"])


@each_form
@each_size
@pytest.mark.parametrize("normalise", [0, 1])
def test_values(run: Run, tokens: int, experts: int, top_k: int, normalise: int) -> None:
    call = random_call(tokens, experts)
    ids, weights = run(*call, top_k, normalise)
    wanted_ids, wanted_weights = oracle(*call, top_k, normalise)
    assert ids.tolist() == wanted_ids.tolist()
    np.testing.assert_allclose(weights, wanted_weights, rtol=TOLERANCE, atol=TOLERANCE * 0.1)


@each_form
def test_normalised_weights_sum_to_the_factor(run: Run) -> None:
    call = random_call(40, 96)
    for factor in (1.0, 2.827, -0.5):
        np.testing.assert_allclose(run(*call, 5, 1, factor)[1].sum(axis=1), np.full(40, factor), rtol=1e-6)
        np.testing.assert_allclose(run(*call, 1, 1, factor)[1], np.full((40, 1), factor), rtol=1e-6)
    assert not run(*call, 5, 1, 0.0)[1].any()


@each_form
@pytest.mark.parametrize("normalise", [2, -1, 256, 2**32])
def test_what_is_not_zero_normalises(run: Run, normalise: int) -> None:
    call = random_call(3, 10)
    found, wanted = run(*call, 4, normalise), run(*call, 4, 1)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (run(*call, 4, 0)[1] != wanted[1]).any()


@each_form
def test_the_bias_turns_the_choice_and_no_weight(run: Run) -> None:
    logits = np.array([[2.0, 1.0, 0.0, -1.0, -2.0]], np.float32)
    none, some = np.zeros(5, np.float32), np.array([0, 0, 0, 5, 7], np.float32)
    assert run(logits, none, 2)[0].tolist() == [[0, 1]]
    ids, weights = run(logits, some, 2, 0, 1.0)
    assert ids.tolist() == [[4, 3]]
    np.testing.assert_allclose(weights, sigmoid(logits[:, [4, 3]]), rtol=TOLERANCE)
    ids, weights = run(logits, some, 3, 1, 1.0)
    assert ids.tolist() == [[4, 3, 0]]
    scores = sigmoid(logits[:, [4, 3, 0]])
    np.testing.assert_allclose(weights, scores / scores.sum(), rtol=TOLERANCE)


@each_form
def test_one_bias_for_all_changes_nothing(run: Run) -> None:
    logits, _ = random_call(20, 33)
    zero, half = (run(logits, np.full(33, bias, np.float32), 33, 0) for bias in (0.0, -0.5))
    one, other = (np.take_along_axis(found[1], np.argsort(found[0], axis=1), axis=1) for found in (zero, half))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (8, 3), (17, 17), (384, 8), (384, 200), (1023, 31)])
def test_of_equal_scores_the_lower_id_is_first(experts: int, top_k: int) -> None:
    """ONNX says so of TopK; torch promises nothing."""
    zeros = np.zeros(experts, np.float32)
    for logit in (0.0, -1.7, 200.0):
        ids, weights = body(np.full((3, experts), logit, np.float32), zeros, top_k, 1, 1.0)
        assert ids.tolist() == [[*range(top_k)]] * 3
        np.testing.assert_allclose(weights, np.full((3, top_k), 1 / top_k), rtol=1e-6)
    # Four scores, each of every fourth expert.
    logits = np.tile(np.array([-1.0, 2.0, 0.5, 1.0], np.float32), -(-experts // 4))[None, :experts]
    assert body(logits, zeros, top_k)[0].tolist() == oracle(logits, zeros, top_k)[0].tolist()


@each_form
def test_scores_that_all_vanish_have_weight_zero(run: Run) -> None:
    """exp(-200) is 0 in float32: 0 / (0 + 1e-20)."""
    logits, zeros = np.full((2, 10), -200, np.float32), np.zeros(10, np.float32)
    ids, weights = run(logits, zeros, 3)
    assert all(len({*row}) == 3 for row in ids.tolist())
    assert not weights.any()
    # And next to a token whose scores do not.
    logits[1] = np.arange(10) - 4.5
    ids, weights = run(logits, zeros, 3)
    assert not weights[0].any()
    assert ids[1].tolist() == [9, 8, 7]
    np.testing.assert_allclose(weights[1], oracle(logits, zeros, 3)[1][1], rtol=TOLERANCE)


def test_scores_far_below_one_keep_their_digits() -> None:
    """Of the eager reference: down to sums that 1e-20 outweighs."""
    logits = np.array([[-30, -31, -32.5, -70], [-40, -41, -45, -46], [-60, -60.5, -61, -62]], np.float32)
    zeros = np.zeros(4, np.float32)
    ids, weights = eager(logits, zeros, 3)
    wanted_ids, wanted = oracle(logits, zeros, 3)
    assert ids.tolist() == wanted_ids.tolist()
    np.testing.assert_allclose(weights, wanted, rtol=TOLERANCE)
    assert wanted[2].sum() < 1e-5


@each_form
def test_infinite_logits_are_scores_of_nothing_and_one(run: Run) -> None:
    logits = np.array([[0, -np.inf, np.inf, 1], [-np.inf, -np.inf, 3, -np.inf]], np.float32)
    bias = np.array([0.0, 0.125, 0.25, 0.375], np.float32)
    ids, weights = run(logits, bias, 4, 0, 1.0)
    assert ids.tolist() == [[2, 3, 0, 1], [2, 3, 1, 0]]
    np.testing.assert_allclose(weights[0], [1, float(sigmoid(np.array(1.0))), 0.5, 0], rtol=TOLERANCE)
    np.testing.assert_allclose(weights[1], [float(sigmoid(np.array(3.0))), 0, 0, 0], rtol=TOLERANCE)


@each_form
@pytest.mark.parametrize("top_k", [1, 3, 17])
def test_what_is_not_a_number_stays_with_its_token(run: Run, top_k: int) -> None:
    logits, bias = random_call(6, 17)
    clean = run(logits, bias, top_k)
    logits[2, 5] = np.nan
    logits[4] = np.nan
    found = run(logits, bias, top_k)
    others = [0, 1, 3, 5]
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one[others], other[others])
    for row in found[0].tolist():
        assert len({*row} & {*range(17)}) == top_k
    assert np.isnan(found[1][4]).all()


@each_form
def test_each_token_chooses_by_itself(run: Run) -> None:
    logits, bias = random_call(130, 384)
    ids, weights = run(logits, bias, 8)
    for token in (0, 64, 129):
        alone = run(logits[token : token + 1], bias, 8)
        assert alone[0].tolist() == [ids[token].tolist()]
        np.testing.assert_allclose(alone[1][0], weights[token], rtol=1e-6)


@pytest.mark.parametrize("top_k", [-1, 0, 11])
def test_a_choice_of_no_or_too_many_experts_is_refused(top_k: int) -> None:
    message = rf"k25\.Router: attribute top_k: expected 1 to the 10 experts of input logits, found {top_k}$"
    for device in ("cpu", "meta"):
        tensors = [torch.zeros(4, 10, device=device), torch.zeros(10, device=device)]
        with pytest.raises(InputError, match=message):
            torch.ops.k25.router(*tensors, top_k, 1, 1.0)
    with FakeTensorMode(), pytest.raises((InputError, RuntimeError), match=message):
        torch.ops.k25.router(torch.zeros(4, 10), torch.zeros(10), top_k, 1, 1.0)


def test_inputs_that_do_not_fit_are_named() -> None:
    logits, bias = torch.zeros(4, 10), torch.zeros(10)
    with pytest.raises(InputError, match=r"k25\.Router: input bias, axis experts: expected 10, found 9"):
        torch.ops.k25.router(logits, bias[:9], 2, 1, 1.0)
    with pytest.raises(InputError, match=r"k25\.Router: input logits: expected dtype float32, found bfloat16"):
        torch.ops.k25.router(logits.bfloat16(), bias, 2, 1, 1.0)
    with pytest.raises(InputError, match=r"k25\.Router: input logits: expected axes \[tokens, experts\], found shape"):
        torch.ops.k25.router(logits[0], bias, 2, 1, 1.0)


class Choice(torch.nn.Module):
    """The op on a bias without memory."""

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.bias = torch.nn.Parameter(torch.empty(experts), requires_grad=False)

    def forward(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids_TK, weights_TK = torch.ops.k25.router(logits_TE, self.bias, self.top_k, 1, 2.827)
        return ids_TK, weights_TK


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_it_is_traced_without_data_for_any_number_of_tokens(top_k: int) -> None:
    with torch.device("meta"):
        module, logits = Choice(10, top_k), torch.empty(6, 10)
    tokens = {0: torch.export.Dim("tokens", min=1)}
    program = torch.export.export(module, (logits,), dynamic_shapes={"logits_TE": tokens})
    (call,) = [node for node in program.graph.nodes if node.target is torch.ops.k25.router.default]
    ids, weights = call.meta["val"]
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    for value in (ids, weights):
        assert not isinstance(value.shape[0], int)
        assert value.shape[1] == top_k
