"""Targets by name; which cannot be built, and why."""

from __future__ import annotations

import pytest

from k25_engines import compilation, targets
from k25_engines.targets import TARGETS, TENSORRT, TENSORRT_RTX, require_flavour, target_from_text
from k25_engines.tensorrt_module import InstalledTensorRT
from k25_plugins.errors import BackendMissingError, InputError

RTX = InstalledTensorRT(flavour=TENSORRT_RTX, version="1.7.1.116")
ENTERPRISE = InstalledTensorRT(flavour=TENSORRT, version="11.4.0.1")


@pytest.mark.parametrize("text", ["sm120", "SM120", "sm_120", "12.0", "120", " sm120 "])
def test_spellings(text: str) -> None:
    target = target_from_text(text)
    assert (target.name, target.compute_capability) == ("sm120", "12.0")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_found_by_both_its_names(name: str) -> None:
    target = TARGETS[name]
    assert target_from_text(target.name) is target
    assert target_from_text(target.compute_capability) is target


@pytest.mark.parametrize(
    "text", ["", "sm", "hopper", "sm12", "sm999", "8", "8.7", "-8.0", "sm\u0967\u0968\u0966", "sm120;rm"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"target: expected one of sm80, .*, found"):
        target_from_text(text)


@pytest.mark.parametrize("text", ["sm75", "7.5"])
def test_gpus_without_bfloat16_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"sm75.*bfloat16"):
        target_from_text(text)


@pytest.mark.parametrize("name", ["sm90", "sm100", "sm103", "sm110"])
def test_what_rtx_has_not_needs_enterprise_tensorrt(name: str) -> None:
    with pytest.raises(BackendMissingError, match=rf"target {name} .*enterprise TensorRT 11"):
        require_flavour(TARGETS[name], TENSORRT_RTX, device=None)


def test_enterprise_builds_for_the_gpu_of_the_machine() -> None:
    require_flavour(TARGETS["sm90"], TENSORRT, device="9.0")
    with pytest.raises(BackendMissingError, match=r"target sm90 .*this machine has no GPU"):
        require_flavour(TARGETS["sm90"], TENSORRT, device=None)
    with pytest.raises(BackendMissingError, match=r"target sm120 .*compute capability 9\.0"):
        require_flavour(TARGETS["sm120"], TENSORRT, device="9.0")


def test_targets_are_taken_once_and_for_the_tensorrt_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "installed_tensorrt", lambda flavour: RTX)
    chosen, installed = compilation.require_targets(["sm86", "12.0", "8.6"])
    assert ([target.name for target in chosen], installed) == (["sm86", "sm120"], RTX)
    with pytest.raises(InputError, match="at least one target"):
        compilation.require_targets([])
    with pytest.raises(BackendMissingError, match="target sm90"):
        compilation.require_targets(["sm86", "sm90"])
    monkeypatch.setattr(compilation, "installed_tensorrt", lambda flavour: ENTERPRISE)
    monkeypatch.setattr(compilation, "device_compute_capability", lambda: "9.0")
    assert compilation.require_targets(["sm90"])[1] == ENTERPRISE
    with pytest.raises(BackendMissingError, match="target sm80"):
        compilation.require_targets(["sm80"])


def test_a_target_that_can_never_be_built_is_said_before_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flavour: str | None) -> InstalledTensorRT:
        raise BackendMissingError("not installed")

    monkeypatch.setattr(compilation, "installed_tensorrt", missing)
    with pytest.raises(BackendMissingError, match="target sm90"):
        compilation.require_targets(["sm120", "sm90"])
    with pytest.raises(BackendMissingError, match="not installed"):
        compilation.require_targets(["sm120"])


def test_the_bits_of_a_header_name_targets() -> None:
    from k25_engines.engine_header import TARGET_BITS

    assert set(TARGET_BITS) - {"sm75"} == {name for name in TARGETS if TENSORRT_RTX in targets.TARGETS[name].flavours}
