"""The vision component under `bisect`: pictures through it, what it is fed with, and the first op that is off.

Positions, angles and merge indices are computed by the runtime from a picture's grid, so they are judged first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from k25_export.manifest import Manifest, read_bundle_file
from k25_runtime.backend import Backend
from k25_runtime.mapped_checkpoint import MappedCheckpoint
from k25_runtime.runtime import Runtime
from k25_validate.bisect_cause import CauseFinder
from k25_validate.bisect_op import guilty_node, host_tensor, op_name, segment_of
from k25_validate.bisect_walk import LocalError
from k25_validate.bound_weights import BoundWeights
from k25_validate.component_probe import ComponentProbe
from k25_validate.divergence import Divergence, Place
from k25_validate.graph_prefix import Cut, StraightGraph
from k25_validate.media_samples import MediaSample
from k25_validate.metrics import max_abs_error, relative_l2
from k25_validate.plain_vision_taps import PlainVisionTaps
from k25_validate.prefix_search import Expected, PrefixSearch, Transition
from k25_validate.reference import Reference
from k25_validate.reproducer import Reproducer
from k25_validate.tap_rules import tap_map
from k25_validate.tolerances import vision_tolerance
from k25_validate.vision_rules import vision_rules

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

VISION = "vision"
#: Inputs of the component beside the pixels: the same formulas in float32, of values of order one.
INPUT_TOLERANCE = 2e-6
FLOOR_SHARE = 0.5


class VisionSearch:
    """`first_failure` says which picture is off; `divergence` which input or op makes it so."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        bundle: Path,
        manifest: Manifest,
        checkpoint: MappedCheckpoint,
        reference_folder: Path,
        backend: Backend,
    ) -> None:
        assert manifest.model.vision is not None
        self._runtime = runtime
        self._bundle = bundle
        self._manifest = manifest
        self._checkpoint = checkpoint
        self._folder = reference_folder
        self._backend = backend
        self._config = manifest.model.vision
        self._fed: dict[str, dict[str, Array]] = {}
        self.found: list[LocalError] = []
        self.reproducer: Reproducer | None = None

    def first_failure(
        self, reference: Reference, samples: Sequence[MediaSample], progress: Progress
    ) -> MediaSample | None:
        """Every picture through runtime and reference; the first whose embeddings are off."""
        tolerance = vision_tolerance(self._config).value
        for number, sample in enumerate(samples):
            progress("looking at pictures", number, len(samples))
            expected = reference.media_embeddings(sample.item.pixel_values, sample.item.grid)
            actual = self._encoded(sample)
            error = relative_l2(actual, expected)
            self.found.append(
                LocalError(component=VISION, layer=None, way=sample.name, error=error, tolerance=tolerance)
            )
            if not error <= tolerance:
                return sample
        return None

    def divergence(self, sample: MediaSample) -> Divergence:
        """The first input that is wrong, else the first op."""
        plain = PlainVisionTaps(self._folder)
        fed = self._fed[sample.name]
        right = plain.inputs(self._config.vt_hidden_size, sample.item.grid)
        for name, expected in right.items():
            error = relative_l2(fed[name], expected) if fed[name].shape == expected.shape else float("inf")
            if not error <= INPUT_TOLERANCE:
                return self._bad_input(sample, name, fed[name], expected, error)
        return self._op(sample, plain, fed)

    def _encoded(self, sample: MediaSample) -> Array:
        """The runtime's embeddings; what it feeds the component with is noted on the way."""
        runner = self._runtime.runner
        whole = runner.vision

        def noted(pixel_values: Array, inputs: Mapping[str, Array], *, tokens: int) -> Array:
            self._fed[sample.name] = {"pixel_values": pixel_values, **inputs}
            return whole(pixel_values, inputs, tokens=tokens)

        runner.vision = noted  # type: ignore[method-assign]
        try:
            (encoded,) = self._runtime.encode_media(sample.item.pixel_values, [sample.item.grid])
            return encoded
        finally:
            del runner.vision

    def _op(self, sample: MediaSample, plain: PlainVisionTaps, fed: Mapping[str, Array]) -> Divergence:
        entry = next(entry for entry in self._manifest.components if entry.name == VISION)
        graph = StraightGraph(onnx.load_from_string(read_bundle_file(self._bundle, entry.file("fp32"))))
        weights = self._checkpoint.weights(entry, None, "fp32")
        taps = tap_map(VISION, graph, weights=list(weights), rules=vision_rules(self._config.vt_num_hidden_layers))
        exact = plain.taps(sample.item.pixel_values, sample.item.grid)
        rounded = PlainVisionTaps(self._folder, dtype=torch.float32).taps(sample.item.pixel_values, sample.item.grid)
        expected = {
            tensor: Expected(
                values=exact[tap],
                noise=relative_l2(rounded[tap], exact[tap]),
                floor=FLOOR_SHARE * vision_tolerance(self._config).value,
                tap=tap,
                raw=exact[tap],
            )
            for tensor, tap in taps.taps.items()
            if tap in exact
        }
        probe = ComponentProbe(self._backend, weights, label="bisect, vision")
        feeds = {name: host_tensor(values) for name, values in fed.items()}
        shapes = {name: value.values.shape for name, value in expected.items()}

        def values_of(cut: Cut) -> Mapping[str, Array]:
            return probe.run(graph.prefix(cut.outputs), feeds, shapes)

        cuts = graph.cuts(set(expected), weights=list(weights))
        transition = PrefixSearch(cuts, expected, values_of).first_divergence()
        if transition is None:
            return self._nothing_found(sample, len(graph.nodes), probe.runs)
        node = guilty_node(graph, taps, list(weights), transition)
        segment = segment_of(graph, taps, list(weights), node)
        made = [value.name for value in segment.graph.input if value.name in graph.producers]
        values = probe.run(graph.prefix(made), feeds, shapes) if made else {}
        known = {**feeds, **weights, **{name: host_tensor(value) for name, value in values.items()}}
        inputs = {value.name: known[value.name] for value in segment.graph.input}
        found = self._divergence(sample, graph, node, expected, transition, probe.runs)
        if transition.tensor in graph.nodes[node].output:
            self.reproducer = Reproducer(
                model=segment,
                inputs=inputs,
                expected={transition.tensor: expected[transition.tensor].values},
                tolerance=found.tolerance,
            )
        bound = BoundWeights(
            manifest=self._manifest,
            entry=entry,
            layer=None,
            weights=weights,
            tensors=plain.tensors,
            folder=self._checkpoint.folder,
        )
        finder = CauseFinder(graph=graph, taps=taps, plain=plain, bound=bound, layer=None, probe=probe)
        return replace(finder.explained(found, inputs, expected[transition.tensor]), runs=probe.runs)

    def _divergence(
        self,
        sample: MediaSample,
        graph: StraightGraph,
        node: int,
        expected: Mapping[str, Expected],
        transition: Transition,
        runs: int,
    ) -> Divergence:
        tensor = transition.tensor
        outputs = graph.nodes[node].output
        values = expected[tensor].values
        actual = np.asarray(transition.after.values[tensor], np.float64).reshape(values.shape)
        _, index = max_abs_error(actual, values)
        return self._with_local(
            Divergence(
                component=VISION,
                layer=None,
                way=sample.name,
                step=0,
                node=node,
                op=op_name(graph.nodes[node]),
                tensor=tensor if tensor in outputs else outputs[0],
                seen_at="" if tensor in outputs else tensor,
                tap=expected[tensor].tap,
                place=_place(sample, index, actual, values),
                error=transition.after.errors[tensor],
                tolerance=expected[tensor].tolerance,
                error_before=max(transition.before.errors.values()) if transition.before is not None else 0.0,
                kind="graph",
                cause="",
                ops=len(graph.nodes),
                runs=runs,
            )
        )

    def _bad_input(self, sample: MediaSample, name: str, actual: Array, expected: Array, error: float) -> Divergence:
        is_same = actual.shape == expected.shape
        index = max_abs_error(actual, expected)[1] if is_same else ()
        nothing = Place(coordinate=(), token="", actual=float("nan"), expected=float("nan"))
        return self._with_local(
            Divergence(
                component=VISION,
                layer=None,
                way=sample.name,
                step=0,
                node=-1,
                op="input",
                tensor=name,
                tap=name,
                place=_place(sample, index, actual, expected) if is_same else nothing,
                error=error,
                tolerance=INPUT_TOLERANCE,
                error_before=0.0,
                kind="inputs",
                cause=f"from the grid {list(sample.item.grid)} the runtime computes another {name} than the formulas",
            )
        )

    def _nothing_found(self, sample: MediaSample, ops: int, runs: int) -> Divergence:
        nothing = Place(coordinate=(), token="", actual=float("nan"), expected=float("nan"))
        return self._with_local(
            Divergence(
                component=VISION,
                layer=None,
                way=sample.name,
                step=-1,
                node=-1,
                op="(none)",
                tensor="media_embeddings",
                tap="mm_projector.proj.2",
                place=nothing,
                error=self.found[-1].error,
                tolerance=self.found[-1].tolerance,
                error_before=0.0,
                kind="runtime",
                cause="run alone on the same inputs, every tensor agrees with the plain reference",
                ops=ops,
                runs=runs,
            )
        )

    def _with_local(self, found: Divergence) -> Divergence:
        return replace(found, local_error=self.found[-1].error, local_tolerance=self.found[-1].tolerance)


def _place(sample: MediaSample, index: Sequence[int], actual: Array, expected: Array) -> Place:
    where = tuple(index)
    return Place(
        coordinate=where,
        token=f" (row {where[0]} of picture {sample.name!r})" if where else "",
        actual=float(actual[where]),
        expected=float(expected[where]),
    )
