"""Every intermediate result of the plain vision tower by name, and what its inputs should be. Shares no code with the
runtime: positions and turns are those of `plain_vision`, merged patches are listed here.

Legend: P patches, C tower width, D head width, M media tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from k25_validate.plain_checkpoint import CheckpointTensors
from k25_validate.plain_taps import Taps
from k25_validate.plain_vision import PROJECTOR, TOWER, TOWER_NORM_EPS, Grid, PlainVision, gelu_tanh

Array = npt.NDArray[Any]


class PlainVisionTaps:
    """Taps of one media item, in `dtype`; names are those of the checkpoint's modules."""

    def __init__(self, checkpoint: Path, *, dtype: torch.dtype = torch.float64) -> None:
        self._vision = PlainVision(checkpoint, dtype=dtype)
        self._config = self._vision._config
        self._dtype = dtype
        self._width = 0
        self.tensors = CheckpointTensors(checkpoint)

    @torch.inference_mode()
    def taps(self, pixel_values: npt.NDArray[np.float32], grid: Grid) -> Taps:
        """All taps of an item, float64."""
        vision, found = self._vision, dict[str, torch.Tensor]()
        x = vision._patches(torch.from_numpy(pixel_values).to(self._dtype))
        found["vision_tower.patch_embed.proj"] = x
        found["vision_tower.patch_embed.proj.product"] = x - vision._weight(TOWER + "patch_embed.proj.bias")
        x = x + vision._positions(grid)
        found["vision_tower.patch_embed"] = x
        turns = vision._turns(grid, x.shape[1])
        found |= {"cos": turns.real[:, None], "sin": turns.imag[:, None]}
        for block in range(self._config.vt_num_hidden_layers):
            x = self._block(found, f"{TOWER}encoder.blocks.{block}.", x, turns)
        x = self._norm(found, TOWER + "encoder.final_layernorm", x, TOWER_NORM_EPS)
        frames, rows, columns = grid
        blocks = x.unflatten(0, (frames, rows * columns))[:, self._merge_order(grid)].transpose(0, 1)
        found["merged_rows"] = x[self._merge_index(grid).flatten()]
        found["merged_frames"] = blocks
        mean = vision._merged(x, grid)
        found["merged"] = mean
        normed = self._norm(found, PROJECTOR + "pre_norm", mean, self._config.projector_ln_eps)
        found[PROJECTOR + "flat"] = normed.flatten(1)
        inner = self._linear(found, PROJECTOR + "proj.0", normed.flatten(1))
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        found[PROJECTOR + "gelu"] = gelu
        self._linear(found, PROJECTOR + "proj.2", gelu)
        return {name: value.double().contiguous().numpy() for name, value in found.items()}

    @torch.inference_mode()
    def inputs(self, width: int, grid: Grid) -> dict[str, Array]:
        """What the component should be fed with beside the pixels, by name; `width` is the tower's."""
        turns = self._vision._turns(grid, width)
        return {
            "position_embedding": self._vision._positions(grid).double().numpy(),
            "rope_cos": turns.real.double().numpy(),
            "rope_sin": turns.imag.double().numpy(),
            "merge_index": self._merge_index(grid).numpy(),
        }

    def facts(self, tap: str) -> Mapping[str, Any]:
        """What the formulas take for the attributes of `k25.VisionAttention`, the same wherever it is."""
        width = self._vision._tensors.stored(TOWER + "encoder.final_layernorm.weight").shape[0]
        heads = self._config.vt_num_attention_heads
        return {"num_heads": heads, "softmax_scale": 1 / math.sqrt(width // heads)}

    def _block(self, found: dict[str, torch.Tensor], prefix: str, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        vision, heads = self._vision, self._config.vt_num_attention_heads
        qkv = self._linear(found, prefix + "wqkv", self._norm(found, prefix + "norm0", x, TOWER_NORM_EPS))
        width = x.shape[1]
        pairs = qkv[:, : 2 * width].unflatten(1, (2 * heads, -1, 2))
        turned = torch.view_as_complex(pairs.contiguous()) * turns[:, None]
        rotated = torch.view_as_real(turned)
        first, second = pairs[..., 0], pairs[..., 1]
        flat = rotated.flatten(1)
        found |= {
            prefix + "qk": qkv[:, : 2 * width],
            prefix + "v": qkv[:, 2 * width :],
            prefix + "pairs": pairs,
            prefix + "first_": pairs[..., :1],
            prefix + "second_": pairs[..., 1:],
            prefix + "first": first,
            prefix + "second": second,
            prefix + "first_cos": first * found["cos"],
            prefix + "second_sin": second * found["sin"],
            prefix + "first_sin": first * found["sin"],
            prefix + "second_cos": second * found["cos"],
            prefix + "first_rotated": rotated[..., 0],
            prefix + "second_rotated": rotated[..., 1],
            prefix + "first_last": rotated[..., :1],
            prefix + "second_last": rotated[..., 1:],
            prefix + "rotated_pairs": rotated,
            prefix + "rotated": flat,
            prefix + "q": flat[:, :width],
            prefix + "k": flat[:, width:],
        }
        attended = self._attended(flat[:, :width], flat[:, width:], qkv[:, 2 * width :])
        found[prefix + "attended"] = attended
        x = x + self._linear(found, prefix + "wo", attended)
        found[prefix + "residual"] = x
        inner = self._linear(found, prefix + "mlp.fc0", self._norm(found, prefix + "norm1", x, TOWER_NORM_EPS))
        found[prefix + "gelu"] = gelu_tanh(inner)
        x = x + self._linear(found, prefix + "mlp.fc1", gelu_tanh(inner))
        found[prefix + "out"] = x
        assert vision is not None
        return x

    def _attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = self._config.vt_num_attention_heads
        q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        return (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)

    def _linear(self, found: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        y = self._vision._linear(x, name)
        found[name] = y
        found[name + ".product"] = y - self._vision._weight(name + ".bias")
        return y

    def _norm(self, found: dict[str, torch.Tensor], name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        found[name] = self._vision._norm(x, name, eps)
        return found[name]

    def _merge_order(self, grid: Grid) -> torch.Tensor:
        """[M, kernel patches]: the patches of a frame that make each media token."""
        _, rows, columns = grid
        down, across = self._config.merge_kernel_size
        places = torch.arange(rows * columns).view(rows // down, down, columns // across, across)
        return places.transpose(1, 2).reshape(-1, down * across)

    def _merge_index(self, grid: Grid) -> torch.Tensor:
        """[M, frames, kernel patches] of all patches of the item."""
        frames, rows, columns = grid
        offsets = torch.arange(frames)[None, :, None] * rows * columns
        return self._merge_order(grid)[:, None] + offsets
