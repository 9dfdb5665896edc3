"""Opening a bundle's engines on the GPU of this machine: which GPU they need, and what is missing here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from k25_engines.manifest import EngineEntry, EngineManifest, read_engine_manifest
from k25_engines.targets import TARGETS
from k25_engines.tensorrt_module import device_compute_capability, load_tensorrt
from k25_plugins.errors import BackendMissingError, mismatch
from k25_runtime.engine_backend import EngineBackend

if TYPE_CHECKING:
    from k25_runtime.device import Device

_INSTALL_CUDA = "pip install 'k25-export[gpu]'"


def engine_backend_from_bundle(bundle: Path, *, device: Device | None = None, **options: int) -> EngineBackend:
    """The engines of a bundle that run on this machine's GPU (or on `device`), none of them loaded yet.

    `options` are those of `EngineBackend`.

    Raises `BackendMissingError` where there are none, or where a GPU, driver or package is missing: it says which GPU
    the engines need. Raises `InputError` where they were built by another version of TensorRT.
    """
    engines = read_engine_manifest(bundle)
    if not engines.engines:
        raise BackendMissingError(
            f"bundle {bundle}: no TensorRT engines in it. `k25-export compile {bundle} --target sm120` builds them, "
            "without a GPU."
        )
    if device is not None:
        return _backend(bundle, engines, device, options)
    needed = _needed_gpus(bundle, engines)
    found = device_compute_capability()
    if found is None:
        raise BackendMissingError(f"{needed}; this machine has no NVIDIA GPU, or no driver for it.")
    target = _target(engines, found, needed=needed, what=f"a GPU of compute capability {found}")
    entries = [entry for entry in engines.engines if entry.target == target]
    tensorrt = load_tensorrt(entries[0].flavour)
    check_version(entries, flavour=tensorrt.flavour, version=tensorrt.version)
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise BackendMissingError(f"{needed}, and cuda-python, which is not installed: {_INSTALL_CUDA}")
    from k25_runtime.cuda_device import CudaDevice
    from k25_runtime.tensorrt_engine import EngineLoader

    return _backend(bundle, engines, CudaDevice(EngineLoader(tensorrt)), options)


def check_version(entries: Iterable[EngineEntry], *, flavour: str, version: str) -> None:
    """An engine loads in the TensorRT that built it only; `InputError` names both."""
    for entry in entries:
        if (entry.flavour, entry.version) != (flavour, version):
            raise mismatch(
                f"engine {entry.name}",
                expected=f"{flavour} {version}, which is installed here",
                found=f"one built by {entry.flavour} {entry.version}",
                hint=f"Compile again, or install that version: pip install '{entry.flavour}=={entry.version}'",
            )


def _backend(bundle: Path, engines: EngineManifest, device: Device, options: Mapping[str, int]) -> EngineBackend:
    try:
        needed = _needed_gpus(bundle, engines)
        target = _target(engines, device.compute_capability, needed=needed, what=device.name)
    except BaseException:
        device.close()
        raise
    return EngineBackend(device, bundle=bundle, engines=engines, target=target, **options)


def _target(engines: EngineManifest, capability: str, *, needed: str, what: str) -> str:
    targets = engines.targets(capability)
    if not targets:
        name = "sm" + capability.replace(".", "")
        hint = (
            f"`k25-export compile BUNDLE --target {name}` builds for it."
            if name in TARGETS
            else "No engine runs on it."
        )
        raise BackendMissingError(f"{needed}; found {what}. {hint}")
    return targets[0]


def _needed_gpus(bundle: Path, engines: EngineManifest) -> str:
    gpus = []
    for target in engines.targets():
        examples = f", such as {TARGETS[target].gpus}" if target in TARGETS else ""
        capabilities = {c for entry in engines.engines if entry.target == target for c in entry.compute_capabilities}
        gpus.append(f"{' or '.join(sorted(capabilities))} ({target}{examples})")
    return f"bundle {bundle}: its engines need a GPU of compute capability {' or '.join(gpus)}"
