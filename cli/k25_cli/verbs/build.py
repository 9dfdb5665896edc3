"""`k25-export build`."""

from __future__ import annotations

from pathlib import Path

import click

from k25_cli.output import Output, output_options
from k25_cli.stages import export_bundle, export_options, require_reference, validate_bundle, validation_options
from k25_plugins.errors import BackendMissingError


@click.command("build")
@click.argument("checkpoint")
@export_options
@validation_options
@click.option("--target", multiple=True, help="Not there yet: TensorRT engines to build.")
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
) -> int:
    """Export CHECKPOINT to a bundle and validate it. A bundle whose parity fails is kept, with its report.

    CHECKPOINT is a folder, or a Hugging Face id (owner/name) that is in the local cache.
    Exit code 1 where a check fails.
    """
    if target:
        raise BackendMissingError("--target: TensorRT engines are not there yet; see the README")
    require_reference(reference)
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
        result = validate_bundle(
            output, checkpoint=checkpoint, reference=reference, stream=stream, may_reuse=True, progress=progress
        )
    bundle = str(output.resolve())
    values = {"bundle": bundle, "reused": export.is_reused, **result.values}
    printer.result(values, lambda: click.echo(f"bundle: {bundle} ({export.reused})\n{result.text}"))
    return result.exit_code
