"""Sizes in bytes as people write them.

kB, MB, GB, TB count in powers of 1000, KiB, MiB, GiB, TiB in powers of 1024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType

from k25_plugins.errors import mismatch

_UNITS: Mapping[str, int] = MappingProxyType(
    {"B": 1}
    | {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
    | {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
)
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,9})?) ?([A-Za-z]+)", re.ASCII)


def bytes_from_text(text: str) -> int:
    """Bytes from `141GB` (powers of 1000), `48GiB` (powers of 1024), `0B`; a number alone says too little.

    Fractions of a byte are dropped. Raises `InputError`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise mismatch(
            "size",
            expected=f"a number and a unit among {', '.join(_UNITS)}",
            found=repr(text),
            hint="48GB is 48,000,000,000 bytes, 48GiB is 51,539,607,552.",
        )
    return int(Decimal(match[1]) * _UNITS[match[2]])
