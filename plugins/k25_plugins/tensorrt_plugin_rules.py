"""What a TensorRT plugin of a `k25` op must know, derived from the signature table: one core for every adapter.

Positions count inputs first, then outputs, as TensorRT does. Everything here is plain data and arithmetic; the Python
creators (`tensorrt_plugins`) and the C++ adapter say the same in TensorRT's words. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k25_plugins import signatures
from k25_plugins.signatures import FLOAT_TYPES, ONNX_DTYPES, OpSignature

NAMESPACE = signatures.DOMAIN
PLUGIN_VERSION = str(signatures.VERSION)

#: The ops that TensorRT takes a plugin for.
PLUGIN_OPS: tuple[OpSignature, ...] = tuple(signature for signature in signatures.OPS if signature.plugin)

_ALIAS_SUFFIX = "_out"


def dtype_fits(signature: OpSignature, position: int, dtypes: Sequence[str]) -> bool:
    """Whether `dtypes[position]` fits those before it: fixed by the table, or one free choice for a type parameter."""
    specs = signature.inputs + signature.outputs
    wanted = specs[position].dtype
    if wanted in ONNX_DTYPES:
        return dtypes[position] == wanted
    first = next(index for index, spec in enumerate(specs) if spec.dtype == wanted)
    allowed = FLOAT_TYPES if first == position else (dtypes[first],)
    return dtypes[position] in allowed and dtypes[position] in FLOAT_TYPES


def output_dtypes(signature: OpSignature, input_dtypes: Sequence[str]) -> list[str]:
    """The dtypes of the outputs: an output's type parameter is bound by an input."""
    bound = {spec.dtype: dtype for spec, dtype in zip(signature.inputs, input_dtypes, strict=True)}
    return [bound.get(spec.dtype, spec.dtype) for spec in signature.outputs]


def aliased_input(signature: OpSignature, output: int) -> int:
    """The input whose memory an output shares, or -1: `cache_out` is `cache`, updated."""
    name = signature.outputs[output].name
    names = [spec.name for spec in signature.inputs]
    source = name.removesuffix(_ALIAS_SUFFIX)
    return names.index(source) if name.endswith(_ALIAS_SUFFIX) and source in names else -1


def aliased_outputs(signature: OpSignature) -> dict[str, str]:
    """Output name -> input name of every output that shares an input's memory."""
    pairs = ((spec.name, aliased_input(signature, index)) for index, spec in enumerate(signature.outputs))
    return {name: signature.inputs[source].name for name, source in pairs if source >= 0}


@dataclass(frozen=True, eq=False)
class UnknownSize:
    """A size that is known only at run time. Arithmetic with it stays unknown; it never disagrees with another."""

    expression: Any = None

    def _unknown(self, other: object) -> UnknownSize:
        return UnknownSize()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _unknown

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def output_shapes(
    signature: OpSignature, shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    """The shapes of the outputs; a size is an int or an `UnknownSize`, which outputs take over from inputs.

    Raises `InputError` where sizes that are known disagree.
    """
    dtypes = [spec.dtype if spec.dtype in ONNX_DTYPES else FLOAT_TYPES[0] for spec in signature.inputs]
    return [shape for shape, _ in signature.infer_outputs(shapes, dtypes, attributes)]
