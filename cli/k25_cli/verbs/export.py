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
    checkpoint: str, output: Path, latent_norm_eps: float | None, with_hashes: bool, as_json: bool, quiet: bool
) -> None:
    """Trace the components of CHECKPOINT to ONNX and write a bundle. Only headers are read.

    CHECKPOINT is a folder, or a Hugging Face id (owner/name) that is in the local cache.
    """
    require_extra("export")
    printer = Output(as_json=as_json, quiet=quiet)
    with printer.progress() as progress:
        manifest, is_reused = export_bundle(checkpoint, output, latent_norm_eps=latent_norm_eps, progress=progress)
        if with_hashes:
            record_bundle_hashes(output, checkpoint=checkpoint, progress=progress)
    values = {
        "bundle": str(output.resolve()),
        "reused": is_reused,
        "components": [entry.name for entry in manifest.components],
        "tensors": sum(1 for group in manifest.tensors for _ in group.numbered_offsets()),
    }
    how = "reused, nothing has changed" if is_reused else f"{len(manifest.components)} components"
    printer.result(values, lambda: click.echo(f"bundle: {values['bundle']} ({how})"))
