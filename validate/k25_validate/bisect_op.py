"""Inside a component that is off: the first op whose inputs agree with the reference and whose output does not.

Prefixes of the graph are run on the backend under test, fed with the reference's input; the frontier of each prefix is
compared with the reference's intermediate results. See `graph_prefix`, `tap_rules`, `prefix_search`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from k25_export.manifest import ComponentEntry, Manifest, read_bundle_file
from k25_runtime.backend import Backend
from k25_runtime.host_tensor import HostTensor
from k25_runtime.mapped_checkpoint import MappedCheckpoint
from k25_validate.bisect_cause import CauseFinder
from k25_validate.bisect_walk import Failure, Step
from k25_validate.bound_weights import BoundWeights
from k25_validate.component_probe import ComponentProbe
from k25_validate.divergence import Divergence, Place
from k25_validate.graph_prefix import Cut, StraightGraph
from k25_validate.metrics import max_abs_error
from k25_validate.plain_taps import PlainTaps, Taps
from k25_validate.prefix_search import Expected, PrefixSearch, Transition
from k25_validate.prompts import Prompt
from k25_validate.reproducer import Reproducer
from k25_validate.step_taps import StepTaps, gathered_rows
from k25_validate.tap_rules import TapMap, tap_map

Array = npt.NDArray[Any]
Feeds = dict[str, HostTensor]


class OpSearch:
    """Set it up with a failure of the walk; `divergence` finds the op. Holds one layer's weights and activations."""

    def __init__(
        self,
        *,
        bundle: Path,
        manifest: Manifest,
        checkpoint: MappedCheckpoint,
        reference_folder: Path,
        backend: Backend,
        failure: Failure,
        prompts: Sequence[Prompt],
        cache_shape: tuple[int, int, int],
    ) -> None:
        self._failure = failure
        self._prompts = prompts
        self._cache_shape = cache_shape
        config = manifest.model.text
        name, self._layer = failure.local.component, failure.local.layer
        entry = next(entry for entry in manifest.components if entry.name == name)
        model = onnx.load_from_string(read_bundle_file(bundle, entry.file("fp32")))
        self._graph = StraightGraph(model)
        weights = checkpoint.weights(entry, self._layer, "fp32")
        self._weights = weights
        self._taps: TapMap = tap_map(name, self._graph, weights=list(entry.bindings))
        label = name if self._layer is None else f"{name} {self._layer}"
        self._probe = ComponentProbe(backend, weights, label=f"bisect, {label}")
        self._plain = PlainTaps(reference_folder, latent_norm_eps=config.latent_norm_eps)
        rounded = PlainTaps(reference_folder, latent_norm_eps=config.latent_norm_eps, dtype=torch.float32)
        self._steps = StepTaps(
            component=name,
            config=config,
            exact=self._taps_of(self._plain),
            rounded=self._taps_of(rounded),
            ties=failure.ties,
        )
        self._bound = _bound_weights(manifest, entry, self._layer, weights, self._plain, checkpoint.folder)
        self.reproducer: Reproducer | None = None

    def divergence(self) -> Divergence:
        """The first op that is off; where the component is right when it is run alone, it is the runtime."""
        cache = np.zeros(self._cache_shape, np.float32)
        written: dict[tuple[int, int], Array] = {}
        for number, step in enumerate(self._failure.way.steps):
            feeds = self._feeds(step, cache)
            problem = self._input_problem(step, number, cache, written)
            if problem is not None:
                return problem
            found = self._searched(step, number, feeds)
            if found is not None:
                return replace(found, runs=self._probe.runs + found.runs)
            cache = self._whole(step, feeds).get("cache_out", cache)
            for row, span in enumerate(step.spans):
                written[(span.prompt, span.stop)] = step.batch.block_table[row]
        return self._nothing_found()

    def _searched(self, step: Step, number: int, feeds: Feeds) -> Divergence | None:
        expected = self._steps.expected(step, self._taps.taps)
        cuts = self._graph.cuts(set(expected), weights=list(self._weights))
        shapes = self._steps.shapes(step, self._taps.taps, self._cache_shape)

        def values_of(cut: Cut) -> Mapping[str, Array]:
            return self._probe.run(self._graph.prefix(cut.outputs), feeds, shapes)

        transition = PrefixSearch(cuts, expected, values_of).first_divergence()
        if transition is None:
            return None
        return self._explained(step, number, feeds, expected, shapes, transition)

    def _explained(
        self,
        step: Step,
        number: int,
        feeds: Feeds,
        expected: Mapping[str, Expected],
        shapes: Mapping[str, tuple[int, ...]],
        transition: Transition,
    ) -> Divergence:
        tensor = transition.tensor
        node = guilty_node(self._graph, self._taps, list(self._weights), transition)
        inputs = self._node_inputs(node, feeds, shapes)
        before = _error_before(transition, expected)
        local = self._failure.local
        found = Divergence(
            component=local.component,
            layer=local.layer,
            way=local.way,
            step=number,
            node=node,
            op=op_name(self._graph.nodes[node]),
            tensor=tensor if tensor in self._graph.nodes[node].output else self._graph.nodes[node].output[0],
            seen_at="" if tensor in self._graph.nodes[node].output else tensor,
            tap=expected[tensor].tap,
            place=self._place(step, expected[tensor], transition.after.values[tensor]),
            error=transition.after.errors[tensor],
            tolerance=expected[tensor].tolerance,
            error_before=before,
            kind="graph",
            cause="",
            local_error=local.error,
            local_tolerance=local.tolerance,
            ops=len(self._graph.nodes),
        )
        finder = CauseFinder(
            graph=self._graph,
            taps=self._taps,
            plain=self._plain,
            bound=self._bound,
            layer=self._layer,
            probe=self._probe,
            step=step,
            past=[self._steps.cache_rows(span.prompt, 0, span.start) for span in step.spans]
            if self._layer is not None
            else [],
        )
        self.reproducer = self._reproducer(node, tensor, inputs, expected[tensor])
        explained = finder.explained(found, inputs, expected[tensor])
        if finder.reproducer is not None:
            self.reproducer = finder.reproducer
        return explained

    def _node_inputs(self, node: int, feeds: Feeds, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HostTensor]:
        """What the node's segment reads: weights, feeds, and tensors of the graph (made by a run of their prefix)."""
        wanted = [value.name for value in self._segment(node).graph.input]
        made = [name for name in wanted if name in self._graph.producers]
        values = self._probe.run(self._graph.prefix(made), feeds, shapes) if made else {}
        known = {**feeds, **self._weights, **{name: host_tensor(value) for name, value in values.items()}}
        return {name: known[name] for name in wanted}

    def _segment(self, node: int) -> onnx.ModelProto:
        return segment_of(self._graph, self._taps, list(self._weights), node)

    def _reproducer(
        self, node: int, tensor: str, inputs: Mapping[str, HostTensor], expected: Expected
    ) -> Reproducer | None:
        """The node alone; None where the reference says nothing about the node's own output."""
        if tensor not in self._graph.nodes[node].output or expected.raw is None:
            return None
        return Reproducer(
            model=self._segment(node),
            inputs=inputs,
            expected={tensor: expected.raw},
            tolerance=expected.tolerance,
        )

    def _place(self, step: Step, expected: Expected, found: Array) -> Place:
        """The worst coordinate among the rows that count, and the token of the prompt that its row is."""
        actual = np.asarray(expected.adapt(found), np.float64)
        if actual.size != expected.values.size:
            return Place(coordinate=(), token=f", of shape {list(found.shape)}", actual=np.nan, expected=np.nan)
        actual = actual.reshape(expected.values.shape)
        _, index = max_abs_error(actual, expected.values)
        return Place(
            coordinate=index,
            token=self._token(step, index[0], is_cache=expected.tap == "cache_out"),
            actual=float(actual[index]),
            expected=float(expected.values[index]),
        )

    def _token(self, step: Step, row: int, *, is_cache: bool) -> str:
        for span in step.spans:
            start = 0 if is_cache else span.start
            if row < span.stop - start:
                return f" (token {start + row} of {self._prompts[span.prompt].name!r})"
            row -= span.stop - start
        return ""

    def _whole(self, step: Step, feeds: Feeds) -> dict[str, Array]:
        outputs = [value.name for value in self._graph.model.graph.output]
        shapes = self._steps.shapes(step, self._taps.taps, self._cache_shape)
        return self._probe.run(self._graph.prefix(outputs), feeds, shapes)

    def _feeds(self, step: Step, cache: Array) -> Feeds:
        if self._layer is None and self._failure.local.component == "embed":
            return {"token_ids": HostTensor(step.batch.token_ids, "int32")}
        hidden = HostTensor(np.ascontiguousarray(step.rows(self._failure.hidden), np.float32), "float32")
        if self._layer is None:
            return {"hidden": hidden, "rows": HostTensor(np.arange(step.batch.tokens, dtype=np.int32), "int32")}
        return {
            "hidden": hidden,
            "cache": HostTensor(np.ascontiguousarray(cache, np.float32), "float32"),
            "positions": HostTensor(step.batch.positions, "int32"),
            "query_start": HostTensor(step.batch.query_start, "int32"),
            "block_table": HostTensor(step.batch.block_table, "int32"),
            "residual_share": HostTensor(np.ones(1, np.float32), "float32"),
        }

    def _taps_of(self, plain: PlainTaps) -> list[Taps | None]:
        wanted = self._failure.way.prompts
        found: list[Taps | None] = []
        for index, prompt in enumerate(self._prompts):
            if index not in wanted:
                found.append(None)
            elif self._layer is not None:
                hidden = self._failure.hidden[index]
                found.append(plain.layer(self._layer, hidden, np.arange(len(hidden))))
            elif self._failure.local.component == "embed":
                found.append(plain.embed(np.array(prompt.token_ids)))
            else:
                found.append(plain.head(self._failure.hidden[index]))
        return found

    def _input_problem(
        self, step: Step, number: int, cache: Array, written: Mapping[tuple[int, int], Array]
    ) -> Divergence | None:
        """What the runtime feeds besides activations: positions, bounds of the sequences, places in the cache."""
        if self._layer is None:
            return None
        batch = step.batch
        counts = [span.stop - span.start for span in step.spans]
        right = {
            "positions": np.concatenate([np.arange(span.start, span.stop) for span in step.spans]),
            "query_start": np.concatenate([[0], np.cumsum(counts)]),
        }
        for name, expected in right.items():
            actual = getattr(batch, name)
            if actual.shape != expected.shape or not np.array_equal(actual, expected):
                return self._bad_input(step, number, name, actual, expected)
        for row, span in enumerate(step.spans):
            before = written.get((span.prompt, span.start))
            used = -(-span.start // self._cache_shape[1])
            if before is not None and not np.array_equal(before[:used], batch.block_table[row, :used]):
                return self._bad_input(step, number, "block_table", batch.block_table[row, :used], before[:used])
            if span.start:
                rows = gathered_rows(cache, batch, [span.start if i == row else 0 for i in range(len(step.spans))])
                assert len(rows) == span.start
        return self._shared_slot(step, number)

    def _shared_slot(self, step: Step, number: int) -> Divergence | None:
        """Two positions must not be stored in one slot of the cache."""
        size = self._cache_shape[1]
        owners: dict[int, int] = {}
        for row, span in enumerate(step.spans):
            blocks = step.batch.block_table[row, : -(-span.stop // size)]
            for block in blocks.tolist():
                if block in owners:
                    return self._bad_input(step, number, "block_table", blocks, np.array([owners[block]]), "shared")
                owners[block] = row
        return None

    def _bad_input(
        self, step: Step, number: int, name: str, actual: Array, expected: Array, what: str = ""
    ) -> Divergence:
        index = int(np.flatnonzero(actual != expected)[0]) if actual.shape == expected.shape and not what else 0
        cause = (
            f"input {name}: two places of the sequences share a block of the cache ({actual.tolist()})"
            if what
            else f"the runtime feeds {name} = {actual.tolist()[:16]}, expected {expected.tolist()[:16]}"
        )
        local = self._failure.local
        return Divergence(
            component=local.component,
            layer=local.layer,
            way=local.way,
            step=number,
            node=-1,
            op="input",
            tensor=name,
            tap=name,
            place=Place(
                coordinate=(index,),
                token=f" (step {number})",
                actual=float(actual.reshape(-1)[index]) if actual.size else float("nan"),
                expected=float(expected.reshape(-1)[index]) if expected.size > index else float("nan"),
            ),
            error=float("inf"),
            tolerance=0.0,
            error_before=0.0,
            kind="inputs",
            cause=cause,
            local_error=local.error,
            local_tolerance=local.tolerance,
            ops=len(self._graph.nodes),
            runs=self._probe.runs,
        )

    def _nothing_found(self) -> Divergence:
        """Alone, with the same inputs, every tensor agrees with the plain reference."""
        local = self._failure.local
        output = self._graph.model.graph.output[0].name
        return Divergence(
            component=local.component,
            layer=local.layer,
            way=local.way,
            step=-1,
            node=-1,
            op="(none)",
            tensor=output,
            tap=self._taps.taps.get(output, output),
            place=Place(coordinate=(), token="", actual=float("nan"), expected=float("nan")),
            error=local.error,
            tolerance=local.tolerance,
            error_before=0.0,
            kind="runtime",
            cause=(
                "run alone on the same inputs, every tensor of the component agrees with the plain reference: the "
                "fault is in the runtime that stitches the components, or in the other reference"
            ),
            local_error=local.error,
            local_tolerance=local.tolerance,
            ops=len(self._graph.nodes),
            runs=self._probe.runs,
        )


def guilty_node(graph: StraightGraph, taps: TapMap, weights: Sequence[str], transition: Transition) -> int:
    """The node behind the tensor: the first one between the two cuts that no formula has, else its producer."""
    start = transition.before.cut.node if transition.before is not None else -1
    variable = graph.variable_tensors(weights)
    for index in graph.needed_nodes([transition.tensor]):
        is_variable = any(name in variable for name in graph.nodes[index].output)
        if index > start and is_variable and (index in taps.wired or index in taps.unmatched):
            return index
    return graph.producers[transition.tensor]


def segment_of(graph: StraightGraph, taps: TapMap, weights: Sequence[str], node: int) -> onnx.ModelProto:
    """The node, with what prepares its weights and its integers."""
    given = set(taps.taps) & graph.variable_tensors(weights)
    outputs = [name for name in graph.nodes[node].output if name]
    return graph.segment(outputs, given - set(outputs))


def _bound_weights(
    manifest: Manifest,
    entry: ComponentEntry,
    layer: int | None,
    weights: Mapping[str, HostTensor],
    plain: PlainTaps,
    folder: Path,
) -> BoundWeights:
    return BoundWeights(
        manifest=manifest, entry=entry, layer=layer, weights=weights, tensors=plain.tensors, folder=folder
    )


def host_tensor(values: Array) -> HostTensor:
    """An array as the tensor that a backend takes."""
    dtype = {"float32": "float32", "int32": "int32", "int64": "int64"}[values.dtype.name]
    return HostTensor(np.ascontiguousarray(values), dtype)


def op_name(node: onnx.NodeProto) -> str:
    """The op with its domain, if that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _error_before(transition: Transition, expected: Mapping[str, Expected]) -> float:
    if transition.before is None:
        return 0.0
    return max(transition.before.errors.values())
