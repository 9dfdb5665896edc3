"""The device over cuda-python and TensorRT: stand-ins with their functions; real names where they are installed."""

# ruff: noqa: N802, N815

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from k25_engines.tensorrt_module import device_compute_capability
from k25_plugins.errors import BackendMissingError, InputError
from k25_runtime.cuda_device import CudaDevice
from k25_runtime.device import DeviceError
from k25_runtime.tensorrt_engine import TensorRTContext, TensorRTEngine

OUT_OF_MEMORY, FAILED, SUCCESS = 2, 719, 0

#: Every function that the device calls, and how many arguments it gives.
CALLS = {
    "cudaSetDevice": 1, "cudaGetDeviceProperties": 1, "cudaMalloc": 1, "cudaFree": 1, "cudaMemGetInfo": 0,
    "cudaHostAlloc": 2, "cudaFreeHost": 1, "cudaStreamCreateWithFlags": 1, "cudaStreamDestroy": 1,
    "cudaEventCreateWithFlags": 1, "cudaEventDestroy": 1, "cudaEventRecord": 2, "cudaEventSynchronize": 1,
    "cudaStreamSynchronize": 1, "cudaMemcpyAsync": 5, "cudaMemsetAsync": 4, "cudaStreamBeginCapture": 2,
    "cudaStreamEndCapture": 1, "cudaGraphInstantiate": 2, "cudaGraphDestroy": 1, "cudaGraphLaunch": 2,
    "cudaGraphExecDestroy": 1, "cudaGetErrorString": 1, "cudaGetLastError": 0,
}  # fmt: skip


class Cuda:
    """cuda.bindings.runtime over host memory: results are tuples (error, values...), as there."""

    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS, cudaErrorMemoryAllocation=OUT_OF_MEMORY)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaHostAllocDefault, cudaStreamNonBlocking, cudaEventDisableTiming = 0, 1, 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.errors: dict[str, int] = {}
        self.kept: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        assert name in CALLS, f"{name} is not among the functions that are checked against cuda-python"

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == CALLS[name], name
            self.calls.append((name, arguments))
            error = self.errors.get(name, SUCCESS)
            if error != SUCCESS:
                return error, None
            return (error, *getattr(self, f"_{name}", lambda *_: ())(*arguments))

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def _memory(self, size: int) -> tuple[int]:
        buffer = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self.kept[address] = buffer
        return (address,)

    def _cudaMalloc(self, size: int) -> tuple[int]:
        return self._memory(size)

    def _cudaHostAlloc(self, size: int, flags: int) -> tuple[int]:
        return self._memory(size)

    def _cudaGetDeviceProperties(self, device: int) -> tuple[Any]:
        return (SimpleNamespace(name=b"NVIDIA RTX PRO 6000\0\0", major=12, minor=0),)

    def _cudaMemGetInfo(self) -> tuple[int, int]:
        return 2**30, 3 * 2**30

    def _cudaGetErrorString(self, error: int) -> tuple[bytes]:
        return (b"unspecified launch failure",)

    def _cudaStreamCreateWithFlags(self, flags: int) -> tuple[int]:
        return (77,)

    def _cudaEventCreateWithFlags(self, flags: int) -> tuple[int]:
        return (88,)

    def _cudaStreamEndCapture(self, stream: int) -> tuple[str]:
        return ("graph",)

    def _cudaGraphInstantiate(self, graph: str, flags: int) -> tuple[str]:
        return ("executable",)

    def _cudaMemcpyAsync(self, destination: int, source: int, size: int, kind: int, stream: int) -> tuple[()]:
        ctypes.memmove(destination, source, size)
        return ()

    def _cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[()]:
        ctypes.memset(address, value, size)
        return ()


class Loader:
    closed = 0

    def load(self, data: bytes, *, label: str) -> str:
        return f"{label}: {len(data)}"

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def device(cuda: Cuda) -> CudaDevice:
    loader: Any = Loader()
    return CudaDevice(loader, runtime=cuda)


def test_the_first_gpu_is_described(device: CudaDevice) -> None:
    assert (device.name, device.compute_capability) == ("NVIDIA RTX PRO 6000", "12.0")
    assert device.load_engine(b"abc", label="engine") == "engine: 3"  # type: ignore[comparison-overlap]


