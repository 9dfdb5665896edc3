"""What a verb prints: a result on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from k25_cli.interrupts import raise_if_interrupted

Progress = Callable[[str, int, int], None]


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json` and `--quiet`."""
    function = click.option(
        "--quiet", "-q", is_flag=True, help="No progress and no remarks: the result and errors only."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, nothing else.")(
        function
    )


class Output:
    """Where a verb writes. With `--json`, standard output gets one JSON object and nothing else."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def result(self, values: dict[str, Any], text: Callable[[], None]) -> None:
        """Print the result: the values as JSON, or whatever `text` prints."""
        raise_if_interrupted()
        if self.as_json:
            click.echo(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=True))
        else:
            text()

    def note(self, message: str) -> None:
        """A remark on standard error."""
        if not self.quiet:
            click.echo(message, err=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress bar on a terminal, plain lines elsewhere, nothing with `--quiet`."""
        if self.quiet:
            yield lambda what, done, total: raise_if_interrupted()
        elif sys.stderr.isatty():
            with _bar() as report:
                yield report
        else:
            yield _plain_lines()


def _plain_lines() -> Progress:
    last: tuple[str, int] = ("", 0)

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        raise_if_interrupted()
        step = (what, 10 * done // max(total, 1))
        if step != last:  # a line for each thing, and for each tenth of a long one
            click.echo(f"{what} ({done}/{total})" if total > 1 else what, err=True)
            last = step

    return report


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            raise_if_interrupted()
            bar.update(task, description=what, completed=done, total=total)

        yield report


def print_table(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> None:
    """A table on standard output; numbers are right-aligned where a header is given."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=header is not None, box=None, pad_edge=False)
    for index, name in enumerate(header or rows[0]):
        is_number = header is not None and index > 0
        table.add_column(name if header else "", justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table, markup=False)


def human_bytes(count: int) -> str:
    """Bytes in decimal units, as disks are sold: 595.15 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def human_count(count: int) -> str:
    """Parameters: 1.03 T, 31.69 B, 486.3 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
