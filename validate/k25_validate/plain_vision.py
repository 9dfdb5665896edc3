"""MoonViT-3D and the projector of Kimi K2.5 in plain PyTorch, written from their formulas.

This judges the exporter and the runtime, so it shares no code with them: the table of positions is resized by PyTorch's
own bicubic interpolation, angles are complex numbers, blocks are merged by reshaping, and one head is attended to at a
time.

Formulas: MoonViT (Kimi-VL, arXiv 2504.07491, section 2.1), its temporal form and the merging of frames (Kimi K2.5,
arXiv 2602.02276), rotary embeddings (arXiv 2104.09864, section 3.2), GELU (arXiv 1606.08415).

Legend: t frames, h rows, w columns, P patches (t h w), C vision width, N heads, D head width, M media tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from k25_validate.plain_checkpoint import CheckpointTensors, PlainReferenceError

Grid = tuple[int, int, int]

TOWER = "vision_tower."
PROJECTOR = "mm_projector."
_BASE = 10000.0
TOWER_NORM_EPS = 1e-5  # in no official file
_QUERIES = 1024  # queries of one head that are attended for at a time
# What these formulas take for granted; another value would be another model.
_ASSUMED: Mapping[str, Any] = {
    "pos_emb_type": "divided_fixed",
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class PlainVisionConfig:
    """The keys of the official `vision_config` that the shapes of the weights do not tell."""

    vt_num_hidden_layers: int
    vt_num_attention_heads: int
    init_pos_emb_time: int
    merge_kernel_size: tuple[int, int]
    projector_ln_eps: float


class PlainVision:
    """The vision tower and the projector over a checkpoint folder; `dtype` (float32 or float64) is that of every step.

    Raises `PlainReferenceError` for a configuration that the formulas do not cover.
    """

    def __init__(self, checkpoint: Path, *, dtype: torch.dtype) -> None:
        self._config = _config_from_file(checkpoint / "config.json")
        self._tensors = CheckpointTensors(checkpoint)
        self._dtype = dtype

    def embeddings(self, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Media embeddings [M, H] of one item, from `pixel_values` [P, 3, size, size] in the order frame, row, column.

        Raises `PlainReferenceError` where grid and patches do not fit together, or a frame cannot be merged.
        """
        self._check_grid(pixel_values, grid)
        x_PC = self._patches(pixel_values.to(self._dtype)) + self._positions(grid)
        turns_PD = self._turns(grid, x_PC.shape[1])
        for block in range(self._config.vt_num_hidden_layers):
            prefix = f"{TOWER}encoder.blocks.{block}."
            x_PC = x_PC + self._attention(self._norm(x_PC, prefix + "norm0", TOWER_NORM_EPS), turns_PD, prefix)
            inner = self._linear(self._norm(x_PC, prefix + "norm1", TOWER_NORM_EPS), prefix + "mlp.fc0")
            x_PC = x_PC + self._linear(gelu_tanh(inner), prefix + "mlp.fc1")
        x_PC = self._norm(x_PC, TOWER + "encoder.final_layernorm", TOWER_NORM_EPS)
        embeddings_MH = self._projected(self._merged(x_PC, grid))
        self._tensors.unmap()
        return embeddings_MH

    def _check_grid(self, pixel_values: torch.Tensor, grid: Grid) -> None:
        frames, rows, columns = grid
        kernel_rows, kernel_columns = self._config.merge_kernel_size
        if len(pixel_values) != frames * rows * columns or min(grid) < 1:
            raise PlainReferenceError(f"grid {grid}: expected {len(pixel_values)} patches, found the grid's product")
        if rows % kernel_rows or columns % kernel_columns:
            raise PlainReferenceError(
                f"grid {grid}: expected multiples of {self._config.merge_kernel_size}, found {(rows, columns)}"
            )
        if frames > self._config.init_pos_emb_time:
            raise PlainReferenceError(
                f"grid {grid}: expected at most {self._config.init_pos_emb_time} frames, found {frames}"
            )

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[P, 3, size, size] to [P, C]: a convolution that sees each patch once."""
        name = TOWER + "patch_embed.proj"
        return F.conv2d(
            pixels, self._weight(name + ".weight"), self._weight(name + ".bias"), stride=pixels.shape[2]
        ).flatten(1)

    def _positions(self, grid: Grid) -> torch.Tensor:
        """[P, C]: the table at this resolution, and for several frames a sinusoid of the frame."""
        frames, rows, columns = grid
        table = self._weight(TOWER + "patch_embed.pos_emb.weight").permute(2, 0, 1)[None]
        if table.shape[2:] != (rows, columns):
            table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        spatial_PC = table[0].flatten(1).T
        if frames == 1:
            return spatial_PC
        half = spatial_PC.shape[1] // 2
        rates = _BASE ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(frames, dtype=torch.float64)[:, None] * rates
        temporal = torch.cat([angles.sin(), angles.cos()], dim=1).to(self._dtype)
        return (temporal[:, None] + spatial_PC[None]).flatten(0, 1)

    def _turns(self, grid: Grid, width: int) -> torch.Tensor:
        """Complex [P, D/2] of modulus one: pair 2i of a head turns with the column, pair 2i + 1 with the row."""
        frames, rows, columns = grid
        pairs = width // self._config.vt_num_attention_heads // 2
        rates = _BASE ** (-torch.arange(pairs // 2, dtype=torch.float64) * 2 / pairs)
        by_column = torch.arange(columns)[None, :, None].expand(rows, columns, 1) * rates
        by_row = torch.arange(rows)[:, None, None].expand(rows, columns, 1) * rates
        angles = torch.stack([by_column, by_row], dim=-1).flatten(2).flatten(0, 1)
        turns = torch.polar(torch.ones_like(angles), angles).repeat(frames, 1)
        return turns.to(torch.complex128 if self._dtype == torch.float64 else torch.complex64)

    def _attention(self, x_PC: torch.Tensor, turns_PD: torch.Tensor, prefix: str) -> torch.Tensor:
        """Every patch attends to every other of the item, [P, C] to [P, C]."""
        heads = self._config.vt_num_attention_heads
        q_PND, k_PND, v_PND = self._linear(x_PC, prefix + "wqkv").unflatten(1, (3, heads, -1)).unbind(1)
        scale = 1 / math.sqrt(q_PND.shape[-1])
        out_PND = torch.empty_like(v_PND)
        for head in range(heads):
            query_PD, keys_PD = _turned(q_PND[:, head], turns_PD), _turned(k_PND[:, head], turns_PD)
            for start in range(0, len(x_PC), _QUERIES):
                span = slice(start, start + _QUERIES)
                out_PND[span, head] = (query_PD[span] @ keys_PD.T * scale).softmax(dim=-1) @ v_PND[:, head]
        return self._linear(out_PND.flatten(1), prefix + "wo")

    def _merged(self, x_PC: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The mean over frames, then the vectors of each block of patches: [M, kernel rows x kernel columns, C]."""
        rows, columns = self._config.merge_kernel_size
        mean = x_PC.unflatten(0, grid).mean(dim=0)
        blocks = mean.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        merged: torch.Tensor = blocks.transpose(1, 2).flatten(0, 1).flatten(1, 2)
        return merged

    def _projected(self, blocks: torch.Tensor) -> torch.Tensor:
        normed = self._norm(blocks, PROJECTOR + "pre_norm", self._config.projector_ln_eps)
        inner = self._linear(normed.flatten(1), PROJECTOR + "proj.0")
        return self._linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), PROJECTOR + "proj.2")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._weight(name + ".weight"), self._weight(name + ".bias"))

    def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        """Layer normalisation over the last axis."""
        centred = x - x.mean(dim=-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
        return normed * self._weight(name + ".weight") + self._weight(name + ".bias")

    def _weight(self, name: str) -> torch.Tensor:
        return self._tensors.stored(name).to(self._dtype)


def _turned(x_PD: torch.Tensor, turns_PD: torch.Tensor) -> torch.Tensor:
    """Adjacent channels of [P, D] as complex numbers, times those of [P, D/2]."""
    pairs = torch.view_as_complex(x_PD.unflatten(1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns_PD).flatten(1)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _config_from_file(path: Path) -> PlainVisionConfig:
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("vision_config") or {}
    if not values:
        raise PlainReferenceError("config.json: expected a vision_config, found none: the checkpoint is text only")
    for key, wanted in _ASSUMED.items():
        if values.get(key, wanted) != wanted:
            raise PlainReferenceError(f"config.json: vision_config.{key}: expected {wanted!r}, found {values[key]!r}")
    missing = [key for key in ("vt_num_hidden_layers", "vt_num_attention_heads") if values.get(key) is None]
    if missing:
        raise PlainReferenceError(f"config.json: vision_config: expected {', '.join(missing)}, found nothing")
    rows, columns = values.get("merge_kernel_size", (2, 2))
    return PlainVisionConfig(
        vt_num_hidden_layers=values["vt_num_hidden_layers"],
        vt_num_attention_heads=values["vt_num_attention_heads"],
        init_pos_emb_time=values.get("init_pos_emb_time", 4),
        merge_kernel_size=(rows, columns),
        projector_ln_eps=values.get("projector_ln_eps", 1e-5),
    )
