"""Runtime and reference side by side, layer by layer, over all prompts.

In each layer every prompt is run on the reference's input (the *local* error: whose fault is it?) and in four chains
of the runtime's own (the *accumulated* error: what does a user get?): all tokens at once, prompt and then one by one,
half of it over the cached other half, and in one batch with the other prompts. With one layer bound at a time, peak
memory is one layer and the activations. Passages, whose perplexity is measured, are run all at once only.
Legend: T tokens, H hidden, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from k25_runtime.runtime import Runtime
from k25_validate.agreement import RouterComparison, compare_routing
from k25_validate.chain import Chain, Routing, chain_of_batch, chain_of_steps
from k25_validate.media_samples import MediaSample
from k25_validate.metrics import TensorComparison, compare_tensors, relative_l2
from k25_validate.prompts import Prompt
from k25_validate.reference import LayerTrace, MediaInput, Reference, ReferenceWalk
from k25_validate.reference_noise import NOISE_FACTOR, LayerNoise, ReferenceNoise
from k25_validate.systematic_gain import gain_noise, systematic_gain
from k25_validate.tolerances import ROUTER_TIE, ROUTER_WEIGHTS, component_tolerance

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
_Kept = TypeVar("_Kept")


@dataclass(frozen=True, kw_only=True)
class ComponentParity:
    """One component instance on one prompt (or `vision` on one picture); tokens behind a router tie are left out of the
    tensors compared. `noise` and `weights_noise` are what the
    reference is off from its float64 self (`reference_noise`), where that was measured."""

    component: str
    layer: int | None
    local: TensorComparison
    accumulated: float
    router_differs: int | None = None
    router_ties: int | None = None
    router_weights_max_abs: float | None = None
    gain: float = 0.0
    gain_noise: float = 0.0
    tokens: int = 0
    noise: float | None = None
    weights_noise: float | None = None


@dataclass(kw_only=True)
class WalkState:
    """All that a walk carries from layer to layer: enough to go on after an interruption.

    `expected`, `own`, `decoded` and `resumed` are float32 [T, H] for each prompt (the last two empty where a prompt is
    not run so), `batched` [all T, H]; `kept` [T] masks rows that are not behind a router tie. `expected_load` and
    `actual_load` int64 [L, E] count the tokens that each expert got.
    """

    next_layer: int
    expected: list[Float32]
    own: list[Float32]
    decoded: list[Float32]
    resumed: list[Float32]
    batched: Float32
    kept: list[Mask]
    expected_load: Counts
    actual_load: Counts
    components: list[ComponentParity] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PromptLogits:
    """Logits float32 of one prompt: `expected`, `own`, `batched`, `resumed` [T, V]; `decoded` from the last prompt
    token on. None where the prompt was not run so."""

    expected: Float32
    own: Float32
    kept: Mask
    batched: Float32 | None = None
    decoded: Float32 | None = None
    resumed: Float32 | None = None


class ParityWalk:
    """Set it up with the prompts, then `run`."""

    def __init__(
        self,
        runtime: Runtime,
        reference: Reference,
        prompts: Sequence[Prompt],
        samples: Sequence[MediaSample] = (),
        exact: Reference | None = None,
    ) -> None:
        """`exact` is a float64 reference: it says how much of a difference is rounding (`reference_noise`)."""
        self._runner = runtime.runner
        self._runtime = runtime
        self._reference = reference
        self._prompts = prompts
        self._samples = samples
        self._references: list[ReferenceWalk] = [
            reference.walk(prompt.token_ids, media=_media_inputs(prompt)) for prompt in prompts
        ]
        media = [[placed.sample.item for placed in prompt.media] for prompt in prompts]
        wholes = [([prompt.token_ids], items) for prompt, items in zip(prompts, media, strict=True)]
        self._fed = [chain_of_steps(runtime, steps, items) for steps, items in wholes]
        self._own = [chain_of_steps(runtime, steps, items) for steps, items in wholes]
        self._decoded = [
            None
            if prompt.is_passage
            else chain_of_steps(runtime, [prompt.prompt_ids, *([token] for token in prompt.next_ids)], items)
            for prompt, items in zip(prompts, media, strict=True)
        ]
        self._resumed = [
            None
            if (cut := prompt.resumed_at) is None
            else chain_of_steps(runtime, [prompt.token_ids[:cut], prompt.token_ids[cut:]], items)
            for prompt, items in zip(prompts, media, strict=True)
        ]
        together = [index for index, prompt in enumerate(prompts) if not prompt.is_passage]
        self._batched: Chain | None = None
        if together:
            self._batched = chain_of_batch(
                runtime, [prompts[index].token_ids for index in together], [media[index] for index in together]
            )
        ends = np.cumsum([len(prompts[index].token_ids) for index in together])
        self._rows = {
            index: slice(end - len(prompts[index].token_ids), end) for index, end in zip(together, ends, strict=True)
        }
        self._shown_noise = min(
            range(len(prompts)), key=lambda index: (bool(prompts[index].media), _length(prompts[index]))
        )
        self._noise = ReferenceNoise(
            {}
            if exact is None
            else {
                index: exact.walk(prompt.token_ids, media=_media_inputs(prompt)) for index, prompt in enumerate(prompts)
            }
        )

    def run(
        self,
        *,
        keep: Callable[[Prompt, PromptLogits], _Kept],
        state: WalkState | None = None,
        on_layer: Callable[[WalkState], None] | None = None,
        is_streamed: bool = False,
        progress: Progress,
    ) -> tuple[WalkState, list[_Kept]]:
        """Walk all layers, from `state` on where it is given; `on_layer` is called with the state after each.

        Streamed, a layer's weights and cache are let go of before the next is bound. Of a prompt's logits, which may be
        large, what `keep` makes of them is kept.
        """
        layers = self._runner.text.num_hidden_layers
        state = self._started() if state is None else self._taken_up(state)
        for layer in range(state.next_layer, layers):
            progress("comparing layers", layer, layers)
            for index in range(len(self._prompts)):
                self._walk_layer(state, layer, index)
            if self._batched is not None:
                self._batched.run_layer(self._runner, layer)
            self._carry(state, layer + 1)
            if is_streamed:
                self._runner.release_layers()
            if on_layer is not None:
                on_layer(state)
        progress("comparing layers", layers, layers)
        return state, [self._finished(state, index, keep) for index in range(len(self._prompts))]

    def _started(self) -> WalkState:
        expected = [reference.embed() for reference in self._references]
        for chain in (*self._own, *self._decoded, *self._resumed, self._batched):
            if chain is not None:
                chain.embed(self._runner)
        config = self._runner.text
        state = WalkState(
            next_layer=0,
            expected=expected,
            own=[],
            decoded=[],
            resumed=[],
            batched=_NO_ROWS,
            expected_load=np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64),
            actual_load=np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64),
            kept=[np.ones(len(prompt.token_ids), bool) for prompt in self._prompts],
        )
        state.components += [self._compared_vision(sample) for sample in self._samples]
        for prompt, chain, hidden in zip(self._prompts, self._own, expected, strict=True):
            rows = prompt.is_text()
            compared = compare_tensors(chain.hidden[rows], hidden[rows])
            state.components.append(
                ComponentParity(
                    component="embed",
                    layer=None,
                    local=compared,
                    accumulated=relative_l2(chain.hidden, hidden),
                )
            )
        self._carry(state, 0)
        return state

    def _compared_vision(self, sample: MediaSample) -> ComponentParity:
        item = sample.item
        (own,) = self._runtime.encode_media(item.pixel_values, [item.grid])
        compared = compare_tensors(own, self._reference.media_embeddings(item.pixel_values, item.grid))
        return ComponentParity(component="vision", layer=None, local=compared, accumulated=compared.relative_l2)

    def _taken_up(self, state: WalkState) -> WalkState:
        pairs = ((self._own, state.own), (self._decoded, state.decoded), (self._resumed, state.resumed))
        for chains, hiddens in (*pairs, ([self._batched], [state.batched])):
            for chain, hidden in zip(chains, hiddens, strict=True):
                if chain is not None:
                    chain.hidden = hidden
        return state

    def _carry(self, state: WalkState, next_layer: int) -> None:
        state.next_layer = next_layer
        state.own = [chain.hidden for chain in self._own]
        state.decoded = [_hidden_of(chain) for chain in self._decoded]
        state.resumed = [_hidden_of(chain) for chain in self._resumed]
        state.batched = _hidden_of(self._batched)

    def _walk_layer(self, state: WalkState, layer: int, index: int) -> None:
        fed, own = self._fed[index], self._own[index]
        fed.hidden = entered = state.expected[index]
        trace = self._references[index].layer(layer, state.expected[index])
        routing = fed.run_layer(self._runner, layer)
        if routing is not None and trace.expert_ids is not None:
            for load, ids in ((state.expected_load, trace.expert_ids), (state.actual_load, routing.expert_ids)):
                load[layer] += _load(ids, load.shape[1])
        router = _compared_routing(routing, trace, ROUTER_TIE)
        own_routing = own.run_layer(self._runner, layer)
        own_router = _compared_routing(own_routing, trace, ROUTER_TIE)
        for chain in (self._decoded[index], self._resumed[index]):
            if chain is not None:
                chain.run_layer(self._runner, layer)
        rows = _untied(router, trace)
        noise = self._layer_noise(
            layer, index, entered, trace, is_far=self._is_far(layer, fed.hidden[rows], trace.hidden[rows], router)
        )
        if noise is not None and NOISE_FACTOR * noise.scores > ROUTER_TIE:
            router = _compared_routing(routing, trace, NOISE_FACTOR * noise.scores)
            own_router = _compared_routing(own_routing, trace, NOISE_FACTOR * noise.scores)
            rows = _untied(router, trace)
        # A tie decided the other way changes this token here, and later tokens of the sequence further on.
        if own_router is not None and own_router.ties.any():
            state.kept[index][int(own_router.ties.argmax()) :] = False
        state.components.append(
            ComponentParity(
                component=self._runner.component_of(layer),
                layer=layer,
                local=compare_tensors(fed.hidden[rows], trace.hidden[rows]) if rows.any() else _NOTHING_LEFT,
                accumulated=relative_l2_of_rows(own.hidden, trace.hidden, state.kept[index]),
                router_differs=None if router is None else int(router.differs.sum()),
                router_ties=None if router is None else int(router.ties.sum()),
                router_weights_max_abs=None if router is None else router.weights_max_abs,
                gain=systematic_gain(fed.hidden[rows] - entered[rows], trace.hidden[rows] - entered[rows]),
                gain_noise=gain_noise(
                    fed.hidden[rows] - entered[rows],
                    trace.hidden[rows] - entered[rows],
                    np.array(self._prompts[index].token_ids)[rows],
                ),
                tokens=len(set(self._prompts[index].token_ids)),
                noise=None if noise is None else noise.hidden,
                weights_noise=None if noise is None else noise.weights,
            )
        )
        state.expected[index] = trace.hidden

    def _is_far(self, layer: int, actual: Float32, expected: Float32, router: RouterComparison | None) -> bool:
        """Whether this is off by more than rounding of sums explains."""
        bound = component_tolerance(self._runner.component_of(layer), self._runner.text).value
        if len(actual) and relative_l2(actual, expected) > bound:
            return True
        return router is not None and bool(router.differs.any() or not ROUTER_WEIGHTS.accepts(router.weights_max_abs))

    def _finished(self, state: WalkState, index: int, keep: Callable[[Prompt, PromptLogits], _Kept]) -> _Kept:
        prompt = self._prompts[index]
        expected = self._references[index].logits(state.expected[index])
        fed, own, kept = self._fed[index], self._own[index].logits(self._runner), state.kept[index]
        fed.hidden = state.expected[index]
        logits = fed.logits(self._runner)
        bound = component_tolerance("head", self._runner.text).value
        local, noise = compare_tensors(logits, expected), None
        if local.relative_l2 > bound or index == self._shown_noise:
            noise = self._noise.head(index, state.expected[index], expected)
        state.components.append(
            ComponentParity(
                component="head",
                layer=None,
                local=local,
                accumulated=relative_l2_of_rows(own, expected, kept),
                gain=systematic_gain(logits, expected),
                gain_noise=gain_noise(logits, expected, np.array(prompt.token_ids)),
                tokens=len(set(prompt.token_ids)),
                noise=None if noise is None else noise.hidden,
            )
        )
        del logits
        decoded, resumed, rows = self._decoded[index], self._resumed[index], self._rows.get(index)
        batched = None if self._batched is None or rows is None else self._batched.logits(self._runner, rows)
        first = slice(len(prompt.prompt_ids) - 1, None)
        return keep(
            prompt,
            PromptLogits(
                expected=expected,
                own=own,
                kept=kept,
                batched=batched,
                decoded=None if decoded is None else decoded.logits(self._runner, first),
                resumed=None if resumed is None else resumed.logits(self._runner),
            ),
        )

    def _layer_noise(
        self, layer: int, index: int, entered: Float32, trace: LayerTrace, *, is_far: bool
    ) -> LayerNoise | None:
        """The reference's own rounding: of the one prompt that it is shown for, and of what is off."""
        if not is_far and index != self._shown_noise:
            return None
        return self._noise.layer(index, layer, entered, trace)


