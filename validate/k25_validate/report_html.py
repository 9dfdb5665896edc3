"""The parity report as one self-contained HTML page: verdict first, no network, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from k25_validate.parity_report import Check, ComponentRow, ParityReport

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent);
  --good: light-dark(#17692f, #6fd08c); --bad: light-dark(#b3261e, #ff9d94); --own: light-dark(#0b57a4, #8ab8ff);
  --limit: light-dark(#7a5b00, #e8c35a); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { font-size: 1.25rem; font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
td:last-child { min-width: 14rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
svg { width: 100%; min-width: 38rem; height: auto; } svg text { fill: currentColor; font-size: 12px; }
@media print { body { max-width: none; } }
"""


def html_from_report(report: ParityReport) -> str:
    """The page as text."""
    word, style = ("passed", "good") if report.passed else ("FAILED", "bad")
    good = len(report.checks) - len(report.failures)
    sections = [
        f"<h1>Parity report</h1><p class='verdict {style}'>Parity {word}: {good} of {len(report.checks)} checks</p>",
        f"<p>ONNX components against the {_text(report.reference['name'])} PyTorch reference, in float32.</p>",
    ]
    if report.failures:
        sections.append(f"<h2>Failed</h2>{_check_table(report.failures)}")
    sections += [
        f"<h2>Error by component</h2>{_chart(report.rows)}{_component_table(report.rows)}",
        f"<h2>All checks</h2>{_check_table(report.checks)}",
        f"<h2>What was compared with what</h2>{_facts(report)}",
        f"<h2>Not checked</h2><ul>{''.join(f'<li>{_text(item)}</li>' for item in report.not_checked)}</ul>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Parity {word}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th scope='col'>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: object, kind: str = "") -> str:
    return f"<td class='{kind}'>{_text(value)}</td>" if kind else f"<td>{_text(value)}</td>"


def _check_table(checks: Iterable[Check]) -> str:
    rows = [
        (
            _cell("passed" if check.passed else "FAILED", "good" if check.passed else "bad"),
            _cell(f"{check.section}: {check.name}"),
            _cell(check.metric),
            _cell(_number(check.value), "number"),
            _cell(f"{check.tolerance.bound} {_number(check.tolerance.value)}", "number"),
            _cell(check.tolerance.reason),
            _cell(check.detail),
        )
        for check in checks
    ]
    return _table(("", "what", "metric", "value", "tolerance", "why this tolerance", "where"), rows)


def _label(row: ComponentRow) -> str:
    return row.component if row.layer is None else f"{row.component} {row.layer}"


def _component_table(rows: Iterable[ComponentRow]) -> str:
    header = (
        "component",
        "local, relative L2",
        "tolerance",
        "accumulated",
        "max abs",
        "1 - cosine",
        "tokens routed differently",
        "router ties",
        "worst coordinate",
    )
    cells = [
        (
            _cell(_label(row)),
            *(
                _cell(_number(value), "number")
                for value in (row.local, row.tolerance.value, row.accumulated, row.max_abs, 1 - row.cosine)
            ),
            _cell("" if row.router_differs is None else row.router_differs, "number"),
            _cell("" if row.router_ties is None else row.router_ties, "number"),
            _cell(row.worst),
        )
        for row in rows
    ]
    return _table(header, cells)


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900.0, 260.0, 60.0, 30.0


def _chart(rows: tuple[ComponentRow, ...]) -> str:
    """Relative L2 by component on a logarithmic axis: local, accumulated, tolerance."""
    series = (("local", "--good"), ("accumulated", "--own"), ("tolerance", "--limit"))
    points_of = {
        "local": [row.local for row in rows],
        "accumulated": [row.accumulated for row in rows],
        "tolerance": [row.tolerance.value for row in rows],
    }
    values = [value for points in points_of.values() for value in points]
    finite = [value for value in values if math.isfinite(value) and value > 0] or [1e-7, 1.0]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    high = max(high, low + 1)

    def x(index: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * (index + 0.5) / len(rows)

    def y(value: float) -> float:
        exponent = high if not math.isfinite(value) else math.log10(max(value, 10.0**low))
        return 10 + (_HEIGHT - _BOTTOM - 10) * (high - exponent) / (high - low)

    parts = []
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{at:.1f}' y2='{at:.1f}' stroke='var(--line)'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{at + 4:.1f}' text-anchor='end'>1e{exponent}</text>")
    for name, colour in series:
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(points_of[name]))
        parts.append(f"<polyline points='{points}' fill='none' stroke='var({colour})' stroke-width='2'/>")
        if name != "tolerance":
            parts += [
                f"<circle cx='{x(index):.1f}' cy='{y(value):.1f}' r='3' fill='var({colour})'>"
                f"<title>{_text(_label(rows[index]))}, {name}: {_number(value)}</title></circle>"
                for index, value in enumerate(points_of[name])
            ]
    step = max(1, len(rows) // 12)
    for index, row in enumerate(rows):
        if index % step == 0:
            label = row.component if row.layer is None else str(row.layer)
            parts.append(f"<text x='{x(index):.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>{_text(label)}</text>")
    legend = " &nbsp; ".join(f"<span style='color:var({colour})'>&#9632; {name}</span>" for name, colour in series)
    picture = "".join(parts)
    box = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}"
    return (
        f"<p>Relative L2 to the reference, by component. {legend}</p><div class='scroll'>"
        f"<svg viewBox='{box}' role='img' aria-label='Error by component, logarithmic'>{picture}</svg></div>"
        "<p><em>Local</em>: the component is fed with the reference's input at that point. <em>Accumulated</em>: the "
        "runtime's own chain.</p>"
    )


def _facts(report: ParityReport) -> str:
    groups = {
        "bundle": report.subject,
        "reference": report.reference,
        "runtime": report.runtime,
        "machine": report.machine,
    }
    rows = [
        (_cell(f"{group}: {key}"), f"<td><code>{_text(value)}</code></td>")
        for group, facts in groups.items()
        for key, value in facts.items()
    ]
    rows += [
        (
            _cell(f"prompt: {prompt['name']}"),
            _cell(f"{prompt['prompt_tokens']} tokens, then {prompt['decoded_tokens']} decoded"),
        )
        for prompt in report.prompts
    ]
    return _table(("what", "value"), rows)
