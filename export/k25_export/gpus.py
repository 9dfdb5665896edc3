"""Memory and bandwidth of GPUs from their data sheets, and the parser for a user's own: bytes, and bytes a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from k25_export.byte_sizes import bytes_from_text
from k25_plugins.errors import InputError, mismatch

CPU = "cpu"
CUSTOM = "custom"

_GB = 1000**3
_MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a plan needs of a GPU (or of the memory of a CPU): bytes, and bytes a second.

    `memory_bytes` is the data sheet's figure read as GB, `reported_bytes` what the driver shows as total memory
    (`nvidia-smi`), None where it is not known. The first is the smaller, so a plan with it errs on the safe side.
    """

    name: str
    memory_bytes: int
    bandwidth: int
    reported_bytes: int | None = None
    source: str = "given"

    @property
    def is_cpu(self) -> bool:
        """Whether this is the memory of a CPU."""
        return self.name == CPU


#: Data sheets give capacity in "GB" and mean a little less than that many GiB; `reported_bytes` are totals that
#: nvidia-smi shows in public logs. Bandwidth is the data sheet's peak; copies reach 85 to 92 % of it.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            # SXM5: 80 GB HBM3, 3.35 TB/s.
            Gpu(
                name="h100",
                memory_bytes=80 * _GB,
                bandwidth=3350 * _GB,
                reported_bytes=81_559 * _MIB,
                source="NVIDIA H100 Tensor Core GPU data sheet (SXM)",
            ),
            # SXM5 and NVL: 141 GB HBM3e, 4.8 TB/s.
            Gpu(
                name="h200",
                memory_bytes=141 * _GB,
                bandwidth=4800 * _GB,
                reported_bytes=143_771 * _MIB,
                source="NVIDIA H200 Tensor Core GPU data sheet",
            ),
            # 192 GB HBM3e are fitted, 180 GB are usable: 1,440 GB and 64 TB/s for eight. (The HGX page says
            # 7.7 TB/s a GPU; the larger figure keeps tokens/s an upper bound.)
            Gpu(
                name="b200",
                memory_bytes=180 * _GB,
                bandwidth=8000 * _GB,
                reported_bytes=183_359 * _MIB,
                source="NVIDIA DGX B200 data sheet (192 GB fitted, 180 GB usable)",
            ),
            # Workstation and Max-Q Edition: 96 GB GDDR7, 1792 GB/s. The Server Edition's memory is slower: say
            # --gpu-bandwidth for it.
            Gpu(
                name="rtx-pro-6000",
                memory_bytes=96 * _GB,
                bandwidth=1792 * _GB,
                reported_bytes=97_887 * _MIB,
                source="NVIDIA RTX PRO 6000 Blackwell Workstation Edition data sheet",
            ),
        )
    }
)


def gpu_from_name(name: str, *, memory_bytes: int | None = None, bandwidth: int | None = None) -> Gpu:
    """A GPU of the table, with its memory or bandwidth replaced where given; `custom` and `cpu` need both.

    Raises `InputError` for a name that is not in the table and where a figure is missing.
    """
    if name in (CPU, CUSTOM):
        if memory_bytes is None or bandwidth is None:
            raise InputError(
                f"gpu {name}: expected its memory and its bandwidth, found {_given(memory_bytes, bandwidth)}. "
                "Give both: --gpu-memory 48GiB --gpu-bandwidth 900GB/s."
            )
        return Gpu(name=name, memory_bytes=memory_bytes, bandwidth=bandwidth)
    if name not in GPUS:
        raise mismatch("gpu", expected=f"{', '.join(GPUS)}, {CUSTOM} or {CPU}", found=repr(name))
    gpu = GPUS[name]
    if memory_bytes is not None:
        gpu = replace(gpu, memory_bytes=memory_bytes, reported_bytes=None)
    if bandwidth is not None:
        gpu = replace(gpu, bandwidth=bandwidth)
    return gpu


def _given(memory_bytes: int | None, bandwidth: int | None) -> str:
    if memory_bytes is None:
        return "neither" if bandwidth is None else "only a bandwidth"
    return "only a memory size"


def bandwidth_from_text(text: str) -> int:
    """Bytes a second from `900GB/s` or `4.8TB/s`. Raises `InputError`."""
    size, slash, second = text.strip().partition("/")
    if slash and second.strip() == "s":
        try:
            return bytes_from_text(size)
        except InputError:
            pass
    raise mismatch("bandwidth", expected="bytes a second, as 900GB/s or 4.8TB/s", found=repr(text))
