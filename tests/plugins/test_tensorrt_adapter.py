"""The C++ plugins of TensorRT: the same operators, fields and engines as the Python creators.

What needs no TensorRT is compiled with the machine's compiler. The library itself is compiled where
TENSORRT_INCLUDE_DIR names TensorRT's headers (and loaded where TensorRT is installed); these are skipped elsewhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from k25_plugins import tensorrt_plugin_rules as rules
from k25_plugins.signatures import MLA, MOE_DISPATCH, ONNX_DTYPES

PLUGINS = Path(__file__).parents[2] / "plugins"
SHIM = r"""
#include "tensorrt_op.h"
using namespace k25;
extern "C" int32_t op_count() { return (int32_t)plugin_ops().size(); }
extern "C" const char* op_name(int32_t op) { return plugin_ops()[op].signature->name; }
extern "C" int32_t fits(int32_t op, int32_t position, const int32_t* dtypes) {
  return dtype_fits(*plugin_ops()[op].signature, position, dtypes);
}
extern "C" int32_t alias(int32_t op, int32_t output) { return aliased_input(*plugin_ops()[op].signature, output); }
extern "C" int32_t check(int32_t op, const int32_t* ints, int32_t freqs, k25_tensor* inputs, k25_tensor* outputs,
                         char* text, size_t size) {
  Attributes given;
  given.ints.resize(5);
  given.floats.resize(5);
  const Signature& table = *plugin_ops()[op].signature;
  for (int32_t index = 0; index < table.attribute_count; ++index) {
    if (table.attributes[index].kind == kInt) given.ints[index] = {ints[index]};
    else given.floats[index] = std::vector<float>(table.attributes[index].kind == kFloats ? freqs : 1, 0.5f);
  }
  fill_unknown(plugin_ops()[op], given, inputs);
  return plugin_ops()[op].outputs(inputs, given, outputs, {text, size});
}
extern "C" int32_t launch(int32_t op, const int32_t* ints, int32_t freqs, k25_tensor* inputs, char* text, size_t size) {
  Attributes given;
  given.ints = {{ints[0]}, {ints[1]}, {ints[2]}, {}, {}};
  given.floats = {{}, {}, {}, {1.0f}, std::vector<float>(freqs, 0.5f)};
  k25_tensor outputs[2];
  size_t bytes = 7;
  const int32_t asked = plugin_ops()[op].workspace(inputs, given, &bytes, {text, size});
  const int32_t run = plugin_ops()[op].launch(inputs, given, outputs, nullptr, nullptr, {text, size});
  return asked == run && bytes == 0 ? run : -1;
}
"""
UNAVAILABLE, INVALID = 2, 1


class Tensor(ctypes.Structure):
    """k25_tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
    )


