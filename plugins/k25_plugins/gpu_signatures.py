"""The GPU kernels' parameters, read from their source: what a launch passes, and the constants of a build.

`core/gpu_signatures.inc`, the C++ side of the same table, is made here (`python -m k25_plugins.gpu_signatures`) and
committed; a test compares the two. Standard library only: Triton is not needed to know how a kernel is called.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from k25_plugins.whole_file import write_whole

#: Kernels that are launched, as op folder and function of its `gpu.py`, in the order of the C++ enumeration.
KERNELS: tuple[str, ...] = (
    "mla.rotate_append",
    "mla.absorb",
    "mla.split",
    "mla.combine",
    "mla.expand",
    "mla.prefill",
    "moe_dispatch.permute_x",
    "moe_dispatch.route_small",
    "moe_dispatch.route_large",
    "moe_dispatch.gate_up",
    "moe_dispatch.down",
    "moe_dispatch.combine",
    "linear.linear",
)

#: Type of a parameter by its name: `T` is the dtype of activations, `TC` that of the cache; `fp32[]` are D / 2 floats.
_TYPES = MappingProxyType(
    {
        **dict.fromkeys(("q", "latent", "qa", "out", "kv", "x", "h", "y"), "*T"),
        **dict.fromkeys(("kv_b", "scales", "weight"), "*bf16"),
        **dict.fromkeys(("part", "lse", "weights", "partial"), "*fp32"),
        **dict.fromkeys(
            ("positions", "query_start", "block_table", "words", "ids", "order", "start", "count", "active"), "*i32"
        ),
        **dict.fromkeys(
            ("sequences", "blocks_per_sequence", "tokens", "splits", "min_chunk", "capacity", "lanes"), "i32"
        ),
        **dict.fromkeys(("pairs", "experts", "inputs", "outputs"), "i32"),
        "cache": "*TC",
        "table": "*i64",
        "scale": "fp32",
        "inv_freq": "fp32[]",
    }
)
_EXCEPTIONS = MappingProxyType({("moe_dispatch.down", "out"): "*fp32"})
_FOLDER = Path(__file__).resolve().parent
PATH = _FOLDER.parent / "core" / "gpu_signatures.inc"


@dataclass(frozen=True, kw_only=True)
class KernelSignature:
    """`parameters` are (name, type) in the order of a launch, `constants` the names of the constexprs in theirs."""

    kernel: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that holds the kernel."""
        return f"k25_plugins.{self.kernel.partition('.')[0]}.gpu"

    @property
    def function(self) -> str:
        """Its function."""
        return self.kernel.partition(".")[2]

    @property
    def classes(self) -> str:
        """A letter a parameter: p pointer, i int32, f float32, F floats."""
        letters = {"i32": "i", "fp32": "f", "fp32[]": "F"}
        return "".join(letters.get(kind, "p") for _, kind in self.parameters)


@functools.cache
def kernel_signature(kernel: str) -> KernelSignature:
    """The signature of one of `KERNELS`."""
    folder, _, name = kernel.partition(".")
    tree = ast.parse((_FOLDER / folder / "gpu.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    parameters, constants = [], []
    for argument in function.args.args:
        if argument.annotation is None:
            kind = _EXCEPTIONS.get((kernel, argument.arg), _TYPES.get(argument.arg))
            assert kind is not None, f"{kernel}: no type for parameter {argument.arg}"
            parameters.append((argument.arg, kind))
        else:
            assert ast.unparse(argument.annotation) == "tl.constexpr", f"{kernel}: {argument.arg}"
            constants.append(argument.arg)
    return KernelSignature(kernel=kernel, parameters=tuple(parameters), constants=tuple(constants))


def signatures_inc() -> str:
    """The text of `core/gpu_signatures.inc`."""
    signatures = [kernel_signature(kernel) for kernel in KERNELS]
    lines = [
        "// Made from the GPU kernels' source by `python -m k25_plugins.gpu_signatures`. Do not edit.",
        "",
        "enum GpuKernelKind : int16_t {",
        *(f"  kGpu_{kernel.replace('.', '_')}," for kernel in KERNELS),
        "  kGpuKernelKinds",
        "};",
        "",
        "// The constants of each kernel, by their place in GpuKernel::constants.",
    ]
    for signature in signatures:
        names = ", ".join(signature.constants)
        lines.append(f"namespace {signature.kernel.replace('.', '_')} {{ enum : int16_t {{ {names} }}; }}")
    most = max(len(signature.constants) for signature in signatures)
    lines += [
        "",
        f"enum : int16_t {{ kMostGpuConstants = {most} }};",
        "",
        "// A kernel's parameters in the order of a launch: p pointer, i int32, f float32, F one or more float32.",
        "struct GpuKernelSpec {",
        "  const char* name;",
        "  const char* parameters;",
        "};",
        "constexpr GpuKernelSpec kGpuKernelSpecs[] = {",
        *(f'    {{"{signature.kernel}", "{signature.classes}"}},' for signature in signatures),
        "};",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    write_whole(PATH, signatures_inc())
