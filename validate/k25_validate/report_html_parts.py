"""The pieces that the page is made of: escaped text, numbers, tables."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from k25_validate.report_text import visible

_LONG_TABLE = 16


@dataclass(frozen=True)
class Cell:
    """A table's cell: `markup` is HTML already, `kind` a class of the style."""

    markup: str
    kind: str = ""
    is_header: bool = False


def text(value: object) -> str:
    """Anything as escaped text."""
    return html.escape(visible(str(value)))


def sentence(value: object) -> str:
    """Text whose numbers are not broken across lines."""
    return re.sub(r"[0-9.]+e[-+][0-9]+", lambda found: f"<span class='whole'>{found.group()}</span>", text(value))


def quoted(value: str) -> str:
    """Text of a model or a user, in its own direction."""
    return f"<bdi class='mono'>{text(value)}</bdi>"


def code(value: object) -> str:
    """Text in fixed width."""
    return f"<code>{text(value)}</code>"


def number(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "not a number")
    return f"{value:.3g}"


def share(value: float) -> str:
    """A share in percent; never rounded up to all of it."""
    if not math.isfinite(value):
        return number(value)
    if 0.999 < value < 1:
        return f"{math.floor(value * 1e5) / 1e3:.3f} %"
    return f"{value * 100:.4g} %"


def usage(value: float) -> str:
    """How much of a tolerance is used: a share, or how many times over."""
    return share(value) if not value >= 10 or value > 1e9 else f"{value:,.0f} ×"  # noqa: RUF001  a sign, no letter


def count(amount: int, noun: str) -> str:
    """`1 check`, `2 checks`."""
    return f"{amount} {noun}{'' if amount == 1 else 's'}"


def word(value: object) -> Cell:
    """A cell of text."""
    return Cell(text(value))


def long(value: object) -> Cell:
    """A cell of text that may wrap."""
    return Cell(text(value), "long")


def figure(value: float | None) -> Cell:
    """A cell with a number."""
    return Cell(number(value), "number")


def integer(value: int | None) -> Cell:
    """A cell with a count."""
    return Cell("" if value is None else f"{value:,}", "number")


def header(value: object) -> Cell:
    """The cell that names its row."""
    return Cell(text(value), is_header=True)


def mark(is_good: bool, *, counts: bool = True) -> Cell:
    """Passed or failed, in words and colour."""
    if is_good:
        return Cell("<span class='good whole'>✓ passed</span>")
    if not counts:
        return Cell("<span class='warn'>✗ failed, does not count</span>")
    return Cell("<span class='bad whole'>✗ FAILED</span>")


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, label: str, stacks: bool = True) -> str:
    """A table that scrolls sideways, by keyboard as well; on a phone its rows become blocks if it `stacks`."""
    lines = list(rows)
    kinds = [cell.kind if cell.kind == "number" else "" for cell in lines[0]] if lines else [""] * len(columns)
    head = "".join(
        f"<th scope='col' role='columnheader'{_class(kind)}>{text(column)}</th>"
        for column, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(f"<tr role='row'>{_cells(columns, row)}</tr>\n" for row in lines)
    name = "stack" if stacks else "flat"
    return (
        f"<div class='scroll' role='region' tabindex='0' aria-label='{text(label)}'><table class='{name}' role='table'>"
        f"<thead role='rowgroup'><tr role='row'>{head}</tr></thead><tbody "
        f"role='rowgroup'>\n{body}</tbody></table></div>"
    )


def folded(markup: str, rows: int) -> str:
    """A table, folded away where it is long."""
    if rows <= _LONG_TABLE:
        return markup
    return f"<details><summary>All {rows} rows</summary>{markup}</details>"


def _cells(columns: Sequence[str], row: Sequence[Cell]) -> str:
    parts = []
    for column, cell in zip(columns, row, strict=True):
        if cell.is_header:
            parts.append(f"<th scope='row' role='rowheader'{_class(cell.kind)}>{cell.markup}</th>")
        else:
            label = f" data-label='{text(column)}'"
            parts.append(f"<td role='cell'{_class(cell.kind)}{label}>{cell.markup}</td>")
    return "".join(parts)


def _class(kind: str) -> str:
    return f" class='{kind}'" if kind else ""


def section(identity: str, title: str, body: str) -> str:
    """A section with a heading that the contents link to."""
    heading = f"<h2 id='{identity}-title'>{text(title)}</h2>"
    return f"<section id='{identity}' aria-labelledby='{identity}-title'>{heading}\n{body}\n</section>"
