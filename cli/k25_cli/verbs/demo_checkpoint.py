"""`k25-export demo-checkpoint`."""

from __future__ import annotations

from pathlib import Path

import click

from k25_cli.extras import require_extra
from k25_cli.output import Output, output_options


@click.command("demo-checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    default="tiny",
    show_default=True,
    help="tiny (1.3 MB), small (486 M parameters), full-sparse (595 GB of holes) or trained (1.3 MB, adds, copies).",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the random weights.")
@output_options
def command(folder: Path, preset: str, seed: int, as_json: bool, quiet: bool) -> None:
    """Write a checkpoint in Kimi K2.5's official layout, with random weights (or trained ones), to FOLDER."""
    require_extra("export")
    from k25_export.demo.checkpoint import write_demo_checkpoint

    output = Output(as_json=as_json, quiet=quiet)
    with output.progress() as progress:
        written = write_demo_checkpoint(folder, preset=preset, seed=seed, progress=progress)
    values = {"checkpoint": str(written), "preset": preset, "seed": seed}
    output.result(values, lambda: click.echo(f"checkpoint: {written} (preset {preset}, seed {seed})"))
