"""From a walk to checks: every measured value with its tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from k25_export.config import ModelConfig, TextConfig
from k25_validate.far_positions import FarParity
from k25_validate.logit_summary import PromptFigures, logits_rms_of_prompts, passage_row, relative_l2_of_prompts
from k25_validate.media_samples import MediaSample, picture_from_frames
from k25_validate.parity_report import Check, Section
from k25_validate.parity_walk import ComponentParity, WalkState
from k25_validate.prompts import Prompt
from k25_validate.reference_noise import widened
from k25_validate.report_rows import ComponentRow, ExpertLoad, FarRow, MediaRow, TaskRow
from k25_validate.systematic_gain import gain_tolerance
from k25_validate.tolerance_overrides import Overrides, overridden
from k25_validate.tolerances import (
    END_TO_END_L2,
    FEW_TIES,
    NO_DISAGREEMENT,
    ROUTER_WEIGHTS,
    SAME_ANSWERS,
    Tolerance,
    component_tolerance,
    far_tolerance,
    kl_tolerances,
    perplexity_tolerance,
    vision_tolerance,
)

_ALL = "all prompts"
VISION = "vision"

#: What the reference is called where several backends are listed.
REFERENCE = "reference"


def component_rows(components: Sequence[ComponentParity], config: ModelConfig) -> tuple[ComponentRow, ...]:
    """The worst over the prompts of each component instance, in the order of the data."""
    rows = []
    for (component, layer), group in groupby(components, key=lambda part: (part.component, part.layer)):
        parts = list(group)
        base = _tolerance(component, config)
        part, tolerance = max(
            ((part, widened(base, part.noise)) for part in parts),
            key=lambda pair: (pair[1].used(pair[0].local.relative_l2), pair[0].local.relative_l2),
        )
        worst = part.local
        weights = [part.router_weights_max_abs for part in parts if part.router_weights_max_abs is not None]
        rows.append(
            ComponentRow(
                component=component,
                layer=layer,
                local=worst.relative_l2,
                tolerance=tolerance,
                accumulated=max(part.accumulated for part in parts),
                max_abs=max(part.local.max_abs for part in parts),
                worst=f"at {list(worst.worst_index)}: {worst.actual:.7g}, reference {worst.expected:.7g}",
                cosine=min(part.local.cosine for part in parts),
                router_differs=sum(part.router_differs or 0 for part in parts) if weights else None,
                router_ties=sum(part.router_ties or 0 for part in parts) if weights else None,
                router_weights_max_abs=max(weights) if weights else None,
                gain=sum(part.gain * part.tokens for part in parts) / max(sum(part.tokens for part in parts), 1),
                gain_noise=math.hypot(*(part.gain_noise * part.tokens for part in parts))
                / max(sum(part.tokens for part in parts), 1),
                tokens=sum(part.tokens for part in parts),
                noise=max((part.noise for part in parts if part.noise is not None), default=None),
                weights_noise=max(
                    (part.weights_noise for part in parts if part.weights_noise is not None), default=None
                ),
            )
        )
    return tuple(rows)


def _tolerance(component: str, config: ModelConfig) -> Tolerance:
    if component == VISION:
        assert config.vision is not None
        return vision_tolerance(config.vision)
    return component_tolerance(component, config.text)


def media_rows(
    samples: Sequence[MediaSample], components: Sequence[ComponentParity], config: ModelConfig
) -> tuple[MediaRow, ...]:
    """What each picture's embeddings are like; `components` holds one `vision` entry a sample, in their order."""
    found = [part.local for part in components if part.component == VISION]
    return tuple(
        MediaRow(
            name=sample.name,
            grid=sample.item.grid,
            tokens=sample.item.tokens,
            relative_l2=local.relative_l2,
            tolerance=_tolerance(VISION, config),
            max_abs=local.max_abs,
            worst=f"at {list(local.worst_index)}: {local.actual:.7g}, reference {local.expected:.7g}",
            picture=picture_from_frames(sample.frames),
        )
        for sample, local in zip(samples, found, strict=True)
    )


def expert_loads(state: WalkState) -> tuple[ExpertLoad, ...]:
    """Tokens per expert of each layer that has a router."""
    return tuple(
        ExpertLoad(
            layer=layer,
            reference=tuple(map(int, state.expected_load[layer])),
            bundle=tuple(map(int, state.actual_load[layer])),
        )
        for layer in range(len(state.expected_load))
        if state.expected_load[layer].any()
    )


