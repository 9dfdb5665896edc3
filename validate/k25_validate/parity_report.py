"""The parity report as data: checks with their tolerances, a row for each component, what was compared with what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from k25_validate.tolerances import Tolerance

SCHEMA_VERSION = 1

Section = Literal["components", "end to end", "decode", "batch"]


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


@dataclass(frozen=True, kw_only=True)
class ComponentRow:
    """Errors of one component instance, the worst over the prompts.

    `local`: relative L2 of its output when fed with the reference's input; `accumulated`: of the runtime's own chain.
    `router_differs` and `router_ties` count tokens, `None` where there is no router.
    """

    component: str
    layer: int | None
    local: float
    tolerance: Tolerance
    accumulated: float
    max_abs: float
    worst: str
    cosine: float
    router_differs: int | None = None
    router_ties: int | None = None
    router_weights_max_abs: float | None = None


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything that a reader needs to decide whether the bundle may ship. `key` says what the result belongs to,
    `subject` what was judged."""

    key: str
    subject: dict[str, Any]
    reference: dict[str, str]
    runtime: dict[str, str]
    machine: dict[str, Any]
    prompts: tuple[dict[str, Any], ...]
    rows: tuple[ComponentRow, ...]
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...]
    seconds: float

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """The verdict: something was checked, and all of it passed."""
        return bool(self.checks) and not self.failures

    def summary(self) -> str:
        """A few lines for a terminal."""
        by_name: dict[tuple[str, str], Check] = {(check.section, check.metric): check for check in self.checks}
        lines = [
            f"parity: {'PASSED' if self.passed else 'FAILED'}, {len(self.checks) - len(self.failures)} of "
            f"{len(self.checks)} checks, against {self.reference['name']} in {self.seconds:.1f} s"
        ]
        for section, metric, label in (
            ("end to end", "relative L2", "logits, prefill"),
            ("decode", "relative L2", "logits, decode"),
            ("end to end", "top-1 disagreements", "top-1 disagreements"),
        ):
            check = by_name.get((section, metric))
            if check is not None:
                lines.append(f"  {label}: {check.value:.3g} (tolerance {check.tolerance.value:.3g})")
        lines += [
            f"  FAILED {check.name}, {check.metric}: {check.value:.3g}, {check.tolerance.bound} "
            f"{check.tolerance.value:.3g}{'; ' + check.detail if check.detail else ''}"
            for check in self.failures[:5]
        ]
        if len(self.failures) > 5:
            lines.append(f"  ... and {len(self.failures) - 5} more failures in the report")
        return "\n".join(lines)


def report_to_dict(report: ParityReport) -> dict[str, Any]:
    """The report as plain values for `parity.json`. Infinite and undefined values become strings."""
    values = {
        "format": "k25-parity-report",
        "schema_version": SCHEMA_VERSION,
        "passed": report.passed,
        **asdict(report),
    }
    for check, plain in zip(report.checks, values["checks"], strict=True):
        plain["passed"] = check.passed
    return _finite(values)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
