"""`k25-export compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from k25_cli.engine_stage import compilation_values, compile_bundle, print_compilation, require_targets
from k25_cli.output import Output, output_options


@click.command("compile")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, required=True, help="sm80, sm86, sm89, sm120, sm121; repeat it.")
@click.option("--component", "components", multiple=True, help="Only this component [default: all]; repeat it.")
@click.option("--fuse", type=click.Choice(["decoder"]), help="Also one engine of all layers.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--portable", is_flag=True, help="From the ops' function bodies, without plugins.")
@click.option("--max-sequences", type=int, default=8, show_default=True, help="Sequences that decode at once.")
@click.option("--max-tokens", type=int, default=4096, show_default=True, help="Tokens of a prefill step.")
@click.option("--max-rows", type=int, default=256, show_default=True, help="Rows of logits asked for in a call.")
@click.option("--block-size", type=int, default=64, show_default=True, help="Tokens in a block of the cache.")
@click.option("--context", type=int, help="Tokens of a sequence [default: what the model takes].")
@click.option("--blocks", type=int, help="Blocks of the cache [default: for --max-sequences full contexts].")
@click.option("--max-expert-rows", type=int, help="Rows of 8 bytes of a layer's experts [default: the largest].")
@click.option("--max-patches", type=int, default=16384, show_default=True, help="Patches of a media item.")
@click.option("--flavour", type=click.Choice(["tensorrt-rtx", "tensorrt"]), help="[default: what is installed]")
@click.option("--plugin-library", type=click.Path(path_type=Path), help="Take the plugins of this shared library.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, help="Seconds for an engine.")
@click.option("--memory-limit", default="4GiB", show_default=True, help="Memory of a building process.")
@click.option("--parallel", type=click.IntRange(min=0), default=0, help="Processes at once [default: what fits].")
@output_options
def command(bundle: Path, targets: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Build TensorRT engines from BUNDLE, without a GPU. An engine that nothing has changed for is kept.

    Every engine is checked as far as that goes without a GPU; docs/engines.md says how far. Running one needs a GPU of
    its target.
    """
    require_targets(targets, options["flavour"])
    from k25_engines.child_processes import ChildLimits
    from k25_engines.engine_options import EngineOptions
    from k25_export.byte_sizes import bytes_from_text

    limits = ChildLimits(
        seconds=options["timeout"],
        memory_bytes=bytes_from_text(options["memory_limit"]),
        parallel=options["parallel"],
    )
    sizes = ("max_sequences", "max_tokens", "max_rows", "block_size", "context", "blocks", "max_expert_rows")
    chosen = {key: options[key] for key in (*sizes, "max_patches", "precision", "portable")}
    printer = Output(as_json=as_json, quiet=quiet)
    with printer.progress() as progress:
        compilation = compile_bundle(
            bundle,
            targets,
            options=EngineOptions(**chosen),
            components=options["components"],
            fuse_decoder=options["fuse"] == "decoder",
            flavour=options["flavour"],
            plugin_library=options["plugin_library"],
            limits=limits,
            progress=progress,
        )
    values = {"bundle": str(bundle.resolve()), **compilation_values(compilation)}
    printer.result(values, lambda: print_compilation(bundle, compilation))
