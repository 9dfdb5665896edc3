"""The first op that diverges, as data and as one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from k25_validate.bound_weights import WeightSource

#: What kind of fault: see docs/bisect.md.
Kind = Literal["binding", "bytes", "checkpoint", "inputs", "wiring", "attribute", "kernel", "graph", "runtime"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor is most off: its coordinate, the token it belongs to, and both values there."""

    coordinate: tuple[int, ...]
    token: str
    actual: float
    expected: float


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One op of one component instance whose inputs agree with the reference and whose output does not.

    `tap` is the reference's name of the tensor (of `seen_at`, the first one that a formula has, if that is another),
    `stages` lead from the op to the node inside its body, `error` and
    `error_before` are relative L2 of the output and of the worst of what was there before.
    """

    component: str
    layer: int | None
    way: str
    step: int
    node: int
    op: str
    tensor: str
    tap: str
    place: Place
    error: float
    tolerance: float
    error_before: float
    kind: Kind
    cause: str
    weights: tuple[WeightSource, ...] = ()
    seen_at: str = ""
    stages: tuple[str, ...] = ()
    expert: int | None = None
    local_error: float = 0.0
    local_tolerance: float = 0.0
    ops: int = 0
    runs: int = 0

    def sentence(self) -> str:
        """Layer, component, op, tensor, coordinate, checkpoint tensor and shard, errors there and before, cause."""
        where = self.component if self.layer is None else f"layer {self.layer}, {self.component}"
        inside = f", inside at {' > '.join(self.stages)}" if self.stages else ""
        expert = f", expert {self.expert}" if self.expert is not None else ""
        sources = [source for source in self.weights if source.kind] or list(self.weights)
        behind = "; ".join(f"{source.tensor} in {source.shard}" for source in sources[:3])
        place = self.place
        seen = f", seen at {self.seen_at!r}" if self.seen_at else ""
        return (
            f"{where}: {self.op} (node {self.node}, tensor {self.tensor!r}{seen}, "
            f"the reference's {self.tap}{expert}{inside}) "
            f"is the first op that diverges, at {list(place.coordinate)}{place.token}: {place.actual:.7g}, reference "
            f"{place.expected:.7g}; relative L2 {self.error:.2e} there, {self.error_before:.2e} just before "
            f"(tolerance {self.tolerance:.1e})."
            + (f" Behind it: {behind}." if behind else "")
            + f" {self.kind.capitalize()}: {self.cause}."
        )
