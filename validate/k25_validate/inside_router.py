"""The stages of `k25.Router`: scores, the choice by scores and bias, the weights without it.

Ties are nobody's fault: where what is judged has other experts than the formula, within the margin of a tie, or the
same in another order, the formula goes on with its choice.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_runtime.host_tensor import HostTensor
from k25_validate.agreement import compare_routing
from k25_validate.inside_op import Formula
from k25_validate.plain_taps import PlainTaps, Taps
from k25_validate.tolerances import ROUTER_TIE

Array = npt.NDArray[Any]


def router_formula(plain: PlainTaps, feeds: Mapping[str, HostTensor]) -> Formula:
    """The router's formula on the op's own logits and bias, with the choice of what was made where it ties."""
    logits, bias = feeds["logits"].to_float32(), feeds["bias"].to_float32()
    own = plain.router(logits, bias)
    return lambda made: plain.router(logits, bias, _accepted_choice(own, np.asarray(made["expert_ids"])))


def _accepted_choice(own: Taps, made: Array) -> Array:
    """The ids [T, K] that were made, where they are as good as the formula's; the formula's elsewhere."""
    ids, scores = own["expert_ids"].astype(np.int64), own["biased"]
    if made.shape != ids.shape or made.min(initial=0) < 0:
        return ids
    weights = np.zeros(ids.shape)
    found = compare_routing(
        actual_ids=made,
        actual_weights=weights,
        expected_ids=ids,
        expected_weights=weights,
        scores=scores,
        margin=ROUTER_TIE,
    )
    return np.where(found.differs[:, None], ids, made)
