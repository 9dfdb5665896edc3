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

from k25_export.manifest import Manifest, Precision, read_bundle_file
from k25_runtime.backend import Backend, Instance
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
    ) -> None:
        self.text = manifest.model.text
        self.activation = "float32" if precision == "fp32" else "bfloat16"
        self._backend = backend
        self._ends: dict[str, Instance] = {}
        self._layers: dict[int, tuple[str, Instance]] = {}
        for component in manifest.components:
            loaded = backend.load(
                read_bundle_file(bundle, component.file(precision)), label=f"component {component.name}"
            )
            if component.layers is None:
                self._ends[component.name] = loaded.bind(checkpoint.weights(component, None, precision))
            else:
                for layer in component.layers:
                    weights = checkpoint.weights(component, layer, precision)
                    self._layers[layer] = (component.name, loaded.bind(weights))
        cache_shape = (blocks, block_size, self.text.cache_dim)
        storage = STORAGE_DTYPES[self.activation]
        self._cache_tensors = [
            HostTensor(np.zeros(cache_shape, storage), self.activation) for _ in range(self.text.num_hidden_layers)
        ]
        self._caches = [backend.buffer(tensor) for tensor in self._cache_tensors]
        self._share = backend.buffer(HostTensor(np.ones(1, np.float32), "float32"))

    def component_of(self, layer: int) -> str:
        """The name of the component that layer `layer` is an instance of."""
        return self._layers[layer][0]

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
        name, instance = self._layers[layer]
        out = self._empty(hidden.array.shape, self.activation)
        inputs: dict[str, Any] = {
            "hidden": hidden,
            "positions": HostTensor(batch.positions, "int32"),
            "query_start": HostTensor(batch.query_start, "int32"),
            "block_table": HostTensor(batch.block_table, "int32"),
        }
        fixed = {"cache": self._caches[layer]}
        if name != "moe_layer":
            self._run(instance, inputs, {"hidden_out": out}, fixed, {"cache_out": self._caches[layer]})
            return LayerOutput(hidden=out)
        top_k = (batch.tokens, self.text.num_experts_per_tok)
        expert_ids, expert_weights = self._empty(top_k, "int32"), self._empty(top_k, "float32")
        outputs = {"hidden_out": out, "expert_ids": expert_ids, "expert_weights": expert_weights}
        fixed["residual_share"] = self._share
        self._run(instance, inputs, outputs, fixed, {"cache_out": self._caches[layer]})
        return LayerOutput(hidden=out, expert_ids=expert_ids.array, expert_weights=expert_weights.array)

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
