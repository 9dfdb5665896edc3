"""The parity report as files: `parity.json`, `parity.xml` (JUnit), `parity.html`, each written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from k25_export.manifest import REPORTS_FOLDER
from k25_plugins.whole_file import write_whole
from k25_validate.parity_report import Check, ParityReport, report_to_dict
from k25_validate.report_html import html_from_report
from k25_validate.report_text import visible


def write_report(report: ParityReport, bundle: Path) -> Path:
    """Write the three files to `reports/` of the bundle; returns the path of the HTML page."""
    folder = bundle / REPORTS_FOLDER
    files = {
        "parity.json": json.dumps(report_to_dict(report), indent=2, allow_nan=False) + "\n",
        "parity.xml": junit_from_report(report),
        "parity.html": html_from_report(report),
    }
    for name, text in files.items():
        write_whole(folder / name, text)
    return folder / "parity.html"


def junit_from_report(report: ParityReport) -> str:
    """One test case a check, grouped by section, as GitHub and GitLab show them.

    What was not checked is a skipped case; so is a failure that `--fail-on` leaves out, with its values in the message.
    """
    root = ElementTree.Element("testsuites", name="k25-export parity")
    for section in dict.fromkeys(check.section for check in report.checks):
        checks = [check for check in report.checks if check.section == section]
        failures = sum(not check.passed and report.counts(check) for check in checks)
        skipped = sum(not check.passed and not report.counts(check) for check in checks)
        suite = _suite(root, section, tests=len(checks), failures=failures, skipped=skipped)
        for check in checks:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"parity.{section.replace(' ', '_')}",
                name=visible(f"{check.name}: {check.metric}"),
            )
            _outcome(case, check, counts=report.counts(check))
    if report.not_checked:
        suite = _suite(root, "not checked", tests=len(report.not_checked), failures=0, skipped=len(report.not_checked))
        for item in report.not_checked:
            case = ElementTree.SubElement(suite, "testcase", classname="parity.not_checked", name=visible(item))
            ElementTree.SubElement(case, "skipped", message="not checked")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: ElementTree.Element, name: str, *, tests: int, failures: int, skipped: int) -> ElementTree.Element:
    counts = {"tests": str(tests), "failures": str(failures), "errors": "0", "skipped": str(skipped)}
    return ElementTree.SubElement(root, "testsuite", {"name": name, **counts})


def _outcome(case: ElementTree.Element, check: Check, *, counts: bool) -> None:
    bound = f"{check.tolerance.bound} {check.tolerance.value:.6g} ({check.tolerance.reason})"
    if not check.passed:
        message = f"{check.metric} {check.value:.6g}, expected {bound}"
        if counts:
            ElementTree.SubElement(case, "failure", message=visible(message)).text = visible(check.detail)
        else:
            ElementTree.SubElement(case, "skipped", message=visible(f"does not count (--fail-on): {message}"))
    ElementTree.SubElement(case, "system-out").text = visible(f"{check.value:.6g}, {bound}")
