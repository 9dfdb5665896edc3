"""What a build of GPU kernels writes: `kernels.json`, images in `kernels.bin`, and their table for C++, `kernels.inc`.

`kernels.json` holds `schema`, `tools` (name -> version) and `kernels`, in the order in which a launch tries them. Each
has `name`, `kernel` (`mla.split`), `function`, `target`, `is_ptx`, `activation_dtype`, `cache_dtype`, `warps`,
`stages`, `max_tokens` (null: any), `divisible`, `constants`, `parameters` ([name, type] of a launch; two null pointers
follow), `shared`, `registers`, `stack`, `tensor_memory`, `mma`, and of its image `offset`, `bytes` and `sha256`.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from k25_plugins.errors import mismatch
from k25_plugins.gpu_signatures import KERNELS, kernel_signature
from k25_plugins.gpu_specialisations import Specialisation
from k25_plugins.signatures import ONNX_DTYPES
from k25_plugins.whole_file import write_whole

SCHEMA = 1
MANIFEST, IMAGES, TABLE = "kernels.json", "kernels.bin", "kernels.inc"
#: Images start at multiples of this many bytes, and a zero byte follows each (PTX is text).
_ALIGNMENT = 64
_MEASURED = ("function", "is_ptx", "shared", "registers", "stack", "tensor_memory")


@dataclass(frozen=True, kw_only=True)
class BuiltKernel:
    """A kernel of a build: its specialisation, its image, and what the compiler says of it."""

    spec: Specialisation
    image: bytes
    function: str
    is_ptx: bool = False
    warps: int = 0
    shared: int = 0
    registers: int = 0
    stack: int = 0
    tensor_memory: int = 0
    mma: Mapping[str, int] = field(default_factory=dict)


def write_kernels(folder: Path, kernels: Iterable[BuiltKernel], *, tools: Mapping[str, str]) -> None:
    """Write the three files; the manifest last, so that it never names images that are not there."""
    images = bytearray()
    entries = []
    rows = []
    for built in kernels:
        images += bytes(-len(images) % _ALIGNMENT)
        entries.append(_entry(built, len(images)))
        rows.append(_row(built, len(images)))
        images += built.image + b"\0"
    write_whole(folder / IMAGES, bytes(images))
    write_whole(folder / TABLE, "#define K25_GPU_KERNEL_TABLE \\\n" + " \\\n".join(rows) + "\n")
    text = json.dumps({"schema": SCHEMA, "tools": dict(tools), "kernels": entries}, indent=1)
    write_whole(folder / MANIFEST, text + "\n")


def read_kernels(folder: Path) -> list[dict[str, object]]:
    """The `kernels` of a manifest. Raises `InputError` where it is none, or of another schema."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, kernels = manifest["schema"], manifest["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise mismatch(str(path), expected="a manifest of GPU kernels", found=repr(error)) from error
    if found != SCHEMA:
        raise mismatch(str(path), expected=f"schema {SCHEMA}", found=found, hint="Build the kernels again")
    return list(kernels)


def _entry(built: BuiltKernel, offset: int) -> dict[str, object]:
    spec = built.spec
    measured = {name: getattr(built, name) for name in _MEASURED}
    return {
        "name": spec.name,
        "kernel": spec.kernel,
        "target": spec.target.capability,
        "activation_dtype": spec.activation_dtype,
        "cache_dtype": spec.cache_dtype,
        "stages": spec.stages,
        "max_tokens": spec.max_tokens,
        "divisible": list(spec.divisible),
        "constants": dict(spec.constants),
        "parameters": [list(pair) for pair in spec.parameters()],
        **measured,
        "warps": built.warps or spec.warps,
        "mma": dict(built.mma),
        "offset": offset,
        "bytes": len(built.image),
        "sha256": hashlib.sha256(built.image).hexdigest(),
    }


def _row(built: BuiltKernel, offset: int) -> str:
    spec = built.spec
    constants = ", ".join(str(spec.constants[name]) for name in kernel_signature(spec.kernel).constants)
    assert spec.kernel in KERNELS
    values = (
        f'"{spec.name}"',
        f'"{built.function}"',
        f"k25::kGpu_{spec.kernel.replace('.', '_')}",
        spec.target.capability,
        str(built.is_ptx).lower(),
        ONNX_DTYPES[spec.activation_dtype],
        ONNX_DTYPES[spec.cache_dtype],
        built.warps or spec.warps,
        built.shared,
        spec.max_tokens or 0,
        int(bool(spec.divisible)),
        offset,
        len(built.image),
    )
    return f"    {{{', '.join(map(str, values))}, {{{constants}}}}},"
