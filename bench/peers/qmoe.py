"""ONNX Runtime's QMoE at K2.5's real shape, as a peer of bench/native_ops.py (`--qmoe`).

Its CPU kernel wants each expert's gate and up rows interleaved in one matrix, [E, 2 I, H / 2], and float32 scales: the
checkpoint's words have to be repacked, which is not timed. `accuracy` 0 computes in float32, 4 rounds activations to
int8. Reads a number of tokens from each line of standard input and answers `seconds S`; experts, sizes and the choice
of experts are those of native_ops.py.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnx
import onnxruntime as ort

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, GROUP = 7168, 2048, 16, 8, 32
FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
NOT_CHOSEN = -1e30


def session(threads: int, accuracy: int) -> ort.InferenceSession:
    """One QMoE node: routing by input 1, mixing by input 14; weights are initialisers, so that they are prepacked."""
    generator = np.random.default_rng(0)
    helper = onnx.helper
    shapes = {"fc1": (2 * INTERMEDIATE, HIDDEN), "fc2": (HIDDEN, INTERMEDIATE)}
    constants = []
    for name, (out, columns) in shapes.items():
        words = np.broadcast_to(
            generator.integers(0, 256, (1, out, columns // 2), np.uint8), (EXPERTS, out, columns // 2)
        )
        scales = np.full((EXPERTS, out, columns // GROUP), 2.0**-7, np.float32)
        constants.append(helper.make_tensor(f"{name}_words", UINT8, words.shape, words.tobytes(), raw=True))
        constants.append(helper.make_tensor(f"{name}_scales", FLOAT, scales.shape, scales.tobytes(), raw=True))
    names = ["x", "choice", "fc1_words", "fc1_scales", "", "fc2_words", "fc2_scales", "", "", "", "", "", "", "", "mix"]
    node = helper.make_node(
        "QMoE",
        names,
        ["y"],
        domain="com.microsoft",
        k=TOP_K,
        block_size=GROUP,
        expert_weight_bits=4,
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=0,
        activation_alpha=1.0,
        activation_beta=0.0,
        accuracy_level=accuracy,
    )
    value = helper.make_tensor_value_info
    inputs = [
        value("x", FLOAT, ["t", HIDDEN]),
        value("choice", FLOAT, ["t", EXPERTS]),
        value("mix", FLOAT, ["t", EXPERTS]),
    ]
    graph = helper.make_graph([node], "qmoe", inputs, [value("y", FLOAT, ["t", HIDDEN])], initializer=constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main(threads: int, accuracy: int) -> None:
    """Load the experts, then answer lines."""
    layer = session(threads, accuracy)
    generator = np.random.default_rng(1)
    print("ready 1", flush=True)
    for calls, line in enumerate(sys.stdin, start=1):
        tokens = int(line)
        ids = np.array([generator.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
        if tokens == 1:
            ids = (np.arange(TOP_K) + calls % 2 * TOP_K)[None] % EXPERTS
        choice = np.full((tokens, EXPERTS), NOT_CHOSEN, np.float32)
        np.put_along_axis(choice, ids, 1.0, axis=1)
        mix = np.zeros((tokens, EXPERTS), np.float32)
        np.put_along_axis(mix, ids, 0.1, axis=1)
        feeds = {"x": generator.standard_normal((tokens, HIDDEN), np.float32), "choice": choice, "mix": mix}
        started = time.perf_counter()
        layer.run(None, feeds)
        print(f"seconds {time.perf_counter() - started:.9f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