def test_bytes_go_there_and_back(device: CudaDevice, cuda: Cuda) -> None:
    stream = device.create_stream()
    pinned, address = device.allocate_pinned(64), device.allocate(64)
    pinned[:] = np.arange(64)
    device.copy_to_device(address, pinned, stream)
    device.fill_zero(address, 8, stream)
    pinned[:] = 99
    device.copy_to_host(pinned[16:48], address + 16, stream)
    device.copy_to_host(pinned[:8], address, stream)
    assert pinned.tolist() == [0] * 8 + [99] * 8 + list(range(16, 48)) + [99] * 16
    kinds = [arguments[3] for name, arguments in cuda.calls if name == "cudaMemcpyAsync"]
    assert kinds == [1, 2, 2]
    device.free_pinned(pinned)
    device.free(address)
    device.destroy_stream(stream)
    assert cuda.names()[-3:] == ["cudaFreeHost", "cudaFree", "cudaStreamDestroy"]


def test_events_and_graphs_are_the_calls_of_the_driver(device: CudaDevice, cuda: Cuda) -> None:
    stream, event = device.create_stream(), device.create_event()
    device.record(event, stream)
    device.synchronize_event(event)
    device.begin_capture(stream)
    graph = device.end_capture(stream)
    device.launch(graph, stream)
    device.synchronize(stream)
    device.destroy_graph(graph)
    device.destroy_event(event)
    assert cuda.calls[-9:] == [
        ("cudaEventSynchronize", (88,)),
        ("cudaStreamBeginCapture", (77, 1)),
        ("cudaStreamEndCapture", (77,)),
        ("cudaGraphInstantiate", ("graph", 0)),
        ("cudaGraphDestroy", ("graph",)),
        ("cudaGraphLaunch", ("executable", 77)),
        ("cudaStreamSynchronize", (77,)),
        ("cudaGraphExecDestroy", ("executable",)),
        ("cudaEventDestroy", (88,)),
    ]


def test_a_failed_call_is_named_with_the_driver_s_words(device: CudaDevice, cuda: Cuda) -> None:
    stream = device.create_stream()
    calls = {
        "cudaStreamSynchronize": lambda: device.synchronize(stream),
        "cudaGraphLaunch": lambda: device.launch("graph", stream),
        "cudaStreamEndCapture": lambda: device.end_capture(stream),
        "cudaGraphInstantiate": lambda: device.end_capture(stream),
    }
    for name, call in calls.items():
        cuda.errors = {name: FAILED}
        with pytest.raises(DeviceError, match=f"{name} failed: unspecified launch failure"):
            call()
    assert cuda.names().count("cudaGraphDestroy") == 1  # of the graph that could not be instantiated


def test_no_memory_says_how_much_there_is(device: CudaDevice, cuda: Cuda) -> None:
    cuda.errors = {"cudaMalloc": OUT_OF_MEMORY}
    with pytest.raises(InputError, match=r"RTX PRO 6000: expected 5\.00 GiB of free memory, found 1\.00 of 3\.00 GiB"):
        device.allocate(5 * 2**30)
    assert "cudaGetLastError" in cuda.names()  # or the next call would fail too


@pytest.mark.skipif(device_compute_capability() is not None, reason="there is a GPU here")
def test_no_gpu_by_the_real_cuda_python() -> None:
    """Its results and error texts are what the device takes them for."""
    pytest.importorskip("cuda.bindings.runtime")
    loader: Any = Loader()
    with pytest.raises(BackendMissingError, match=r"no GPU that can be used here: cudaSetDevice failed: .*driver"):
        CudaDevice(loader)


def test_no_gpu() -> None:
    cuda, loader = Cuda(), Loader()
    cuda.errors = {"cudaSetDevice": FAILED}
    with pytest.raises(BackendMissingError, match="no GPU that can be used here: cudaSetDevice failed"):
        CudaDevice(loader, runtime=cuda)  # type: ignore[arg-type]


def test_cuda_python_has_these_functions() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name, count in CALLS.items():
        signature = (getattr(runtime, name).__doc__ or "").splitlines()[0]
        inside = signature.partition("(")[2].rpartition(")")[0]
        assert len([part for part in inside.split(",") if part.strip()]) == count, signature
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert runtime.cudaError_t.cudaErrorMemoryAllocation
    assert (runtime.cudaStreamNonBlocking, runtime.cudaEventDisableTiming) == (1, 2)


# TensorRT.

ENGINE = [
    "create_execution_context", "get_device_memory_size_for_profile_v2", "get_tensor_dtype", "get_tensor_mode",
    "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors", "num_optimization_profiles",
]  # fmt: skip
CONTEXT = [
    "execute_async_v3", "set_device_memory", "set_input_shape", "set_optimization_profile_async", "set_tensor_address",
]  # fmt: skip


