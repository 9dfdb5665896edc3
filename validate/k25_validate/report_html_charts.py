"""Pictures of the parity report, drawn as SVG: error by component, tokens by expert.

Series differ by shape as well as by colour, and the tables beside the pictures hold the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from k25_validate.report_html_parts import number, text
from k25_validate.report_rows import ComponentRow, ExpertLoad

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 1000.0, 340.0, 62.0, 14.0, 44.0
_Marker = Callable[[float, float], str]


def _circle(x: float, y: float) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='var(--good)'>"


def _square(x: float, y: float) -> str:
    corner = f"x='{x - 4:.1f}' y='{y - 4:.1f}'"
    return f"<rect {corner} width='8' height='8' fill='var(--paper)' stroke='var(--own)' stroke-width='2'>"


def _cross(x: float, y: float) -> str:
    lines = f"M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"
    return f"<path d='{lines}' stroke='var(--bad)' stroke-width='3.5' fill='none'>"


def _triangle(x: float, y: float) -> str:
    return f"<path d='M{x - 4.5:.1f} {y + 4:.1f}h9l-4.5 -8z' fill='var(--noise)'>"


_SERIES: tuple[tuple[str, str, _Marker, str], ...] = (
    ("local: fed with the reference's input", "--good", _circle, "</circle>"),
    ("accumulated: the bundle's own chain", "--own", _square, "</rect>"),
    ("noise: the reference against itself in float64", "--noise", _triangle, "</path>"),
)


def legend() -> str:
    """What the marks of the error picture mean."""
    items = [
        f"<li><svg viewBox='0 0 30 14' aria-hidden='true'><line x1='0' x2='30' y1='7' y2='7' stroke='var({colour})' "
        f"stroke-width='1.5'/>{draw(15, 7)}{end}</svg>{text(name)}</li>"
        for name, colour, draw, end in _SERIES
    ]
    items.append(
        "<li><svg viewBox='0 0 30 14' aria-hidden='true'><line x1='0' x2='30' y1='7' y2='7' stroke='var(--limit)' "
        "stroke-width='2.5' stroke-dasharray='6 3'/></svg>tolerance of the local error</li>"
    )
    items.append(
        f"<li><svg viewBox='0 0 30 14' aria-hidden='true'>{_cross(15, 7)}</path></svg>above its tolerance</li>"
    )
    return f"<ul class='legend'>{''.join(items)}</ul>"


class _Axes:
    """A logarithmic axis of errors over component instances in the order of the data. Zeros stand at the bottom."""

    def __init__(self, rows: Sequence[ComponentRow]) -> None:
        values = [
            value for row in rows for value in (row.local, row.accumulated, row.tolerance.value, row.noise or 0.0)
        ]
        finite = [value for value in values if math.isfinite(value) and value > 0] or [1e-7, 1.0]
        self.low = math.floor(math.log10(min(finite)))
        self.high = max(math.ceil(math.log10(max(finite))), self.low + 1)
        self._columns = max(len(rows), 1)

    def x(self, index: int, offset: float = 0.0) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * (index + 0.5 + offset) / self._columns

    def y(self, value: float) -> float:
        top = not math.isfinite(value)
        exponent = self.high if top else math.log10(max(value, 10.0**self.low))
        return _TOP + (_HEIGHT - _BOTTOM - _TOP) * (self.high - exponent) / (self.high - self.low)


def error_chart(rows: Sequence[ComponentRow]) -> str:
    """Relative L2 by component on a logarithmic axis: local, accumulated, noise floor and tolerance."""
    axes = _Axes(rows)
    parts = [_grid(axes)]
    for index, row in enumerate(rows):
        if row.tolerance.value > 0:
            y = axes.y(row.tolerance.value)
            parts.append(
                f"<line x1='{axes.x(index, -0.5):.1f}' x2='{axes.x(index, 0.5):.1f}' y1='{y:.1f}' y2='{y:.1f}' "
                "stroke='var(--limit)' stroke-width='2.5' stroke-dasharray='6 3'/>"
            )
    columns = ("local", "accumulated", "noise")
    for (name, colour, draw, end), column in reversed(list(zip(_SERIES, columns, strict=True))):
        found = [(index, getattr(row, column)) for index, row in enumerate(rows)]
        shown = [(index, value) for index, value in found if value is not None]
        points = " ".join(f"{axes.x(index):.1f},{axes.y(value):.1f}" for index, value in shown)
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='var({colour})' stroke-width='1.5' opacity='0.6'/>"
        )
        for index, value in shown:
            is_off = column == "local" and not rows[index].tolerance.accepts(value)
            mark = f"{_cross(axes.x(index), axes.y(value))}" if is_off else draw(axes.x(index), axes.y(value))
            title = f"{rows[index].label}, {name.partition(':')[0]}: {number(value)}"
            parts.append(f"{mark}<title>{text(title)}</title>{'</path>' if is_off else end}")
    parts.append(_labels(axes, rows))
    worst = max(rows, key=lambda row: row.tolerance.used(row.local)).label if rows else ""
    return (
        f"<div class='scroll wide' role='region' tabindex='0' aria-label='Error by component, picture'>"
        f"<svg viewBox='0 0 {_WIDTH:.0f} {_HEIGHT:.0f}' role='img' aria-label='Relative L2 error of {len(rows)} "
        f"component "
        f"instances, logarithmic; closest to its tolerance: {text(worst)}. The table below has the figures.'>"
        f"{''.join(parts)}</svg></div>"
    )


def _grid(axes: _Axes) -> str:
    parts = []
    step = max(1, (axes.high - axes.low) // 8)
    for exponent in range(axes.low, axes.high + 1, step):
        y = axes.y(10.0**exponent)
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>1e{exponent}</text>")
    return "".join(parts)


def _labels(axes: _Axes, rows: Sequence[ComponentRow]) -> str:
    """Layers by number; the other components by name, on a line of their own where there are many."""
    is_crowded = len(rows) > _CROWDED
    step = max(1, math.ceil(len(rows) / 24))
    parts = [
        _label(axes.x(index), _HEIGHT - 24, row.component if row.layer is None else str(row.layer))
        for index, row in enumerate(rows)
        if (row.layer is None and not is_crowded) or (row.layer is not None and index % step == 0)
    ]
    if is_crowded:
        names = [row.component for row in rows if row.layer is None]
        parts.append(_label(_LEFT, _HEIGHT - 4, ", ".join(names[:-1]), anchor="start"))
        parts.append(_label(_WIDTH, _HEIGHT - 4, names[-1], anchor="end") if names else "")
    parts.append(_label((_LEFT + _WIDTH) / 2, _HEIGHT - 4, "layer"))
    return "".join(parts)


def _label(x: float, y: float, label: str, *, anchor: str = "middle") -> str:
    return f"<text x='{x:.1f}' y='{y:.0f}' text-anchor='{anchor}'>{text(label)}</text>"


_CROWDED = 16
_LEVELS = (0.12, 0.3, 0.5, 0.75, 1.0)
_CELLS_WIDTH = 920.0


def load_chart(loads: Sequence[ExpertLoad]) -> str:
    """A row a layer, a column an expert: the darker, the more of the layer's tokens; framed where the reference's
    router chose otherwise."""
    experts = max(len(load.bundle) for load in loads)
    width = _CELLS_WIDTH / experts
    height = max(9.0, min(22.0, 330.0 / len(loads)))
    levels = ["" for _ in _LEVELS]
    differs = ""
    for row, load in enumerate(loads):
        most = max(max(load.bundle), 1)
        for expert, tokens in enumerate(load.bundle):
            x, y = 70 + expert * width, row * height
            box = f"M{x:.1f} {y:.1f}h{width:.2f}v{height - 1:.1f}h-{width:.2f}z"
            if tokens:
                levels[math.ceil(tokens / most * len(_LEVELS)) - 1] += box
            if tokens != load.reference[expert]:
                differs += box
    cells = [
        f"<path d='{path}' fill='var(--own)' fill-opacity='{level}'/>"
        for path, level in zip(levels, _LEVELS, strict=True)
        if path
    ]
    frame = f"<path d='{differs}' fill='none' stroke='var(--bad)' stroke-width='2'/>" if differs else ""
    step = max(1, math.ceil(14 / height))
    labels = [
        f"<text x='62' y='{(row + 0.5) * height + 4:.1f}' text-anchor='end'>layer {load.layer}</text>"
        for row, load in enumerate(loads)
        if row % step == 0
    ]
    bottom = len(loads) * height
    ends = (
        f"<text x='70' y='{bottom + 15:.0f}'>expert 0</text>"
        f"<text x='{70 + _CELLS_WIDTH:.0f}' y='{bottom + 15:.0f}' text-anchor='end'>expert {experts - 1}</text>"
    )
    return (
        "<div class='scroll wide' role='region' tabindex='0' aria-label='Tokens by expert, picture'>"
        f"<svg viewBox='0 0 1000 {bottom + 22:.0f}' role='img' aria-label='Tokens that each of {experts} experts "
        f"got in "
        f"{len(loads)} layers. The table below has the "
        f"figures.'>{''.join(cells)}{frame}{''.join(labels)}{ends}</svg></div>"
    )
