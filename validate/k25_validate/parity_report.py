"""The parity report as data: checks with their tolerances, a row for each component, what was compared with what."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from k25_validate.report_rows import (
    BaselineSummary,
    ComponentRow,
    ExpertLoad,
    FarRow,
    LogitsSummary,
    MediaRow,
    Override,
    PassageRow,
    PromptRow,
    TaskRow,
)
from k25_validate.tolerances import Tolerance

__all__ = [
    "FAIL_ON",
    "SCHEMA_VERSION",
    "Check",
    "ComponentRow",
    "MediaRow",
    "ParityReport",
    "Section",
    "report_to_dict",
]

SCHEMA_VERSION = 2

#: In the order of the data: the first failed check is where to look first.
Section = Literal[
    "vision",
    "components",
    "far positions",
    "end to end",
    "decode",
    "batch",
    "cached prefix",
    "text",
    "tasks",
    "baseline",
]

#: What `--fail-on` takes: anything, nothing, or sections.
FAIL_ON = ("any", "none", *(section.replace(" ", "-") for section in get_args(Section)))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured value against its tolerance. `detail` names the worst place."""

    section: Section
    name: str
    metric: str
    value: float
    tolerance: Tolerance
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within the tolerance."""
        return self.tolerance.accepts(self.value)

    def sentence(self) -> str:
        """What failed, by how much and where."""
        share = self.tolerance.used(self.value)
        factor = f"{share:,.0f}" if 10 <= share < 1e6 else f"{share:.3g}"
        times = f", {factor} times" if math.isfinite(share) and self.tolerance.bound == "at most" else ", not"
        return (
            f"{self.name}: {self.metric} {self.value:.3g}{times} the {self.tolerance.value:.3g} that is allowed"
            f"{' (' + self.detail + ')' if self.detail else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything that a reader needs to decide whether the bundle may ship. `key` says what the result belongs to,
    `subject` what was judged. `fail_on` are the sections whose failures count (`FAIL_ON`)."""

    key: str
    subject: dict[str, Any]
    reference: dict[str, str]
    runtime: dict[str, str]
    machine: dict[str, Any]
    prompts: tuple[PromptRow, ...]
    rows: tuple[ComponentRow, ...]
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...]
    seconds: float
    media: tuple[MediaRow, ...] = ()
    experts: tuple[ExpertLoad, ...] = ()
    logits: LogitsSummary | None = None
    passages: tuple[PassageRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    far: tuple[FarRow, ...] = ()
    overrides: tuple[Override, ...] = ()
    fail_on: tuple[str, ...] = ("any",)
    baseline: BaselineSummary | None = None

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass, in the order of the data."""
        return tuple(sorted((check for check in self.checks if not check.passed), key=_order))

    @property
    def blocking(self) -> tuple[Check, ...]:
        """The failures that decide the verdict: those of the sections in `fail_on`."""
        return tuple(check for check in self.failures if self.counts(check))

    def counts(self, check: Check) -> bool:
        """Whether a failure of this check fails the report."""
        return "any" in self.fail_on or check.section.replace(" ", "-") in self.fail_on

    @property
    def passed(self) -> bool:
        """The verdict: something was checked, and nothing that counts failed."""
        return bool(self.checks) and not self.blocking

    @property
    def loosened(self) -> tuple[Override, ...]:
        """The tolerances that accept more than by default."""
        return tuple(override for override in self.overrides if override.is_loosened)

    @property
    def bisect_line(self) -> str:
        """The command that finds the op behind a failure."""
        reference = "" if self.reference.get("name") == "plain" else f" --reference {self.reference.get('name')}"
        return f"k25-export bisect {shlex.quote(str(self.subject.get('bundle', 'BUNDLE')))}{reference}"

    def verdict(self) -> str:
        """One sentence: whether it ships, or what failed first and where."""
        against = f"the {self.reference['name']} reference"
        if not self.checks:
            return "Nothing was checked: this says nothing about the bundle."
        if self.blocking:
            first, more = self.blocking[0], len(self.blocking) - 1
            others = f"; {more} more {'check' if more == 1 else 'checks'} failed" if more else ""
            return f"Do not ship. First off is {first.sentence()}{others}."
        if self.failures:
            number, first = len(self.failures), self.failures[0]
            what = "a failure" if number == 1 else f"{number} failures"
            return f"Passes only because --fail-on leaves out {what}; first off is {first.sentence()}."
        far_off = (
            f"logits within {self.logits.relative_l2:.2g} (relative L2) of" if self.logits else "as close as asked to"
        )
        names = ", ".join(override.name for override in self.loosened)
        start = f"May ship only where tolerances loosened by hand ({names}) are good enough" if names else "May ship"
        return f"{start}: all {len(self.checks)} checks passed, {far_off} {against}."

    def summary(self) -> str:
        """A few lines for a terminal."""
        by_name: dict[tuple[str, str], Check] = {(check.section, check.metric): check for check in self.checks}
        lines = [
            f"parity: {'PASSED' if self.passed else 'FAILED'}, {len(self.checks) - len(self.failures)} of "
            f"{len(self.checks)} checks, against {self.reference['name']} in {self.seconds:.1f} s"
        ]
        lines += [
            f"  LOOSENED {override.name}: {override.value:.3g}, by default {override.default or 0.0:.3g}"
            for override in self.loosened
        ]
        if self.media:
            worst = max(self.media, key=lambda row: row.tolerance.used(row.relative_l2))
            lines.append(
                f"  media embeddings: {worst.relative_l2:.3g} (tolerance {worst.tolerance.value:.3g}), "
                f"the worst of {len(self.media)} pictures"
            )
        for section, metric, label in (
            ("end to end", "relative L2", "logits, prefill"),
            ("decode", "relative L2", "logits, decode"),
            ("end to end", "top-1 disagreements", "top-1 disagreements"),
        ):
            check = by_name.get((section, metric))
            if check is not None:
                lines.append(f"  {label}: {check.value:.3g} (tolerance {check.tolerance.value:.3g})")
        lines += [
            f"  FAILED{'' if self.counts(check) else ' (does not count)'} {check.name}, {check.metric}: "
            f"{check.value:.3g}, "
            f"{check.tolerance.bound} {check.tolerance.value:.3g}{'; ' + check.detail if check.detail else ''}"
            for check in self.failures[:5]
        ]
        if len(self.failures) > 5:
            lines.append(f"  ... and {len(self.failures) - 5} more failures in the report")
        if self.failures:
            lines.append(f"  where it starts: {self.bisect_line}")
        return "\n".join(lines)


def _order(check: Check) -> int:
    """Where a check stands in the order of the data; logits of a prompt with pictures come after all components."""
    is_logits = check.section == "vision" and check.metric != "relative L2"
    return get_args(Section).index("end to end" if is_logits else check.section)


def report_to_dict(report: ParityReport) -> dict[str, Any]:
    """The report as plain values for `parity.json`. Infinite and undefined values become strings."""
    values = {
        "format": "k25-parity-report",
        "schema_version": SCHEMA_VERSION,
        "passed": report.passed,
        "verdict": report.verdict(),
        **asdict(report),
    }
    for check, plain in zip(report.checks, values["checks"], strict=True):
        plain["passed"] = check.passed
    return json_value(values)  # type: ignore[no-any-return]


def json_value(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as strings."""
    if isinstance(value, dict):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
