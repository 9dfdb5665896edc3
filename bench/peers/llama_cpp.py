"""llama.cpp as a contender of bench/compare.py: the same model as GGUF (gguf_file.py), through its C interface.

    python3 -m venv PEER; PEER/bin/pip install gguf llama-cpp-python==0.3.36        (compiles for some minutes)
    .venv/bin/python bench/compare.py BUNDLE --llama PEER/bin/python

Default settings but for the number of threads, batches of 512 and no GPU. Commands: see compare.py.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

try:
    import llama_cpp
    import numpy as np
except ImportError as error:
    print(f"missing {error.name}", flush=True)
    sys.exit(0)

_BATCH = 512


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp's messages, dropped."""


class Model:
    """A model and one context."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        shape = llama_cpp.llama_context_default_params()
        shape.n_ctx, shape.n_batch, shape.n_ubatch = context, _BATCH, _BATCH
        shape.n_threads = shape.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, shape)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forget the sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def extend(self, tokens: list[int]) -> None:
        """Append tokens; logits of the last one are computed."""
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            ids = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(part)))
            if code:
                raise SystemExit(f"llama_decode: {code}")

    def logits(self) -> Any:
        """float32 [vocabulary] of the last token."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab,))


def answer(model: Model, command: dict[str, Any]) -> str:
    """Do what a line asks for. Logits are looked at, as any caller would."""
    model.clear()
    started = time.perf_counter()
    model.extend(command["prompt"])
    model.logits()
    if command["do"] == "prefill":
        return f"seconds {time.perf_counter() - started:.9f}"
    if command["do"] == "decode":
        first, *rest = command["tokens"]
        model.extend([first])
        model.logits()
        started = time.perf_counter()
        for token in rest:
            model.extend([token])
            model.logits()
        return f"seconds {(time.perf_counter() - started) / len(rest):.9f}"
    np.save(command["file"], np.array(model.logits()))
    return "done 1"


def main() -> None:
    """Load the file, then answer lines."""
    options = json.loads(sys.argv[1])
    model = Model(options["gguf"], options["context"], options["threads"])
    print(f"ready {json.dumps({'llama-cpp-python': llama_cpp.__version__})}", flush=True)
    for line in sys.stdin:
        print(answer(model, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
