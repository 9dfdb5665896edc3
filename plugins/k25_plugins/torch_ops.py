"""The `k25` operators as `torch.library` ops: `torch.ops.k25.mla`, `.moe_dispatch`, `.linear` and so on.

Importing this module registers them: schema and fake kernel from the signature table, the eager reference as the
implementation. The fake kernel works on meta weights and symbolic sizes, so a model traces without weight memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from k25_plugins import signatures
from k25_plugins.errors import InputError
from k25_plugins.linear.reference import linear
from k25_plugins.mla.reference import mla
from k25_plugins.moe_dispatch.reference import moe_dispatch
from k25_plugins.rms_norm.reference import rms_norm
from k25_plugins.router.reference import router
from k25_plugins.signatures import DOMAIN, OpSignature
from k25_plugins.vision_attention.reference import vision_attention

REFERENCES: dict[str, Callable[..., Any]] = {
    signatures.MLA.name: mla,
    signatures.MOE_DISPATCH.name: moe_dispatch,
    signatures.LINEAR.name: linear,
    signatures.VISION_ATTENTION.name: vision_attention,
    signatures.RMS_NORM.name: rms_norm,
    signatures.ROUTER.name: router,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _split(signature: OpSignature, arguments: tuple[Any, ...]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    count = len(signature.inputs)
    names = (spec.name for spec in signature.attributes)
    return list(arguments[:count]), dict(zip(names, arguments[count:], strict=True))


def _fake_kernel(signature: OpSignature) -> Callable[..., Any]:
    def check(condition: Any, message: str) -> None:
        torch._check(condition, lambda: message)

    def fake(*arguments: Any) -> Any:
        tensors, attributes = _split(signature, arguments)
        outputs = signature.infer_outputs(
            [tensor.shape for tensor in tensors],
            [dtype_name(tensor.dtype) for tensor in tensors],
            attributes,
            check=check,
        )
        made = tuple(tensors[0].new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in outputs)
        return made[0] if len(made) == 1 else made

    return fake


def _eager_kernel(signature: OpSignature) -> Callable[..., Any]:
    reference = REFERENCES[signature.name]

    def eager(*arguments: Any) -> Any:
        tensors, attributes = _split(signature, arguments)
        for spec, tensor in zip(signature.inputs, tensors, strict=True):
            if 0 in tensor.shape:
                raise InputError(
                    f"{DOMAIN}.{signature.name}: input {spec.name}: expected no empty axis, found {list(tensor.shape)}"
                )
        signature.infer_outputs(
            [tensor.shape for tensor in tensors], [dtype_name(tensor.dtype) for tensor in tensors], attributes
        )
        return reference(*arguments)

    return eager


_LIBRARY = torch.library.Library(DOMAIN, "DEF")
for _signature in signatures.OPS:
    _LIBRARY.define(_signature.torch_schema())
    _LIBRARY.impl(_signature.folder, _eager_kernel(_signature), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{DOMAIN}::{_signature.folder}", _fake_kernel(_signature), lib=_LIBRARY)
