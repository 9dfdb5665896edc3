"""Weights from mapped files into device memory: reader threads fill page-locked buffers while a stream copies others.

Memory is bounded by the buffers, whatever the size of the weights.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from k25_runtime.device import Bytes, Device, DeviceError, Event

DEFAULT_BUFFERS = 4
DEFAULT_BUFFER_BYTES = 32 << 20
DEFAULT_READERS = 2


@dataclass(frozen=True, kw_only=True)
class _Fragment:
    """Bytes that go through `start` of a buffer to `address`."""

    start: int
    address: int
    source: Bytes


class WeightLoader:
    """Page-locked buffers and a stream of their own, kept from one load to the next."""

    def __init__(
        self,
        device: Device,
        *,
        buffers: int = DEFAULT_BUFFERS,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        readers: int = DEFAULT_READERS,
    ) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._readers = readers
        self._buffers: list[Bytes] = []
        self._events: list[Event] = []
        self._stream = device.create_stream()
        try:
            for _ in range(buffers):
                self._buffers.append(device.allocate_pinned(buffer_bytes))
                self._events.append(device.create_event())
        except BaseException:
            self.close()
            raise

    def load(self, copies: Iterable[tuple[int, Bytes]]) -> None:
        """Copy each (address, bytes); done when it returns. What fails in a reader is raised here."""
        fills = _fills(copies, self._buffer_bytes)
        with _Readers(fills, self._buffers, count=self._readers) as readers:
            pending: deque[int] = deque()
            try:
                while readers.are_running:
                    if pending and not readers.has_ready:
                        self._recycle(pending, readers)
                        continue
                    filled = readers.next_filled()
                    if filled is None:
                        continue
                    index, fragments = filled
                    for start, stop, address in _merged(fragments):
                        self._device.copy_to_device(address, self._buffers[index][start:stop], self._stream)
                    self._device.record(self._events[index], self._stream)
                    pending.append(index)
                self._device.synchronize(self._stream)
            except BaseException:
                with suppress(DeviceError):  # what is raised already says more
                    self._device.synchronize(self._stream)
                raise

    def close(self) -> None:
        """Free buffers, events and the stream, when what failed in between is over."""
        if self._stream is not None:
            with suppress(DeviceError):  # a failed device is closed like any other
                self._device.synchronize(self._stream)
        while self._events:
            self._device.destroy_event(self._events.pop())
        while self._buffers:
            self._device.free_pinned(self._buffers.pop())
        if self._stream is not None:
            self._device.destroy_stream(self._stream)
            self._stream = None

    def _recycle(self, pending: deque[int], readers: _Readers) -> None:
        index = pending.popleft()
        self._device.synchronize_event(self._events[index])
        readers.give_back(index)


class _Readers:
    """Threads that fill buffers. Leaving the block stops and joins them."""

    def __init__(self, fills: Iterator[list[_Fragment]], buffers: list[Bytes], *, count: int) -> None:
        self._fills = fills
        self._lock = threading.Lock()
        self._buffers = buffers
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[int, list[_Fragment]] | BaseException | None] = queue.SimpleQueue()
        for index in range(len(buffers)):
            self._free.put(index)
        self._is_stopped = False
        self._running = count
        self._threads = [threading.Thread(target=self._read, name="k25-weights", daemon=True) for _ in range(count)]

    def __enter__(self) -> _Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        for _thread in self._threads:
            self._free.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @property
    def are_running(self) -> bool:
        """Whether more may come."""
        return self._running > 0

    @property
    def has_ready(self) -> bool:
        """Whether `next_filled` returns at once."""
        return not self._ready.empty()

    def next_filled(self) -> tuple[int, list[_Fragment]] | None:
        """A filled buffer; None where a reader has ended. Raises what a reader raised."""
        item = self._ready.get()
        if item is None:
            self._running -= 1
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, index: int) -> None:
        """This buffer may be filled again."""
        self._free.put(index)

    def _read(self) -> None:
        try:
            while not self._is_stopped:
                with self._lock:
                    fill = next(self._fills, None)
                if fill is None:
                    break
                index = self._free.get()
                if index is None:
                    break
                buffer = self._buffers[index]
                for fragment in fill:
                    np.copyto(buffer[fragment.start : fragment.start + len(fragment.source)], fragment.source)
                self._ready.put((index, fill))
        except BaseException as error:
            self._ready.put(error)
        finally:
            self._ready.put(None)


def _fills(copies: Iterable[tuple[int, Bytes]], buffer_bytes: int) -> Iterator[list[_Fragment]]:
    """The copies in order, cut and packed into buffers."""
    fill: list[_Fragment] = []
    used = 0
    for address, source in copies:
        done = 0
        while done < len(source):
            count = min(len(source) - done, buffer_bytes - used)
            fill.append(_Fragment(start=used, address=address + done, source=source[done : done + count]))
            done += count
            used += count
            if used == buffer_bytes:
                yield fill
                fill, used = [], 0
    if fill:
        yield fill


def _merged(fragments: list[_Fragment]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, address) with neighbours that stay neighbours joined; a fill has no gaps."""
    start = stop = address = 0
    for fragment in fragments:
        if stop > start and fragment.address == address + (stop - start):
            stop += len(fragment.source)
            continue
        if stop > start:
            yield start, stop, address
        start, stop, address = fragment.start, fragment.start + len(fragment.source), fragment.address
    if stop > start:
        yield start, stop, address
