"""What a report says beside its figures: the machine, what was not checked, tokens as text."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from k25_plugins.errors import InputError
from k25_runtime.bundle_files import BundleFiles
from k25_validate.far_positions import FAR_POSITIONS, FAR_TOKENS
from k25_validate.media_samples import MediaSample
from k25_validate.prompts import Prompt
from k25_validate.report_rows import TaskRow


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory and interpreter; no name of the machine and no path."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{platform.machine()}, {_processor()}",
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else "unknown model"


def text_of_ids(files: BundleFiles) -> Callable[[Sequence[int]], str]:
    """Writes token ids for people: as text where the bundle has a tokenizer, else as ids."""
    tokenizer = None
    if files.has_tokenizer:
        try:
            tokenizer = files.tokenizer
        except InputError:
            tokenizer = None

    def text(ids: Sequence[int]) -> str:
        if tokenizer is None:
            return " ".join(map(str, ids))
        return tokenizer.decode(ids)

    return text


def not_checked(
    files: BundleFiles,
    prompts: Sequence[Prompt],
    samples: Sequence[MediaSample],
    far_starts: Sequence[int],
    tasks: Sequence[TaskRow],
) -> list[str]:
    """What this report says nothing about, because of what the model or the run lacks."""
    found = []
    if samples:
        found.append("pictures larger than the drawn ones; how files become pixels")
    else:
        found.append("pictures: the model takes none, or none were given")
    if not any(prompt.is_passage for prompt in prompts):
        why = "none was given" if files.has_tokenizer else "the bundle has no tokenizer"
        found.append(f"perplexity of a text: {why}")
    if not any(prompt.media for prompt in prompts) and samples:
        found.append("pictures among text: no prompt holds one")
    if far_starts:
        names = ", ".join(f"{start:,}" for start in far_starts)
        found.append(
            f"far positions of all layers: the first of each kind was run, {FAR_TOKENS} tokens or fewer at {names}; "
            f"a full "
            "long context was not"
        )
        if max(far_starts) + FAR_TOKENS < min(files.manifest.model.text.max_position_embeddings, max(FAR_POSITIONS)):
            found.append("farther positions: the function bodies would take too much memory; the native ops would not")
    else:
        found.append("far positions: the model has none")
    if not tasks:
        found.append("task accuracy: the checkpoint has learnt no task that has right answers here")
    return found