_NO_ROWS: Float32 = np.empty((0, 0), np.float32)
_NOTHING_LEFT = TensorComparison(
    max_abs=0.0,
    worst_index=(),
    actual=0.0,
    expected=0.0,
    relative_l2=0.0,
    cosine=1.0,
    actual_nonfinite=0,
    expected_nonfinite=0,
)


def _hidden_of(chain: Chain | None) -> Float32:
    return _NO_ROWS if chain is None else chain.hidden


def _load(expert_ids: npt.NDArray[np.integer], experts: int) -> Counts:
    """Tokens that each expert gets; ids that are none are not counted."""
    ids = expert_ids[(expert_ids >= 0) & (expert_ids < experts)]
    return np.bincount(ids, minlength=experts).astype(np.int64)


def _length(prompt: Prompt) -> int:
    """Of one token alone attention shows no rounding."""
    return len(prompt.token_ids) if len(prompt.token_ids) > 1 else 1 << 20


def _media_inputs(prompt: Prompt) -> list[MediaInput]:
    return [
        MediaInput(
            pixel_values=placed.sample.item.pixel_values, grid=placed.sample.item.grid, first_token=placed.first_token
        )
        for placed in prompt.media
    ]


def relative_l2_of_rows(actual: Float32, expected: Float32, rows: Mask) -> float:
    """Relative L2 of the rows kept; 0 where none is (then the share of ties is what fails)."""
    return relative_l2(actual[rows], expected[rows]) if rows.any() else 0.0


def _untied(router: RouterComparison | None, trace: LayerTrace) -> Mask:
    return ~router.ties if router is not None else np.ones(len(trace.hidden), bool)


def _compared_routing(routing: Routing | None, trace: LayerTrace, margin: float) -> RouterComparison | None:
    if routing is None or trace.expert_ids is None or trace.expert_weights is None or trace.router_scores is None:
        return None
    return compare_routing(
        actual_ids=routing.expert_ids,
        actual_weights=routing.expert_weights,
        expected_ids=trace.expert_ids,
        expected_weights=trace.expert_weights,
        scores=trace.router_scores,
        margin=margin,
    )
