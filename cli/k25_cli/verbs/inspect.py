"""`k25-export inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k25_cli.engine_stage import ENGINE_HEADER, engine_rows, engine_values
from k25_cli.extras import require_extra
from k25_cli.output import Output, human_bytes, human_count, output_options, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from k25_engines.inventory import EngineStatus
    from k25_export.inspection import Inspection
    from k25_export.manifest import Manifest

_SHOWN_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@click.command("inspect")
@click.argument("checkpoint")
@output_options
def command(checkpoint: str, as_json: bool, quiet: bool) -> int:
    """What CHECKPOINT holds, its size, what is wrong with it: from the headers alone.

    CHECKPOINT is a folder, or a Hugging Face id (owner/name) that is in the local cache. Exit code 3 where tensors do
    not fit the configuration. A bundle is taken as well: its components, its engines and where those can run.
    """
    from k25_export.manifest import is_bundle

    if is_bundle(Path(checkpoint)):
        return _inspect_bundle(Path(checkpoint), Output(as_json=as_json, quiet=quiet))
    require_extra("export")
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.inspection import inspection_of_checkpoint

    found = inspection_of_checkpoint(checkpoint_from_folder(checkpoint))
    Output(as_json=as_json, quiet=quiet).result(asdict(found), lambda: _print(found))
    return 3 if found.problems else 0


def _inspect_bundle(bundle: Path, output: Output) -> int:
    """Components and engines of a bundle; exit code 3 where an engine's file is not the one that was built."""
    from k25_engines.inventory import engine_statuses
    from k25_export.manifest import read_manifest

    manifest = read_manifest(bundle)
    statuses = engine_statuses(bundle, manifest)
    problems = [status.problem for status in statuses if status.problem is not None]
    values = {
        "bundle": str(bundle.resolve()),
        "components": [
            {"name": entry.name, "layers": len(entry.layers or (0,)), "files": [asdict(file) for file in entry.files]}
            for entry in manifest.components
        ],
        "engines": [
            engine_values(status.entry)
            | {"built_here": status.is_built_here, "why_not": status.problem or status.stale, "runs_on": status.runs_on}
            for status in statuses
        ],
        "problems": problems,
    }
    output.result(values, lambda: _print_bundle(bundle, manifest, statuses))
    return 3 if problems else 0


def _print_bundle(bundle: Path, manifest: Manifest, statuses: Sequence[EngineStatus]) -> None:
    rows = [
        (
            f"{entry.name}.{file.precision}",
            str(len(entry.layers or (0,))),
            str(len(file.inputs)),
            human_bytes(file.bytes),
        )
        for entry in manifest.components
        for file in entry.files
    ]
    print_table(f"{bundle}: components", rows, header=("component", "instances", "inputs", "size"))
    click.echo()
    if not statuses:
        click.echo("engines: none; `k25-export compile BUNDLE --target sm120` builds them")
        return
    print_table("engines", engine_rows(statuses), header=ENGINE_HEADER)
    for status in statuses:
        if not status.is_built_here:
            click.echo(f"{status.entry.name}: {status.problem or status.stale}")


def _print(found: Inspection) -> None:
    text, quantization = found.config["text"], found.config["quantization"]
    print_table(
        found.folder,
        [
            (
                "parameters",
                f"{human_count(found.parameters_total)}, active {human_count(found.parameters_active)} a token",
            ),
            ("files", f"{found.shards} shards, {human_bytes(found.file_bytes)}"),
            ("tensors", f"{found.tensors:,}, {human_bytes(found.tensor_bytes)}"),
            (
                "quantisation",
                f"routed experts INT{quantization['num_bits']} {quantization['format']}, "
                f"groups of {quantization['group_size']}, symmetric; the rest bf16",
            ),
            ("vision", "MoonViT" if found.config["vision"] else "none"),
            *((key, f"{text[key]:,}") for key in _SHOWN_KEYS),
        ],
    )
    click.echo()
    rows = [
        (kind.name, f"{kind.tensors:,}", human_count(kind.parameters), human_bytes(kind.bytes)) for kind in found.kinds
    ]
    print_table("bytes by kind", rows, header=("kind", "tensors", "parameters", "bytes"))
    click.echo()
    if found.problems:
        click.echo(f"{len(found.problems)} problems:")
        for problem in found.problems:
            click.echo(f"  {problem}")
    else:
        click.echo("problems: none; every tensor is accounted for")
