"""How `torch.onnx.export` writes a `torch.ops.k25` call: one node of domain `k25`, typed by the signature table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch

from k25_plugins import signatures, torch_ops
from k25_plugins.signatures import DOMAIN, VERSION, OpSignature

_SCHEMA = onnx.defs.OpSchema
_KINDS = {"int": _SCHEMA.AttrType.INT, "float": _SCHEMA.AttrType.FLOAT, "floats": _SCHEMA.AttrType.FLOATS}
_ONNX_TYPE_NAMES = {"float32": "float"}


def onnx_schema(signature: OpSignature) -> onnx.defs.OpSchema:
    """The ONNX schema of an op."""

    def parameter(spec: signatures.TensorSpec) -> onnx.defs.OpSchema.FormalParameter:
        is_fixed = spec.dtype in signatures.ONNX_DTYPES
        return _SCHEMA.FormalParameter(spec.name, _tensor_type(spec.dtype) if is_fixed else spec.dtype)

    allowed = [_tensor_type(dtype) for dtype in signatures.FLOAT_TYPES]
    return _SCHEMA(
        signature.name,
        DOMAIN,
        VERSION,
        inputs=[parameter(spec) for spec in signature.inputs],
        outputs=[parameter(spec) for spec in signature.outputs],
        type_constraints=[(name, allowed, "") for name in signature.type_parameters],
        attributes=[_SCHEMA.Attribute(spec.name, _KINDS[spec.kind], "") for spec in signature.attributes],
    )


def _tensor_type(dtype: str) -> str:
    return f"tensor({_ONNX_TYPE_NAMES.get(dtype, dtype)})"


def translation_table() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export`."""
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    table: dict[Any, Callable[..., Any]] = {}
    for signature in signatures.OPS:
        node = onnxscript.values.Op(opset, signature.name, onnx_schema(signature))
        table[getattr(getattr(torch.ops, DOMAIN), signature.folder).default] = _translate(signature, node)
    return table


def _translate(signature: OpSignature, node: Callable[..., Any]) -> Callable[..., Any]:
    names = [spec.name for spec in signature.attributes]

    def translate(*arguments: Any) -> Any:
        count = len(signature.inputs)
        return node(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))

    return translate


assert torch_ops.REFERENCES  # importing the module is what registers torch.ops.k25
