"""The native library: its table is Python's, its refusals are Python's, and ONNX Runtime hands them on."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from native_calls import INVALID, LIBRARY_OR_NONE, REASON, UNAVAILABLE, Named, call, named
from test_signatures import BY_NAME, CALLS, WRONG_DTYPES, WRONG_SIZES, inferred

from k25_plugins import native_library, native_signatures
from k25_plugins.errors import InputError
from k25_plugins.native_calls import call_native
from k25_plugins.native_library import (
    LIBRARY,
    MlaAttributes,
    Mode,
    MoeDispatchAttributes,
    NativeLibrary,
    RmsNormAttributes,
    RouterAttributes,
    VisionAttentionAttributes,
    load_library,
)
from k25_plugins.onnx_functions import functions_for
from k25_plugins.signatures import ONNX_DTYPES, OPS, ROUTER, OpSignature

needs_library = pytest.mark.skipif(LIBRARY_OR_NONE is None, reason=REASON)
FOLDERS = {signature.name: signature.folder for signature in OPS}
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "int32": np.int32, "int64": np.int64, "float16": np.float16}


def test_the_committed_table_is_the_one_in_python() -> None:
    assert native_signatures.PATH.read_text() == native_signatures.signatures_inc(), (
        "run python -m k25_plugins.native_signatures"
    )


@needs_library
def test_version_and_path() -> None:
    assert LIBRARY_OR_NONE is not None
    from k25_plugins.version import __version__

    assert LIBRARY_OR_NONE.version.startswith(__version__)
    assert LIBRARY_OR_NONE.supports("portable")
    assert LIBRARY_OR_NONE.supports(LIBRARY_OR_NONE.isa)


def attributes_of(op: str) -> Any:
    values = CALLS[op][1]
    if op == "MoEDispatch":
        return MoeDispatchAttributes(values["intermediate_size"], values["group_size"])
    if op == "VisionAttention":
        return VisionAttentionAttributes(values["num_heads"], values["softmax_scale"])
    if op == "RMSNorm":
        return RmsNormAttributes(values["eps"])
    if op == "Router":
        return RouterAttributes(values["top_k"], values["normalise"], values["scaling_factor"])
    if op == "MLA":
        frequencies = (ctypes.c_float * len(values["inv_freq"]))(*values["inv_freq"])
        return MlaAttributes(
            values["num_heads"],
            values["qk_nope_head_dim"],
            values["v_head_dim"],
            values["softmax_scale"],
            frequencies,
            len(frequencies),
        )
    return None


def refused(op: str, attributes: Any = None, **changes: tuple[list[int], str]) -> str:
    """The library's message for a call that must not be accepted."""
    ports = {**CALLS[op][0], **changes}
    inputs = [Named(np.zeros(shape, STORAGE[dtype]), dtype) for shape, dtype in ports.values()]
    outputs = [Named(np.zeros(1, np.float32), "float32") for _ in range(2)]
    status, message = call(FOLDERS[op], inputs, outputs, attributes or attributes_of(op))
    assert status == INVALID, message
    return message


@needs_library
@pytest.mark.parametrize(("op", "port", "dtype"), WRONG_DTYPES)
def test_a_wrong_dtype_is_refused_as_in_python(op: str, port: str, dtype: str) -> None:
    change = {port: (CALLS[op][0][port][0], dtype)}
    with pytest.raises(InputError) as caught:
        inferred(op, **change)
    assert refused(op, **change) == str(caught.value)


@needs_library
@pytest.mark.parametrize(("op", "port", "axis", "named_port", "expected", "found"), WRONG_SIZES)
def test_a_wrong_size_is_refused_as_in_python(
    op: str, port: str, axis: int, named_port: str, expected: int, found: int
) -> None:
    shape, dtype = CALLS[op][0][port]
    change = {port: ([size + 1 if index == axis else size for index, size in enumerate(shape)], dtype)}
    with pytest.raises(InputError) as caught:
        inferred(op, **change)
    assert refused(op, **change) == str(caught.value)


@needs_library
def test_a_width_that_is_no_multiple_of_the_heads_is_refused_as_in_python() -> None:
    heads = CALLS["VisionAttention"][1]["num_heads"]
    (patches, width), dtype = CALLS["VisionAttention"][0]["k"]
    change = {"k": ([patches, width + 1], dtype)}
    with pytest.raises(InputError, match=f"input k, axis width: expected a multiple of num_heads {heads}") as caught:
        inferred("VisionAttention", **change)
    assert refused("VisionAttention", **change) == str(caught.value)


