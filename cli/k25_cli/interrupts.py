"""SIGINT that is never lost: a KeyboardInterrupt may be swallowed (by a destructor, by a library being loaded)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_noted: list[int] = []


def was_interrupted() -> bool:
    """Whether a SIGINT arrived."""
    return bool(_noted)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt where a SIGINT arrived before and was swallowed."""
    if _noted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Note every SIGINT that arrives inside, and raise it as always; yields the list of them."""
    _noted.clear()
    is_ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not is_ours or before is not signal.default_int_handler:
        yield _noted  # somebody else's handler, or ignored: theirs to decide
        return

    def note(number: int, frame: FrameType | None) -> None:
        _noted.append(number)
        signal.default_int_handler(number, frame)

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # cleans up on the way: nothing half-written stays

    terminate = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, note)
    if terminate is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        yield _noted
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminate)
