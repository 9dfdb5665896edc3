"""A report against an older one of the same bundle's checks: what is new, what has grown, what is no longer checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k25_export.manifest import json_object
from k25_plugins.errors import InputError, mismatch
from k25_validate.parity_report import SCHEMA_VERSION, Check
from k25_validate.report_rows import BaselineSummary, Difference, LogitsSummary, TaskRow
from k25_validate.tolerances import Tolerance

#: An error that is more than this many times the older one (or the noise, where that is larger) has grown.
GROWTH = 4.0

#: Below this share of its tolerance an error is noise: another machine, another order of sums.
NOISE_SHARE = 0.1

GROWN = Tolerance(
    name="growth",
    value=GROWTH,
    bound="at most",
    reason=f"rounding differs by less than {GROWTH:g} between machines and versions, once it is above "
    f"{NOISE_SHARE:g} of "
    "its tolerance",
)
NONE_WORSE = Tolerance(name="choices", value=0.0, bound="at most", reason="nothing may be worse than it was")


def baseline_from_file(path: Path) -> dict[str, Any]:
    """The values of an older `parity.json`. Raises `InputError` where it is none, or of another version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"baseline {path}: cannot be read: {error.strerror}") from error
    values = json_object(data, where=f"baseline {path}")
    if values.get("format") != "k25-parity-report":
        raise mismatch(f"baseline {path}: format", expected="'k25-parity-report'", found=repr(values.get("format")))
    if values.get("schema_version") != SCHEMA_VERSION:
        raise mismatch(
            f"baseline {path}: schema_version",
            expected=SCHEMA_VERSION,
            found=values.get("schema_version"),
            hint="Make it again with this version: k25-export validate",
        )
    if not isinstance(values.get("checks"), list) or not all(_is_check(check) for check in values["checks"]):
        raise mismatch(f"baseline {path}: checks", expected="a list of checks", found="something else")
    return values


def _is_check(check: Any) -> bool:
    return (
        isinstance(check, dict)
        and all(isinstance(check.get(key), str) for key in ("section", "name", "metric"))
        and isinstance(check.get("passed"), bool)
        and (isinstance(check.get("value"), int | float) or check.get("value") in ("nan", "inf", "-inf"))
    )


def compared_with_baseline(
    values: Mapping[str, Any],
    checks: Sequence[Check],
    *,
    facts: Mapping[str, Mapping[str, Any]],
    logits: LogitsSummary | None,
    tasks: Sequence[TaskRow],
) -> tuple[BaselineSummary, tuple[Check, ...]]:
    """What differs, and the checks that fail where something is worse. `facts` are what the new report compares."""
    old = {_key(check): check for check in values["checks"] if check["section"] != "baseline"}
    new: dict[tuple[str, str, str], Check] = {(check.section, check.name, check.metric): check for check in checks}
    differences = [*_of_both(old, new), *_of_accuracy(values, logits, tasks)]
    gone = [key for key in old if key not in new]
    differences += [_difference(key, _number(old[key]["value"]), None, kind="no longer checked") for key in gone]
    differences += [_difference(key, None, check.value, kind="new") for key, check in new.items() if key not in old]
    grown = max((item for item in differences if item.ratio is not None), key=_ratio, default=None)
    turned = [item for item in differences if item.kind == "now fails"]
    fell = [item for item in differences if item.kind == "fell"]
    summary = BaselineSummary(
        key=str(values.get("key", "")),
        passed=values.get("passed") is True,
        changed_facts=tuple(_changed(values, facts)),
        differences=tuple(sorted(differences, key=lambda item: (_ORDER.index(item.kind), -_ratio(item)))),
    )
    lost = [f"{section}: {name}: {metric}" for section, name, metric in gone]
    return summary, (
        _count("checks that passed and now fail", [_text(item) for item in turned]),
        _check("largest growth of an error", 0.0 if grown is None else _ratio(grown), GROWN, _text(grown)),
        _count("shares of right answers and first choices that fell", [_text(item) for item in fell]),
        _count("checks that are no longer made", lost),
    )


