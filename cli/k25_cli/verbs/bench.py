"""`k25-export bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k25_cli.output import Output, output_options, print_table
from k25_plugins.errors import InputError

if TYPE_CHECKING:
    from k25_runtime.bench_report import BenchReport

_HEADER = ("work", "best", "median", "unit", "")


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Of the prefill.")
@click.option("--steps", default=32, show_default=True, type=click.IntRange(min=1), help="Decode steps in a round.")
@click.option(
    "--context", default=32, show_default=True, type=click.IntRange(min=1), help="Tokens in the cache before decoding."
)
@click.option("--sequences", default=1, show_default=True, type=click.IntRange(min=1), help="Decoded at a time.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Everything takes turns.")
@click.option("--mode", type=click.Choice(["fast", "exact"]), default="fast", show_default=True)
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0, 1024), help="0: one for each core.")
@click.option("--checkpoint", help="The checkpoint, if it has moved (or K25_CHECKPOINT).")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the result (.svg).")
@click.option("--output", "output_file", type=click.Path(path_type=Path), help="Write the result (.json, or .md).")
@output_options
def command(
    bundle: Path, as_json: bool, quiet: bool, picture: Path | None, output_file: Path | None, **options: Any
) -> None:
    """How fast BUNDLE runs on this machine's CPU, against the memory bandwidth measured in the same run.

    Decode, prefill, loading and what the runtime itself costs take turns; the best round and the median are told. On
    a busy machine the best is the machine's, the median that of the day.
    """
    _check_suffix("--picture", picture, (".svg",))
    _check_suffix("--output", output_file, (".json", ".md"))
    from k25_plugins.whole_file import write_whole
    from k25_runtime.bench import BenchOptions, bench_bundle
    from k25_runtime.bench_picture import picture_of_report

    output = Output(as_json=as_json, quiet=quiet)
    with output.progress() as progress:
        report = bench_bundle(bundle, BenchOptions(**options), progress=progress)
    if picture is not None:
        write_whole(picture, picture_of_report(report))
    if output_file is not None:
        is_json = output_file.suffix == ".json"
        write_whole(output_file, json.dumps(report.to_json(), indent=2) + "\n" if is_json else _markdown(report))
    output.result(report.to_json(), lambda: _print(report))


def _check_suffix(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    if path is not None and path.suffix not in suffixes:
        raise InputError(f"{option} {str(path)!r}: expected a file name that ends in {' or '.join(suffixes)}")


def _print(report: BenchReport) -> None:
    rows = [(row.name, row.best, row.median, row.unit, row.remark) for row in report.rows()]
    print_table(_title(report), rows, header=_HEADER)


def _title(report: BenchReport) -> str:
    machine = report.machine
    how = ", ".join(f"{name}: {value}" for name, value in report.runtime.items())
    return f"{report.bundle} on {machine['processor']}, {machine['cores']} cores, load {machine['load'] or '?'}; {how}"


def _markdown(report: BenchReport) -> str:
    lines = [" | ".join(_HEADER), " | ".join("---" for _ in _HEADER)]
    lines += [" | ".join((row.name, row.best, row.median, row.unit, row.remark)) for row in report.rows()]
    return f"{_title(report)}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"
