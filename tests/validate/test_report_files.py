"""The report as data and as files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from k25_validate.parity_report import Check, ComponentRow, ParityReport, report_to_dict
from k25_validate.report_files import write_report
from k25_validate.tolerances import Tolerance, component_tolerance
from k25_validate.validation import parity_report_from_bundle

BOUND = Tolerance(value=1e-5, bound="at most", reason="because <of> rounding & sums")


def _report(*values: float) -> ParityReport:
    checks = tuple(
        Check(
            section="components",
            name=f"moe_layer {i}",
            metric="relative L2",
            value=value,
            tolerance=BOUND,
            detail="<at>",
        )
        for i, value in enumerate(values)
    )
    rows = tuple(
        ComponentRow(
            component="moe_layer", layer=i, local=v, tolerance=BOUND, accumulated=v, max_abs=v, worst="[0]", cosine=1.0
        )
        for i, v in enumerate(values)
    )
    return ParityReport(
        key="k",
        subject={"inputs_sha256": "ab"},
        reference={"name": "plain"},
        runtime={},
        machine={},
        prompts=(),
        rows=rows,
        checks=checks,
        not_checked=("GPUs",),
        seconds=1.0,
    )


@pytest.mark.parametrize("value", [2e-5, math.inf, math.nan])
def test_one_value_outside_its_tolerance_fails_the_report(value: float) -> None:
    report = _report(1e-6, value)
    assert not report.passed
    assert [check.name for check in report.failures] == ["moe_layer 1"]
    assert "FAILED moe_layer 1" in report.summary()


def test_a_report_without_checks_is_no_pass() -> None:
    assert not _report().passed


def test_values_at_the_bound_pass() -> None:
    assert _report(1e-5).passed


def test_lower_bounds_reject_nan() -> None:
    at_least = Tolerance(value=1.0, bound="at least", reason="")
    assert at_least.accepts(1.0)
    assert not at_least.accepts(0.999)
    assert not at_least.accepts(math.nan)


class _Page(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = frozenset({"meta", "line", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("values", [(1e-7, 0.0), (1e-7, math.inf)])
def test_files_say_the_same(values: tuple[float, ...], tmp_path: Path) -> None:
    report = _report(*values)
    page = write_report(report, tmp_path)
    data = json.loads((tmp_path / "reports" / "parity.json").read_text())
    assert data["passed"] is report.passed
    assert [check["passed"] for check in data["checks"]] == [check.passed for check in report.checks]

    suites = ElementTree.parse(tmp_path / "reports" / "parity.xml").getroot()
    cases = suites.findall("testsuite/testcase")
    assert [case.get("name") for case in cases] == ["moe_layer 0: relative L2", "moe_layer 1: relative L2"]
    assert len(suites.findall("testsuite/testcase/failure")) == len(report.failures)
    assert [suite.get("failures") for suite in suites] == [str(len(report.failures))]

    parser = _Page()
    text = page.read_text(encoding="utf-8")
    parser.feed(text)
    assert parser.open == []
    assert ("Parity passed" in text) is report.passed
    assert "because &lt;of&gt; rounding &amp; sums" in text
    assert not re.search(r"https?://", text)
    assert not any(name in attributes for _, attributes in parser.found for name in ("src", "href"))
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == [
        "parity.html",
        "parity.json",
        "parity.xml",
    ]


def test_infinite_values_are_strings_in_json() -> None:
    data = report_to_dict(_report(math.inf, math.nan))
    assert [check["value"] for check in data["checks"]] == ["inf", "nan"]
    json.dumps(data, allow_nan=False)


def test_tolerance_grows_with_the_longest_dot_product(exported: Any) -> None:
    from k25_export.manifest import read_manifest

    text = read_manifest(exported.bundle).model.text
    longest = max(text.hidden_size, text.intermediate_size, text.num_attention_heads * text.v_head_dim)
    assert component_tolerance("dense_layer", text).value == pytest.approx(2 * 2**-24 * math.sqrt(longest))
    assert component_tolerance("embed", text).value == 0


@pytest.mark.parametrize("reference", ["plain", "transformers"])
def test_a_good_bundle_passes_with_every_section(reference: Any, exported: Any) -> None:
    report = parity_report_from_bundle(exported.bundle, reference=reference)
    assert report.passed, report.summary()
    assert {check.section for check in report.checks} == {"components", "end to end", "decode", "batch"}
    layers = report.subject["layers"]
    assert [row.layer for row in report.rows] == [None, *range(layers), None]
    values = {(check.section, check.metric): check.value for check in report.checks}
    assert values["end to end", "relative L2"] <= 2e-5
    assert values["decode", "relative L2"] <= 2e-5
    assert max(prompt["decoded_tokens"] for prompt in report.prompts) >= 12
