"""Engines on a GPU: compiled for the one in this machine and run on it. Not run where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_engines.compilation import engines_from_bundle
from k25_engines.engine_options import EngineOptions
from k25_engines.tensorrt_module import device_compute_capability
from k25_plugins.errors import BackendMissingError
from k25_runtime.device import DeviceError
from k25_runtime.runtime import Runtime
from k25_validate.metrics import relative_l2

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
SIZES = {"max_sequences": 3, "max_tokens": 32, "max_rows": 32, "block_size": 16, "context": 96}

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(device_compute_capability() is None, reason="no NVIDIA GPU in this machine"),
]


def compiled(tiny: Any, folder: Path, **options: Any) -> Path:
    """A copy of the bundle with engines for the GPU of this machine."""
    bundle = folder / "bundle"
    shutil.copytree(tiny.bundle, bundle)
    capability = device_compute_capability()
    assert capability is not None
    try:
        engines_from_bundle(bundle, [capability], options=EngineOptions(**SIZES, **options))
    except BackendMissingError as error:
        pytest.skip(str(error))
    return bundle


def test_portable_engines_give_the_logits_of_onnx_runtime(tiny: Any, tmp_path: Path) -> None:
    """float32 from the function bodies: prompt, captured steps and replays.

    TensorRT may multiply float32 matrices in TF32, which keeps 10 bits of a factor: 2^-11 = 5e-4 relative for each
    product, and errors of a sum are independent. A wrong address or a stale cache is of the size of the logits.
    """
    bundle = compiled(tiny, tmp_path, precision="fp32", portable=True)
    options = {"max_new_tokens": 12, "ignore_eos": True, "keep_logits": True}
    with Runtime.open(tiny.bundle, mode="exact") as runtime:
        wanted = runtime.generate(token_ids=PROMPT, **options)
        assert wanted.prompt_logits is not None
    with Runtime.open(bundle, backend="tensorrt") as runtime:
        logits = [runtime.prefill(PROMPT)] + [runtime.decode(token)[None] for token in wanted.new_ids[:-1]]
        again = [runtime.prefill(PROMPT)] + [runtime.decode(token)[None] for token in wanted.new_ids[:-1]]
    expected = np.concatenate([wanted.prompt_logits, wanted.step_logits[1:]])  # type: ignore[index]
    assert relative_l2(np.concatenate(logits), expected) < 5e-3
    assert relative_l2(np.concatenate(again), expected) < 5e-3


def test_engines_with_plugins_run_or_say_that_they_have_no_kernels(tiny: Any, tmp_path: Path) -> None:
    """bf16 with plugins. Without GPU kernels in this build the first layer says so; nothing is made up."""
    bundle = compiled(tiny, tmp_path, precision="bf16")
    with Runtime.open(bundle, backend="tensorrt") as runtime:
        try:
            logits = runtime.prefill(PROMPT)
        except DeviceError as error:
            if "GPU kernels" not in str(error):
                raise
            return
        assert np.isfinite(logits).all()
        steps = np.stack([runtime.decode(token) for token in (1, 2, 3, 4)])
        whole = runtime.prefill([*PROMPT, 1, 2, 3, 4])[-4:]
        assert relative_l2(steps, whole) < 0.1  # bf16 in two orders of sums (docs/parity.md)