_ORDER = ("now fails", "grew", "fell", "no longer checked", "now passes", "shrank", "new", "as before")


def _key(check: Mapping[str, Any]) -> tuple[str, str, str]:
    return check["section"], check["name"], check["metric"]


def _number(value: Any) -> float:
    return float(value)  # of a number, or of "nan", "inf", "-inf"


def _of_both(old: Mapping[tuple[str, str, str], Any], new: Mapping[tuple[str, str, str], Check]) -> list[Difference]:
    found = []
    for key, check in new.items():
        if key in old:
            before = _number(old[key]["value"])
            # A gain is a signed average of rounding, here by its size: it may be next to nothing by chance.
            ratio = None if check.tolerance.name == "gain" else _growth(check, before)
            kind = (
                "grew" if ratio is not None and ratio > GROWTH else "shrank" if _shrank(check, before) else "as before"
            )
            if old[key]["passed"] != check.passed:
                kind = "now passes" if check.passed else "now fails"
            found.append(_difference(key, before, check.value, ratio=ratio, kind=kind))
    return found


def _growth(check: Check, before: float) -> float:
    """New value over the larger of the old one and the noise; infinite for a value that is not finite and was."""
    if not math.isfinite(check.value):
        return math.inf if math.isfinite(before) else 1.0
    floor = max(before, NOISE_SHARE * check.tolerance.value) if math.isfinite(before) else math.inf
    if floor == 0:
        return 0.0 if check.value == 0 else math.inf
    return check.value / floor


def _shrank(check: Check, before: float) -> bool:
    return before > GROWTH * max(check.value, NOISE_SHARE * check.tolerance.value)


def _of_accuracy(values: Mapping[str, Any], logits: LogitsSummary | None, tasks: Sequence[TaskRow]) -> list[Difference]:
    """Shares that should not fall: first choices, and right answers of each task and backend."""
    now = {("tasks", f"{row.task} on {row.backend}", "share of right answers"): row.share for row in tasks}
    before = {
        ("tasks", f"{row.get('task')} on {row.get('backend')}", "share of right answers"): row["right"] / row["total"]
        for row in values.get("tasks") or ()
        if isinstance(row, dict) and row.get("total")
    }
    old = values.get("logits")
    if logits is not None and isinstance(old, dict) and isinstance(old.get("top1_agreement"), int | float):
        key = ("end to end", "all prompts", "top-1 agreement")
        now[key], before[key] = logits.top1_agreement, float(old["top1_agreement"])
    return [
        _difference(key, before[key], value, kind="fell" if value < before[key] - 1e-9 else "as before")
        for key, value in now.items()
        if key in before
    ]


def _changed(values: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was compared with what, where that is not the same: `runtime: mode: fast -> exact`."""
    found: list[str] = []
    for group, new in facts.items():
        before = values.get(group)
        old: Mapping[str, Any] = before if isinstance(before, dict) else {}
        found += [
            f"{group}: {key}: {_short(old.get(key))} → {_short(new.get(key))}"
            for key in dict.fromkeys((*old, *new))
            if old.get(key) != new.get(key)
        ]
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _difference(
    key: tuple[str, str, str], before: float | None, now: float | None, *, ratio: float | None = None, kind: str
) -> Difference:
    section, name, metric = key
    return Difference(section=section, name=name, metric=metric, before=before, now=now, ratio=ratio, kind=kind)


def _ratio(item: Difference) -> float:
    return 0.0 if item.ratio is None else item.ratio


def _text(item: Difference | None) -> str:
    return "" if item is None else f"{item.section}: {item.name}: {item.metric} {item.before:.3g} → {item.now:.3g}"


def _count(metric: str, places: Sequence[str]) -> Check:
    return _check(metric, float(len(places)), NONE_WORSE, "; ".join(places[:3]) + (" ..." if len(places) > 3 else ""))


def _check(metric: str, value: float, tolerance: Tolerance, detail: str) -> Check:
    return Check(
        section="baseline", name="older report", metric=metric, value=value, tolerance=tolerance, detail=detail
    )
