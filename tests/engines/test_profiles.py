"""Options become limits, limits become profiles by the names of axes; what is out of range is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from k25_engines.engine_options import (
    DIMENSION_LIMIT,
    EngineOptions,
    Limits,
    limits_from_options,
    needed_expert_rows,
)
from k25_engines.profiles import AXES, profiles_for
from k25_export.manifest import Manifest, Port, read_manifest
from k25_plugins.errors import InputError

LIMITS = Limits(
    max_sequences=3, max_tokens=50, max_rows=7, block_size=16, blocks_per_sequence=5, blocks=11,
    expert_rows=100, max_expert_rows=1000, max_patches=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(exported: Any) -> Manifest:
    return read_manifest(exported.bundle)


def port(name: str, *shape: int | str) -> Port:
    return Port(name=name, dtype="int32", shape=shape)


def test_decode_and_prefill() -> None:
    ports = (port("token_ids", "tokens"), port("query_start", "sequences + 1"), port("weight", 8, 8))
    decode, prefill = profiles_for("embed", ports, LIMITS)
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert decode.shapes == {"token_ids": ((1,), (3,), (3,)), "query_start": ((2,), (4,), (4,))}
    assert prefill.shapes == {"token_ids": ((1,), (50,), (50,)), "query_start": ((2,), (2,), (4,))}


def test_paged_cache_and_experts() -> None:
    ports = (port("cache", "blocks", "block_size", 40), port("expert_words", "expert_rows", 2), port("t", "tokens"))
    decode, prefill = profiles_for("moe_layer", ports, LIMITS)
    assert decode.shapes["cache"] == prefill.shapes["cache"] == ((1, 16, 40), (11, 16, 40), (11, 16, 40))
    assert decode.shapes["expert_words"] == ((1, 2), (100, 2), (1000, 2))


def test_where_decode_and_prefill_are_the_same_there_is_one() -> None:
    ports = (port("pixel_values", "patches", 3, 14, 14), port("merge_index", "media_tokens", "frames", 4))
    (profile,) = profiles_for("vision", ports, LIMITS)
    assert profile.name == "prefill"
    assert profile.shapes["pixel_values"][2] == (64, 3, 14, 14)
    assert profile.shapes["merge_index"] == ((1, 1, 4), (16, 1, 4), (16, 4, 4))


def test_fixed_shapes_need_no_profile() -> None:
    assert profiles_for("embed", (port("weight", 8, 8),), LIMITS) == ()


def test_an_axis_that_nobody_thought_of_is_refused() -> None:
    with pytest.raises(InputError, match=r"component embed: input x: axis: expected .*tokens.*, found 'heads'"):
        profiles_for("embed", (port("x", "heads"),), LIMITS)


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_is_a_range_in_both_profiles(axis: str) -> None:
    for low, usual, high in AXES[axis](LIMITS):
        assert 1 <= low <= usual <= high < DIMENSION_LIMIT


def test_every_component_of_a_bundle_has_profiles(manifest: Manifest) -> None:
    limits = limits_from_options(EngineOptions(), manifest)
    for component in manifest.components:
        for file in component.files:
            profiles = profiles_for(component.name, file.inputs, limits)
            dynamic = {item.name for item in file.inputs if any(isinstance(axis, str) for axis in item.shape)}
            assert profiles
            for profile in profiles:
                assert profile.shapes.keys() == dynamic


def test_defaults_take_what_the_bundle_needs(manifest: Manifest) -> None:
    limits = limits_from_options(EngineOptions(block_size=10), manifest)
    context = manifest.model.text.max_position_embeddings
    assert limits.blocks_per_sequence == -(-context // 10)
    assert limits.blocks == 8 * limits.blocks_per_sequence
    assert limits.expert_rows == needed_expert_rows(manifest) <= limits.max_expert_rows
    text = manifest.model.text
    packed = 3 * text.n_routed_experts * text.hidden_size * text.moe_intermediate_size // 2
    scales = packed * 4 // manifest.model.quantization.group_size
    assert needed_expert_rows(manifest) * 8 >= packed + scales


def test_a_few_blocks_for_a_short_context(manifest: Manifest) -> None:
    limits = limits_from_options(EngineOptions(context=33, block_size=16, blocks=3, max_tokens=9), manifest)
    assert (limits.blocks_per_sequence, limits.blocks, limits.max_rows) == (3, 3, 9)


OUT_OF_RANGE: dict[str, dict[str, Any]] = {
    "--max-sequences": {"max_sequences": 0},
    "--max-tokens": {"max_tokens": 0},
    "--max-rows": {"max_rows": 0},
    "--block-size": {"block_size": 0},
    "--context": {"context": 1 << 30},
    "--blocks": {"context": 64, "block_size": 16, "blocks": 3},
    "--max-expert-rows": {"max_expert_rows": 1},
    "--max-patches": {"max_patches": 3},
}


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_sizes_out_of_range_are_refused(manifest: Manifest, option: str) -> None:
    with pytest.raises(InputError, match=rf"^{option}: expected .* to .*, found \d"):
        limits_from_options(EngineOptions(**OUT_OF_RANGE[option]), manifest)


@pytest.mark.parametrize(
    "field", ["max_sequences", "max_tokens", "max_rows", "block_size", "blocks", "max_expert_rows"]
)
@pytest.mark.parametrize("value", [-1, 1 << 31, 1 << 70])
def test_sizes_that_tensorrt_cannot_hold_are_refused(manifest: Manifest, field: str, value: int) -> None:
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')}"):
        limits_from_options(replace(EngineOptions(), **{field: value}), manifest)
