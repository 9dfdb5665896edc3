"""The signature table as C++ data for the native library: `plugins/core/signatures.inc`.

    python -m k25_plugins.native_signatures        # writes the file; a test holds that it is current

Standard library only.
"""

from __future__ import annotations

from pathlib import Path

from k25_plugins.signatures import LEADING_AXES, ONNX_DTYPES, OPS, OpSignature, TensorSpec
from k25_plugins.whole_file import write_whole

PATH = Path(__file__).resolve().parents[1] / "core" / "signatures.inc"

#: Sizes that only derived symbols need are named by these; the core computes them (see `derive` in checks.cc).
_KINDS = {"int": "kInt", "float": "kFloat", "floats": "kFloats"}


def signatures_inc() -> str:
    """The text of `signatures.inc`: symbols, tensors, attributes and operators, in the order of the table."""
    symbols = _symbols()
    lines = [
        "// Made from k25_plugins/signatures.py by `python -m k25_plugins.native_signatures`. Do not edit.",
        "// Structs: checks.h. An axis is a product of symbols; a literal is negative.",
        "// A dtype below 0 is a type parameter.",
        "",
        "enum Symbol : int16_t {",
        *(f"  {_symbol(name)}," for name in symbols),
        "  kSymbolCount",
        "};",
    ]
    for signature in OPS:
        lines += ["", *_operator(signature)]
    names = ", ".join(f"&k{signature.name}" for signature in OPS)
    lines += ["", f"constexpr const Signature* kSignatures[] = {{{names}}};", ""]
    return "\n".join(lines)


def _symbols() -> list[str]:
    found: dict[str, None] = {}
    for signature in OPS:
        for spec in signature.inputs + signature.outputs:
            for axis in spec.shape:
                if axis != LEADING_AXES and not axis.isdigit():
                    found |= dict.fromkeys(axis.split("*"))
        found |= {spec.name: None for spec in signature.attributes if spec.kind == "int"}
    return list(found)


def _symbol(name: str) -> str:
    return f"kSize_{name}"


def _operator(signature: OpSignature) -> list[str]:
    name = signature.name
    lines = []
    for kind, specs in (("Inputs", signature.inputs), ("Outputs", signature.outputs)):
        lines.append(f"constexpr TensorSpec k{name}{kind}[] = {{")
        lines += [f"    {_tensor(spec, signature.type_parameters)}," for spec in specs]
        lines.append("};")
    attributes = "nullptr"
    if signature.attributes:
        attributes = f"k{name}Attributes"
        lines.append(f"constexpr AttributeSpec {attributes}[] = {{")
        for attribute in signature.attributes:
            symbol = _symbol(attribute.name) if attribute.kind == "int" else "kSymbolCount"
            lines.append(f'    {{"{attribute.name}", {_KINDS[attribute.kind]}, {symbol}}},')
        lines.append("};")
    lines.append(
        f'constexpr Signature k{name} = {{"{name}", k{name}Inputs, {len(signature.inputs)}, k{name}Outputs, '
        f"{len(signature.outputs)}, {attributes}, {len(signature.attributes)}, {len(signature.type_parameters)}}};"
    )
    return lines


def _tensor(spec: TensorSpec, type_parameters: tuple[str, ...]) -> str:
    dtype = ONNX_DTYPES[spec.dtype] if spec.dtype in ONNX_DTYPES else -1 - type_parameters.index(spec.dtype)
    leading = spec.shape[0] == LEADING_AXES
    axes = spec.shape[1:] if leading else spec.shape
    described = ", ".join(spec.shape)
    text = ", ".join(_axis(axis) for axis in axes)
    return f'{{"{spec.name}", "{described}", {dtype}, {"true" if leading else "false"}, {len(axes)}, {{{text}}}}}'


def _axis(axis: str) -> str:
    factors = [f"-{factor}" if factor.isdigit() else _symbol(factor) for factor in axis.split("*")]
    return f'{{"{axis}", {len(factors)}, {{{", ".join(factors)}}}}}'


if __name__ == "__main__":
    write_whole(PATH, signatures_inc().encode())
