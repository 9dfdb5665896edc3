"""One GPU kernel compiled ahead of time, and the checks that a green compile leaves out. No GPU is needed.

Import this module in a process of its own: it fixes settings of Triton that are read when Triton is imported. Triton's
compiler accepts kernels over the shared memory of their device, kernels with kilobytes of spills, and kernels whose
whole body became a trap; `faults` names them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from k25_plugins.errors import BackendMissingError, K25Error
from k25_plugins.gpu_signatures import kernel_signature
from k25_plugins.gpu_specialisations import Specialisation

#: Names another ptxas; else that of a CUDA toolkit on this machine, else the one inside Triton.
PTXAS_VARIABLE = "K25_PTXAS"
#: The first CUDA release whose ptxas knows every target.
_OLDEST_PTXAS = (12, 9)
#: Only the targets from here on take the toolkit's ptxas; before it, Triton's own does no worse.
_TOOLKIT_PTXAS_FROM = 90
_MOST_TENSOR_MEMORY = 512
#: A body of a single trap needs 4; real kernels with matrix products need far more.
_FEWEST_REGISTERS = 17
_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma.sync": "mma.sync", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel's binary and what the compiler says of it.

    `parameters` has a letter for each: p 8 bytes, i 4 bytes, f float32. `mma` counts matrix instructions in the PTX.
    """

    function: str
    cubin: bytes
    ptx: bytes
    warps: int
    shared: int
    registers: int
    stack: int
    tensor_memory: int
    scratch: int
    parameters: str
    mma: Mapping[str, int]


def configure_triton(cache: Path) -> None:
    """Settings that make builds equal on every machine; before Triton is imported. `cache` is Triton's own."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(TRITON_DISABLE_LINE_INFO="1", TRITON_DEFAULT_FP_FUSION="1", TRITON_CACHE_DIR=str(cache))
    os.environ.pop("TRITON_PTXAS_PATH", None)
    toolkit = toolkit_ptxas()
    if toolkit is not None:
        os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(toolkit)
    else:
        os.environ.pop("TRITON_PTXAS_BLACKWELL_PATH", None)


@functools.cache
def toolkit_ptxas() -> Path | None:
    """The ptxas of `K25_PTXAS` or of a CUDA toolkit; None where there is none that knows every target."""
    named = os.environ.get(PTXAS_VARIABLE)
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(root) / "bin" / "ptxas" for root in roots if root]
    found = [named] if named else [*map(str, places), shutil.which("ptxas")]
    for path in found:
        if path is not None and Path(path).is_file() and _release(ptxas_version(Path(path))) >= _OLDEST_PTXAS:
            return Path(path)
    if named:
        raise BackendMissingError(f"{PTXAS_VARIABLE}={named}: expected a ptxas of CUDA 12.9 or newer")
    return None


def ptxas_version(path: Path) -> str:
    """ "13.0.88" of "... release 13.0, V13.0.88"."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"\bV(\d+(?:\.\d+)+)", text)
    return match.group(1) if match else "0"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def tool_versions() -> dict[str, str]:
    """Triton and the ptxas of each group of targets: part of a build's key and of its manifest."""
    try:
        from triton import __version__, knobs
    except ImportError as error:
        raise BackendMissingError(
            'GPU kernels are compiled by Triton, which is not installed: pip install "k25-export[gpu-kernels]"'
        ) from error
    newer = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)
    return {
        "triton": __version__,
        f"ptxas below sm_{_TOOLKIT_PTXAS_FROM}": ptxas_version(Path(knobs.nvidia.ptxas.path)),
        f"ptxas from sm_{_TOOLKIT_PTXAS_FROM}": ptxas_version(Path(newer.path)),
    }


