"""`torch.ops.k25`: registered as torch expects, checked before they run, traceable without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from k25_plugins import torch_ops
from k25_plugins.errors import BackendMissingError, InputError, K25Error, VerificationError, mismatch

assert torch_ops.REFERENCES  # importing it registers the ops

Call = tuple[Callable[..., Any], list[Any]]


def mla_call(*, t: torch.dtype = torch.float32, tc: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """Two sequences of 3 and 4 tokens; heads 5, nope 12, rope 6, v 28, rank 20; blocks of 3."""
    torch.manual_seed(0)
    arguments = [
        torch.randn(7, 5 * 18).to(t),
        torch.randn(7, 26).to(t),
        torch.zeros(9, 3, 26, dtype=tc),
        torch.randn(5 * 40, 20).bfloat16(),
        torch.tensor([0, 1, 2, 0, 1, 2, 3], dtype=torch.int32),
        torch.tensor([0, 3, 7], dtype=torch.int32),
        torch.tensor([[4, 0, 0], [8, 2, 0]], dtype=torch.int32),
    ]
    tensors = [tensor.to(device) for tensor in arguments]
    return torch.ops.k25.mla.default, [*tensors, 5, 12, 28, 0.25, [1.0, 0.1, 0.01]]


def moe_call(*, t: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """Three tokens, two of four experts each; hidden 64, width 32. One expert is 3 x (64 * 32) weights."""
    torch.manual_seed(0)
    word_rows, scale_rows = 64 * 32 // 16, 64 * 32 // 128
    rows = 3 * (word_rows + scale_rows)
    region = torch.full((4 * rows, 4), 0.01).bfloat16()
    starts = [0, word_rows, *(word_rows + scale_rows + start for start in (0, word_rows))]
    starts += [2 * (word_rows + scale_rows), 2 * (word_rows + scale_rows) + word_rows]
    arguments = [
        torch.randn(3, 64).to(t),
        torch.tensor([[0, 1], [3, 0], [2, 1]], dtype=torch.int32),
        torch.rand(3, 2),
        region.view(torch.int32),
        region,
        torch.tensor([[expert * rows + start for start in starts] for expert in range(4)]),
    ]
    tensors = [tensor.to(device) for tensor in arguments]
    return torch.ops.k25.moe_dispatch.default, [*tensors, 32, 32]


def linear_call(*, t: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 24).to(t), torch.randn(5, 24).bfloat16()]
    return torch.ops.k25.linear.default, [tensor.to(device) for tensor in tensors]


def vision_attention_call(*, t: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    torch.manual_seed(0)
    tensors = [torch.randn(7, 3 * 4).to(t) for _ in "qkv"]
    return torch.ops.k25.vision_attention.default, [*(tensor.to(device) for tensor in tensors), 3, 0.5]


def rms_norm_call(*, t: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 24).to(t), torch.randn(24).bfloat16()]
    return torch.ops.k25.rms_norm.default, [*(tensor.to(device) for tensor in tensors), 1e-5]


def router_call(*, t: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """Three of ten experts. Logits are float32 whatever the activations are."""
    torch.manual_seed(0)
    tensors = [torch.randn(7, 10), torch.randn(10)]
    return torch.ops.k25.router.default, [*(tensor.to(device) for tensor in tensors), 3, 1, 2.5]


CALLS: dict[str, Callable[..., Call]] = {
    "mla": mla_call,
    "moe_dispatch": moe_call,
    "linear": linear_call,
    "vision_attention": vision_attention_call,
    "rms_norm": rms_norm_call,
    "router": router_call,
}
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("mla", torch.float32),
        ("moe_dispatch", torch.bfloat16),
        ("linear", torch.float32),
        ("vision_attention", torch.bfloat16),
        ("rms_norm", torch.float32),
        ("rms_norm", torch.bfloat16),
        ("router", torch.float32),
    ],
)
def test_opcheck(name: str, t: torch.dtype) -> None:
    op, arguments = CALLS[name](t=t)
    results = torch.library.opcheck(op, tuple(arguments))
    assert results
    assert set(results.values()) == {"SUCCESS"}


@each_call
@pytest.mark.parametrize("t", [torch.float32, torch.bfloat16])
def test_outputs_on_meta_look_like_real_ones(name: str, t: torch.dtype) -> None:
    op, arguments = CALLS[name](t=t)
    real = op(*arguments)
    meta = op(*CALLS[name](t=t, device="meta")[1])
    for one, other in zip(*((value if isinstance(value, tuple) else (value,)) for value in (real, meta)), strict=True):
        assert other.device.type == "meta"
        assert (other.shape, other.dtype, other.stride()) == (one.shape, one.dtype, one.stride())


def test_cache_keeps_its_own_dtype() -> None:
    op, arguments = mla_call(t=torch.float32, tc=torch.bfloat16)
    out, cache_out = op(*arguments)
    assert (out.dtype, cache_out.dtype) == (torch.float32, torch.bfloat16)
    assert cache_out.data_ptr() != arguments[2].data_ptr()


@each_call
def test_every_wrong_rank_is_refused_with_the_name_of_the_input(name: str) -> None:
    op, arguments = CALLS[name]()
    schema = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
    for index, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and schema[index] != "x":
            wrong = [*arguments]
            wrong[index] = value.unsqueeze(0)
            with pytest.raises(InputError, match=rf"k25\.\w+: input {schema[index]}: expected .* found"):
                op(*wrong)


@each_call
def test_every_wrong_dtype_is_refused_with_the_name_of_the_input(name: str) -> None:
    op, arguments = CALLS[name]()
    schema = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
    for index, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            wrong = [*arguments]
            wrong[index] = value.to(torch.float64)
            with pytest.raises(InputError, match=rf"k25\.\w+: input {schema[index]}: expected .* found float64"):
                op(*wrong)


@each_call
def test_empty_axes_are_refused(name: str) -> None:
    op, arguments = CALLS[name]()
    with pytest.raises(InputError, match=r"input \w+: expected no empty axis, found \[0, "):
        op(arguments[0][:0], *arguments[1:])


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("mla", 0, r"k25\.MLA: input q, axis .*: expected 90, found 89"),
        ("mla", 3, r"k25\.MLA: input kv_b, axis .*: expected 20, found 19"),
        ("mla", 5, r"k25\.MLA: input query_start, axis .*: expected 3, found 2"),
        ("moe_dispatch", 3, r"k25\.MoEDispatch: input words, axis .*: expected 2, found 1"),
        ("moe_dispatch", 5, r"k25\.MoEDispatch: input table, axis .*: expected 6, found 5"),
        ("linear", 1, r"k25\.Linear: input weight, axis .*: expected 24, found 23"),
        ("vision_attention", 2, r"k25\.VisionAttention: input v, axis .*: expected 12, found 11"),
        ("rms_norm", 1, r"k25\.RMSNorm: input weight, axis size: expected 24, found 23"),
        ("router", 1, r"k25\.Router: input bias, axis experts: expected 10, found 9"),
    ],
)
def test_wrong_sizes_are_refused_with_expected_and_found(name: str, index: int, message: str) -> None:
    op, arguments = CALLS[name]()
    arguments[index] = arguments[index][..., :-1]
    with pytest.raises(InputError, match=message):
        op(*arguments)


@each_call
def test_wrong_sizes_are_refused_while_tracing(name: str) -> None:
    # Under a fake mode torch turns the check into its own error; it must still name the operator and the sizes.
    op, arguments = CALLS[name]()
    index = {"mla": 3, "moe_dispatch": 5, "linear": 1, "vision_attention": 2, "rms_norm": 1, "router": 1}[name]
    arguments[index] = arguments[index][..., :-1]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        with pytest.raises((InputError, RuntimeError), match=r"k25\.\w+: input \w+, axis .*: expected \d+, found \d+"):
            op(*fakes)


def test_exported_program_keeps_tokens_dynamic() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(5, 24, dtype=torch.bfloat16), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.k25.linear(x, self.weight)  # type: ignore[no-any-return]

    with torch.device("meta"):
        module, x = Module(), torch.empty(6, 24)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=1)}})
    calls = [node for node in program.graph.nodes if node.target is torch.ops.k25.linear.default]
    assert len(calls) == 1
    tokens, features = calls[0].meta["val"].shape
    assert not isinstance(tokens, int)
    assert features == 5


def test_each_error_is_one_exit_code() -> None:
    codes = {error: error.exit_code for error in (K25Error, VerificationError, InputError, BackendMissingError)}
    assert codes == {K25Error: 5, VerificationError: 1, InputError: 3, BackendMissingError: 4}
    assert all(issubclass(error, K25Error) for error in codes)


def test_mismatch_is_one_sentence_and_a_hint() -> None:
    error = mismatch("thing", expected=1, found=[2], hint="Do this.")
    assert isinstance(error, InputError)
    assert str(error) == "thing: expected 1, found [2]. Do this."
    assert str(mismatch("thing", expected="a", found="b")) == "thing: expected a, found b"
