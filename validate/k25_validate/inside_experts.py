"""The experts of `k25.MoEDispatch`, one by one: which of them is off, and in which of its stages.

Legend: T tokens, H hidden, E experts, K experts a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from k25_plugins.signatures import EXPERT_TABLE_COLUMNS, REGION_ROW_BYTES
from k25_runtime.host_tensor import HostTensor
from k25_validate.component_probe import ComponentProbe
from k25_validate.graph_prefix import StraightGraph, body_model, branch_model, iteration_model
from k25_validate.inside_op import BodyRunner, StageFault, body_of, first_stage_fault, stage_expected
from k25_validate.metrics import relative_l2
from k25_validate.plain_taps import LAYER_PREFIX, PlainTaps, Taps
from k25_validate.prefix_search import Expected
from k25_validate.reproducer import Reproducer

Array = npt.NDArray[Any]

#: Tokens that an expert is tried on.
TRIED_TOKENS = 4
_INPUTS = ("x", "expert_ids", "expert_weights", "words", "scales", "table")


class ExpertSearch:
    """`operands` are the op's inputs, in its order."""

    def __init__(
        self,
        *,
        graph: StraightGraph,
        node: onnx.NodeProto,
        operands: Sequence[HostTensor],
        probe: ComponentProbe,
        bodies: BodyRunner,
        plain: PlainTaps,
        layer: int,
        tolerance: float,
    ) -> None:
        self._graph = graph
        self._node = node
        self._operands = dict(zip(_INPUTS, operands, strict=True))
        self._probe = probe
        self._bodies = bodies
        self._plain = plain
        self._layer = layer
        self._tolerance = tolerance
        self._x = operands[0].to_float32()
        self._ids = operands[1].array

    def guilty_experts(self, expected: Expected) -> list[int]:
        """The experts that are off when each runs alone, those of the worst tokens first."""
        return [
            expert for expert in self._candidates(expected) if self._error(expert, self._run(expert)) > self._tolerance
        ]

    def is_body_right(self, expert: int) -> bool:
        """Whether the function body computes this expert as the formulas do."""
        body = body_of(self._graph.model, self._node, list(self._alone(expert).values()))
        assert body is not None
        return self._error(expert, self._bodies.run(*body)["y"]) <= self._tolerance

    def stage_fault(self, expert: int) -> StageFault | None:
        """The first stage of this expert that is off, with weight 1 for each of its tokens."""
        return self._stage_fault(expert, self._alone(expert))

    def summation_fault(self, expected: Expected) -> StageFault | None:
        """The first stage that is off with the tokens' own experts and weights, for the expert of the worst token."""
        candidates = self._candidates(expected)
        return self._stage_fault(candidates[0], self._operands) if candidates else None

    def reproducer(self, expert: int) -> Reproducer:
        """The op with one expert held: its six tensors, as bound, in a region of their own."""
        inputs = {**self._alone(expert), **self._region_of(expert)}
        names = dict(zip(_INPUTS, self._node.input, strict=True))
        return Reproducer(
            model=self._model(),
            inputs={names[key]: value for key, value in inputs.items()},
            expected={self._node.output[0]: self._expected(expert)},
            tolerance=self._tolerance,
        )

    def _candidates(self, expected: Expected) -> list[int]:
        """Experts in use, by how many of the tokens that are off they serve."""
        actual = self._probe.run(
            self._model(),
            self._feeds(self._operands),
            {self._node.output[0]: self._x.shape},
        )[self._node.output[0]]
        error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected.raw, np.float64)).max(axis=1)
        size = np.abs(np.asarray(expected.raw)).max()
        is_off = ~(error <= self._tolerance * size)  # NaN counts as off
        if not is_off.any():
            is_off[int(error.argmax())] = True
        counts = Counter(self._ids[is_off].reshape(-1).tolist())
        shares = {expert: count / int((self._ids == expert).sum()) for expert, count in counts.items()}
        return sorted(counts, key=lambda expert: (-shares[expert], -counts[expert], expert))

    def _tokens(self, expert: int) -> Array:
        return np.flatnonzero((self._ids == expert).any(axis=1))[:TRIED_TOKENS]

    def _alone(self, expert: int) -> dict[str, HostTensor]:
        tokens = self._tokens(expert)
        return {
            **self._operands,
            "x": HostTensor(np.ascontiguousarray(self._x[tokens]), "float32"),
            "expert_ids": HostTensor(np.full((len(tokens), 1), expert, np.int32), "int32"),
            "expert_weights": HostTensor(np.ones((len(tokens), 1), np.float32), "float32"),
        }

    def _run(self, expert: int) -> Array:
        inputs = self._alone(expert)
        output = self._node.output[0]
        return self._probe.run(self._model(), self._feeds(inputs), {output: inputs["x"].array.shape})[output]

    def _model(self) -> onnx.ModelProto:
        index = self._graph.producers[self._node.output[0]]
        return self._graph.segment(self._graph.nodes[index].output, set(self._node.input))

    def _feeds(self, inputs: Mapping[str, HostTensor]) -> dict[str, HostTensor]:
        return dict(zip(self._node.input, inputs.values(), strict=True))

    def _expected(self, expert: int) -> Array:
        return self._plain.expert(self._layer, expert, self._x[self._tokens(expert)])["down_proj"]

    def _error(self, expert: int, found: Array) -> float:
        return relative_l2(found, self._expected(expert))

    def _stage_fault(self, expert: int, inputs: Mapping[str, HostTensor]) -> StageFault | None:
        body = body_of(self._graph.model, self._node, list(inputs.values()))
        assert body is not None
        model, feeds = body
        outer = StraightGraph(model)
        loop = next(index for index, node in enumerate(outer.nodes) if node.op_type == "Loop")
        turn = StraightGraph(iteration_model(outer, loop))
        branch = next((index for index, node in enumerate(turn.nodes) if node.op_type == "If"), None)
        straight = turn.model if branch is None else branch_model(turn, branch)
        extra = [value.name for value in straight.graph.input if value.name not in feeds]
        x = inputs["x"].to_float32()
        carried = {name: HostTensor(np.zeros(x.shape, np.float32), "float32") for name in extra[1:]}
        number = HostTensor(np.array(expert, np.int64), "int64")
        stages = self._stages(expert, x, inputs)
        fault = first_stage_fault(
            self._bodies, straight, {**feeds, extra[0]: number, **carried}, stage_expected(stages)
        )
        if fault is None:
            return None
        if fault.op == "DequantizeInt4":
            inner = self._dequantize_fault(fault, expert)
            if inner is not None:
                return replace(inner, path=("each_expert", fault.transition.tensor))
        return replace(fault, path=("each_expert",))

    def _stages(self, expert: int, x: Array, inputs: Mapping[str, HostTensor]) -> Taps:
        found = self._plain.expert(self._layer, expert, x)
        ids, weights = inputs["expert_ids"].array, inputs["expert_weights"].array
        share = np.where(ids == expert, weights, 0.0).sum(axis=1, keepdims=True, dtype=np.float64)
        weighted = found["down_proj"] * share
        stages = {f"{name}_weight": found[f"{name}.weight"] for name in ("gate", "up", "down")}
        stages |= {f"{name}_weight_t": found[f"{name}.weight"].T for name in ("gate", "up", "down")}
        chosen = (ids == expert).astype(np.float64)
        return stages | {
            "x_float": x.astype(np.float64),
            "chosen_float": chosen,
            "chosen_weights": chosen * weights,
            "chosen_token_float": chosen.max(axis=1, keepdims=True),
            "weight_of_token": share,
            "gate": found["gate_proj"],
            "gate_sigmoid": 1 / (1 + np.exp(-found["gate_proj"])),
            "up": found["up_proj"],
            "gate_silu": found["silu"],
            "inner": found["gated"],
            "down": found["down_proj"],
            "weighted": weighted,
            "share": weighted,
            "added": weighted,
        }

    def _dequantize_fault(self, fault: StageFault, expert: int) -> StageFault | None:
        """Inside the unpacking of one projection, on the words and scales of the checkpoint."""
        name = fault.transition.tensor.split("_")[0]
        prefix = f"{LAYER_PREFIX.format(layer=self._layer)}mlp.experts.{expert}.{name}_proj."
        packed = self._plain.tensors.stored(prefix + "weight_packed").numpy()
        scales = self._plain.tensors.stored(prefix + "weight_scale")
        bits = scales.contiguous().view(torch.int16).numpy().view(np.uint16)
        node = fault.graph.nodes[fault.node]
        group = np.array([packed.shape[1] * 8 // bits.shape[1]], np.int64)
        inputs = [HostTensor(packed, "int32"), HostTensor(bits, "bfloat16"), HostTensor(group, "int64")]
        function = next(f for f in fault.graph.model.functions if f.name == node.op_type)
        feeds = dict(zip(function.input, inputs, strict=True))
        types = {name: {"int32": 6, "bfloat16": 16, "int64": 7}[tensor.dtype] for name, tensor in feeds.items()}
        model = body_model(fault.graph.model, node, types, {})
        octets = packed.astype("<i4").view(np.uint8)
        nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(packed), -1)
        grouped = nibbles.reshape(len(packed), bits.shape[1], -1).astype(np.float64)
        scale = scales.double().numpy()
        scaled = (grouped - 8) * scale[:, :, None]
        stages = {
            "nibble": nibbles.reshape(len(packed), -1, 8),
            "nibbles": grouped,
            "stored": grouped,
            "value": grouped - 8,
            "scale": scale,
            "scale_of_group": scale[:, :, None],
            "scaled": scaled,
            "weight": scaled.reshape(len(packed), -1),
        }
        return first_stage_fault(self._bodies, model, feeds, stage_expected(stages))

    def _region_of(self, expert: int) -> dict[str, HostTensor]:
        """The expert's tensors as they are bound, one after the other, and a table in which no other is held."""
        table, words = self._operands["table"].array, self._operands["words"].array
        scales = self._operands["scales"].array
        new = np.full_like(table, -1)
        rows, start = [], 0
        prefix = f"{LAYER_PREFIX.format(layer=self._layer)}mlp.experts.{expert}."
        for column, (projection, part) in enumerate(EXPERT_TABLE_COLUMNS):
            length = self._plain.tensors.stored(f"{prefix}{projection}.{part}").nbytes
            count = -(-length // REGION_ROW_BYTES)
            first = int(table[expert, column])
            rows.append(np.arange(first, first + count).clip(0, len(words) - 1))
            new[expert, column] = start
            start += count
        chosen = np.concatenate(rows)
        return {
            "words": HostTensor(np.ascontiguousarray(words[chosen]), "int32"),
            "scales": HostTensor(np.ascontiguousarray(scales[chosen]), "bfloat16"),
            "table": HostTensor(new, "int64"),
        }
