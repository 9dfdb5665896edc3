"""A build's registers, stack and shared memory as a Markdown table, between two marks of a document."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from k25_plugins.errors import mismatch
from k25_plugins.gpu_manifest import MANIFEST
from k25_plugins.gpu_signatures import KERNELS
from k25_plugins.whole_file import write_whole

BEGIN, END = "<!-- figures of a build: begin -->", "<!-- figures of a build: end -->"
#: Constants that tell configurations of one kernel apart.
_TILE = ("BH", "BM", "TAIL", "BN", "BR", "BT", "BK", "H_BK", "BLOCK", "PAIRS", "ALIGNED")


def write_table(document: Path, folder: Path) -> None:
    """Replace what stands between the marks. Raises `InputError` where the document has none."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise mismatch(str(document), expected=f"the lines {BEGIN} and {END}", found="none")
    table = table_from_manifest(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_whole(document, f"{before}{BEGIN}\n\nBuilt on {today}: {table}\n\n{END}{after}")


def table_from_manifest(manifest: dict[str, Any]) -> str:
    """One row a configuration, one column a target: registers / bytes of stack / bytes of shared memory."""
    kernels = sorted(
        (kernel for kernel in manifest["kernels"] if not kernel["is_ptx"]),
        key=lambda kernel: (KERNELS.index(kernel["kernel"]), _label(kernel)),
    )
    targets = sorted({kernel["target"] for kernel in kernels})
    rows: dict[str, dict[int, str]] = {}
    for kernel in kernels:
        instruction = next((name for name, count in kernel["mma"].items() if count), "")
        figures = f"{kernel['registers']}/{kernel['stack']}/{kernel['shared']} {instruction}".strip()
        rows.setdefault(_label(kernel), {})[kernel["target"]] = figures
    tools = ", ".join(f"{name} {version}" for name, version in manifest["tools"].items())
    size = sum(kernel["bytes"] for kernel in manifest["kernels"]) / 1e6
    lines = [
        f"{tools}; {len(kernels)} binaries and the PTX of sm_80, {size:.1f} MB.",
        "",
        "| kernel, tile, warps, stages | " + " | ".join(f"sm_{target}" for target in targets) + " |",
        "|---|" + "---|" * len(targets),
        *(
            f"| {label} | " + " | ".join(row.get(target, "") for target in targets) + " |"
            for label, row in rows.items()
        ),
    ]
    return "\n".join(lines)


def _label(kernel: dict[str, Any]) -> str:
    tile = " ".join(f"{name}{kernel['constants'][name]}" for name in _TILE if name in kernel["constants"])
    divisible = " even" if kernel["divisible"] else ""
    return f"{kernel['kernel']} {tile}{divisible} w{kernel['warps']} s{kernel['stages']}".replace("  ", " ")
