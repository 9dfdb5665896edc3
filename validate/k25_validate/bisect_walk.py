"""The first component instance that is off, by teacher-forced replay: each gets the reference's input, layer by layer.

Every layer is run in three ways on inputs of the reference: a prompt at once, prompt and then token by token, and all
prompts in one batch. With one layer bound at a time, peak memory is one layer and the activations.

Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from k25_export.config import TextConfig
from k25_runtime.batch import Batch
from k25_runtime.runtime import Runtime
from k25_validate.agreement import compare_routing
from k25_validate.metrics import relative_l2
from k25_validate.prompts import Prompt
from k25_validate.reference import LayerTrace, Reference
from k25_validate.reference_noise import NOISE_FACTOR, LayerNoise, ReferenceNoise, widened
from k25_validate.systematic_gain import gain_noise, gain_tolerance, systematic_gain
from k25_validate.tolerances import ROUTER_TIE, ROUTER_WEIGHTS, component_tolerance

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens `start` to `stop` of a prompt."""

    prompt: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call: a batch, and what its rows are."""

    batch: Batch
    spans: tuple[Span, ...]

    def rows(self, arrays: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
        """The step's rows of arrays [T, ...], one for each prompt."""
        return np.concatenate([arrays[span.prompt][span.start : span.stop] for span in self.spans])


@dataclass(frozen=True, kw_only=True)
class Way:
    """Steps that follow each other on one cache."""

    name: str
    steps: tuple[Step, ...]

    @property
    def prompts(self) -> tuple[int, ...]:
        """The prompts that take part."""
        return tuple(dict.fromkeys(span.prompt for step in self.steps for span in step.spans))


@dataclass(frozen=True, kw_only=True)
class LocalError:
    """What one component is off on one way, fed with the reference's input: relative L2 and systematic gain."""

    component: str
    layer: int | None
    way: str
    error: float
    tolerance: float
    gain: float = 0.0
    gain_noise: float = 0.0
    rows: int = 1
    router_differs: int = 0
    router_weights: float = 0.0
    router_tolerance: float = ROUTER_WEIGHTS.value

    @property
    def passed(self) -> bool:
        """Whether all of it is within the tolerances."""
        is_close = self.error <= self.tolerance and gain_tolerance(self.rows, self.gain_noise).accepts(abs(self.gain))
        return is_close and not self.router_differs and self.router_weights <= self.router_tolerance


