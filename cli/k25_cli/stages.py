"""Options and calls that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from k25_cli.extras import require_extra
from k25_cli.output import Progress
from k25_plugins.errors import InputError, VerificationError

if TYPE_CHECKING:
    from k25_export.manifest import Manifest
    from k25_runtime.runtime import BackendName
    from k25_validate.judge import ReferenceName, Stream
    from k25_validate.validation_options import ValidationOptions


def export_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--output`, `--latent-norm-eps`, `--cache` and `--cache-limit`."""
    function = click.option("--cache-limit", help="Size of the cache folder [default: 1GiB, or K25_CACHE_LIMIT].")(
        function
    )
    function = click.option(
        "--cache",
        type=click.Path(path_type=Path),
        help="Folder of traced components to reuse and add to (or K25_CACHE).",
    )(function)
    function = click.option(
        "--latent-norm-eps",
        type=click.FloatRange(min=0, min_open=True),
        help="Epsilon of q_a_layernorm and kv_a_layernorm [default: 1e-6, as in the Hugging Face code].",
    )(function)
    return click.option(
        "--output", "-o", required=True, type=click.Path(path_type=Path), help="The bundle folder to write."
    )(function)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The manifest, and in words what was reused."""

    manifest: Manifest
    is_reused: bool
    reused: str


def export_bundle(
    checkpoint: str,
    output: Path,
    *,
    latent_norm_eps: float | None,
    cache: Path | None,
    cache_limit: str | None,
    progress: Progress,
) -> ExportResult:
    """Read the checkpoint's headers and write (or reuse) the bundle."""
    from k25_export.bundle import bundle_from_checkpoint
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.component_cache import cache_from_environment
    from k25_export.config import DEFAULT_LATENT_NORM_EPS

    components = cache_from_environment(cache, cache_limit)
    intake = checkpoint_from_folder(checkpoint, latent_norm_eps=latent_norm_eps or DEFAULT_LATENT_NORM_EPS)
    manifest, is_reused = bundle_from_checkpoint(intake, output, cache=components, progress=progress)
    files = sum(len(component.files) for component in manifest.components)
    if is_reused:
        reused = "reused, nothing has changed"
    elif components is not None:
        reused = f"{components.hits} of {files} components from the cache"
    else:
        reused = f"{files} components traced"
    return ExportResult(manifest=manifest, is_reused=is_reused, reused=reused)


def record_bundle_hashes(bundle: Path, *, checkpoint: str | None, progress: Progress) -> int:
    """Write `hashes.json`; returns how many tensors it holds."""
    from k25_export.manifest import read_manifest
    from k25_export.verification import record_hashes
    from k25_runtime.mapped_checkpoint import checkpoint_folder

    return record_hashes(bundle, read_manifest(bundle), checkpoint_folder(bundle, checkpoint), progress=progress)


