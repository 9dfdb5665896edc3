"""TensorRT plugin creators of the `k25` ops in Python, over the rules of `tensorrt_plugin_rules`.

They let whoever has TensorRT from pip build engines. The module is handed in (`tensorrt_rtx` or `tensorrt`), so
nothing here imports one. The serialised fields are the op's attributes in the order of the signature table, int as
INT32, float and floats as FLOAT32: the C++ creators read and write the same, and an engine built with one loads with
the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from k25_plugins import tensorrt_plugin_launch, tensorrt_plugin_rules
from k25_plugins.errors import K25Error, mismatch
from k25_plugins.signatures import DOMAIN, AttributeSpec, OpSignature
from k25_plugins.tensorrt_plugin_launch import DeviceTensor
from k25_plugins.tensorrt_plugin_rules import NAMESPACE, PLUGIN_OPS, PLUGIN_VERSION, UnknownSize

Report = Callable[[str], None]

#: numpy type and TensorRT's field type of each kind of attribute.
_FIELDS: Mapping[str, tuple[Any, str]] = {
    "int": (np.int32, "INT32"),
    "float": (np.float32, "FLOAT32"),
    "floats": (np.float32, "FLOAT32"),
}
_DTYPES: Mapping[str, str] = {"float32": "float32", "bfloat16": "bfloat16", "int32": "int32", "int64": "int64"}


def register_creators(trt: Any, *, report: Report | None = None) -> list[Any]:
    """Register a creator for each op that is a plugin; keep the result alive as long as they are used.

    `report` is told of errors inside a plugin, which TensorRT itself only passes on as "failed"; by default they go
    to the registry's error recorder, or to standard error. A creator that is registered already is left.
    """
    registry = trt.get_plugin_registry()
    known = {(creator.name, creator.plugin_namespace) for creator in registry.all_creators}
    creators = []
    for signature in PLUGIN_OPS:
        if (signature.name, NAMESPACE) in known:
            continue
        creator = _creator_class(trt)(signature, _plugin_class(trt), report or _reporter(trt, registry))
        if not registry.register_creator(creator, NAMESPACE):
            raise K25Error(f"TensorRT refused the plugin creator of {DOMAIN}.{signature.name}")
        creators.append(creator)
    return creators


def attributes_from_fields(signature: OpSignature, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The op's attributes from field name -> array. Raises `InputError` where one is missing or has another length."""
    attributes: dict[str, Any] = {}
    for spec in signature.attributes:
        where = f"{DOMAIN}.{signature.name}: attribute {spec.name}"
        if spec.name not in fields:
            raise mismatch(where, expected=f"a plugin field of kind {spec.kind}", found="none")
        values = np.atleast_1d(np.asarray(fields[spec.name])).tolist()
        if spec.kind != "floats" and len(values) != 1:
            raise mismatch(where, expected="one value", found=len(values))
        attributes[spec.name] = tuple(map(float, values)) if spec.kind == "floats" else values[0]
        if spec.kind == "int":
            attributes[spec.name] = int(values[0])
    return attributes


class _Fields:
    """The fields of an op as TensorRT wants them. A field is a pointer into an array that nobody else keeps alive."""

    def __init__(self, trt: Any, specs: Sequence[AttributeSpec], values: Mapping[str, Any]) -> None:
        self._arrays = [np.atleast_1d(np.array(values.get(spec.name, []), _FIELDS[spec.kind][0])) for spec in specs]
        self._fields = [
            trt.PluginField(spec.name, array, getattr(trt.PluginFieldType, _FIELDS[spec.kind][1]))
            for spec, array in zip(specs, self._arrays, strict=True)
        ]
        self.collection = trt.PluginFieldCollection(self._fields)


def _reporter(trt: Any, registry: Any) -> Report:
    def report(message: str) -> None:
        recorder = registry.error_recorder
        if recorder is None or not recorder.report_error(trt.ErrorCodeTRT.FAILED_EXECUTION, message):
            print(message, file=sys.stderr, flush=True)

    return report


def _dtype_names(trt: Any) -> dict[Any, str]:
    return {getattr(trt, attribute): name for name, attribute in _DTYPES.items()}


