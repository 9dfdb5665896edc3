"""The tables of docs/parity.md: what each injected fault makes, what fails it, what `bisect` says; and noise floors.

    .venv/bin/python bench/fault_table.py             # prints both
    .venv/bin/python bench/fault_table.py --write     # writes them into docs/parity.md

The faults are those of tests/validate/fault_cases.py, on the `tiny` demo checkpoint; two minutes on two cores.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from noise_floor import noise_table

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.demo.checkpoint import write_demo_checkpoint
from k25_validate.validation import parity_report_from_bundle

ROOT = Path(__file__).parents[1]
HEADER = (
    "| fault | smallest error it makes | tolerance | noise floor | margin | caught by | bisect names |",
    "|---|---|---|---|---|---|---|",
)


def load_cases() -> ModuleType:
    """tests/validate/fault_cases.py, which belongs to no package."""
    sys.path.insert(0, str(ROOT / "tests/validate"))
    return importlib.import_module("fault_cases")


def noise_of(report: Any) -> dict[tuple[str, str], float]:
    """The largest value of each check of an unchanged build, by kind of component (or section) and metric."""
    found: dict[tuple[str, str], float] = {}
    for check in report.checks:
        key = (check.name.split()[0] if check.section == "components" else check.section, check.metric)
        found[key] = max(found.get(key, 0.0), check.value)
    return found


def fault_row(found: Any, noise: dict[tuple[str, str], float]) -> str:
    """One line of the table; a fault that is missed says so."""
    fault = found.fault
    if not found.checks:
        return f"| {fault.name} | | | | | **missed** ({fault.component}) | {_named(found)} |"
    check = found.smallest
    key = (fault.component if check.section == "components" else check.section, check.metric)
    margin = check.value / check.tolerance.value if check.tolerance.value else float("inf")
    place = check.name if check.section in ("components", fault.component) else check.section
    if fault.component not in place:
        place = f"{place} ({fault.component})"
    return (
        f"| {fault.name} | {check.value:.1e} | {check.tolerance.value:.1e} | {noise.get(key, 0.0):.1e} | "
        f"{_times(margin)} | {place}: {check.metric} | {_named(found)} |"
    )


def _times(margin: float) -> str:
    return "inf" if margin == float("inf") else f"{margin:.1f}" if margin < 100 else f"{margin:.0e}"


def _named(found: Any) -> str:
    divergence = found.bisection.divergence
    if divergence is None:
        return f"**missed**: `{found.fault.op}`, {found.fault.kind}"
    inside = f" > {' > '.join(divergence.stages)}" if divergence.stages else ""
    mark = "" if found.is_found else "**wrong**: "
    return f"{mark}`{divergence.op}` {divergence.tap}{inside} ({divergence.kind})"


def fault_table(folder: Path) -> str:
    """Break a build in every way, one after the other."""
    checkpoint = write_demo_checkpoint(folder / "checkpoint", preset="tiny", seed=1)
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), folder / "bundle")
    exported = SimpleNamespace(checkpoint=checkpoint, bundle=folder / "bundle")
    noise = noise_of(parity_report_from_bundle(exported.bundle))
    cases = load_cases()
    rows = []
    for number, fault in enumerate(cases.FAULTS):
        print(f"{number + 1}/{len(cases.FAULTS)} {fault.name}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as copy:
            rows.append(fault_row(cases.caught(fault, exported, Path(copy)), noise))
    return "\n".join([*HEADER, *rows])


def write_between(text: str, mark: str, table: str) -> str:
    """`text` with what stands between the comments `mark` and `end of mark` replaced."""
    head, _, rest = text.partition(f"<!-- {mark} -->")
    _, _, tail = rest.partition(f"<!-- end of {mark} -->")
    return f"{head}<!-- {mark} -->\n{table}\n<!-- end of {mark} -->{tail}"


def main() -> None:
    """Print the tables, or write them."""
    os.environ["K25_NATIVE"] = "off"  # faults of function bodies show where no native kernel stands in for them
    with tempfile.TemporaryDirectory() as folder:
        tables = {"noise": noise_table(Path(folder)), "faults": fault_table(Path(folder))}
    if "--write" not in sys.argv:
        print("\n\n".join(tables.values()))
        return
    path = ROOT / "docs/parity.md"
    text = path.read_text(encoding="utf-8")
    for mark, table in tables.items():
        text = write_between(text, mark, table)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