@dataclass(kw_only=True)
class BisectState:
    """Enough to go on after an interruption: `expected` [T, H] of each prompt is the input of `next_layer`."""

    next_layer: int
    expected: list[Float32]
    found: list[LocalError] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The first component that is off: on which way, with which inputs [T, H] (none for `embed`), tied rows dropped."""

    local: LocalError
    way: Way
    hidden: tuple[Float32, ...]
    ties: tuple[Mask, ...]


def ways_of_prompts(runtime: Runtime, prompts: Sequence[Prompt]) -> tuple[Way, ...]:
    """At once, token by token and in a batch, with the cache places that the runtime gives them."""
    ways = []
    for index, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        ways.append(_way(runtime, f"prefill of {prompt.name!r}", prompts, [(index, 0, length)]))
    for index, prompt in enumerate(prompts):
        first = len(prompt.prompt_ids)
        if prompt.next_ids:
            pieces = [(index, 0, first), *((index, at, at + 1) for at in range(first, len(prompt.token_ids)))]
            ways.append(_way(runtime, f"decode of {prompt.name!r}", prompts, pieces))
    if len(prompts) > 1:
        sequences = [runtime.new_sequence() for _ in prompts]
        batch = runtime.reserved_batch(
            [(sequence, prompt.token_ids) for sequence, prompt in zip(sequences, prompts, strict=True)]
        )
        spans = tuple(Span(prompt=i, start=0, stop=len(prompt.token_ids)) for i, prompt in enumerate(prompts))
        ways.append(Way(name="all prompts in a batch", steps=(Step(batch=batch, spans=spans),)))
    return tuple(ways)


def _way(runtime: Runtime, name: str, prompts: Sequence[Prompt], pieces: list[tuple[int, int, int]]) -> Way:
    sequence = runtime.new_sequence()
    steps = []
    for index, start, stop in pieces:
        tokens = prompts[index].token_ids[start:stop]
        batch = runtime.reserved_batch([(sequence, tokens)])
        sequence.length += len(tokens)
        steps.append(Step(batch=batch, spans=(Span(prompt=index, start=start, stop=stop),)))
    return Way(name=name, steps=tuple(steps))


class BisectWalk:
    """Set it up with runtime, reference and prompts; `run` goes on until something is off."""

    def __init__(
        self, runtime: Runtime, reference: Reference, prompts: Sequence[Prompt], exact: Reference | None = None
    ) -> None:
        """`exact` is a float64 reference: it says how much of an error is rounding (`reference_noise`)."""
        walks = {} if exact is None else {i: exact.walk(prompt.token_ids) for i, prompt in enumerate(prompts)}
        self._noise = ReferenceNoise(walks)
        self._runner = runtime.runner
        self._config: TextConfig = runtime.manifest.model.text
        self._ways = ways_of_prompts(runtime, prompts)
        self._references = [reference.walk(prompt.token_ids) for prompt in prompts]
        self.found: list[LocalError] = []

    def run(
        self,
        *,
        state: BisectState | None,
        on_layer: Callable[[BisectState], None] | None,
        is_streamed: bool,
        progress: Progress,
    ) -> Failure | None:
        """The first failure, or None. `on_layer` is called with the state after each layer that passed."""
        layers = self._config.num_hidden_layers
        if state is None:
            expected = [reference.embed() for reference in self._references]
            failure = self._embed_failure(expected)
            if failure is not None:
                return failure
            state = BisectState(next_layer=0, expected=expected, found=self.found)
        self.found = state.found
        for layer in range(state.next_layer, layers):
            progress("looking for the first component", layer, layers)
            failure = self._layer_failure(layer, state)
            if failure is not None:
                return failure
            if is_streamed:
                self._runner.release_layers()
            state.next_layer = layer + 1
            if on_layer is not None:
                on_layer(state)
        progress("looking for the first component", layers, layers)
        return self._head_failure(state.expected)

    def _embed_failure(self, expected: list[Float32]) -> Failure | None:
        for way in self._prefills:
            step = way.steps[0]
            actual = self._runner.embed(step.batch).to_float32()
            error = relative_l2(actual, step.rows(expected))
            tolerance = component_tolerance("embed", self._config).value
            local = LocalError(component="embed", layer=None, way=way.name, error=error, tolerance=tolerance)
            if self._is_failure(local):
                return Failure(local=local, way=way, hidden=(), ties=tuple(_no_ties(expected)))
        return None

    def _head_failure(self, expected: list[Float32]) -> Failure | None:
        for way in self._prefills:
            span = way.steps[0].spans[0]
            hidden = expected[span.prompt]
            rows = np.arange(len(hidden), dtype=np.int32)
            actual = self._runner.head(self._runner.hidden_from_float32(hidden), rows)
            logits = self._references[span.prompt].logits(hidden)
            local = LocalError(
                component="head",
                layer=None,
                way=way.name,
                error=relative_l2(actual, logits),
                tolerance=component_tolerance("head", self._config).value,
                gain=systematic_gain(actual, logits),
                gain_noise=gain_noise(actual, logits, way.steps[0].batch.token_ids),
                rows=len(np.unique(way.steps[0].batch.token_ids)),
            )
            if self._is_failure(local):
                return Failure(local=local, way=way, hidden=tuple(expected), ties=tuple(_no_ties(expected)))
        return None

    def _layer_failure(self, layer: int, state: BisectState) -> Failure | None:
        traces = [
            reference.layer(layer, hidden) for reference, hidden in zip(self._references, state.expected, strict=True)
        ]
        for way in self._ways:
            ties = _no_ties(state.expected)
            local = self._local_error(layer, way, state.expected, traces, ties)
            if not local.passed and (noise := self._layer_noise(layer, way, state.expected, traces)) is not None:
                ties = _no_ties(state.expected)
                local = self._local_error(layer, way, state.expected, traces, ties, noise)
            if self._is_failure(local):
                return Failure(local=local, way=way, hidden=tuple(state.expected), ties=tuple(ties))
        state.expected = [trace.hidden for trace in traces]
        return None

    def _layer_noise(self, layer: int, way: Way, hidden: list[Float32], traces: list[LayerTrace]) -> LayerNoise | None:
        """The reference's own rounding, the worst of the way's prompts."""
        found = [self._noise.layer(index, layer, hidden[index], traces[index]) for index in way.prompts]
        known = [noise for noise in found if noise is not None]
        if not known:
            return None
        return LayerNoise(
            hidden=max(noise.hidden for noise in known),
            weights=max(noise.weights for noise in known),
            scores=max(noise.scores for noise in known),
        )

    def _local_error(
        self,
        layer: int,
        way: Way,
        hidden: list[Float32],
        traces: list[LayerTrace],
        ties: list[Mask],
        noise: LayerNoise | None = None,
    ) -> LocalError:
        """Run all steps of a way; marks tied rows in `ties`. `noise` widens what rounding may do."""
        margin = ROUTER_TIE if noise is None else max(ROUTER_TIE, NOISE_FACTOR * noise.scores)
        actual, expected, kept = [], [], []
        differs, weights = 0, 0.0
        for step in way.steps:
            inputs = self._runner.hidden_from_float32(step.rows(hidden))  # type: ignore[arg-type]
            output = self._runner.run_layer(layer, inputs, step.batch)
            tied = np.zeros(step.batch.tokens, bool)
            if output.expert_ids is not None and output.expert_weights is not None:
                router = compare_routing(
                    actual_ids=output.expert_ids,
                    actual_weights=output.expert_weights,
                    expected_ids=step.rows([_present(trace.expert_ids) for trace in traces]),  # type: ignore[arg-type]
                    expected_weights=step.rows([_present(trace.expert_weights) for trace in traces]),  # type: ignore[arg-type]
                    scores=step.rows([_present(trace.router_scores) for trace in traces]),  # type: ignore[arg-type]
                    margin=margin,
                )
                tied = router.ties
                differs += int(router.differs.sum())
                weights = max(weights, router.weights_max_abs)
            actual.append(output.hidden.to_float32())
            expected.append(step.rows([trace.hidden for trace in traces]))
            kept.append(~tied)
            _mark(ties, step, tied)
        rows = np.concatenate(kept)
        left, right = np.concatenate(actual)[rows], np.concatenate(expected)[rows]
        entered = np.concatenate([step.rows(hidden) for step in way.steps])[rows]
        token_ids = np.concatenate([step.batch.token_ids for step in way.steps])
        component = self._runner.component_of(layer)
        return LocalError(
            component=component,
            layer=layer,
            way=way.name,
            error=relative_l2(left, right) if rows.any() else 0.0,
            tolerance=widened(
                component_tolerance(component, self._config), None if noise is None else noise.hidden
            ).value,
            router_tolerance=widened(ROUTER_WEIGHTS, None if noise is None else noise.weights).value,
            gain=systematic_gain(left - entered, right - entered) if rows.any() else 0.0,
            gain_noise=gain_noise(left - entered, right - entered, token_ids[rows]) if rows.any() else 0.0,
            rows=len(np.unique(token_ids)),
            router_differs=differs,
            router_weights=weights,
        )

    def _is_failure(self, local: LocalError) -> bool:
        self.found.append(local)
        return not local.passed

    @property
    def _prefills(self) -> list[Way]:
        return [way for way in self._ways if len(way.steps) == 1 and len(way.prompts) == 1]


def _present(values: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic]:
    assert values is not None
    return values


def _no_ties(expected: Sequence[Float32]) -> list[Mask]:
    return [np.zeros(len(hidden), bool) for hidden in expected]


def _mark(ties: list[Mask], step: Step, tied: Mask) -> None:
    row = 0
    for span in step.spans:
        count = span.stop - span.start
        ties[span.prompt][span.start : span.stop] |= tied[row : row + count]
        row += count
