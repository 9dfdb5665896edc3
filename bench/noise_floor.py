"""Noise floors of the components: the plain reference in float32 and the runtime, both against float64.

    .venv/bin/python bench/noise_floor.py [--seeds N]

Every component is fed with the same float32 input, so this is the rounding of one component and nothing else. Prints a
table: the largest relative L2 and systematic gain over seeds, shapes and prompts, beside the tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.demo.checkpoint import write_demo_checkpoint
from k25_runtime.runtime import Runtime
from k25_validate.bisect_walk import ways_of_prompts
from k25_validate.metrics import relative_l2
from k25_validate.plain_reference import PlainReference
from k25_validate.prompts import built_in_prompts
from k25_validate.systematic_gain import gain_tolerance, systematic_gain
from k25_validate.tolerances import component_tolerance

ODD = {
    "num_hidden_layers": 5,
    "first_k_dense_replace": 2,
    "hidden_size": 96,
    "intermediate_size": 104,
    "moe_intermediate_size": 64,
    "n_routed_experts": 10,
    "num_experts_per_tok": 3,
    "num_attention_heads": 5,
    "q_lora_rank": 36,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 28,
}
SHAPES: dict[str, dict[str, int]] = {"tiny": {}, "odd sizes": ODD}
WIDE = {"wide": {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 3}}


@dataclass(kw_only=True)
class Floor:
    """The largest of what was measured; gains in units of their tolerance."""

    reference: float = 0.0
    runtime: float = 0.0
    against: float = 0.0
    gain: float = 0.0
    tolerance: float = 0.0

    def add(
        self, exact: np.ndarray, rounded: np.ndarray, actual: np.ndarray, tokens: int, entered: np.ndarray | float = 0.0
    ) -> None:
        """Outputs of the float64 reference, of the float32 one and of the runtime; `entered` is a layer's input."""
        self.reference = max(self.reference, relative_l2(rounded, exact))
        self.runtime = max(self.runtime, relative_l2(actual, exact))
        self.against = max(self.against, relative_l2(actual, rounded))
        self.gain = max(
            self.gain, abs(systematic_gain(actual - entered, rounded - entered)) / gain_tolerance(tokens).value
        )


def measure(floors: dict[str, Floor], bundle: Path, checkpoint: Path) -> None:
    """One checkpoint: every component on every built-in prompt."""
    rounded = PlainReference(checkpoint)
    exact = PlainReference(checkpoint, dtype=torch.float64)
    with Runtime.open(bundle, checkpoint=checkpoint, mode="exact", context=512, bind_layers=False) as runtime:
        config = runtime.manifest.model.text
        prompts = built_in_prompts(runtime)
        ways = ways_of_prompts(runtime, prompts)[: len(prompts)]
        for prompt, way in zip(prompts, ways, strict=True):
            tokens = len(set(prompt.token_ids))
            walks = exact.walk(prompt.token_ids), rounded.walk(prompt.token_ids)
            hidden = walks[1].embed()
            batch = way.steps[0].batch
            for layer in range(config.num_hidden_layers):
                name = runtime.runner.component_of(layer)
                output = runtime.runner.run_layer(layer, runtime.runner.hidden_from_float32(hidden), batch)
                traces = [walk.layer(layer, hidden).hidden for walk in walks]
                floors.setdefault(name, Floor()).add(*traces, output.hidden.to_float32(), tokens, hidden)
                floors[name].tolerance = component_tolerance(name, config).value
                hidden = traces[1]
            logits = [walk.logits(hidden) for walk in walks]
            rows = np.arange(len(hidden), dtype=np.int32)
            actual = runtime.runner.head(runtime.runner.hidden_from_float32(hidden), rows)
            floors.setdefault("head", Floor()).add(*logits, actual, tokens)
            floors["head"].tolerance = component_tolerance("head", config).value


def noise_table(folder: Path, *, seeds: int = 5) -> str:
    """Markdown: one line for each shape and component."""
    lines = [
        "| shape | component | float32 reference to float64 | runtime to float64 | runtime to float32 reference | "
        "tolerance | noise / tolerance | gain / its tolerance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, overrides in {**SHAPES, **WIDE}.items():
        floors: dict[str, Floor] = {}
        bundle = folder / f"noise-{shape.replace(' ', '-')}"
        for seed in range(seeds):
            checkpoint = write_demo_checkpoint(
                folder / f"{bundle.name}-{seed}", preset="tiny", seed=40 + seed, overrides=overrides
            )
            if not bundle.is_dir():
                bundle_from_checkpoint(checkpoint_from_folder(checkpoint), bundle)
            measure(floors, bundle, checkpoint)
        for name, floor in floors.items():
            lines.append(
                f"| {shape} | {name} | {floor.reference:.1e} | {floor.runtime:.1e} | {floor.against:.1e} | "
                f"{floor.tolerance:.1e} | {floor.against / floor.tolerance:.2f} | {floor.gain:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    count = int(sys.argv[sys.argv.index("--seeds") + 1]) if "--seeds" in sys.argv else 5
    with tempfile.TemporaryDirectory() as temporary:
        print(noise_table(Path(temporary), seeds=count))
