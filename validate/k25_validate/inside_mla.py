"""The stages of `k25.MLA`: rotation, cache rows, absorbed query, one token's scores and values, output.

Legend: T tokens, N heads, R latent rank, C cache columns, S places of the context that the block table spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from k25_runtime.host_tensor import HostTensor
from k25_validate.bisect_walk import Step
from k25_validate.graph_prefix import iteration_model
from k25_validate.inside_op import BodyRunner, StageFault, first_stage_fault, stage_expected
from k25_validate.plain_taps import MlaSpan, PlainTaps, Taps

Array = npt.NDArray[Any]


def mla_stage_fault(
    bodies: BodyRunner,
    plain: PlainTaps,
    layer: int,
    body: onnx.ModelProto,
    feeds: Mapping[str, HostTensor],
    step: Step,
    past: Sequence[Array],
) -> tuple[StageFault | None, int | None]:
    """The first stage that is off and, where it is inside the loop over tokens, the token (a row of the step).

    `past` are the cache rows [S, C] of each sequence before the step.
    """
    q, latent = feeds["q"].to_float32(), feeds["latent"].to_float32()
    starts = [int(start) for start in step.batch.query_start]
    spans = [MlaSpan(rows=slice(starts[i], starts[i + 1]), past=rows) for i, rows in enumerate(past)]
    positions = np.concatenate([np.arange(span.start, span.stop) for span in step.spans])
    stages = plain.mla(layer, q, latent, positions, spans)
    cache = _cache_after(feeds["cache"].to_float32(), step, stages["new_rows"])
    expected = {**stages, **_places(step, positions, cache.shape[1]), "cache_out": cache}
    fault = first_stage_fault(bodies, body, feeds, stage_expected(expected))
    if fault is None or fault.op != "Loop":
        return fault, None
    token = _worst_row(fault, stages["z"])
    model = iteration_model(fault.graph, fault.node)
    number = HostTensor(np.array(token, np.int64), "int64")
    inner = _token_stages(plain, stages, cache, step, token, int(positions[token]))
    names = [value.name for value in model.graph.input]
    index = next(name for name in names if name not in feeds)
    found = first_stage_fault(bodies, model, {**feeds, index: number}, stage_expected({**expected, **inner}))
    return (fault, token) if found is None else (replace(found, path=("each_token",)), token)


def _worst_row(fault: StageFault, expected: Array) -> int:
    values = np.asarray(fault.transition.after.values[fault.transition.tensor], np.float64)
    if values.shape != expected.shape or fault.transition.tensor != "z":
        return 0
    errors = np.abs(values - expected).reshape(len(expected), -1).max(axis=1)
    return int(np.where(np.isfinite(errors), errors, np.inf).argmax())


def _places(step: Step, positions: Array, block_size: int) -> Taps:
    """Where each token's row belongs: integers [T] and pairs [T, 2], as the block table says."""
    starts = step.batch.query_start
    sequence = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    block = step.batch.block_table[sequence, positions // block_size]
    slot = positions % block_size
    return {
        "position": positions,
        "sequence": sequence,
        "block_index": positions // block_size,
        "block": block,
        "slot": slot,
        "where": np.stack([block, slot], axis=1),
    }


def _cache_after(cache: Array, step: Step, rows: Array) -> Array:
    after = cache.astype(np.float64)
    positions = np.concatenate([np.arange(span.start, span.stop) for span in step.spans])
    where = _places(step, positions, cache.shape[1])["where"]
    after[where[:, 0], where[:, 1]] = rows
    return after


def _token_stages(plain: PlainTaps, stages: Taps, cache: Array, step: Step, token: int, position: int) -> Taps:
    """One turn of the loop: what is hidden holds zeros, and gets no share."""
    sequence = int(np.searchsorted(step.batch.query_start, token, side="right")) - 1
    blocks = step.batch.block_table[sequence]
    all_rows = cache[blocks].reshape(-1, cache.shape[2])
    is_hidden = np.arange(len(all_rows)) > position
    context = np.where(is_hidden[:, None], 0.0, all_rows)
    seen = plain.mla_token(stages["query"][token], context[: position + 1])
    hidden = ((0, 0), (0, int(is_hidden.sum())))
    padded = {name: np.pad(seen[name], hidden) for name in ("dots", "scaled", "probabilities")}
    return padded | {
        "sequence_token": np.array(sequence),
        "position_token": np.array(position),
        "blocks_token": blocks,
        "all_rows": all_rows,
        "is_hidden": is_hidden,
        "context": context,
        "query_token": stages["query"][token],
        "mixed": seen["mixed"],
        "z_token": seen["z_token"],
    }
