"""A component from PyTorch to ONNX bytes: traced on meta weights, cleaned, checked."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
import torch.utils._triton as torch_triton
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

from k25_export.component_specs import ACTIVATION_DTYPES, EXAMPLE_SIZES, ComponentSpec
from k25_export.manifest import Port, Precision
from k25_export.passes.lift_weights import lift_weights
from k25_export.passes.mark_plugins import mark_plugins
from k25_export.passes.repeat_blocks import repeat_blocks
from k25_export.passes.strip_metadata import strip_metadata
from k25_export.traced_component import TracedComponent
from k25_plugins.onnx_functions import OPSET, functions_for
from k25_plugins.onnx_translation import translation_table
from k25_plugins.signatures import DOMAIN, ONNX_DTYPES


def traced_component_from_spec(spec: ComponentSpec, precision: Precision) -> TracedComponent:
    """Trace, lift the weights to inputs, optimise, mark plugins, append function bodies, check, repeat blocks.

    The order matters: folding gives TensorRT its axes as constants, and is safe only once no meta weight is an
    initializer; bodies come last, or they would be inlined. Only constants are folded: the exporter's rewrite rules
    take liberties (they drop the router's `+ 1e-20`).
    """
    activation = ACTIVATION_DTYPES[precision]
    with torch.device("meta"):
        module = spec.build(activation).eval()
    weights = [name for name, _ in module.named_parameters()]
    model = _exported_model(spec, module, activation)
    lift_weights(model, weights)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
    _tidy_constants(model)
    strip_metadata(model)
    mark_plugins(model)
    proto = ir.serde.serialize_model(model)
    proto.functions.extend(functions_for({node.op_type for node in proto.graph.node if node.domain == DOMAIN}))
    _check(spec, proto)
    if spec.stack is not None:  # after the full check: inferring the shapes of every block takes 60 MB
        repeat_blocks(proto.graph, spec.stack)
        onnx.checker.check_model(proto)
    del module, model
    gc.collect()  # what torch leaves behind is cyclic: the next trace would come on top of it
    return TracedComponent(
        data=proto.SerializeToString(deterministic=True),
        inputs=tuple(_port(value) for value in proto.graph.input),
        outputs=tuple(_port(value) for value in proto.graph.output),
    )


def _exported_model(spec: ComponentSpec, module: torch.nn.Module, activation: torch.dtype) -> ir.Model:
    dims = {name: torch.export.Dim(name, min=1) for name in EXAMPLE_SIZES}
    sizes: dict[str, int] = {**EXAMPLE_SIZES, **{f"{name} + 1": size + 1 for name, size in EXAMPLE_SIZES.items()}}
    symbols = {**dims, **{f"{name} + 1": dim + 1 for name, dim in dims.items()}}
    examples, dynamic_shapes = [], []
    for port in spec.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in port.axes]
        examples.append(torch.empty(shape, dtype=port.dtype or activation, device="meta"))
        dynamic_shapes.append({index: symbols[axis] for index, axis in enumerate(port.axes) if isinstance(axis, str)})
    with _quiet(), _without_triton():
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[port.name for port in spec.inputs],
            output_names=[name for name, _ in spec.outputs],
            dynamic_shapes=tuple(dynamic_shapes),
            custom_translation_table=translation_table(),
        )
    assert program is not None
    model: ir.Model = program.model
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports progress on standard output, which may be reserved for JSON."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """torch.export asks whether Triton is there, which loads 100 MB for nothing that tracing needs."""
    if "triton" in sys.modules:
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]
        for answer in (torch_triton.has_triton_package, torch_triton.has_triton):
            answer.cache_clear()


def _tidy_constants(model: ir.Model) -> None:
    """Every constant an initializer, each value once, nothing unused."""
    passes: tuple[ir.passes.InPlacePass, ...] = (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        RemoveUnusedNodesPass(),
    )
    for tidy in passes:
        tidy(model)


def _check(spec: ComponentSpec, proto: onnx.ModelProto) -> None:
    """Guarantees: valid ONNX, no initializer holds weights, ports are as the specification names them."""
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    for tensor in proto.graph.initializer:
        elements = 1
        for size in tensor.dims:
            elements *= size
        assert elements <= 64, f"{spec.name}: initializer {tensor.name} {list(tensor.dims)} was baked in"
    found = {value.name: _port(value).shape for value in (*proto.graph.input, *proto.graph.output)}
    wanted: Mapping[str, tuple[int | str, ...]] = {port.name: port.axes for port in spec.inputs} | dict(spec.outputs)
    for name, axes in wanted.items():
        assert name in found, f"{spec.name}: the graph has no port {name}"
        assert found[name] == axes, f"{spec.name}: port {name}: expected axes {axes}, found {found[name]}"


_DTYPE_NAMES = {number: name for name, number in ONNX_DTYPES.items()}


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or int(axis.dim_value) for axis in tensor.shape.dim)
    return Port(name=value.name, dtype=_DTYPE_NAMES[tensor.elem_type], shape=shape)
