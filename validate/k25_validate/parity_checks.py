"""From a walk to checks: every measured value with its tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from k25_export.config import TextConfig
from k25_validate.agreement import top1_disagreements
from k25_validate.metrics import kl_divergence, relative_l2
from k25_validate.parity_report import Check, ComponentRow, Section
from k25_validate.parity_walk import ComponentParity, PromptLogits, relative_l2_of_rows
from k25_validate.prompts import Prompt
from k25_validate.tolerances import (
    END_TO_END_L2,
    FEW_TIES,
    KL,
    NO_DISAGREEMENT,
    ROUTER_WEIGHTS,
    TOP1_TIE,
    Tolerance,
    component_tolerance,
)

_ALL = "all prompts"


def component_rows(components: Sequence[ComponentParity], config: TextConfig) -> tuple[ComponentRow, ...]:
    """The worst over the prompts of each component instance, in the order of the data."""
    rows = []
    for (component, layer), group in groupby(components, key=lambda part: (part.component, part.layer)):
        parts = list(group)
        worst = max(parts, key=lambda part: part.local.relative_l2).local
        weights = [part.router_weights_max_abs for part in parts if part.router_weights_max_abs is not None]
        rows.append(
            ComponentRow(
                component=component,
                layer=layer,
                local=worst.relative_l2,
                tolerance=component_tolerance(component, config),
                accumulated=max(part.accumulated for part in parts),
                max_abs=max(part.local.max_abs for part in parts),
                worst=f"at {list(worst.worst_index)}: {worst.actual:.7g}, reference {worst.expected:.7g}",
                cosine=min(part.local.cosine for part in parts),
                router_differs=sum(part.router_differs or 0 for part in parts) if weights else None,
                router_ties=sum(part.router_ties or 0 for part in parts) if weights else None,
                router_weights_max_abs=max(weights) if weights else None,
            )
        )
    return tuple(rows)


def parity_checks(
    rows: Sequence[ComponentRow], prompts: Sequence[Prompt], logits: Sequence[PromptLogits]
) -> tuple[Check, ...]:
    """All checks of a report."""
    return (
        *_component_checks(rows),
        *_end_to_end_checks(prompts, logits),
        *_decode_checks(prompts, logits),
        *_batch_checks(prompts, logits),
    )


def _check(section: Section, name: str, metric: str, value: float, tolerance: Tolerance, detail: str = "") -> Check:
    return Check(section=section, name=name, metric=metric, value=value, tolerance=tolerance, detail=detail)


def _component_checks(rows: Sequence[ComponentRow]) -> list[Check]:
    checks = []
    for row in rows:
        name = row.component if row.layer is None else f"{row.component} {row.layer}"
        checks.append(_check("components", name, "relative L2", row.local, row.tolerance, row.worst))
        if row.router_differs is not None and row.router_weights_max_abs is not None:
            checks.append(_check("components", name, "tokens routed differently", row.router_differs, NO_DISAGREEMENT))
            weights = row.router_weights_max_abs
            checks.append(_check("components", name, "router weights, max abs", weights, ROUTER_WEIGHTS))
    return checks


def _end_to_end_checks(prompts: Sequence[Prompt], logits: Sequence[PromptLogits]) -> list[Check]:
    kept = np.concatenate([found.kept for found in logits])
    checks = [_check("end to end", _ALL, "share of tokens behind router ties", float((~kept).mean()), FEW_TIES)]
    if not kept.any():
        return checks
    actual = np.concatenate([found.own[found.kept] for found in logits])
    expected = np.concatenate([found.expected[found.kept] for found in logits])
    places = [
        f"{prompt.name}, token {row}"
        for prompt, found in zip(prompts, logits, strict=True)
        for row in np.flatnonzero(found.kept)
    ]
    divergence = kl_divergence(actual, expected)
    disagree = top1_disagreements(actual, expected, margin=TOP1_TIE)
    first = f"first: {places[disagree[0]]}" if len(disagree) else ""
    worst = places[divergence.worst_row]
    return [
        *checks,
        _check("end to end", _ALL, "relative L2", relative_l2(actual, expected), END_TO_END_L2),
        _check("end to end", _ALL, "top-1 disagreements", len(disagree), NO_DISAGREEMENT, first),
        _check("end to end", _ALL, "KL divergence, max, nats", divergence.maximum, KL, worst),
    ]


def _decode_checks(prompts: Sequence[Prompt], logits: Sequence[PromptLogits]) -> list[Check]:
    """Prompt and then one by one: against the reference, and against the runtime's own prefill."""
    to_reference, to_prefill, disagreements = [], [], 0
    for prompt, found in zip(prompts, logits, strict=True):
        rows = slice(len(prompt.prompt_ids) - 1, None)
        kept = found.kept[rows]
        to_reference.append(relative_l2_of_rows(found.decoded, found.expected[rows], kept))
        to_prefill.append(relative_l2_of_rows(found.decoded, found.own[rows], kept))
        expected = found.expected[rows][kept]
        disagreements += len(top1_disagreements(found.decoded[kept], expected, margin=TOP1_TIE))
    return [
        _check("decode", _ALL, "relative L2", max(to_reference), END_TO_END_L2, _worst(prompts, to_reference)),
        _check("decode", _ALL, "top-1 disagreements", disagreements, NO_DISAGREEMENT),
        _check("decode", _ALL, "relative L2 to prefill", max(to_prefill), END_TO_END_L2, _worst(prompts, to_prefill)),
    ]


def _batch_checks(prompts: Sequence[Prompt], logits: Sequence[PromptLogits]) -> list[Check]:
    """All prompts in one step, against each alone."""
    errors = [relative_l2_of_rows(found.batched, found.own, found.kept) for found in logits]
    return [_check("batch", _ALL, "relative L2 to alone", max(errors), END_TO_END_L2, _worst(prompts, errors))]


def _worst(prompts: Sequence[Prompt], errors: Sequence[float]) -> str:
    return prompts[int(np.argmax(errors))].name
