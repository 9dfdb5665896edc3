"""The parity report as files: `parity.json`, `parity.xml` (JUnit), `parity.html`, each written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from k25_export.manifest import REPORTS_FOLDER
from k25_plugins.whole_file import write_whole
from k25_validate.parity_report import ParityReport, report_to_dict
from k25_validate.report_html import html_from_report


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
    """One test case a check, grouped by section, as GitHub and GitLab show them."""
    root = ElementTree.Element("testsuites", name="k25-export parity")
    for section in dict.fromkeys(check.section for check in report.checks):
        checks = [check for check in report.checks if check.section == section]
        failures = sum(not check.passed for check in checks)
        suite = ElementTree.SubElement(
            root, "testsuite", name=section, tests=str(len(checks)), failures=str(failures), errors="0", skipped="0"
        )
        for check in checks:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"parity.{section.replace(' ', '_')}", name=f"{check.name}: {check.metric}"
            )
            bound = f"{check.tolerance.bound} {check.tolerance.value:.6g} ({check.tolerance.reason})"
            if not check.passed:
                message = f"{check.metric} {check.value:.6g}, expected {bound}"
                ElementTree.SubElement(case, "failure", message=message).text = check.detail
            ElementTree.SubElement(case, "system-out").text = f"{check.value:.6g}, {bound}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
