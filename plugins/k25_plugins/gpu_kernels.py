"""Compiles the GPU kernels ahead of time: `python -m k25_plugins.gpu_kernels --output DIR --targets all`.

No GPU is needed. `DIR` then holds what the native library embeds (`-DK25_GPU_KERNELS=DIR`), described in
`k25_plugins.gpu_manifest`, and `objects/`, from which unchanged kernels are taken the next time. A kernel that does not
keep its limits fails the build by its name. Nothing in DIR depends on the machine or on the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from k25_plugins.errors import K25Error, VerificationError, mismatch
from k25_plugins.gpu_compiler import CompiledKernel, compiled_kernel, configure_triton, faults, tool_versions
from k25_plugins.gpu_manifest import BuiltKernel, write_kernels
from k25_plugins.gpu_signatures import KERNELS, kernel_signature
from k25_plugins.gpu_specialisations import (
    ModelDims,
    Specialisation,
    dims_from_config,
    specialisations,
    targets_from_text,
)
from k25_plugins.gpu_table import write_table
from k25_plugins.whole_file import write_whole

#: PTX of this target is kept too: the driver compiles it for devices that no binary is for.
PTX_TARGET = 80
OBJECTS = "objects"
_ROOT = Path(__file__).resolve().parent


def build_kernels(folder: Path, specs: Sequence[Specialisation], *, jobs: int, quiet: bool = True) -> dict[str, int]:
    """Compile what is not in `folder` yet, check everything, write the manifest; counts of `compiled` and `kept`.

    Raises `VerificationError` that names every kernel over a limit, `BackendMissingError` without Triton, `K25Error`
    where the compiler refuses.
    """
    with tempfile.TemporaryDirectory() as cache:
        configure_triton(Path(cache))
        tools = tool_versions()
        keys = {spec: _key(spec, tools) for spec in specs}
        objects = folder / OBJECTS
        missing = [spec for spec in specs if not (objects / f"{keys[spec]}.json").is_file()]
        _compile_all(missing, {spec: objects / keys[spec] for spec in missing}, Path(cache), jobs, quiet)
    made = {spec: _read_object(objects / keys[spec]) for spec in specs}
    wrong = [fault for spec, compiled in made.items() for fault in faults(spec, compiled)]
    if wrong:
        raise VerificationError("\n".join(wrong))
    built = [_built(spec, compiled) for spec, compiled in made.items()]
    built += [_ptx(kernel, made[kernel.spec]) for kernel in built if kernel.spec.target.capability == PTX_TARGET]
    write_kernels(folder, built, tools=tools)
    current = set(keys.values())
    for path in objects.iterdir():
        if path.name.partition(".")[0] not in current:
            path.unlink(missing_ok=True)
    return {"compiled": len(missing), "kept": len(specs) - len(missing)}


def _key(spec: Specialisation, tools: dict[str, str]) -> str:
    """A hash of all that a kernel's binary depends on."""
    described = asdict(spec.plain())
    for unrelated in ("stack", "mma", "max_tokens"):
        del described[unrelated]
    digest = hashlib.sha256(json.dumps([described, tools], sort_keys=True).encode())
    folder = kernel_signature(spec.kernel).module.split(".")[1]
    for path in (_ROOT / folder / "gpu.py", _ROOT / "triton_math.py", _ROOT / "gpu_compiler.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:40]


def _compile_all(
    specs: Sequence[Specialisation], targets: dict[Specialisation, Path], cache: Path, jobs: int, quiet: bool
) -> None:
    if not specs:
        return
    context = multiprocessing.get_context("spawn")  # a worker sets Triton up before it imports it
    pool = ProcessPoolExecutor(min(jobs, len(specs)), context, initializer=configure_triton, initargs=(cache,))
    with pool:
        try:
            running = {pool.submit(_compile_to, spec.plain(), targets[spec]): spec for spec in specs}
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                if not quiet:
                    spec = running[future]
                    print(f"[{done}/{len(specs)}] sm_{spec.target.capability} {spec.name}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile_to(spec: Specialisation, path: Path) -> None:
    """Three files beside each other; the .json, which the others are read by, last."""
    made = compiled_kernel(spec)
    described = {key: value for key, value in asdict(made).items() if key not in ("cubin", "ptx")}
    write_whole(path.with_suffix(".cubin"), made.cubin)
    write_whole(path.with_suffix(".ptx"), made.ptx)
    write_whole(path.with_suffix(".json"), json.dumps(described))


def _read_object(path: Path) -> CompiledKernel:
    described: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    cubin, ptx = path.with_suffix(".cubin").read_bytes(), path.with_suffix(".ptx").read_bytes()
    return CompiledKernel(cubin=cubin, ptx=ptx, **described)


def _built(spec: Specialisation, made: CompiledKernel) -> BuiltKernel:
    return BuiltKernel(
        spec=spec,
        image=made.cubin,
        function=made.function,
        warps=made.warps,
        shared=made.shared,
        registers=made.registers,
        stack=made.stack,
        tensor_memory=made.tensor_memory,
        mma=made.mma,
    )


def _ptx(built: BuiltKernel, made: CompiledKernel) -> BuiltKernel:
    return replace(built, image=made.ptx, is_ptx=True)


def _dims(arguments: argparse.Namespace) -> list[ModelDims]:
    block_sizes = arguments.block_size or [ModelDims().block_size]
    found = []
    for block_size in block_sizes:
        changes = {
            "block_size": block_size,
            "activation_dtype": arguments.activation_dtype,
            "cache_dtype": arguments.cache_dtype,
        }
        configs = [dims_from_config(path, **changes) for path in arguments.config]
        found += configs or [ModelDims(**changes)]
    if arguments.heads:
        found = [replace(dims, num_heads=heads) for dims in found for heads in arguments.heads]
    return found


def main() -> int:
    """Build what the command line asks for; 0, or the exit code of the error that is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--targets", default="all", help="all, or compute capabilities such as 90,100")
    parser.add_argument("--config", type=Path, action="append", default=[], help="a model's config.json; repeatable")
    parser.add_argument("--block-size", type=int, action="append", help="of the latent cache; repeatable (64)")
    parser.add_argument("--heads", type=int, action="append", help="heads of one rank; repeatable (all of them)")
    parser.add_argument("--activation-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--cache-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", action="append", default=[], metavar="KERNEL", help="such as mla.split; repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", type=Path, help="write registers, stack and shared memory into this document")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    try:
        for name in arguments.only:
            if name not in KERNELS:
                raise mismatch("--only", expected=f"some of {', '.join(KERNELS)}", found=name)
        specs = specialisations(_dims(arguments), targets_from_text(arguments.targets), only=arguments.only)
        counts = build_kernels(arguments.output, specs, jobs=arguments.jobs, quiet=arguments.quiet)
        if arguments.table is not None:
            write_table(arguments.table, arguments.output)
    except K25Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{len(specs)} GPU kernels in {arguments.output}: {counts['compiled']} compiled, {counts['kept']} kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
