"""The stitched model: components run one after the other on a flat batch, each layer with its own latent cache.

Legend: T tokens, R rows, H hidden, V vocabulary, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_export.manifest import ComponentEntry, Manifest, Precision, read_bundle_file
from k25_plugins.errors import mismatch
from k25_runtime.backend import Backend, Component, Instance
from k25_runtime.batch import Batch
from k25_runtime.host_tensor import STORAGE_DTYPES, HostTensor, host_tensor_from_float32
from k25_runtime.mapped_checkpoint import MappedCheckpoint

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """What a layer returns: `hidden` [T, H]; `expert_ids` int32 and `expert_weights` float32 [T, K] of an MoE layer."""

    hidden: HostTensor
    expert_ids: npt.NDArray[np.int32] | None = None
    expert_weights: Float32 | None = None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's component with its weights bound, and its latent cache."""

    component: str
    instance: Instance
    cache: Any


class ModelRunner:
    """Loads each component once and binds it for every layer. Caches are zero-filled and updated in place."""

    def __init__(
        self,
        *,
        bundle: Path,
        manifest: Manifest,
        checkpoint: MappedCheckpoint,
        backend: Backend,
        precision: Precision,
        blocks: int,
        block_size: int,
        bind_layers: bool = True,
    ) -> None:
        """With `bind_layers` false a layer is bound when it is first run; `release_layers` lets go of it again."""
        self.text = manifest.model.text
        self.activation = "float32" if precision == "fp32" else "bfloat16"
        self._backend = backend
        self._checkpoint = checkpoint
        self._precision = precision
        self._cache_shape = (blocks, block_size, self.text.cache_dim)
        self._loaded: dict[str, tuple[ComponentEntry, Component]] = {}
        self._component_of: dict[int, str] = {}
        for entry in manifest.components:
            data = read_bundle_file(bundle, entry.file(precision))
            self._loaded[entry.name] = (entry, backend.load(data, label=f"component {entry.name}"))
            self._component_of |= dict.fromkeys(entry.layers or (), entry.name)
        self._ends = {name: self._bound(name, None) for name in ("embed", "head")}
        self._layers: dict[int, _Layer] = {}
        self._share = backend.buffer(HostTensor(np.ones(1, np.float32), "float32"))
        if bind_layers:
            for layer in range(self.text.num_hidden_layers):
                self._layer(layer)

    def component_of(self, layer: int) -> str:
        """The name of the component that layer `layer` is an instance of."""
        return self._component_of[layer]

    def release_layers(self) -> None:
        """Let go of all layers that are bound, of their caches and of the maps behind them."""
        self._layers.clear()
        self._checkpoint.unmap()

    def _bound(self, name: str, layer: int | None) -> Instance:
        if name not in self._loaded:
            raise mismatch("bundle", expected=f"a component {name}", found=", ".join(self._loaded))
        entry, component = self._loaded[name]
        return component.bind(self._checkpoint.weights(entry, layer, self._precision))

    def _layer(self, layer: int) -> _Layer:
        if layer not in self._layers:
            if layer not in self._component_of:
                raise mismatch("bundle", expected=f"a component for layer {layer}", found="none")
            name = self._component_of[layer]
            cache = HostTensor(np.zeros(self._cache_shape, STORAGE_DTYPES[self.activation]), self.activation)
            self._layers[layer] = _Layer(
                component=name, instance=self._bound(name, layer), cache=self._backend.buffer(cache)
            )
        return self._layers[layer]

    def run(self, batch: Batch, rows: npt.NDArray[np.int32]) -> Float32:
        """Logits float32 [R, V] of the rows asked for; all tokens are appended to the cache."""
        hidden = self.embed(batch)
        for layer in range(self.text.num_hidden_layers):
            hidden = self.run_layer(layer, hidden, batch).hidden
        if len(rows) == 0:
            return np.empty((0, self.text.vocab_size), np.float32)
        return self.head(hidden, rows)

    def embed(self, batch: Batch) -> HostTensor:
        """`hidden` [T, H] of the token ids."""
        hidden = self._empty((batch.tokens, self.text.hidden_size), self.activation)
        self._run(self._ends["embed"], {"token_ids": HostTensor(batch.token_ids, "int32")}, {"hidden": hidden})
        return hidden

    def run_layer(self, layer: int, hidden: HostTensor, batch: Batch) -> LayerOutput:
        """One decoder layer on `hidden` [T, H]; appends to the layer's cache."""
        bound = self._layer(layer)
        out = self._empty(hidden.array.shape, self.activation)
        inputs: dict[str, HostTensor] = {
            "hidden": hidden,
            "positions": HostTensor(batch.positions, "int32"),
            "query_start": HostTensor(batch.query_start, "int32"),
            "block_table": HostTensor(batch.block_table, "int32"),
        }
        outputs, fixed = {"hidden_out": out}, {"cache": bound.cache}
        if bound.component == "moe_layer":
            top_k = (batch.tokens, self.text.num_experts_per_tok)
            outputs |= {"expert_ids": self._empty(top_k, "int32"), "expert_weights": self._empty(top_k, "float32")}
            fixed["residual_share"] = self._share
        self._run(bound.instance, inputs, outputs, fixed, {"cache_out": bound.cache})
        if bound.component != "moe_layer":
            return LayerOutput(hidden=out)
        return LayerOutput(
            hidden=out, expert_ids=outputs["expert_ids"].array, expert_weights=outputs["expert_weights"].array
        )

    def head(self, hidden: HostTensor, rows: npt.NDArray[np.int32]) -> Float32:
        """Logits float32 [R, V] of these rows of `hidden` [T, H]."""
        logits = self._empty((len(rows), self.text.vocab_size), "float32")
        self._run(self._ends["head"], {"hidden": hidden, "rows": HostTensor(rows, "int32")}, {"logits": logits})
        return logits.array

    def hidden_from_float32(self, values: Float32) -> HostTensor:
        """Activations of this precision from float32 values [T, H]."""
        return host_tensor_from_float32(values, self.activation)

    @staticmethod
    def _empty(shape: tuple[int, ...], dtype: str) -> HostTensor:
        return HostTensor(np.empty(shape, STORAGE_DTYPES[dtype]), dtype)

    def _run(
        self,
        instance: Instance,
        inputs: Mapping[str, HostTensor],
        outputs: Mapping[str, HostTensor],
        fixed_inputs: Mapping[str, Any] | None = None,
        fixed_outputs: Mapping[str, Any] | None = None,
    ) -> None:
        buffer = self._backend.buffer
        instance.run(
            {name: buffer(tensor) for name, tensor in inputs.items()} | dict(fixed_inputs or {}),
            {name: buffer(tensor) for name, tensor in outputs.items()} | dict(fixed_outputs or {}),
        )
