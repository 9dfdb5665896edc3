"""The rows of a parity report: what is measured beside the checks, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from k25_validate.tolerances import Tolerance


@dataclass(frozen=True, kw_only=True)
class ComponentRow:
    """Errors of one component instance, the worst over the prompts.

    `local`: relative L2 of its output when fed with the reference's input; `accumulated`: of the runtime's own chain.
    `router_differs` and `router_ties` count tokens, `None` where there is no router. `gain` is the systematic gain over
    the prompts' different `tokens` (`k25_validate.systematic_gain`), `gain_noise` its standard error. `noise` is the
    relative L2 of the reference to itself in float64, the worst of the prompts that it was measured on, `weights_noise`
    the largest difference of its router weights.
    """

    component: str
    layer: int | None
    local: float
    tolerance: Tolerance
    accumulated: float
    max_abs: float
    worst: str
    cosine: float
    router_differs: int | None = None
    router_ties: int | None = None
    router_weights_max_abs: float | None = None
    gain: float = 0.0
    gain_noise: float = 0.0
    tokens: int = 0
    noise: float | None = None
    weights_noise: float | None = None

    @property
    def label(self) -> str:
        """As `moe_layer 3`."""
        return self.component if self.layer is None else f"{self.component} {self.layer}"


@dataclass(frozen=True, kw_only=True)
class MediaRow:
    """One picture (or chunk of frames) through `vision`.

    `grid` is (frames, rows, columns) of patches, `worst` the coordinate of the largest error, `picture` a small PNG
    as a `data:` address.
    """

    name: str
    grid: tuple[int, int, int]
    tokens: int
    relative_l2: float
    tolerance: Tolerance
    max_abs: float
    worst: str
    picture: str


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """How many tokens each expert of a layer got, from the reference's router and from the bundle's on the same
    input.
    """

    layer: int
    reference: tuple[int, ...]
    bundle: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest expert of the bundle over the mean: 1 where all have the same."""
        total = sum(self.bundle)
        return max(self.bundle) * len(self.bundle) / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One prompt and its logits, relative L2 by the way it was run: None where it was not run so.

    `prefill`: all at once, to the reference; `decode`: one by one after the prompt, to the reference; then the same
    tokens to the prefill: decoded, in a batch with the other prompts, over a cached half of the prompt.
    """

    name: str
    prompt_tokens: int
    decoded_tokens: int
    pictures: tuple[str, ...] = ()
    prefill: float | None = None
    decode: float | None = None
    decode_to_prefill: float | None = None
    batch_to_alone: float | None = None
    cached_to_cold: float | None = None
    behind_ties: int = 0


@dataclass(frozen=True, kw_only=True)
class WorstPosition:
    """A token where the distributions are far apart: KL divergence in nats, and what each side finds most likely.

    `before` and `token` are texts where there is a tokenizer, else ids; `rank` is the place, from 0, that the
    reference's first choice has in the bundle.
    """

    prompt: str
    position: int
    before: str
    token: str
    kl: float
    reference_choice: str
    reference_probability: float
    bundle_choice: str
    bundle_probability: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class LogitsSummary:
    """All rows of logits that are not behind a router tie: bundle (prefill) against reference.

    Agreements are shares of rows. `top5_reordered` counts rows whose five first tokens stand in another order,
    `worst_rank` is the lowest place, from 0, that a first choice of the reference has in the bundle.
    """

    rows: int
    relative_l2: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float
    top5_reordered: int
    worst_rank: int
    worst: tuple[WorstPosition, ...]


@dataclass(frozen=True, kw_only=True)
class PassageRow:
    """A text and how likely it is to both: perplexity is e to the mean negative log-likelihood of its tokens."""

    name: str
    tokens: int
    reference_nll: float
    bundle_nll: float
    reference_perplexity: float
    bundle_perplexity: float


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """How many problems of a task one side answers right; `first_wrong` shows one that was not."""

    task: str
    backend: str
    right: int
    total: int
    first_wrong: str = ""

    @property
    def share(self) -> float:
        """The share of right answers."""
        return self.right / self.total


@dataclass(frozen=True, kw_only=True)
class FarRow:
    """The first layer of a kind with tokens that start at a far `position` (`k25_validate.far_positions`)."""

    component: str
    layer: int
    position: int
    tokens: int
    relative_l2: float
    tolerance: Tolerance
    worst: str
    router_differs: int


@dataclass(frozen=True, kw_only=True)
class Override:
    """A tolerance that was set from outside. `default` is the largest that it has replaced; None: it belongs to no
    check of this report."""

    name: str
    value: float
    default: float | None
    is_loosened: bool


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One check in two reports; `ratio` is the new value over the larger of the old one and the noise."""

    section: str
    name: str
    metric: str
    before: float | None
    now: float | None
    ratio: float | None
    kind: str


@dataclass(frozen=True, kw_only=True)
class BaselineSummary:
    """What an older report is, how this one differs in what was compared, and in what was measured."""

    key: str
    passed: bool
    changed_facts: tuple[str, ...]
    differences: tuple[Difference, ...]
