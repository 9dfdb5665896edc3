"""What the stitched runtime costs for each component call, measured with components that do nothing.

    .venv/bin/python bench/overhead.py BUNDLE [--steps N] [--rounds N] [--threads N]

The bundle's components are replaced, in memory, by graphs with the same inputs and outputs that pass `hidden` on and
leave the cache as it is; weights are bound as ever. A decode step is then overhead only: microseconds for each
component call, as best and median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from k25_runtime import Runtime
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def empty_component(data: bytes) -> bytes:
    """The same inputs and outputs, and hardly any work: outputs are zeros, the cache is not written."""
    graph = onnx.load_from_string(data).graph
    helper = onnx.helper
    nodes, constants = [], []
    for output in graph.output:
        dims = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
        if output.name == "cache_out":  # scatter of nothing, in place
            constants.append(helper.make_tensor("no_rows", INT64, [0, 2], []))
            constants.append(helper.make_tensor("nothing", FLOAT, [0, dims[-1]], []))
            nodes.append(helper.make_node("ScatterND", ["cache", "no_rows", "nothing"], ["cache_out"]))
        elif output.name == "hidden_out":
            nodes.append(helper.make_node("Identity", ["hidden"], ["hidden_out"]))
        else:  # of one token
            kind = output.type.tensor_type.elem_type
            constants.append(helper.make_tensor(f"zero_{output.name}", kind, [1, dims[-1]], [0] * dims[-1]))
            nodes.append(helper.make_node("Identity", [f"zero_{output.name}"], [output.name]))
    made = helper.make_graph(nodes, graph.name, graph.input, graph.output, initializer=constants)
    return bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )


class EmptyComponents(OnnxRuntimeCpu):
    """The CPU backend with every component emptied."""

    def load(self, data: bytes, *, label: str) -> Any:
        return super().load(empty_component(data), label=label)


def main() -> None:
    """Run rounds of decode steps and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    backend = EmptyComponents(threads=options.threads)
    with Runtime.open(options.bundle, backend=backend, context=4096, max_sequences=1) as runtime:
        calls = runtime.manifest.model.text.num_hidden_layers + 2
        sequence = runtime.new_sequence()
        batch = runtime.reserved_batch([(sequence, [1])])
        rows = np.zeros(1, np.int32)
        runtime.runner.run(batch, rows)
        times = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            for _ in range(options.steps):
                runtime.runner.run(batch, rows)
            times.append((time.perf_counter() - started) / options.steps / calls * 1e6)
        runtime.free(sequence)
        whole = []
        for _ in range(options.rounds):
            runtime.prefill([1])
            started = time.perf_counter()
            for _ in range(options.steps):
                runtime.decode(1)
            whole.append((time.perf_counter() - started) / options.steps * 1e6)
        result = {
            "components_a_step": calls,
            "us_a_component_call": {"best": round(min(times), 2), "median": round(statistics.median(times), 2)},
            "us_a_decode_step": {"best": round(min(whole), 1), "median": round(statistics.median(whole), 1)},
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
