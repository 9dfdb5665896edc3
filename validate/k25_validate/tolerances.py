"""What may differ, and why. `docs/parity.md` explains each bound; reports carry the reason beside the figure.

u is the unit roundoff of float32, 2^-24. Nothing here is tuned to a checkpoint: bounds follow from sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from k25_export.config import TextConfig, VisionConfig

UNIT_ROUNDOFF = 2.0**-24

#: Logits end to end, relative L2: the project's promise (README), for prefill and decode.
END_TO_END = 2e-5

#: Selection scores (sigmoid + bias, of order one) closer than this are a tie: rounding decides between the experts.
ROUTER_TIE = 2e-5

#: Logits closer than this share of their root mean square are a tie for the first place.
TOP1_TIE = 2e-5

#: More ties than this share of tokens is no accident.
MAX_TIED_SHARE = 0.02

Bound = Literal["at most", "at least"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A bound on a metric and its reason. `name` is what `--tolerance NAME=VALUE` calls it.

    `default` is the value that an override has replaced; None where it was not overridden.
    """

    value: float
    bound: Bound
    reason: str
    name: str = ""
    default: float | None = None

    def accepts(self, measured: float) -> bool:
        """Whether the measured value is within the bound; NaN never is."""
        return measured <= self.value if self.bound == "at most" else measured >= self.value

    @property
    def is_loosened(self) -> bool:
        """Whether an override accepts more than the default did."""
        if self.default is None:
            return False
        return self.value > self.default if self.bound == "at most" else self.value < self.default

    def used(self, measured: float) -> float:
        """The share of an upper bound that is used up: above 1 it fails; 0 of a bound of 0 where nothing was
        measured.
        """
        if self.value == 0 or measured != measured:
            return 0.0 if measured == 0 else math.inf
        return measured / self.value


EXACT = Tolerance(
    name="embed", value=0.0, bound="at most", reason="a copy: bf16 rows widened to float32, nothing is computed"
)
END_TO_END_L2 = Tolerance(
    name="logits", value=END_TO_END, bound="at most", reason="the end-to-end promise, with float32 arithmetic"
)
NO_DISAGREEMENT = Tolerance(
    name="choices", value=0.0, bound="at most", reason="only ties within rounding may be decided differently"
)
ROUTER_WEIGHTS = Tolerance(
    name="router-weights",
    value=ROUTER_TIE,
    bound="at most",
    reason="weights sum to the scaling factor; as far apart as scores may be",
)
FEW_TIES = Tolerance(
    name="ties", value=MAX_TIED_SHARE, bound="at most", reason="ties within rounding are rare by chance"
)
SAME_ANSWERS = Tolerance(
    name="tasks", value=0.0, bound="at most", reason="both compute the same model, so both find the same answers"
)


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
        name=name,
        value=2 * UNIT_ROUNDOFF * math.sqrt(longest),
        bound="at most",
        reason=f"2 u sqrt(K): rounding of chained float32 dot products of up to K = {longest} terms",
    )


def vision_tolerance(config: VisionConfig) -> Tolerance:
    """Relative L2 of media embeddings: as `component_tolerance`, for a component that is a whole network.

    Each of its B blocks adds an error of its own to the residual stream. Independent errors add up as sqrt(B), and the
    promise is a bound of its own.
    """
    merged = math.prod(config.merge_kernel_size) * config.vt_hidden_size
    longest = max(merged, config.vt_intermediate_size, 3 * config.patch_size**2)
    blocks = config.vt_num_hidden_layers
    rounding = 2 * UNIT_ROUNDOFF * math.sqrt(longest * blocks)
    return Tolerance(
        name="vision",
        value=min(END_TO_END, rounding),
        bound="at most",
        reason=f"2 u sqrt(K B): rounding of float32 dot products of up to K = {longest} terms in B = {blocks} blocks, "
        f"at most the promised {END_TO_END:g}",
    )


def kl_tolerances(logits_rms: float, rows: int) -> tuple[Tolerance, Tolerance]:
    """KL divergence in nats, averaged over the rows and of any one of them.

    For small errors e of the logits it is half their variance under the distribution (its second derivative is the
    softmax's covariance), e having a root mean square of `END_TO_END * logits_rms` over all rows.
    """
    mean = (END_TO_END * logits_rms) ** 2 / 2
    why = f"half the variance of logit errors within the end-to-end bound: ({END_TO_END:g} of {logits_rms:.3g})² / 2"
    return (
        Tolerance(name="kl", value=mean, bound="at most", reason=why),
        Tolerance(
            name="kl", value=mean * rows, bound="at most", reason=f"{why}, if one row had the error of all {rows} rows"
        ),
    )


def perplexity_tolerance(logits_rms: float) -> Tolerance:
    """Mean log-likelihood of a text, in nats a token; `logits_rms` is the root mean square of the reference's logits.

    A row's log-likelihood changes by e_target - sum(p e), at most twice its largest logit error; errors within the
    end-to-end bound have a root mean square of `END_TO_END * logits_rms`.
    """
    return Tolerance(
        name="perplexity",
        value=2 * END_TO_END * logits_rms,
        bound="at most",
        reason=f"2 e, where e = {END_TO_END:g} of the logits' root mean square ({logits_rms:.3g}) is the end-to-end "
        f"bound",
    )


def far_tolerance(component: Tolerance, scores: float) -> Tolerance:
    """Relative L2 of a layer at far positions: as the component's, and what rounding of large scores adds.

    `scores` is the largest sum of |query * key| over a cache row, in nats. A score's rounding error of u * scores
    changes its probability by that share, and those that it competes with the other way. The angles are no part of
    it: both round inv_freq and the product with the position to float32, as the op's definition says.
    """
    return Tolerance(
        name="far-positions",
        value=component.value + 2 * UNIT_ROUNDOFF * scores,
        bound="at most",
        reason=f"{component.value:.2e} as for the component, and 2 u S, where S = {scores:.3g} nats is the largest "
        f"sum of "
        "|query * key|",
    )
