"""A run of `bench` as a picture: bars on one scale, the mark they are read against as a line. SVG, no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from k25_runtime.bench_report import BenchReport

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 840, 250, 130, 20, 12, 64
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-size:16px;font-weight:600}"
    ".small{font-size:11px;fill:#666}"
    ".ours{fill:#2563a8}.other{fill:#9aa5b1}.middle{stroke:#111;stroke-width:2}.mark{stroke:#b3261e;stroke-width:1.5;"
    "stroke-dasharray:5 3}.paper{fill:#fff}@media(prefers-color-scheme:dark){.paper{fill:#16181c}text{fill:#e6e6e6}"
    ".small{fill:#a0a0a0}.ours{fill:#6ba6e8}.other{fill:#6b7480}.middle{stroke:#fff}.mark{stroke:#ff8a80}}"
)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar from zero to `best`, with a tick at `median`; larger is better."""

    label: str
    best: float
    median: float
    text: str
    is_ours: bool = True


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Bars of one unit. `mark` is a vertical line, such as the bandwidth measured."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None
    mark_label: str = ""


def picture_of_report(report: BenchReport) -> str:
    """Bytes a second of decode, best and median, against the bandwidth of the same run."""
    reached, read = report.decode_bytes_per_s.times(1e-9), report.read_bytes_per_s.times(1e-9)
    share = report.decode_share.best
    bars = (
        Bar(label="reading memory", best=read.best, median=read.median, text=f"{read.best:.1f} GB/s", is_ours=False),
        Bar(label="decode", best=reached.best, median=reached.median, text=f"{reached.best:.1f} GB/s, {share:.0%}"),
    )
    chart = Chart(
        title=f"{report.bundle}: bytes a second, of {report.step.total / 1e6:.1f} MB a step",
        bars=bars,
        mark=read.best,
        mark_label="bandwidth in this run",
    )
    options = report.options
    note = (
        f"{report.machine['processor']}, {report.machine['cores']} cores; {options['rounds']} rounds; "
        f"{report.runtime['native ops']}; {report.runtime['threads']} threads"
    )
    return picture_of_charts([chart], note)


def picture_of_charts(charts: Sequence[Chart], note: str) -> str:
    """The charts, one below the other, as one SVG document. Bars show the best, their ticks the median."""
    parts: list[str] = []
    top = 0
    for chart in charts:
        parts.append(_chart(chart, top))
        top += _height(chart)
    height = top + 30
    parts.append(f"<text class='small' x='16' y='{top + 14}'>bar: best, tick: median. {escape(note)}</text>")
    title = escape("; ".join(chart.title for chart in charts))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}' "
        "role='img'>"
        f"<title>{title}</title><style>{_STYLE}</style><rect class='paper' width='{_WIDTH}' height='{height}'/>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _height(chart: Chart) -> int:
    return _TOP + len(chart.bars) * (_BAR + _GAP) + 16


def _chart(chart: Chart, top: int) -> str:
    largest = (
        max([bar.best for bar in chart.bars] + ([chart.mark] if chart.mark is not None else []), default=1.0) or 1.0
    )
    scale = (_WIDTH - _LEFT - _RIGHT) / largest
    parts = [f"<text class='title' x='16' y='{top + 28}'>{escape(chart.title)}</text>"]
    y = top + _TOP
    for bar in chart.bars:
        middle = y + _BAR - 5
        style = "ours" if bar.is_ours else "other"
        x = _LEFT + bar.median * scale
        parts.append(
            f"<text x='{_LEFT - 10}' y='{middle}' text-anchor='end'>{escape(bar.label)}</text>"
            f"<rect class='{style}' x='{_LEFT}' y='{y}' width='{bar.best * scale:.1f}' height='{_BAR}' rx='2'/>"
            f"<line class='middle' x1='{x:.1f}' x2='{x:.1f}' y1='{y - 2}' y2='{y + _BAR + 2}'/>"
            f"<text x='{_LEFT + bar.best * scale + 8:.1f}' y='{middle}'>{escape(bar.text)}</text>"
        )
        y += _BAR + _GAP
    if chart.mark is not None:
        x = _LEFT + chart.mark * scale
        parts.append(
            f"<line class='mark' x1='{x:.1f}' x2='{x:.1f}' y1='{top + _TOP - 10}' y2='{y}'/>"
            f"<text class='small' x='{x:.1f}' y='{top + _TOP - 14}' text-anchor='middle'>"
            f"{escape(chart.mark_label)}</text>"
        )
    return "\n".join(parts)