def far_rows(found: Sequence[FarParity], config: TextConfig) -> tuple[FarRow, ...]:
    """What layers at far positions are like."""
    return tuple(
        FarRow(
            component=part.component,
            layer=part.layer,
            position=part.position,
            tokens=part.tokens,
            relative_l2=part.local.relative_l2,
            tolerance=far_tolerance(component_tolerance(part.component, config), part.scores),
            worst=f"at {list(part.local.worst_index)}: {part.local.actual:.7g}, reference {part.local.expected:.7g}",
            router_differs=part.router_differs,
        )
        for part in found
    )


def parity_checks(
    rows: Sequence[ComponentRow],
    prompts: Sequence[Prompt],
    figures: Sequence[PromptFigures],
    *,
    media: Sequence[MediaRow] = (),
    far: Sequence[FarRow] = (),
    tasks: Sequence[TaskRow] = (),
) -> tuple[Check, ...]:
    """All checks of a report but those against a baseline."""
    return (
        *_vision_checks(media, prompts, figures),
        *_component_checks(rows),
        *_far_checks(far),
        *_end_to_end_checks(prompts, figures),
        *_decode_checks(figures),
        *_way_checks("batch", "relative L2 to alone", figures, [item.row.batch_to_alone for item in figures]),
        *_way_checks("cached prefix", "relative L2 to cold", figures, [item.row.cached_to_cold for item in figures]),
        *_passage_checks(prompts, figures),
        *_task_checks(tasks),
    )


def _check(section: Section, name: str, metric: str, value: float, tolerance: Tolerance, detail: str = "") -> Check:
    return Check(section=section, name=name, metric=metric, value=value, tolerance=tolerance, detail=detail)


def _component_checks(rows: Sequence[ComponentRow]) -> list[Check]:
    checks = []
    for row in rows:
        checks.append(_check("components", row.label, "relative L2", row.local, row.tolerance, row.worst))
        if row.tokens:
            tolerance = gain_tolerance(row.tokens, row.gain_noise)
            checks.append(_check("components", row.label, "systematic gain", abs(row.gain), tolerance))
        if row.router_differs is not None and row.router_weights_max_abs is not None:
            differs, weights = row.router_differs, row.router_weights_max_abs
            checks.append(_check("components", row.label, "tokens routed differently", differs, NO_DISAGREEMENT))
            tolerance = widened(ROUTER_WEIGHTS, row.weights_noise)
            checks.append(_check("components", row.label, "router weights, max abs", weights, tolerance))
    return checks


def _far_checks(far: Sequence[FarRow]) -> list[Check]:
    checks = []
    for row in far:
        name = f"position {row.position:,}, {row.component} {row.layer}"
        checks.append(_check("far positions", name, "relative L2", row.relative_l2, row.tolerance, row.worst))
        if row.router_differs:
            differs = row.router_differs
            checks.append(_check("far positions", name, "tokens routed differently", differs, NO_DISAGREEMENT))
    return checks


def _vision_checks(
    media: Sequence[MediaRow], prompts: Sequence[Prompt], figures: Sequence[PromptFigures]
) -> list[Check]:
    """The embeddings of each picture, and the logits of prompts that hold some."""
    checks = [_check("vision", row.name, "relative L2", row.relative_l2, row.tolerance, row.worst) for row in media]
    for prompt, item in zip(prompts, figures, strict=True):
        if prompt.media and item.row.prefill is not None:
            error = item.row.prefill
            checks.append(_check("vision", prompt.name, "relative L2 of the logits", error, END_TO_END_L2))
    return checks


