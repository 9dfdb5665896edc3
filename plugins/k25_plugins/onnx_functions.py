"""The `k25` operators as ONNX FunctionProtos: a file that carries them runs in any ONNX runtime."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from k25_plugins.linear import function as linear
from k25_plugins.mla import function as mla
from k25_plugins.moe_dispatch import function as moe_dispatch
from k25_plugins.rms_norm import function as rms_norm
from k25_plugins.router import function as router
from k25_plugins.signatures import DOMAIN, VERSION
from k25_plugins.vision_attention import function as vision_attention

#: The ONNX opset of the bodies and of every component.
OPSET = 21

#: Bodies in the order in which a file lists them: what is called comes before what calls it.
_BODIES: dict[str, str] = {
    "Linear": linear.BODY,
    "DequantizeInt4": moe_dispatch.DEQUANTIZE_BODY,
    "MoEDispatch": moe_dispatch.BODY,
    "MLA": mla.BODY,
    "VisionAttention": vision_attention.BODY,
    "RMSNorm": rms_norm.BODY,
    "Router": router.BODY,
}
_CALLS: dict[str, tuple[str, ...]] = {"MoEDispatch": ("DequantizeInt4",)}


def functions_for(op_names: Iterable[str]) -> list[onnx.FunctionProto]:
    """The functions of these ops and of everything they call, callees first."""
    wanted = set(op_names)
    wanted |= {callee for name in wanted for callee in _CALLS.get(name, ())}
    return [_function(name) for name in _BODIES if name in wanted]


def _function(name: str) -> onnx.FunctionProto:
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>\n{_BODIES[name].strip()}'
    return onnx.parser.parse_function(text)
