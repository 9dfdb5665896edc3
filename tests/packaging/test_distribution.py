"""The distribution as a stranger gets it: the wheel, bare imports, import rules, pins, links, tracked files."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "k25_plugins": "plugins",
    "k25_export": "export",
    "k25_engines": "engines",
    "k25_runtime": "runtime",
    "k25_validate": "validate",
    "k25_cli": "cli",
}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "tensorrt", "tensorrt_rtx")
COMPILED = {".pyc", ".so", ".engine"}
NATIVE = "k25_plugins/native/libk25_ops.so"
LARGEST_FILE = 1024 * 1024


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith("k25_export-")
    # With the native ops inside it fits this platform only.
    assert wheel.name.endswith("-py3-none-any.whl") != (ROOT / "plugins" / NATIVE).exists()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


@pytest.mark.parametrize(("package", "folder"), PACKAGES.items())
def test_wheel_has_every_file_of_the_package(wheel_names: set[str], package: str, folder: str) -> None:
    source = ROOT / folder
    files = {
        path.relative_to(source).as_posix()
        for path in (source / package).rglob("*")
        if path.is_file() and (path.suffix not in COMPILED or path.parent.name == "native")
    }
    assert f"{package}/__init__.py" in files
    assert {name for name in wheel_names if name.startswith(f"{package}/")} == files


def test_wheel_has_nothing_but_the_packages_and_their_metadata(wheel_names: set[str]) -> None:
    top = {PurePosixPath(name).parts[0] for name in wheel_names}
    (metadata,) = top - PACKAGES.keys()
    assert metadata.endswith(".dist-info")
    assert {f"{metadata}/entry_points.txt", f"{metadata}/licenses/LICENSE"} <= wheel_names
    assert not [name for name in wheel_names if {"test", "tests"} & set(PurePosixPath(name).parts)]


@pytest.mark.parametrize("package", PACKAGES)
def test_bare_import_brings_in_nothing_heavy(package: str) -> None:
    program = f"import sys, {package}; print(*sorted(set(sys.modules) & {set(HEAVY)!r}))"
    imported = run(sys.executable, "-c", program)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.split() == []


def test_import_rules_hold() -> None:
    linted = run(str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache")
    assert linted.returncode == 0, linted.stdout + linted.stderr


def locked_versions() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert not [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in pins)}


def required_packages() -> Iterator[Requirement]:
    extras = project()["project"]["optional-dependencies"]
    waiting = [*project()["project"]["dependencies"], "k25-export[dev]", *project()["build-system"]["requires"]]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == "k25-export":
            waiting += [line for extra in requirement.extras for line in extras[extra]]
        else:
            yield requirement


def test_lock_pins_every_requirement_to_an_allowed_version() -> None:
    pins = locked_versions()
    left_to_torch = runpy.run_path(str(ROOT / "scripts" / "lock.py"))["PINNED_BY_TORCH"]
    wrong = {
        str(requirement): pins.get(canonicalize_name(requirement.name))
        for requirement in required_packages()
        if not requirement.name.startswith(left_to_torch)
        and not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), ""))
    }
    assert wrong == {}, "run `make lock`"


# What a page links to, and what it offers to link to.
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#+\s+(.+?)\s*#*$", re.MULTILINE)
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")})


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = (heading.lower().strip() for heading in HEADING.findall(page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    dangling = []
    for link in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
            dangling.append(link)
    assert dangling == []


def test_link_checker_sees_links() -> None:
    text = CODE.sub("", "[a](b.md#c) `[d](e)` [![f](g.svg)](h)\n```\n[i](j)\n```\n")
    assert [link for link in LINK.findall(text) if link != "g.svg"] == ["b.md#c"]
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= {page.name for page in PAGES}


@cache
def tracked_files() -> tuple[Path, ...]:
    try:
        listed = run("git", "ls-files", "-z")
    except FileNotFoundError:
        pytest.skip("git is not installed, so the tracked files are not known")
    if listed.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the tracked files are not known")
    return tuple(path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file())


def test_no_tracked_file_is_large() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked_files()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}


def test_no_tracked_file_holds_a_path_of_a_machine() -> None:
    # A home folder of any system, or where this very checkout lies (unless that is as short as "/src"). The user named
    # "user" is an example in a text.
    homes = [r"/(?:home|Users)/(?!user/)\w[\w.-]*/", r"/roo[t]/", r"[A-Za-z]:\\Users\\"]
    checkout = [re.escape(str(ROOT)) + r"\b"] if len(ROOT.parts) > 2 else []
    machine_path = re.compile(r"(?<![\w./-])(?:" + "|".join([*homes, *checkout]) + ")")
    assert machine_path.search("see " + "/".join(["", "home", "someone", "k25"]))
    found = {}
    for path in tracked_files():
        match = machine_path.search(path.read_text("utf-8", errors="replace"))
        if match:
            found[path.relative_to(ROOT).as_posix()] = match[0]
    assert found == {}
