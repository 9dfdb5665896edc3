"""Where `gpu_decode_step.py` runs: a GPU with ONNX Runtime's CUDA provider, or, dry, the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import onnxruntime as ort
import torch

from k25_export.manifest import Precision
from k25_plugins.errors import BackendMissingError
from k25_plugins.gpu_launch import gpu_kernel_count, prepare, set_even_rows
from k25_plugins.native_library import NativeLibrary

REPLAYS = 10


class Cuda:
    """The first GPU with ONNX Runtime's CUDA provider, on a stream of PyTorch's."""

    is_real = True
    kind = "cuda"
    precision: Precision = "bf16"

    def __init__(self, library: NativeLibrary | None) -> None:
        """Raises `BackendMissingError` where anything is missing."""
        if not torch.cuda.is_available():
            raise BackendMissingError("bench/gpu_decode_step.py: PyTorch sees no GPU here. Without one: --dry-run")
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise BackendMissingError(
                f"bench/gpu_decode_step.py: ONNX Runtime {ort.__version__} has no CUDA provider: "
                "pip install onnxruntime-gpu in the place of onnxruntime"
            )
        if library is None or gpu_kernel_count(library) == 0:
            raise BackendMissingError(
                "bench/gpu_decode_step.py: the native library has no GPU kernels: build it with -DK25_GPU_KERNELS=DIR "
                "(docs/kernels.md)"
            )
        self.device = torch.device("cuda")
        self.name = torch.cuda.get_device_name()
        self.library: NativeLibrary | None = library
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        torch.zeros(1, device=self.device)
        prepare(library)
        set_even_rows(library, is_even=True)

    def providers(self) -> list[Any]:
        """The provider on our stream, so that PyTorch's work and events are in order with it."""
        options = {"device_id": "0", "user_compute_stream": str(self.stream.cuda_stream)}
        return [("CUDAExecutionProvider", options)]

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def timer(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Seconds of one call, of several between two events."""
        for _ in range(3):
            run()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def seconds() -> float:
            begin.record()
            for _ in range(REPLAYS):
                run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / REPLAYS

        return seconds


class Cpu:
    """A dry run: the CPU provider in float32."""

    is_real = False
    kind = "cpu"
    precision: Precision = "fp32"
    name = "dry run"
    device = torch.device("cpu")

    def __init__(self, library: NativeLibrary | None) -> None:
        self.library = library
        if library is not None:
            library.set_session_mode("exact")

    def providers(self) -> list[Any]:
        """The CPU provider."""
        return ["CPUExecutionProvider"]

    def synchronize(self) -> None:
        """Nothing is put off."""

    def timer(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Seconds of one call."""

        def seconds() -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return seconds


Place = Cuda | Cpu