def _end_to_end_checks(prompts: Sequence[Prompt], figures: Sequence[PromptFigures]) -> list[Check]:
    kept = np.concatenate([item.kept for item in figures])
    checks = [_check("end to end", _ALL, "share of tokens behind router ties", float((~kept).mean()), FEW_TIES)]
    if not kept.any():
        return checks
    disagree = [(item.row.name, row) for item in figures for row in item.disagreements]
    divergences = np.concatenate([np.where(item.kept, item.rows.kl, 0.0) for item in figures])
    places = [(item.row.name, row) for item in figures for row in range(len(item.kept))]
    worst = int(divergences.argmax())
    first = f"first: {_place(*disagree[0])}" if disagree else ""
    where = _worst(figures, [item.row.prefill or 0.0 for item in figures])
    error = relative_l2_of_prompts(figures)
    average, largest = kl_tolerances(logits_rms_of_prompts(figures), int(kept.sum()))
    return [
        *checks,
        _check("end to end", _ALL, "relative L2", error, END_TO_END_L2, where),
        _check("end to end", _ALL, "top-1 disagreements", len(disagree), NO_DISAGREEMENT, first),
        _check("end to end", _ALL, "KL divergence, mean, nats", float(divergences[kept].mean()), average),
        _check(
            "end to end", _ALL, "KL divergence, max, nats", float(divergences[worst]), largest, _place(*places[worst])
        ),
    ]


def _place(name: str, row: int) -> str:
    return f"{name}, token {row}"


def _decode_checks(figures: Sequence[PromptFigures]) -> list[Check]:
    """Prompt and then one by one: against the reference, and against the runtime's own prefill."""
    disagree = [(item.row.name, int(row)) for item in figures for row in item.decode_disagreements]
    decoded = [item for item in figures if item.row.decode is not None]
    if not decoded:
        return []
    first = f"first: {_place(*disagree[0])}" if disagree else ""
    return [
        *_way_checks("decode", "relative L2", figures, [item.row.decode for item in figures]),
        _check("decode", _ALL, "top-1 disagreements", len(disagree), NO_DISAGREEMENT, first),
        *_way_checks("decode", "relative L2 to prefill", figures, [item.row.decode_to_prefill for item in figures]),
    ]


def _way_checks(
    section: Section, metric: str, figures: Sequence[PromptFigures], errors: Sequence[float | None]
) -> list[Check]:
    """The worst over the prompts that were run so."""
    found = [(item, error) for item, error in zip(figures, errors, strict=True) if error is not None]
    if not found:
        return []
    values = [error for _, error in found]
    return [_check(section, _ALL, metric, max(values), END_TO_END_L2, _worst([item for item, _ in found], values))]


def _passage_checks(prompts: Sequence[Prompt], figures: Sequence[PromptFigures]) -> list[Check]:
    checks = []
    for prompt, item in zip(prompts, figures, strict=True):
        if prompt.is_passage:
            row = passage_row(prompt, item)
            difference = abs(row.bundle_nll - row.reference_nll)
            checks.append(
                _check(
                    "text",
                    prompt.name,
                    "log-likelihood a token, difference in nats",
                    difference if np.isfinite(difference) else np.inf,
                    perplexity_tolerance(item.logits_rms),
                    f"perplexity {row.bundle_perplexity:.6g}, reference {row.reference_perplexity:.6g}",
                )
            )
    return checks


def _task_checks(tasks: Sequence[TaskRow]) -> list[Check]:
    """Problems that the bundle answers wrong and the reference right, task by task (or the other way round)."""
    reference = {row.task: row for row in tasks if row.backend == REFERENCE}
    return [
        _check(
            "tasks",
            f"{row.task} on {row.backend}",
            "right answers, difference to the reference",
            abs(row.right - reference[row.task].right),
            SAME_ANSWERS,
            f"{row.right} of {row.total}, reference {reference[row.task].right}{'; ' if row.first_wrong else ''}"
            f"{row.first_wrong}",
        )
        for row in tasks
        if row.backend != REFERENCE
    ]


def _worst(figures: Sequence[PromptFigures], errors: Sequence[float]) -> str:
    return figures[int(np.argmax(errors))].row.name


def with_overrides(check: Check, overrides: Overrides, layers: Mapping[str, int]) -> Check:
    """The check with the tolerance that was given for it; `layers` are those that components' names stand for."""
    return replace(check, tolerance=overridden(check.tolerance, overrides, layer=layers.get(check.name)))


def replaced_tolerances(
    checks: Sequence[Check], overrides: Overrides, layers: Mapping[str, int]
) -> dict[str, list[Tolerance]]:
    """Override -> the tolerances that it has replaced."""
    found: dict[str, list[Tolerance]] = {}
    for check in checks:
        if check.tolerance.default is not None:
            by_layer = f"{check.tolerance.name}.{layers.get(check.name)}"
            found.setdefault(by_layer if by_layer in overrides else check.tolerance.name, []).append(check.tolerance)
    return found
