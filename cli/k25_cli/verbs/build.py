"""`k25-export build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from k25_cli.engine_stage import compilation_values, compile_bundle, require_targets
from k25_cli.output import Output, output_options
from k25_cli.stages import (
    export_bundle,
    export_options,
    report_choices,
    report_options,
    require_reference,
    validate_bundle,
    validation_options,
)


@click.command("build")
@click.argument("checkpoint")
@export_options
@validation_options
@report_options
@click.option("--target", multiple=True, help="Also build TensorRT engines: sm80, sm120, ...; repeat it.")
@output_options
def command(
    checkpoint: str,
    output: Path,
    latent_norm_eps: float | None,
    cache: Path | None,
    cache_limit: str | None,
    reference: str,
    stream: str,
    target: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> int:
    """Export CHECKPOINT to a bundle and validate it. A bundle whose parity fails is kept, with its report.

    CHECKPOINT is a folder, or a Hugging Face id (owner/name) that is in the local cache.
    Exit code 1 where a check fails.
    """
    if target:
        require_targets(target)
    require_reference(reference)
    options = report_choices(**choices)
    printer = Output(as_json=as_json, quiet=quiet)
    with printer.progress() as progress:
        export = export_bundle(
            checkpoint,
            output,
            latent_norm_eps=latent_norm_eps,
            cache=cache,
            cache_limit=cache_limit,
            progress=progress,
        )
        compilation = compile_bundle(output, target, progress=progress) if target else None
        result = validate_bundle(
            output,
            checkpoint=checkpoint,
            reference=reference,
            stream=stream,
            options=options,
            may_reuse=True,
            progress=progress,
        )
    bundle = str(output.resolve())
    values = {"bundle": bundle, "reused": export.is_reused, **result.values}
    engines = ""
    if compilation is not None:
        values |= compilation_values(compilation)
        engines = f"engines: {values['built']} built, {values['reused']} reused for {', '.join(target)}\n"
    printer.result(values, lambda: click.echo(f"bundle: {bundle} ({export.reused})\n{engines}{result.text}"))
    return result.exit_code