@needs_library
@pytest.mark.parametrize("top_k", [-(2**63), -1, 0, 11, 2**32 + 3, 2**63 - 1])
def test_a_choice_of_no_or_too_many_experts_is_refused_as_in_python(top_k: int) -> None:
    ports, values = CALLS["Router"]
    shapes, dtypes = [shape for shape, _ in ports.values()], [dtype for _, dtype in ports.values()]
    with pytest.raises(InputError, match="attribute top_k: expected 1 to the 10 experts") as caught:
        ROUTER.infer_outputs(shapes, dtypes, {**values, "top_k": top_k})
    assert refused("Router", RouterAttributes(top_k, 1, 2.5)) == str(caught.value)
    # It comes before a size that does not fit, and after a dtype that does not.
    assert refused("Router", RouterAttributes(top_k, 1, 2.5), bias=([9], "float32")) == str(caught.value)
    assert "bias: expected dtype" in refused("Router", RouterAttributes(top_k, 1, 2.5), bias=([10], "bfloat16"))


@needs_library
@pytest.mark.parametrize(("op", "port"), [(op, port) for op, (ports, _) in CALLS.items() for port in ports])
def test_a_wrong_rank_and_an_empty_axis_are_refused(op: str, port: str) -> None:
    shape, dtype = CALLS[op][0][port]
    if (op, port) not in (("Linear", "x"), ("RMSNorm", "x")):
        assert f"k25.{op}: input {port}: expected axes [" in refused(op, **{port: ([*shape, 1], dtype)})
    assert f"k25.{op}: input {port}: expected no empty axis" in refused(op, **{port: ([0, *shape[1:]], dtype)})


@needs_library
def test_a_path_that_is_not_there_is_unavailable() -> None:
    x, weight = named(np.ones((1, 4), np.float32), "float32"), named(np.ones((2, 4), np.float32), "bfloat16")
    y = named(np.zeros((1, 2), np.float32), "float32")
    assert LIBRARY_OR_NONE is not None
    missing = [isa for isa in native_library.ISAS[1:] if not LIBRARY_OR_NONE.supports(isa)]
    for isa in missing:
        assert call("linear", [x, weight], [y], isa=isa)[0] == UNAVAILABLE


def session(op: str, types: list[int], ranks: list[int], **attributes: Any) -> ort.InferenceSession:
    """A graph of one node, without a body: it loads only with a kernel for these types."""
    assert LIBRARY_OR_NONE is not None
    helper = onnx.helper
    names = [f"i{index}" for index in range(len(types))]
    inputs = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name, kind, rank in zip(names, types, ranks, strict=True)
    ]
    output = helper.make_tensor_value_info("y", types[0], None)
    graph = helper.make_graph([helper.make_node(op, names, ["y"], domain="k25", **attributes)], "g", inputs, [output])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY_OR_NONE.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@needs_library
def test_a_bad_shape_is_a_status_of_onnx_runtime() -> None:
    run = session("Linear", [1, 16], [2, 2])
    x = ort.OrtValue.ortvalue_from_numpy(np.ones((3, 5), np.float32))
    weight = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros((4, 6), np.uint16), 16)
    with pytest.raises(Exception, match=r"k25\.Linear: input weight, axis in_features: expected 5, found 6"):
        run.run_with_ort_values(None, {"i0": x, "i1": weight})
    weight = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.full((4, 5), 0x3F80, np.uint16), 16)
    found = run.run_with_ort_values(None, {"i0": x, "i1": weight})[0].numpy()  # and the session goes on
    assert np.array_equal(found, np.full((3, 4), 5, np.float32))


@needs_library
def test_a_bad_index_is_a_status_of_onnx_runtime() -> None:
    run = session("MoEDispatch", [1, 6, 1, 6, 16, 7], [2] * 6, intermediate_size=32, group_size=32)
    feeds = {
        "i0": np.ones((2, 32), np.float32),
        "i1": np.array([[0], [9]], np.int32),
        "i2": np.ones((2, 1), np.float32),
        "i3": np.zeros((1000, 2), np.int32),
        "i5": np.zeros((3, 6), np.int64),
    }
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    values["i4"] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros((1000, 4), np.uint16), 16)
    with pytest.raises(Exception, match=r"k25\.MoEDispatch: input expert_ids, token 1.*0\.\.2, found 9"):
        run.run_with_ort_values(None, values)


