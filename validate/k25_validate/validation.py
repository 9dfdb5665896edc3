"""`validate`: a bundle against a reference, as a parity report.

Legend: P prompt tokens, N decoded tokens, V vocabulary.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from k25_plugins.errors import InputError
from k25_plugins.version import __version__
from k25_runtime.mapped_checkpoint import checkpoint_folder
from k25_runtime.runtime import Runtime
from k25_validate.agreement import top1_disagreements
from k25_validate.layer_parity import ComponentParity, PromptParity, prompt_parity, relative_l2_of_rows
from k25_validate.metrics import kl_divergence, relative_l2
from k25_validate.parity_report import Check, ComponentRow, ParityReport, Section
from k25_validate.prompts import Prompt, built_in_prompts
from k25_validate.reference import Reference, ReferenceTrace
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

ReferenceName = Literal["plain", "transformers"]
Progress = Callable[[str, int, int], None]
Float32 = npt.NDArray[np.float32]

NOT_CHECKED = (
    "bf16 components: ONNX Runtime's CPU provider cannot run them",
    "TensorRT engines and GPUs: no engine has been built",
    "the vision tower and images: the vision component is not there yet",
    "positions beyond the prompts' lengths (float32 angles round more from about 30,000 tokens on)",
)


def _no_progress(what: str, done: int, total: int) -> None:
    return None


def reference_from_checkpoint(
    name: ReferenceName, folder: Path, *, latent_norm_eps: float, progress: Progress = _no_progress
) -> Reference:
    """The reference of this name over a checkpoint folder."""
    if name == "plain":
        from k25_validate.plain_reference import PlainReference

        try:
            return PlainReference(folder, latent_norm_eps=latent_norm_eps)
        except (ValueError, OSError) as error:
            raise InputError(f"plain reference: {error}") from error
    from k25_validate.transformers_reference import TransformersReference

    return TransformersReference(folder, latent_norm_eps=latent_norm_eps, progress=progress)


def parity_report_from_bundle(
    bundle: Path,
    *,
    checkpoint: str | Path | None = None,
    reference: ReferenceName = "plain",
    reference_checkpoint: str | Path | None = None,
    threads: int = 0,
    progress: Progress = _no_progress,
) -> ParityReport:
    """Run the built-in prompts through the bundle and the reference and compare.

    The reference reads the same checkpoint unless `reference_checkpoint` names another copy of it. A result that is
    not finite, or far off, is a failed check of the report, not an error.
    """
    started = time.monotonic()
    with Runtime.open(
        bundle, checkpoint=checkpoint, mode="exact", context=512, max_sequences=16, threads=threads
    ) as runtime:
        text = runtime.manifest.model.text
        folder = checkpoint_folder(bundle, reference_checkpoint or checkpoint)
        judge = reference_from_checkpoint(reference, folder, latent_norm_eps=text.latent_norm_eps, progress=progress)
        prompts = built_in_prompts(runtime)
        traces, parities = [], []
        for index, prompt in enumerate(prompts):
            progress(f"comparing: {prompt.name}", index, len(prompts) + 2)
            traces.append(judge.trace(prompt.token_ids))
            parities.append(prompt_parity(runtime, traces[-1]))
        rows = _component_rows(parities, runtime)
        checks = [*_component_checks(rows, parities), *_end_to_end_checks(prompts, traces, parities)]
        progress("comparing: decode", len(prompts), len(prompts) + 2)
        checks += _decode_checks(runtime, prompts, traces, parities)
        progress("comparing: batch", len(prompts) + 1, len(prompts) + 2)
        checks += _batch_checks(runtime, prompts, parities)
        progress("comparing", len(prompts) + 2, len(prompts) + 2)
        return ParityReport(
            bundle=_bundle_facts(runtime),
            reference={"name": judge.name, "precision": "float32", "experts": "(nibble - 8) * scale, exact in float32"},
            runtime={
                "backend": "onnxruntime-cpu, function bodies",
                "precision": "fp32",
                "mode": "exact",
                "onnxruntime": onnxruntime.__version__,
                "k25-export": __version__,
            },
            machine={"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
            prompts=tuple(
                {"name": prompt.name, "prompt_tokens": len(prompt.prompt_ids), "decoded_tokens": len(prompt.next_ids)}
                for prompt in prompts
            ),
            rows=rows,
            checks=tuple(checks),
            not_checked=NOT_CHECKED,
            seconds=time.monotonic() - started,
        )


def _bundle_facts(runtime: Runtime) -> dict[str, object]:
    manifest = runtime.manifest
    return {
        "inputs_sha256": manifest.inputs_sha256,
        "components": {
            entry.name: {file.precision: file.sha256 for file in entry.files} for entry in manifest.components
        },
        "shards": {shard.file: shard.header_sha256 for shard in manifest.shards},
        "layers": manifest.model.text.num_hidden_layers,
    }


def _label(part: ComponentParity | ComponentRow) -> str:
    return part.component if part.layer is None else f"{part.component} {part.layer}"


def _component_rows(parities: Sequence[PromptParity], runtime: Runtime) -> tuple[ComponentRow, ...]:
    rows = []
    for parts in zip(*(parity.components for parity in parities), strict=True):
        worst = max(parts, key=lambda part: part.local.relative_l2)
        routers = [part.router for part in parts if part.router is not None]
        local = worst.local
        rows.append(
            ComponentRow(
                component=worst.component,
                layer=worst.layer,
                local=local.relative_l2,
                tolerance=component_tolerance(worst.component, runtime.manifest.model.text),
                accumulated=max(part.accumulated for part in parts),
                max_abs=max(part.local.max_abs for part in parts),
                worst=f"at {list(local.worst_index)}: {local.actual:.7g}, reference {local.expected:.7g}",
                cosine=min(part.local.cosine for part in parts),
                router_differs=sum(int(router.differs.sum()) for router in routers) if routers else None,
                router_ties=sum(int(router.ties.sum()) for router in routers) if routers else None,
                router_weights_max_abs=max(router.weights_max_abs for router in routers) if routers else None,
            )
        )
    return tuple(rows)


def _check(section: Section, name: str, metric: str, value: float, tolerance: Tolerance, detail: str = "") -> Check:
    return Check(section=section, name=name, metric=metric, value=value, tolerance=tolerance, detail=detail)


def _component_checks(rows: Sequence[ComponentRow], parities: Sequence[PromptParity]) -> list[Check]:
    checks = []
    for row in rows:
        name = _label(row)
        checks.append(_check("components", name, "relative L2", row.local, row.tolerance, row.worst))
        if row.router_differs is not None and row.router_weights_max_abs is not None:
            checks.append(_check("components", name, "tokens routed differently", row.router_differs, NO_DISAGREEMENT))
            weights = row.router_weights_max_abs
            checks.append(_check("components", name, "router weights, max abs", weights, ROUTER_WEIGHTS))
    tokens = sum(len(parity.kept) for parity in parities)
    excluded = sum(int((~parity.kept).sum()) for parity in parities)
    checks.append(
        _check("end to end", "all prompts", "share of tokens behind router ties", excluded / tokens, FEW_TIES)
    )
    return checks


def _end_to_end_checks(
    prompts: Sequence[Prompt], traces: Sequence[ReferenceTrace], parities: Sequence[PromptParity]
) -> list[Check]:
    actual = np.concatenate([parity.logits[parity.kept] for parity in parities])
    expected = np.concatenate([trace.logits[parity.kept] for trace, parity in zip(traces, parities, strict=True)])
    if not len(actual):
        return []  # every token is behind a tie, which the check on ties reports
    places = [
        (prompt.name, row)
        for prompt, parity in zip(prompts, parities, strict=True)
        for row in np.flatnonzero(parity.kept)
    ]
    divergence = kl_divergence(actual, expected)
    worst_prompt, worst_row = places[divergence.worst_row]
    disagree = top1_disagreements(actual, expected, margin=TOP1_TIE)
    first = f"first: {places[disagree[0]][0]}, token {places[disagree[0]][1]}" if len(disagree) else ""
    return [
        _check("end to end", "all prompts", "relative L2", relative_l2(actual, expected), END_TO_END_L2),
        _check("end to end", "all prompts", "top-1 disagreements", len(disagree), NO_DISAGREEMENT, first),
        _check(
            "end to end",
            "all prompts",
            "KL divergence, max, nats",
            divergence.maximum,
            KL,
            f"{worst_prompt}, token {worst_row}",
        ),
    ]


def _decode_checks(
    runtime: Runtime, prompts: Sequence[Prompt], traces: Sequence[ReferenceTrace], parities: Sequence[PromptParity]
) -> list[Check]:
    """Prefill the prompt, decode the rest one by one: against the reference, and against the runtime's own prefill."""
    against_reference, against_prefill, disagreements = 0.0, 0.0, 0
    for prompt, trace, parity in zip(prompts, traces, parities, strict=True):
        decoded = [runtime.prefill(prompt.prompt_ids, rows="last")[0]]
        decoded += [runtime.decode(token) for token in prompt.next_ids]
        actual = np.array(decoded)
        rows = slice(len(prompt.prompt_ids) - 1, None)
        kept = parity.kept[rows]
        against_reference = max(against_reference, relative_l2_of_rows(actual, trace.logits[rows], kept))
        against_prefill = max(against_prefill, relative_l2_of_rows(actual, parity.logits[rows], kept))
        disagreements += len(top1_disagreements(actual[kept], trace.logits[rows][kept], margin=TOP1_TIE))
    return [
        _check("decode", "all prompts", "relative L2", against_reference, END_TO_END_L2),
        _check("decode", "all prompts", "top-1 disagreements", disagreements, NO_DISAGREEMENT),
        _check("decode", "all prompts", "relative L2 to prefill", against_prefill, END_TO_END_L2),
    ]


def _batch_checks(runtime: Runtime, prompts: Sequence[Prompt], parities: Sequence[PromptParity]) -> list[Check]:
    """All prompts in one step, against each alone."""
    started = runtime.prefill_batch([prompt.token_ids for prompt in prompts])
    errors = [
        relative_l2_of_rows(logits, parity.logits, parity.kept)
        for (_, logits), parity in zip(started, parities, strict=True)
    ]
    for sequence, _ in started:
        runtime.free(sequence)
    worst = int(np.argmax(errors))
    return [_check("batch", "all prompts", "relative L2 to alone", errors[worst], END_TO_END_L2, prompts[worst].name)]
