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
from k25_runtime.host_tensor import HostTensor, host_tensor_from_float32
from k25_runtime.mapped_checkpoint import MappedCheckpoint
from k25_runtime.step_limits import StepLimits

Float32 = npt.NDArray[np.float32]

#: Inputs of a layer that say where its tokens belong.
_PLACEMENT = ("positions", "query_start", "block_table")

VISION = "vision"
POSITION_TABLE = "vision_tower.patch_embed.pos_emb.weight"


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
    """Loads each component once and binds it for every layer. Caches are zero-filled and updated in place.

    `vision` is loaded and bound when the first media item comes.
    """

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
        self._entries = {entry.name: entry for entry in manifest.components}
        self._bundle = bundle
        self._vision: Instance | None = None
        for entry in manifest.components:
            if entry.name == VISION:
                read_bundle_file(bundle, entry.file(precision))  # a changed file is refused now, not at the first image
            else:
                self._load(entry)
            self._component_of |= dict.fromkeys(entry.layers or (), entry.name)
        self._ends = {name: self._bound(name, None) for name in ("embed", "head")}
        self._layers: dict[int, _Layer] = {}
        self._share = backend.buffer(HostTensor(np.ones(1, np.float32), "float32"))
        if bind_layers:
            for layer in range(self.text.num_hidden_layers):
                self._layer(layer)

    @property
    def limits(self) -> StepLimits:
        """How large a step may be."""
        return self._backend.limits

    @property
    def backend_name(self) -> str:
        """What runs the components."""
        return self._backend.name

    @property
    def details(self) -> Mapping[str, str]:
        """What a report should say of how the backend computes."""
        return self._backend.details

    def component_of(self, layer: int) -> str:
        """The name of the component that layer `layer` is an instance of."""
        return self._component_of[layer]

    def release_layers(self) -> None:
        """Let go of all layers that are bound, of their caches and of the maps behind them."""
        self._layers.clear()
        self._vision = None
        self._checkpoint.unmap()

    def _load(self, entry: ComponentEntry) -> None:
        self._loaded[entry.name] = (entry, self._backend.component(self._bundle, entry, self._precision))

    def _bound(self, name: str, layer: int | None) -> Instance:
        if name not in self._loaded:
            raise mismatch("bundle", expected=f"a component {name}", found=", ".join(self._loaded))
        entry, component = self._loaded[name]
        alignment = self._backend.expert_alignment
        if alignment is None:
            return component.bind(self._checkpoint.weights(entry, layer, self._precision))
        instance = component.bind(self._checkpoint.weights_to_copy(entry, layer, self._precision, alignment=alignment))
        self._checkpoint.unmap()
        return instance

    def _layer(self, layer: int) -> _Layer:
        if layer not in self._layers:
            if layer not in self._component_of:
                raise mismatch("bundle", expected=f"a component for layer {layer}", found="none")
            name = self._component_of[layer]
            self._layers[layer] = _Layer(
                component=name,
                instance=self._bound(name, layer),
                cache=self._backend.zeros(self._cache_shape, self.activation),
            )
        return self._layers[layer]

    def run(self, batch: Batch, rows: npt.NDArray[np.int32]) -> Float32:
        """Logits float32 [R, V] of the rows asked for; all tokens are appended to the cache."""
        inputs = _placement(batch) | {"rows": HostTensor(rows, "int32")}
        if batch.media is None:
            inputs["token_ids"] = HostTensor(batch.token_ids, "int32")
        else:
            inputs["hidden"] = self.embed(batch)
        logits = self._backend.step(self._forward, inputs)
        return np.empty((0, self.text.vocab_size), np.float32) if logits is None else logits.array

    def embed(self, batch: Batch) -> HostTensor:
        """`hidden` [T, H] of the token ids; where the batch has media, theirs instead."""
        hidden = self._backend.host(self._embedded(HostTensor(batch.token_ids, "int32")))
        if batch.media is not None:
            hidden.array[batch.media.positions] = self.hidden_from_float32(batch.media.embeddings).array
        return hidden

    def cache_of_rows(self, rows: Float32) -> Any:
        """A latent cache of its own for `run_layer`, float32 [blocks, block_size, C]."""
        return self._backend.buffer(self.hidden_from_float32(rows))

    def run_layer(self, layer: int, hidden: HostTensor, batch: Batch, cache: Any = None) -> LayerOutput:
        """One decoder layer on `hidden` [T, H]; appends to the layer's cache, or to the one given."""
        outputs = self._layer_outputs(layer, hidden, _placement(batch), cache)
        found = {name: self._backend.host(tensor) for name, tensor in outputs.items()}
        if "expert_ids" not in found:
            return LayerOutput(hidden=found["hidden_out"])
        return LayerOutput(
            hidden=found["hidden_out"],
            expert_ids=found["expert_ids"].array,
            expert_weights=found["expert_weights"].array,
        )

    def head(self, hidden: HostTensor, rows: npt.NDArray[np.int32]) -> Float32:
        """Logits float32 [R, V] of these rows of `hidden` [T, H]."""
        return self._backend.host(self._logits(hidden, HostTensor(rows, "int32"))).array

    @property
    def has_vision(self) -> bool:
        """Whether the bundle has the component for images and video."""
        return VISION in self._entries

    def vision(self, pixel_values: Float32, inputs: Mapping[str, npt.NDArray[Any]], *, tokens: int) -> Float32:
        """Embeddings float32 [tokens, H] of a media item: its patches [P, 3, p, p], and `vision_inputs` of its grid."""
        if self._vision is None:
            if VISION not in self._loaded:
                self._load(self._entries[VISION])
            self._vision = self._bound(VISION, None)
        out = self._backend.empty((tokens, self.text.hidden_size), self.activation)
        activations = {"pixel_values": pixel_values, "position_embedding": inputs["position_embedding"]}
        tensors = {name: self.hidden_from_float32(values) for name, values in activations.items()}
        tensors |= {name: HostTensor(inputs[name], "float32") for name in ("rope_cos", "rope_sin")}
        tensors["merge_index"] = HostTensor(inputs["merge_index"], "int32")
        self._run(self._vision, tensors, {"media_embeddings": out})
        return self._backend.host(out).to_float32()

    def position_table(self) -> Float32:
        """The vision tower's learned positions, float32 [H0, W0, D], from the checkpoint."""
        return self._checkpoint.tensor(POSITION_TABLE).to_float32()

    def hidden_from_float32(self, values: Float32) -> HostTensor:
        """Activations of this precision from float32 values [T, H]."""
        return host_tensor_from_float32(values, self.activation)

    # On tensors of the host or of the backend: what is in device memory stays there.

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        """Logits [R, V] of a step, or None where no rows are asked for."""
        hidden = inputs["hidden"] if "hidden" in inputs else self._embedded(inputs["token_ids"])
        for layer in range(self.text.num_hidden_layers):
            hidden = self._layer_outputs(layer, hidden, inputs)["hidden_out"]
        return self._logits(hidden, inputs["rows"]) if inputs["rows"].shape[0] else None

    def _embedded(self, token_ids: Any) -> Any:
        hidden = self._backend.empty((token_ids.shape[0], self.text.hidden_size), self.activation)
        self._run(self._ends["embed"], {"token_ids": token_ids}, {"hidden": hidden})
        return hidden

    def _layer_outputs(
        self, layer: int, hidden: Any, placement: Mapping[str, Any], cache: Any = None
    ) -> dict[str, Any]:
        bound = self._layer(layer)
        cache = bound.cache if cache is None else cache
        inputs = {"hidden": hidden} | {name: placement[name] for name in _PLACEMENT}
        outputs = {"hidden_out": self._backend.empty(hidden.shape, self.activation)}
        fixed = {"cache": cache}
        if bound.component == "moe_layer":
            top_k = (hidden.shape[0], self.text.num_experts_per_tok)
            outputs["expert_ids"] = self._backend.empty(top_k, "int32")
            outputs["expert_weights"] = self._backend.empty(top_k, "float32")
            fixed["residual_share"] = self._share
        self._run(bound.instance, inputs, outputs, fixed, {"cache_out": cache})
        return outputs

    def _logits(self, hidden: Any, rows: Any) -> Any:
        logits = self._backend.empty((rows.shape[0], self.text.vocab_size), "float32")
        self._run(self._ends["head"], {"hidden": hidden, "rows": rows}, {"logits": logits})
        return logits

    def _run(
        self,
        instance: Instance,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        fixed_inputs: Mapping[str, Any] | None = None,
        fixed_outputs: Mapping[str, Any] | None = None,
    ) -> None:
        buffer = self._backend.buffer
        instance.run(
            {name: buffer(tensor) for name, tensor in inputs.items()} | dict(fixed_inputs or {}),
            {name: buffer(tensor) for name, tensor in outputs.items()} | dict(fixed_outputs or {}),
        )


def _placement(batch: Batch) -> dict[str, HostTensor]:
    return {name: HostTensor(getattr(batch, name), "int32") for name in _PLACEMENT}
