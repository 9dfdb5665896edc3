"""The rules of plugins against the signature table that they are derived from."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from k25_plugins.errors import InputError
from k25_plugins.signatures import FLOAT_TYPES, MLA, MOE_DISPATCH, ONNX_DTYPES, OpSignature
from k25_plugins.tensorrt_plugin_rules import (
    PLUGIN_OPS,
    UnknownSize,
    aliased_input,
    aliased_outputs,
    dtype_fits,
    output_dtypes,
    output_shapes,
)
from k25_plugins.tensorrt_plugins import attributes_from_fields

MLA_ATTRIBUTES = {
    "num_heads": 3, "qk_nope_head_dim": 4, "v_head_dim": 5, "softmax_scale": 0.5, "inv_freq": (1.0, 0.1),
}  # fmt: skip
#: tokens 7, cache_dim 10 = 6 + 2 * 2, blocks 11, block_size 16, sequences 2, blocks_per_sequence 3
MLA_SHAPES = [(7, 24), (7, 10), (11, 16, 10), (27, 6), (7,), (3,), (2, 3)]


def test_the_ops_with_plugins_are_those_of_the_table() -> None:
    assert [signature.name for signature in PLUGIN_OPS] == ["MLA", "MoEDispatch"]


@pytest.mark.parametrize("signature", PLUGIN_OPS, ids=lambda signature: signature.name)
def test_a_combination_of_dtypes_fits_where_the_table_says_so(signature: OpSignature) -> None:
    """All combinations of inputs and outputs, judged position by position as TensorRT asks."""
    specs = signature.inputs + signature.outputs
    wanted = {tuple(chosen.get(spec.dtype, spec.dtype) for spec in specs) for chosen in signature.overloads()}
    choices = [FLOAT_TYPES if spec.dtype not in ONNX_DTYPES else tuple(ONNX_DTYPES) for spec in specs]
    found = set()
    for dtypes in product(*choices):
        if all(dtype_fits(signature, position, dtypes[: position + 1]) for position in range(len(specs))):
            found.add(dtypes)
    assert found == wanted
    for dtypes in wanted:
        assert output_dtypes(signature, dtypes[: len(signature.inputs)]) == list(dtypes[len(signature.inputs) :])


@pytest.mark.parametrize("dtype", ["float16", "DataType.HALF", "int8", ""])
def test_other_dtypes_never_fit(dtype: str) -> None:
    assert not any(dtype_fits(signature, 0, [dtype]) for signature in PLUGIN_OPS)


def test_the_cache_is_updated_in_place() -> None:
    assert aliased_outputs(MLA) == {"cache_out": "cache"}
    assert [aliased_input(MLA, index) for index in range(2)] == [-1, 2]
    assert aliased_outputs(MOE_DISPATCH) == {}
    assert aliased_input(MOE_DISPATCH, 0) == -1


def test_shapes_of_known_sizes() -> None:
    assert output_shapes(MLA, MLA_SHAPES, MLA_ATTRIBUTES) == [(7, 15), (11, 16, 10)]


def test_unknown_sizes_are_handed_on() -> None:
    tokens, blocks, size = UnknownSize("tokens"), UnknownSize("blocks"), UnknownSize("size")
    shapes = [(tokens, 24), (tokens, 10), (blocks, size, 10), (27, 6), (tokens,), (UnknownSize(),), (UnknownSize(), 3)]
    (out, cache_out) = output_shapes(MLA, shapes, MLA_ATTRIBUTES)
    assert (out[0].expression, out[1]) == ("tokens", 15)
    assert [cache_out[0].expression, cache_out[1].expression, cache_out[2]] == ["blocks", "size", 10]
    rows, experts = UnknownSize(), UnknownSize()
    (y,) = output_shapes(
        MOE_DISPATCH,
        [(tokens, 64), (tokens, 3), (tokens, 3), (rows, 2), (rows, 4), (experts, 6)],
        {"intermediate_size": 32, "group_size": 32},
    )[0:1]
    assert (y[0].expression, y[1]) == ("tokens", 64)


@pytest.mark.parametrize("position", range(4))
def test_known_sizes_that_disagree_are_refused(position: int) -> None:
    shapes: list[Any] = [list(shape) for shape in MLA_SHAPES]
    for shape in shapes:
        shape[0] = UnknownSize()
    shapes[position][-1] += 1
    with pytest.raises(InputError, match=r"k25\.MLA: input"):
        output_shapes(MLA, shapes, MLA_ATTRIBUTES)


def test_attributes_come_back_from_fields() -> None:
    fields = {
        "num_heads": np.array([3], np.int32), "qk_nope_head_dim": np.array([4], np.int32),
        "v_head_dim": np.array([5], np.int64), "softmax_scale": np.array([0.5], np.float32),
        "inv_freq": np.array([1.0, 0.1], np.float32),
    }  # fmt: skip
    attributes = attributes_from_fields(MLA, fields)
    assert {key: attributes[key] for key in ("num_heads", "qk_nope_head_dim", "v_head_dim")} == {
        "num_heads": 3, "qk_nope_head_dim": 4, "v_head_dim": 5,
    }  # fmt: skip
    assert attributes["inv_freq"] == (1.0, float(np.float32(0.1)))
    with pytest.raises(InputError, match=r"k25\.MLA: attribute inv_freq: expected a plugin field.*found none"):
        attributes_from_fields(MLA, {key: value for key, value in fields.items() if key != "inv_freq"})
    with pytest.raises(InputError, match=r"attribute num_heads: expected one value, found 2"):
        attributes_from_fields(MLA, fields | {"num_heads": np.array([3, 4], np.int32)})
