"""`k25-export plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import click

from k25_cli.extras import require_extra
from k25_cli.output import Output, human_bytes, output_options, print_table
from k25_export.byte_sizes import bytes_from_text
from k25_export.gpus import CPU, CUSTOM, GPUS, Gpu, bandwidth_from_text, gpu_from_name
from k25_export.plan import MOST_GPUS, CacheDtype, DecodeSpeed, Deployment, Plan, plan_from_config
from k25_export.weight_shares import Attention
from k25_plugins.errors import InputError

GIB = 1 << 30


class _Quantity(click.ParamType[int]):
    """Bytes, or bytes a second, with a unit."""

    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return self._parse(str(value))
        except InputError as error:
            self.fail(str(error), param, ctx)


_SIZE = _Quantity("size", bytes_from_text)
_BANDWIDTH = _Quantity("bandwidth", bandwidth_from_text)


@click.command("plan")
@click.argument("checkpoint")
@click.option("--gpu", "gpu_name", required=True, type=click.Choice([*GPUS, CUSTOM, CPU]), help="Kind of GPU.")
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1, MOST_GPUS), help="How many of them.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens in the cache of each sequence, prompt and answer [default: all that the model has positions for].",
)
@click.option("--sequences", default=1, show_default=True, type=click.IntRange(min=1), help="Sequences at a time.")
@click.option(
    "--gpu-memory",
    type=_SIZE,
    help="Memory of one: 48GB (powers of 1000) or 48GiB (of 1024); needed for custom and cpu.",
)
@click.option("--gpu-bandwidth", type=_BANDWIDTH, help="Memory bandwidth of one: 900GB/s; needed for custom and cpu.")
@click.option(
    "--attention",
    type=click.Choice(["heads", "sequences"]),
    default="heads",
    show_default=True,
    help="What of attention the GPUs share out: heads (each has a copy of the cache), or sequences (each has all "
    "heads, and the cache of its own sequences).",
)
@click.option(
    "--cache-dtype", type=click.Choice(["bf16", "fp32"]), help="Of the latent cache [default: bf16; fp32 on a CPU]."
)
@click.option("--block-size", default=32, show_default=True, type=click.IntRange(min=1), help="Tokens a cache block.")
@click.option(
    "--max-batch-tokens",
    default=8192,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most tokens of one step (a piece of a prompt): sizes the workspace.",
)
@click.option("--cuda-context", type=_SIZE, help="CUDA context and libraries, per GPU [default: 1GiB; 0B on a CPU].")
@click.option("--reserve", type=_SIZE, default="2GiB", show_default=True, help="Left free on each GPU.")
@click.option(
    "--efficiency",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.001, 1),
    help="Share of the bandwidth that is reached; 1 gives an upper bound.",
)
@output_options
def command(
    checkpoint: str,
    gpu_name: str,
    gpus: int,
    context: int | None,
    sequences: int,
    gpu_memory: int | None,
    gpu_bandwidth: int | None,
    attention: str,
    cache_dtype: str | None,
    block_size: int,
    max_batch_tokens: int,
    cuda_context: int | None,
    reserve: int,
    efficiency: float,
    as_json: bool,
    quiet: bool,
) -> int:
    """What it takes to run CHECKPOINT: memory per GPU, whether it fits, the longest context, bandwidth-bound speed.

    Computed from the headers alone. Exit code 0 also where it does not fit: the plan is the answer.
    """
    require_extra("export")
    from k25_export.checkpoint import checkpoint_from_folder

    if gpu_name in (CUSTOM, CPU) and (gpu_memory is None or gpu_bandwidth is None):
        raise click.UsageError(f"--gpu {gpu_name} needs --gpu-memory (as 48GiB) and --gpu-bandwidth (as 900GB/s).")
    if gpu_name == CPU and gpus != 1:
        raise click.UsageError(
            "--gpu cpu is one machine: leave --gpus at 1, give the memory and bandwidth of all of it."
        )
    gpu = gpu_from_name(gpu_name, memory_bytes=gpu_memory, bandwidth=gpu_bandwidth)
    if cuda_context is None:
        cuda_context = 0 if gpu.is_cpu else bytes_from_text("1GiB")
    source = checkpoint_from_folder(checkpoint)
    source.require_no_problems()
    deployment = Deployment(
        gpu=gpu,
        gpus=gpus,
        context=source.config.text.max_position_embeddings if context is None else context,
        sequences=sequences,
        attention=cast("Attention", attention),
        cache_dtype=cast("CacheDtype", cache_dtype or ("fp32" if gpu.is_cpu else "bf16")),
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        cuda_context_bytes=cuda_context,
        reserve_bytes=reserve,
        efficiency=efficiency,
    )
    plan = plan_from_config(source.config, deployment)
    values = {"checkpoint": str(source.folder), **asdict(plan)}
    Output(as_json=as_json, quiet=quiet).result(values, lambda: _print(plan))
    return 0


def _print(plan: Plan) -> None:
    deployment, memory = plan.deployment, plan.memory
    per_device = "CPU" if deployment.gpu.is_cpu else "per GPU"
    load = f"{deployment.context:,} tokens x {_counted(deployment.sequences, 'sequence')}"
    click.echo(
        f"{load} on {_machine(deployment.gpus, deployment.gpu)}: {'it fits' if plan.fits else 'IT DOES NOT FIT'}"
    )
    click.echo()
    rows: list[tuple[str, ...]] = [
        (f"{share.kind} ({share.precision})", share.split, human_bytes(share.total_bytes), human_bytes(share.gpu_bytes))
        for share in plan.weights
    ]
    rows.append(("sum", "", human_bytes(plan.weight_bytes), human_bytes(memory.weights)))
    print_table("weights", rows, header=("kind", "shared out by", "stored", per_device))
    click.echo()
    print_table(f"memory, {per_device}", _memory_rows(plan), header=("", "bytes", ""))
    click.echo()
    print_table("what fits", _limit_rows(plan))
    click.echo()
    print_table(
        "decode, at most" if plan.fits else "decode, at most, if it fitted",
        [_decode_row(speed) for speed in plan.decode],
        header=("sequences", "experts/layer", "weights read", "cache read", "step", "tokens/s", "each"),
    )
    for title, lines in (("assumptions", plan.assumptions), ("notes", plan.notes)):
        if lines:
            click.echo(f"\n{title}")
            for line in lines:
                click.echo(f"  - {line}")


def _memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    memory = plan.memory
    parts = (
        ("weights", memory.weights),
        ("latent cache", memory.cache),
        ("workspace", memory.workspace),
        ("CUDA context, libraries", memory.cuda_context),
        ("reserve", memory.reserve),
        ("needed", memory.needed),
        ("there is", memory.available),
        ("free" if plan.fits else "MISSING", abs(memory.free)),
    )
    return [(name, human_bytes(count), f"{count / GIB:,.2f} GiB") for name, count in parts]


def _limit_rows(plan: Plan) -> list[tuple[str, ...]]:
    deployment, per_token = plan.deployment, plan.cache_bytes_per_token
    limit = {"memory": "memory", "max_position_embeddings": "the model"}[plan.longest_context_limit]
    most = f"{plan.most_sequences:,}"
    if plan.most_sequences == deployment.max_batch_tokens:
        most += " or more (--max-batch-tokens)"
    tokens = f"{deployment.context:,} tokens"
    rows: list[tuple[str, ...]] = [
        ("latent cache", f"{per_token:,} B a token, {per_token * deployment.context / GIB:,.2f} GiB for {tokens}"),
        (
            f"longest context of {_counted(deployment.sequences, 'sequence')}",
            f"{plan.longest_context:,} tokens (bound by {limit})" if plan.longest_context else "none",
        ),
        (f"most sequences of {tokens}", most),
    ]
    if not deployment.gpu.is_cpu:
        fewest = plan.fewest_gpus
        rows.append(
            (
                "fewest GPUs for both",
                f"none up to {MOST_GPUS:,}" if fewest is None else _machine(fewest, deployment.gpu),
            )
        )
    return rows


def _decode_row(speed: DecodeSpeed) -> tuple[str, ...]:
    return (
        f"{speed.sequences:,}",
        f"{speed.experts_hit:.2f}",
        human_bytes(speed.weight_bytes),
        human_bytes(speed.cache_bytes),
        f"{speed.seconds * 1e3:.3f} ms",
        f"{speed.tokens_per_second:,.1f}",
        f"{1 / speed.seconds:,.1f}",
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _machine(count: int, gpu: Gpu) -> str:
    return "the CPU" if gpu.is_cpu else f"{count:,} x {gpu.name}"
