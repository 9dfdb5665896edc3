"""Writes requirements.lock: the versions that a clean `pip install ".[dev]"` takes today. Run by `make lock`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# What `make setup` installs: every package that ".[dev]" brings, used as constraints by scripts/setup.sh.
# Written by `make lock`; do not edit. A CUDA build of torch pins the packages it needs itself.
"""
PINNED_BY_TORCH = ("cuda-", "nvidia-", "triton")


def lines_from_report(report: dict[str, list[dict[str, dict[str, str]]]]) -> list[str]:
    """`name==version` for each package of pip's installation report, without local versions such as +cpu."""
    pins = {item["metadata"]["name"]: item["metadata"]["version"].partition("+")[0] for item in report["install"]}
    names = sorted((name for name in pins if name != "k25-export"), key=str.lower)
    return [f"{name}=={pins[name]}\n" for name in names if not name.startswith(PINNED_BY_TORCH)]


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            f"lock: found Python {sys.version.split()[0]}, expected 3.11: the newest releases that still have it "
            "work on 3.12 and 3.13 too. Run `make setup PYTHON=python3.11` first."
        )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-input", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), ".[dev]", "pip"], cwd=ROOT, check=True)
        lines = lines_from_report(json.loads(report.read_text("utf-8")))
    (ROOT / "requirements.lock").write_text(HEADER + "".join(lines), "utf-8")
    print(f"lock: {len(lines)} packages in requirements.lock")


if __name__ == "__main__":
    main()
