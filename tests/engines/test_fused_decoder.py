"""The fused decoder is its layers one after the other: the same numbers in ONNX Runtime, the promised ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from k25_engines.decoder_ports import decoder_components, decoder_ports, layer_name
from k25_engines.fused_decoder import decoder_from_graphs
from k25_export.manifest import Manifest, read_manifest
from k25_plugins.errors import InputError
from k25_runtime.host_tensor import HostTensor
from k25_runtime.mapped_checkpoint import MappedCheckpoint, checkpoint_folder
from k25_runtime.onnxruntime_cpu import ort_value

TOKENS, BLOCKS, BLOCK_SIZE = 5, 3, 4


def graphs_of(bundle: Path, manifest: Manifest, precision: str) -> dict[str, onnx.ModelProto]:
    kinds = {entry.name: entry for entry in decoder_components(manifest)}
    return {name: onnx.load(bundle / entry.file(precision).path) for name, entry in kinds.items()}


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    return {output.name: value for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True)}


def value(array: Any) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def test_the_decoder_computes_what_its_layers_do_one_by_one(exported: Any) -> None:
    manifest = read_manifest(exported.bundle)
    checkpoint = MappedCheckpoint(manifest, checkpoint_folder(exported.bundle))
    text, layers = manifest.model.text, decoder_components(manifest)
    graphs = graphs_of(exported.bundle, manifest, "fp32")
    random = np.random.default_rng(7)
    shared = {
        "positions": value(np.array([0, 1, 2, 0, 1], np.int32)),
        "query_start": value(np.array([0, 3, 5], np.int32)),
        "block_table": value(np.array([[2], [1]], np.int32)),
        "residual_share": value(np.ones(1, np.float32)),
    }
    hidden = value(random.standard_normal((TOKENS, text.hidden_size), np.float32))
    caches = [value(random.standard_normal((BLOCKS, BLOCK_SIZE, text.cache_dim), np.float32)) for _ in layers]
    feeds = {"hidden": hidden, **shared}
    expected: dict[str, Any] = {}
    for number, component in enumerate(layers):
        weights: dict[str, HostTensor] = checkpoint.weights(component, number, "fp32")
        bound = {name: ort_value(tensor) for name, tensor in weights.items()} | {"cache": caches[number]}
        feeds |= {layer_name(number, name): item for name, item in bound.items()}
        names = {port.name for port in component.file("fp32").inputs}
        own = {name: item for name, item in shared.items() if name in names}
        outputs = run(graphs[component.name], {"hidden": hidden, **own, **bound})
        hidden = outputs.pop("hidden_out")
        expected |= {layer_name(number, name): item.numpy() for name, item in outputs.items()}
    expected["hidden_out"] = hidden.numpy()

    decoder = decoder_from_graphs(graphs, [component.name for component in layers])
    onnx.checker.check_model(decoder, full_check=True)
    found = run(decoder, feeds)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ports_are_those_that_the_manifest_alone_promises(exported: Any, precision: str) -> None:
    manifest = read_manifest(exported.bundle)
    layers = decoder_components(manifest)
    decoder = decoder_from_graphs(graphs_of(exported.bundle, manifest, precision), [entry.name for entry in layers])
    inputs, outputs = decoder_ports(layers, precision)
    assert [item.name for item in decoder.graph.input] == [port.name for port in inputs]
    assert [item.name for item in decoder.graph.output] == [port.name for port in outputs]
    for item, port in zip((*decoder.graph.input, *decoder.graph.output), (*inputs, *outputs), strict=True):
        shape = tuple(axis.dim_param or axis.dim_value for axis in item.type.tensor_type.shape.dim)
        assert shape == port.shape, port.name
    names = [function.name for function in decoder.functions]
    assert len(names) == len(set(names))


def test_bodies_that_differ_are_refused(tiny: Any) -> None:
    manifest = read_manifest(tiny.bundle)
    graphs = graphs_of(tiny.bundle, manifest, "fp32")
    del graphs["moe_layer"].functions[0].node[0]
    with pytest.raises(InputError, match=r"component moe_layer: function k25\.\w+: expected the body that"):
        decoder_from_graphs(graphs, [entry.name for entry in decoder_components(manifest)])


def test_opsets_that_differ_are_refused(tiny: Any) -> None:
    manifest = read_manifest(tiny.bundle)
    graphs = graphs_of(tiny.bundle, manifest, "fp32")
    graphs["moe_layer"].opset_import[0].version += 1
    with pytest.raises(InputError, match="decoder: opsets"):
        decoder_from_graphs(graphs, [entry.name for entry in decoder_components(manifest)])
