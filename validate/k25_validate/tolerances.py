"""What may differ, and why. `docs/parity.md` explains each bound; reports carry the reason beside the figure.

u is the unit roundoff of float32, 2^-24. Nothing here is tuned to a checkpoint: bounds follow from sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from k25_export.config import TextConfig

UNIT_ROUNDOFF = 2.0**-24

#: Logits end to end, relative L2: the project's promise (README), for prefill and decode.
END_TO_END = 2e-5

#: Selection scores (sigmoid + bias, of order one) closer than this are a tie: rounding decides between the experts.
ROUTER_TIE = 2e-5

#: Logits closer than this share of their root mean square are a tie for the first place.
TOP1_TIE = 2e-5

#: More ties than this share of tokens is no accident.
MAX_TIED_SHARE = 0.02

#: For errors e of the logits, KL is about half their variance: with rms logits up to 20 and the end-to-end bound, 8e-8.
KL_NATS = 1e-7

Bound = Literal["at most", "at least"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A bound on a metric and its reason."""

    value: float
    bound: Bound
    reason: str

    def accepts(self, measured: float) -> bool:
        """Whether the measured value is within the bound; NaN never is."""
        return measured <= self.value if self.bound == "at most" else measured >= self.value


EXACT = Tolerance(value=0.0, bound="at most", reason="a copy: bf16 rows widened to float32, nothing is computed")
END_TO_END_L2 = Tolerance(value=END_TO_END, bound="at most", reason="the end-to-end promise, with float32 arithmetic")
KL = Tolerance(value=KL_NATS, bound="at most", reason="half the variance of logit errors within the end-to-end bound")
NO_DISAGREEMENT = Tolerance(value=0.0, bound="at most", reason="only ties within rounding may be decided differently")
ROUTER_WEIGHTS = Tolerance(
    value=ROUTER_TIE, bound="at most", reason="weights sum to the scaling factor; as far apart as scores may be"
)
FEW_TIES = Tolerance(value=MAX_TIED_SHARE, bound="at most", reason="ties within rounding are rare by chance")


def component_tolerance(name: str, config: TextConfig) -> Tolerance:
    """Relative L2 of one component fed with the reference's input, in float32.

    The rounding error of a dot product of K terms of random sign grows as u sqrt(K), relative to its size (Higham,
    Accuracy and Stability of Numerical Algorithms, section 2.8). With K the longest of the component, 2 u sqrt(K)
    leaves room for a chain of them; measured errors are 5 to 20 times smaller, injected faults larger
    (`docs/parity.md`).
    """
    if name == "embed":
        return EXACT
    widths = {
        "dense_layer": (config.hidden_size, config.intermediate_size),
        "moe_layer": (config.hidden_size, config.moe_intermediate_size * config.n_shared_experts),
        "head": (config.hidden_size,),
    }[name]
    longest = max(*widths, config.num_attention_heads * config.v_head_dim)
    return Tolerance(
        value=2 * UNIT_ROUNDOFF * math.sqrt(longest),
        bound="at most",
        reason=f"2 u sqrt(K): rounding of chained float32 dot products of up to K = {longest} terms",
    )
