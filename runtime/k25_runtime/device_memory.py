"""Tensors in device memory, and the pool that activations come from."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from heapq import heappop, heappush

from k25_plugins.signatures import ITEM_SIZES
from k25_runtime.device import ALIGNMENT, Device, Shape


def tensor_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * ITEM_SIZES[dtype]


class DeviceTensor:
    """A dense tensor at an address. Whoever owns the memory is kept alive as `owner`."""

    def __init__(self, address: int, shape: Shape, dtype: str, owner: object) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self.owner = owner

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.shape, self.dtype)


class DeviceBlock:
    """Device memory that is given back when nothing refers to the block any more."""

    def __init__(self, address: int, size: int, release: Callable[[int, int], None]) -> None:
        self.address = address
        self.size = size
        weakref.finalize(self, release, address, size)


class DeviceCache(DeviceTensor):
    """A latent cache. Where an engine cannot update it in place there are two, and they change places each step."""

    def __init__(self, shape: Shape, dtype: str, block: DeviceBlock, allocate: Callable[[int], DeviceBlock]) -> None:
        super().__init__(block.address, shape, dtype, block)
        self._allocate = allocate
        self._spare: DeviceBlock | None = None
        self.is_swapped = False

    def spare_address(self) -> int:
        """The address of the second cache, which is allocated when it is first asked for."""
        if self._spare is None:
            self._spare = self._allocate(self.nbytes)
        return self._spare.address

    def swap(self) -> None:
        """What was written last is read next."""
        assert self._spare is not None
        assert isinstance(self.owner, DeviceBlock)
        self._spare, self.owner = self.owner, self._spare
        self.address = self.owner.address
        self.is_swapped = not self.is_swapped


class MemoryPool:
    """Blocks for activations, kept by size, the lowest address first: the same requests get the same addresses.

    A block goes back when its tensor is dropped, although work that uses it may be pending: that is safe as long as
    all blocks are used on one stream only.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: dict[int, list[int]] = defaultdict(list)
        self._addresses: list[int] = []

    def tensor(self, shape: Shape, dtype: str) -> DeviceTensor:
        """A tensor with undefined content."""
        block = self.block(tensor_bytes(shape, dtype))
        return DeviceTensor(block.address, shape, dtype, block)

    def block(self, size: int) -> DeviceBlock:
        """At least `size` bytes."""
        size = _size_class(size)
        if not self._free[size]:
            self._addresses.append(self._device.allocate(size))
            self._free[size].append(self._addresses[-1])
        return DeviceBlock(heappop(self._free[size]), size, self._give_back)

    def close(self) -> None:
        """Free all blocks; tensors that are left are dead."""
        self._free.clear()
        while self._addresses:
            self._device.free(self._addresses.pop())

    def _give_back(self, address: int, size: int) -> None:
        heappush(self._free[size], address)


def _size_class(size: int) -> int:
    """The next of eight sizes an octave, so that steps of nearly the same size share blocks."""
    step = max(ALIGNMENT, 1 << max((size - 1).bit_length() - 3, 0))
    return max(-(-size // step), 1) * step