def compiled_kernel(spec: Specialisation) -> CompiledKernel:
    """Compile one kernel. Raises `K25Error` with the compiler's words where it refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(kernel_signature(spec.kernel).module), kernel_signature(spec.kernel).function)
    signature, attributes = _triton_signature(spec, function.arg_names)
    source = ASTSource(fn=function, signature=signature, constexprs=_constexprs(spec), attrs=attributes)
    try:
        made = triton.compile(
            source,
            target=GPUTarget("cuda", spec.target.capability, 32),
            options={"num_warps": spec.warps, "num_stages": spec.stages},
        )
    except Exception as error:
        raise K25Error(f"GPU kernel {spec.name} for sm_{spec.target.capability}: {error}") from error
    ptx: str = made.asm["ptx"]
    registers, stack = _resources(made.asm["cubin"])
    return CompiledKernel(
        function=made.metadata.name,
        cubin=made.asm["cubin"],
        ptx=ptx.encode(),
        warps=made.metadata.num_warps,
        shared=made.metadata.shared,
        registers=registers,
        stack=stack,
        tensor_memory=getattr(made.metadata, "tmem_size", None) or 0,
        scratch=made.metadata.global_scratch_size + (getattr(made.metadata, "profile_scratch_size", 0) or 0),
        parameters=_entry_parameters(ptx),
        mma={name: len(re.findall(rf"\b{re.escape(text)}\b", ptx)) for name, text in _INSTRUCTIONS.items()},
    )


def _triton_signature(
    spec: Specialisation, names: list[str]
) -> tuple[dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """Types by name, and what the compiler may take for granted: pointers and `divisible` are multiples of 16."""
    kinds = dict(kernel_signature(spec.kernel).parameters)
    flat = dict(spec.parameters())
    types: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(names):
        if name in spec.constants:
            types[name] = "constexpr"
        elif kinds[name] == "fp32[]":
            types[name] = ("fp32",) * (spec.constants["D"] // 2)
        else:
            types[name] = flat[name]
        if (name in flat and flat[name].startswith("*")) or name in spec.divisible:
            attributes[index,] = [["tt.divisibility", 16]]
    return types, attributes


def _constexprs(spec: Specialisation) -> dict[str, int | bool]:
    flags = {"UP", "PAIRS", "ALIGNED"}
    return {name: bool(value) if name in flags else value for name, value in spec.constants.items()}


def _entry_parameters(ptx: str) -> str:
    match = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    kinds = re.findall(r"\.param\s+\.([a-z])(\d+)", match.group(1)) if match else []
    return "".join("f" if kind == "f" else "p" if bits == "64" else "i" for kind, bits in kinds)


def _expected_parameters(spec: Specialisation) -> str:
    """As `CompiledKernel.parameters`; two scratch pointers end every kernel's."""
    letters = {"i32": "i", "fp32": "f"}
    return "".join(letters.get(kind, "p") for _, kind in spec.parameters()) + "pp"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread. Spills are part of the stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise K25Error(f"cuobjdump: expected the registers of a kernel, found {text[-200:]!r}")
    return int(match.group(1)), int(match.group(2))


def faults(spec: Specialisation, made: CompiledKernel) -> list[str]:
    """What is wrong with a kernel that compiled, a sentence each; none for a good one."""
    expected = _expected_parameters(spec)
    found: list[tuple[str, object, object, bool]] = [
        ("shared memory", f"at most {spec.target.shared} bytes", made.shared, made.shared <= spec.target.shared),
        ("stack", f"at most {spec.stack} bytes", made.stack, made.stack <= spec.stack),
        ("tensor memory", f"at most {_MOST_TENSOR_MEMORY} columns", made.tensor_memory,
         made.tensor_memory <= _MOST_TENSOR_MEMORY),
        ("scratch memory", "none", made.scratch, made.scratch == 0),
        ("parameters", expected, made.parameters, made.parameters == expected),
    ]  # fmt: skip
    if spec.mma is not None:
        found += [
            ("matrix instructions", spec.mma, dict(made.mma), made.mma[spec.mma] > 0),
            ("registers", f"at least {_FEWEST_REGISTERS}", made.registers, made.registers >= _FEWEST_REGISTERS),
        ]
    where = f"GPU kernel {spec.name} for sm_{spec.target.capability}"
    return [f"{where}: {what}: expected {wanted}, found {has}" for what, wanted, has, is_good in found if not is_good]
