"""The report as data and as files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from k25_validate.parity_report import Check, ComponentRow, ParityReport, report_to_dict
from k25_validate.report_files import junit_from_report, write_report
from k25_validate.report_rows import LogitsSummary, PassageRow, PromptRow, TaskRow, WorstPosition
from k25_validate.report_schema import report_schema
from k25_validate.report_text import visible
from k25_validate.tolerances import Tolerance, component_tolerance
from k25_validate.validation import parity_report_from_bundle

PUBLISHED = Path(__file__).parents[2] / "docs" / "parity-report.schema.json"
BOUND = Tolerance(value=1e-5, bound="at most", reason="because <of> rounding & sums")


def _report(*values: float, **fields: Any) -> ParityReport:
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
    given: dict[str, Any] = {
        "key": "k",
        "subject": {"inputs_sha256": "ab", "bundle": "my bundle"},
        "reference": {"name": "plain"},
        "runtime": {},
        "machine": {},
        "prompts": (),
        "rows": rows,
        "checks": checks,
        "not_checked": ("GPUs",),
        "seconds": 1.0,
    }
    return ParityReport(**(given | fields))


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

    VOID = frozenset({"meta", "line", "polyline", "img"})

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
    assert [case.get("name") for case in cases] == ["moe_layer 0: relative L2", "moe_layer 1: relative L2", "GPUs"]
    assert [case.find("skipped") is not None for case in cases] == [False, False, True]
    assert len(suites.findall("testsuite/testcase/failure")) == len(report.failures)
    assert [suite.get("failures") for suite in suites] == [str(len(report.failures)), "0"]
    assert [suite.get("skipped") for suite in suites] == ["0", "1"]

    parser = _Page()
    text = page.read_text(encoding="utf-8")
    parser.feed(text)
    assert parser.open == []
    assert ("Parity passed" in text) is report.passed
    assert "because &lt;of&gt; rounding &amp; sums" in text
    assert not re.search(r"https?://", text)
    links = [attributes["href"] or "" for _, attributes in parser.found if "href" in attributes]
    names = {f"#{attributes['id']}" for _, attributes in parser.found if "id" in attributes}
    assert set(links) <= names
    assert "script" not in {tag for tag, _ in parser.found}
    sources = [attributes["src"] or "" for _, attributes in parser.found if "src" in attributes]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
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
    sections = {"components", "vision", "far positions", "end to end", "decode", "batch", "cached prefix", "text"}
    assert {check.section for check in report.checks} == sections
    layers = report.subject["layers"]
    assert [row.layer for row in report.rows] == [None, None, *range(layers), None]
    values = {(check.section, check.metric): check.value for check in report.checks}
    assert values["end to end", "relative L2"] <= 2e-5
    assert values["decode", "relative L2"] <= 2e-5
    assert max(prompt.decoded_tokens for prompt in report.prompts) >= 12
    full = [row for row in report.prompts if row.name not in {passage.name for passage in report.passages}]
    assert all(row.decode is not None and row.batch_to_alone is not None for row in full)
    assert sum(row.cached_to_cold is not None for row in full) == len(full)
    assert report.logits is not None
    assert report.logits.top1_agreement == report.logits.top5_agreement == 1.0
    assert report.logits.worst[0].kl == report.logits.kl_max > 0
    assert {load.layer for load in report.experts} == {
        row.layer for row in report.rows if row.router_differs is not None
    }
    assert all(load.reference == load.bundle for load in report.experts)


def test_the_verdict_is_one_sentence_about_what_is_first_off() -> None:
    report = _report(1e-6, 1.0, 3e-5)
    assert report.verdict() == (
        "Do not ship. First off is moe_layer 1: relative L2 1, 100,000 times the 1e-05 that is allowed (<at>); "
        "1 more check failed."
    )
    assert report.bisect_line == "k25-export bisect 'my bundle'"
    assert _report(1e-6).verdict().startswith("May ship: all 1 checks passed")
    assert "nothing" in _report().verdict().lower()


def test_failures_that_do_not_count_are_shown_and_skipped() -> None:
    report = _report(1e-6, math.nan, fail_on=("end-to-end",))
    assert report.passed
    assert report.failures
    assert report.verdict().startswith("Passes only because --fail-on leaves out a failure; first off is moe_layer 1")
    suites = ElementTree.fromstring(junit_from_report(report))
    assert suites.find("testsuite/testcase/failure") is None
    skipped = [case.get("message") or "" for case in suites.findall("testsuite/testcase/skipped")]
    assert [message.startswith("does not count (--fail-on)") for message in skipped] == [True, False]
    assert not _report(1e-6, math.nan, fail_on=("components",)).passed
    assert _report(1e-6, math.nan, fail_on=("none",)).passed


# Everything that may reach a report from outside: prompts, tokens, names of files and of tasks.
HOSTILE = (
    "</bdi><script>alert(1)</script><img src=x onerror=alert(2)>'\"\x00\x08\x1b[31m\u202e\u2066\ufffe\ud800&#60;\n"
)


def test_hostile_text_is_text_in_every_file(tmp_path: Path) -> None:
    position = WorstPosition(
        prompt=HOSTILE,
        position=0,
        before=HOSTILE,
        token=HOSTILE,
        kl=math.inf,
        reference_choice=HOSTILE,
        reference_probability=math.nan,
        bundle_choice=HOSTILE,
        bundle_probability=0.5,
        rank=0,
    )
    report = _report(
        1e-7,
        math.inf,
        subject={"bundle": HOSTILE},
        not_checked=(HOSTILE,),
        prompts=(PromptRow(name=HOSTILE, prompt_tokens=1, decoded_tokens=0, prefill=math.nan),),
        passages=(
            PassageRow(
                name=HOSTILE,
                tokens=1,
                reference_nll=1.0,
                bundle_nll=math.nan,
                reference_perplexity=math.inf,
                bundle_perplexity=math.nan,
            ),
        ),
        tasks=(TaskRow(task=HOSTILE, backend=HOSTILE, right=0, total=1, first_wrong=HOSTILE),),
        logits=LogitsSummary(
            rows=1,
            relative_l2=math.inf,
            kl_mean=math.nan,
            kl_max=math.inf,
            top1_agreement=0.0,
            top5_agreement=0.0,
            top5_reordered=1,
            worst_rank=4,
            worst=(position,),
        ),
    )
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    tags = {tag for tag, _ in parser.found}
    assert not tags & {"script", "iframe", "object", "link", "base", "form"}
    assert not any(name.startswith("on") for _, attributes in parser.found for name in attributes)
    assert page.isprintable() or not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ufffe]", page)
    ElementTree.parse(tmp_path / "reports" / "parity.xml")
    data = json.loads((tmp_path / "reports" / "parity.json").read_text())
    assert data["logits"]["worst"][0]["before"] == HOSTILE
    validator().validate(data)


def test_visible_text_keeps_what_people_read() -> None:
    assert visible("Grüße 世界 नमस्ते العالم 👩\u200d💻") == "Grüße 世界 नमस्ते العالم 👩\u200d💻"
    assert visible("a\nb\tc\x07\u202e") == "a⏎b⇥c\\x07\\u{202e}"


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(PUBLISHED.read_text()))


def test_the_published_schema_is_that_of_the_dataclasses() -> None:
    published = json.loads(PUBLISHED.read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    assert published == report_schema(), "python -m k25_validate.report_schema > docs/parity-report.schema.json"
    values = report_to_dict(_report(1e-6, math.inf))
    validator().validate(values)
    for broken in (
        values | {"passed": "yes"},
        values | {"more": 1},
        {name: value for name, value in values.items() if name != "checks"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator().validate(broken)
