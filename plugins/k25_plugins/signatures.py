"""The one table of the `k25` operators: inputs, outputs, order, dtypes, shapes and attributes.

The torch schema and fake kernel, the ONNX schema the exporter translates to, the checks of the eager
references and every later adapter (ONNX Runtime overloads, TensorRT plugins) are derived from it or checked
against it. Standard library only.

A shape is a tuple of symbols; a leading `...` stands for any number of axes. A symbol seen first binds to the size
found; one seen again, or a product such as ``num_heads*v_head_dim``, must agree. ``derive`` adds symbols computed from
attributes and sizes. A dtype is a name, or a type parameter (`T`, `TC`) that may be any of `FLOAT_TYPES`, one choice
for each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from k25_plugins.errors import InputError

DOMAIN = "k25"
VERSION = 1

LEADING_AXES = "..."

FLOAT_TYPES = ("float32", "bfloat16")

#: ONNX TensorProto.DataType numbers of every dtype in use (onnx.proto3, enum DataType).
ONNX_DTYPES: Mapping[str, int] = {"float32": 1, "int32": 6, "int64": 7, "bfloat16": 16}

#: Bytes of one element.
ITEM_SIZES: Mapping[str, int] = {"float32": 4, "int32": 4, "int64": 8, "bfloat16": 2}

#: A region of a shard is addressed in rows of this many bytes: no dimension reaches 2^31 (TensorRT's limit).
REGION_ROW_BYTES = 8

#: The columns of the expert table, in order: (projection, what of it).
EXPERT_TABLE_COLUMNS: tuple[tuple[str, str], ...] = (
    ("gate_proj", "weight_packed"),
    ("gate_proj", "weight_scale"),
    ("up_proj", "weight_packed"),
    ("up_proj", "weight_scale"),
    ("down_proj", "weight_packed"),
    ("down_proj", "weight_scale"),
)

AttributeKind = Literal["int", "float", "floats"]
Sizes = dict[str, Any]
Check = Callable[[Any, str], None]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: `dtype` is a dtype name or a type parameter, `shape` a tuple of symbols."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttributeSpec:
    """One attribute of a node."""

    name: str
    kind: AttributeKind


def _derive_nothing(attributes: Mapping[str, Any], sizes: Sizes) -> Sizes:
    return {}


@dataclass(frozen=True, kw_only=True)
class OpSignature:
    """An operator of the `k25` domain.

    `name` is the ONNX node and plugin name, `folder` the folder of the op and its torch name, `plugin` tells
    whether TensorRT takes a plugin for it (otherwise its function body is built).
    """

    name: str
    folder: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...] = ()
    plugin: bool
    derive: Callable[[Mapping[str, Any], Sizes], Sizes] = field(default=_derive_nothing)

    @property
    def type_parameters(self) -> tuple[str, ...]:
        """The type parameters in order of appearance."""
        found = dict.fromkeys(spec.dtype for spec in self.inputs + self.outputs if spec.dtype not in ONNX_DTYPES)
        return tuple(found)

    def overloads(self) -> tuple[dict[str, str], ...]:
        """Every assignment of dtypes to the type parameters: one native kernel is registered for each."""
        names = self.type_parameters
        return tuple(dict(zip(names, chosen, strict=True)) for chosen in product(FLOAT_TYPES, repeat=len(names)))

    def torch_schema(self) -> str:
        """The schema `torch.library` is given, for example `linear(Tensor x, Tensor weight) -> Tensor`."""
        kinds = {"int": "int", "float": "float", "floats": "float[]"}
        arguments = [f"Tensor {spec.name}" for spec in self.inputs]
        arguments += [f"{kinds[spec.kind]} {spec.name}" for spec in self.attributes]
        results = ", ".join("Tensor" for _ in self.outputs)
        returned = results if len(self.outputs) == 1 else f"({results})"
        return f"{self.folder}({', '.join(arguments)}) -> {returned}"

    def infer_outputs(
        self,
        shapes: Sequence[Sequence[Any]],
        dtypes: Sequence[str],
        attributes: Mapping[str, Any],
        *,
        check: Check | None = None,
    ) -> list[tuple[tuple[Any, ...], str]]:
        """Shapes and dtypes of the outputs; raises `InputError` where the inputs do not fit.

        `check(condition, message)` decides equality of sizes; the fake kernel passes one that understands
        symbolic sizes. Sizes may be ints or symbolic integers.
        """
        check = check or self._require
        if len(shapes) != len(self.inputs):
            raise InputError(f"{DOMAIN}.{self.name}: expected {len(self.inputs)} inputs, found {len(shapes)}")
        sizes: Sizes = {}
        types: dict[str, str] = {}
        for spec, shape, dtype in zip(self.inputs, shapes, dtypes, strict=True):
            self._bind_dtype(spec, dtype, types)
            for symbol, size in self._named_axes(spec, shape, sizes):
                if symbol.isidentifier() and symbol not in sizes:
                    sizes[symbol] = size
        sizes |= self.derive(attributes, sizes)
        for spec, shape in zip(self.inputs, shapes, strict=True):
            for symbol, size in self._named_axes(spec, shape, sizes):
                wanted = self._size(symbol, attributes, sizes)
                check(
                    size == wanted,
                    f"{DOMAIN}.{self.name}: input {spec.name}, axis {symbol}: expected {wanted}, found {size}",
                )
        return [
            (self._output_shape(spec, attributes, sizes), types.get(spec.dtype, spec.dtype)) for spec in self.outputs
        ]

    def _named_axes(self, spec: TensorSpec, shape: Sequence[Any], sizes: Sizes) -> list[tuple[str, Any]]:
        symbols = spec.shape
        leading = 0
        if symbols[0] == LEADING_AXES:
            symbols = symbols[1:]
            leading = max(len(shape) - len(symbols), 0)
            sizes.setdefault(LEADING_AXES, tuple(shape[:leading]))
        if len(shape) - leading != len(symbols):
            raise InputError(
                f"{DOMAIN}.{self.name}: input {spec.name}: expected axes [{', '.join(spec.shape)}], "
                f"found shape {list(shape)}"
            )
        return list(zip(symbols, shape[leading:], strict=True))

    def _output_shape(self, spec: TensorSpec, attributes: Mapping[str, Any], sizes: Sizes) -> tuple[Any, ...]:
        leading = sizes[LEADING_AXES] if spec.shape[0] == LEADING_AXES else ()
        symbols = spec.shape[1:] if spec.shape[0] == LEADING_AXES else spec.shape
        return (*leading, *(self._size(symbol, attributes, sizes) for symbol in symbols))

    def _bind_dtype(self, spec: TensorSpec, dtype: str, types: dict[str, str]) -> None:
        if spec.dtype in ONNX_DTYPES:
            allowed: tuple[str, ...] = (spec.dtype,)
        elif spec.dtype in types:
            allowed = (types[spec.dtype],)
        else:
            allowed = FLOAT_TYPES
        if dtype not in allowed:
            raise InputError(
                f"{DOMAIN}.{self.name}: input {spec.name}: expected dtype {' or '.join(allowed)}, found {dtype}"
            )
        types.setdefault(spec.dtype, dtype)

    @staticmethod
    def _size(symbol: str, attributes: Mapping[str, Any], sizes: Sizes) -> Any:
        if symbol.isdigit():
            return int(symbol)
        factors = [sizes[name] if name in sizes else attributes[name] for name in symbol.split("*")]
        return factors[0] if len(factors) == 1 else math.prod(factors)

    @staticmethod
    def _require(condition: Any, message: str) -> None:
        if not condition:
            raise InputError(message)


def _derive_mla(attributes: Mapping[str, Any], sizes: Sizes) -> Sizes:
    rope_dim = 2 * len(attributes["inv_freq"])
    nope_dim = attributes["qk_nope_head_dim"]
    return {
        "qk_head_dim": nope_dim + rope_dim,
        "kv_head_dim": nope_dim + attributes["v_head_dim"],
        "latent_dim": sizes["cache_dim"] - rope_dim,
        "sequences_plus_1": sizes["sequences"] + 1,
    }


def _derive_vision_attention(attributes: Mapping[str, Any], sizes: Sizes) -> Sizes:
    width, heads = sizes["width"], attributes["num_heads"]
    if isinstance(width, int) and width % heads:
        raise InputError(
            f"{DOMAIN}.VisionAttention: input k, axis width: expected a multiple of num_heads {heads}, found {width}"
        )
    return {"head_dim": width // heads}


def _derive_router(attributes: Mapping[str, Any], sizes: Sizes) -> Sizes:
    experts, top_k = sizes["experts"], attributes["top_k"]
    if isinstance(experts, int) and not 1 <= top_k <= experts:
        raise InputError(
            f"{DOMAIN}.Router: attribute top_k: expected 1 to the {experts} experts of input logits, found {top_k}"
        )
    return {}


def _spec(name: str, dtype: str, *shape: str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _attributes(**kinds: AttributeKind) -> tuple[AttributeSpec, ...]:
    return tuple(AttributeSpec(name=name, kind=kind) for name, kind in kinds.items())


MLA = OpSignature(
    name="MLA",
    folder="mla",
    inputs=(
        _spec("q", "T", "tokens", "num_heads*qk_head_dim"),
        _spec("latent", "T", "tokens", "cache_dim"),
        _spec("cache", "TC", "blocks", "block_size", "cache_dim"),
        _spec("kv_b", "bfloat16", "num_heads*kv_head_dim", "latent_dim"),
        _spec("positions", "int32", "tokens"),
        _spec("query_start", "int32", "sequences_plus_1"),
        _spec("block_table", "int32", "sequences", "blocks_per_sequence"),
    ),
    outputs=(
        _spec("out", "T", "tokens", "num_heads*v_head_dim"),
        _spec("cache_out", "TC", "blocks", "block_size", "cache_dim"),
    ),
    attributes=_attributes(
        num_heads="int", qk_nope_head_dim="int", v_head_dim="int", softmax_scale="float", inv_freq="floats"
    ),
    plugin=True,
    derive=_derive_mla,
)

MOE_DISPATCH = OpSignature(
    name="MoEDispatch",
    folder="moe_dispatch",
    inputs=(
        _spec("x", "T", "tokens", "hidden"),
        _spec("expert_ids", "int32", "tokens", "k"),
        _spec("expert_weights", "float32", "tokens", "k"),
        _spec("words", "int32", "expert_rows", "2"),
        _spec("scales", "bfloat16", "expert_rows", "4"),
        _spec("table", "int64", "experts", "6"),
    ),
    outputs=(_spec("y", "T", "tokens", "hidden"),),
    attributes=_attributes(intermediate_size="int", group_size="int"),
    plugin=True,
)

LINEAR = OpSignature(
    name="Linear",
    folder="linear",
    inputs=(
        _spec("x", "T", "...", "in_features"),
        _spec("weight", "bfloat16", "out_features", "in_features"),
    ),
    outputs=(_spec("y", "T", "...", "out_features"),),
    plugin=False,
)

VISION_ATTENTION = OpSignature(
    name="VisionAttention",
    folder="vision_attention",
    inputs=(
        _spec("q", "T", "patches", "num_heads*head_dim"),
        _spec("k", "T", "patches", "width"),
        _spec("v", "T", "patches", "num_heads*head_dim"),
    ),
    outputs=(_spec("out", "T", "patches", "num_heads*head_dim"),),
    attributes=_attributes(num_heads="int", softmax_scale="float"),
    plugin=False,
    derive=_derive_vision_attention,
)

RMS_NORM = OpSignature(
    name="RMSNorm",
    folder="rms_norm",
    inputs=(
        _spec("x", "T", "...", "size"),
        _spec("weight", "bfloat16", "size"),
    ),
    outputs=(_spec("y", "T", "...", "size"),),
    attributes=_attributes(eps="float"),
    plugin=False,
)

ROUTER = OpSignature(
    name="Router",
    folder="router",
    inputs=(
        _spec("logits", "float32", "tokens", "experts"),
        _spec("bias", "float32", "experts"),
    ),
    outputs=(
        _spec("expert_ids", "int32", "tokens", "top_k"),
        _spec("expert_weights", "float32", "tokens", "top_k"),
    ),
    attributes=_attributes(top_k="int", normalise="int", scaling_factor="float"),
    plugin=False,
    derive=_derive_router,
)

OPS: tuple[OpSignature, ...] = (MLA, MOE_DISPATCH, LINEAR, VISION_ATTENTION, RMS_NORM, ROUTER)
