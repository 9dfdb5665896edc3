"""A trained `DemoModel` as the tensors of the official checkpoint: names, dtypes and bytes.

Everything is stored in bf16 but the router's bias (float32) and the routed experts (INT4, `quantize_int4`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from k25_export.demo.quantizer import quantize_int4
from k25_export.tensor_patterns import TEXT_PREFIX
from k25_plugins.int4 import bfloat16_to_float32, dequantize_int4, float32_to_bfloat16

from .model import DemoModel


def tensors_from_model(model: DemoModel) -> dict[str, bytes]:
    """Checkpoint name → little-endian data, for every text tensor."""
    found: dict[str, bytes] = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if ".mlp.experts." in name:
            found.update(_expert_tensors(name, array))
        elif name.endswith("e_score_correction_bias"):
            found[_official_name(name)] = array.astype("<f4").tobytes()
        else:
            found[_official_name(name)] = float32_to_bfloat16(array).astype("<u2").tobytes()
    return found


def round_to_stored(model: DemoModel) -> None:
    """Give every parameter the value that the checkpoint will hold, so that what is measured is what is written."""
    for name, value in model.state_dict().items():
        array = value.numpy()
        if ".mlp.experts." in name:
            for expert in array:
                words, scales = quantize_int4(expert)
                expert[...] = dequantize_int4(words, bfloat16_to_float32(scales))
        elif not name.endswith("e_score_correction_bias"):
            array[...] = bfloat16_to_float32(float32_to_bfloat16(array))
    for mixture in model.mixtures():
        mixture.experts.is_quantized = False


def _official_name(name: str) -> str:
    return TEXT_PREFIX + name if name.startswith("lm_head.") else f"{TEXT_PREFIX}model.{name}"


def _expert_tensors(name: str, stack_EOC: npt.NDArray[np.float32]) -> Iterator[tuple[str, bytes]]:
    stem, projection = name.rsplit(".", 1)
    for expert, weight in enumerate(stack_EOC):
        words, scales = quantize_int4(weight)
        prefix = f"{_official_name(stem)}.{expert}.{projection}."
        yield prefix + "weight_packed", words.astype("<i4").tobytes()
        yield prefix + "weight_scale", scales.astype("<u2").tobytes()
        yield prefix + "weight_shape", np.array(weight.shape, "<i4").tobytes()
