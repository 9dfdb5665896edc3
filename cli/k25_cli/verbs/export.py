"""`k25-export export`."""

from __future__ import annotations

from pathlib import Path

import click

from k25_cli.extras import require_extra
from k25_cli.output import Output, output_options
from k25_cli.stages import export_bundle, export_options, record_bundle_hashes


@click.command("export")
@click.argument("checkpoint")
@export_options
@click.option("--hash", "with_hashes", is_flag=True, help="Also stream a SHA-256 of every tensor into hashes.json.")
@output_options
def command(
    checkpoint: str,
    output: Path,
    latent_norm_eps: float | None,
    cache: Path | None,
    cache_limit: str | None,
    with_hashes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Trace the components of CHECKPOINT to ONNX and write a bundle. Only headers are read.

    CHECKPOINT is a folder, or a Hugging Face id (owner/name) that is in the local cache.
    """
    require_extra("export")
    printer = Output(as_json=as_json, quiet=quiet)
    with printer.progress() as progress:
        result = export_bundle(
            checkpoint,
            output,
            latent_norm_eps=latent_norm_eps,
            cache=cache,
            cache_limit=cache_limit,
            progress=progress,
        )
        if with_hashes:
            record_bundle_hashes(output, checkpoint=checkpoint, progress=progress)
    values = {
        "bundle": str(output.resolve()),
        "reused": result.is_reused,
        "components": [entry.name for entry in result.manifest.components],
        "tensors": sum(len(group.offsets or (0,)) for group in result.manifest.tensors),
    }
    printer.result(values, lambda: click.echo(f"bundle: {values['bundle']} ({result.reused})"))
