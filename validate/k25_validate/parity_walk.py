"""Runtime and reference side by side, layer by layer, over all prompts.

In each layer every prompt is run on the reference's input (the *local* error: whose fault is it?) and in three chains
of the runtime's own (the *accumulated* error: what does a user get?): all tokens at once, prompt and then one by one,
and in one batch with the other prompts. With one layer bound at a time, peak memory is one layer and the activations.
Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from k25_runtime.runtime import Runtime
from k25_validate.agreement import RouterComparison, compare_routing
from k25_validate.chain import Routing, chain_of_batch, chain_of_steps
from k25_validate.metrics import TensorComparison, compare_tensors, relative_l2
from k25_validate.prompts import Prompt
from k25_validate.reference import LayerTrace, Reference, ReferenceWalk
from k25_validate.tolerances import ROUTER_TIE

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ComponentParity:
    """One component instance on one prompt; tokens behind a router tie are left out of the tensors compared."""

    component: str
    layer: int | None
    local: TensorComparison
    accumulated: float
    router_differs: int | None = None
    router_ties: int | None = None
    router_weights_max_abs: float | None = None


@dataclass(kw_only=True)
class WalkState:
    """All that a walk carries from layer to layer: enough to go on after an interruption.

    `expected`, `own` and `decoded` are float32 [T, H] for each prompt, `batched` [all T, H]; `kept` [T] masks rows that
    are not behind a router tie.
    """

    next_layer: int
    expected: list[Float32]
    own: list[Float32]
    decoded: list[Float32]
    batched: Float32
    kept: list[Mask]
    components: list[ComponentParity] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PromptLogits:
    """Logits float32 of one prompt: `expected`, `own`, `batched` [T, V]; `decoded` from the last prompt token on."""

    expected: Float32
    own: Float32
    batched: Float32
    decoded: Float32
    kept: Mask


class ParityWalk:
    """Set it up with the prompts, then `run`."""

    def __init__(self, runtime: Runtime, reference: Reference, prompts: Sequence[Prompt]) -> None:
        self._runner = runtime.runner
        self._prompts = prompts
        self._references: list[ReferenceWalk] = [reference.walk(prompt.token_ids) for prompt in prompts]
        self._fed = [chain_of_steps(runtime, [prompt.token_ids]) for prompt in prompts]
        self._own = [chain_of_steps(runtime, [prompt.token_ids]) for prompt in prompts]
        self._decoded = [
            chain_of_steps(runtime, [prompt.prompt_ids, *([token] for token in prompt.next_ids)]) for prompt in prompts
        ]
        self._batched = chain_of_batch(runtime, [prompt.token_ids for prompt in prompts])
        ends = np.cumsum([len(prompt.token_ids) for prompt in prompts])
        self._rows = [slice(end - len(prompt.token_ids), end) for end, prompt in zip(ends, prompts, strict=True)]

    def run(
        self,
        *,
        state: WalkState | None = None,
        on_layer: Callable[[WalkState], None] | None = None,
        is_streamed: bool = False,
        progress: Progress,
    ) -> tuple[list[ComponentParity], list[PromptLogits]]:
        """Walk all layers, from `state` on where it is given; `on_layer` is called with the state after each.

        Streamed, a layer's weights and cache are let go of before the next is bound.
        """
        layers = self._runner.text.num_hidden_layers
        state = self._started() if state is None else self._resumed(state)
        for layer in range(state.next_layer, layers):
            progress("comparing layers", layer, layers)
            for index in range(len(self._prompts)):
                self._walk_layer(state, layer, index)
            self._batched.run_layer(self._runner, layer)
            self._carry(state, layer + 1)
            if is_streamed:
                self._runner.release_layers()
            if on_layer is not None:
                on_layer(state)
        progress("comparing layers", layers, layers)
        return self._finished(state)

    def _started(self) -> WalkState:
        expected = [reference.embed() for reference in self._references]
        for chain in (*self._own, *self._decoded, self._batched):
            chain.embed(self._runner)
        state = WalkState(
            next_layer=0,
            expected=expected,
            own=[],
            decoded=[],
            batched=self._batched.hidden,
            kept=[np.ones(len(prompt.token_ids), bool) for prompt in self._prompts],
        )
        for chain, hidden in zip(self._own, expected, strict=True):
            compared = compare_tensors(chain.hidden, hidden)
            state.components.append(
                ComponentParity(component="embed", layer=None, local=compared, accumulated=compared.relative_l2)
            )
        self._carry(state, 0)
        return state

    def _resumed(self, state: WalkState) -> WalkState:
        for chains, hiddens in ((self._own, state.own), (self._decoded, state.decoded)):
            for chain, hidden in zip(chains, hiddens, strict=True):
                chain.hidden = hidden
        self._batched.hidden = state.batched
        return state

    def _carry(self, state: WalkState, next_layer: int) -> None:
        state.next_layer = next_layer
        state.own = [chain.hidden for chain in self._own]
        state.decoded = [chain.hidden for chain in self._decoded]
        state.batched = self._batched.hidden

    def _walk_layer(self, state: WalkState, layer: int, index: int) -> None:
        fed, own = self._fed[index], self._own[index]
        fed.hidden = state.expected[index]
        trace = self._references[index].layer(layer, state.expected[index])
        router = _compared_routing(fed.run_layer(self._runner, layer), trace)
        own_router = _compared_routing(own.run_layer(self._runner, layer), trace)
        self._decoded[index].run_layer(self._runner, layer)
        # A tie decided the other way changes this token here, and later tokens of the sequence further on.
        rows = ~router.ties if router is not None else np.ones(len(trace.hidden), bool)
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
            )
        )
        state.expected[index] = trace.hidden

    def _finished(self, state: WalkState) -> tuple[list[ComponentParity], list[PromptLogits]]:
        found = []
        batched = self._batched.logits(self._runner)
        for index, prompt in enumerate(self._prompts):
            expected = self._references[index].logits(state.expected[index])
            fed, own, kept = self._fed[index], self._own[index].logits(self._runner), state.kept[index]
            fed.hidden = state.expected[index]
            state.components.append(
                ComponentParity(
                    component="head",
                    layer=None,
                    local=compare_tensors(fed.logits(self._runner), expected),
                    accumulated=relative_l2_of_rows(own, expected, kept),
                )
            )
            decoded = self._decoded[index].logits(self._runner, len(prompt.prompt_ids) - 1)
            found.append(
                PromptLogits(expected=expected, own=own, batched=batched[self._rows[index]], decoded=decoded, kept=kept)
            )
        return state.components, found


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


def relative_l2_of_rows(actual: Float32, expected: Float32, rows: Mask) -> float:
    """Relative L2 of the rows kept; 0 where none is (then the share of ties is what fails)."""
    return relative_l2(actual[rows], expected[rows]) if rows.any() else 0.0


def _compared_routing(routing: Routing | None, trace: LayerTrace) -> RouterComparison | None:
    if routing is None or trace.expert_ids is None or trace.expert_weights is None or trace.router_scores is None:
        return None
    return compare_routing(
        actual_ids=routing.expert_ids,
        actual_weights=routing.expert_weights,
        expected_ids=trace.expert_ids,
        expected_weights=trace.expert_weights,
        scores=trace.router_scores,
        margin=ROUTER_TIE,
    )
