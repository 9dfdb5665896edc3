"""Why an op is off: other wiring, other bytes, another attribute, its body, or the backend's kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from k25_plugins.signatures import DOMAIN
from k25_runtime.host_tensor import HostTensor
from k25_validate.bisect_walk import Step
from k25_validate.bound_weights import EXPERT_INPUTS, BoundWeights, WeightSource
from k25_validate.component_probe import ComponentProbe
from k25_validate.divergence import Divergence
from k25_validate.graph_prefix import StraightGraph, function_of, node_reads
from k25_validate.inside_experts import ExpertSearch
from k25_validate.inside_mla import mla_stage_fault
from k25_validate.inside_norm import norm_formula
from k25_validate.inside_op import (
    STAGE_FLOOR,
    BodyRunner,
    Formula,
    StageFault,
    body_of,
    first_stage_fault,
    is_kernel_farther,
    stage_expected,
)
from k25_validate.inside_router import router_formula
from k25_validate.plain_taps import PlainTaps
from k25_validate.plain_vision_taps import PlainVisionTaps
from k25_validate.prefix_search import Expected
from k25_validate.reproducer import Reproducer
from k25_validate.tap_rules import TapMap

Array = npt.NDArray[Any]
Inputs = Mapping[str, HostTensor]

#: Attributes arrive as float32.
_SAME_ATTRIBUTE = 1e-6

_KERNEL = "the body agrees with the reference, the kernel does not"


class CauseFinder:
    """Everything that is known about the op; `reproducer` is set where a smaller one than the whole op was found."""

    def __init__(
        self,
        *,
        graph: StraightGraph,
        taps: TapMap,
        plain: PlainTaps | PlainVisionTaps,
        bound: BoundWeights,
        layer: int | None,
        probe: ComponentProbe,
        step: Step | None = None,
        past: Sequence[Array] = (),
    ) -> None:
        self._graph = graph
        self._taps = taps
        self._plain = plain
        self._bound = bound
        self._layer = layer
        self._probe = probe
        self._step = step
        self._past = past
        self._bodies = BodyRunner()
        self.reproducer: Reproducer | None = None

    def explained(self, found: Divergence, inputs: Inputs, expected: Expected) -> Divergence:
        """The divergence with its kind, its cause and, for a `k25` op, the place inside it."""
        node = self._graph.nodes[found.node]
        wired = self._taps.wired.get(found.node)
        sources = self._sources(node)
        found = replace(found, weights=tuple(sources))
        if wired is not None:
            return replace(found, kind="wiring", cause=wired)
        bad = next((source for source in sources if source.kind), None)
        if bad is not None:
            return _of_source(found, bad)
        if found.node in self._taps.unmatched:
            cause = f"the formulas have no such op between what agrees and {found.tap}"
            return replace(found, kind="wiring", cause=cause)
        if node.domain == DOMAIN:
            return self._explained_op(found, node, inputs, expected)
        return self._explained_standard(found, node, inputs, expected)

    def _sources(self, node: onnx.NodeProto) -> list[WeightSource]:
        """The tensors behind the node's weight inputs, checked; experts come later, one by one."""
        names = []
        for name in node_reads(node):
            while name in self._graph.producers and name not in self._taps.taps:  # a cast or a transpose of a weight
                name = next(iter(node_reads(self._graph.nodes[self._graph.producers[name]])), "")
            if self._bound.has(name) and name not in EXPERT_INPUTS:
                names.append(name)
        return [self._bound.source(name) for name in dict.fromkeys(names)]

    def _explained_standard(
        self, found: Divergence, node: onnx.NodeProto, inputs: Inputs, expected: Expected
    ) -> Divergence:
        if self._differs_from_standard(found, node, inputs, expected):
            return replace(found, kind="kernel", cause="the backend computes something else than the standard")
        return replace(found, kind="graph", cause=f"{found.op} computes what it says, and the formula says otherwise")

    def _differs_from_standard(
        self, found: Divergence, node: onnx.NodeProto, inputs: Inputs, expected: Expected
    ) -> bool:
        """Whether ONNX Runtime's CPU operators get, from the same inputs, what the reference has."""
        if found.tensor not in node.output:
            return False
        try:
            values = self._bodies.run(self._segment(found.node, inputs), inputs)
        except Exception:  # another backend's graph may hold what the CPU cannot run
            return False
        return expected.error(values[found.tensor]) <= expected.tolerance

    def _segment(self, node: int, inputs: Inputs) -> onnx.ModelProto:
        outputs = [name for name in self._graph.nodes[node].output if name]
        return self._graph.segment(outputs, set(inputs))

    def _explained_op(self, found: Divergence, node: onnx.NodeProto, inputs: Inputs, expected: Expected) -> Divergence:
        attribute = self._wrong_attribute(node, found.tap)
        if attribute is not None:
            found = replace(found, kind="attribute", cause=attribute)
        operands = [inputs[name] for name in node.input if name in inputs]
        if len(operands) != len(node.input) or function_of(self._graph.model, node) is None:
            return replace(found, cause=found.cause or "the op has no body in the file to look into")
        if node.op_type == "MoEDispatch":
            return self._explained_experts(found, node, operands, expected)
        body = body_of(self._graph.model, node, operands)
        assert body is not None
        model, feeds = body
        formula = self._formula_of(node, found.tap, feeds)
        if formula is not None:
            return self._explained_by_formula(found, body, formula, inputs, expected)
        output = model.graph.output[list(node.output).index(found.tensor)].name
        if expected.error(self._bodies.run(model, feeds)[output]) <= expected.tolerance:
            return replace(found, kind="kernel", cause=_KERNEL)
        if node.op_type == "MLA":
            assert self._layer is not None
            assert self._step is not None
            assert isinstance(self._plain, PlainTaps)
            fault, token = mla_stage_fault(
                self._bodies, self._plain, self._layer, model, feeds, self._step, list(self._past)
            )
            return _with_stage(found, fault, f"for token {token} of the step" if token is not None else "")
        if node.op_type != "Linear":
            return _with_stage(found, None, "")
        weight = self._weight_of(operands[1])
        stages = {"like_x": weight, "transposed": weight.T, "y": np.asarray(expected.raw)}
        fault = first_stage_fault(self._bodies, model, feeds, stage_expected(stages, expected.tolerance))
        return _with_stage(found, fault, "")

    def _formula_of(self, node: onnx.NodeProto, tap: str, feeds: Inputs) -> Formula | None:
        """For the ops whose formula reads nothing but the op's inputs."""
        if not isinstance(self._plain, PlainTaps):
            return None
        if node.op_type == "RMSNorm":
            return norm_formula(self._plain, tap, feeds)
        return router_formula(self._plain, feeds) if node.op_type == "Router" else None

    def _explained_by_formula(
        self,
        found: Divergence,
        body: tuple[onnx.ModelProto, dict[str, HostTensor]],
        formula: Formula,
        inputs: Inputs,
        expected: Expected,
    ) -> Divergence:
        """Body, then kernel, against the formula on the same inputs: the stage of the body, or that it is the kernel.

        Faint faults count (an epsilon shows in the systematic gain only), so bounds are those of the op's tensor.
        """
        model, feeds = body
        floor = min(STAGE_FLOOR, expected.tolerance)

        def judged(made: Mapping[str, Array]) -> dict[str, Expected]:
            return stage_expected(formula(made), floor, expected.rows)

        by_body = self._bodies.run(model, feeds)
        fault = first_stage_fault(self._bodies, model, feeds, judged(by_body))
        if fault is not None or found.kind == "attribute":
            return _with_stage(found, fault, "")
        if is_kernel_farther(self._by_kernel(found.node, inputs, by_body), by_body, judged):
            return replace(found, kind="kernel", cause=_KERNEL)
        return replace(found, cause="body and kernel agree with the formula on the same inputs, which are off already")

    def _by_kernel(self, node: int, inputs: Inputs, by_body: Mapping[str, Array]) -> dict[str, Array]:
        """What the backend makes of the op alone, by formal name."""
        names = dict(zip(self._graph.nodes[node].output, by_body, strict=True))
        shapes = {name: by_body[formal].shape for name, formal in names.items()}
        made = self._probe.run(self._segment(node, inputs), inputs, shapes)
        return {formal: made[name] for name, formal in names.items()}

    @staticmethod
    def _weight_of(weight: HostTensor) -> Array:
        return weight.to_float32().astype(np.float64)

    def _explained_experts(
        self, found: Divergence, node: onnx.NodeProto, operands: Sequence[HostTensor], expected: Expected
    ) -> Divergence:
        assert self._layer is not None
        assert isinstance(self._plain, PlainTaps)
        search = ExpertSearch(
            graph=self._graph,
            node=node,
            operands=operands,
            probe=self._probe,
            bodies=self._bodies,
            plain=self._plain,
            layer=self._layer,
            tolerance=expected.tolerance,
        )
        guilty = search.guilty_experts(expected)
        if not guilty:
            fault = search.summation_fault(expected)
            return _with_stage(found, fault, "each expert alone is right, their weighted sum is not")
        expert = guilty[0]
        found = replace(found, expert=expert)
        self.reproducer = search.reproducer(expert)
        sources = self._bound.expert_sources(expert)
        bad = next((source for source in sources if source.kind), None)
        others = f"; {len(guilty)} of the experts in use are off: {guilty[:8]}" if len(guilty) > 1 else ""
        if bad is not None:
            found = _of_source(replace(found, weights=tuple(sources)), bad)
            return replace(found, cause=found.cause + others)
        found = replace(found, weights=tuple(sources))
        if search.is_body_right(expert):
            return replace(found, kind="kernel", cause=_KERNEL + others)
        fault = search.stage_fault(expert)
        return _with_stage(found, fault, f"expert {expert} alone is off{others}")

    def _wrong_attribute(self, node: onnx.NodeProto, tap: str) -> str | None:
        facts = self._plain.facts(tap)
        for attribute in node.attribute:
            if attribute.name not in facts:
                continue
            stated = np.atleast_1d(np.asarray(onnx.helper.get_attribute_value(attribute), np.float64))
            wanted = np.atleast_1d(np.asarray(facts[attribute.name], np.float64))
            if stated.shape != wanted.shape:
                return f"attribute {attribute.name} has {stated.size} values, the formula {wanted.size}"
            off = np.flatnonzero(~np.isclose(stated, wanted, rtol=_SAME_ATTRIBUTE, atol=0))
            if off.size:
                index = f"[{off[0]}]" if stated.size > 1 else ""
                return f"attribute {attribute.name}{index} is {stated[off[0]]:.7g}, the formula's {wanted[off[0]]:.7g}"
        return None


def _with_stage(found: Divergence, fault: StageFault | None, remark: str) -> Divergence:
    if fault is None:
        cause = found.cause or "the body as a whole is off, none of its stages alone"
        return replace(found, cause="; ".join(filter(None, (cause, remark))))
    error = fault.transition.after.errors[fault.transition.tensor]
    before = max(fault.transition.before.errors.values()) if fault.transition.before is not None else 0.0
    between = f" (ops {', '.join(fault.between[:8])})" if len(fault.between) > 1 else ""
    text = (
        f"in the body, {fault.op} makes {fault.transition.tensor} with an error of {error:.2e}, {before:.2e} just "
        f"before{between}"
    )
    stages = (*found.stages, *fault.path, fault.transition.tensor)
    return replace(found, stages=stages, cause="; ".join(filter(None, (found.cause, text, remark))))


def _of_source(found: Divergence, bad: WeightSource) -> Divergence:
    kind: Any = bad.kind
    return replace(found, kind=kind, cause=f"{bad.tensor}: {bad.problem}")
