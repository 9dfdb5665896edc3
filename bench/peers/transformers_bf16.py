"""transformers as a contender of bench/compare.py: the same checkpoint, experts dequantised, all weights bfloat16.

    .venv/bin/python bench/compare.py BUNDLE        (transformers is of the extra k25-export[transformers])

sdpa attention, grouped_mm experts, a dynamic cache, logits of the last token only. Commands: see compare.py.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch

    from k25_validate.transformers_reference import TransformersReference
except ImportError as error:
    print(f"missing {error.name}", flush=True)
    sys.exit(0)


class Model:
    """The bfloat16 model. The router's bias stays float32, as transformers itself keeps it."""

    def __init__(self, checkpoint: Path, experts: str) -> None:
        model = TransformersReference(checkpoint)._model
        exact = ("e_score_correction_bias", "inv_freq")
        kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(exact)}
        self.model = model.to(torch.bfloat16)
        buffers = dict(model.named_buffers())
        for name, buffer in kept.items():
            buffers[name].data = buffer
        text = getattr(model.model, "language_model", model.model)
        text.set_attn_implementation("sdpa")
        text.set_experts_implementation(experts)

    @torch.inference_mode()
    def extend(self, tokens: list[int], cache: Any = None) -> tuple[Any, Any]:
        """Logits of the last token, and the cache."""
        ids = torch.tensor([tokens], dtype=torch.int64)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1], output.past_key_values


def answer(model: Model, command: dict[str, Any]) -> str:
    """Do what a line asks for."""
    prompt = command["prompt"]
    if command["do"] == "prefill":
        started = time.perf_counter()
        model.extend(prompt)
        return f"seconds {time.perf_counter() - started:.9f}"
    logits, cache = model.extend(prompt)
    if command["do"] == "decode":
        first, *rest = command["tokens"]
        _, cache = model.extend([first], cache)
        started = time.perf_counter()
        for token in rest:
            _, cache = model.extend([token], cache)
        return f"seconds {(time.perf_counter() - started) / len(rest):.9f}"
    np.save(command["file"], logits.float().numpy())
    return "done 1"


def main() -> None:
    """Load the model, then answer lines."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    model = Model(Path(options["checkpoint"]), options["variant"])
    facts = {"torch": torch.__version__, "experts": options["variant"]}
    print(f"ready {json.dumps(facts)}", flush=True)
    for line in sys.stdin:
        print(answer(model, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