def backend_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--backend`."""
    return click.option(
        "--backend",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="tensorrt runs the engines that `compile` built; it needs their GPU.",
    )(function)


def validation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--reference` and `--stream`."""
    return click.option(
        "--reference",
        type=click.Choice(["plain", "transformers"]),
        default="plain",
        show_default=True,
        help="The judge: our own plain PyTorch model, or transformers' native class.",
    )(
        click.option(
            "--stream",
            type=click.Choice(["auto", "on", "off"]),
            default="auto",
            show_default=True,
            help="Hold one layer's weights at a time; auto: where they exceed the memory.",
        )(function)
    )


class ToleranceOption(click.ParamType[tuple[str, float]]):
    """`NAME=VALUE`, as `k25_validate.tolerance_overrides` knows the names."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The name and the number; a usage error names what is wrong."""
        from k25_validate.tolerance_overrides import override_from_text

        if isinstance(value, tuple):
            return value
        try:
            return override_from_text(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


#: `k25_validate.parity_report.FAIL_ON`, which `--help` does not import.
_FAIL_ON = (
    *("any", "none", "vision", "components", "far-positions", "end-to-end", "decode", "batch", "cached-prefix"),
    *("text", "tasks", "baseline"),
)


def report_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--prompts`, `--text`, `--baseline`, `--fail-on` and `--tolerance`."""
    path = click.Path(path_type=Path)
    for option in (
        click.option(
            "--prompts", type=path, help="JSON lines with text or token_ids, instead of the built-in prompts."
        ),
        click.option(
            "--text", type=path, help="A UTF-8 text whose perplexity both are measured on [default: a built-in one]."
        ),
        click.option("--baseline", type=path, help="An older parity.json: fail where anything has become worse."),
        click.option(
            "--fail-on",
            type=click.Choice(_FAIL_ON),
            multiple=True,
            default=["any"],
            show_default=True,
            help="Fail on these checks only; repeat it. The report says so.",
        ),
        click.option(
            "--tolerance",
            "tolerances",
            type=ToleranceOption(),
            multiple=True,
            help="Another tolerance, as moe_layer.3=1e-5 or logits=1e-4; repeat it. The report says so.",
        ),
    ):
        function = option(function)
    return function


def report_choices(
    *,
    prompts: Path | None,
    text: Path | None,
    baseline: Path | None,
    fail_on: tuple[str, ...],
    tolerances: tuple[tuple[str, float], ...],
    backend: BackendName = "onnxruntime",
) -> ValidationOptions:
    """The options of `report_options` as `validate_bundle` takes them."""
    require_extra("validate")
    from k25_validate.validation_options import ValidationOptions

    return ValidationOptions(
        prompts=prompts, text=text, baseline=baseline, fail_on=fail_on, tolerances=dict(tolerances), backend=backend
    )


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What `validate` and `build` print."""

    values: dict[str, Any]
    text: str
    exit_code: int


def require_reference(reference: str) -> None:
    """Raise `BackendMissingError` where the packages of this reference are missing."""
    require_extra("validate")
    if reference == "transformers":
        require_extra("transformers")


def _report_values(page: Path, parity: dict[str, Any], *, is_reused: bool) -> dict[str, Any]:
    return {"report": str(page), "report_reused": is_reused, **parity}


def validate_bundle(
    bundle: Path,
    *,
    checkpoint: str | None,
    reference: str,
    stream: str,
    options: ValidationOptions,
    may_reuse: bool = False,
    progress: Progress,
) -> ValidationResult:
    """Compare the bundle with the reference and write the report; `may_reuse` takes one of the same inputs instead."""
    require_reference(reference)
    from k25_export.manifest import REPORTS_FOLDER, read_manifest
    from k25_runtime.mapped_checkpoint import checkpoint_folder
    from k25_validate.validation_key import reusable_report, validation_key

    page = (bundle / REPORTS_FOLDER / "parity.html").resolve()
    if may_reuse:
        key = validation_key(
            read_manifest(bundle),
            reference=reference,
            checkpoint=checkpoint_folder(bundle, checkpoint),
            options=options,
        )
        known = reusable_report(bundle, key=key)
        if known is not None:
            verdict = "PASSED" if known["passed"] else f"FAILED. {known.get('verdict', '')}"
            return ValidationResult(
                values=_report_values(page, known, is_reused=True),
                text=f"parity: {verdict} (report reused, nothing has changed)\nreport: {page}",
                exit_code=0 if known["passed"] else VerificationError.exit_code,
            )
    from k25_validate.parity_report import report_to_dict
    from k25_validate.report_files import write_report
    from k25_validate.validation import parity_report_from_bundle

    report = parity_report_from_bundle(
        bundle,
        checkpoint=checkpoint,
        reference=cast("ReferenceName", reference),
        stream=cast("Stream", stream),
        options=options,
        progress=progress,
    )
    write_report(report, bundle)
    return ValidationResult(
        values=_report_values(page, report_to_dict(report), is_reused=False),
        text=f"{report.verdict()}\n{report.summary()}\nreport: {page}",
        exit_code=0 if report.passed else VerificationError.exit_code,
    )
