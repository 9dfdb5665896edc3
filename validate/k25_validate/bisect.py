"""`bisect`: the first component that is off, the first op inside it, and a reproducer of that op."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from k25_export.manifest import REPORTS_FOLDER, Manifest
from k25_plugins.errors import InputError
from k25_plugins.version import __version__
from k25_runtime.backend import Backend
from k25_runtime.bundle_files import BundleFiles
from k25_runtime.mapped_checkpoint import MappedCheckpoint, checkpoint_folder
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
from k25_runtime.runtime import Runtime
from k25_validate.bisect_op import OpSearch
from k25_validate.bisect_state import STATE_NAME, read_bisect_state, write_bisect_state
from k25_validate.bisect_vision import VisionSearch
from k25_validate.bisect_walk import BisectWalk, Failure, LocalError
from k25_validate.divergence import Divergence
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
from k25_validate.media_samples import MediaSample
from k25_validate.parity_report import json_value
from k25_validate.prompts import Prompt, ids_of_text, prompts_for_bundle
from k25_validate.validation_key import validation_key

CONTEXT = 512
BLOCK_SIZE = 32
WAYS_OF_A_PROMPT = 3
DECODED = 4


@dataclass(frozen=True, kw_only=True)
class BisectReport:
    """What was found: `divergence` is None where every component is within its tolerance."""

    divergence: Divergence | None
    components: tuple[LocalError, ...]
    reference: str
    backend: str
    runtime: dict[str, str]
    reproducer: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing diverges."""
        return self.divergence is None

    def summary(self) -> str:
        """The divergence in a sentence, or that there is none."""
        if self.divergence is None:
            worst = max((local.error / local.tolerance for local in self.components if local.tolerance), default=0.0)
            count = len({(local.component, local.layer) for local in self.components})
            return (
                f"nothing diverges: {count} components on {self.backend}, the largest local error is {worst:.2f} of "
                "its tolerance"
            )
        text = self.divergence.sentence()
        return text if self.reproducer is None else f"{text}\nreproducer: {self.reproducer}"


def report_values(report: BisectReport) -> dict[str, Any]:
    """The report as plain values for `--json`."""
    values = {
        "format": "k25-bisect-report",
        "schema_version": 1,
        "passed": report.passed,
        "sentence": report.summary(),
        **asdict(report),
    }
    return json_value(values)  # type: ignore[no-any-return]