def _plugin_class(trt: Any) -> Any:
    names = _dtype_names(trt)
    types = {name: dtype for dtype, name in names.items()}
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)

    class K25Plugin(*bases):  # type: ignore[misc]
        """One node. Its methods are TensorRT's callbacks; an exception would cross C++, so none leaves them."""

        def __init__(self, signature: OpSignature, attributes: dict[str, Any], report: Report) -> None:
            for base in bases:
                base.__init__(self)
            self.signature, self.attributes, self.report = signature, attributes, report
            self.plugin_name, self.plugin_version = signature.name, PLUGIN_VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = len(signature.outputs)
            self.fields = _Fields(trt, signature.attributes, attributes)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return type(self)(self.signature, self.attributes, self.report)

        def get_fields_to_serialize(self) -> Any:
            return self.fields.collection

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            dtypes = [names.get(dtype, str(dtype)) for dtype in input_types]
            return [types[dtype] for dtype in tensorrt_plugin_rules.output_dtypes(self.signature, dtypes)]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> Any:
            shapes = [[_size(dims[axis]) for axis in range(len(dims))] for dims in inputs]
            try:
                outputs = tensorrt_plugin_rules.output_shapes(self.signature, shapes, self.attributes)
            except K25Error as error:
                self.report(str(error))
                raise
            return [_dims(trt, shape, builder) for shape in outputs]

        def supports_format_combination(self, position: int, described: Sequence[Any], input_count: int) -> bool:
            found = described[: position + 1]
            dtypes = [names.get(item.desc.type, str(item.desc.type)) for item in found]
            is_linear = found[position].desc.format == trt.TensorFormat.LINEAR
            return is_linear and tensorrt_plugin_rules.dtype_fits(self.signature, position, dtypes)

        def get_aliased_input(self, output: int) -> int:
            return tensorrt_plugin_rules.aliased_input(self.signature, output)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            shapes = [tuple(item.max) for item in inputs]
            dtypes = [names.get(item.desc.type, str(item.desc.type)) for item in inputs]
            return tensorrt_plugin_launch.workspace_bytes(self.signature, shapes, dtypes, self.attributes)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            return None

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            return None

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            return None

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(
            self,
            input_descriptions: Sequence[Any],
            output_descriptions: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> int:
            """0, or 1 after the error was reported."""
            try:
                tensorrt_plugin_launch.launch(
                    self.signature,
                    _tensors(names, input_descriptions, inputs),
                    _tensors(names, output_descriptions, outputs),
                    self.attributes,
                    workspace=workspace,
                    stream=stream,
                )
            except Exception as error:
                self.report(f"{DOMAIN}.{self.signature.name}: {error}")
                return 1
            return 0

    return K25Plugin


def _creator_class(trt: Any) -> Any:
    class K25Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugin of one op."""

        def __init__(self, signature: OpSignature, plugin: Any, report: Report) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.signature, self.plugin, self.report = signature, plugin, report
            self.name, self.plugin_version, self.plugin_namespace = signature.name, PLUGIN_VERSION, NAMESPACE
            self.fields = _Fields(trt, signature.attributes, {})
            self.field_names = self.fields.collection

        def create_plugin(self, name: str, fields: Sequence[Any], phase: Any) -> Any:
            try:
                attributes = attributes_from_fields(self.signature, {field.name: field.data for field in fields})
            except K25Error as error:
                self.report(f"node {name}: {error}")
                return None
            return self.plugin(self.signature, attributes, self.report)

    return K25Creator


def _size(expression: Any) -> Any:
    return expression.get_constant_value() if expression.is_constant() else UnknownSize(expression)


def _dims(trt: Any, shape: Sequence[Any], builder: Any) -> Any:
    dims = trt.DimsExprs(len(shape))
    for axis, size in enumerate(shape):
        dims[axis] = builder.constant(size) if isinstance(size, int) else size.expression
    return dims


def _tensors(names: Mapping[Any, str], descriptions: Sequence[Any], addresses: Sequence[int]) -> list[DeviceTensor]:
    return [
        DeviceTensor(address=address, dtype=names[item.type], shape=tuple(item.dims))
        for item, address in zip(descriptions, addresses, strict=True)
    ]
