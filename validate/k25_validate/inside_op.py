"""Inside a `k25` op that is off: its function body, one turn of its loop and its branch, searched like a component.

The body is run on the op's own inputs, stage by stage against the formulas (`plain_taps`) on the same inputs, by ONNX
Runtime's standard operators. Where the body agrees with the formulas, what is off is the backend's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from k25_plugins.signatures import ONNX_DTYPES
from k25_runtime.host_tensor import HostTensor
from k25_runtime.onnxruntime_cpu import ort_value
from k25_validate.graph_prefix import Cut, StraightGraph, body_model, function_of, node_reads
from k25_validate.plain_taps import Taps
from k25_validate.prefix_search import Expected, PrefixSearch, Transition

Array = npt.NDArray[Any]

#: The stages of an op whose formula reads the op's own inputs only; it may depend on the op's outputs, as they were
#: made, by formal name (either choice of a tie is right).
Formula = Callable[[Mapping[str, Array]], Taps]

#: Stages are computed from the op's own inputs in float64, so no noise is measured: rounding of the whole op at most.
STAGE_FLOOR = 4e-6

#: On the same inputs a kernel that is wrong is at least this many times as far from the formula as the body, and at
#: least so much of its tolerance off: a body may be exact where a kernel only rounds.
_FARTHER = 2.0
_LEAST_EXCESS = 0.5


@dataclass(frozen=True, kw_only=True)
class StageFault:
    """The first stage of a body that is off: the node that makes it and the tensor, with the errors there and before.

    `path` names the loop or call that it is in.
    """

    node: int
    graph: StraightGraph
    transition: Transition
    between: tuple[str, ...]
    path: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        """The op of the node."""
        return str(self.graph.nodes[self.node].op_type)


class BodyRunner:
    """Runs models of standard ops on the CPU, bfloat16 as its bits; counts its runs."""

    def __init__(self) -> None:
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        self._options.intra_op_num_threads = 1
        self.runs = 0

    def run(self, model: onnx.ModelProto, feeds: Mapping[str, HostTensor]) -> dict[str, Array]:
        """All outputs of the model."""
        self.runs += 1
        session = ort.InferenceSession(model.SerializeToString(), self._options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        inputs = {value.name: ort_value(feeds[value.name]) for value in session.get_inputs()}
        return dict(zip(names, (value.numpy() for value in session.run_with_ort_values(names, inputs)), strict=True))


def stage_expected(values: Mapping[str, Array], floor: float = STAGE_FLOOR, rows: int = 0) -> dict[str, Expected]:
    """Each stage's value as what its tensor should hold; `rows` as in `Expected`."""
    return {
        name: Expected(values=np.asarray(value, np.float64), noise=0.0, floor=floor, tap=name, rows=rows)
        for name, value in values.items()
    }


def first_stage_fault(
    runner: BodyRunner, model: onnx.ModelProto, feeds: Mapping[str, HostTensor], expected: Mapping[str, Expected]
) -> StageFault | None:
    """The first node of a straight graph whose output is off, or None. Others than `expected` are passed over."""
    graph = StraightGraph(model)
    known = {name: value for name, value in expected.items() if name in graph.producers}
    cuts = graph.cuts(set(known), weights=())
    if not cuts:
        return None

    def values_of(cut: Cut) -> Mapping[str, Array]:
        found = runner.run(graph.prefix(cut.outputs), feeds)
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    transition = PrefixSearch(cuts, known, values_of).first_divergence()
    if transition is None:
        return None
    start = transition.before.cut.node if transition.before is not None else -1
    between = [index for index in graph.needed_nodes([transition.tensor]) if start < index]
    return StageFault(
        node=graph.producers[transition.tensor],
        graph=graph,
        transition=transition,
        between=tuple(str(graph.nodes[index].op_type) for index in between if not _is_constant(graph, index)),
    )


def is_kernel_farther(
    kernel: Mapping[str, Array], body: Mapping[str, Array], judged: Callable[[Mapping[str, Array]], dict[str, Expected]]
) -> bool:
    """Whether the kernel's outputs are clearly farther from the formula than the body's; both by formal name."""

    def excess(made: Mapping[str, Array]) -> float:
        expected = judged(made)
        return max(expected[name].excess(values) for name, values in made.items())

    return excess(kernel) > max(_LEAST_EXCESS, _FARTHER * excess(body))


def _is_constant(graph: StraightGraph, index: int) -> bool:
    return not any(node_reads(graph.nodes[index]))


def body_of(
    model: onnx.ModelProto, node: onnx.NodeProto, inputs: Sequence[HostTensor]
) -> tuple[onnx.ModelProto, dict[str, HostTensor]] | None:
    """The node's function body as a graph, and its inputs by formal name; None where the op has no body in the file."""
    function = function_of(model, node)
    if function is None:
        return None
    feeds = dict(zip(function.input, inputs, strict=True))
    types = {name: ONNX_DTYPES[tensor.dtype] for name, tensor in feeds.items()}
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return body_model(model, node, types, attributes), feeds