class Context:
    """An IExecutionContext that says yes, or no to one call."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in CONTEXT:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return None if name == "set_device_memory" else name != self.refuse

        return call


class Engine:
    """An ICudaEngine with one input and one output."""

    num_io_tensors, num_optimization_profiles = 2, 2

    def __init__(self, context: Context | None) -> None:
        self.context = context

    def get_tensor_name(self, index: int) -> str:
        return ["x", "y"][index]

    def get_tensor_dtype(self, name: str) -> str:
        return "BF16"

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1, 8]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return [[1, 8], [2, 8], [4 + profile, 8]]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * (profile + 1)

    def create_execution_context(self, strategy: str) -> Any:
        assert strategy == "ours"
        return self.context


def engine(context: Context | None, messages: deque[str] | None = None) -> TensorRTEngine:
    module = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT="in"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
    )
    tensorrt: Any = SimpleNamespace(module=module, dtype_name=lambda dtype: {"BF16": "bfloat16"}[dtype])
    return TensorRTEngine(tensorrt, Engine(context), messages if messages is not None else deque(), label="engine e")


def test_an_engine_describes_itself() -> None:
    found = engine(Context())
    assert [(port.name, port.dtype, port.shape, port.is_input) for port in found.ports] == [
        ("x", "bfloat16", (-1, 8), True),
        ("y", "bfloat16", (-1, 8), False),
    ]
    assert found.profile_shapes("x", 1) == ((1, 8), (2, 8), (5, 8))
    assert (found.profiles, found.scratch_bytes(1), found.aliased_input("y")) == (2, 2000, None)


def test_a_context_is_told_in_tensorrt_s_words() -> None:
    inner = Context()
    context = engine(inner).context(1, 77)
    context.set_scratch(4096, 2000)
    context.set_shape("x", (3, 8))
    context.set_address("x", 8192)
    context.enqueue(77)
    assert context.is_capturable(77)  # enterprise TensorRT has no such question
    assert inner.calls == [
        ("set_optimization_profile_async", 1, 77),
        ("set_device_memory", 4096, 2000),
        ("set_input_shape", "x", (3, 8)),
        ("set_tensor_address", "x", 8192),
        ("execute_async_v3", 77),
    ]


@pytest.mark.parametrize("call", [name for name in CONTEXT if name != "set_device_memory"])
def test_a_call_that_tensorrt_refuses_is_an_error_with_its_log(call: str) -> None:
    messages: deque[str] = deque()
    context = TensorRTContext(Context(call), messages, label="engine e")
    messages.append("it is too large")
    calls = {
        "set_optimization_profile_async": lambda: context.set_profile(1, 77),
        "set_input_shape": lambda: context.set_shape("x", (3, 8)),
        "set_tensor_address": lambda: context.set_address("x", 1),
        "execute_async_v3": lambda: context.enqueue(77),
    }
    with pytest.raises(DeviceError, match=r"engine e: TensorRT refused the .*: (it is too large|it gave no reason)"):
        calls[call]()


def test_no_context() -> None:
    with pytest.raises(DeviceError, match="engine e: no execution context: out of memory"):
        engine(None, deque(["out of memory"])).context(0, 77)


def test_tensorrt_has_these_names() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert not [name for name in ENGINE if not hasattr(trt.ICudaEngine, name)]
    assert not [name for name in CONTEXT if not hasattr(trt.IExecutionContext, name)]
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert trt.TensorIOMode.INPUT != trt.TensorIOMode.OUTPUT


LOAD = """
from k25_engines.tensorrt_module import load_tensorrt
from k25_engines.tensorrt_module import device_compute_capability
from k25_plugins.errors import InputError
from k25_runtime.tensorrt_engine import EngineLoader
loader = EngineLoader(load_tensorrt("tensorrt-rtx"))
try:
    loader.load(b"no engine" * 20, label="engine e")
except InputError as error:
    print(error)
loader.close()
"""


def test_tensorrt_says_why_it_refuses_a_file() -> None:
    """The real one, in a process of its own: the logger's words reach the message."""
    pytest.importorskip("tensorrt_rtx")
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("engine e: tensorrt-rtx 1.")
    assert "cannot load the engine: " in done.stdout
    assert "magicTag" in done.stdout or "incompatible" in done.stdout
