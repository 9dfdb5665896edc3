"""`validate`: a bundle against a reference, as a parity report."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from k25_export.manifest import REPORTS_FOLDER, Manifest, read_manifest
from k25_plugins.errors import InputError
from k25_plugins.version import __version__
from k25_runtime.mapped_checkpoint import checkpoint_folder
from k25_runtime.runtime import Runtime
from k25_validate.parity_checks import component_rows, parity_checks
from k25_validate.parity_report import ParityReport
from k25_validate.parity_walk import ParityWalk
from k25_validate.prompts import Prompt, built_in_prompts
from k25_validate.read_ahead import ExpertReadAhead
from k25_validate.reference import Reference
from k25_validate.validation_key import validation_key
from k25_validate.walk_files import STATE_NAME, read_state, write_state

ReferenceName = Literal["plain", "transformers"]
Stream = Literal["auto", "on", "off"]
Progress = Callable[[str, int, int], None]

CONTEXT = 512
CHAINS_OF_A_PROMPT = 4

NOT_CHECKED = (
    "bf16 components: ONNX Runtime's CPU provider cannot run them",
    "TensorRT engines and GPUs: no engine has been built",
    "the vision tower and images: the vision component is not there yet",
    "positions beyond the prompts' lengths (float32 angles round more from about 30,000 tokens on)",
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
    threads: int = 0,
    progress: Progress = _no_progress,
) -> ParityReport:
    """Run the prompts (the built-in ones, unless given) through bundle and reference and compare, layer by layer.

    Streamed (`on`, or `auto` where the weights exceed the machine's memory) one layer's weights are held at a time, and
    the state after each layer is kept in `reports/` until the walk is done, so that an interrupted one goes on there.
    The reference reads the same checkpoint unless `reference_checkpoint` names another copy of it. A result that is
    not finite, or far off, is a failed check of the report, not an error.
    """
    started = time.monotonic()
    read_manifest(bundle)  # what is no bundle is refused as that
    folder = checkpoint_folder(bundle, reference_checkpoint or checkpoint)
    with (
        _bad_weights_as_input_errors(),
        Runtime.open(
            bundle,
            checkpoint=checkpoint,
            mode="exact",
            context=CONTEXT,
            max_sequences=CHAINS_OF_A_PROMPT * (4 if prompts is None else len(prompts)),
            threads=threads,
            bind_layers=False,
        ) as runtime,
    ):
        manifest = runtime.manifest
        is_streamed = _is_streamed(stream, reference, manifest)
        prompts = built_in_prompts(runtime) if prompts is None else prompts
        key = validation_key(manifest, reference=reference, checkpoint=folder)
        with _opened_reference(reference, folder, manifest, is_streamed, progress) as judge:
            walk = ParityWalk(runtime, judge, prompts)
            state_path = bundle / REPORTS_FOLDER / STATE_NAME
            components, logits = walk.run(
                state=read_state(state_path, key=key) if is_streamed else None,
                on_layer=(lambda state: write_state(state_path, state, key=key)) if is_streamed else None,
                is_streamed=is_streamed,
                progress=progress,
            )
        rows = component_rows(components, manifest.model.text)
        report = ParityReport(
            key=key,
            subject=_bundle_facts(manifest),
            reference={"name": judge.name, "precision": "float32", "experts": "(nibble - 8) * scale, exact in float32"},
            runtime={
                "backend": "onnxruntime-cpu, function bodies",
                "precision": "fp32",
                "mode": "exact",
                "streamed": "yes, one layer at a time" if is_streamed else "no",
                "onnxruntime": onnxruntime.__version__,
                "k25-export": __version__,
            },
            machine={"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
            prompts=tuple(
                {"name": prompt.name, "prompt_tokens": len(prompt.prompt_ids), "decoded_tokens": len(prompt.next_ids)}
                for prompt in prompts
            ),
            rows=rows,
            checks=parity_checks(rows, prompts, logits),
            not_checked=NOT_CHECKED,
            seconds=time.monotonic() - started,
        )
        state_path.unlink(missing_ok=True)
        return report


@contextlib.contextmanager
def _bad_weights_as_input_errors() -> Iterator[None]:
    """The plain reference shares no code, so it has an error of its own."""
    from k25_validate.plain_checkpoint import PlainReferenceError

    try:
        yield
    except PlainReferenceError as error:
        raise InputError(f"plain reference: {error}") from error


@contextlib.contextmanager
def _opened_reference(
    name: ReferenceName, folder: Path, manifest: Manifest, is_streamed: bool, progress: Progress
) -> Iterator[Reference]:
    latent_norm_eps = manifest.model.text.latent_norm_eps
    if name == "transformers":
        from k25_validate.transformers_reference import TransformersReference

        yield TransformersReference(folder, latent_norm_eps=latent_norm_eps, progress=progress)
        return
    from k25_validate.plain_reference import PlainReference

    with ExpertReadAhead(manifest, folder) as ahead:
        on_route = ahead.read if is_streamed else None
        yield PlainReference(folder, latent_norm_eps=latent_norm_eps, on_route=on_route)


def _is_streamed(stream: Stream, reference: ReferenceName, manifest: Manifest) -> bool:
    weights = sum(shard.bytes for shard in manifest.shards)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if reference == "transformers":
        if stream == "on":
            raise InputError("stream: the transformers reference holds the whole model; use the plain reference")
        return False
    return stream == "on" or (stream == "auto" and weights > memory)


def _bundle_facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "inputs_sha256": manifest.inputs_sha256,
        "components": {
            entry.name: {file.precision: file.sha256 for file in entry.files} for entry in manifest.components
        },
        "shards": {shard.file: shard.header_sha256 for shard in manifest.shards},
        "layers": manifest.model.text.num_hidden_layers,
    }
