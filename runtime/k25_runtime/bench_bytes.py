"""The bytes that a decode step has to read, counted from the manifest: what bandwidth allows follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from k25_export.manifest import Binding, Manifest, Precision
from k25_export.tensor_table import TensorTable, for_layer

#: Bytes of a value of the latent cache.
_CACHE_ITEM_SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of one decode step.

    `dense` are weights of layers that every token takes (attention, shared experts, router, norms), `head` those of the
    last component, `experts` the routed ones that are read at all, `embedding` one row a sequence, `cache` what the
    sequences have in it.
    """

    dense: int
    experts: int
    head: int
    embedding: int
    cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts + self.head + self.embedding + self.cache


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """What the bytes of a step are made of. `one_expert` is by MoE layer, `cache_row` of all layers."""

    dense: int
    head: int
    embedding_row: int
    one_expert: dict[int, int]
    top_k: int
    cache_row: int

    def step(self, *, sequences: int, context: float, experts: dict[int, float] | None = None) -> StepBytes:
        """A step of `sequences` tokens whose sequences hold `context` positions, the new one among them, on average.

        `experts` is how many different experts each layer reads; by default those of one token.
        """
        read = dict.fromkeys(self.one_expert, float(self.top_k)) if experts is None else experts
        return StepBytes(
            dense=self.dense,
            experts=round(sum(size * read[layer] for layer, size in self.one_expert.items())),
            head=self.head,
            embedding=self.embedding_row * sequences,
            cache=round(self.cache_row * context * sequences),
        )


def model_bytes(manifest: Manifest, *, precision: Precision = "fp32") -> ModelBytes:
    """Count the weights that each component binds; vision is no part of a decode step."""
    table = TensorTable(manifest)
    text = manifest.model.text
    dense = head = embedding_row = 0
    one_expert: dict[int, int] = {}
    for entry in manifest.components:
        if entry.name == "vision":
            continue
        for layer in entry.layers or (None,):
            for binding in entry.bindings.values():
                if binding.rule in ("region", "offsets"):
                    if layer is not None and layer not in one_expert:  # words and scales are views of one region
                        one_expert[layer] = _expert_bytes(table, binding, layer)
                    continue
                size, rows = _tensor_bytes(table, binding, layer)
                if entry.name == "embed":
                    embedding_row += size // rows
                elif entry.name == "head":
                    head += size
                else:
                    dense += size
    return ModelBytes(
        dense=dense,
        head=head,
        embedding_row=embedding_row,
        one_expert=one_expert,
        top_k=text.num_experts_per_tok,
        cache_row=text.num_hidden_layers * text.cache_dim * _CACHE_ITEM_SIZES[precision],
    )


def _tensor_bytes(table: TensorTable, binding: Binding, layer: int | None) -> tuple[int, int]:
    """Bytes that a binding takes of its tensor, and the tensor's rows."""
    assert binding.tensor is not None
    tensor = table.tensor(for_layer(binding.tensor, layer))
    size = tensor.length
    if binding.rule == "slice":
        assert binding.axis is not None
        assert binding.start is not None
        assert binding.stop is not None
        size = size // tensor.shape[binding.axis] * (binding.stop - binding.start)
    return size, tensor.shape[0] if tensor.shape else 1


def _expert_bytes(table: TensorTable, binding: Binding, layer: int) -> int:
    """Bytes of one routed expert of a layer: the mean over its experts, which are all of one size."""
    assert binding.tensors is not None
    lengths = [[tensor.length for _, tensor in table.experts(for_layer(name, layer))] for name in binding.tensors]
    return sum(math.ceil(sum(sizes) / len(sizes)) for sizes in lengths)
