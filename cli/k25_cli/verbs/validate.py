"""`k25-export validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from k25_cli.output import Output, output_options
from k25_cli.stages import (
    backend_option,
    report_choices,
    report_options,
    require_reference,
    validate_bundle,
    validation_options,
)


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@validation_options
@report_options
@backend_option
@click.option("--checkpoint", help="The checkpoint, if it has moved (or K25_CHECKPOINT).")
@output_options
def command(
    bundle: Path,
    reference: str,
    stream: str,
    checkpoint: str | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> int:
    """Compare BUNDLE with a PyTorch reference and write reports/parity.json, .xml and .html.

    Exit code 1 where a check fails; the report says which. Loosened tolerances and checks that do not count are
    recorded in it.
    """
    require_reference(reference)
    options = report_choices(**choices)
    printer = Output(as_json=as_json, quiet=quiet)
    with printer.progress() as progress:
        result = validate_bundle(
            bundle, checkpoint=checkpoint, reference=reference, stream=stream, options=options, progress=progress
        )
    printer.result(result.values, lambda: click.echo(result.text))
    return result.exit_code
