"""The Python creators against TensorRT itself, without a GPU; fields, formats, errors of `enqueue`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from engine_helpers import needs_tensorrt

from k25_plugins.signatures import MLA, MOE_DISPATCH, OpSignature
from k25_plugins.tensorrt_plugin_rules import PLUGIN_OPS

pytestmark = needs_tensorrt

MLA_FIELDS = {
    "num_heads": ("INT32", np.array([3], np.int32)),
    "qk_nope_head_dim": ("INT32", np.array([4], np.int32)),
    "v_head_dim": ("INT32", np.array([5], np.int32)),
    "softmax_scale": ("FLOAT32", np.array([0.5], np.float32)),
    "inv_freq": ("FLOAT32", np.array([1.0, 0.25], np.float32)),
}


@dataclass(frozen=True)
class Creators:
    """The registered creators by name, TensorRT's module, what was reported."""

    trt: Any
    by_name: dict[str, Any]
    reports: list[str]


@pytest.fixture(scope="module")
def creators() -> Iterator[Creators]:
    import tensorrt_rtx as trt

    from k25_plugins import tensorrt_plugins

    reports: list[str] = []
    registry = trt.get_plugin_registry()
    made = tensorrt_plugins.register_creators(trt, report=reports.append)
    assert tensorrt_plugins.register_creators(trt) == [], "what is registered is left"
    yield Creators(trt=trt, by_name={creator.name: creator for creator in made}, reports=reports)
    for creator in made:
        registry.deregister_creator(creator)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native library without GPU kernels, whatever the one here has."""
    from k25_plugins import tensorrt_plugin_launch

    monkeypatch.setattr(tensorrt_plugin_launch.gpu_launch, "gpu_kernel_count", lambda library: 0)


def mla_plugin(creators: Creators) -> Any:
    trt = creators.trt
    fields = [
        trt.PluginField(name, values, getattr(trt.PluginFieldType, kind)) for name, (kind, values) in MLA_FIELDS.items()
    ]
    collection = trt.PluginFieldCollection(fields)
    return creators.by_name["MLA"].create_plugin("node", collection, trt.TensorRTPhase.BUILD)


def test_creators_are_found_under_the_names_of_the_table(creators: Creators) -> None:
    registry = creators.trt.get_plugin_registry()
    for signature in PLUGIN_OPS:
        creator = registry.get_creator(signature.name, "1", "k25")
        assert creator is not None
        assert [field.name for field in creator.field_names] == [spec.name for spec in signature.attributes]


def test_what_is_serialised_is_the_attributes_in_the_order_of_the_table(creators: Creators) -> None:
    plugin = mla_plugin(creators)
    fields = list(plugin.get_fields_to_serialize())
    assert [field.name for field in fields] == [spec.name for spec in MLA.attributes]
    for field in fields:
        kind, values = MLA_FIELDS[field.name]
        assert field.type == getattr(creators.trt.PluginFieldType, kind)
        np.testing.assert_array_equal(field.data, values)
    again = creators.by_name["MLA"].create_plugin(
        "node", plugin.get_fields_to_serialize(), creators.trt.TensorRTPhase.RUNTIME
    )
    assert again.attributes == plugin.attributes
    assert plugin.clone().attributes == plugin.attributes
    assert plugin.attach_to_context(None).attributes == plugin.attributes


@pytest.mark.usefixtures("no_kernels")
def test_the_plugin_tells_names_aliases_and_number_of_outputs(creators: Creators) -> None:
    plugin = mla_plugin(creators)
    assert (plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace) == ("MLA", "1", "k25")
    assert plugin.num_outputs == len(MLA.outputs)
    assert [plugin.get_aliased_input(index) for index in range(2)] == [-1, 2]
    assert plugin.get_valid_tactics() == []
    assert plugin.get_workspace_size([], []) == 0


def described(trt: Any, dtypes: tuple[str, ...], formats: dict[int, Any]) -> list[Any]:
    items = []
    for position, dtype in enumerate(dtypes):
        item = trt.DynamicPluginTensorDesc()
        item.desc.type = getattr(trt, dtype)
        item.desc.format = formats.get(position, trt.TensorFormat.LINEAR)
        items.append(item)
    return items


@pytest.mark.parametrize("signature", [MLA, MOE_DISPATCH], ids=lambda signature: signature.name)
def test_formats_are_linear_and_dtypes_those_of_the_table(creators: Creators, signature: OpSignature) -> None:
    trt = creators.trt
    plugin = type(mla_plugin(creators))(signature, {}, creators.reports.append)
    specs = signature.inputs + signature.outputs
    for chosen in signature.overloads():
        dtypes = tuple(chosen.get(spec.dtype, spec.dtype) for spec in specs)
        good = described(trt, dtypes, {})
        assert all(
            plugin.supports_format_combination(index, good, len(signature.inputs)) for index in range(len(specs))
        )
        assert plugin.get_output_data_types([item.desc.type for item in good[: len(signature.inputs)]]) == [
            item.desc.type for item in good[len(signature.inputs) :]
        ]
        other = described(trt, dtypes, {0: trt.TensorFormat.CHW32})
        assert not plugin.supports_format_combination(0, other, len(signature.inputs))
        half = described(trt, ("float16", *dtypes[1:]), {})
        assert not plugin.supports_format_combination(0, half, len(signature.inputs))


@pytest.mark.usefixtures("no_kernels")
def test_enqueue_without_kernels_is_an_error_that_says_so(creators: Creators) -> None:
    plugin = mla_plugin(creators)
    creators.reports.clear()
    descriptions = []
    for spec in MLA.inputs + MLA.outputs:
        item = creators.trt.PluginTensorDesc()
        item.type = creators.trt.bfloat16 if spec.dtype in ("T", "TC") else getattr(creators.trt, spec.dtype)
        item.dims = creators.trt.Dims([2] * len(spec.shape))
        descriptions.append(item)
    inputs, outputs = descriptions[: len(MLA.inputs)], descriptions[len(MLA.inputs) :]
    assert plugin.enqueue(inputs, outputs, [0] * len(inputs), [0] * len(outputs), 0, 0) != 0
    assert creators.reports == ["k25.MLA: GPU kernels for k25.MLA are not in this build"]


def test_what_reaches_the_kernels_is_what_tensorrt_gave(creators: Creators, monkeypatch: pytest.MonkeyPatch) -> None:
    from k25_plugins import tensorrt_plugin_launch

    seen: list[Any] = []

    def launch(signature: Any, inputs: Any, outputs: Any, attributes: Any, *, workspace: int, stream: int) -> None:
        seen.append((signature.name, inputs[0], outputs[0], attributes, workspace, stream))

    monkeypatch.setattr(tensorrt_plugin_launch, "launch", launch)
    item = creators.trt.PluginTensorDesc()
    item.type, item.dims = creators.trt.bfloat16, creators.trt.Dims([7, 24])
    plugin = mla_plugin(creators)
    assert plugin.enqueue([item], [item], [1000], [2000], 3000, 4000) == 0
    ((name, source, result, attributes, workspace, stream),) = seen
    assert (name, workspace, stream, attributes) == ("MLA", 3000, 4000, plugin.attributes)
    assert (source.address, source.dtype, source.shape) == (1000, "bfloat16", (7, 24))
    assert result.address == 2000


def test_a_field_that_is_missing_is_reported(creators: Creators) -> None:
    creators.reports.clear()
    empty = creators.trt.PluginFieldCollection([])
    made = creators.by_name["MLA"].create_plugin("node_mla", empty, creators.trt.TensorRTPhase.BUILD)
    assert made is None
    assert "node node_mla: k25.MLA: attribute num_heads" in creators.reports[0]
