"""The stages of `k25.RMSNorm`: square, mean, epsilon, root, its inverse, and the products with x and the weight."""

from __future__ import annotations

from collections.abc import Mapping

from k25_runtime.host_tensor import HostTensor
from k25_validate.inside_op import Formula
from k25_validate.plain_taps import PlainTaps


def norm_formula(plain: PlainTaps, tap: str, feeds: Mapping[str, HostTensor]) -> Formula:
    """The formula of the norm that makes `tap`, on the op's own x and weight; whatever was made, it is the same."""
    stages = plain.norm(tap, feeds["x"].to_float32(), feeds["weight"].to_float32())
    return lambda made: stages
