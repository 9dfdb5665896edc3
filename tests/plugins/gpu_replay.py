"""A native library with stand-ins for GPU kernels, a stand-in driver that writes launches down, and their replay.

The launches of the C++ code are run by Triton's interpreter on the very addresses that they name: grids, the order of
arguments, the workspace's parts and the choice of kernels are checked by what comes out.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k25_plugins.gpu_launch import DeviceTensor, device_tensor, launch, workspace_bytes
from k25_plugins.gpu_manifest import BuiltKernel, read_kernels, write_kernels
from k25_plugins.gpu_signatures import kernel_signature
from k25_plugins.gpu_specialisations import Specialisation
from k25_plugins.native_library import NativeLibrary, load_library

ROOT = Path(__file__).parents[2] / "plugins"
SOURCES = [
    *(f"core/{name}.cc" for name in ("checks", "cuda_driver", "gpu", "gpu_kernels")),
    *(f"k25_plugins/{op}/gpu.cc" for op in ("linear", "mla", "moe_dispatch")),
]
#: The rest of the C interface that loading a library asks for.
SHIM = """#include "k25.h"
extern "C" int32_t k25_abi_version(void) { return K25_ABI_VERSION; }
extern "C" const char* k25_version(void) { return "test"; }
"""
FORMATS = {"i32": "i", "fp32": "f"}
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "*i32": torch.int32, "*i64": torch.int64}


class Record(ctypes.Structure):
    """A launch, as `fake_cuda.c` writes it down."""

    _fields_ = (
        ("image", ctypes.c_char * 256),
        ("function", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * 128),
        ("values", (ctypes.c_ubyte * 8) * 128),
    )


@dataclass(frozen=True)
class Launch:
    """`values` are those of the parameters, addresses as integers."""

    name: str
    function: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    values: tuple[Any, ...]


def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def stand_in(spec: Specialisation, shared: int) -> BuiltKernel:
    """An image that names its kernel and the bytes of its parameters."""
    kinds = [kind for _, kind in spec.parameters()] + ["*i32"] * 2
    sizes = [8 if kind.startswith("*") or kind == "i64" else 4 for kind in kinds]
    text = f"k25 test image\nsm{spec.target.capability}:{spec.name} {len(sizes)} {' '.join(map(str, sizes))}\n"
    function = kernel_signature(spec.kernel).function
    return BuiltKernel(spec=spec, image=text.encode(), function=function, shared=shared)


class FakeGpu:
    """A library whose kernels are stand-ins, and the driver under it."""

    def __init__(self, folder: Path, specs: Iterable[Specialisation], shared: Mapping[str, int] | None = None) -> None:
        kernels = [stand_in(spec, (shared or {}).get(spec.name, 1024)) for spec in specs]
        ptx = [
            BuiltKernel(**{**vars(kernel), "is_ptx": True, "image": kernel.image.replace(b"sm80:", b"ptx80:")})
            for kernel in kernels
            if kernel.spec.target.capability == 80
        ]
        write_kernels(folder, [*kernels, *ptx], tools={})
        self.kernels = {
            f"{'ptx' if kernel['is_ptx'] else 'sm'}{kernel['target']}:{kernel['name']}": kernel
            for kernel in read_kernels(folder)
        }
        (folder / "shim.cc").write_text(SHIM)
        build = [compiler(), "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{ROOT / 'core'}", f"-I{folder}"]
        build += [f'-DK25_GPU_KERNELS_DIR="{folder}"', str(folder / "shim.cc"), *(str(ROOT / name) for name in SOURCES)]
        subprocess.run([*build, "-o", str(folder / "libk25_test.so"), "-ldl", "-pthread"], check=True)
        self.library: NativeLibrary = load_library(folder / "libk25_test.so")
        self.driver = ctypes.CDLL(str(driver_library(folder)))
        self.driver.fake_record.restype = ctypes.POINTER(Record)
        self.device(90, 232448)

    def device(self, capability: int, shared: int, processors: int = 3) -> None:
        """The device that launches see from now on."""
        self.driver.fake_device(capability, shared, processors)

    def launches(self) -> list[Launch]:
        """Those since the last call."""
        found = [self._launch(self.driver.fake_record(index)[0]) for index in range(self.driver.fake_record_count())]
        self.driver.fake_clear()
        return found

    def _launch(self, record: Record) -> Launch:
        name = record.image.decode()
        kinds = [kind for _, kind in self.kernels[name]["parameters"]] + ["*i32"] * 2  # type: ignore[union-attr]
        assert record.parameters == len(kinds)
        formats = ["Q" if kind.startswith("*") else FORMATS[kind] for kind in kinds]
        raw = [bytes(record.values[i][: record.sizes[i]]) for i in range(record.parameters)]
        values = tuple(struct.unpack(form, value)[0] for form, value in zip(formats, raw, strict=True))
        grid, block = tuple(record.grid), tuple(record.block)
        return Launch(name, record.function.decode(), grid, block, record.shared, record.stream or 0, values)

    def replay(self, launches: Sequence[Launch]) -> None:
        """Run them in Triton's interpreter, on the memory that they name."""
        for one in launches:
            entry: Any = self.kernels[one.name]
            assert one.block == (32 * entry["warps"], 1, 1)
            assert one.shared == entry["shared"]
            assert one.values[-2:] == (0, 0), "the two scratch pointers"
            signature = kernel_signature(entry["kernel"])
            given = dict(zip([name for name, _ in entry["parameters"]], one.values, strict=False))
            kinds = dict(entry["parameters"])
            arguments: dict[str, Any] = {**entry["constants"], "UP": True}
            for name, kind in signature.parameters:
                if kind == "fp32[]":
                    arguments[name] = tuple(given[f"{name}_{i}"] for i in range(entry["constants"]["D"] // 2))
                else:
                    arguments[name] = tensor_at(given[name], kinds[name]) if kind[0] == "*" else given[name]
            arguments = {
                name: bool(value) if name in ("PAIRS", "ALIGNED") else value for name, value in arguments.items()
            }
            kernel = getattr(import_module(signature.module), signature.function)
            kernel[one.grid](**{name: arguments[name] for name in kernel.arg_names if name in arguments})


def driver_library(folder: Path) -> Path:
    """The stand-in driver, compiled once a test session: the library opens it once in a process."""
    return Path(folder.parent / "libfake_cuda.so")


def compile_driver(path: Path) -> None:
    source = Path(__file__).with_name("fake_cuda.c")
    gcc = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if gcc is None:
        pytest.skip("no C compiler here")
    subprocess.run([gcc, "-std=c11", "-O1", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)


def tensor_at(address: int, kind: str) -> torch.Tensor:
    """A tensor that starts at an address; masks of the kernel bound it, a guard behind the workspace shows misses."""
    memory = (ctypes.c_ubyte * 16).from_address(address)
    return torch.frombuffer(memory, dtype=DTYPES[kind])


class Workspace:
    """Memory of the asked size, filled with bytes that are NaN as floats and -1 as integers, a guard behind it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = np.full(size + 4096, 0xFF, np.uint8)
        self.address = self._memory.ctypes.data + (-self._memory.ctypes.data) % 256
        self._end = self.address - self._memory.ctypes.data + size

    def check(self) -> None:
        assert (self._memory[self._end :] == 0xFF).all(), "something was written behind the workspace"


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at a multiple of 64 bytes."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    start = (-memory.data_ptr()) % 64
    made = memory[start : start + size].view(tensor.dtype).view(tensor.shape)
    made.copy_(tensor)
    return made


def run(
    gpu: FakeGpu,
    op: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    *,
    largest: Sequence[DeviceTensor] | None = None,
) -> list[Launch]:
    """Launch an op and replay what was launched; the workspace is that of `largest` (else of the inputs)."""
    given = [device_tensor(tensor) for tensor in inputs]
    workspace = Workspace(workspace_bytes(gpu.library, op, largest or given, attributes))
    gpu.launches()
    launch(
        gpu.library, op, given, [device_tensor(tensor) for tensor in outputs], attributes,
        workspace=workspace.address, stream=7,
    )  # fmt: skip
    launches = gpu.launches()
    assert all(one.stream == 7 for one in launches)
    gpu.replay(launches)
    workspace.check()
    return launches
