"""One prompt through runtime and reference, component by component.

Each layer is run twice: on the reference's input at that point (the *local* error: whose fault is it?) and on the
runtime's own chain (the *accumulated* error: what does a user get?). Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_runtime.model_runner import LayerOutput
from k25_runtime.runtime import Runtime
from k25_validate.agreement import RouterComparison, compare_routing
from k25_validate.metrics import TensorComparison, compare_tensors, relative_l2
from k25_validate.reference import ReferenceTrace
from k25_validate.tolerances import ROUTER_TIE

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ComponentParity:
    """One component instance on one prompt. Rows behind a router tie are left out of the tensors compared."""

    component: str
    layer: int | None
    local: TensorComparison
    accumulated: float
    router: RouterComparison | None = None


@dataclass(frozen=True, kw_only=True)
class PromptParity:
    """All components on one prompt; `logits` [T, V] of the runtime's own chain; `kept` [T]: rows not behind a tie."""

    components: tuple[ComponentParity, ...]
    logits: Float32
    kept: npt.NDArray[np.bool_]


def prompt_parity(runtime: Runtime, trace: ReferenceTrace) -> PromptParity:
    """Run all tokens of the trace as one step and compare every component with the reference."""
    runner, tokens = runtime.runner, [int(token) for token in trace.token_ids]
    fed, own = runtime.new_sequence(), runtime.new_sequence()
    try:
        fed_batch, own_batch = runtime.reserved_batch([(fed, tokens)]), runtime.reserved_batch([(own, tokens)])
        hidden = runner.embed(own_batch)
        kept = np.ones(len(tokens), bool)
        embedded = compare_tensors(hidden.to_float32(), trace.hidden[0])
        found = [ComponentParity(component="embed", layer=None, local=embedded, accumulated=embedded.relative_l2)]
        for layer in range(runner.text.num_hidden_layers):
            local = runner.run_layer(layer, runner.hidden_from_float32(trace.hidden[layer]), fed_batch)
            out = runner.run_layer(layer, hidden, own_batch)
            hidden = out.hidden
            local_router, own_router = _routing(layer, local, trace), _routing(layer, out, trace)
            # A tie decided the other way changes this token here, and later tokens of the sequence further on.
            rows = ~local_router.ties if local_router is not None else np.ones(len(tokens), bool)
            if own_router is not None and own_router.ties.any():
                kept[int(own_router.ties.argmax()) :] = False
            expected = trace.hidden[layer + 1]
            found.append(
                ComponentParity(
                    component=runner.component_of(layer),
                    layer=layer,
                    local=compare_tensors(local.hidden.to_float32()[rows], expected[rows]),
                    accumulated=relative_l2_of_rows(hidden.to_float32(), expected, kept),
                    router=local_router,
                )
            )
        every_row = np.arange(len(tokens), dtype=np.int32)
        local_logits = runner.head(runner.hidden_from_float32(trace.hidden[-1]), every_row)
        logits = runner.head(hidden, every_row)
        found.append(
            ComponentParity(
                component="head",
                layer=None,
                local=compare_tensors(local_logits, trace.logits),
                accumulated=relative_l2_of_rows(logits, trace.logits, kept),
            )
        )
        return PromptParity(components=tuple(found), logits=logits, kept=kept)
    finally:
        runtime.free(fed)
        runtime.free(own)


def relative_l2_of_rows(actual: Float32, expected: Float32, rows: npt.NDArray[np.bool_]) -> float:
    """Relative L2 of the rows kept; 0 where none is (then the share of ties is what fails)."""
    return relative_l2(actual[rows], expected[rows]) if rows.any() else 0.0


def _routing(layer: int, output: LayerOutput, trace: ReferenceTrace) -> RouterComparison | None:
    if output.expert_ids is None or output.expert_weights is None:
        return None
    return compare_routing(
        actual_ids=output.expert_ids,
        actual_weights=output.expert_weights,
        expected_ids=trace.expert_ids[layer],
        expected_weights=trace.expert_weights[layer],
        scores=trace.router_scores[layer],
        margin=ROUTER_TIE,
    )
