"""Placeholders that become positions, what falls on a piece of them, and the cache of embeddings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25_plugins.errors import InputError
from k25_runtime.embedding_cache import EmbeddingCache
from k25_runtime.media_item import MediaItem, items_from_arrays
from k25_runtime.media_tokens import PlacedMedia, expanded_token_ids, joined_media

PAD = 99


def placed(positions: list[int]) -> PlacedMedia:
    """Embeddings that say which position they are for."""
    return PlacedMedia(
        positions=np.array(positions, np.int64), embeddings=np.array(positions, np.float32)[:, None] * [[1, 10]]
    )


def test_a_placeholder_becomes_as_many_as_the_item_has_tokens() -> None:
    ids, positions = expanded_token_ids([1, PAD, 2, PAD, PAD, 3], [3, 1, 2], PAD)
    assert ids == [1, PAD, PAD, PAD, 2, PAD, PAD, PAD, 3]
    assert positions.tolist() == [1, 2, 3, 5, 6, 7]


def test_ids_that_are_expanded_already_are_taken_as_they_are() -> None:
    once = expanded_token_ids([1, PAD, 2, PAD], [3, 2], PAD)
    again = expanded_token_ids(once[0], [3, 2], PAD)
    assert again[0] == once[0]
    assert np.array_equal(again[1], once[1])


@given(
    words=st.lists(st.integers(0, 50) | st.just(PAD), max_size=30),
    data=st.data(),
)
def test_nothing_else_is_moved(words: list[int], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(1, 6)) for word in words if word == PAD]
    ids, positions = expanded_token_ids(words, counts, PAD)
    assert [token for token in ids if token != PAD] == [word for word in words if word != PAD]
    assert [index for index, token in enumerate(ids) if token == PAD] == positions.tolist()
    assert len(positions) == sum(counts)


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([1, 2], [3], "expected 1 placeholders .* or 3, .* found 0"),
        ([1, PAD, PAD], [3], "expected 1 .* or 3, .* found 2"),
        ([PAD], [], "expected 0 .* found 1"),
        ([PAD], [2, 2], "expected 2 .* or 4, .* found 1"),
        ([PAD, PAD, 1, PAD], [3], "item 1: expected 3 placeholders in a row.*position 3"),
        ([PAD, 1, PAD, PAD, PAD, PAD], [2, 3], "item 1: expected 2"),
        ([PAD] * 3, [2], "found 3. A text that spells"),
    ],
)
def test_a_wrong_number_of_placeholders(ids: list[int], counts: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        expanded_token_ids(ids, counts, PAD)


@given(
    positions=st.sets(st.integers(0, 40)).map(sorted),
    cuts=st.sets(st.integers(1, 40), max_size=6).map(sorted),
)
def test_pieces_join_to_the_whole(positions: list[int], cuts: list[int]) -> None:
    edges = [0, *cuts, 41]
    whole = placed(positions)
    parts: Any = [(stop - start, whole.part(start, stop)) for start, stop in pairwise(edges)]
    for (start, stop), (_, part) in zip(pairwise(edges), parts, strict=True):
        assert all(0 <= position < stop - start for position in part.positions)
        assert np.array_equal(part.embeddings[:, 0], part.positions + start)
    joined = joined_media(parts)
    if not positions:
        assert joined is None
    else:
        assert joined is not None
        assert joined.positions.tolist() == positions
        assert np.array_equal(joined.embeddings, whole.embeddings)


def test_media_of_several_sequences_are_placed_behind_one_another() -> None:
    joined = joined_media([(4, placed([1, 2])), (3, None), (2, placed([0]))])
    assert joined is not None
    assert joined.positions.tolist() == [1, 2, 7]
    assert joined_media([(4, None)]) is None


# The cache.


def values(count: int) -> Any:
    return np.zeros((count, 1), np.float32)  # 4 bytes each


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(40)
    cache.put(b"a", values(4))
    cache.put(b"b", values(4))
    assert cache.get(b"a") is not None
    cache.put(b"c", values(4))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None
    assert (len(cache), cache.bytes) == (2, 32)


def test_what_is_kept_cannot_be_changed() -> None:
    cache = EmbeddingCache(40)
    cache.put(b"a", values(4))
    kept = cache.get(b"a")
    assert kept is not None
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


def test_a_cache_of_nothing_and_what_is_larger_than_the_cache() -> None:
    for limit in (0, 8):
        cache = EmbeddingCache(limit)
        cache.put(b"a", values(3))
        assert cache.get(b"a") is None
        assert cache.bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=40), st.integers(0, 60))
def test_the_limit_holds(puts: list[tuple[int, int]], limit: int) -> None:
    cache = EmbeddingCache(limit)
    for key, count in puts:
        cache.put(bytes([key]), values(count))
        assert cache.bytes <= limit
        found = [cache.get(bytes([number])) for number in range(6)]
        assert cache.bytes == sum(item.nbytes for item in found if item is not None)


# Items.


def test_the_key_is_the_content() -> None:
    pixels = np.random.default_rng(0).standard_normal((16, 3, 14, 14)).astype(np.float32)
    wide, tall = (MediaItem(pixel_values=pixels, grid=grid) for grid in ((1, 2, 8), (1, 8, 2)))
    changed = pixels.copy()
    changed[15, 2, 13, 13] += 1
    assert wide.key == MediaItem(pixel_values=pixels.copy(), grid=(1, 2, 8), kind="video", timestamp="1").key
    assert len({wide.key, tall.key, MediaItem(pixel_values=changed, grid=(1, 2, 8)).key}) == 3


def test_items_of_packed_patches() -> None:
    pixels = np.arange(20, dtype=np.float64)[:, None, None, None] * np.ones((1, 3, 14, 14))
    items = list(items_from_arrays(pixels, [[1, 2, 2], [4, 2, 2]]))
    assert [item.grid for item in items] == [(1, 2, 2), (4, 2, 2)]
    assert [item.tokens for item in items] == [1, 1]
    assert items[1].pixel_values[0, 0, 0, 0] == 4
    assert items[0].pixel_values.dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((4, 3, 14, 14), [[1, 2, 4]]),
        ((4, 3, 14, 14), [1, 2, 2]),
        ((4, 3, 14, 14), [[2, 2]]),
        ((4, 3, 14, 14), [[1.0, 2.0, 2.0]]),
        ((4, 3, 14, 14), [[-1, -2, 2]]),
        ((4, 588), [[1, 2, 2]]),
        ((4, 1, 14, 14), [[1, 2, 2]]),
        ((4, 3, 14, 15), [[1, 2, 2]]),
        ((3, 3, 14, 14), [[1, 1, 3]]),
        ((20, 3, 14, 14), [[5, 2, 2]]),
    ],
)
def test_patches_that_do_not_fit_their_grids(shape: tuple[int, ...], grids: Any) -> None:
    with pytest.raises(InputError, match="media: "):
        list(items_from_arrays(np.zeros(shape, np.float32), grids))


def test_patches_are_floating_point() -> None:
    with pytest.raises(InputError, match="uint8"):
        list(items_from_arrays(np.zeros((4, 3, 14, 14), np.uint8), [[1, 2, 2]]))
