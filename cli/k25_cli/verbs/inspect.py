"""`k25-export inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from k25_cli.extras import require_extra
from k25_cli.output import Output, human_bytes, human_count, output_options, print_table

if TYPE_CHECKING:
    from k25_export.inspection import Inspection

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
    not fit the configuration.
    """
    require_extra("export")
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.inspection import inspection_of_checkpoint

    found = inspection_of_checkpoint(checkpoint_from_folder(checkpoint))
    Output(as_json=as_json, quiet=quiet).result(asdict(found), lambda: _print(found))
    return 3 if found.problems else 0


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
