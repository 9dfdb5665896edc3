"""The ONNX file of one component in one precision, as bytes with its ports."""

from __future__ import annotations

from dataclasses import dataclass

from k25_export.manifest import Port


@dataclass(frozen=True, kw_only=True)
class TracedComponent:
    """`inputs` and `outputs` are in the graph's order."""

    data: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
