"""`k25-export bisect`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from k25_cli.output import Output, output_options
from k25_cli.stages import backend_option, require_reference, validation_options
from k25_cli.verbs.run import TokenIds
from k25_plugins.errors import VerificationError

if TYPE_CHECKING:
    from k25_runtime.backend import Backend
    from k25_validate.judge import ReferenceName, Stream


@click.command("bisect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Look with this user's message. [default: the built-in prompts]")
@click.option("--token-ids", type=TokenIds(), help='Look with these token ids: "1 2 3".')
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for a reproducer of the op.")
@validation_options
@backend_option
@click.option("--checkpoint", help="The checkpoint, if it has moved (or K25_CHECKPOINT).")
@output_options
def command(
    bundle: Path,
    prompt: str | None,
    token_ids: list[int] | None,
    output: Path | None,
    reference: str,
    stream: str,
    backend: str,
    checkpoint: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find the first component of BUNDLE that is off, and the first op inside it.

    Each component is fed with the reference's own input; inside the first one that exceeds its tolerance, prefixes of
    the graph are run until the op is found whose inputs agree and whose output does not. Exit code 0 where nothing
    diverges, 1 where something does. An interrupted search goes on where it was.
    """
    if prompt is not None and token_ids is not None:
        raise click.UsageError("give either --prompt or --token-ids")
    require_reference(reference)
    from k25_validate.bisect import bisect_bundle, report_values

    printer = Output(as_json=as_json, quiet=quiet)
    with ExitStack() as stack, printer.progress() as progress:
        report = bisect_bundle(
            bundle,
            checkpoint=checkpoint,
            reference=cast("ReferenceName", reference),
            stream=cast("Stream", stream),
            text=prompt,
            token_ids=token_ids,
            output=output,
            backend=_engines(bundle, stack) if backend == "tensorrt" else None,
            progress=progress,
        )
    printer.result(report_values(report), lambda: click.echo(report.summary()))
    return 0 if report.passed else VerificationError.exit_code


def _engines(bundle: Path, stack: ExitStack) -> Backend:
    from k25_runtime.engine_opening import engine_backend_from_bundle

    backend = engine_backend_from_bundle(bundle)
    stack.callback(backend.close)
    return backend
