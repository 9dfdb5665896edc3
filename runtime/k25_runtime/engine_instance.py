"""An engine with the weights of one layer: contexts of its own, addresses bound once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from k25_plugins.errors import K25Error
from k25_runtime.device import DeviceContext, DeviceEngine, Shape
from k25_runtime.device_memory import DeviceCache, DeviceTensor
from k25_runtime.engine_checks import profile_for

if TYPE_CHECKING:
    from k25_engines.manifest import EngineEntry
    from k25_runtime.engine_session import EngineSession

#: (profile, whose: 0 for steps that are not captured, else the number of a captured step).
ContextKey = tuple[int, int]


class BoundContext:
    """A context that is told only what has changed."""

    def __init__(self, context: DeviceContext) -> None:
        self.context = context
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}

    def bind(self, name: str, address: int, shape: Shape | None = None) -> None:
        """Address of an input (with its shape) or output."""
        if shape is not None and self._shapes.get(name) != shape:
            self.context.set_shape(name, shape)
            self._shapes[name] = shape
        if self._addresses.get(name) != address:
            self.context.set_address(name, address)
            self._addresses[name] = address


class EngineInstance:
    """Runs one engine on the weights of one layer. One context for each profile, and for each captured step."""

    def __init__(
        self,
        *,
        entry: EngineEntry,
        engine: DeviceEngine,
        weights: Mapping[str, DeviceTensor],
        contexts: dict[ContextKey, BoundContext],
        session: EngineSession,
        label: str,
    ) -> None:
        self._entry = entry
        self._engine = engine
        self._weights = dict(weights)
        self._contexts = contexts
        self._session = session
        self._label = label
        self._inputs = {port.name for port in entry.inputs}
        self._outputs = {port.name for port in entry.outputs}
        self._profiles: dict[tuple[tuple[str, Shape], ...], int] = {}

    def run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        """Put the engine on the session's stream. A cache given as input and output is updated in place, or swapped."""
        self._session.require_open()
        self._require_all(inputs, outputs)
        bound = self._context(self._profile(inputs))
        for name, tensor in inputs.items():
            bound.bind(name, tensor.address, tensor.shape)
        swapped = []
        for name, tensor in outputs.items():
            source = self._entry.aliases.get(name)
            is_input = any(tensor is other for other in inputs.values())
            if source is not None and inputs[source].address != tensor.address:
                raise K25Error(f"{self._label}: output {name}: expected the memory of {source}, found another's")
            if source is None and is_input:
                assert isinstance(tensor, DeviceCache), name
                bound.bind(name, tensor.spare_address())
                swapped.append(tensor)
            else:
                bound.bind(name, tensor.address)
        self._session.enqueue(bound.context, self._label)
        for cache in swapped:
            cache.swap()
            self._session.swapped.append(cache)

    def _require_all(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for kind, wanted, found in (
            ("inputs", self._inputs, inputs.keys() | self._weights.keys()),
            ("outputs", self._outputs, set(outputs)),
        ):
            if wanted != found:
                raise K25Error(
                    f"{self._label}: {kind}: expected {sorted(wanted)}, found a difference in {sorted(wanted ^ found)}"
                )

    def _profile(self, inputs: Mapping[str, DeviceTensor]) -> int:
        key = tuple((name, tensor.shape) for name, tensor in inputs.items())
        if key not in self._profiles:
            shapes = {name: tensor.shape for name, tensor in (*inputs.items(), *self._weights.items())}
            self._profiles[key] = profile_for(self._entry, shapes, label=self._label)
        return self._profiles[key]

    def _context(self, profile: int) -> BoundContext:
        key = (profile, self._session.contexts)
        if key not in self._contexts:
            context = self._engine.context(profile, self._session.stream)
            bound = self._contexts[key] = BoundContext(context)
            context.set_scratch(*self._session.scratch)
            for name, tensor in self._weights.items():
                bound.bind(name, tensor.address, tensor.shape)
        return self._contexts[key]
