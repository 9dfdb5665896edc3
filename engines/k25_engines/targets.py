"""The GPUs that engines are built for, by name (`sm120`) and compute capability (`12.0`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from k25_engines.manifest import Flavour
from k25_plugins.errors import BackendMissingError, InputError, mismatch

TENSORRT_RTX: Flavour = "tensorrt-rtx"
TENSORRT: Flavour = "tensorrt"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A compute capability; `flavours` are those of TensorRT that can build for it, `gpus` some that have it."""

    major: int
    minor: int
    flavours: tuple[Flavour, ...]
    gpus: str

    @property
    def name(self) -> str:
        """As on the command line and in the bundle: `sm120`."""
        return f"sm{self.major}{self.minor}"

    @property
    def compute_capability(self) -> str:
        """As NVIDIA writes it: `12.0`."""
        return f"{self.major}.{self.minor}"


def _target(major: int, minor: int, flavours: tuple[Flavour, ...], gpus: str) -> Target:
    return Target(major=major, minor=minor, flavours=flavours, gpus=gpus)


_BOTH = (TENSORRT_RTX, TENSORRT)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _target(8, 0, _BOTH, "A100, A30"),
        _target(8, 6, _BOTH, "RTX A6000, A40, GeForce RTX 30"),
        _target(8, 9, _BOTH, "RTX 6000 Ada, L40S, L4, GeForce RTX 40"),
        _target(9, 0, (TENSORRT,), "H100, H200, GH200"),
        _target(10, 0, (TENSORRT,), "B200, GB200"),
        _target(10, 3, (TENSORRT,), "B300, GB300"),
        _target(11, 0, (TENSORRT,), "Jetson Thor"),
        _target(12, 0, _BOTH, "RTX PRO 6000 Blackwell, GeForce RTX 50"),
        _target(12, 1, _BOTH, "GB10 (DGX Spark)"),
    )
}

_SPELLING = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.IGNORECASE | re.ASCII)


def target_from_text(text: str) -> Target:
    """A target from `sm120`, `SM_120`, `12.0` or `120`. Raises `InputError` where there is none of that name."""
    match = _SPELLING.fullmatch(text.strip())
    name = f"sm{int(match[1])}{match[2]}" if match else ""
    if name == "sm75":
        raise InputError(
            "target sm75: GPUs of compute capability 7.5 have no bfloat16; the components need 8.0 or later."
        )
    if name not in TARGETS:
        raise mismatch("target", expected=f"one of {', '.join(TARGETS)}", found=repr(text))
    return TARGETS[name]


def require_flavour(target: Target, flavour: Flavour, *, device: str | None) -> None:
    """Raise `BackendMissingError` where this TensorRT cannot build for the target.

    `device` is the compute capability of the GPU of this machine: enterprise TensorRT builds for that one only.
    """
    where = f"target {target.name} ({target.compute_capability}: {target.gpus})"
    if flavour not in target.flavours:
        raise BackendMissingError(
            f"{where}: TensorRT-RTX has no such target; it takes enterprise TensorRT 11.x on a machine with that GPU: "
            "pip install tensorrt, then compile there with --flavour tensorrt."
        )
    if flavour == TENSORRT and device != target.compute_capability:
        found = "no GPU" if device is None else f"a GPU of compute capability {device}"
        raise BackendMissingError(
            f"{where}: enterprise TensorRT builds for the GPU it runs on, and this machine has {found}."
        )
