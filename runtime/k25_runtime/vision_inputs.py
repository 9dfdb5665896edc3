"""What the `vision` component takes beside the pixels, from a media item's grid: positions, angles, merge indices.

One graph serves every resolution because all that depends on the grid is computed here.
Legend: t frames, h and w patches a column and a row of a frame, P = t·h·w patches, D hidden, M = h·w/4 media tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import InputError, mismatch

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Grid = tuple[int, int, int]

MERGE = (2, 2)
MAX_FRAMES = 4
MAX_SIDE = 512

_ROPE_BASE = 10000.0
_CUBIC = -0.75  # exact in float32, as are the sums of it below


def vision_inputs(
    table: Float32, grid: Grid, head_dim: int, merge: tuple[int, int] = MERGE, max_frames: int = MAX_FRAMES
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of `vision` by name for one media item of `grid` (t, h, w).

    `table` is `vision_tower.patch_embed.pos_emb.weight` [H0, W0, D] as float32, `head_dim` the width of one attention
    head. Patches are in the order frame, row, column. Returns `position_embedding` float32 [P, D], `rope_cos` and
    `rope_sin` float32 [P, head_dim / 2], `merge_index` int32 [M, t, 4]. Raises `InputError` for a grid that MoonViT
    does not take.
    """
    require_grid(grid, merge=merge, max_frames=max_frames)
    rope_cos, rope_sin = rope_tables(grid, head_dim)
    return {
        "position_embedding": position_embedding(table, grid),
        "rope_cos": rope_cos,
        "rope_sin": rope_sin,
        "merge_index": merge_index(grid, merge),
    }


def require_grid(
    grid: Grid, *, merge: tuple[int, int] = MERGE, max_frames: int = MAX_FRAMES, where: str = "media: grid"
) -> None:
    """Raise `InputError` unless 1 <= t <= `max_frames` and h, w are multiples of `merge`, at most 512."""
    if len(grid) != 3:
        raise mismatch(where, expected="frames, rows and columns", found=grid)
    t, h, w = grid
    if not 1 <= t <= max_frames:
        raise mismatch(f"{where} {t}x{h}x{w}", expected=f"1 to {max_frames} frames", found=t)
    for name, size, step in (("rows", h, merge[0]), ("columns", w, merge[1])):
        if size < 1 or size > MAX_SIDE or size % step:
            raise mismatch(f"{where} {t}x{h}x{w}", expected=f"{name} in {step}..{MAX_SIDE}, even", found=size)


def position_embedding(table: Float32, grid: Grid) -> Float32:
    """float32 [P, D]: the table resized to (h, w), and for t > 1 a sinusoid of the frame added to each.

    Frame f adds [sin(f·w_0), …, cos(f·w_0), …] with w_i = 10000^(-2i/D); a single frame adds nothing.
    """
    t, h, w = grid
    spatial = bicubic_table(table, h, w).reshape(1, h * w, -1)
    if t > 1:
        spatial = spatial + temporal_sinusoids(t, table.shape[2])[:, None]
    return spatial.reshape(t * h * w, -1)


def temporal_sinusoids(frames: int, width: int) -> Float32:
    """float32 [frames, width]: sines, then cosines, of frame · 10000^(-2i/width)."""
    frequencies = _ROPE_BASE ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.arange(frames)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def bicubic_table(table: Float32, height: int, width: int) -> Float32:
    """The table [H0, W0, D] resized to [height, width, D] as `torch.nn.functional.interpolate(mode="bicubic")` does it.

    Half-pixel centres (`align_corners` false), no antialiasing, cubic coefficient -0.75, edges repeated.
    """
    if table.ndim != 3 or table.dtype != np.float32:
        raise InputError(f"position table: expected float32 [H, W, D], found {table.dtype} {list(table.shape)}")
    if table.shape[:2] == (height, width):
        return table
    columns: Float32 = np.matmul(_cubic_matrix(table.shape[1], width), table)
    rows: Float32 = _cubic_matrix(table.shape[0], height) @ columns.reshape(table.shape[0], -1)
    return rows.reshape(height, width, -1)


def _cubic_matrix(size: int, new_size: int) -> Float32:
    """float32 [new_size, size]: row i holds the weights of the old samples in new sample i.

    Rounded as PyTorch's kernel rounds: coordinates and weights in float32 by fused multiply-adds. Rounded otherwise,
    weights would be off by up to 2e-6.
    """
    scale = np.float32(size) / np.float32(new_size)
    places = _fused(scale, np.arange(new_size, dtype=np.float32) + np.float32(0.5), -0.5)
    first = np.floor(places)
    left = places - first
    right = np.float32(1) - left
    weights = (_far(left + np.float32(1)), _near(left), _near(right), _far(right + np.float32(1)))
    matrix = np.zeros((new_size, size), np.float32)
    for tap, weight in enumerate(weights):
        column = np.clip(first.astype(np.int64) + tap - 1, 0, size - 1)
        matrix[np.arange(new_size), column] += weight  # a clamped tap adds to its neighbour's weight
    return matrix


def _near(x: Float32) -> Float32:
    """Keys' cubic for distances up to 1: (a + 2)x^3 - (a + 3)x^2 + 1."""
    return _fused(_fused(_CUBIC + 2, x, -(_CUBIC + 3)) * x, x, 1)


def _far(x: Float32) -> Float32:
    """Keys' cubic for distances from 1 to 2: ax^3 - 5ax^2 + 8ax - 4a."""
    return _fused(_fused(_fused(_CUBIC, x, -5 * _CUBIC), x, 8 * _CUBIC), x, -4 * _CUBIC)


def _fused(a: Float32 | np.float32 | float, b: Float32, c: float) -> Float32:
    """a·b + c of float32 values with one rounding: the product is exact in float64."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def rope_tables(grid: Grid, head_dim: int) -> tuple[Float32, Float32]:
    """cos and sin, float32 [P, head_dim / 2]: pair 2i of a head turns by column · f_i, pair 2i + 1 by row · f_i.

    f_i = 10000^(-4i/head_dim); the same angles for every frame. Angles are rounded to float32, as the checkpoint's
    own code rounds them.
    """
    if head_dim % 4:
        raise mismatch("vision: head size", expected="a multiple of 4", found=head_dim)
    t, h, w = grid
    frequencies = (_ROPE_BASE ** (-np.arange(0, head_dim, 4, dtype=np.float64) / head_dim)).astype(np.float32)
    angles = np.empty((h, w, head_dim // 4, 2), np.float32)
    angles[..., 0] = (np.arange(w, dtype=np.float32)[:, None] * frequencies)[None]
    angles[..., 1] = (np.arange(h, dtype=np.float32)[:, None] * frequencies)[:, None]
    frame = angles.reshape(h * w, head_dim // 2)
    return np.tile(np.cos(frame), (t, 1)), np.tile(np.sin(frame), (t, 1))


def merge_index(grid: Grid, merge: tuple[int, int] = MERGE) -> Int32:
    """int32 [M, t, 4]: the patches that make one media token: of each frame a 2x2 block, row by row.

    Blocks are in row-major order; the component takes the mean over frames and puts the four vectors side by side.
    """
    t, h, w = grid
    rows, columns = merge
    patches = np.arange(t * h * w, dtype=np.int32).reshape(t, h // rows, rows, w // columns, columns)
    return np.ascontiguousarray(patches.transpose(1, 3, 0, 2, 4)).reshape(-1, t, rows * columns)
