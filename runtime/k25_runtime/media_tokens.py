"""Where media stand among the tokens of a prompt: one placeholder becomes as many positions as the item has tokens.

Legend: T tokens, M positions of media, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import InputError

Float32 = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PlacedMedia:
    """`embeddings` float32 [M, H] replace the hidden states at `positions` [M], which rise, among some tokens."""

    positions: Positions
    embeddings: Float32

    def part(self, start: int, stop: int) -> PlacedMedia:
        """What falls on tokens `start` to `stop`, with positions counted from `start`."""
        first, end = np.searchsorted(self.positions, [start, stop])
        return PlacedMedia(positions=self.positions[first:end] - start, embeddings=self.embeddings[first:end])


def joined_media(parts: Sequence[tuple[int, PlacedMedia | None]]) -> PlacedMedia | None:
    """Media of (number of tokens, media) parts that are put one behind the other; None where none has any."""
    if all(media is None for _, media in parts):
        return None
    starts = np.cumsum([0, *(count for count, _ in parts)])
    found = [(start, media) for start, (_, media) in zip(starts[:-1], parts, strict=True) if media is not None]
    found = [(start, media) for start, media in found if len(media.positions)]
    if not found:
        return None
    return PlacedMedia(
        positions=np.concatenate([start + media.positions for start, media in found]),
        embeddings=np.concatenate([media.embeddings for _, media in found]),
    )


def expanded_token_ids(
    token_ids: Sequence[int], counts: Sequence[int], placeholder: int
) -> tuple[list[int], Positions]:
    """(token ids with room for every item, positions [M] of the media among them).

    `counts` are the tokens of each item. The ids hold either one `placeholder` for each item, or, already expanded,
    as many in a row as the item has tokens. Raises `InputError` for any other number of them.
    """
    ids = list(token_ids)
    places = [index for index, token in enumerate(ids) if token == placeholder]
    if len(places) == len(counts):
        return _with_room(ids, places, counts)
    if len(places) == sum(counts):
        _require_runs(places, counts)
        return ids, np.array(places, np.int64)
    raise InputError(
        f"media: expected {len(counts)} placeholders (token {placeholder}), one for each item, or {sum(counts)}, one "
        f"for each of their tokens; found {len(places)}. A text that spells <|media_pad|> counts, too."
    )


def _with_room(ids: list[int], places: list[int], counts: Sequence[int]) -> tuple[list[int], Positions]:
    expanded: list[int] = []
    positions: list[int] = []
    copied = 0
    for place, count in zip(places, counts, strict=True):
        expanded += ids[copied:place]
        positions += range(len(expanded), len(expanded) + count)
        expanded += [ids[place]] * count
        copied = place + 1
    return expanded + ids[copied:], np.array(positions, np.int64)


def _require_runs(places: list[int], counts: Sequence[int]) -> None:
    start = 0
    for number, count in enumerate(counts, start=1):
        run = places[start : start + count]
        gap = next((after for before, after in pairwise(run) if after != before + 1), None)
        if gap is not None:
            raise InputError(
                f"media: item {number}: expected {count} placeholders in a row, as many as it has tokens, found other "
                f"tokens before position {gap}"
            )
        start += count
