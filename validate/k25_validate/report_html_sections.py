"""The sections of the page about what was measured: one function a section, each a heading's worth of HTML or
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from k25_validate.parity_report import Check, ParityReport
from k25_validate.report_html_charts import error_chart, legend, load_chart
from k25_validate.report_html_parts import (
    Cell,
    code,
    count,
    figure,
    folded,
    header,
    integer,
    long,
    mark,
    number,
    quoted,
    share,
    table,
    text,
    usage,
    word,
)
from k25_validate.report_rows import ComponentRow, ExpertLoad, PromptRow, WorstPosition


def check_table(report: ParityReport, checks: Sequence[Check], *, label: str) -> str:
    """Checks with their tolerances and the place of the worst value."""
    rows = [
        (
            mark(check.passed, counts=report.counts(check)),
            header(f"{check.section}: {check.name}"),
            word(check.metric),
            figure(check.value),
            Cell(f"{'≤' if check.tolerance.bound == 'at most' else '≥'} {number(check.tolerance.value)}", "number"),
            long(check.detail),
        )
        for check in checks
    ]
    return table(("result", "what", "metric", "value", "tolerance", "where"), rows, label=label)


def components(report: ParityReport) -> str:
    """Error by layer and component."""
    if not report.rows:
        return "<p>Nothing was measured.</p>"
    return (
        "<p>Relative L2 to the reference. <em>Local</em>: the component is fed with the reference's own input at "
        "that point, "
        "so an error is its own. <em>Accumulated</em>: the bundle runs by itself; this is what a user gets.</p>"
        f"{legend()}{error_chart(report.rows)}{_component_table(report.rows)}"
    )


def _component_table(rows: Sequence[ComponentRow]) -> str:
    columns = (
        "component",
        "local",
        "tolerance",
        "used",
        "accumulated",
        "noise",
        "systematic gain",
        "max abs",
        "1 - cosine",
    )
    cells = [
        (
            header(row.label),
            figure(row.local),
            figure(row.tolerance.value),
            Cell(_used(row), "number"),
            figure(row.accumulated),
            figure(row.noise),
            figure(row.gain if row.tokens else None),
            figure(row.max_abs),
            figure(1 - row.cosine),
            long(row.worst),
        )
        for row in rows
    ]
    return folded(table((*columns, "worst coordinate"), cells, label="Error by component"), len(cells))


def _used(row: ComponentRow) -> str:
    used = row.tolerance.used(row.local)
    style = "" if row.tolerance.accepts(row.local) else " class='bad'"
    return f"<span{style}>{usage(used)}</span>"


def routing(report: ParityReport) -> str:
    """Router agreement and expert load."""
    if not report.experts:
        return "<p>No layer of this model has a router.</p>"
    by_layer = {row.layer: row for row in report.rows if row.router_differs is not None}
    cells = []
    for load in report.experts:
        row = by_layer.get(load.layer)
        tokens = sum(load.reference)
        cells.append(
            (
                header(f"layer {load.layer}"),
                integer(row.router_differs if row else None),
                integer(row.router_ties if row else None),
                figure(row.router_weights_max_abs if row else None),
                integer(tokens),
                integer(sum(abs(a - b) for a, b in zip(load.bundle, load.reference, strict=True)) // 2),
                Cell(f"{load.imbalance:.2f}", "number"),
                Cell(f"{_imbalance(load.reference):.2f}", "number"),
                integer(sum(count == 0 for count in load.bundle)),
            )
        )
    columns = (
        *("layer", "tokens routed differently", "ties", "weights, max abs", "choices", "choices elsewhere"),
        *("imbalance", "imbalance of the reference", "idle experts"),
    )
    return (
        "<p>Both routers were given the same input. A <em>tie</em> is a choice that rounding decides. "
        "<em>Imbalance</em> is the "
        "load of the busiest expert over the mean: 1 is even. These are the prompts of this report, not of your "
        "traffic.</p>"
        f"{load_chart(report.experts)}{folded(table(columns, cells, label='Routing by layer'), len(cells))}"
    )


def _imbalance(load: tuple[int, ...]) -> float:
    return ExpertLoad(layer=0, reference=load, bundle=load).imbalance


def logits(report: ParityReport) -> str:
    """KL divergence, agreement, ranks, and the worst positions with their tokens."""
    summary = report.logits
    if summary is None:
        return "<p>Every token is behind a router tie: there is nothing to compare.</p>"
    facts = [
        ("rows compared", f"{summary.rows:,}"),
        ("relative L2", number(summary.relative_l2)),
        ("KL divergence, mean", f"{number(summary.kl_mean)} nats"),
        ("KL divergence, largest", f"{number(summary.kl_max)} nats"),
        ("first choice agrees", share(summary.top1_agreement)),
        ("first five agree", share(summary.top5_agreement)),
        ("first five in another order", count(summary.top5_reordered, "row")),
        ("lowest rank of a first choice", f"{summary.worst_rank + 1}"),
    ]
    cells = [(header(name), Cell(text(value), "number")) for name, value in facts]
    return (
        table(("measure", "value"), cells, label="Logits", stacks=False)
        + "<h3>Worst positions</h3><p>Where the two distributions of the next token are furthest apart. The last "
        "token of "
        "the context is the one whose logits these are; rank 1 means that both have the same first choice.</p>"
        + _positions(summary.worst)
    )


def _positions(worst: Sequence[WorstPosition]) -> str:
    cells = [
        (
            header(item.prompt),
            integer(item.position),
            Cell(f"<span class='soft'>{quoted(item.before)}</span><strong>{quoted(item.token)}</strong>", "long"),
            figure(item.kl),
            Cell(f"{quoted(item.reference_choice)} {share(item.reference_probability)}"),
            Cell(f"{quoted(item.bundle_choice)} {share(item.bundle_probability)}"),
            integer(item.rank + 1),
        )
        for item in worst
    ]
    columns = ("prompt", "position", "context", "KL, nats", "reference would say", "bundle would say", "rank")
    return table(columns, cells, label="Worst positions")


def passages(report: ParityReport) -> str:
    """Perplexity of both on the same text."""
    if not report.passages:
        return "<p>Not measured: see what was not checked.</p>"
    cells = [
        (
            header(row.name),
            integer(row.tokens),
            Cell(f"{row.reference_perplexity:.6g}", "number"),
            Cell(f"{row.bundle_perplexity:.6g}", "number"),
            figure(abs(row.bundle_nll - row.reference_nll)),
        )
        for row in report.passages
    ]
    columns = ("text", "tokens", "perplexity, reference", "perplexity, bundle", "difference, nats a token")
    return "<p>e to the mean negative log-likelihood of the text's tokens.</p>" + table(
        columns, cells, label="Perplexity"
    )


def ways(report: ParityReport) -> str:
    """The same tokens run in every way."""
    cells = [(header(row.name), Cell(_tokens(row), "number"), *_way_cells(row)) for row in report.prompts]
    columns = (
        *("prompt", "tokens", "prefill to reference", "decode to reference", "decode to prefill"),
        *("in a batch to alone", "cached to cold"),
    )
    return (
        "<p>Relative L2 of the logits. Prefill: all tokens at once; decode: the last ones one by one; batch: all "
        "prompts in "
        "one step; cached: the second half over a cache that holds the first.</p>"
        + table(columns, cells, label="Ways of running each prompt")
    )


def _tokens(row: PromptRow) -> str:
    return f"{row.prompt_tokens}" + (f" + {row.decoded_tokens}" if row.decoded_tokens else "")


def _way_cells(row: PromptRow) -> tuple[Cell, ...]:
    errors = (row.prefill, row.decode, row.decode_to_prefill, row.batch_to_alone, row.cached_to_cold)
    return tuple(figure(error) for error in errors)


def far(report: ParityReport) -> str:
    """Layers at far positions."""
    if not report.far:
        return "<p>The model has no far positions.</p>"
    cells = [
        (
            mark(row.tolerance.accepts(row.relative_l2) and not row.router_differs),
            header(f"{row.component} {row.layer}"),
            integer(row.position),
            integer(row.tokens),
            figure(row.relative_l2),
            figure(row.tolerance.value),
            long(row.worst),
        )
        for row in report.far
    ]
    columns = ("result", "component", "first position", "tokens", "relative L2", "tolerance", "worst coordinate")
    return (
        "<p>The first layer of each kind, with a cache that starts at an offset: sixteen tokens at positions 0 to "
        "15, then the "
        "far ones, judged by the plain reference. The gap between them holds rows that no head looks at.</p>"
        + table(columns, cells, label="Far positions")
    )


def media(report: ParityReport) -> str:
    """Pictures through the vision tower and the projector."""
    if not report.media:
        return "<p>No picture was run.</p>"
    cells = [
        (
            Cell(f"<img alt='{text(row.name)}' src='{text(row.picture)}'>"),
            header(row.name),
            Cell(" &times; ".join(map(str, row.grid)), "number"),
            integer(row.tokens),
            figure(row.relative_l2),
            figure(row.tolerance.value),
            figure(row.max_abs),
            long(row.worst),
        )
        for row in report.media
    ]
    columns = ("picture", "what", "patches: frames, rows, columns", "tokens", "relative L2", "tolerance", "max abs")
    return "<p>Drawn pictures through the vision tower and the projector, frames of one item side by side.</p>" + table(
        (*columns, "worst coordinate"), cells, label="Pictures"
    )


def tasks(report: ParityReport) -> str:
    """Right answers of every backend."""
    cells = [
        (
            header(row.task),
            word(row.backend),
            Cell(f"{row.right} of {row.total}", "number"),
            Cell(share(row.share), "number"),
            Cell(quoted(row.first_wrong) if row.first_wrong else "", "long"),
        )
        for row in report.tasks
    ]
    return "<p>Problems that this checkpoint was taught to solve, greedy answers.</p>" + table(
        ("task", "backend", "right", "share", "first wrong answer"), cells, label="Task accuracy"
    )


def tolerances(report: ParityReport) -> str:
    """Every tolerance with its reason, and how much of it was used."""
    groups: dict[tuple[str, bool, float | None], list[Check]] = {}
    for check in report.checks:
        name, is_baseline = check.tolerance.name or check.metric, check.section == "baseline"
        groups.setdefault((name, is_baseline, check.tolerance.default), []).append(check)
    noise = {row.label: row.noise for row in report.rows}
    cells = []
    for (name, *_), checks in groups.items():
        closest = max(checks, key=lambda check: check.tolerance.used(check.value))
        tolerance = closest.tolerance
        floor = noise.get(closest.name) if closest.metric == "relative L2" else None
        cells.append(
            (
                header(name),
                figure(tolerance.value),
                figure(tolerance.default),
                Cell(usage(tolerance.used(closest.value)) if tolerance.value else number(closest.value), "number"),
                figure(floor),
                Cell(f"{tolerance.value / floor:.3g} &times;" if floor and tolerance.value else "", "number"),
                integer(len(checks)),
                long(tolerance.reason),
            )
        )
    columns = (
        "tolerance",
        "value",
        "default, where overridden",
        "most used",
        "noise floor",
        "margin over noise",
        "checks",
    )
    return (
        "<p>A value is the bound of the check that is closest to it. The <em>noise floor</em> is what the float32 "
        "reference is "
        "off from itself in float64 on the same input; no two float32 computations can be expected to agree better. "
        "u = 2<sup>&minus;24</sup> is the unit roundoff of float32.</p>"
        + table((*columns, "why"), cells, label="Tolerances")
    )


def baseline(report: ParityReport) -> str:
    """What is different from an older report."""
    summary = report.baseline
    assert summary is not None
    changed = "".join(f"<li>{code(fact)}</li>" for fact in summary.changed_facts)
    shown = [item for item in summary.differences if item.kind != "as before"]
    cells = [
        (
            Cell(f"<span class='{'bad' if item.kind in _WORSE else 'soft'}'>{text(item.kind)}</span>"),
            header(f"{item.section}: {item.name}"),
            word(item.metric),
            figure(item.before),
            figure(item.now),
            Cell("" if item.ratio is None else f"{number(item.ratio)} &times;", "number"),
        )
        for item in shown
    ]
    same = len(summary.differences) - len(shown)
    columns = ("change", "what", "metric", "before", "now", "growth")
    return (
        f"<p>The older report {'passed' if summary.passed else 'failed'} ({code(summary.key[:12] or 'no key')}). "
        f"Growth is "
        "counted from the older value, or from a tenth of the tolerance where that is more.</p>"
        + (f"<h3>Compared under other conditions</h3><ul>{changed}</ul>" if changed else "")
        + (table(columns, cells, label="Changed checks") if cells else "")
        + f"<p class='soft'>{count(same, 'figure')} as before.</p>"
    )


_WORSE = ("now fails", "grew", "fell", "no longer checked")
