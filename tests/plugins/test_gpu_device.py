"""The compiled GPU kernels on a GPU against float64: fresh random data, outputs filled with NaN first.

Needs a GPU, PyTorch with CUDA and a native library with GPU kernels (K25_NATIVE names one that lies elsewhere).
The cases and their references are checked without a GPU in test_gpu_cases.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu_cases import Case, attention_case, expert_region, experts_case, linear_case

from k25_plugins.gpu_launch import device_tensor, gpu_kernel_count, launch, prepare, set_even_rows, workspace_bytes
from k25_plugins.gpu_specialisations import ModelDims
from k25_plugins.native_library import NativeLibrary, native_library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(gpu_kernel_count(native_library()) == 0, reason="the native library has no GPU kernels"),
]

DIMS = ModelDims()
#: Relative L2 of bfloat16 operands with float32 sums, as in the interpreter.
TOLERANCE = 8e-3


@pytest.fixture(scope="module")
def library() -> Iterator[NativeLibrary]:
    found = native_library()
    assert found is not None
    torch.zeros(1, device="cuda")
    prepare(found)
    set_even_rows(found, is_even=True)
    yield found
    set_even_rows(found, is_even=False)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module")
def region(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fewer experts than the model has: kernels take any number that the routing was built for."""
    torch.manual_seed(3)
    return expert_region(replace(DIMS, experts=48), device)


def run(library: NativeLibrary, case: Case) -> None:
    inputs, outputs = [device_tensor(t) for t in case.inputs], [device_tensor(t) for t in case.outputs]
    size = workspace_bytes(library, case.op, inputs, case.attributes)
    workspace = torch.full((size + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
    case.poison()
    launch(
        library, case.op, inputs, outputs, case.attributes,
        workspace=workspace.data_ptr(), stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    torch.cuda.synchronize()
    assert bool((workspace[size:] == 0xFF).all()), "something was written behind the workspace"
    assert case.error() < TOLERANCE


@pytest.mark.parametrize(
    ("sequences", "context", "new"), [(1, 1, 1), (3, 777, 1), (64, 1000, 1), (1, 300, 300), (2, 900, 130), (5, 65, 4)]
)
def test_attention(library: NativeLibrary, device: torch.device, sequences: int, context: int, new: int) -> None:
    torch.manual_seed(context)
    run(library, attention_case("", DIMS, device, sequences=sequences, context=context, new=new))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 64, 65, 500, 5000])
@pytest.mark.parametrize("is_even", [True, False])
def test_experts(
    library: NativeLibrary,
    device: torch.device,
    region: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tokens: int,
    is_even: bool,
) -> None:
    torch.manual_seed(tokens)
    set_even_rows(library, is_even=is_even)
    run(library, experts_case("", replace(DIMS, experts=48), device, region, tokens=tokens))


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 7168, 2112), (33, 7168, 576), (7, 1000, 100), (500, 2048, 7168)]
)
def test_linear(library: NativeLibrary, device: torch.device, tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(tokens)
    run(library, linear_case("", device, tokens=tokens, inputs=inputs, outputs=outputs, dtype="bfloat16"))


def test_a_captured_graph_follows_its_inputs(library: NativeLibrary, device: torch.device) -> None:
    """Routing and lengths are read on the device: new values in the same buffers, the same graph."""
    torch.manual_seed(5)
    dims = replace(DIMS, experts=48)
    region = expert_region(dims, device)
    case = experts_case("", dims, device, region, tokens=16)
    other = experts_case("", dims, device, region, tokens=16)
    inputs, outputs = [device_tensor(t) for t in case.inputs], [device_tensor(t) for t in case.outputs]
    workspace = torch.empty(
        workspace_bytes(library, case.op, inputs, case.attributes), dtype=torch.uint8, device=device
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        launch(library, case.op, inputs, outputs, case.attributes, workspace=workspace.data_ptr(), stream=stream)
    for now in (case, other):
        for to, source in zip(case.inputs[:3], now.inputs[:3], strict=True):
            to.copy_(source)
        case.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert case.error() < TOLERANCE