def tensors(*described: tuple[str, tuple[int, ...]]) -> Any:
    array = (Tensor * 8)()
    for tensor, (dtype, dims) in zip(array, described, strict=False):
        tensor.dtype, tensor.rank = ONNX_DTYPES[dtype], len(dims)
        tensor.dims[: len(dims)] = dims
    return array


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What the adapter is made of, without TensorRT."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cc").write_text(SHIM)
    sources = ["adapters/tensorrt_op.cc", "core/checks.cc", "core/gpu.cc", "core/gpu_kernels.cc", "core/cuda_driver.cc"]
    sources += [f"k25_plugins/{op}/gpu.cc" for op in ("linear", "mla", "moe_dispatch")]
    command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{PLUGINS}/core", f"-I{PLUGINS}/adapters", "shim.cc"]
    command += [*(str(PLUGINS / source) for source in sources), "-o", "shim.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.op_name.restype = ctypes.c_char_p
    return library


def test_the_operators_are_those_of_the_table(shim: ctypes.CDLL) -> None:
    names = [shim.op_name(index).decode() for index in range(shim.op_count())]
    assert names == [signature.name for signature in rules.PLUGIN_OPS]


@pytest.mark.parametrize("op", range(len(rules.PLUGIN_OPS)))
def test_dtypes_fit_as_in_python(shim: ctypes.CDLL, op: int) -> None:
    """Every dtype at every position, after every choice of the type parameters."""
    signature = rules.PLUGIN_OPS[op]
    specs = signature.inputs + signature.outputs
    for types in signature.overloads():
        dtypes = [types.get(spec.dtype, spec.dtype) for spec in specs]
        for position, wrong in product(range(len(specs)), ONNX_DTYPES):
            tried = [*dtypes[:position], wrong]
            numbers = (ctypes.c_int32 * len(tried))(*(ONNX_DTYPES[dtype] for dtype in tried))
            assert bool(shim.fits(op, position, numbers)) == rules.dtype_fits(signature, position, tried), tried


@pytest.mark.parametrize("op", range(len(rules.PLUGIN_OPS)))
def test_aliases_are_those_of_python(shim: ctypes.CDLL, op: int) -> None:
    signature = rules.PLUGIN_OPS[op]
    found = [shim.alias(op, output) for output in range(len(signature.outputs))]
    assert found == [rules.aliased_input(signature, output) for output in range(len(signature.outputs))]
    assert (2 in found) == (signature is MLA)


MLA_INTS = (ctypes.c_int32 * 5)(5, 12, 28)
MLA_FREQUENCIES = 3


def mla_inputs(tokens: int, sequences: int, *, q: int = 5 * 18, width: int = 26, blocks: int = 9) -> Any:
    size = sequences + 1 if sequences > 0 else -1
    return tensors(
        ("bfloat16", (tokens, q)),
        ("bfloat16", (tokens, width)),
        ("bfloat16", (blocks, 4, width)),
        ("bfloat16", (5 * 40, width - 6)),
        ("int32", (tokens,)),
        ("int32", (size,)),
        ("int32", (sequences, 3)),
    )


def checked(shim: ctypes.CDLL, op: int, ints: Any, inputs: Any) -> tuple[int, str, Any]:
    text, outputs = ctypes.create_string_buffer(512), (Tensor * 8)()
    status = shim.check(op, ints, MLA_FREQUENCIES, inputs, outputs, text, ctypes.c_size_t(512))
    return status, text.value.decode(), outputs


@pytest.mark.parametrize(("tokens", "sequences", "blocks"), [(7, 2, 9), (-1, 2, 9), (7, -1, 9), (-1, -1, -1)])
def test_sizes_that_are_not_known_yet_fit(shim: ctypes.CDLL, tokens: int, sequences: int, blocks: int) -> None:
    """TensorRT asks for the shapes of outputs before it knows those of inputs."""
    status, text, outputs = checked(shim, 0, MLA_INTS, mla_inputs(tokens, sequences, blocks=blocks))
    assert (status, text) == (0, "")
    assert list(outputs[0].dims)[1] == 5 * 28
    assert list(outputs[1].dims)[1:3] == [4, 26]


def test_sizes_that_disagree_are_found_with_others_unknown(shim: ctypes.CDLL) -> None:
    status, text, _ = checked(shim, 0, MLA_INTS, mla_inputs(-1, -1, q=5 * 17))
    assert status == INVALID
    assert text == "k25.MLA: input q, axis num_heads*qk_head_dim: expected 90, found 85"


def test_another_rank_is_an_error_of_the_core(shim: ctypes.CDLL) -> None:
    inputs = mla_inputs(-1, -1)
    inputs[2].rank = 2
    assert checked(shim, 0, MLA_INTS, inputs)[1].startswith("k25.MLA: input cache: expected axes [blocks, block_size")


def test_experts_with_an_unknown_number_of_rows(shim: ctypes.CDLL) -> None:
    inputs = tensors(
        ("float32", (-1, 64)),
        ("int32", (-1, 3)),
        ("float32", (-1, 3)),
        ("int32", (-1, 2)),
        ("bfloat16", (-1, 4)),
        ("int64", (10, 6)),
    )
    status, text, outputs = checked(shim, 1, (ctypes.c_int32 * 5)(32, 32), inputs)
    assert (status, text, list(outputs[0].dims)[1]) == (0, "", 64)
    assert rules.PLUGIN_OPS[1] is MOE_DISPATCH


def test_launches_say_that_there_are_no_kernels(shim: ctypes.CDLL) -> None:
    """Never silence: a clear status and text, after the same checks as everywhere."""
    text = ctypes.create_string_buffer(512)
    size = ctypes.c_size_t(512)
    assert shim.launch(0, MLA_INTS, MLA_FREQUENCIES, mla_inputs(7, 2), text, size) == UNAVAILABLE
    assert text.value.startswith(b"k25.MLA: this build has no GPU kernels. To get them: ")
    assert shim.launch(0, MLA_INTS, MLA_FREQUENCIES, mla_inputs(7, 2, q=85), text, size) == INVALID
    assert b"expected 90, found 85" in text.value


# The library, against TensorRT's headers.


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libk25_tensorrt.so as CMake builds it."""
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not headers:
        pytest.skip("TENSORRT_INCLUDE_DIR is not set: the folder of NvInferRuntime.h")
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    build = tmp_path_factory.mktemp("build")
    configure = ["cmake", "-S", str(PLUGINS), "-B", str(build), f"-DTENSORRT_INCLUDE_DIR={headers}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(build), "--target", "k25_tensorrt"], check=True, stdout=subprocess.DEVNULL)
    return next(build.glob("libk25_tensorrt*"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For children that use TensorRT."""
    module = pytest.importorskip("k25_engines.tensorrt_module")
    pytest.importorskip("tensorrt_rtx")
    extra = module.parser_environment(module.installed_tensorrt("tensorrt-rtx"), tmp_path_factory.mktemp("lib"))
    return {**os.environ, **extra}


def child(script: str, *arguments: object, environment: dict[str, str], given: str = "") -> tuple[Any, str]:
    """What a child prints as JSON at the end, and all it says. A plugin that crashes must not take pytest along."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        input=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_the_library_needs_neither_cuda_nor_tensorrt(library: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if any(name in line for name in ("cuda", "cudart", "nvinfer", "tensorrt"))]


CREATORS = """
import json, sys, numpy as np, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.WARNING)
registry = trt.get_plugin_registry()
if sys.argv[1] == "python":
    from k25_plugins.tensorrt_plugins import register_creators
    kept = register_creators(trt)
