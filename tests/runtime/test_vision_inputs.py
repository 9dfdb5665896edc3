"""Inputs of the `vision` component against PyTorch's bicubic resize and transformers' own tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_plugins.errors import InputError
from k25_runtime.vision_inputs import bicubic_table, rope_tables, temporal_sinusoids, vision_inputs

SAME = 1e-6
GRIDS = [(1, 2, 2), (1, 4, 26), (1, 36, 46), (1, 130, 78), (2, 10, 14), (3, 6, 2), (4, 8, 12)]


def random_table(height: int, width: int, channels: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((height, width, channels)).astype(np.float32)


def torch_resized(table: Any, height: int, width: int, mode: str = "bicubic") -> Any:
    image = torch.from_numpy(table).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(image, size=(height, width), mode=mode)
    return resized.squeeze(0).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(64, 64), (10, 14), (1, 3)])
@pytest.mark.parametrize("new_size", [(2, 2), (36, 46), (78, 138), (64, 64), (130, 130), (64, 62), (2, 512)])
def test_the_table_is_resized_as_torch_resizes_it(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    table = random_table(*size, 12)
    found = bicubic_table(table, *new_size)
    assert (found.dtype, found.shape) == (np.float32, (*new_size, 12))
    assert np.abs(found - torch_resized(table, *new_size)).max() <= SAME * np.abs(table).max()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)), new_size=st.tuples(st.integers(1, 140), st.integers(1, 140))
)
def test_any_sizes(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    table = random_table(*size, 3)
    difference = np.abs(bicubic_table(table, *new_size) - torch_resized(table, *new_size)).max()
    assert difference <= SAME * np.abs(table).max()


def test_the_bilinear_shortcut_would_be_seen() -> None:
    table = random_table(10, 14, 3)
    bilinear = torch_resized(table, 20, 22, mode="bilinear")
    assert np.abs(bicubic_table(table, 20, 22) - bilinear).max() > 0.1


def test_a_table_of_its_own_size_is_taken_as_it_is() -> None:
    table = random_table(12, 10, 5)
    assert np.array_equal(bicubic_table(table, 12, 10), table)


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_those_of_transformers(grid: tuple[int, int, int]) -> None:
    """The table is square here: transformers takes no other."""
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionPositionEmbeddings

    module = Kimi_K25VisionPositionEmbeddings(vision_config())
    module.position_embeddings.data = torch.from_numpy(random_table(16, 16, 32))
    expected = module(torch.zeros(grid[0] * grid[1] * grid[2], 32), torch.tensor([grid])).detach().numpy()
    table = module.position_embeddings.detach().numpy()
    found = vision_inputs(table, grid, head_dim=16)["position_embedding"]
    assert found.shape == expected.shape
    # Its weights are computed in another order: a coordinate's rounding shows, at most 130 · 2^-23.
    assert np.abs(found - expected).max() < 2e-5 * np.abs(table).max()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("head_dim", [16, 72])
def test_angles_are_those_of_transformers(grid: tuple[int, int, int], head_dim: int) -> None:
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionRotaryEmbedding
    from transformers.vision_utils import get_vision_position_ids

    rotary = Kimi_K25VisionRotaryEmbedding(vision_config(head_dim))
    positions = get_vision_position_ids(torch.tensor([grid]), spatial_merge_size=1)
    cos, sin = rotary(torch.zeros(1), positions)
    found_cos, found_sin = rope_tables(grid, head_dim)
    half = head_dim // 2
    assert np.abs(found_cos - cos[:, :half].numpy()).max() < 2e-5  # 1 ulp of a frequency times 130
    assert np.abs(found_sin - sin[:, :half].numpy()).max() < 2e-5


def test_columns_turn_even_pairs_and_rows_odd_ones() -> None:
    cos, _ = rope_tables((1, 4, 6), 8)
    angles = np.arccos(cos).reshape(4, 6, 4)
    assert np.allclose(angles[:, 1, 0], 1)
    assert np.allclose(angles[1, :, 1], 1)
    assert np.allclose(angles[:, 1, 2], 0.01, atol=1e-4)
    assert np.allclose(angles[0, :, 1], 0)


@pytest.mark.parametrize("grid", GRIDS)
def test_merge_indices_are_those_of_transformers(grid: tuple[int, int, int]) -> None:
    from transformers.models.kimi_k25.modeling_kimi_k25 import get_vision_temporal_merge_index

    found = vision_inputs(random_table(4, 4, 8), grid, head_dim=8)["merge_index"]
    assert found.dtype == np.int32
    assert np.array_equal(found, get_vision_temporal_merge_index(torch.tensor([grid]), 2, 2).numpy())


def test_the_first_frame_of_several_is_moved_too() -> None:
    """For t > 1 frame 0 gets [0..., 1...]; for t = 1 nothing is added."""
    table = random_table(4, 4, 8)
    one = vision_inputs(table, (1, 4, 4), head_dim=8)["position_embedding"]
    two = vision_inputs(table, (2, 4, 4), head_dim=8)["position_embedding"]
    assert np.allclose(two[:16] - one, [0] * 4 + [1] * 4)
    assert np.allclose(two[16:] - one, temporal_sinusoids(2, 8)[1], atol=1e-6)


@pytest.mark.parametrize("grid", [(0, 2, 2), (5, 2, 2), (1, 3, 2), (1, 2, 5), (1, 0, 2), (1, 514, 2), (1, 2)])
def test_a_grid_that_the_model_does_not_take(grid: Any) -> None:
    with pytest.raises(InputError, match="media: grid"):
        vision_inputs(random_table(4, 4, 8), grid, head_dim=8)


def vision_config(head_dim: int = 16) -> Any:
    from transformers import Kimi_K25Config

    return Kimi_K25Config(
        vision_config={
            "hidden_size": 2 * head_dim,
            "num_attention_heads": 2,
            "pos_emb_height": 16,
            "pos_emb_width": 16,
            "pos_emb_time": 4,
        }
    ).vision_config
