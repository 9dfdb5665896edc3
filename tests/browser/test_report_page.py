"""The parity report in a real browser: nothing runs, nothing is fetched, everything is there and can be read.

Screenshots at both widths go to `K25_ARTEFACTS`, where it is set, else to pytest's temporary folder.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_validate.parity_report import ParityReport, report_to_dict
from k25_validate.report_html import html_from_report
from k25_validate.report_rows import Override, PromptRow, TaskRow
from k25_validate.validation import parity_report_from_bundle
from k25_validate.validation_options import ValidationOptions

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDTHS = (390, 1280)
HOSTILE = "</bdi></td><script>alert(1)</script><img src=http://example.invalid/x onerror=alert(2)>\u202e' \""
SECTIONS = {
    *("components", "routing", "logits", "text", "ways", "far", "vision"),
    *("tolerances", "not-checked", "compared", "checks"),
}


@pytest.fixture(scope="module")
def passing(tiny: Any) -> ParityReport:
    return parity_report_from_bundle(tiny.bundle, threads=1)


@pytest.fixture(scope="module")
def reports(tiny: Any, passing: ParityReport, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParityReport]:
    """A good one; a failed one with hostile names, NaN, a baseline and overrides; one with nothing but failures."""
    import json

    older = tmp_path_factory.mktemp("older") / "parity.json"
    older.write_text(json.dumps(report_to_dict(passing)))
    options = ValidationOptions(baseline=older, tolerances={"moe_layer": 1e-9, "logits": 0.5}, fail_on=("components",))
    failed = parity_report_from_bundle(tiny.bundle, options=options, threads=1)
    assert failed.logits is not None
    failed = replace(
        failed,
        prompts=(*failed.prompts, PromptRow(name=HOSTILE, prompt_tokens=3, decoded_tokens=1, prefill=float("nan"))),
        tasks=(TaskRow(task=HOSTILE, backend="reference", right=1, total=2, first_wrong=HOSTILE),),
        not_checked=(*failed.not_checked, HOSTILE),
        logits=replace(
            failed.logits,
            worst=tuple(replace(item, token=HOSTILE, before=HOSTILE, kl=float("inf")) for item in failed.logits.worst),
        ),
        subject={**failed.subject, "bundle": HOSTILE},
    )
    rows = tuple(replace(row, local=float("inf"), accumulated=float("nan"), noise=None) for row in passing.rows[:1])
    bare = replace(
        passing,
        **dict.fromkeys(("prompts", "media", "experts", "passages", "tasks", "far", "not_checked"), ()),
        rows=rows,
        logits=None,
        overrides=(Override(name="kl", value=1.0, default=None, is_loosened=False),),
    )
    return {"passing": passing, "failed": failed, "bare": bare}


@pytest.fixture(scope="module")
def folder(reports: dict[str, ParityReport], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(html_from_report(report), "utf-8")
    return folder


@pytest.fixture(params=["passing", "failed", "bare"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(params=[False, True], ids=["light", "dark"])
def page(browser: Any, folder: Path, name: str, width: int, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = browser.page(folder / f"{name}.html", width=width, dark=request.param)
    yield opened
    opened.close()


# Every text node against the first background that is not transparent behind it, by WCAG 2.2 (1.4.3).
CONTRAST = """
(() => {
  const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const part = value => { value /= 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest('title')) continue;
    const style = getComputedStyle(element);
    if (!element.getClientRects().length || style.visibility !== 'visible') continue;
    const ink = numbers(element.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(behind(element))];
    const size = parseFloat(style.fontSize), is_large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push({text: node.data.trim().slice(0, 40), ratio, needed: is_large ? 3 : 4.5});
  }
  return found;
})()
"""


def test_nothing_runs_and_nothing_is_fetched(page: Any, folder: Path, name: str) -> None:
    assert page.evaluate("document.scripts.length") == 0
    assert page.evaluate("document.querySelectorAll('iframe, object, embed, form, link, base').length") == 0
    own = (folder / f"{name}.html").resolve().as_uri()
    requests = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
    assert {url for url in requests if not url.startswith("data:")} == {own}
    assert page.events("Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []
    assert page.events("Log.entryAdded") == []
    images = page.evaluate("[...document.images].map(image => [image.src.slice(0, 22), image.naturalWidth > 0])")
    assert all(image == ["data:image/png;base64,", True] for image in images)


def test_the_policy_forbids_what_is_not_there(page: Any) -> None:
    """If a script got into the page after all, it would not run, and an image from outside would not load."""
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://example.invalid/pixel.png\">')")
    page.evaluate("window.added = document.createElement('script')")
    page.evaluate("window.added.text = 'window.ran = 1'")
    page.evaluate("document.body.append(window.added)")
    assert page.evaluate("window.ran === undefined")
    wanted = {
        event["requestId"]
        for event in page.events("Network.requestWillBeSent")
        if "example.invalid" in event["request"]["url"]
    }
    blocked = {event["requestId"]: event.get("blockedReason") for event in page.events("Network.loadingFailed")}
    assert all(blocked[request] == "csp" for request in wanted)
    assert any("Content Security Policy" in event["entry"]["text"] for event in page.events("Log.entryAdded"))


def test_every_section_is_there_and_linked(page: Any, reports: dict[str, ParityReport], name: str) -> None:
    found = set(page.evaluate("[...document.querySelectorAll('main > section')].map(section => section.id)"))
    report = reports[name]
    expected = SECTIONS | ({"failed"} if report.failures else set()) | ({"baseline"} if report.baseline else set())
    assert found == expected | ({"tasks"} if report.tasks else set())
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href').slice(1))")
    assert set(links) == found
    titles = page.evaluate("[...document.querySelectorAll('main > section > h2')].map(title => title.innerText.length)")
    assert len(titles) == len(links)
    assert min(titles) > 3
    assert page.evaluate("document.querySelector('.verdict p').innerText") == _shown(report.verdict())
    assert page.evaluate("document.querySelector('.verdict').getBoundingClientRect().top") < 200


def _shown(text: str) -> str:
    return " ".join(text.split())


def test_everything_can_be_read(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    found = page.evaluate(CONTRAST)
    assert len(found) > 20
    assert [item for item in found if item["ratio"] < item["needed"]] == []


def test_the_page_fits_its_width(page: Any, width: int) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(element => !element.closest('.scroll, pre') && "
        "element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_it_is_usable_by_keyboard_and_screen_reader(page: Any) -> None:
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.className") == "skip"
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.tagName") in ("A", "PRE")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(str(node.get("name", {}).get("value", "")))
    assert len(roles["main"]) == 1
    assert roles["heading"][0] == "Parity report"
    assert all(roles["image"]) if "image" in roles else True
    assert all(roles.get("region", []))
    assert roles["table"]
    assert roles["columnheader"]


def test_pictures_of_it_are_kept(page: Any, name: str, width: int, request: pytest.FixtureRequest) -> None:
    kept = os.environ.get("K25_ARTEFACTS")
    folder = Path(kept) if kept else request.getfixturevalue("tmp_path")
    theme = "dark" if "dark" in request.node.name else "light"
    data = page.screenshot(folder / f"parity-{name}-{width}-{theme}.png")
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == width
    assert len(data) > 10_000


def test_it_prints_with_everything_open(browser: Any, folder: Path) -> None:
    page = browser.page(folder / "failed.html", width=1280, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate("document.querySelector('#checks tbody').getBoundingClientRect().height") > 100
    pdf = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    page.close()