else:
    kept = registry.load_library(sys.argv[1])
found = {}
for name in ("MLA", "MoEDispatch"):
    creator = registry.get_creator(name, "1", "k25")
    fields = [(field.name, str(field.type)) for field in creator.field_names]
    found[name] = [creator.name, creator.plugin_version, creator.plugin_namespace, fields]
print(json.dumps(found))
"""


def test_creators_are_those_of_python(library: Path, environment: dict[str, str]) -> None:
    ours, _ = child(CREATORS, library.resolve(), environment=environment)
    python, _ = child(CREATORS, "python", environment=environment)
    assert ours == python
    assert set(ours) == {signature.name for signature in rules.PLUGIN_OPS}


FIELDS = """
import json, sys, numpy as np, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.WARNING)
registry = trt.get_plugin_registry()
kept = registry.load_library(sys.argv[1])
creator = registry.get_creator("MLA", "1", "k25")
kinds = {"i4": trt.PluginFieldType.INT32, "i8": trt.PluginFieldType.INT64, "f4": trt.PluginFieldType.FLOAT32,
         "f8": trt.PluginFieldType.FLOAT64, "i1": trt.PluginFieldType.INT8}
good = {"num_heads": ("i4", [5]), "qk_nope_head_dim": ("i4", [12]), "v_head_dim": ("i4", [28]),
        "softmax_scale": ("f4", [0.25]), "inv_freq": ("f4", [1, 0.5, 0.25])}
made = {}
for label, change in json.load(sys.stdin).items():
    fields = list({**good, **change}.items()) + ([("num_heads", ("i4", [5]))] if label == "twice" else [])
    keep = [(name, kind, np.array(values, kind)) for name, (kind, values) in fields if kind]
    given = [trt.PluginField(name, values, kinds[kind]) for name, kind, values in keep]
    plugin = creator.create_plugin("a_node", trt.PluginFieldCollection(given), trt.TensorRTPhase.RUNTIME)
    made[label] = plugin is not None
