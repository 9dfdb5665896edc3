"""transformers' own vision tower and projector, called directly: its `get_image_features` refuses several frames."""

from __future__ import annotations

from typing import Any

import torch

Grid = tuple[int, int, int]


def embeddings_from_transformers(model: Any, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Media embeddings [M, H] of one item by a `Kimi_K25Model`, from `pixel_values` [P, 3, size, size]."""
    grid_thw = torch.tensor([grid], dtype=torch.int64)
    tower = model.vision_tower
    pooled = tower(pixel_values, grid_thw=grid_thw, **_position_arguments(tower, grid)).pooler_output
    embeddings: torch.Tensor = model.mm_projector(pooled).squeeze(1)
    return embeddings


def _position_arguments(tower: Any, grid: Grid) -> dict[str, torch.Tensor]:
    """Nothing for a square table of positions; else the taps in it, by transformers' own weights of each axis.

    transformers takes the table's height for its width, since the released model has 64 of both.
    """
    from transformers.vision_utils import _interpolation_axis_taps_weights

    embeddings = tower.patch_embed.pos_emb
    table_rows, table_columns = embeddings.position_embeddings.shape[:2]
    if table_rows == table_columns:
        return {}
    frames, rows, columns = grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    taps, weights = [], []
    for place, size, table_size in ((row, rows, table_rows), (column, columns, table_columns)):
        place = place.flatten().repeat(frames)
        sizes = torch.full_like(place, size)
        mode, corners = embeddings.interpolation_mode, embeddings.interpolation_align_corners
        tap, weight = _interpolation_axis_taps_weights(place, sizes, table_size, mode, corners, "border")
        taps.append(tap)
        weights.append(weight)
    indices = taps[0][:, :, None] * table_columns + taps[1][:, None, :]
    products = weights[0][:, :, None] * weights[1][:, None, :]
    return {"interp_indices": indices.flatten(1), "interp_weights": products.flatten(1)}
