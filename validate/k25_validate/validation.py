"""`validate`: a bundle against a reference, as a parity report."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k25_export.manifest import REPORTS_FOLDER, Manifest
from k25_plugins.errors import mismatch
from k25_plugins.version import __version__
from k25_runtime.backend import Backend
from k25_runtime.bundle_files import BundleFiles
from k25_runtime.mapped_checkpoint import checkpoint_folder
from k25_runtime.runtime import Runtime
from k25_validate.baseline import baseline_from_file, compared_with_baseline
from k25_validate.far_positions import far_parity, far_starts
from k25_validate.judge import (
    Progress,
    ReferenceName,
    Stream,
    bad_weights_as_input_errors,
    media_or_built_in,
    opened_reference,
    plain_of,
    weights_are_streamed,
)
from k25_validate.logit_summary import figures_of_prompt, logits_summary, passage_row
from k25_validate.media_samples import MediaSample
from k25_validate.parity_checks import (
    component_rows,
    expert_loads,
    far_rows,
    media_rows,
    parity_checks,
    replaced_tolerances,
    with_overrides,
)
from k25_validate.parity_report import ParityReport
from k25_validate.parity_walk import ParityWalk
from k25_validate.prompt_files import BUILT_IN_PASSAGE, passages_from_file, passages_from_text, prompts_from_file
from k25_validate.prompts import Prompt, prompts_for_bundle
from k25_validate.report_facts import machine_facts, not_checked, text_of_ids
from k25_validate.report_rows import ComponentRow
from k25_validate.task_rows import task_rows
from k25_validate.tolerance_overrides import Overrides, check_layers, overridden, recorded_overrides
from k25_validate.tolerances import Tolerance
from k25_validate.validation_key import prompts_digest, validation_key
from k25_validate.validation_options import ValidationOptions
from k25_validate.walk_files import STATE_NAME, read_state, write_state

if TYPE_CHECKING:
    pass

CONTEXT = 512
BLOCK_SIZE = 32
CHAINS_OF_A_PROMPT = 5

NOT_CHECKED = (
    "bf16 components: ONNX Runtime's CPU provider cannot run them",
    "other backends than the one that is named",
)


def _no_progress(what: str, done: int, total: int) -> None:
    return None


def parity_report_from_bundle(
    bundle: Path,
    *,
    checkpoint: str | Path | None = None,
    reference: ReferenceName = "plain",
    reference_checkpoint: str | Path | None = None,
    stream: Stream = "auto",
    prompts: tuple[Prompt, ...] | None = None,
    samples: tuple[MediaSample, ...] | None = None,
    options: ValidationOptions | None = None,
    backend: Backend | None = None,
    threads: int = 0,
    progress: Progress = _no_progress,
) -> ParityReport:
    """Run prompts through bundle and reference and compare, layer by layer.

    The prompts are those given, those of `options`, or the built-in ones with a passage of text. A model with vision
    also gets pictures (the built-in ones, unless `samples` are given), and every model tokens at far positions.

    Streamed (`on`, or `auto` where the weights exceed the machine's memory) one layer's weights are held at a time, and
    the state after each layer is kept in `reports/` until the walk is done, so that an interrupted one goes on there.
    The reference reads the same checkpoint unless `reference_checkpoint` names another copy of it. A result that is
    not finite, or far off, is a failed check of the report, not an error. `backend` runs the bundle instead of the one
    that `options` name; it has to compute in float32, as the tolerances are for that.
    """
    started = time.monotonic()
    options = options or ValidationOptions()
    files = BundleFiles(bundle)  # what is no bundle is refused as that
    manifest = files.manifest
    check_layers(options.tolerances, {entry.name: entry.layers or () for entry in manifest.components})
    baseline = None if options.baseline is None else baseline_from_file(options.baseline)
    folder = checkpoint_folder(bundle, reference_checkpoint or checkpoint)
    samples = media_or_built_in(manifest, samples)
    prompts = _prompts(files, samples, options) if prompts is None else prompts
    context = max(CONTEXT, *(len(prompt.token_ids) for prompt in prompts))
    context = min(context, manifest.model.text.max_position_embeddings)
    with (
        bad_weights_as_input_errors(),
        Runtime.open(
            bundle,
            checkpoint=checkpoint,
            mode="exact",
            context=context,
            max_sequences=_sequences(prompts, context),
            block_size=BLOCK_SIZE if backend is None and options.backend == "onnxruntime" else None,
            threads=threads,
            backend=backend or options.backend,
            bind_layers=False,
        ) as runtime,
    ):
        _require_float32(runtime)
        is_streamed = weights_are_streamed(stream, reference, manifest)
        key = validation_key(manifest, reference=reference, checkpoint=folder, options=options)
        walk_key = f"{key}|{prompts_digest(prompts)}"
        with opened_reference(reference, folder, manifest, is_streamed, progress) as judge:
            plain = plain_of(judge, folder, manifest)
            walk = ParityWalk(runtime, judge, prompts, samples, exact=plain.exact())
            state_path = bundle / REPORTS_FOLDER / STATE_NAME
            state, figures = walk.run(
                keep=figures_of_prompt,
                state=read_state(state_path, key=walk_key) if is_streamed else None,
                on_layer=(lambda state: write_state(state_path, state, key=walk_key)) if is_streamed else None,
                is_streamed=is_streamed,
                progress=progress,
            )
            starts = far_starts(runtime)
            far = far_rows(
                far_parity(runtime, plain, plain.model, starts, is_streamed=is_streamed, progress=progress),
                manifest.model.text,
            )
            reference_name, details = judge.name, dict(runtime.runner.details)
            backend_name = runtime.runner.backend_name
            tasks = task_rows(bundle, checkpoint, folder, judge, threads=threads, progress=progress)
    rows = component_rows(state.components, manifest.model)
    media = media_rows(samples, state.components, manifest.model)
    layers = {row.label: row.layer for row in rows if row.layer is not None}
    checks = tuple(
        with_overrides(check, options.tolerances, layers)
        for check in parity_checks(rows, prompts, figures, media=media, far=far, tasks=tasks)
    )
    logits = logits_summary(prompts, figures, text_of_ids(files))
    facts: dict[str, dict[str, Any]] = {
        "subject": _bundle_facts(bundle, manifest),
        "reference": {
            "name": reference_name,
            "precision": "float32",
            "experts": "(nibble - 8) * scale, exact in float32",
        },
        "runtime": {
            "backend": backend_name,
            "precision": "fp32",
            "mode": "exact",
            **details,
            "streamed": "yes, one layer at a time" if is_streamed else "no",
            **_versions(reference),
        },
        "machine": machine_facts(),
    }
    summary = None
    if baseline is not None:
        summary, more = compared_with_baseline(baseline, checks, facts=facts, logits=logits, tasks=tasks)
        checks += tuple(with_overrides(check, options.tolerances, layers) for check in more)
    report = ParityReport(
        key=key,
        **facts,
        prompts=tuple(item.row for item in figures),
        rows=tuple(replace(row, tolerance=_shown_tolerance(row, options.tolerances)) for row in rows),
        media=tuple(replace(row, tolerance=overridden(row.tolerance, options.tolerances)) for row in media),
        experts=expert_loads(state),
        logits=logits,
        passages=tuple(
            passage_row(prompt, item) for prompt, item in zip(prompts, figures, strict=True) if prompt.is_passage
        ),
        tasks=tasks,
        far=tuple(replace(row, tolerance=overridden(row.tolerance, options.tolerances)) for row in far),
        checks=checks,
        overrides=recorded_overrides(options.tolerances, replaced_tolerances(checks, options.tolerances, layers)),
        fail_on=options.fail_on,
        baseline=summary,
        not_checked=(*NOT_CHECKED, *not_checked(files, prompts, samples, starts, tasks)),
        seconds=time.monotonic() - started,
    )
    state_path.unlink(missing_ok=True)
    return report


def _require_float32(runtime: Runtime) -> None:
    if runtime.runner.activation != "float32":
        raise mismatch(
            f"backend {runtime.runner.backend_name}",
            expected="float32 activations, which the tolerances are for",
            found=runtime.runner.activation,
            hint="`k25-export compile --precision fp32` builds engines that can be validated.",
        )


def _prompts(files: BundleFiles, samples: tuple[MediaSample, ...], options: ValidationOptions) -> tuple[Prompt, ...]:
    """The built-in prompts (as far as they fit into the model) or those of a file, and the passage."""
    longest = files.manifest.model.text.max_position_embeddings
    if options.prompts is None:
        found = prompts_for_bundle(files, samples)
        prompts = tuple(prompt for prompt in found if len(prompt.token_ids) <= longest)
    else:
        prompts = prompts_from_file(options.prompts, files)
    if options.text is not None:
        return (*prompts, *passages_from_file(options.text, files))
    if not files.has_tokenizer:
        return prompts
    return (*prompts, *passages_from_text(files, BUILT_IN_PASSAGE, name="built-in text"))


def _sequences(prompts: tuple[Prompt, ...], context: int) -> int:
    """Sequences of the context's length that take the room of all chains."""
    blocks = CHAINS_OF_A_PROMPT * sum(-(-len(prompt.token_ids) // BLOCK_SIZE) for prompt in prompts)
    return -(-blocks // -(-context // BLOCK_SIZE))


def _shown_tolerance(row: ComponentRow, overrides: Overrides) -> Tolerance:
    return overridden(row.tolerance, overrides, layer=row.layer)


def _bundle_facts(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "bundle": bundle.resolve().name,
        "inputs_sha256": manifest.inputs_sha256,
        "components": {
            entry.name: {file.precision: file.sha256 for file in entry.files} for entry in manifest.components
        },
        "shards": {shard.file: shard.header_sha256 for shard in manifest.shards},
        "layers": manifest.model.text.num_hidden_layers,
    }


def _versions(reference: ReferenceName) -> dict[str, str]:
    tools = ("onnxruntime", "numpy", "torch", *(("transformers",) if reference == "transformers" else ()))
    return {"k25-export": __version__, **{tool: importlib.metadata.version(tool) for tool in tools}}
