"""The parity report as one self-contained HTML page: verdict first, no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from k25_validate import report_html_sections as sections
from k25_validate.parity_report import ParityReport
from k25_validate.report_html_parts import Cell, count, header, number, section, sentence, share, table, text
from k25_validate.report_html_style import STYLE

#: Styles of the page itself and pictures inside it, nothing else: no script runs, nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def html_from_report(report: ParityReport) -> str:
    """The page as text."""
    word = "passed" if report.passed else "FAILED"
    bodies = [(identity, title, make(report)) for identity, title, make in _shown_sections(report)]
    contents = "".join(f"<li><a href='#{identity}'>{text(title)}</a></li>" for identity, title, _ in bodies)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Parity {word}: "
        f"{text(report.subject.get('bundle', 'bundle'))}</title><style>{STYLE}</style></head><body>\n"
        "<a class='skip' href='#main'>Skip to the verdict</a><main id='main'>\n"
        f"{_verdict(report)}\n{_cards(report)}\n"
        f"<nav aria-label='Contents'><ul>{contents}</ul></nav>\n"
        + "\n".join(section(identity, title, body) for identity, title, body in bodies)
        + f"\n</main><footer>k25-export {text(report.runtime.get('k25-export', ''))}, {report.seconds:.1f} s, result "
        f"<code>{text(report.key[:16])}</code></footer>\n</body></html>\n"
    )


_Section = tuple[str, str, Callable[[ParityReport], str]]


def _shown_sections(report: ParityReport) -> list[_Section]:
    """Every section, in the order of a reader's questions; failures and a baseline where there are any."""
    shown: list[_Section] = []
    if report.failures:
        shown.append(("failed", "Failed checks", _failed))
    if report.baseline is not None:
        shown.append(("baseline", "Compared with an older report", sections.baseline))
    shown += [
        ("components", "Error by layer and component", sections.components),
        ("routing", "Router agreement and expert load", sections.routing),
        ("logits", "Logits", sections.logits),
        ("text", "Perplexity of a text", sections.passages),
        ("ways", "Prefill, decode, batch, cache", sections.ways),
        ("far", "Far positions", sections.far),
        ("vision", "Pictures", sections.media),
    ]
    if report.tasks:
        shown.append(("tasks", "Task accuracy", sections.tasks))
    return [
        *shown,
        ("tolerances", "Tolerances and their reasons", sections.tolerances),
        ("not-checked", "What was not checked", _not_checked),
        ("compared", "What was compared with what", _facts),
        ("checks", "All checks", _all_checks),
    ]


def _verdict(report: ParityReport) -> str:
    style, badge = ("good", "✓ PARITY PASSED") if report.passed else ("bad", "✗ PARITY FAILED")
    parts = [
        "<h1>Parity report</h1>",
        f"<div class='verdict {style}'><span "
        f"class='badge'><strong>{badge}</strong></span><p>{sentence(report.verdict())}</p></div>",
    ]
    if report.failures:
        parts.append(
            "<p>To find the first op that diverges, the tensor and the shard behind it, run beside the bundle:</p>"
            f"<pre tabindex='0'>{text(report.bisect_line)}</pre>"
        )
    for override in report.overrides:
        default = "" if override.default is None else f", by default {number(override.default)}"
        what = "LOOSENED" if override.is_loosened else "Set from outside"
        parts.append(
            f"<div class='notice'><strong>{what}:</strong> tolerance {text(override.name)} = "
            f"{number(override.value)}{default}."
            "</div>"
        )
    if report.fail_on != ("any",):
        parts.append(
            f"<div class='notice'><strong>Partial verdict:</strong> only failures of "
            f"{text(', '.join(report.fail_on))} count "
            f"(--fail-on); {count(len(report.failures) - len(report.blocking), 'other failure')}.</div>"
        )
    return "\n".join(parts)


def _cards(report: ParityReport) -> str:
    """The figures that most readers came for."""
    found: list[tuple[str, str]] = [
        (f"{len(report.checks) - len(report.failures)} of {len(report.checks)}", "checks passed")
    ]
    shown = {("end to end", "relative L2"): "logits, relative L2", ("decode", "relative L2"): "logits when decoding"}
    found += [
        (number(check.value), f"{shown[check.section, check.metric]}; {number(check.tolerance.value)} allowed")
        for check in report.checks
        if (check.section, check.metric) in shown
    ]
    if report.logits is not None:
        found.append((share(report.logits.top1_agreement), "first choices agree"))
        found.append((number(report.logits.kl_max), "largest KL divergence, nats"))
    for passage in report.passages[:1]:
        both = f"{passage.reference_perplexity:.4g} → {passage.bundle_perplexity:.4g}"
        found.append((both, "perplexity, reference → bundle"))
    if report.tasks:
        right = sum(row.right for row in report.tasks if row.backend != "reference")
        total = sum(row.total for row in report.tasks if row.backend != "reference")
        found += [(f"{right} of {total}", "problems solved by the bundle")] if total else []
    return (
        "<ul class='cards'>"
        + "".join(f"<li><b>{sentence(a)}</b><span>{sentence(b)}</span></li>" for a, b in found)
        + "</ul>"
    )


def _failed(report: ParityReport) -> str:
    return "<p>In the order of the data: the first one is where to look.</p>" + sections.check_table(
        report, report.failures, label="Failed checks"
    )


def _all_checks(report: ParityReport) -> str:
    return (
        f"<details><summary>{count(len(report.checks), 'check')}</summary>"
        f"{sections.check_table(report, report.checks, label='All checks')}</details>"
    )


def _not_checked(report: ParityReport) -> str:
    items = "".join(f"<li>{text(item)}</li>" for item in report.not_checked)
    return f"<ul>{items}</ul>" if items else "<p>Nothing is known to be missing.</p>"


def _facts(report: ParityReport) -> str:
    groups: dict[str, Mapping[str, Any]] = {
        "bundle": report.subject,
        "reference": report.reference,
        "runtime": report.runtime,
        "machine": report.machine,
    }
    rows = [
        (header(f"{group}: {name}"), Cell(f"<code>{text(value)}</code>", "long hash"))
        for group, facts in groups.items()
        for name, value in _flat(facts)
    ]
    return table(("what", "value"), rows, label="What was compared with what")


def _flat(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Nested facts, one a line: `components: head: fp32`."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found += [(f"{name}: {inner}", item) for inner, item in _flat(value)]
        else:
            found.append((name, value))
    return found
