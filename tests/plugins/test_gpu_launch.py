"""The C++ side of the GPU kernels: what it launches, replayed in Triton's interpreter, against the eager references."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

import gpu_replay
from gpu_replay import FakeGpu, Launch, aligned, run
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_plugins.errors import BackendMissingError, InputError, K25Error
from k25_plugins.gpu_launch import (
    DeviceTensor,
    device_tensor,
    gpu_kernel_count,
    launch,
    prepare,
    set_even_rows,
    workspace_bytes,
)
from k25_plugins.gpu_specialisations import ModelDims, specialisations, targets_from_text
from k25_plugins.mla.reference import mla
from k25_plugins.moe_dispatch.reference import moe_dispatch

DIMS = ModelDims(
    num_heads=5,
    qk_nope_head_dim=12,
    v_head_dim=28,
    latent_dim=20,
    rope_dim=6,
    block_size=8,
    hidden=96,
    intermediate_size=64,
    experts=10,
    experts_per_token=3,
    activation_dtype="float32",
    cache_dtype="float32",
)
BFLOAT16 = replace(DIMS, activation_dtype="bfloat16", cache_dtype="bfloat16")
INV_FREQ = (1.0, 0.31, 0.017)
#: Relative L2 against the float32 reference, as for the kernels alone.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
ATTENTION = {
    "num_heads": DIMS.num_heads,
    "qk_nope_head_dim": DIMS.qk_nope_head_dim,
    "v_head_dim": DIMS.v_head_dim,
    "softmax_scale": 0.2,
    "inv_freq": list(INV_FREQ),
}
EXPERTS = {"intermediate_size": DIMS.intermediate_size, "group_size": 32}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGpu]:
    """A library for all targets; large tiles of attention take much shared memory."""
    folder = tmp_path_factory.mktemp("gpu")
    specs = specialisations([DIMS, BFLOAT16], targets_from_text("all"))
    shared = {spec.name: 150_000 for spec in specs if spec.constants.get("BH") == 64}
    driver = gpu_replay.driver_library(folder / "kernels")
    (folder / "kernels").mkdir()
    gpu_replay.compile_driver(driver)
    before = os.environ.get("K25_CUDA_LIBRARY")
    os.environ["K25_CUDA_LIBRARY"] = str(driver)
    try:
        yield FakeGpu(folder / "kernels", specs, shared)
    finally:
        os.environ.pop("K25_CUDA_LIBRARY")
        if before is not None:
            os.environ["K25_CUDA_LIBRARY"] = before


@pytest.fixture(autouse=True)
def usual_device(gpu: FakeGpu) -> Iterator[None]:
    yield
    gpu.device(90, 232448)
    gpu.driver.fake_capturing(0)
    gpu.driver.fake_context(1)
    gpu.driver.fake_failure(b"", 0)
    set_even_rows(gpu.library, is_even=False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - expected).norm() / expected.norm())


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return aligned(torch.full(shape, float("nan")).to(dtype))


# Attention.

Chunk = tuple[int, int]


def attention_inputs(chunks: list[Chunk], dtype: torch.dtype) -> list[torch.Tensor]:
    """`chunks`: for each sequence the rows before this call and the tokens that it brings. Unseen rows are NaN."""
    torch.manual_seed(len(chunks))
    page, width = DIMS.block_size, DIMS.latent_dim + DIMS.rope_dim
    needed = [-(-(before + count) // page) for before, count in chunks]
    tokens = sum(count for _, count in chunks)
    table = torch.zeros(len(chunks), max(1, *needed) + 1, dtype=torch.int32)
    cache = torch.full((sum(needed) + 1, page, width), float("nan"))
    free = iter((torch.randperm(sum(needed)) + 1).tolist())
    for s, (before, _) in enumerate(chunks):
        table[s, : needed[s]] = torch.tensor([next(free) for _ in range(needed[s])], dtype=torch.int32)
        for p in range(before):
            cache[table[s, p // page], p % page] = torch.randn(width)
    heads, kv = DIMS.num_heads, DIMS.qk_nope_head_dim + DIMS.v_head_dim
    q = torch.randn(tokens, heads * (DIMS.qk_nope_head_dim + DIMS.rope_dim)).to(dtype)
    kv_b = (torch.randn(heads * kv, DIMS.latent_dim) / DIMS.latent_dim**0.5).to(torch.bfloat16)
    positions = torch.cat([torch.arange(before, before + count) for before, count in chunks]).int()
    starts = torch.tensor([0, *(count for _, count in chunks)]).cumsum(0).int()
    values = [q, torch.randn(tokens, width).to(dtype), cache.to(dtype), kv_b, positions, starts, table]
    return [aligned(value) for value in values]


def attend(gpu: FakeGpu, inputs: list[torch.Tensor], *, in_place: bool = True) -> tuple[list[Launch], torch.Tensor]:
    out = unwritten(len(inputs[0]), DIMS.num_heads * DIMS.v_head_dim, dtype=inputs[0].dtype)
    cache = inputs[2] if in_place else unwritten(*inputs[2].shape, dtype=inputs[2].dtype)
    return run(gpu, "MLA", inputs, [out, cache], ATTENTION), out


def expected_attention(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    q, latent, cache, *rest = inputs
    values = [ATTENTION[name] for name in ("num_heads", "qk_nope_head_dim", "v_head_dim", "softmax_scale")]
    return mla(q.float(), latent.float(), cache.float(), *rest, *values, list(INV_FREQ))


def functions(launches: list[Launch]) -> list[str]:
    return [one.function for one in launches]


SHORT = ["rotate_append", "absorb", "split", "combine"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("chunks", "has_long"),
    [([(13, 1)], False), ([(7, 1), (0, 3), (40, 2)], False), ([(3, 35), (17, 1), (0, 2)], True)],
    ids=["one token", "ragged decode", "prefill over a prefix and decode"],
)
def test_attention(gpu: FakeGpu, chunks: list[Chunk], has_long: bool, dtype: torch.dtype) -> None:
    inputs = attention_inputs(chunks, dtype)
    expected, rows = expected_attention(inputs)
    launches, out = attend(gpu, inputs)
    assert functions(launches) == SHORT + ["expand", "prefill"] * has_long
    assert relative(out, expected) < TOLERANCES[dtype]
    error = (inputs[2].float() - rows).nan_to_num()
    assert torch.equal(inputs[2].isnan(), rows.isnan())
    assert float(error.abs().max()) < (1e-6 if dtype == torch.float32 else 0.04)


def test_a_cache_that_is_not_updated_in_place(gpu: FakeGpu) -> None:
    inputs = attention_inputs([(9, 2)], torch.float32)
    given = inputs[2].clone()
    expected, _ = expected_attention(inputs)
    _, out = attend(gpu, inputs, in_place=False)
    assert relative(out, expected) < TOLERANCES[torch.float32]
    assert torch.equal(inputs[2].nan_to_num(), given.nan_to_num())


def test_no_memory_for_expanded_heads(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K25_GPU_EXPAND_MIB", "0")
    inputs = attention_inputs([(0, 33)], torch.float32)
    expected, _ = expected_attention(inputs)
    launches, out = attend(gpu, inputs)
    assert functions(launches) == SHORT
    assert relative(out, expected) < TOLERANCES[torch.float32]


def shares_of(gpu: FakeGpu, tokens: int) -> int:
    """Shares of the contexts of as many sequences with a token each; nothing is run."""
    shapes = [tuple(tensor.shape) for tensor in attention_inputs([(9, 1)], torch.float32)]
    shapes[0], shapes[1] = (tokens, shapes[0][1]), (tokens, shapes[1][1])
    shapes[4:] = [(tokens,), (tokens + 1,), (tokens, 99)]
    dtypes = ["float32"] * 3 + ["bfloat16"] + ["int32"] * 3
    inputs = [DeviceTensor(address=64, dtype=dtype, shape=shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
    launch(gpu.library, "MLA", inputs, [inputs[0], inputs[2]], ATTENTION, workspace=64)
    return next(one.grid[1] for one in gpu.launches() if one.function == "split")


def test_few_tokens_use_many_shares_and_many_tokens_one(gpu: FakeGpu) -> None:
    gpu.device(90, 232448, processors=132)
    inputs = attention_inputs([(700, 1)], torch.float32)
    expected, _ = expected_attention(inputs)
    launches, out = attend(gpu, inputs)
    assert relative(out, expected) < TOLERANCES[torch.float32]
    split = launches[2]
    groups, shares, tokens = split.grid
    assert tokens == 1
    assert 1 < shares <= 132 // groups
    assert [shares_of(gpu, tokens=tokens) for tokens in (64, 66, 132, 300)] == [2, 2, 1, 1]


# Experts.


def region_of(absent: tuple[int, ...], *, is_odd: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales (the same bytes) and table of random experts."""
    torch.manual_seed(11)
    elements, row = DIMS.hidden * DIMS.intermediate_size, int(is_odd)
    pieces = [torch.zeros(8 * row, dtype=torch.uint8)]
    table = torch.full((DIMS.experts, 6), -1, dtype=torch.int64)
    for expert in (expert for expert in range(DIMS.experts) if expert not in absent):
        for column in range(0, 6, 2):
            words = torch.randint(-(2**31), 2**31, (elements // 8,)).to(torch.int32)
            scales = (torch.rand(elements // 32) * 0.02 + 0.01).to(torch.bfloat16)
            for which, values in enumerate((words, scales)):
                table[expert, column + which] = row
                pieces.append(values.view(torch.uint8))
                row += pieces[-1].numel() // 8
    data = aligned(torch.cat(pieces))
    return data.view(torch.int32).view(-1, 2), data.view(torch.bfloat16).view(-1, 4), aligned(table)


def experts(
    gpu: FakeGpu, tokens: int, dtype: torch.dtype, absent: tuple[int, ...] = (), *, is_odd: bool = False
) -> tuple[list[Launch], float]:
    """The launches of random tokens, and the error of what they made."""
    region = region_of(absent, is_odd=is_odd)
    torch.manual_seed(tokens)
    k = DIMS.experts_per_token
    x = aligned(torch.randn(tokens, DIMS.hidden).to(dtype))
    ids = aligned(torch.stack([torch.randperm(DIMS.experts)[:k] for _ in range(tokens)]).int())
    weights = aligned(torch.rand(tokens, k))
    y = unwritten(tokens, DIMS.hidden, dtype=dtype)
    expected = moe_dispatch(x.float(), ids, weights, *region, DIMS.intermediate_size, 32)
    launches = run(gpu, "MoEDispatch", [x, ids, weights, *region], [y], EXPERTS)
    return launches, relative(y, expected)


PAIRS = ["permute_x", "gate_up", "down", "combine"]
ROUTED_SMALL = ["permute_x", "route_small", "gate_up", "down", "combine"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "steps", "absent"), [(1, PAIRS, ()), (7, PAIRS, (2, 9)), (13, ROUTED_SMALL, ()), (9, ROUTED_SMALL, (0,))]
)
def test_experts(gpu: FakeGpu, tokens: int, steps: list[str], absent: tuple[int, ...], dtype: torch.dtype) -> None:
    set_even_rows(gpu.library, is_even=True)
    launches, error = experts(gpu, tokens, dtype, absent)
    assert functions(launches) == steps
    assert all(gpu.kernels[one.name]["constants"].get("ALIGNED", 1) == 1 for one in launches)  # type: ignore[attr-defined]
    assert error < TOLERANCES[dtype]


def test_many_tokens_are_routed_by_a_program_for_each_expert(gpu: FakeGpu) -> None:
    set_even_rows(gpu.library, is_even=True)
    launches, error = experts(gpu, 180, torch.float32, absent=(4,))
    assert functions(launches) == ["permute_x", "route_large", "gate_up", "down", "combine"]
    assert launches[1].grid == (DIMS.experts, 1, 1)
    constants: Any = gpu.kernels[launches[2].name]["constants"]
    assert constants["TAIL"] < constants["BM"], "the narrower tile is run too"
    assert error < TOLERANCES[torch.float32]


def test_many_tokens_go_in_passes(gpu: FakeGpu) -> None:
    """4096 tokens a pass: every address moves on by them, the workspace serves all."""
    shapes = {"x": (5000, DIMS.hidden), "ids": (5000, 3), "weights": (5000, 3), "words": (9, 2), "scales": (9, 4)}
    dtypes = {"x": "float32", "ids": "int32", "weights": "float32", "words": "int32", "scales": "bfloat16"}
    inputs = [DeviceTensor(address=1 << 20, dtype=dtypes[name], shape=shape) for name, shape in shapes.items()]
    inputs.append(DeviceTensor(address=1 << 20, dtype="int64", shape=(DIMS.experts, 6)))
    y = replace(inputs[0], address=1 << 22)
    launch(gpu.library, "MoEDispatch", inputs, [y], EXPERTS, workspace=1 << 30)
    launches = gpu.launches()
    steps = functions(launches)
    assert steps == 2 * ["permute_x", "route_large", "gate_up", "down", "combine"]
    assert [one.grid[0] for one in launches if one.function == "permute_x"] == [4096, 5000 - 4096]
    (permute, combine), (_, ids, weights, _, out, *_rest) = (launches[5], launches[9]), launches[9].values
    assert combine.values[1] == ids
    row = DIMS.hidden * 4
    assert permute.values[0] == (1 << 20) + 4096 * row
    assert (ids, weights, out) == ((1 << 20) + 4096 * 12, (1 << 20) + 4096 * 12, (1 << 22) + 4096 * row)
    assert launches[0].values[1] == permute.values[1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_workspace_serves_every_smaller_call(gpu: FakeGpu, data: st.DataObject) -> None:
    """TensorRT asks once, for the largest shapes."""
    sizes = [
        tuple(data.draw(st.integers(1, most)) for most in (9000, 300, 5000)),
        tuple(data.draw(st.integers(1, most)) for most in (9000, 300, 5000)),
    ]
    small, large = tuple(map(min, *sizes)), tuple(map(max, *sizes))

    def attention_bytes(tokens: int, sequences: int, blocks: int) -> int:
        shapes = [tuple(tensor.shape) for tensor in attention_inputs([(9, 1)], torch.float32)]
        shapes[0], shapes[1], shapes[4] = (tokens, shapes[0][1]), (tokens, shapes[1][1]), (tokens,)
        shapes[5:] = [(sequences + 1,), (sequences, blocks)]
        dtypes = ["float32"] * 3 + ["bfloat16"] + ["int32"] * 3
        inputs = [DeviceTensor(address=0, dtype=dtype, shape=one) for dtype, one in zip(dtypes, shapes, strict=True)]
        return workspace_bytes(gpu.library, "MLA", inputs, ATTENTION)

    assert attention_bytes(*small) <= attention_bytes(*large)


def test_rows_that_are_not_promised_to_be_even(gpu: FakeGpu) -> None:
    launches, error = experts(gpu, 3, torch.float32, is_odd=True)
    assert {gpu.kernels[one.name]["constants"].get("ALIGNED", 0) for one in launches} == {0}  # type: ignore[attr-defined]
    assert error < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("leading", "inputs", "outputs"), [((1,), 64, 48), ((2, 3), 40, 130), ((35,), 96, 24)])
def test_linear(gpu: FakeGpu, leading: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(inputs)
    x, weight = aligned(torch.randn(*leading, inputs).to(dtype)), aligned(torch.randn(outputs, inputs).bfloat16())
    y = unwritten(*leading, outputs, dtype=dtype)
    given = [device_tensor(x), device_tensor(weight)]
    gpu.launches()
    launch(gpu.library, "Linear", given, [device_tensor(y)], {}, stream=7)
    (one,) = gpu.launches()
    gpu.replay([one])
    assert bool(gpu.kernels[one.name]["divisible"]) == (inputs % 16 == 0)
    assert relative(y, x.float() @ weight.float().T) < TOLERANCES[dtype]


# A replay that finds what it is for.


def decode_launches(gpu: FakeGpu) -> tuple[list[Launch], list[torch.Tensor], torch.Tensor, Any]:
    inputs = attention_inputs([(9, 1), (4, 2)], torch.float32)
    out = unwritten(len(inputs[0]), DIMS.num_heads * DIMS.v_head_dim, dtype=torch.float32)
    given = [device_tensor(tensor) for tensor in inputs]

    workspace = gpu_replay.Workspace(workspace_bytes(gpu.library, "MLA", given, ATTENTION))
    gpu.launches()
    outputs = [device_tensor(out), given[2]]
    launch(gpu.library, "MLA", given, outputs, ATTENTION, workspace=workspace.address)
    return gpu.launches(), inputs, out, workspace


@pytest.mark.parametrize("fault", ["none", "grid", "swapped pointers", "swapped sizes"])
def test_a_wrong_launch_shows(gpu: FakeGpu, fault: str) -> None:
    launches, inputs, out, _workspace = decode_launches(gpu)
    expected, _ = expected_attention(inputs)
    absorb, split, combine = launches[1:4]
    if fault == "grid":
        launches[1] = replace(absorb, grid=(absorb.grid[0], absorb.grid[1] - 1, absorb.grid[2]))
    elif fault == "swapped pointers":
        part, lse, *others = combine.values
        launches[3] = replace(combine, values=(lse, part, *others))
    elif fault == "swapped sizes":
        values = list(split.values)
        values[7], values[8] = values[8], values[7]
        launches[2] = replace(split, values=tuple(values))
    gpu.replay(launches)
    is_right = bool(torch.isfinite(out).all()) and relative(out, expected) < TOLERANCES[torch.float32]
    assert is_right == (fault == "none")


# Choice and refusals.


@pytest.mark.parametrize(
    ("capability", "shared", "prefix", "heads"),
    [
        (80, 166912, "sm80:", 32),
        (86, 101376, "sm86:", 32),
        (87, 166912, "sm86:", 32),
        (89, 101376, "sm89:", 32),
        (90, 232448, "sm90:", 64),
        (100, 232448, "sm100:", 32),
        (103, 232448, "ptx80:", 32),
        (120, 101376, "sm120:", 32),
        (121, 101376, "ptx80:", 32),
    ],
)
def test_the_choice_follows_the_device(gpu: FakeGpu, capability: int, shared: int, prefix: str, heads: int) -> None:
    gpu.device(capability, shared)
    launches = decode_launches(gpu)[0]
    assert {one.name[: len(prefix)] for one in launches} == {prefix}
    assert gpu.kernels[launches[2].name]["constants"]["BH"] == heads  # type: ignore[index]


def test_a_device_without_room_for_a_kernel_and_an_unknown_one(gpu: FakeGpu) -> None:
    gpu.device(90, 101376)
    with pytest.raises(BackendMissingError, match=r"no GPU kernel mla.split for compute capability 9.0, 101376 bytes"):
        decode_launches(gpu)
    gpu.device(75, 65536)
    with pytest.raises(BackendMissingError, match="this build has none for this device"):
        decode_launches(gpu)


def test_a_tile_by_the_number_of_tokens(gpu: FakeGpu) -> None:
    set_even_rows(gpu.library, is_even=True)
    tiles = []
    for tokens in (1, 8, 9, 64, 65):
        x = DeviceTensor(address=64, dtype="float32", shape=(tokens, DIMS.hidden))
        pairs = (tokens, DIMS.experts_per_token)
        ids = DeviceTensor(address=64, dtype="int32", shape=pairs)
        weights = DeviceTensor(address=64, dtype="float32", shape=pairs)
        words = DeviceTensor(address=64, dtype="int32", shape=(9, 2))
        scales = DeviceTensor(address=64, dtype="bfloat16", shape=(9, 4))
        table = DeviceTensor(address=64, dtype="int64", shape=(DIMS.experts, 6))
        launch(gpu.library, "MoEDispatch", [x, ids, weights, words, scales, table], [x], EXPERTS, workspace=64)
        (gate_up,) = (one for one in gpu.launches() if one.function == "gate_up")
        constants: Any = gpu.kernels[gate_up.name]["constants"]
        tiles.append((constants["BM"], bool(constants["PAIRS"])))
    assert tiles == [(8, True), (8, True), (16, False), (16, False), (64, False)]


def attention_call(gpu: FakeGpu, **changes: Any) -> None:
    inputs = [device_tensor(tensor) for tensor in attention_inputs([(4, 1)], torch.float32)]
    out = replace(inputs[0], shape=(1, DIMS.num_heads * DIMS.v_head_dim))
    for index, change in changes.get("inputs", {}).items():
        inputs[index] = replace(inputs[index], **change)
    attributes = {**ATTENTION, **changes.get("attributes", {})}
    launch(gpu.library, "MLA", inputs, [out, inputs[2]], attributes, workspace=changes.get("workspace", 64))


def test_refusals_name_what_is_wrong(gpu: FakeGpu) -> None:
    with pytest.raises(InputError, match=r"k25.MLA: tensor kv_b: expected a device address .* found 0x48"):
        attention_call(gpu, inputs={3: {"address": 0x48}})
    with pytest.raises(InputError, match="tensor workspace: expected a device address"):
        attention_call(gpu, workspace=0)
    with pytest.raises(InputError, match="input positions, axis tokens: expected 1, found 2"):
        attention_call(gpu, inputs={4: {"shape": (2,)}})
    with pytest.raises(BackendMissingError, match=r"no GPU kernel mla.rotate_append .*PAGE8.*gpu_kernels --help"):
        attention_call(gpu, inputs={2: {"shape": (3, 16, DIMS.latent_dim + DIMS.rope_dim)}})
    gpu.driver.fake_context(0)
    with pytest.raises(K25Error, match="expected a current CUDA context"):
        attention_call(gpu)
    gpu.driver.fake_context(1)
    gpu.driver.fake_failure(b"cuLaunchKernel", 700)
    with pytest.raises(K25Error, match=r"mla_rotate_append_.*: CUDA error 700: an illegal memory access"):
        attention_call(gpu)
    gpu.driver.fake_failure(b"", 0)
    for op in ("VisionAttention", "RMSNorm", "Router"):
        with pytest.raises(BackendMissingError, match=rf"k25.{op}: .* MLA, MoEDispatch, Linear only"):
            launch(gpu.library, op, [], [], {})
    assert gpu.launches() == []


def test_kernels_are_loaded_before_a_stream_is_captured(gpu: FakeGpu) -> None:
    gpu.device(88, 101376)  # another context than those of other tests: nothing is loaded in it
    gpu.driver.fake_capturing(1)
    before = gpu.driver.fake_module_count()
    with pytest.raises(K25Error, match="call k25_gpu_prepare before a stream is captured"):
        attention_call(gpu)
    assert gpu.driver.fake_module_count() == before
    prepare(gpu.library)
    loaded = gpu.driver.fake_module_count()
    assert loaded > before
    attention_call(gpu)
    assert gpu.driver.fake_module_count() == loaded
    prepare(gpu.library)
    assert gpu.driver.fake_module_count() == loaded
    gpu.launches()


def test_a_library_without_kernels_says_how_to_get_them(tmp_path: Path) -> None:
    from k25_plugins.native_library import load_library

    (tmp_path / "shim.cc").write_text(gpu_replay.SHIM)
    sources = [str(gpu_replay.ROOT / name) for name in gpu_replay.SOURCES]
    command = [gpu_replay.compiler(), "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{gpu_replay.ROOT / 'core'}"]
    subprocess.run([*command, str(tmp_path / "shim.cc"), *sources, "-o", str(tmp_path / "lib.so")], check=True)
    library = load_library(tmp_path / "lib.so")
    assert gpu_kernel_count(library) == 0
    assert gpu_kernel_count(None) == 0
    for call in (lambda: prepare(library), lambda: workspace_bytes(library, "MLA", [], ATTENTION)):
        with pytest.raises(BackendMissingError, match=r"python -m k25_plugins\.gpu_kernels"):
            call()


def test_without_a_driver(gpu: FakeGpu) -> None:
    """In a process of its own: the driver is looked for once."""
    code = (
        "from pathlib import Path; from k25_plugins.gpu_launch import prepare; "
        "from k25_plugins.native_library import load_library; prepare(load_library(Path(__import__('sys').argv[1])))"
    )
    environment = {**os.environ, "K25_CUDA_LIBRARY": "/nowhere/libcuda.so"}
    command = [sys.executable, "-c", code, str(gpu.library.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "BackendMissingError: k25.gpu_prepare: there is no CUDA driver here (/nowhere/libcuda.so" in done.stderr