def session_of(
    op: str, inputs: list[Named], outputs: list[str], *, bodies: bool, native: bool = True, **attributes: Any
) -> ort.InferenceSession:
    """A model of one node with its function body or without, over the library or not."""
    assert LIBRARY_OR_NONE is not None
    helper, kinds = onnx.helper, ONNX_DTYPES
    names = [spec.name for spec in BY_NAME[op].inputs]
    ports = [
        helper.make_tensor_value_info(name, kinds[tensor.dtype], [None] * tensor.array.ndim)
        for name, tensor in zip(names, inputs, strict=True)
    ]
    results = [
        helper.make_tensor_value_info(spec.name, kinds[dtype], None)
        for spec, dtype in zip(BY_NAME[op].outputs, outputs, strict=True)
    ]
    node = helper.make_node(op, names, [value.name for value in results], domain="k25", **attributes)
    model = helper.make_model(
        helper.make_graph([node], "g", ports, results),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("k25", 1)],
        functions=functions_for([op]) if bodies else [],
        ir_version=10,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    if native:
        options.register_custom_ops_library(str(LIBRARY_OR_NONE.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(run: ort.InferenceSession, inputs: list[Named]) -> list[npt.NDArray[Any]]:
    """Outputs; bfloat16 as bits."""
    typed = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {
        port.name: typed(np.array(tensor.array, order="C"), ONNX_DTYPES[tensor.dtype])
        for port, tensor in zip(run.get_inputs(), inputs, strict=True)
    }
    found = run.run_with_ort_values(None, values)
    if any(value.data_type() == "tensor(bfloat16)" for value in found):
        arrays = [np.empty(value.shape(), np.uint16) for value in found]
        for value, array in zip(found, arrays, strict=True):
            ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
        return arrays
    return [value.numpy() for value in found]


def random_inputs(op: str, dtype: str) -> list[Named]:
    generator = np.random.default_rng(0)
    if op == "Router":
        logits, bias = generator.normal(size=(130, 385)), generator.normal(scale=0.1, size=385)
        return [named(logits.astype(np.float32), "float32"), named(bias.astype(np.float32), "float32")]
    x, weight = generator.normal(size=(5, 33, 331)), generator.normal(size=331)
    return [named(x.astype(np.float32), dtype), named(weight.astype(np.float32), "bfloat16")]


#: With GPU kernels, ops that have none run from their bodies.
cpu_library = pytest.mark.skipif(
    LIBRARY_OR_NONE is None or LIBRARY_OR_NONE.handle.k25_gpu_kernel_count() > 0,
    reason="no native library, or one with GPU kernels",
)


@cpu_library
@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("bodies", [True, False], ids=["with body", "without"])
@pytest.mark.parametrize(
    ("op", "dtype", "attributes"),
    [
        ("RMSNorm", "float32", {"eps": 1e-5}),
        ("RMSNorm", "bfloat16", {"eps": 0.5}),
        ("Router", "float32", {"top_k": 8, "normalise": 1, "scaling_factor": 2.827}),
        ("Router", "float32", {"top_k": 3, "normalise": 0, "scaling_factor": 1.5}),
    ],
)
def test_a_session_has_the_bits_of_the_kernel(
    op: str, dtype: str, attributes: dict[str, Any], bodies: bool, mode: Mode
) -> None:
    assert LIBRARY_OR_NONE is not None
    inputs = random_inputs(op, dtype)
    outputs = [dtype] if op == "RMSNorm" else ["int32", "float32"]
    wanted = call_native(LIBRARY_OR_NONE, op, [tensor.array for tensor in inputs], attributes, mode=mode)
    for threads in (0, 3):
        with LIBRARY_OR_NONE.settings_of_sessions(mode=mode, threads=threads):
            run = session_of(op, inputs, outputs, bodies=bodies, **attributes)
        for _ in range(3):
            for one, other in zip(run_session(run, inputs), wanted, strict=True):
                np.testing.assert_array_equal(one, other)


@needs_library
@pytest.mark.parametrize("op", ["RMSNorm", "Router"])
def test_the_body_computes_the_same_without_the_library(op: str) -> None:
    inputs = random_inputs(op, "float32")
    outputs = ["float32"] if op == "RMSNorm" else ["int32", "float32"]
    found, wanted = (
        run_session(session_of(op, inputs, outputs, bodies=True, native=native, **CALLS[op][1]), inputs)
        for native in (True, False)
    )
    assert len(found) == len(wanted) == len(outputs)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5)


@cpu_library
def test_a_bad_attribute_is_a_status_of_onnx_runtime() -> None:
    inputs = random_inputs("Router", "float32")
    attributes: dict[str, Any] = {"normalise": 1, "scaling_factor": 1.0}
    for top_k in (0, 386):
        run = session_of("Router", inputs, ["int32", "float32"], bodies=False, top_k=top_k, **attributes)
        message = rf"k25\.Router: attribute top_k: expected 1 to the 385 experts of input logits, found {top_k}"
        with pytest.raises(Exception, match=message):
            run_session(run, inputs)
    some: list[dict[str, Any]] = [{"normalise": 1}, {"scaling_factor": 1.0}]
    for missing in some:
        with pytest.raises(Exception, match=r"normalise|scaling_factor"):
            session_of("Router", inputs, ["int32", "float32"], bodies=False, top_k=3, **missing)
    with pytest.raises(Exception, match="eps"):
        session_of("RMSNorm", random_inputs("RMSNorm", "float32"), ["float32"], bodies=False)


@cpu_library
@pytest.mark.parametrize("signature", OPS, ids=[signature.name for signature in OPS])
def test_every_choice_of_dtypes_has_one_kernel(signature: OpSignature) -> None:
    ports, attributes = CALLS[signature.name]
    for dtypes in signature.overloads():
        inputs = [
            Named(np.zeros([1] * len(ports[spec.name][0]), np.int32), dtypes.get(spec.dtype, spec.dtype))
            for spec in signature.inputs
        ]
        outputs = [dtypes.get(spec.dtype, spec.dtype) for spec in signature.outputs]
        session_of(signature.name, inputs, outputs, bodies=False, **attributes)
        changed = ["int64" if dtype == outputs[0] else dtype for dtype in outputs]
        with pytest.raises(Exception, match="int64"):
            session_of(signature.name, inputs, changed, bodies=False, **attributes)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libk25_ops.so").write_bytes(b"not a library")
    with pytest.raises(InputError, match=r"native library .*libk25_ops.so: cannot be loaded"):
        load_library(tmp_path / "libk25_ops.so")


FIND = """
from k25_plugins.native_library import native_library
first, second = native_library(), native_library()
assert first is second
print(first is not None)
"""


@pytest.mark.parametrize(("setting", "found", "warnings"), [("off", False, 0), ("on", True, 0), (None, True, 0)])
def test_where_the_library_is_looked_for(setting: str | None, found: bool, warnings: int) -> None:
    if found and not LIBRARY.is_file():
        pytest.skip(REASON)
    environment = {name: value for name, value in os.environ.items() if name != "K25_NATIVE"}
    environment |= {} if setting is None else {"K25_NATIVE": setting}
    done = subprocess.run([sys.executable, "-c", FIND], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(found)
    assert done.stderr.count("k25:") == warnings


def test_a_missing_library_is_said_once(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setenv("K25_NATIVE", "on")
    native_library._found.cache_clear()
    try:
        assert native_library.native_library() is None
        assert native_library.native_library() is None
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert "make setup" in text
        monkeypatch.setenv("K25_NATIVE", str(tmp_path / "other.so"))
        with pytest.raises(InputError, match="K25_NATIVE"):
            native_library.native_library()
    finally:
        native_library._found.cache_clear()


@needs_library
def test_the_mode_is_that_of_the_thread_that_makes_the_session() -> None:
    library: NativeLibrary = load_library(LIBRARY)
    before = library.handle.k25_session_mode()
    library.set_session_mode("exact")
    assert library.handle.k25_session_mode() == 1
    library.set_session_mode("fast")
    assert library.handle.k25_session_mode() == 0
    library.handle.k25_set_session_mode(before)