print(json.dumps(made))
"""
GOOD_FIELDS = {"good": {}, "wide": {"num_heads": ("i8", [5]), "inv_freq": ("f8", [1, 0.5])}}
BAD_FIELDS: dict[str, dict[str, Any]] = {
    "missing": {"num_heads": ("", [])},
    "unknown": {"other": ("i4", [1])},
    "twice": {},
    "kind": {"num_heads": ("f4", [5])},
    "bytes": {"inv_freq": ("i1", [1, 2])},
    "many": {"num_heads": ("i4", [5, 6])},
    "none": {"inv_freq": ("f4", [])},
    "range": {"num_heads": ("i8", [1 << 40])},
    "long": {"inv_freq": ("f4", [1] * 65_537)},
}


def test_fields_that_do_not_fit_are_refused_by_name(library: Path, environment: dict[str, str]) -> None:
    cases = json.dumps({**GOOD_FIELDS, **BAD_FIELDS})
    made, messages = child(FIELDS, library.resolve(), environment=environment, given=cases)
    assert {label for label, is_made in made.items() if is_made} == set(GOOD_FIELDS)
    lines = [line for line in messages.splitlines() if line.startswith("node a_node: k25.MLA: ")]
    assert len(lines) == len(BAD_FIELDS)
    assert "node a_node: k25.MLA: attribute num_heads: expected a plugin field, found none" in lines
    assert any("plugin field other" in line for line in lines)


BUILD = """
import json, re, sys
from pathlib import Path
import tensorrt_rtx as trt
from k25_engines.engine_options import EngineOptions, limits_from_options
from k25_engines.profiles import profiles_for
from k25_export.manifest import read_manifest
source, bundle, component, target = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
manifest = read_manifest(bundle)
file = manifest.component(component).file("bf16")
logger = trt.Logger(trt.Logger.ERROR)
registry = trt.get_plugin_registry()
if source == "python":
    from k25_plugins.tensorrt_plugins import register_creators
    kept = register_creators(trt)
else:
    kept = registry.load_library(source)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
graph = (Path(sys.argv[5]) if len(sys.argv) > 5 else bundle / file.path).read_bytes()
if not parser.parse(graph):
    print(json.dumps({"errors": [parser.get_error(index).desc() for index in range(parser.num_errors)]}))
    sys.exit()
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
for profile in profiles_for(component, file.inputs, limits_from_options(EngineOptions(), manifest)):
    made = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        made.set_shape(name, *shapes)
    config.add_optimization_profile(made)
engine = bytes(builder.build_serialized_network(network, config))
layers = [network.get_layer(index) for index in range(network.num_layers)]
plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
described = [
    [layer.name, [[tuple(layer.get_output(i).shape), str(layer.get_output(i).dtype)] for i in range(layer.num_outputs)]]
    for layer in plugins
]
texts = re.findall(rb'buffer={ name="[^"]*(?:FieldCollection|plugin[A-Z][a-z]*)" size=[0-9]+', engine)
texts += re.findall(rb'(?:num_heads|qk_nope_head_dim|v_head_dim|softmax_scale|inv_freq|_size).{64}', engine, re.DOTALL)
print(json.dumps({"size": len(engine), "plugins": described, "texts": sorted(repr(text) for text in texts)}))
"""


@pytest.mark.parametrize(("component", "plugins"), [("dense_layer", 1), ("moe_layer", 2)])
@pytest.mark.parametrize("target", ["SM80", "SM120"])
def test_an_engine_built_with_it_has_what_one_of_python_has(
    library: Path, environment: dict[str, str], tiny: Any, component: str, plugins: int, target: str
) -> None:
    """Layer names, shapes, dtypes, the size, and the names and bytes of the serialised fields."""
    ours, _ = child(BUILD, library.resolve(), tiny.bundle, component, target, environment=environment)
    python, _ = child(BUILD, "python", tiny.bundle, component, target, environment=environment)
    assert len(ours["plugins"]) == plugins
    assert ours["texts"]
    assert ours == python


def test_a_graph_that_does_not_fit_its_attributes(
    library: Path, environment: dict[str, str], tiny: Any, tmp_path: Path
) -> None:
    """The parser's error is TensorRT's; what did not fit is said by the core's checks."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tiny.bundle / "components" / "dense_layer.bf16.onnx")
    node = next(node for node in model.graph.node if node.op_type == "MLA")
    heads = next(attribute for attribute in node.attribute if attribute.name == "num_heads")
    heads.i += 1
    onnx.save(model, tmp_path / "wrong.onnx")
    arguments = (library.resolve(), tiny.bundle, "dense_layer", "SM120", tmp_path / "wrong.onnx")
    found, messages = child(BUILD, *arguments, environment=environment)
    assert found["errors"]
    assert "k25.MLA: input q, axis num_heads*qk_head_dim: expected" in messages