def bisect_bundle(
    bundle: Path,
    *,
    checkpoint: str | Path | None = None,
    reference: ReferenceName = "plain",
    reference_checkpoint: str | Path | None = None,
    stream: Stream = "auto",
    prompts: tuple[Prompt, ...] | None = None,
    samples: tuple[MediaSample, ...] | None = None,
    text: str | None = None,
    token_ids: Sequence[int] | None = None,
    output: Path | None = None,
    backend: Backend | None = None,
    threads: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> BisectReport:
    """Find the first component that is off and the first op inside it; write its reproducer to `output`, if given.

    A model with vision also gets pictures (the built-in ones, unless `samples` are given), before any text.
    Looks with `prompts`, or with one of `text` or `token_ids`, or with the built-in prompts.
    The state after each layer is kept in `reports/` of the bundle, so that an interrupted walk goes on where it was.
    What is looked for inside a component are the plain reference's values, whichever reference judges the component.
    """
    started = time.monotonic()
    files = BundleFiles(bundle)
    prompts = _prompts(files, text, token_ids) if prompts is None else prompts
    longest = max(CONTEXT, *(len(prompt.token_ids) for prompt in prompts))
    folder = checkpoint_folder(bundle, reference_checkpoint or checkpoint)
    backend = OnnxRuntimeCpu(threads=threads, mode="exact") if backend is None else backend
    with (
        bad_weights_as_input_errors(),
        Runtime.open(
            bundle,
            checkpoint=checkpoint,
            mode="exact",
            context=longest,
            block_size=backend.limits.only("block_size") or BLOCK_SIZE,
            max_sequences=WAYS_OF_A_PROMPT * len(prompts),
            backend=backend,
            bind_layers=False,
        ) as runtime,
    ):
        manifest = runtime.manifest
        is_streamed = weights_are_streamed(stream, reference, manifest)
        mapped = MappedCheckpoint(manifest, checkpoint_folder(bundle, checkpoint))
        key = _key(manifest, reference, folder, mapped.folder, prompts, backend.name)
        state_path = bundle / REPORTS_FOLDER / STATE_NAME
        with opened_reference(reference, folder, manifest, is_streamed, progress) as judge:
            state = read_bisect_state(state_path, key=key)
            vision = _vision_search(runtime, bundle, manifest, mapped, folder, backend)
            picture = None
            walk = BisectWalk(runtime, judge, prompts, exact=plain_of(judge, folder, manifest).exact())
            if vision is not None and state is None:  # a walk that has begun has pictures behind it
                picture = vision.first_failure(judge, media_or_built_in(manifest, samples), progress)
                walk.found.extend(vision.found)
            failure = None
            if picture is None:
                failure = walk.run(
                    state=state,
                    on_layer=lambda state: write_bisect_state(state_path, state, key=key),
                    is_streamed=is_streamed,
                    progress=progress,
                )
            found = judge.name
        divergence: Divergence | None = None
        search: OpSearch | VisionSearch | None = None
        reproducer = None
        if vision is not None and picture is not None:
            progress("looking for the first op", 0, 1)
            search, divergence = vision, vision.divergence(picture)
        elif failure is not None:
            progress("looking for the first op", 0, 1)
            runtime.runner.release_layers()
            search = _op_search(bundle, manifest, mapped, folder, backend, failure, prompts, runtime)
            divergence = search.divergence()
        if divergence is not None and search is not None:
            if output is not None and search.reproducer is not None:
                reproducer = str(search.reproducer.write(output, divergence.sentence()))
            progress("looking for the first op", 1, 1)
        state_path.unlink(missing_ok=True)
    return BisectReport(
        divergence=divergence,
        components=tuple(walk.found),
        reference=found,
        backend=backend.name,
        runtime={"onnxruntime": onnxruntime.__version__, "k25-export": __version__, **backend.details},
        reproducer=reproducer,
        seconds=time.monotonic() - started,
    )


def _prompts(files: BundleFiles, text: str | None, token_ids: Sequence[int] | None) -> tuple[Prompt, ...]:
    """The built-in prompts, or the one given: its last tokens are decoded one by one."""
    if text is None and token_ids is None:
        return prompts_for_bundle(files)
    ids = ids_of_text(files, text) if text is not None else tuple(token_ids or ())
    if not ids:
        raise InputError("token ids: expected at least one, found none")
    decoded = min(DECODED, len(ids) - 1)
    return (Prompt(name="yours", prompt_ids=ids[: len(ids) - decoded], next_ids=ids[len(ids) - decoded :]),)


def _vision_search(
    runtime: Runtime, bundle: Path, manifest: Manifest, mapped: MappedCheckpoint, folder: Path, backend: Backend
) -> VisionSearch | None:
    """None for a model that takes no pictures."""
    if manifest.model.vision is None or not runtime.runner.has_vision:
        return None
    return VisionSearch(
        runtime=runtime,
        bundle=bundle,
        manifest=manifest,
        checkpoint=mapped,
        reference_folder=folder,
        backend=backend,
    )


def _op_search(
    bundle: Path,
    manifest: Manifest,
    mapped: MappedCheckpoint,
    folder: Path,
    backend: Backend,
    failure: Failure,
    prompts: tuple[Prompt, ...],
    runtime: Runtime,
) -> OpSearch:
    blocks = 1 + max(int(step.batch.block_table.max()) for step in failure.way.steps)
    return OpSearch(
        bundle=bundle,
        manifest=manifest,
        checkpoint=mapped,
        reference_folder=folder,
        backend=backend,
        failure=failure,
        prompts=prompts,
        cache_shape=(blocks, BLOCK_SIZE, manifest.model.text.cache_dim),
    )


def _key(
    manifest: Manifest, reference: str, folder: Path, bound: Path, prompts: tuple[Prompt, ...], backend: str
) -> str:
    """What a state belongs to: the inputs, the files that are bound, the prompts and the backend."""
    parts = [validation_key(manifest, reference=reference, checkpoint=path) for path in (folder, bound)]
    files = [f"{entry.name}:{file.sha256}" for entry in manifest.components for file in entry.files]
    bindings = str([(entry.name, entry.bindings) for entry in manifest.components])
    return "|".join([*parts, *files, bindings, str(_tensors_hash(manifest)), repr(prompts), backend])


def _tensors_hash(manifest: Manifest) -> str:
    """The manifest's own record of its content; a manifest that was edited by hand has another tensor table."""
    return hashlib.sha256(repr(manifest.tensors).encode()).hexdigest()
