"""Logits of one prompt as figures of its rows: what a report keeps of them, since logits of a real vocabulary are
large.

Legend: T rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_validate.agreement import top1_disagreements
from k25_validate.metrics import kl_divergence_of_rows, log_softmax, top_indices
from k25_validate.parity_walk import PromptLogits, relative_l2_of_rows
from k25_validate.prompts import Prompt
from k25_validate.report_rows import LogitsSummary, PassageRow, PromptRow, WorstPosition
from k25_validate.tolerances import TOP1_TIE

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

TOP = 5
SHOWN_POSITIONS = 12
_ROWS_AT_ONCE = 16
_TOKENS_BEFORE = 8


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """Of each row of one prompt's logits, the bundle's prefill against the reference.

    `own_rank` is the place of the reference's first choice in the bundle; probabilities are those of each side's own
    first choice; `nll` of the token that follows (NaN for the last row).
    """

    kl: Float64
    shared_top: Ids
    reordered: npt.NDArray[np.bool_]
    expected_choice: Ids
    own_choice: Ids
    own_rank: Ids
    expected_probability: Float64
    own_probability: Float64
    expected_nll: Float64
    own_nll: Float64


@dataclass(frozen=True, kw_only=True)
class PromptFigures:
    """One prompt: what each way of running it is off, and its rows.

    `disagreements` and `decode_disagreements` are rows (of the prompt) whose first choice differs beyond a tie.
    `squared_error` and `squared_norm` are sums over the rows that are kept, `logits_rms` the reference's root mean
    square.
    """

    row: PromptRow
    rows: RowFigures
    kept: npt.NDArray[np.bool_]
    disagreements: Ids
    decode_disagreements: Ids
    squared_error: float
    squared_norm: float
    logits_rms: float


def figures_of_prompt(prompt: Prompt, logits: PromptLogits) -> PromptFigures:
    """All that the checks and the report need of a prompt's logits."""
    kept, first = logits.kept, len(prompt.prompt_ids) - 1
    expected, own = logits.expected, logits.own
    decoded = None if logits.decoded is None else (logits.decoded, expected[first:], own[first:], kept[first:])
    decode_rows: Ids = np.empty(0, np.int64)
    if decoded is not None:
        found = top1_disagreements(decoded[0][kept[first:]], expected[first:][kept[first:]], margin=TOP1_TIE)
        decode_rows = first + np.flatnonzero(kept[first:])[found]
    disagree = np.flatnonzero(kept)[top1_disagreements(own[kept], expected[kept], margin=TOP1_TIE)]
    error, norm, rms = _sums(own, expected, kept)

    def to_own(actual: Float32 | None) -> float | None:
        return None if actual is None else relative_l2_of_rows(actual, own, kept)

    return PromptFigures(
        row=PromptRow(
            name=prompt.name,
            prompt_tokens=len(prompt.prompt_ids),
            decoded_tokens=len(prompt.next_ids),
            pictures=tuple(placed.sample.name for placed in prompt.media),
            prefill=relative_l2_of_rows(own, expected, kept),
            decode=None if decoded is None else relative_l2_of_rows(decoded[0], decoded[1], decoded[3]),
            decode_to_prefill=None if decoded is None else relative_l2_of_rows(decoded[0], decoded[2], decoded[3]),
            batch_to_alone=to_own(logits.batched),
            cached_to_cold=to_own(logits.resumed),
            behind_ties=int((~kept).sum()),
        ),
        rows=_row_figures(prompt.token_ids, own, expected),
        kept=kept,
        disagreements=disagree,
        decode_disagreements=decode_rows,
        squared_error=error,
        squared_norm=norm,
        logits_rms=rms,
    )


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in range(0, rows, _ROWS_AT_ONCE)]


