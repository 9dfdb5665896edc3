"""`k25-export bind`."""

from __future__ import annotations

from pathlib import Path

import click

from k25_cli.extras import require_extra
from k25_cli.output import Output, output_options


@click.command("bind")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--layer", type=int, help="The layer to write.")
@click.option("--all", "every", is_flag=True, help="Write every layer.")
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="The shards' folder or a parent of it."
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--link", is_flag=True, help="Hard-link the shards into the output, where it is another folder.")
@click.option("--checkpoint", help="The checkpoint, if it has moved (or K25_CHECKPOINT).")
@output_options
def command(
    bundle: Path,
    layer: int | None,
    every: bool,
    output: Path,
    precision: str,
    link: bool,
    checkpoint: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a layer of BUNDLE as a standalone ONNX file over the original shards.

    Any tool opens layer-N.fp32.onnx without our code: its initializers are external data, offset and length in the
    shards, and nothing is copied. Tools refuse data outside the model's folder, so the output must be the checkpoint
    folder or a parent of it (for a Hugging Face cache: the model's folder there).
    """
    require_extra("export")
    if (layer is None) == (not every):
        raise click.UsageError("give either --layer or --all")
    from typing import cast

    from k25_export.bound_model import BoundModelWriter
    from k25_export.manifest import Precision, read_manifest
    from k25_runtime.mapped_checkpoint import MappedCheckpoint, checkpoint_folder

    printer = Output(as_json=as_json, quiet=quiet)
    manifest = read_manifest(bundle)
    folder = checkpoint_folder(bundle, checkpoint)
    MappedCheckpoint(manifest, folder)  # refuses shards that are not the ones that were exported
    writer = BoundModelWriter(bundle=bundle, manifest=manifest, checkpoint=folder, output=output, link=link)
    layers = writer.layers if every else [layer or 0]
    written = []
    with printer.progress() as progress:
        for done, number in enumerate(layers):
            progress("binding layers", done, len(layers))
            written.append(str(writer.write(number, cast("Precision", precision))))
    printer.result({"files": written}, lambda: click.echo("\n".join(written)))
