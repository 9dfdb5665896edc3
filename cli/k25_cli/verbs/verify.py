"""`k25-export verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from k25_cli.output import Output, output_options
from k25_cli.stages import record_bundle_hashes
from k25_plugins.errors import VerificationError


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Stream every tensor through SHA-256. Resumes after an interruption.")
@click.option("--record", is_flag=True, help="Write hashes.json, the baseline that --deep compares with.")
@click.option("--checkpoint", help="The checkpoint, if it has moved (or K25_CHECKPOINT).")
@output_options
def command(bundle: Path, deep: bool, record: bool, checkpoint: str | None, as_json: bool, quiet: bool) -> int:
    """Check that everything BUNDLE refers to is what it was at the export.

    Without --deep: the bundle's files, and size and header of each shard. Changes that keep both are found by --deep
    only. Exit code 1 where something differs, or where --deep has no baseline.
    """
    if deep and record:
        raise click.UsageError("give either --deep or --record")
    from k25_export.manifest import read_manifest
    from k25_export.verification import verification_of_bundle
    from k25_runtime.mapped_checkpoint import checkpoint_folder

    printer = Output(as_json=as_json, quiet=quiet)
    if record:
        with printer.progress() as progress:
            count = record_bundle_hashes(bundle, checkpoint=checkpoint, progress=progress)
        printer.result({"tensors_recorded": count}, lambda: click.echo(f"hashes.json: {count:,} tensors"))
        return 0
    manifest = read_manifest(bundle)
    folder = checkpoint_folder(bundle, checkpoint)
    with printer.progress() as progress:
        found = verification_of_bundle(bundle, manifest, folder, is_deep=deep, progress=progress)
    lines = [f"{found.files} files of the bundle, {found.shards} shards (size and header)"]
    if found.baseline:
        lines.append(f"{found.tensors_hashed:,} tensors hashed, compared with {found.baseline}")
    lines += [f"PROBLEM {problem}" for problem in found.problems]
    lines.append(f"verified: {'no, ' + str(len(found.problems)) + ' problems' if found.problems else 'yes'}")
    printer.result({"verified": not found.problems, **asdict(found)}, lambda: click.echo("\n".join(lines)))
    return VerificationError.exit_code if found.problems else 0