def _sums(own: Float32, expected: Float32, kept: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Squared norms of error and reference over the rows kept, and the reference's root mean square."""
    error = norm = 0.0
    for rows in _chunks(len(own)):
        right = expected[rows][kept[rows]].astype(np.float64)
        with np.errstate(invalid="ignore"):
            left = own[rows][kept[rows]] - right
        error += float(np.square(left).sum()) if np.isfinite(left).all() else math.inf
        norm += float(np.square(right).sum())
    return error, norm, math.sqrt(norm / max(int(kept.sum()) * own.shape[1], 1))


def _row_figures(token_ids: Sequence[int], own: Float32, expected: Float32) -> RowFigures:
    parts = [_figures_of_rows(token_ids[1:], own, expected, rows) for rows in _chunks(len(own))]
    return RowFigures(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _figures_of_rows(
    next_ids: Sequence[int], own: Float32, expected: Float32, rows: slice
) -> dict[str, npt.NDArray[np.generic]]:
    """The columns of `RowFigures` for these rows."""
    left, right = own[rows].astype(np.float64), expected[rows].astype(np.float64)
    top = min(TOP, left.shape[1])
    is_finite = np.isfinite(left).all(axis=1) & np.isfinite(right).all(axis=1)
    figures: dict[str, npt.NDArray[np.generic]] = {"kl": kl_divergence_of_rows(left, right)}
    left[~is_finite], right[~is_finite] = 0.0, 0.0
    first_own = np.stack([top_indices(row, top) for row in left])
    first_expected = np.stack([top_indices(row, top) for row in right])
    choice, own_choice = first_expected[:, 0], first_own[:, 0]
    index = np.arange(len(left))
    logs, own_logs = log_softmax(right), log_softmax(left)
    shared = [len(np.intersect1d(a, b)) for a, b in zip(first_own, first_expected, strict=True)]
    targets = np.array([*next_ids, -1][rows])
    has_target = targets >= 0

    def nll(log_probabilities: Float64) -> Float64:
        found = np.where(has_target, -log_probabilities[index, targets], np.nan)
        return np.where(is_finite | ~has_target, found, np.inf)

    return figures | {
        "shared_top": np.where(is_finite, shared, 0),
        "reordered": (first_own != first_expected).any(axis=1) | ~is_finite,
        "expected_choice": choice,
        "own_choice": np.where(is_finite, own_choice, -1),
        "own_rank": np.where(is_finite, (left > left[index, choice][:, None]).sum(axis=1), left.shape[1]),
        "expected_probability": np.exp(logs[index, choice]),
        "own_probability": np.where(is_finite, np.exp(own_logs[index, own_choice]), np.nan),
        "expected_nll": nll(logs),
        "own_nll": nll(own_logs),
    }


def relative_l2_of_prompts(figures: Sequence[PromptFigures]) -> float:
    """Relative L2 over all rows of all prompts that are kept."""
    error, norm = sum(item.squared_error for item in figures), sum(item.squared_norm for item in figures)
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm and math.isfinite(error) else math.inf


def logits_rms_of_prompts(figures: Sequence[PromptFigures]) -> float:
    """Root mean square of the reference's logits over all rows that are kept."""
    rows = [(item.logits_rms**2, int(item.kept.sum())) for item in figures]
    return math.sqrt(sum(square * count for square, count in rows) / max(sum(count for _, count in rows), 1))


def passage_row(prompt: Prompt, figures: PromptFigures) -> PassageRow:
    """Perplexity of both over the tokens that are not behind a router tie. `is_passage` prompts have one token or
    more.
    """
    kept = figures.kept[:-1]
    expected, own = (
        float(np.where(kept, nll[:-1], 0.0).sum() / max(int(kept.sum()), 1))
        for nll in (figures.rows.expected_nll, figures.rows.own_nll)
    )
    return PassageRow(
        name=prompt.name,
        tokens=int(kept.sum()),
        reference_nll=expected,
        bundle_nll=own,
        reference_perplexity=_exp(expected),
        bundle_perplexity=_exp(own),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def logits_summary(
    prompts: Sequence[Prompt], figures: Sequence[PromptFigures], text_of: Callable[[Sequence[int]], str]
) -> LogitsSummary | None:
    """Over all rows that are kept; None where there is none. `text_of` writes token ids for people."""
    total = sum(int(item.kept.sum()) for item in figures)
    if not total:
        return None

    def column(of: Callable[[RowFigures], npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
        return np.concatenate([of(item.rows)[item.kept] for item in figures])

    kl = column(lambda rows: rows.kl).astype(np.float64)
    same = column(lambda rows: rows.own_choice == rows.expected_choice)
    places = [(at, int(row)) for at, item in enumerate(figures) for row in np.flatnonzero(item.kept)]
    worst = sorted(range(total), key=lambda index: -kl[index])[:SHOWN_POSITIONS]
    return LogitsSummary(
        rows=total,
        relative_l2=relative_l2_of_prompts(figures),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        top5_agreement=float(column(lambda rows: rows.shared_top).mean() / TOP),
        top5_reordered=int(column(lambda rows: rows.reordered).sum()),
        worst_rank=int(column(lambda rows: rows.own_rank).max()),
        worst=tuple(
            _position(prompts[at], figures[at].rows, row, text_of) for at, row in (places[index] for index in worst)
        ),
    )


def _position(prompt: Prompt, rows: RowFigures, row: int, text_of: Callable[[Sequence[int]], str]) -> WorstPosition:
    ids = prompt.token_ids
    return WorstPosition(
        prompt=prompt.name,
        position=row,
        before=text_of(ids[max(row - _TOKENS_BEFORE, 0) : row]),
        token=text_of(ids[row : row + 1]),
        kl=float(rows.kl[row]),
        reference_choice=text_of([int(rows.expected_choice[row])]),
        reference_probability=float(rows.expected_probability[row]),
        bundle_choice="not finite" if rows.own_choice[row] < 0 else text_of([int(rows.own_choice[row])]),
        bundle_probability=float(rows.own_probability[row]),
        rank=int(rows.own_rank[row]),
    )
