"""The GPU kernels that a build makes: the sizes of models times the tuned configurations of `gpu_configs.json`.

Standard library only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from k25_plugins.errors import mismatch
from k25_plugins.gpu_signatures import KERNELS, kernel_signature
from k25_plugins.int4 import GROUP_SIZE

CONFIGS = Path(__file__).resolve().parent / "gpu_configs.json"
#: Dtypes by their ONNX name, as Triton spells them.
TRITON_DTYPES = MappingProxyType({"bfloat16": "bf16", "float32": "fp32"})
#: The smallest sum of a tensor core product, and the smallest tile that is worth one.
_SMALLEST_DOT = 16


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes of a model that kernels are compiled for; the defaults are Kimi K2.5's."""

    num_heads: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    latent_dim: int = 512
    rope_dim: int = 64
    block_size: int = 64
    hidden: int = 7168
    intermediate_size: int = 2048
    experts: int = 384
    experts_per_token: int = 8
    activation_dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A compute capability, the dynamic shared memory of one block there, and its matrix instruction."""

    capability: int
    shared: int
    mma: str


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """One kernel to compile. `constants` are in the order of its signature; `max_tokens` None: any number."""

    name: str
    kernel: str
    target: Target
    constants: Mapping[str, int] = field(hash=False)
    activation_dtype: str
    cache_dtype: str
    warps: int
    stages: int
    max_tokens: int | None
    divisible: tuple[str, ...]
    stack: int
    mma: str | None

    def plain(self) -> Specialisation:
        """The same with containers that can be sent to another process."""
        return replace(self, constants=dict(self.constants))

    def parameters(self) -> list[tuple[str, str]]:
        """(name, type) of every parameter as a launch passes it: floats one by one, dtypes in Triton's words."""
        dtypes = {"*T": self.activation_dtype, "*TC": self.cache_dtype}
        found: list[tuple[str, str]] = []
        for name, kind in kernel_signature(self.kernel).parameters:
            if kind == "fp32[]":
                found += [(f"{name}_{index}", "fp32") for index in range(self.constants["D"] // 2)]
            else:
                found.append((name, f"*{TRITON_DTYPES[dtypes[kind]]}" if kind in dtypes else kind))
        return found


def dims_from_config(path: Path, **changes: Any) -> ModelDims:
    """The sizes of a Hugging Face `config.json` (of Kimi K2.5 or of its text part). Raises `InputError`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        return ModelDims(
            num_heads=text["num_attention_heads"],
            qk_nope_head_dim=text["qk_nope_head_dim"],
            v_head_dim=text["v_head_dim"],
            latent_dim=text["kv_lora_rank"],
            rope_dim=text["qk_rope_head_dim"],
            hidden=text["hidden_size"],
            intermediate_size=text["moe_intermediate_size"],
            experts=text["n_routed_experts"],
            experts_per_token=text["num_experts_per_tok"],
            **changes,
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise mismatch(str(path), expected="the config.json of a Kimi K2.5 model", found=repr(error)) from error


@functools.cache
def _configs() -> Mapping[str, Any]:
    configs: dict[str, Any] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    known = {"kernel", "targets", "tile", "warps", "stages", "max_tokens", "divisible", "stack", "mma"}
    for entry in configs["kernels"]:
        unknown = set(entry) - known
        if unknown or entry["kernel"] not in KERNELS:
            raise mismatch(
                f"{CONFIGS.name}: {entry['kernel']}", expected=f"keys {sorted(known)}", found=sorted(unknown)
            )
    return configs


def targets_from_text(text: str) -> tuple[Target, ...]:
    """ "80,90" or "all" as targets. Raises `InputError`."""
    known = _configs()["targets"]
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise mismatch("--targets", expected=f"all, or some of {', '.join(known)}", found=name)
    return tuple(Target(capability=int(name), **known[name]) for name in names)


def specialisations(
    dims: Iterable[ModelDims], targets: Iterable[Target], *, only: Sequence[str] = ()
) -> list[Specialisation]:
    """Every kernel of these models for these targets, each once, in the order in which a launch tries them.

    `only` takes kernels whose name (`mla.split`) is given.
    """
    found: dict[tuple[object, ...], Specialisation] = {}
    every = tuple(dims)
    for target in targets:
        for entry in _configs()["kernels"]:
            if target.capability not in entry["targets"] or (only and entry["kernel"] not in only):
                continue
            for model in every:
                made = _specialisation(model, target, entry)
                found.setdefault((made.name, made.target.capability), made)
    return list(found.values())


def _specialisation(dims: ModelDims, target: Target, entry: Mapping[str, Any]) -> Specialisation:
    signature = kernel_signature(entry["kernel"])
    tile = entry["tile"]
    values = {**_constants(entry["kernel"], dims), "TAIL": tile.get("BM"), **tile, "UP": 0}
    constants = {name: int(values[name]) for name in signature.constants}
    _require_shapes(entry["kernel"], dims)
    takes_cache = any(kind == "*TC" for _, kind in signature.parameters)
    dtypes = [dims.activation_dtype, *([dims.cache_dtype] if takes_cache else [])]
    mma = target.mma if entry.get("mma") == "tensor" else entry.get("mma")
    parts = [f"{name}{value}" for name, value in constants.items() if name != "UP"]
    parts += [*(TRITON_DTYPES[dtype] for dtype in dtypes), f"w{entry['warps']}", f"s{entry['stages']}"]
    parts += [f"{name}16" for name in entry.get("divisible", ())]
    return Specialisation(
        name="_".join([entry["kernel"].replace(".", "_"), *parts]),
        kernel=entry["kernel"],
        target=target,
        constants=MappingProxyType(constants),
        activation_dtype=dims.activation_dtype,
        cache_dtype=dims.cache_dtype if takes_cache else dims.activation_dtype,
        warps=entry["warps"],
        stages=entry["stages"],
        max_tokens=entry.get("max_tokens"),
        divisible=tuple(entry.get("divisible", ())),
        stack=entry.get("stack", 0),
        mma=None if dims.activation_dtype == "float32" else mma,
    )


def _power(value: int, smallest: int = 1) -> int:
    return max(smallest, 1 << (value - 1).bit_length())


def _constants(kernel: str, dims: ModelDims) -> dict[str, int]:
    """Constants that follow from the model; padded widths are powers of two that a tensor core product takes."""
    rank = _power(dims.latent_dim, 2 * _SMALLEST_DOT)
    rope = _power(dims.rope_dim, _SMALLEST_DOT)
    nope = _power(dims.qk_nope_head_dim, _SMALLEST_DOT)
    return {
        "N": dims.num_heads,
        "NOPE": dims.qk_nope_head_dim,
        "V": dims.v_head_dim,
        "R": dims.latent_dim,
        "D": dims.rope_dim,
        "PAGE": dims.block_size,
        "LONG": _configs()["long"],
        "NB": _power(dims.num_heads),
        "RB": rank if kernel == "mla.rotate_append" else rank // 2,
        "FB": _power(dims.rope_dim // 2),
        "DB": nope if kernel == "mla.absorb" else rope,
        "NOPEB": nope,
        "VB": _power(dims.v_head_dim, _SMALLEST_DOT),
        "KV": dims.qk_nope_head_dim + dims.v_head_dim,
        "KVB": _power(dims.qk_nope_head_dim + dims.v_head_dim, _SMALLEST_DOT),
        "H": dims.hidden,
        "INTER": dims.intermediate_size,
        "K_EXPERTS": dims.experts_per_token,
        "P": _configs()["routed_pairs"],
        "E": _power(dims.experts, 32),
    }


def _require_shapes(kernel: str, dims: ModelDims) -> None:
    for name in ("hidden", "intermediate_size"):
        value = asdict(dims)[name]
        if kernel.startswith("moe_dispatch.") and value % GROUP_SIZE:
            raise mismatch(f"GPU kernels: {name}", expected=f"a multiple of {GROUP_SIZE}", found=value)
    if dims.rope_dim % 2:
        raise mismatch("GPU kernels: rope_dim", expected="an even number", found=dims.rope_dim)
    for dtype in (dims.activation_dtype, dims.cache_dtype):
        if dtype not in TRITON_DTYPES:
            raise mismatch("GPU kernels: dtype", expected=" or ".join(TRITON_DTYPES), found=dtype)


def describe(specs: Sequence[Specialisation]) -> Iterator[str]:
    """One line a kernel."""
    for spec in specs:
        yield f"sm_{spec.target.capability} {spec.name}"
