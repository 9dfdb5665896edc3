"""One MoE layer of K2.5's real size (9.5 GB of random INT4 and scales), validated with `--stream`: memory and time.

    .venv/bin/python bench/stream_layer.py FOLDER      # needs 10 GB there

Prints one JSON object. The cold run starts with the layer's pages dropped from the page cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.demo.checkpoint import write_demo_checkpoint
from k25_validate.prompts import Prompt
from k25_validate.validation import parity_report_from_bundle

REAL_SIZES = {
    "hidden_size": 7168,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "vocab_size": 1024,
}


def main(folder: Path) -> None:
    """Write the layer (unless it is there), export it, validate it streamed."""
    checkpoint = folder / "layer"
    started = time.monotonic()
    if not checkpoint.is_dir():
        write_demo_checkpoint(checkpoint, preset="small", overrides=REAL_SIZES)
    written = time.monotonic() - started
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), folder / "bundle")
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    random = np.random.default_rng(1)
    tokens = tuple(int(token) for token in random.integers(0, REAL_SIZES["vocab_size"], 6))
    prompt = Prompt(name="six random tokens", prompt_ids=tokens[:5], next_ids=tokens[5:])
    started = time.monotonic()
    report = parity_report_from_bundle(folder / "bundle", stream="on", prompts=(prompt,))
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    result = {
        "checkpoint_gb": round(size / 1e9, 2),
        "seconds_to_write": round(written, 1),
        "seconds_to_validate": round(time.monotonic() - started, 1),
        "peak_rss_gb": round(peak * 1024 / 1e9, 2),
        "passed": report.passed,
        "local_relative_l2": {row.component: row.local for row in report.rows},
        "end_to_end": {check.metric: check.value for check in report.checks if check.section == "end to end"},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
